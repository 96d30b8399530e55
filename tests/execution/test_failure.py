"""What a failing migration leaves: the table as before, a ledger that says so, others finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, MigrationFailedError, MigrationManager, op
from aiomigrate.errors import MigrationTimeoutError, StoreError
from tests import scenario
from tests.faults import watched_manager
from tests.processes import quiet_logger

T = pa.schema([pa.field("id", pa.int64()), pa.field("n", pa.int64())])


async def fails_after_two_commits(context: Context) -> None:
    """Adds a row and a column, then raises."""
    await context.table().add([{"id": 1, "n": 1}])
    await context.apply(op.AddColumns({"extra": pa.string()}))
    raise ValueError("wrong on purpose")


async def works(context: Context) -> None:
    """Adds a row."""
    await context.table().add([{"id": 1, "n": 1}])


def broken(up: Any) -> list[Migration]:
    """Returns three lines, one of which runs a function and another depends on it."""
    return [
        Migration(table="t", version=1, operations=[op.CreateTable(T)]),
        Migration(table="t", version=2, up=up),
        Migration(table="t", version=3, operations=[op.CreateIndex("id")]),
        Migration(table="other", version=1, operations=[op.CreateTable(T)]),
        Migration(
            table="dependent", version=1, operations=[op.CreateTable(T)], depends_on={"t": 2}
        ),
    ]


async def test_a_failure_restores_its_table_and_the_rest_goes_on(tmp_path: Path) -> None:
    """Two commits are undone, the error recorded, others finish; a corrected script goes on.

    What depends on the failed migration is skipped, with its reason in the report.
    """
    path = tmp_path / "db"
    async with MigrationManager(
        path, migrations=broken(fails_after_two_commits), logger=quiet_logger()
    ) as manager:
        with pytest.raises(MigrationFailedError) as caught:
            await manager.initialize()
        failed = next(e for e in await manager.history("t") if e.kind == "failed")
    report = caught.value.report
    after_failure = await scenario.snapshot(path)
    async with MigrationManager(path, migrations=broken(works), logger=quiet_logger()) as manager:
        await manager.initialize()
        validation = await manager.validate()

    assert {(s.line, s.version): s.outcome.value for s in report.steps} == {
        ("t", 1): "applied",
        ("other", 1): "applied",
        ("t", 2): "failed",
        ("t", 3): "skipped",
        ("dependent", 1): "skipped",
    }
    assert after_failure["tables"]["t"]["rows"] == []
    assert set(after_failure["tables"]["t"]["shape"]["fields"]) == {"id", "n"}
    assert after_failure["tables"]["t"]["branches"] == 0
    assert after_failure["held"] == []
    assert "ValueError: wrong on purpose" in (failed.error or "")
    assert "Traceback" in (failed.error or "")
    assert validation.valid


async def test_a_timeout_undoes_the_migration(tmp_path: Path) -> None:
    """A migration that takes too long is undone and fails with the limit in its error."""

    async def slow(context: Context) -> None:
        await works(context)
        await anyio.sleep(60)

    async with MigrationManager(
        tmp_path / "db", migrations=broken(slow), timeout=0.5, logger=quiet_logger()
    ) as manager:
        with pytest.raises(MigrationFailedError, match=r"longer than 0\.5 s"):
            await manager.initialize()
    after = await scenario.snapshot(tmp_path / "db")

    assert after["tables"]["t"]["rows"] == []
    assert after["held"] == []
    assert issubclass(MigrationTimeoutError, Exception)


async def test_several_failures_are_one_error(tmp_path: Path) -> None:
    """Lines fail independently; the caller gets one MigrationFailedError, never a group."""

    async def boom(context: Context) -> None:
        raise ExceptionGroup("several", [ValueError("a"), KeyError("b")])

    migrations = [
        Migration(table=name, version=1, operations=[op.CreateTable(T), op.Run(boom)])
        for name in ("a", "b", "c")
    ]
    async with MigrationManager(
        tmp_path / "db", migrations=migrations, logger=quiet_logger()
    ) as manager:
        with pytest.raises(MigrationFailedError) as caught:
            await manager.initialize()

    assert len(caught.value.report.failed) == 3


@pytest.mark.parametrize("made", [True, False])
async def test_a_savepoint_that_could_not_be_removed_goes_with_the_next_start(
    tmp_path: Path,
    made: bool,
) -> None:
    """The network fails while a branch is removed, and perhaps when it was made: it does not stay.

    Where it was made unharmed, the migration is applied, and only removing it is left.
    """
    path = tmp_path / "db"

    async def unreachable_before(verb: str, table: str) -> None:
        if verb == "delete_branch":
            raise StoreError("connection reset", "Try again.")

    async def unreachable_after(verb: str, table: str) -> None:
        if verb == "create_branch" and not made:
            raise StoreError("connection reset", "Try again.")

    first = broken(works)[:1]
    async with MigrationManager(path, migrations=first, logger=quiet_logger()) as manager:
        await manager.initialize()
    watched = watched_manager(before=unreachable_before, after=unreachable_after)
    async with watched(path, migrations=broken(works), logger=quiet_logger()) as manager:
        with pytest.raises((MigrationFailedError, StoreError)):
            await manager.initialize()
    assert (await scenario.snapshot(path))["tables"]["t"]["branches"] == 1
    async with MigrationManager(path, migrations=broken(works), logger=quiet_logger()) as manager:
        await manager.initialize()
    after = await scenario.snapshot(path)

    assert after["tables"]["t"]["branches"] == 0
    assert len(after["tables"]["t"]["rows"]) == 1
