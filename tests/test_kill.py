"""P2: killed at any instant, the next run needs no human and ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from aiomigrate import MigrationManager
from tests import scenario
from tests.faults import Fault, FaultyStore, faulty_manager
from tests.processes import initialize, quiet_logger, start
from tests.tools import SEED

OPTIONS: dict[str, Any] = {"lease_ttl": 0.5}


async def undisturbed(path: Path) -> tuple[dict[str, Any], int]:
    """Runs the scenario once; returns its end and how many commits it made."""
    async with faulty_manager(Fault())(
        path, migrations=scenario.migrations(), logger=quiet_logger(), concurrency=1
    ) as manager:
        await manager.initialize()
        store = manager._store
        assert isinstance(store, FaultyStore)
        return await scenario.snapshot(path), len(store.calls)


async def recovered(path: Path) -> dict[str, Any]:
    """Runs again, without faults, and returns the end."""
    async with MigrationManager(
        path, migrations=scenario.migrations(), logger=quiet_logger(), **OPTIONS
    ) as manager:
        await manager.initialize()
        validation = await manager.validate()
        assert validation.valid, validation
    return await scenario.snapshot(path)


def kill_points(count: int) -> list[tuple[int, str]]:
    """Returns every commit, before and after it."""
    return [(n, when) for n in range(1, count + 1) for when in ("before", "after")]


async def killed_at(path: Path, at: int, when: str) -> None:
    """Runs the scenario in a process that kills itself at a commit."""
    fault = Fault(action="kill", at=at, when=when)
    process = start(initialize, str(path), "migrations", fault, {**OPTIONS, "concurrency": 1})
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


async def check_points(tmp_path: Path, points: list[tuple[int, str]]) -> None:
    """Kills a run at each point, runs again, and compares the end with the undisturbed one."""
    expected, _ = await undisturbed(tmp_path / "expected")
    failed = []
    for at, when in points:
        path = tmp_path / f"{at}-{when}"
        await killed_at(path, at, when)
        try:
            if await recovered(path) != expected:
                failed.append((at, when, "differs"))
        except Exception as exc:  # noqa: BLE001 - which points fail is the finding
            failed.append((at, when, repr(exc)))
    assert failed == []


async def test_sampled_kill_points_recover_to_the_undisturbed_end(tmp_path: Path) -> None:
    """A SIGKILL before or after sampled commits leaves nothing that the next run does not mend."""
    _, count = await undisturbed(tmp_path / "count")
    points = random.Random(SEED).sample(kill_points(count - 4), 24)

    await check_points(tmp_path, sorted(points))


@pytest.mark.campaign
async def test_every_kill_point_recovers_to_the_undisturbed_end(tmp_path: Path) -> None:
    """The whole of the above: every commit of user tables and ledger, before and after."""
    _, count = await undisturbed(tmp_path / "count")

    await check_points(tmp_path, kill_points(count - 4))
