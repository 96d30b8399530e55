"""P8: cancelled at any call, a run leaves no task, lease or handle, and the next one completes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import anyio
import pytest

from aiomigrate import MigrationManager
from tests import scenario
from tests.faults import Fault, FaultyStore, faulty_manager
from tests.guarantees.test_killed_process import undisturbed
from tests.processes import quiet_logger
from tests.tools import SEED


async def all_calls(path: Path) -> int:
    """Returns how many LanceDB calls, reads too, an undisturbed run makes."""
    async with faulty_manager(Fault(mutations=False))(
        path, migrations=scenario.migrations(), logger=quiet_logger(), concurrency=1
    ) as manager:
        await manager.initialize()
        store = manager._database.store
        assert isinstance(store, FaultyStore)
        return len(store.calls)


async def cancelled_at(path: Path, at: int) -> None:
    """Cancels a run at its n-th call; it must end, free its lease, and leave no task."""
    tasks = len(asyncio.all_tasks())
    manager = faulty_manager(Fault(action="cancel", at=at, when="before", mutations=False))(
        path, migrations=scenario.migrations(), logger=quiet_logger(), concurrency=1
    )
    with anyio.CancelScope() as scope:
        manager._store_type.scope = scope  # type: ignore[attr-defined]
        await manager.initialize()
    await manager.aclose()

    assert scope.cancelled_caught or at > 3
    assert len(asyncio.all_tasks()) == tasks
    assert await held(path) == []


async def held(path: Path) -> list[str]:
    """Returns who holds a lease of a database; nobody where there is none."""
    return (await scenario.snapshot(path))["held"] if await anyio.Path(path).exists() else []


async def check_points(tmp_path: Path, points: list[int]) -> None:
    """Cancels a run at each point, runs again, and compares the end with the undisturbed one."""
    expected, _ = await undisturbed(tmp_path / "expected")
    wrong = {}
    for at in points:
        path = tmp_path / str(at)
        await cancelled_at(path, at)
        async with MigrationManager(
            path, migrations=scenario.migrations(), logger=quiet_logger()
        ) as manager:
            await manager.initialize()
        found = await scenario.snapshot(path)
        if found != expected:
            wrong[at] = [key for key in expected if expected[key] != found[key]]
    assert wrong == {}


async def test_cancellation_at_sampled_calls(tmp_path: Path) -> None:
    """Cancelled at sampled LanceDB calls, the run ends clean and the next one completes."""
    count = await all_calls(tmp_path / "count")
    points = random.Random(SEED).sample(range(1, count + 1), 15)

    await check_points(tmp_path, sorted(points))


@pytest.mark.campaign
async def test_cancellation_at_every_call(tmp_path: Path) -> None:
    """The whole of the above."""
    count = await all_calls(tmp_path / "count")

    await check_points(tmp_path, list(range(1, count + 1)))


@pytest.mark.parametrize("seconds", [0.05, 0.2])
async def test_asyncio_timeouts_are_as_safe(tmp_path: Path, seconds: float) -> None:
    """`asyncio.wait_for`, which cancels a task once and not a scope, leaves no lease either."""
    expected, _ = await undisturbed(tmp_path / "expected")
    path = tmp_path / "db"
    manager = MigrationManager(path, migrations=scenario.migrations(), logger=quiet_logger())
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(manager.initialize(), seconds)
    await manager.aclose()
    assert await held(path) == []
    async with MigrationManager(
        path, migrations=scenario.migrations(), logger=quiet_logger()
    ) as manager:
        await manager.initialize()

    assert await scenario.snapshot(path) == expected


def open_files() -> int:
    """Returns how many file descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc tells what is open")
async def test_no_file_stays_open(tmp_path: Path) -> None:
    """After runs at target, no more file descriptors are open than before."""

    async def run() -> None:
        async with MigrationManager(
            tmp_path / "db", migrations=scenario.migrations(), logger=quiet_logger()
        ) as manager:
            await manager.initialize()

    await run()
    before = open_files()
    for _ in range(20):
        await run()

    assert open_files() <= before + 2
