"""A table that is not the one a migration changed is never restored, continued or built upon."""

from __future__ import annotations

import datetime as dt
import warnings
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, MigrationFailedError, op
from aiomigrate.errors import AiomigrateError, LedgerConflictError, RollbackRefusedError
from aiomigrate.reporting.status import HealthState
from aiomigrate.store.connection import Store
from tests.faults import Died, dying_manager
from tests.processes import quiet_logger
from tests.tools import TABLE, manager, rows_of, tree

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("n", pa.int64()),
        pa.field("x", pa.int64()),
    ]
)
CREATE = Migration(
    table=TABLE,
    version=1,
    operations=[op.CreateTable(SCHEMA, rows=[{"id": n, "n": 0, "x": 1} for n in range(5)])],
)


async def double(context: Context) -> None:
    """Doubles a column."""
    await context.table().update({"n": 2})


async def halve(context: Context) -> None:
    """Takes that back."""
    await context.table().update({"n": 0})


async def fail(context: Context) -> None:
    """Changes the table, has the application replace it, and fails."""
    await context.table().update({"n": 2})
    await recreate(Path(context.params["database"]), upto=2)
    raise RuntimeError("no")


CHANGES = {
    "drop": {"operations": [op.DropColumns("x")]},
    "delete": {"operations": [op.Delete("id = 1")]},
    "update": {"operations": [op.Update({"n": 5})]},
    "alter": {"operations": [op.AlterType({"n": pa.int32()})]},
    "add": {"operations": [op.AddColumns({"y": pa.int64()})]},
    "rename": {"operations": [op.RenameColumns({"x": "z"})]},
    "code": {"up": double, "down": halve},
    "code without inverse": {"up": double},
}


def steps(**change: Any) -> list[Migration]:
    """Returns a line that creates the table and then changes it."""
    return [CREATE, Migration(table=TABLE, version=2, **change)]


async def recreate(database: Path, *, upto: int) -> list[dict[str, Any]]:
    """Drops the table and makes it again, as its application would, with so many versions."""
    connection = await lancedb.connect_async(database)
    schema = await (await connection.open_table(TABLE)).schema()
    schema = pa.schema([f for f in schema if not f.name.startswith("_aiomigrate")])
    await connection.drop_table(TABLE)
    made = await connection.create_table(TABLE, schema=schema)
    number = 1000
    while await made.version() < upto:
        row = {f.name: number for f in schema}
        await made.add(pa.Table.from_pylist([row], schema=schema))
        number += 1
    connection.close()
    return await rows_of(database)


async def latest(database: Path, table: str = TABLE) -> int:
    """Returns the latest table_version of a table."""
    opened = await (await Store.connect(str(database))).open(table)
    return await opened.version()


def lose(database: Path, count: int, table: str = TABLE) -> None:
    """Removes the newest commits of a table, as a power failure does."""
    manifests = (database / f"{table}.lance" / "_versions").glob("*.manifest")
    newest = sorted(manifests, key=lambda path: int(path.stem))  # the name counts down
    for path in newest[:count]:
        path.unlink()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Returns the path of a database to be made."""
    return tmp_path / "database"


@pytest.mark.parametrize("above", [-1, 0, 1], ids=["fewer", "as many", "more"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_rollback_leaves_a_table_that_was_made_again(
    database: Path, change: dict[str, Any], above: int
) -> None:
    """Whatever number its versions have reached: the rows that its application wrote stay."""
    async with manager(database, steps(**change)) as migrations:
        await migrations.upgrade()
        rows = await recreate(database, upto=await latest(database) + above)
        for verb in (migrations.plan_rollback, migrations.rollback):
            with pytest.raises(RollbackRefusedError, match="was dropped and created again"):
                await verb(TABLE, to=1)
        validation = await migrations.validate()

        assert await rows_of(database) == rows
        assert any("dropped and created again" in text for text in validation.warnings)


async def test_an_upgrade_of_a_table_that_was_made_again_goes_on(database: Path) -> None:
    """Applications that make their tables anew have them migrated like any other."""
    line = steps(**CHANGES["add"])
    async with manager(database, line) as migrations:
        await migrations.upgrade()
    await recreate(database, upto=2)
    more = Migration(table=TABLE, version=3, operations=[op.AddColumns({"w": pa.int64()})])
    async with manager(database, [*line, more]) as migrations:
        report = await migrations.upgrade()
        assert [step.version for step in report.applied] == [3]
        assert (await migrations.rollback(TABLE)).lines == {TABLE: 2}


async def raised_by(call: Awaitable[Any]) -> AiomigrateError | None:
    """Returns the error that a call raises, `None` if it raises none."""
    try:
        await call
    except AiomigrateError as exc:
        return exc
    return None


async def crash(database: Path, line: Sequence[Migration], verb: str, at: int) -> bool:
    """Has a process die after its n-th mutating call; returns whether it died."""
    migrations = dying_manager(at, "after")(
        database, migrations=line, logger=quiet_logger(), lease_ttl=0.5
    )
    try:
        await (migrations.upgrade() if verb == "upgrade" else migrations.rollback(TABLE))
    except Died:
        return True
    except BaseExceptionGroup as died:
        if died.subgroup(Died) is None:
            raise
        return True
    return False


@pytest.mark.parametrize("changed", [False, True], ids=["unchanged script", "changed script"])
async def test_recovery_leaves_a_table_that_was_made_again(database: Path, changed: bool) -> None:
    """At whatever call the process died, and however many versions the new table has."""
    two = [op.AddColumns({"y": pa.int64()}), op.Update({"n": 5}), op.DropColumns("x")]
    refused = 0
    for at in range(1, 40):
        folder = database / str(at)
        line = steps(operations=two)
        async with manager(folder, [CREATE]) as migrations:
            await migrations.upgrade()
        if not await crash(folder, line, "upgrade", at):
            break
        rows = await recreate(folder, upto=max(4, await latest(folder)))
        if changed:
            line = steps(operations=[op.AddColumns({"v": pa.int64()})])
        options: dict[str, Any] = {"lease_ttl": 0.5}
        async with manager(folder, line, **options) as migrations:
            error = await raised_by(migrations.upgrade())
            if error is None:  # it had not begun, or was complete
                now = await rows_of(folder)
                assert [row["id"] for row in now] == [row["id"] for row in rows]
                continue
            assert await rows_of(folder) == rows
            if "dropped and created again" in str(error):
                refused += 1
                await migrations.stamp(tables=[TABLE], to=1)  # the way that the error tells
                await raised_by(migrations.upgrade())
                validation = await migrations.validate()
                assert not any("interrupted" in text for text in validation.errors)

    assert refused >= 3


async def test_a_failed_migration_leaves_a_table_that_was_made_again(database: Path) -> None:
    """It ends at the number that the migration's own commit had."""
    async with manager(database, [CREATE]) as migrations:
        await migrations.upgrade()
    line = steps(up=fail)
    async with manager(database, line, params={"database": str(database)}) as migrations:
        with pytest.raises(MigrationFailedError, match="dropped and created again"):
            await migrations.upgrade()

    assert {row["id"] for row in await rows_of(database)} >= {1000}


async def test_a_rollback_that_crashed_leaves_a_table_that_was_made_again(database: Path) -> None:
    """It is not continued on another table."""
    line = steps(**CHANGES["delete"])
    refused = 0
    for at in range(1, 40):
        folder = database / str(at)
        async with manager(folder, line) as migrations:
            await migrations.upgrade()
        if not await crash(folder, line, "rollback", at):
            break
        rows = await recreate(folder, upto=4)
        async with manager(folder, line, lease_ttl=0.5) as migrations:
            error = await raised_by(migrations.rollback(TABLE, to=1))
        assert await rows_of(folder) == rows
        refused += "dropped and created again" in str(error)

    assert refused >= 3


@pytest.mark.parametrize("written", [0, 1, 2, 4], ids=["short", "shorter", "as many", "more"])
async def test_nothing_is_built_on_a_table_that_lost_commits(database: Path, written: int) -> None:
    """Also when its application has committed since, up to the recorded number and above it."""
    line = steps(operations=[op.Update({"n": 5}), op.Update({"x": 6})])
    more = Migration(table=TABLE, version=3, operations=[op.Update(sql={"n": "n * 2"})])
    async with manager(database, line) as migrations:
        await migrations.upgrade()
    lose(database, 2)
    connection = await lancedb.connect_async(database)
    for number in range(written):
        opened = await connection.open_table(TABLE)
        row = dict.fromkeys((await opened.schema()).names, number)
        await opened.add(pa.Table.from_pylist([row], schema=await opened.schema()))
    before = tree(database)
    async with manager(database, [*line, more]) as migrations:
        for verb in (migrations.plan, migrations.upgrade):
            with pytest.raises(LedgerConflictError, match=f"{TABLE!r} has lost commits"):
                await verb()
        assert any("has lost commits" in text for text in (await migrations.validate()).errors)
        assert tree(database) == before
        await migrations.stamp(tables=[TABLE], to=1)  # the way that the error tells
        await migrations.upgrade()
        assert (await migrations.validate()).errors == ()

    assert {row["n"] for row in await rows_of(database) if row["x"] == 6} == {10}


async def test_a_cleaned_up_table_is_still_the_same(database: Path) -> None:
    """Commits and cleanups of its application refuse neither upgrade nor rollback."""
    line = steps(**CHANGES["add"])
    async with manager(database, line) as migrations:
        await migrations.upgrade()
        connection = await lancedb.connect_async(database)
        opened = await connection.open_table(TABLE)
        for _ in range(3):
            await opened.update(updates_sql={"n": "n + 1"})
        with warnings.catch_warnings(action="ignore"):
            await opened.optimize(cleanup_older_than=dt.timedelta(0), delete_unverified=True)
        assert (await migrations.validate()).errors == ()
        assert (await migrations.rollback(TABLE)).lines == {TABLE: 1}
        assert (await migrations.upgrade()).applied
        assert (await migrations.validate()).warnings == ()


async def test_a_journal_restored_from_an_older_copy_is_seen(database: Path) -> None:
    """Health and the plan tell that head and journal disagree, though the head is at target."""
    line = steps(**CHANGES["add"])
    async with manager(database, line) as migrations:
        await migrations.upgrade()
        assert (await migrations.health()).state is HealthState.READY
        newest = await latest(database, "table_migrations_history")
        lose(database, newest - 3, "table_migrations_history")
        health = await migrations.health()
        assert health.state is HealthState.FAILED
        assert "the journal says" in health.failed[TABLE]
        with pytest.raises(LedgerConflictError, match="the journal says"):
            await migrations.plan()
        assert (await migrations.upgrade()).applied == ()  # it reads the head alone
