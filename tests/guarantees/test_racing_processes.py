"""P1: however many processes start together, each migration is applied once and all succeed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pytest

from aiomigrate import Migration, MigrationFailedError, MigrationManager, load, op
from tests import predecessor, scenario
from tests.faults import Fault
from tests.guarantees.test_adopted_application import (
    MIGRATIONS,
    application,
    assert_rows_kept,
    manager,
    read,
    target,
    unpack,
)
from tests.guarantees.test_killed_process import undisturbed
from tests.predecessor import DIMENSION, LEDGER, State
from tests.processes import MP, initialize, quiet_logger, start
from tests.tools import FIXTURES

PROCESSES = 8


async def race(
    path: Path, source: Any, options: dict[str, Any], *, count: int = PROCESSES
) -> list[tuple[str, Any]]:
    """Starts processes that initialize at the same instant; returns what each tells."""
    gate, results = MP.Barrier(count), MP.Queue()
    processes = [
        start(initialize, str(path), source, Fault(), options, results, gate) for _ in range(count)
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


async def first_release(path: Path, trial: int) -> None:
    """Makes a database of the first release: three times one that the predecessor has written.

    Without archives, and in the other trials, one in its format.
    """
    if FIXTURES and trial < 3:
        unpack("memo_app_v1_small", path)
    else:
        await predecessor.build(path, State.V1)


@pytest.mark.parametrize("trial", range(10))
async def test_eight_processes_on_the_first_release_of_an_application(
    tmp_path: Path, trial: int
) -> None:
    """All 8 succeed, its history is applied once, and no row of tables or ledger is there twice."""
    path = tmp_path / f"{trial}"
    await first_release(path, trial)
    before = await read(path)
    pending = {
        (script.line, script.version)
        for script in load(MIGRATIONS, {}).all
        if script.version > before.ledger.get(script.line, 0)
    }
    told = await race(path, str(MIGRATIONS), {"lease_ttl": 5.0})
    after = await read(path)
    async with manager(path) as migrations:
        validation = await migrations.validate()

    assert [outcome for outcome, _ in told] == ["ok"] * PROCESSES, told
    assert sorted(step for _, steps in told for step in steps) == sorted(pending)
    assert await scenario.applied_counts(path) == dict.fromkeys(pending, 1)
    assert repeated(after.rows["categories"], "uid", "name") == []
    assert repeated(after.rows[LEDGER], "tableName") == []
    assert application(after) == target(DIMENSION)
    assert_rows_kept(before, after)
    assert validation.valid, validation.errors


def repeated(rows: pa.Table, *columns: str) -> list[tuple[Any, ...]]:
    """Returns what occurs more than once in some columns taken together."""
    found = zip(*(rows[column].to_pylist() for column in columns), strict=True)
    return [values for values, count in Counter(found).items() if count > 1]


async def test_two_managers_in_one_process(tmp_path: Path) -> None:
    """Managers of one process share nothing: both succeed, each migration runs once."""
    reports = []

    async def run() -> None:
        async with MigrationManager(
            tmp_path / "db", migrations=scenario.migrations(), logger=quiet_logger()
        ) as migrating:
            reports.append(await migrating.initialize())

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
        ) as migrating:
            with pytest.raises(MigrationFailedError) as caught:
                await migrating.initialize()
            errors.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        group.start_soon(run)

    assert all("boom" in str(error) for error in errors)
    assert sum("another process" in str(error) for error in errors) == 1
    async with MigrationManager(tmp_path / "db", migrations=failing_slowly()) as migrating:
        kinds = [event.kind for event in await migrating.history("t")]
    assert kinds.count("failed") == 1
