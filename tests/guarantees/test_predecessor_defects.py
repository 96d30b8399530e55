"""The 14 defects that the predecessor was shown to have, in their order: none can happen here."""

from __future__ import annotations

import ast
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, MigrationFailedError, MigrationManager, op
from aiomigrate.errors import (
    AiomigrateError,
    ChecksumMismatchError,
    DatabaseAheadError,
    LedgerUnreadableError,
)
from tests import predecessor, scenario
from tests.faults import Fault, FaultyStore, faulty_manager
from tests.guarantees.test_adopted_application import (
    MIGRATIONS,
    application,
    assert_rows_kept,
    read,
    target,
)
from tests.guarantees.test_killed_process import OPTIONS
from tests.guarantees.test_racing_processes import race, repeated
from tests.ledger.test_bad_metadata import on_disk
from tests.predecessor import DIARY, DIMENSION, LEDGER, State
from tests.processes import initialize, quiet_logger, start
from tests.tools import manager, rows_of, tree

T = pa.schema([pa.field("id", pa.int64()), pa.field("n", pa.int64())])
APPLICATION = str(MIGRATIONS)
TEN = tuple(f"t{number}" for number in range(10))
HISTORY = f"{LEDGER}_history"


def faulty(database: Path, source: Any, fault: Fault, **options: Any) -> MigrationManager:
    """Returns a manager whose LanceDB calls fail or are counted."""
    return faulty_manager(fault)(database, migrations=source, logger=quiet_logger(), **options)


def calls_of(migrations: MigrationManager) -> list[tuple[str, str]]:
    """Returns the calls that a faulty manager has counted."""
    store = migrations._database.store
    assert isinstance(store, FaultyStore)
    return store.calls


def first(*tables: str) -> list[Migration]:
    """Returns version 1 of these tables."""
    return [Migration(table=t, version=1, operations=[op.CreateTable(T)]) for t in tables]


async def filled(database: Path, *tables: str, rows: int) -> None:
    """Makes tables at version 1 of their lines, each with rows of which the first has no `n`."""
    async with manager(database, first(*tables)) as migrations:
        await migrations.initialize()
    db = await lancedb.connect_async(database)
    values = {"id": list(range(rows)), "n": [None, *range(1, rows)]}
    for name in tables:
        await (await db.open_table(name)).add(pa.table(values, schema=T))
    db.close()


async def ledger_rows(database: Path) -> dict[str, list[int]]:
    """Returns every version recorded for each line, as any reader of the table finds them."""
    found: dict[str, list[int]] = {}
    for row in await rows_of(database, LEDGER):
        found.setdefault(row["tableName"], []).append(row["currentVersion"])
    return {line: versions for line, versions in found.items() if line[0] != ":"}


async def in_a_process(database: Path, source: str, fault: Fault) -> None:
    """Migrates by migrations of this module, or the application's, with a fault."""
    known = {"ten": ten_tables, "retyped": retyped}
    given = known[source]() if source in known else source
    await initialize(str(database), given, fault, OPTIONS)


def killed(database: Path, source: str, **fault: Any) -> bool:
    """Migrates in a process that kills itself; returns whether it came to that."""
    process = start(in_a_process, database, source, Fault(action="kill", **fault))
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


# ---- the record ---------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["open", "read"])
async def test_defect_01_an_error_while_reading_is_never_version_0(
    database: Path, verb: str
) -> None:
    """Never "any error while reading a version counts as version 0: everything runs again".

    Here only a head that is known not to exist counts as none. Any other failure to read it, of
    the call or of the files, is an error before anything is written.
    """
    async with manager(database, scenario.migrations()) as migrations:
        await migrations.initialize()
    before = tree(database)
    fault = Fault(action="reset", at=1, when="before", verb=verb, table=LEDGER, mutations=False)
    async with faulty(database, scenario.migrations(), fault) as migrations:
        with pytest.raises(LedgerUnreadableError):
            await migrations.initialize()
    after = tree(database)
    shutil.rmtree(database / f"{LEDGER}.lance" / ("_versions" if verb == "open" else "data"))
    damaged = tree(database)
    async with manager(database, scenario.migrations()) as migrations:
        with pytest.raises(LedgerUnreadableError):
            await migrations.initialize()

    assert after == before
    assert tree(database) == damaged


async def test_defect_02_a_kill_never_loses_the_record(database: Path, tmp_path: Path) -> None:
    """Never "delete-then-add of the record: 9 of 60 kills lost it".

    Here a row is changed in place by one commit: whatever commit of the ledger a SIGKILL hits,
    each line that was recorded is recorded once, at that version or a later one, and the journal
    tells the next run where to go on.
    """
    await predecessor.build(tmp_path / "origin", State.V1)
    before = await ledger_rows(tmp_path / "origin")
    for at, when in ((3, "after"), (6, "after"), (7, "after")):
        shutil.rmtree(database, ignore_errors=True)
        shutil.copytree(tmp_path / "origin", database)
        assert killed(database, APPLICATION, at=at, when=when, table=LEDGER)
        recorded = await ledger_rows(database)

        assert [line for line, rows in recorded.items() if len(rows) != 1] == []
        assert all(recorded[line][0] >= version for line, (version,) in before.items())
    for when in ("before", "after"):
        assert killed(database, APPLICATION, at=1, when=when, verb="replace_matching", table=LEDGER)
        recorded = await ledger_rows(database)

        assert before.keys() <= recorded.keys()
        assert all(len(rows) == 1 for rows in recorded.values())
    async with manager(database, MIGRATIONS, **OPTIONS) as migrations:  # type: ignore[arg-type]
        await migrations.initialize()
        assert (await migrations.validate()).valid


@pytest.mark.parametrize("state", [None, State.V1], ids=["fresh", "upgrade"])
async def test_defect_03_processes_that_start_together_all_succeed(
    database: Path, state: State | None
) -> None:
    """Never "no lock: N processes on a fresh database, all but one die".

    Nor "two upgrading one database: one dies in every trial, duplicates in 7 of 8".

    Here one takes the lease and the others wait for it: all succeed, and nothing is there twice.
    """
    if state is not None:
        await predecessor.build(database, state)
    options = {"lease_ttl": 5.0, "params": {"dimension": DIMENSION}}
    told = await race(database, APPLICATION, options, count=3)
    after = await read(database)

    assert [outcome for outcome, _ in told] == ["ok"] * 3, told
    assert sorted(len(steps) for _, steps in told)[:2] == [0, 0]
    assert set((await scenario.applied_counts(database)).values()) == {1}
    assert repeated(after.rows[LEDGER], "tableName") == []
    assert repeated(after.rows["categories"], "uid", "name") == []
    assert application(after) == target(DIMENSION)


# ---- what is recorded is so ---------------------------------------------------------------------


async def test_defect_04_fresh_and_upgraded_databases_are_the_same(tmp_path: Path) -> None:
    """Never "fresh and upgraded databases differ (NOT NULL columns, missing index)".

    Here a column is added as what it is declared to be, NULL allowed, and forbidden in a step of
    its own: by whatever road a database came, fields, nullability and indexes are the same. What
    the predecessor leaves is not.
    """
    shapes, left = {}, {}
    for state in (None, State.V1, State.UPGRADED, State.FRESH):
        path = tmp_path / str(state)
        if state is not None:
            await predecessor.build(path, state)
            left[state] = application(await read(path))
        async with faulty(path, MIGRATIONS, Fault(), params={"dimension": DIMENSION}) as migrations:
            await migrations.initialize()
        shapes[state] = application(await read(path))

    assert left[State.UPGRADED] != left[State.FRESH]
    assert all(shape == target(DIMENSION) for shape in shapes.values())


async def swallows(context: Context) -> None:
    """Fails with the text by which the predecessor took a failure for success."""
    raise RuntimeError(f"Column or index of {context.table().name} already exists")


async def test_defect_05_an_error_is_an_error_whatever_its_text(database: Path) -> None:
    """Never "errors swallowed by text".

    That was "an index that failed, a column of the wrong type, are recorded as done".

    Here nothing is decided by an error's text: an operation looks whether its effect is there,
    exactly as declared, and otherwise its migration is recorded as failed.
    """
    await filled(database, "t", rows=3)
    index = Migration(table="t", version=2, operations=[op.CreateIndex("id")])
    retype = Migration(table="t", version=2, operations=[op.AddColumns({"n": pa.string()})])
    fault = Fault(action="reset", at=1, when="before", verb="create_index")
    async with faulty(database, [*first("t"), index], fault) as migrations:
        with pytest.raises(MigrationFailedError, match="connection reset"):
            await migrations.initialize()
    for given, kind in (
        (retype, AiomigrateError),
        (Migration(table="t", version=2, up=swallows), MigrationFailedError),
    ):
        async with manager(database, [*first("t"), given]) as migrations:
            with pytest.raises(kind, match="exists"):
                await migrations.initialize()
    recorded = await ledger_rows(database)
    async with manager(database, [*first("t"), index]) as migrations:
        await migrations.initialize()
        validation = await migrations.validate()

    assert recorded == {"t": [1]}
    assert validation.valid, validation.errors
    assert await ledger_rows(database) == {"t": [2]}


async def test_defect_06_validation_looks_at_the_tables(database: Path) -> None:
    """Never "`validate` compares integers: valid with a table dropped".

    Here `applied` events hold the shape of what they left, and the live tables are compared.
    """
    async with manager(database, scenario.migrations()) as migrations:
        await migrations.initialize()
    db = await lancedb.connect_async(database)
    await db.drop_table("log")
    await (await db.open_table("people")).drop_columns(["score"])
    await (await db.open_table("notes")).alter_columns({"path": "b", "rename": "c"})
    db.close()
    async with manager(database, scenario.migrations()) as migrations:
        validation = await migrations.validate()
        status = await migrations.get_status()

    assert status.is_at_target
    assert not validation.valid
    for what in ("table log is missing", "score", "table notes"):
        assert any(what in error for error in validation.errors), validation.errors


@pytest.mark.parametrize("state", [None, State.V1], ids=["missing", "first release"])
async def test_defect_07_looking_writes_nothing(database: Path, state: State | None) -> None:
    """Never "dry run, status and validate write".

    Here they take no lease and make no call that could commit, not even the folder of a database
    that does not exist.
    """
    if state is not None:
        await predecessor.build(database, state)
    before = on_disk(database)
    async with faulty(database, MIGRATIONS, Fault()) as migrations:
        plan = await migrations.plan()
        await migrations.get_status()
        await migrations.validate()
        await migrations.history()
        commits = [] if migrations._database.store is None else calls_of(migrations)

    assert plan.steps
    assert commits == []
    assert on_disk(database) == before


async def test_defect_08_a_newer_database_stops_older_code(database: Path) -> None:
    """Never "a database newer than the code passes".

    Here a line above its newest script is an error, before anything is written.
    """
    newer = [
        *first("t"),
        Migration(table="t", version=2, operations=[op.AddColumns({"x": pa.int64()})]),
    ]
    async with manager(database, newer) as migrations:
        await migrations.initialize()
    before = tree(database)
    async with manager(database, first("t")) as migrations:
        for verb in (migrations.initialize, migrations.upgrade, migrations.plan):
            with pytest.raises(DatabaseAheadError, match="newer than"):
                await verb()
        validation = await migrations.validate()

    assert not validation.valid
    assert tree(database) == before


@pytest.mark.parametrize("when", ["before", "after"])
async def test_defect_09_a_backfill_is_done_for_all_rows_or_not_recorded(
    database: Path, when: str
) -> None:
    """Never "a backfill recorded success having done 0 of 297 rows".

    Here an error on the way fails the migration, and after a crash it is run again, or found
    done, before it is recorded: all 297 users have their category, each once.
    """
    await predecessor.build(database, State.V1)
    db = await lancedb.connect_async(database)
    users = await db.open_table("users")
    schema = await users.schema()
    await users.delete("true")
    rows = [predecessor._row("users", schema, 1000 + number) for number in range(297)]
    await users.add(pa.Table.from_pylist(rows, schema=schema))
    db.close()
    assert killed(database, APPLICATION, at=1, when=when, verb="add", table="categories")
    recorded = await ledger_rows(database)
    async with faulty(database, MIGRATIONS, Fault(), **OPTIONS) as migrations:
        report = await migrations.initialize()
    diaries = Counter(r["uid"] for r in await rows_of(database, "categories") if r["name"] == DIARY)
    (step,) = [s for s in report.applied if (s.line, s.version) == ("categories", 4)]

    assert recorded["categories"] == [1]
    assert step.rows == 297
    assert {diaries[row["uid"]] for row in rows} == {1}


# ---- the data -----------------------------------------------------------------------------------


def retyped() -> list[Migration]:
    """Returns what gives a column another type, for which LanceDB knows no cast."""
    return [
        *first("t"),
        Migration(
            table="t",
            version=2,
            operations=[
                op.AddColumns({"text": pa.string()}),
                op.Update(sql={"text": "CAST(n AS STRING)"}),
                op.DropColumns("n"),
                op.RenameColumns({"text": "n"}),
                op.CreateIndex("n"),
            ],
        ),
    ]


async def test_defect_10_a_crash_in_a_copy_loses_no_row(database: Path, tmp_path: Path) -> None:
    """Never "a crash in its copy recipe leaves 0 rows".

    Here no table is ever dropped to be made again: the column is copied in its own table, whose
    rows are all there after a SIGKILL before any commit, and the next run goes on from there.
    """
    origin = tmp_path / "origin"
    await filled(origin, "t", rows=20)
    struck = 0
    for at in count(1):
        shutil.rmtree(database, ignore_errors=True)
        shutil.copytree(origin, database)
        if not killed(database, "retyped", at=at, when="before", table="t"):
            break
        struck += 1

        assert sorted(row["id"] for row in await rows_of(database, "t")) == list(range(20))
        if at % 3 == 2:
            async with manager(database, retyped(), **OPTIONS) as migrations:
                await migrations.initialize()
            assert await by_id(database) == COPIED

    assert struck >= 5
    assert await by_id(database) == COPIED


COPIED = [{"id": n, "n": str(n) if n else None} for n in range(20)]


async def by_id(database: Path) -> list[dict[str, Any]]:
    """Returns the rows of the copied table in the order of their ids."""
    return sorted(await rows_of(database, "t"), key=lambda row: int(row["id"]))


def ten_tables(*, forbid: bool = False) -> list[Migration]:
    """Returns ten tables, and one version that changes all of them; it can be made to fail."""

    def change(table: str) -> Iterator[op.Operation]:
        yield op.AddColumns({"deletedAt": pa.int64()}, table=table)
        yield op.Update({"deletedAt": 0}, where="`deletedAt` IS NULL", table=table)
        if forbid and table == TEN[7]:
            yield op.SetNotNull("n", table=table)  # where the first row has NULL
        yield op.SetNotNull("deletedAt", table=table)

    changes = [operation for table in TEN for operation in change(table)]
    return [*first(*TEN), Migration(line="_all", version=2, touches=TEN, operations=changes)]


async def test_defect_11_a_change_over_ten_tables_is_not_left_half_done(
    database: Path, tmp_path: Path
) -> None:
    """Never "a change over ten tables under one version is half done after a failure".

    Here it is recorded which tables a version touches and at which table_version each was: a
    failure at the eighth returns all of them, and after a kill the next run goes on to the end.
    """
    await filled(tmp_path / "origin", *TEN, rows=3)
    shutil.copytree(tmp_path / "origin", database)
    before = await read(database)
    async with manager(database, ten_tables(forbid=True)) as migrations:
        with pytest.raises(MigrationFailedError):
            await migrations.initialize()
    failed = await read(database)
    for path in (database, tmp_path / "killed"):
        if not path.exists():
            shutil.copytree(tmp_path / "origin", path)
            assert killed(path, "ten", at=2, table=TEN[7])
        async with manager(path, ten_tables(), **OPTIONS) as migrations:
            await migrations.initialize()
            assert (await migrations.validate()).valid
        after = await read(path)

        assert all(shape["fields"] == WANTED for shape in application(after).values())
        assert {n for t in TEN for n in after.rows[t]["deletedAt"].to_pylist()} == {0}

    assert application(failed) == application(before)
    assert all(failed.rows[table].equals(before.rows[table]) for table in TEN)
    assert failed.ledger.get("_all", 0) == 0


WANTED = ["deletedAt:int64!", "id:int64", "n:int64"]


async def test_defect_12_an_edited_release_is_told_and_its_databases_start(
    database: Path, tmp_path: Path
) -> None:
    """Never "edited releases leave databases that never start again".

    Here an edit of what was applied is told before anything is written, and reverting it or
    accepting it by `stamp` ends that. The database of the predecessor's own broken release, on
    which its next release dies, arrives at the target with all its rows.
    """
    await predecessor.build(database, State.NULLTYPE)
    before = await read(database)
    db = await lancedb.connect_async(shutil.copytree(database, tmp_path / "theirs"))
    with pytest.raises(ValueError, match="tags"):
        await predecessor.migrate(db, predecessor.LATEST)
    db.close()
    async with faulty(database, MIGRATIONS, Fault()) as migrations:
        await migrations.initialize()
    after = await read(database)

    ours, wider = tmp_path / "ours", pa.schema([*T, pa.field("late", pa.int64())])
    edited = [Migration(table="t", version=1, operations=[op.CreateTable(wider)])]
    async with manager(ours, first("t")) as migrations:
        await migrations.initialize()
    untouched = tree(ours)
    async with manager(ours, edited) as migrations:
        with pytest.raises(ChecksumMismatchError, match="t"):
            await migrations.initialize()
    told = tree(ours)
    async with manager(ours, first("t")) as migrations:
        reverted = await migrations.initialize()
    async with manager(ours, edited) as migrations:
        await migrations.stamp()
        accepted = await migrations.initialize()

    assert application(after) == target(DIMENSION)
    assert_rows_kept(before, after)
    assert told == untouched
    assert reverted.steps == accepted.steps == ()


# ---- the cost, the proof ------------------------------------------------------------------------


async def fragments(database: Path, table: str) -> tuple[int, int]:
    """Returns a table's table_version and the number of its fragments."""
    db = await lancedb.connect_async(database)
    opened = await db.open_table(table)
    stats: Any = await opened.stats()
    return await opened.version(), int(stats["fragment_stats"]["num_fragments"])


async def test_defect_13_the_ledger_stays_small_and_a_start_costs_two_requests(
    database: Path, tmp_path: Path
) -> None:
    """Never "26 migrations make 44 versions and 16 one-row fragments of metadata".

    Nor "a start with nothing to do costs two queries per table".

    Here one task writes what waits as one commit and lets the head follow, and compacts both: more
    migrations make few versions of the head and few fragments. A start with nothing to do opens
    the head and reads it, once.
    """
    theirs = await lancedb.connect_async(tmp_path / "theirs")
    ran = await predecessor.migrate(theirs, predecessor.LATEST)
    their_versions, their_fragments = await fragments(tmp_path / "theirs", LEDGER)
    async with faulty(database, MIGRATIONS, Fault()) as migrations:
        report = await migrations.initialize()
    versions, parts = await fragments(database, LEDGER)
    _, journal_parts = await fragments(database, HISTORY)
    async with faulty(database, MIGRATIONS, Fault(mutations=False)) as migrations:
        again = await migrations.initialize()
        calls = calls_of(migrations)

    assert len(report.applied) > 26 > len(ran) - 1
    assert (their_versions > 30, their_fragments) == (True, 16)
    assert versions <= 10
    assert parts <= 8
    assert journal_parts < len(report.applied)
    assert report.ledger_commits <= len(report.applied) + 6  # for founding, the lease and the head
    assert again.steps == ()
    assert calls == [("open", LEDGER), ("read", LEDGER)]


def below(kind: type[Any]) -> Iterator[type[Any]]:
    """Returns every class below one."""
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


def used_in(files: Sequence[Path]) -> set[str]:
    """Returns the names that occur in the code of these files, imports aside."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    nodes = [node for parsed in trees for node in ast.walk(parsed)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_defect_14_every_operation_error_and_verb_is_tested() -> None:
    """Never "it has no tests".

    Here each operation, each error and each verb of the manager is used by a test elsewhere.
    """
    used = used_in([f for f in Path(__file__).parents[1].rglob("*.py") if f != Path(__file__)])
    public = [getattr(op, name) for name in op.__all__]
    operations = {c.__name__ for c in public if isinstance(c, type) and issubclass(c, op.Operation)}
    errors = {c.__name__ for c in below(AiomigrateError) if c.__module__ == "aiomigrate.errors"}
    verbs = {name for name in vars(MigrationManager) if not name.startswith("_")}

    assert len(operations) >= 10
    assert sorted((operations | errors | verbs) - used) == []
