"""A disk that keeps only a part of what it was given leaves no journal that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, MigrationFailedError, MigrationManager, op
from aiomigrate.errors import AiomigrateError, LedgerUnreadableError
from aiomigrate.planning.reconcile import digest_at
from aiomigrate.results import Repair
from aiomigrate.store.connection import Store
from tests import scenario
from tests.processes import quiet_logger
from tests.tools import TABLE, manager, rows_of

JOURNAL = "table_migrations_history"
SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("n", pa.int64())])


def files(database: Path) -> list[Path]:
    """Returns the data files of the journal, oldest first."""
    found = (database / f"{JOURNAL}.lance" / "data").glob("*.lance")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def cut(path: Path) -> None:
    """Keeps the first half of a file, as a write does of which the second half failed."""
    os.truncate(path, path.stat().st_size // 2)


def cutting(times: int, *, skip: int = 0) -> type[MigrationManager]:
    """Returns a manager class on whose disk some writes to the journal fail unnoticed."""

    class Cutting(Store):
        left = times
        passed = 0

        async def call(
            self, verb: str, table: str, run: Callable[[], Awaitable[Any]], *, mutates: bool = False
        ) -> Any:
            folder = Path(self.uri)
            before = set(files(folder)) if mutates and table == JOURNAL else set()
            result = await super().call(verb, table, run, mutates=mutates)
            new = set(files(folder)) - before if mutates and table == JOURNAL else set()
            if new:
                type(self).passed += 1
                if type(self).passed > skip and type(self).left > 0:
                    type(self).left -= 1
                    for path in new:
                        cut(path)
            return result

    return type("CuttingManager", (MigrationManager,), {"_store_type": Cutting})


async def double(context: Context) -> None:
    """Doubles a column: twice would be four times."""
    for row in (await context.table().read()).to_pylist():
        await context.table().update({"n": row["n"] * 2}, where=f"id = {row['id']}")


LINE = [
    Migration(
        table=TABLE,
        version=1,
        operations=[op.CreateTable(SCHEMA, rows=[{"id": n, "n": 1} for n in range(3)])],
    ),
    Migration(table=TABLE, version=2, operations=[op.Update(sql={"n": "n * 2"})]),
    Migration(table=TABLE, version=3, up=double),
    Migration(table=TABLE, version=4, operations=[op.AddColumns({"z": pa.int64()})]),
]
FINAL = [{"id": n, "n": 4, "z": None} for n in range(3)]


@pytest.mark.parametrize("skip", range(8))
async def test_what_cannot_be_read_back_is_written_again(tmp_path: Path, skip: int) -> None:
    """Whichever write to the journal fails: the run ends as if none had."""
    kind = cutting(2, skip=skip)
    async with kind(tmp_path, migrations=LINE, logger=quiet_logger()) as migrations:
        assert (await migrations.upgrade()).lines == {TABLE: 4}
    async with manager(tmp_path, LINE) as migrations:
        assert (await migrations.validate()).errors == ()
        events = await migrations.history()
        assert [e.version for e in events if e.kind == "applied"] == [1, 2, 3, 4]
        assert len({(e.epoch, e.seq) for e in events}) == len(events)

    assert await rows_of(tmp_path) == FINAL


async def test_a_disk_that_keeps_failing_ends_the_run(tmp_path: Path) -> None:
    """The error says what to do, and the next run on a sound disk needs no person."""
    async with manager(tmp_path, LINE[:1]) as migrations:
        await migrations.upgrade()
    kind = cutting(10_000, skip=1)
    async with kind(tmp_path, migrations=LINE, logger=quiet_logger(), lease_ttl=0.5) as migrations:
        with pytest.raises(AiomigrateError) as raised:
            await migrations.upgrade()
    assert "read back" in str(raised.value) or "cannot be read" in str(raised.value)
    async with manager(tmp_path, LINE, lease_ttl=0.5) as migrations:
        assert (await migrations.upgrade()).lines == {TABLE: 4}

    assert await rows_of(tmp_path) == FINAL


async def outcome(database: Path) -> tuple[str, Repair | None]:
    """Upgrades; where that is refused repairs, and follows what the repair says to check."""
    options: dict[str, Any] = {"lease_ttl": 0.5}
    async with manager(database, LINE, **options) as migrations:
        try:
            await migrations.upgrade()
        except LedgerUnreadableError:
            repaired = await migrations.repair()
            assert repaired is not None
            assert repaired.unclear
            assert TABLE in str(repaired)
            return "refused", repaired
        return "upgraded", None


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("upto", [1, 2, 3, 4])
async def test_a_damaged_journal_is_opened_again(tmp_path: Path, upto: int, count: int) -> None:
    """Its newest files are damaged after the run: nothing is applied twice, and nothing is lost."""
    async with manager(tmp_path, LINE) as migrations:
        await migrations.upgrade(to=upto)
    for path in files(tmp_path)[-count:]:
        cut(path)
    async with manager(tmp_path, LINE) as migrations:
        with pytest.raises(LedgerUnreadableError, match="aiomigrate repair"):
            await migrations.history()
        done = await migrations.repair()
        assert done is not None
        # The next migration runs code, and its table was changed: nobody can tell by what.
        assert bool(done.unclear) is (upto == 2 and count > 1)
        assert await migrations.repair() is None
        await migrations.upgrade()
        assert (await migrations.validate()).errors == ()

    assert await rows_of(tmp_path) == FINAL
    assert not any(c.startswith("_aiomigrate") for c in (await rows_of(tmp_path))[0])


async def test_an_upgrade_repairs_by_itself_where_nothing_is_to_be_checked(tmp_path: Path) -> None:
    """As after a power failure, nobody is there to run a command."""
    async with manager(tmp_path, LINE) as migrations:
        await migrations.upgrade(to=2)
    cut(files(tmp_path)[-1])

    assert await outcome(tmp_path) == ("upgraded", None)
    assert await rows_of(tmp_path) == FINAL


async def test_code_that_may_have_run_is_left_to_a_person(tmp_path: Path) -> None:
    """The events of a function's run are lost with the head's: only its table was changed."""
    async with manager(tmp_path, LINE) as migrations:
        await migrations.upgrade(to=2)
        before = len(files(tmp_path))
        await migrations.upgrade(to=3)
    # As if the process had died before it wrote the head.
    store = await Store.connect(str(tmp_path))
    head = await store.open("table_migrations")
    async with manager(tmp_path, LINE) as migrations:
        digest = digest_at(await migrations.scripts(), TABLE, 2)
    await head.update(
        values={"currentVersion": 2, "digest": digest}, where=f"tableName = '{TABLE}'"
    )
    for path in files(tmp_path)[before:]:
        cut(path)
    rows = await rows_of(tmp_path)

    verdict, repaired = await outcome(tmp_path)

    assert verdict == "refused"
    assert repaired is not None
    assert repaired.lost > 0
    assert await rows_of(tmp_path) == rows
    async with manager(tmp_path, LINE) as migrations:
        await migrations.stamp(tables=[TABLE], to=3)  # as the repair says
        await migrations.upgrade()
    assert await rows_of(tmp_path) == FINAL


async def test_a_sound_journal_needs_no_repair(tmp_path: Path) -> None:
    """Nothing is written, and no database is created."""
    async with manager(tmp_path / "none", LINE) as migrations:
        assert await migrations.repair() is None
    assert not (tmp_path / "none").exists()
    async with manager(tmp_path / "one", LINE) as migrations:
        await migrations.upgrade()
        events = await migrations.history()
        assert await migrations.repair() is None
        assert await migrations.history() == events


async def test_a_journal_that_is_lost_whole_is_recorded_again_from_the_head(tmp_path: Path) -> None:
    """The head has every version, and the digest of the scripts that led to it."""
    async with manager(tmp_path, LINE) as migrations:
        await migrations.upgrade()
        for path in files(tmp_path):
            path.write_bytes(b"")
        done = await migrations.repair()
        assert done is not None
        assert done.stamped == {TABLE: 4}
        assert done.unclear == ()
        assert (await migrations.upgrade()).steps == ()
        assert (await migrations.validate()).errors == ()


async def test_a_journal_of_other_scripts_is_left_to_a_person(tmp_path: Path) -> None:
    """The digest in the head is that of the scripts that were applied."""
    async with manager(tmp_path, LINE) as migrations:
        await migrations.upgrade()
    for path in files(tmp_path):
        path.write_bytes(b"")
    edited = Migration(table=TABLE, version=2, operations=[op.Update(sql={"n": "n * 3"})])
    async with manager(tmp_path, [LINE[0], edited, *LINE[2:]]) as migrations:
        done = await migrations.repair()
        assert done is not None
        assert done.stamped == {}
        assert "the scripts are not those that were applied" in done.unclear[0]
        with pytest.raises(AiomigrateError, match="the journal says 0"):
            await migrations.plan()


@pytest.mark.parametrize("which", ["first", "middle", "last", "two"])
async def test_the_whole_scenario_survives_a_damaged_file(tmp_path: Path, which: str) -> None:
    """Events behind the damaged file are kept; the database ends as the undisturbed one."""
    clean, damaged = tmp_path / "clean", tmp_path / "damaged"
    steps = scenario.migrations()
    for database in (clean, damaged):
        async with manager(database, steps) as migrations:
            await migrations.upgrade()
    found = files(damaged)
    chosen = {"first": found[1:2], "middle": found[len(found) // 2 :][:1], "last": found[-1:],
              "two": found[-3:-1]}[which]  # fmt: skip
    for path in chosen:
        cut(path)
    async with manager(damaged, steps) as migrations:
        assert await migrations.repair() is not None
        try:
            await migrations.upgrade()
        except MigrationFailedError as exc:
            pytest.fail(str(exc))
        assert (await migrations.validate()).errors == ()

    one, other = await scenario.snapshot(damaged), await scenario.snapshot(clean)
    assert one["tables"] == other["tables"]
    assert one["head"] == other["head"]
