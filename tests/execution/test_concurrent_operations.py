"""Operations of one migration run concurrently, and savepoints are made only where needed.

That a crash at any of their commits changes nothing in the end is proved by
`guarantees.test_crash_at_every_commit`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import lancedb
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiomigrate import Context, Migration, MigrationFailedError, Outcome, Progress, op
from aiomigrate.execution.attempt import advance_detail
from aiomigrate.execution.lookahead import chains
from aiomigrate.ledger.history import fold
from aiomigrate.ledger.records import Kind
from aiomigrate.manager import MigrationManager
from aiomigrate.store.connection import Store
from tests.faults import watched_manager
from tests.ledger.test_history import event, opened
from tests.processes import quiet_logger
from tests.tools import found, make, rows_of

T = pa.schema([pa.field("id", pa.int64()), pa.field("x", pa.int64())])
NAMES = [f"t{number}" for number in range(8)]


async def nothing(context: Context) -> None:
    """Changes nothing."""


def operation_of(table: str, kind: str) -> op.Operation:
    """Returns an operation of some kind on a table."""
    match kind:
        case "add":
            return op.AddColumns({"y": pa.int64()}, table=table)
        case "update":
            return op.Update({"x": 1}, table=table)
        case "drop":
            return op.DropTable(table=table)
        case "copy":
            return op.CopyInto("other", key="id", table=table)
        case _:
            return op.Run(nothing, table=table)


ALONE = ("add", "update")
operations_of = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(ALONE)), max_size=8)


def many(operations: Sequence[op.Operation], names: Sequence[str] = NAMES) -> list[Migration]:
    """Returns one migration of several tables."""
    return [Migration(line="many", version=1, touches=tuple(names), operations=operations)]


@given(operations_of, st.sets(st.integers(0, 7)))
def test_each_operation_is_in_one_chain_in_the_order_of_its_table(
    told: list[tuple[str, str]], done: set[int]
) -> None:
    """A chain for each table, with its operations in order, without those that are complete."""
    operations = [operation_of(*one) for one in told]
    found = chains(operations, done)

    assert sorted(n for chain in found for n in chain) == [
        n for n in range(len(operations)) if n not in done
    ]
    assert all(chain == sorted(chain) for chain in found)
    assert [len({operations[n].table for n in chain}) for chain in found] == [1] * len(found)
    assert len(found) == len({operations[n].table for chain in found for n in chain})


@pytest.mark.parametrize("kind", ["drop", "copy", "run"])
@given(told=operations_of, at=st.integers(0, 8))
def test_what_another_may_need_goes_one_by_one(
    kind: str, told: list[tuple[str, str]], at: int
) -> None:
    """A dropped table, a copy and code: nothing is done beside them, wherever they stand."""
    told.insert(at, ("a", kind))
    operations = [operation_of(*one) for one in told]

    assert chains(operations, ()) == [list(range(len(operations)))]


@given(st.sets(st.integers(0, 12)))
def test_what_is_complete_is_told_and_read_back(done: set[int]) -> None:
    """Positions survive the journal, in whichever order operations ended."""
    events = [
        opened(1),
        event(1, 1, Kind.STARTED, 1, tables={"t": {"before": 1}}),
        event(1, 2, Kind.ADVANCED, 1, detail=advance_detail(done)),
    ]
    unfinished = fold(events).of("memos").unfinished

    assert unfinished is not None
    assert unfinished.done_of(13) == done


async def test_many_tables_of_one_migration_share_the_journals_commits(tmp_path: Path) -> None:
    """Eight tables with four operations each: announced together, not in 32 commits and more."""
    for name in NAMES:
        await make(tmp_path, T, [{"id": 1, "x": None}], table=name)
    operations = [
        one
        for name in NAMES
        for one in (
            op.AddColumns({"y": pa.int64()}, table=name),
            op.Update({"x": 0}, where="x IS NULL", table=name),
            op.SetNotNull("x", table=name),
            op.RenameColumns({"y": "z"}, table=name),
        )
    ]
    async with MigrationManager(
        tmp_path, migrations=many(operations), logger=quiet_logger()
    ) as manager:
        report = await manager.upgrade()
        (step,) = report.steps

    assert step.commits == len(operations)
    assert report.ledger_commits < len(operations)
    assert step.ran_s > 0
    assert step.ran_s + step.ledger_s <= report.total_s
    for name in NAMES:
        assert await rows_of(tmp_path, name) == [{"id": 1, "x": 0, "z": None}]


async def test_concurrency_of_one_keeps_them_apart(tmp_path: Path) -> None:
    """`concurrency=1`: one operation after the other, as they are listed."""
    seen: list[str] = []

    async def note(verb: str, table: str) -> None:
        if verb == "add_columns" and table in NAMES:
            seen.append(table)

    for name in NAMES:
        await make(tmp_path, T, [{"id": 1}], table=name)
    names = NAMES[::-1]
    operations = [op.AddColumns({"y": pa.int64()}, table=name) for name in names]
    kind = watched_manager(before=note)
    migrations = many(operations)
    async with kind(
        tmp_path, migrations=migrations, concurrency=1, logger=quiet_logger()
    ) as manager:
        await manager.upgrade()

    assert seen == names


async def test_one_that_fails_takes_all_of_them_back(tmp_path: Path) -> None:
    """The others of a migration are stopped and undone; the error names the one that failed."""
    for name in NAMES:
        rows = [{"id": 1, "x": None if name == "t5" else 1}]
        await make(tmp_path, T, rows, table=name)
    before = {name: await rows_of(tmp_path, name) for name in NAMES}
    operations = [
        one
        for name in NAMES
        for one in (op.AddColumns({"y": pa.int64()}, table=name), op.SetNotNull("x", table=name))
    ]
    async with MigrationManager(
        tmp_path, migrations=many(operations), logger=quiet_logger()
    ) as manager:
        with pytest.raises(MigrationFailedError) as caught:
            await manager.upgrade()
        (failed,) = caught.value.report.steps

    assert failed.outcome is Outcome.FAILED
    assert "'t5'" in failed.error
    assert "rows have NULL" in failed.error
    assert {name: await rows_of(tmp_path, name) for name in NAMES} == before


@pytest.mark.parametrize("changed", [(), ("t1",), ("t0", "t2")])
async def test_a_function_has_savepoints_of_the_tables_it_changes(
    tmp_path: Path, changed: tuple[str, ...]
) -> None:
    """Those it only looks at get none; of the others one, before the first commit; none stays."""
    names = NAMES[:3]
    calls: list[tuple[str, str]] = []

    async def note(verb: str, table: str) -> None:
        if table in names:
            calls.append((verb, table))

    async def changes(context: Context) -> None:
        async def twice(name: str) -> None:
            await context.table(name).update({"x": 1}, where="id = 1")
            await context.table(name).update({"x": 2}, where="id = 1")

        async with anyio.create_task_group() as group:
            for name in changed:
                group.start_soon(twice, name)
        for name in names:
            await context.table(name).count_rows()

    for name in names:
        await make(tmp_path, T, [{"id": 1}], table=name)
    migrations = many([op.Run(changes, table="t0")], names)
    kind = watched_manager(before=note)
    async with kind(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
        await manager.upgrade()

    made = [table for verb, table in calls if verb == "create_branch"]
    assert Counter(made) == Counter(changed)
    for name in changed:
        verbs = [verb for verb, table in calls if table == name]
        assert verbs == ["create_branch", "update", "update", "delete_branch"]
        table = await (await lancedb.connect_async(tmp_path)).open_table(name)
        assert not await table.branches.list()


async def test_a_savepoint_that_is_cleaned_away_before_it_is_made_is_done_without(
    tmp_path: Path,
) -> None:
    """Others commit and clean up before a function's first commit: it is not held up by that."""

    async def changes(context: Context) -> None:
        other: Any = await context.connection.open_table("t")
        await other.add([{"id": 2, "x": 2}])
        await anyio.sleep(0.01)
        await other.optimize(cleanup_older_than=dt.timedelta(milliseconds=1))
        await context.table("t").update({"x": 1}, where="id = 1")

    await make(tmp_path, T, [{"id": 1}], table="t")
    migrations = [Migration(table="t", version=1, operations=[op.Run(changes)])]
    async with MigrationManager(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
        report = await manager.upgrade()

    assert [step.outcome for step in report.steps] == [Outcome.APPLIED]
    rows = await rows_of(tmp_path, "t")
    assert sorted((row["id"], row["x"]) for row in rows) == [(1, 1), (2, 2)]


# ---- what a run writes of itself beside its first migrations ------------------------------------


def two_of(table: str) -> list[Migration]:
    """Returns two migrations of one table."""
    return [
        Migration(table=table, version=n, operations=[op.AddColumns({f"c{n}": pa.int64()})])
        for n in (1, 2)
    ]


async def test_no_line_goes_on_before_the_head_has_its_row(tmp_path: Path) -> None:
    """A death then would leave a row that is believed less than what the tables look like."""
    order: list[str] = []
    is_first = anyio.Event()

    async def hold(verb: str, table: str) -> None:
        if (verb, table) == ("insert_missing", "table_migrations"):
            with anyio.fail_after(5):
                await is_first.wait()
            await anyio.sleep(0.1)  # enough for a second migration that does not wait
            order.append("head")

    async def note(verb: str, table: str) -> None:
        if table == "t0":
            order.append(verb)
            is_first.set()

    for table in ("t0", "t1"):
        await make(tmp_path, T, [{"id": 1}], table=table)
    # Founded by another line: whoever makes the lease's row makes those of its lines with it.
    async with MigrationManager(tmp_path, migrations=two_of("t1"), logger=quiet_logger()) as first:
        await first.upgrade()
    kind = watched_manager(before=hold, after=note)
    both = [*two_of("t0"), *two_of("t1")]
    async with kind(tmp_path, migrations=both, logger=quiet_logger()) as manager:
        await manager.upgrade()

    assert order == ["add_columns", "head", "add_columns"]


async def test_a_first_run_makes_the_rows_of_its_lines_with_the_lease(tmp_path: Path) -> None:
    """One commit to the head before the first migration: a death leaves both rows or neither."""
    calls: list[tuple[str, str]] = []

    async def note(verb: str, table: str) -> None:
        calls.append((verb, table))

    await make(tmp_path, T, [{"id": 1}], table="t0")
    kind = watched_manager(before=note)
    async with kind(tmp_path, migrations=two_of("t0"), logger=quiet_logger()) as manager:
        await manager.upgrade()
        assert manager._database.store is not None
        head = await (await manager._database.store.open("table_migrations")).at(2)
        rows = (await head.read()).to_pylist()

    assert calls.count(("insert_missing", "table_migrations")) == 1
    assert {(row["tableName"], row["currentVersion"], row["epoch"]) for row in rows} == {
        (":lease:run", 0, 1), ("t0", 0, 1),
    }  # fmt: skip


@pytest.mark.parametrize("left", ["returned", "returned unused", "unlocked", "silent"])
async def test_a_start_is_recorded_before_anything_where_another_may_still_write(
    tmp_path: Path, left: str
) -> None:
    """Who follows a holder that gave the lease back lets its first event wait for company."""
    migrations = two_of("t0")
    # With a renewal of the lease, nothing waits for company any longer.
    options = {"logger": quiet_logger(), "lease_ttl": 0.5 if left == "silent" else 30.0}
    await make(tmp_path, T, [{"id": 1}], table="t0")
    async with MigrationManager(tmp_path, migrations=migrations[:1], **options) as manager:
        await manager.upgrade()
    connection = await lancedb.connect_async(tmp_path)
    head = await connection.open_table("table_migrations")
    if left != "returned":
        values = {"silent": {"owner": "someone", "beat": 7}, "returned unused": {"epoch": 5}}
        await head.update(values.get(left, {"beat": 0}), where="tableName = ':lease:run'")
    journal = await connection.open_table("table_migrations_history")
    commits: list[int] = []

    async def look(verb: str, table: str) -> None:
        if (verb, table) == ("add_columns", "t0"):
            await journal.checkout_latest()
            kinds = (await journal.query().to_arrow())["kind"].to_pylist()
            assert kinds.count(Kind.OPENED) == 2
            commits.append(await journal.version() - before)

    before = await journal.version()
    kind = watched_manager(before=look)
    async with kind(tmp_path, migrations=migrations, **options) as manager:
        await manager.upgrade()

    assert commits == [1 if left == "returned" else 2]


# ---- what is recorded with what the next migration of the line announces -------------------------


def filled(column: str) -> op.Operation:
    """Returns an operation that has a savepoint, which goes when it is done."""
    return op.AddColumns({column: pa.int64()}, values={column: 0})


async def savepoints(path: Path, table: str) -> list[str]:
    """Returns the branches of a table."""
    return await (await (await Store.connect(str(path))).open(table)).branches()


async def test_a_migration_is_recorded_with_what_the_next_announces(tmp_path: Path) -> None:
    """Its savepoint goes while the next one runs: two of them share the journal's commits."""
    await make(tmp_path, T, [{"id": 1, "x": 1}], table="t0")
    migrations = [
        Migration(table="t0", version=n, operations=[filled(f"c{n}")]) for n in range(1, 5)
    ]
    async with MigrationManager(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
        report = await manager.upgrade()
        events = [e.kind for e in await manager.history("t0")]

    assert events == [Kind.STARTED, Kind.INTENDED, Kind.INTENDED, Kind.APPLIED] * 4
    assert await savepoints(tmp_path, "t0") == []
    assert await rows_of(tmp_path, "t0") == [{"id": 1, "x": 1, **{f"c{n}": 0 for n in range(1, 5)}}]
    # Founding two tables (with the lease), rows for the lines, one for each of the four and the
    # last end, and giving the lease back.
    assert report.ledger_commits <= 9


@pytest.mark.parametrize("next_one", ["fails", "is cancelled", "is passed over"])
async def test_what_is_done_stays_done_whatever_becomes_of_the_next(
    tmp_path: Path, next_one: str
) -> None:
    """It is recorded, its savepoint is gone and its row in the head is right."""
    await make(tmp_path, T, [{"id": 1, "x": None}], table="t0")
    scope = anyio.CancelScope()

    async def stop(verb: str, table: str) -> None:
        if (verb, table, next_one) == ("alter_columns", "t0", "is cancelled"):
            scope.cancel()
        if (verb, table) == ("delete_branch", "t0"):
            own = await lancedb.connect_async(tmp_path)
            journal = await (await own.open_table("table_migrations_history")).query().to_arrow()
            recorded.append(Kind.APPLIED in journal["kind"].to_pylist())

    recorded: list[bool] = []
    second: op.Operation = op.SetNotNull("x")
    if next_one == "is cancelled":
        second = op.RenameColumns({"x": "y"})
    elif next_one == "is passed over":
        second = op.Update({"x": 1}, where="id > 9")
    migrations = [
        Migration(table="t0", version=1, operations=[filled("z")]),
        Migration(table="t0", version=2, operations=[second]),
    ]
    kind = watched_manager(before=stop)
    with contextlib.suppress(MigrationFailedError), scope:
        async with kind(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
            await manager.upgrade()
    connection = await lancedb.connect_async(tmp_path)
    head = (await (await connection.open_table("table_migrations")).query().to_arrow()).to_pylist()
    async with MigrationManager(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
        events = [e.kind for e in await manager.history("t0") if e.version == 1]

    assert recorded
    assert all(recorded)
    assert [kind for kind in events if kind != Kind.INTENDED] == [Kind.STARTED, Kind.APPLIED]
    assert await savepoints(tmp_path, "t0") == []
    at = 2 if next_one == "is passed over" else 1
    assert [row["currentVersion"] for row in head if row["tableName"] == "t0"] == [at]
    assert await rows_of(tmp_path, "t0") == [{"id": 1, "x": None, "z": 0}]


async def test_what_follows_in_another_line_does_not_wait_for_a_savepoint_to_go(
    tmp_path: Path,
) -> None:
    """That a migration is applied is recorded with what follows it; only then is it cleaned up."""
    for table in ("t0", "t1"):
        await make(tmp_path, T, [{"id": 1, "x": 1}], table=table)
    is_next_done = anyio.Event()

    async def wait(verb: str, table: str) -> None:
        if (verb, table) == ("delete_branch", "t0"):
            with anyio.fail_after(5):
                await is_next_done.wait()

    async def note(verb: str, table: str) -> None:
        if (verb, table) == ("add_columns", "t1"):
            is_next_done.set()

    migrations = [
        Migration(table="t0", version=1, operations=[filled("z")]),
        Migration(
            table="t1",
            version=1,
            operations=[op.AddColumns({"y": pa.int64()})],
            depends_on={"t0": 1},
        ),
    ]
    kind = watched_manager(before=wait, after=note)
    async with kind(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
        await manager.upgrade()
        status = await manager.get_status()

    assert is_next_done.is_set()
    assert await savepoints(tmp_path, "t0") == []
    assert [line.current for line in status.lines.values()] == [1, 1]


async def test_a_line_that_is_done_is_cleaned_up_though_the_run_is_cancelled(
    tmp_path: Path,
) -> None:
    """While other lines go on, the head already says so, and no savepoint is left."""
    for table in ("t0", "t1"):
        await make(tmp_path, T, [{"id": 1, "x": 1}], table=table)
    scope = anyio.CancelScope()

    async def for_ever(context: Context) -> None:
        await anyio.sleep_forever()

    def stop(progress: Progress) -> None:
        if (progress.line, progress.state) == ("t0", "applied"):
            scope.cancel()

    migrations = [
        Migration(table="t0", version=1, operations=[filled("z")]),
        Migration(table="t1", version=1, operations=[op.Run(for_ever)]),
    ]
    with scope:
        async with MigrationManager(
            tmp_path, migrations=migrations, logger=quiet_logger(), on_progress=stop
        ) as manager:
            await manager.upgrade()
    async with MigrationManager(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
        status = await manager.get_status()

    assert scope.cancelled_caught
    assert await savepoints(tmp_path, "t0") == []
    assert {name: line.current for name, line in status.lines.items()} == {"t0": 1, "t1": 0}


async def test_a_line_that_waits_for_another_is_cleaned_up_meanwhile(tmp_path: Path) -> None:
    """That may take hours: its savepoint is not kept so long."""
    for table in ("t0", "t1"):
        await make(tmp_path, T, [{"id": 1, "x": 1}], table=table)

    async def long(context: Context) -> None:
        with anyio.fail_after(5):
            while not is_saved.is_set() or await savepoints(tmp_path, "t0"):  # noqa: ASYNC110
                await anyio.sleep(0.01)

    async def note(verb: str, table: str) -> None:
        if (verb, table) == ("create_branch", "t0"):
            is_saved.set()

    is_saved = anyio.Event()
    migrations = [
        Migration(table="t0", version=1, operations=[filled("z")]),
        Migration(table="t1", version=1, operations=[op.Run(long)]),
        Migration(table="t0", version=2, operations=[filled("y")], depends_on={"t1": 1}),
    ]
    kind = watched_manager(after=note)
    async with kind(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
        report = await manager.upgrade()

    assert len(report.applied) == 3


@pytest.mark.parametrize("code", ["does nothing", "commits", "takes the connection"])
async def test_code_that_committed_is_recorded_at_once(tmp_path: Path, code: str) -> None:
    """It should not run twice for a death right after it; where it did nothing, it may wait."""
    await make(tmp_path, T, [{"id": 1, "x": 1}], table="t0")
    commits: list[int] = []

    async def up(context: Context) -> None:
        commits.append(await journal_version())
        if code == "commits":
            await context.table().update({"x": 2})
        elif code == "takes the connection":
            assert context.connection.is_open()

    async def journal_version() -> int:
        own = await lancedb.connect_async(tmp_path)
        return await (await own.open_table("table_migrations_history")).version()

    async def look(verb: str, table: str) -> None:
        if (verb, table) == ("add_columns", "t0"):
            commits.append(await journal_version())

    migrations = [
        Migration(table="t0", version=1, operations=[op.Run(up)]),
        Migration(table="t0", version=2, operations=[op.AddColumns({"y": pa.int64()})]),
    ]
    kind = watched_manager(before=look)
    async with kind(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
        await manager.upgrade()

    # The commit of the code is announced, too.
    expected = {"does nothing": 1, "takes the connection": 2, "commits": 3}[code]
    assert commits[1] - commits[0] == expected


async def test_what_rewrites_rows_begins_with_what_others_wrote_just_before(tmp_path: Path) -> None:
    """A table left a moment ago is looked at again: their rows are filled, and kept by undoing."""
    await make(tmp_path, T, [{"id": 1, "x": None}], table="t0")
    theirs = await (await lancedb.connect_async(tmp_path)).open_table("t0")

    async def write(verb: str, table: str) -> None:
        if (verb, table) == ("alter_columns", "t0") and not written.is_set():
            written.set()
            await theirs.checkout_latest()
            await theirs.add([{"id": 2, "y": None}])

    written = anyio.Event()
    migrations = [
        Migration(table="t0", version=1, operations=[op.RenameColumns({"x": "y"})]),
        Migration(table="t0", version=2, operations=[op.Update({"y": 5}), op.SetNotNull("id")]),
        Migration(
            table="t0",
            version=3,
            operations=[filled("z"), op.Update({"y": None}), op.SetNotNull("y")],
        ),
    ]
    kind = watched_manager(after=write)
    async with kind(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
        with pytest.raises(MigrationFailedError) as failure:
            await manager.upgrade()
        report = failure.value.report

    assert [(s.version, s.outcome) for s in report.steps] == [
        (1, Outcome.APPLIED), (2, Outcome.APPLIED), (3, Outcome.FAILED),
    ]  # fmt: skip
    assert await rows_of(tmp_path, "t0") == [{"id": 1, "y": 5}, {"id": 2, "y": 5}]


@pytest.mark.parametrize("alike", [True, False])
async def test_a_table_that_others_make_after_it_was_looked_for_is_theirs(
    tmp_path: Path, alike: bool
) -> None:
    """What was not there a moment ago is made without a look; what is there by then is kept."""
    theirs = pa.table({"id": [1], "x": [2]}, T) if alike else pa.table({"other": [1]})

    async def create(verb: str, table: str) -> None:
        if (verb, table) == ("insert_missing", "table_migrations") and not made.is_set():
            made.set()
            connection = await lancedb.connect_async(tmp_path)
            await connection.create_table("t0", theirs)

    made = anyio.Event()
    kind = watched_manager(before=create)
    migrations = [Migration(table="t0", version=1, operations=[op.CreateTable(T)])]
    async with kind(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
        if alike:
            assert (await manager.upgrade()).applied
        else:
            with pytest.raises(MigrationFailedError, match="exists with another schema"):
                await manager.upgrade()

    assert made.is_set()
    assert await rows_of(tmp_path, "t0") == theirs.to_pylist()


async def test_a_table_that_code_makes_is_not_taken_for_missing(tmp_path: Path) -> None:
    """Also if it is made through the connection, and was not there when the run began."""

    async def make_another(context: Context) -> None:
        await context.connection.create_table("t1", schema=T)

    added = op.AddColumns({"y": pa.int64()}, when_missing=op.Missing.SKIP)
    migrations = [
        Migration(table="t0", version=1, operations=[op.CreateTable(T), op.Run(make_another)]),
        Migration(table="t1", version=1, operations=[added], depends_on={"t0": 1}),
    ]
    async with MigrationManager(tmp_path, migrations=migrations, logger=quiet_logger()) as manager:
        await manager.upgrade()

    state, _ = await found(tmp_path, "t1")
    assert state is not None
    assert state.has("y")
