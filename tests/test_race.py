"""P1: however many processes start together, each migration is applied once and all succeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from aiomigrate import Migration, MigrationFailedError, MigrationManager, op
from tests import scenario
from tests.faults import Fault
from tests.processes import MP, initialize, quiet_logger, start
from tests.test_kill import undisturbed

PROCESSES = 8


async def race(path: Path, source: Any, options: dict[str, Any]) -> list[tuple[str, Any]]:
    """Starts processes that initialize at the same instant; returns what each tells."""
    gate, results = MP.Barrier(PROCESSES), MP.Queue()
    processes = [
        start(initialize, str(path), source, Fault(), options, results, gate)
        for _ in range(PROCESSES)
    ]
    told = [await anyio.to_thread.run_sync(lambda: results.get(timeout=60)) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return told


@pytest.mark.parametrize("trial", range(10))
async def test_eight_processes_on_a_fresh_database(tmp_path: Path, trial: int) -> None:
    """All 8 succeed, the journal has each migration once, and the end is that of one process."""
    expected, _ = await undisturbed(tmp_path / "expected")
    told = await race(tmp_path / f"{trial}", "migrations", {"lease_ttl": 5.0})

    assert [outcome for outcome, _ in told] == ["ok"] * PROCESSES
    assert sum(len(steps) for _, steps in told) == len(scenario.migrations())
    assert await scenario.snapshot(tmp_path / f"{trial}") == expected
    assert set((await scenario.applied_counts(tmp_path / f"{trial}")).values()) == {1}


async def test_two_managers_in_one_process(tmp_path: Path) -> None:
    """Managers of one process share nothing: both succeed, each migration runs once."""
    reports = []

    async def run() -> None:
        async with MigrationManager(
            tmp_path / "db", migrations=scenario.migrations(), logger=quiet_logger()
        ) as manager:
            reports.append(await manager.initialize())

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        group.start_soon(run)

    assert sorted(len(r.steps) for r in reports) == [0, len(scenario.migrations())]
    assert reports[0].lines == reports[1].lines
    assert set((await scenario.applied_counts(tmp_path / "db")).values()) == {1}


def failing_slowly() -> list[Migration]:
    """Returns one migration that fails after others had time to start waiting."""
    return [
        Migration(
            table="t",
            version=1,
            operations=[op.CreateTable(scenario.PEOPLE), op.Run(_fail_slowly, table="t")],
        )
    ]


async def _fail_slowly(context: Any) -> None:
    await anyio.sleep(1)
    raise RuntimeError("boom")


async def test_who_waits_for_a_failing_migration_raises_that_failure(tmp_path: Path) -> None:
    """A waiter does not try again what has just failed: the migration ran once, both raise it."""
    errors: list[MigrationFailedError] = []

    async def run() -> None:
        async with MigrationManager(
            tmp_path / "db", migrations=failing_slowly(), logger=quiet_logger()
        ) as manager:
            with pytest.raises(MigrationFailedError) as caught:
                await manager.initialize()
            errors.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        group.start_soon(run)

    assert all("boom" in str(error) for error in errors)
    assert sum("another process" in str(error) for error in errors) == 1
    async with MigrationManager(tmp_path / "db", migrations=failing_slowly()) as manager:
        kinds = [event.kind for event in await manager.history("t")]
    assert kinds.count("failed") == 1
