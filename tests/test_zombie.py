"""P1, P4: a holder paused past its lease, at any step, does no harm when it wakes."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest

from aiomigrate import MigrationManager
from tests import scenario
from tests.faults import Fault
from tests.processes import MP, initialize, quiet_logger, start
from tests.test_kill import kill_points, undisturbed
from tests.tools import SEED

OPTIONS: dict[str, Any] = {"lease_ttl": 0.5, "concurrency": 1}


async def woken(path: Path, at: int, when: str) -> str | None:
    """Pauses a holder at a commit until another has finished, wakes it, and compares the end.

    Returns:
        What was wrong, or `None`.
    """
    expected = await scenario.snapshot(path.parent / "expected")
    mark = path.parent / f"{path.name}.stopped"
    results = MP.Queue()
    fault = Fault(action="stop", at=at, when=when, signal_file=str(mark))
    process = start(initialize, str(path), "migrations", fault, OPTIONS, results)
    assert process.pid is not None
    try:
        with anyio.fail_after(30):
            while not mark.exists():
                assert process.is_alive(), f"ended before commit {at}"
                await anyio.sleep(0.01)
        async with MigrationManager(
            path, migrations=scenario.migrations(), logger=quiet_logger(), **OPTIONS
        ) as manager:
            await manager.initialize()
        os.kill(process.pid, signal.SIGCONT)
        outcome, told = await anyio.to_thread.run_sync(lambda: results.get(timeout=30))
    finally:
        process.kill()
        process.join()
    # Paused while the tables were being made, or once all was recorded, it holds no lease yet, or
    # none any more: it then finds the work done.
    if outcome not in ("LeaseLostError", "ok"):
        return f"it ended with {outcome}: {told}"
    if outcome == "ok" and told and told != [(m.name, m.version) for m in _in_order(told)]:
        return f"it claims {told}"
    found = await scenario.snapshot(path)
    twice = {key: n for key, n in (await scenario.applied_counts(path)).items() if n != 1}
    if twice:
        return f"applied more than once: {twice}"
    different = [key for key in expected if expected[key] != found[key]]
    return f"{different}: {[(found[k], expected[k]) for k in different]}" if different else None


def _in_order(told: list[tuple[str, int]]) -> list[Any]:
    known = {(m.name, m.version): m for m in scenario.migrations()}
    return [known[key] for key in told]


async def check_points(tmp_path: Path, points: list[tuple[int, str]]) -> None:
    """Pauses a holder at each point and tells which ended wrongly."""
    wrong = {}
    for at, when in points:
        found = await woken(tmp_path / f"{at}-{when}", at, when)
        if found is not None:
            wrong[at, when] = found
    assert wrong == {}


async def test_a_holder_paused_at_sampled_commits_does_no_harm_when_it_wakes(
    tmp_path: Path,
) -> None:
    """Stopped before or after a commit until its lease is taken: nothing is applied twice."""
    _, count = await undisturbed(tmp_path / "expected")
    points = random.Random(SEED).sample(kill_points(count - 2), 12)

    await check_points(tmp_path, sorted(points))


@pytest.mark.campaign
async def test_a_holder_paused_at_any_commit_does_no_harm_when_it_wakes(tmp_path: Path) -> None:
    """The whole of the above: every commit of user tables and ledger."""
    _, count = await undisturbed(tmp_path / "expected")

    await check_points(tmp_path, kill_points(count - 2))
