"""Real processes for the proofs: started by a fork server with the imports preloaded.

The server itself never connects to LanceDB, so its children may be forked safely.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import multiprocessing.process
import traceback
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

from tests.faults import Fault, faulty_manager

# The fork server has imported LanceDB but never used it: its children are safe (and tested).
warnings.filterwarnings("ignore", message="lancedb fork support", category=RuntimeWarning)

MP = multiprocessing.get_context("forkserver")
MP.set_forkserver_preload(
    ["tests.processes", "lancedb", "aiomigrate.manager", "tests.faults", "tests.scenario"]
)


def quiet_logger() -> Any:
    """Returns a logger that keeps errors only."""
    import structlog

    return structlog.wrap_logger(
        structlog.PrintLogger(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR + 10),
    )


def start(
    target: Callable[..., Awaitable[None]], *args: Any
) -> multiprocessing.process.BaseProcess:
    """Starts an async function in a process of its own."""
    process = MP.Process(target=_main, args=(target, args))
    process.start()
    return process


def _main(target: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
    try:
        asyncio.run(target(*args))
    except BaseException:
        traceback.print_exc()
        raise


async def initialize(
    uri: str,
    source: Any,
    fault: Fault,
    options: dict[str, Any],
    results: Any = None,
    gate: Any = None,
) -> None:
    """Initializes a database, with a fault; tells (outcome, steps applied) through a queue.

    Args:
        uri: The database.
        source: As for the manager, or the name of a function of `tests.scenario`.
        fault: Struck in this process.
        options: Of the manager.
        results: A queue for `(outcome, [(line, version), ...])`.
        gate: A barrier to wait at before calling `initialize`.
    """
    import tests.scenario

    migrations = source
    if isinstance(source, str) and hasattr(tests.scenario, source):
        migrations = getattr(tests.scenario, source)()
    manager_type = faulty_manager(fault)
    async with manager_type(
        uri, migrations=migrations, logger=quiet_logger(), **options
    ) as manager:
        await manager.scripts()
        if gate is not None:
            gate.wait()
        try:
            report = await manager.initialize()
            told = ("ok", [(s.line, s.version) for s in report.applied])
        except Exception as exc:  # noqa: BLE001 - every outcome is told, an error by its name
            told = (type(exc).__name__, [str(exc)])
        if results is not None:
            results.put(told)
