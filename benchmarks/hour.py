"""One long run on a clock that hurries, in a process of its own.

`python -m benchmarks.hour HOW DATABASE SECONDS` lets four lines work for so long on that clock, a
migration a minute on each, progress told every second, by HOW (`floor`: the same work by hand;
`ours`: by migrations); prints processor seconds, and what was written, as JSON. LanceDB is the real
one. For what is judged, see `footprint`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import selectors
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import lancedb

from aiomigrate import op
from benchmarks import workload
from benchmarks.setting import manager_of

LINES = 4
_PATIENCE_S = 0.002
_IDLE_S = 0.0002
"""Less than that of the patience is no work: the waiting itself takes some."""
_MINUTE = 60


class _Selector(selectors.DefaultSelector):
    """Waits in earnest for a moment: where nothing came and no thread worked, time jumps."""

    skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= _PATIENCE_S:
            return super().select(timeout)
        before = time.process_time()
        found = super().select(_PATIENCE_S)
        if not found and time.process_time() - before < _IDLE_S:
            self.skipped_s += timeout - _PATIENCE_S
        return found


class HurriedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer when nothing else is there to wait for.

    What LanceDB does in its own threads is such a thing as long as it takes processor time.
    """

    def __init__(self) -> None:
        self._jumping = _Selector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Returns the hurried time."""
        return super().time() + self._jumping.skipped_s


async def work(tell: Any) -> None:
    """Does what a migration of a minute does: waits for something else, and tells how far it is."""
    for second in range(_MINUTE):
        await anyio.sleep(1)
        tell(second + 1, _MINUTE)


async def floor(path: str, minutes: int) -> dict[str, float]:
    """Works by hand: each line's column, then its minute."""
    base = asyncio.get_running_loop().time()
    connection = await lancedb.connect_async(path)

    async def line(name: str) -> None:
        table = await workload.create(connection, name)
        for version in range(1, minutes + 1):
            if version > 1:
                await workload.grow(table, version)
            await work(lambda _done, _total: None)

    async with anyio.create_task_group() as group:
        for name in workload.table_names(LINES):
            group.start_soon(line, name)
    return {"simulated_s": asyncio.get_running_loop().time() - base}


async def ours(path: str, minutes: int) -> dict[str, float]:
    """Works by migrations, with a listener to their progress and the default lease."""
    loop = asyncio.get_running_loop()
    begun, base = dt.datetime.now(dt.UTC), loop.time()
    told = 0

    def listen(_: Any) -> None:
        nonlocal told
        told += 1

    async def minute(context: Any) -> None:
        await work(context.progress)

    steps = [
        replace(one, operations=[*one.operations, op.Run(minute)])
        for name in workload.table_names(LINES)
        for one in workload.grown(name, minutes)
    ]
    clock = SimpleNamespace(
        monotonic=loop.time, wall=lambda: begun + dt.timedelta(seconds=loop.time() - base)
    )
    async with await manager_of(path, steps, clock=clock, on_progress=listen) as manager:
        report = await manager.upgrade()
    assert len(report.applied) == LINES * minutes
    return {
        "ledger_commits": report.ledger_commits,
        "progress_calls": told,
        "simulated_s": loop.time() - base,
    }


async def main(how: str, path: str, seconds: int) -> None:
    """Runs it and prints what it took."""
    begun, cpu = time.perf_counter(), time.process_time()
    facts: Mapping[str, float] = await (ours if how == "ours" else floor)(path, seconds // _MINUTE)
    took = {"cpu_s": time.process_time() - cpu, "took_s": time.perf_counter() - begun}
    print(json.dumps({**took, **facts}))


if __name__ == "__main__":
    anyio.run(
        main, sys.argv[1], str(Path(sys.argv[2]).absolute()), int(sys.argv[3]),
        backend_options={"loop_factory": HurriedLoop},
    )  # fmt: skip
