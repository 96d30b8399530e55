"""What was applied can be undone: exactly, resumably, and never over what others committed."""

from __future__ import annotations

import datetime as dt
import random
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, MigrationFailedError, MigrationManager, OnDestructive, op
from aiomigrate.clock import Clock
from aiomigrate.errors import (
    DependencyError,
    DestructiveError,
    RollbackRefusedError,
    TargetError,
    UnresolvedError,
)
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.store.connection import Store
from tests import scenario
from tests.faults import Died, DyingStore, dying_manager, watched_manager
from tests.operations.test_operations import CASES, Case
from tests.processes import quiet_logger
from tests.tools import SEED, TABLE, found, make, manager, rows_of

T = pa.schema([pa.field("id", pa.int64()), pa.field("n", pa.int64())])
START = [{"id": n, "n": n * 10} for n in range(4)]


def as_it_is(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Changes nothing."""
    return batch


async def fill(context: Context) -> None:
    """Marks rows."""
    await context.table().update({"mark": "x"}, where="mark IS NULL")


async def unfill(context: Context) -> None:
    """Takes the marks back."""
    await context.table().update({"mark": None}, where="mark = 'x'")


def history() -> list[Migration]:
    """Returns a line in which every way of undoing occurs."""
    return [
        Migration(table=TABLE, version=1, operations=[op.CreateTable(T, rows=START)]),
        Migration(
            table=TABLE,
            version=2,
            operations=[
                op.AddColumns({"twice": pa.int64(), "mark": pa.string()}, sql={"twice": "n * 2"}),
                op.CreateIndex("id"),
            ],
        ),
        Migration(table=TABLE, version=3, operations=[op.DropColumns("n"), op.Delete("id = 1")]),
        Migration(table=TABLE, version=4, up=fill, down=unfill),
        Migration(table=TABLE, version=6, operations=[op.Rebuild(as_it_is)]),
        Migration(
            table=TABLE,
            version=7,
            operations=[
                op.AlterType({"id": pa.string()}), op.RenameColumns({"mark": "m", "twice": "t"}),
            ],
        ),
    ]  # fmt: skip


VERSIONS = (0, 1, 2, 3, 4, 6, 7)


async def seen(database: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Returns shape and rows of the table, with what a shape leaves out."""
    state, _ = await found(database)
    if state is None or state.is_leftover:
        return (None, [])
    shape = {
        **state.shape(),
        "metadata": {field.name: field.metadata for field in state.schema if field.metadata},
        "named": sorted((i.name, str(i), sorted(i.options.items())) for i in state.indexes),
    }
    return shape, await rows_of(database)


async def staged(database: Path) -> dict[int, Any]:
    """Upgrades version by version; returns what the table was at each."""
    stages: dict[int, Any] = {0: (None, [])}
    async with manager(database, history()) as migrations:
        for version in VERSIONS[1:]:
            await migrations.upgrade(to=version)
            stages[version] = await seen(database)
    return stages


@pytest.mark.parametrize("at_once", [False, True])
async def test_each_version_is_what_it_was(database: Path, at_once: bool) -> None:
    """Step by step or at once, schema, rows and indexes are those of before; then up again."""
    stages = await staged(database)
    wrong = []
    async with manager(database, history()) as migrations:
        for version in (0,) if at_once else reversed(VERSIONS[:-1]):
            report = await migrations.rollback(TABLE, to=version)
            assert report.lines == {TABLE: version}
            status = await migrations.get_status()
            validation = await migrations.validate()
            if await seen(database) != stages[version]:
                wrong.append(version)
            assert status.lines[TABLE].current == version
            assert validation.errors == validation.not_at_target
        up_again = await migrations.upgrade()

    assert wrong == []
    assert [s.version for s in up_again.applied] == list(VERSIONS[1:])
    assert await seen(database) == stages[7]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_every_operation_is_undone_and_done_again(case: Case, database: Path) -> None:
    """What `undo` or the savepoint gives back is the table before, with its rows and indexes."""
    if case.schema is not None:
        await make(database, case.schema, case.rows, case.indexes)
    before = await seen(database)
    steps = [Migration(table=TABLE, version=1, operations=case.operations)]
    async with manager(database, steps, on_destructive=OnDestructive.ALLOW) as migrations:
        await migrations.upgrade()
        after = await seen(database)
        if case.fields is None and case.schema is not None:
            with pytest.raises(RollbackRefusedError):
                await migrations.rollback(TABLE)
            return
        await migrations.rollback(TABLE)
        undone = await seen(database)
        again = await migrations.upgrade()

    assert undone == before
    assert [s.version for s in again.applied] == [1]
    assert await seen(database) == after


# ---- what is refused ----------------------------------------------------------------------------


async def append(database: Path, **row: Any) -> None:
    """Adds a row as an application would."""
    table = await (await lancedb.connect_async(database)).open_table(TABLE)
    await table.add([row])


async def test_what_others_committed_is_not_given_up(database: Path) -> None:
    """Refused with the versions and the choices, nothing written; given up only when asked."""
    async with manager(database, history()) as migrations:
        await migrations.upgrade(to=3)
        await append(database, id=77)
        with pytest.raises(RollbackRefusedError, match=r"other writers committed since") as caught:
            await migrations.rollback(TABLE)
        kept = await seen(database)
        plan = await migrations.plan_rollback(TABLE, allow_destructive=True)
        await migrations.rollback(TABLE, allow_destructive=True)
        status = await migrations.get_status()

    assert 77 in [row["id"] for row in kept[1]]
    assert "--allow-destructive" in caught.value.remedy
    assert "discards commits of other writers to" in plan.warnings[0]
    assert status.lines[TABLE].current == 2
    assert sorted(row["id"] for row in await rows_of(database)) == [0, 1, 2, 3]


async def test_inverses_keep_what_others_wrote(database: Path) -> None:
    """Where operations undo it, rows that were added since stay."""
    async with manager(database, history()) as migrations:
        await migrations.upgrade(to=2)
        await append(database, id=77, n=1)
        await migrations.rollback(TABLE)

    state, _ = await found(database)
    assert state is not None
    assert state.schema.names == ["id", "n"]
    assert 77 in [row["id"] for row in await rows_of(database)]


async def test_a_table_that_was_made_is_taken_away_and_can_be_made_again(database: Path) -> None:
    """Not while others have written to it; its rows stay in the history of its name."""
    async with manager(database, history()) as migrations:
        await migrations.upgrade(to=1)
        await append(database, id=77, n=1)
        with pytest.raises(RollbackRefusedError):
            await migrations.rollback(TABLE)
        await migrations.rollback(TABLE, allow_destructive=True)
        gone = await seen(database)
        await migrations.upgrade(to=1)

    assert gone == (None, [])
    assert sorted(row["id"] for row in await rows_of(database)) == [0, 1, 2, 3]


def dependent() -> list[Migration]:
    """Returns lines that depend on each other, or share a table."""
    return [
        *history()[:2],
        Migration(table="b", version=1, operations=[op.CreateTable(T)], depends_on={TABLE: 2}),
        Migration(line="indexes", version=3, touches=[TABLE],
                  operations=[op.CreateIndex("n", table=TABLE)]),
        Migration(table="c", version=5, operations=[op.CreateTable(T)], depends_on={"b": 1}),
    ]  # fmt: skip


async def test_what_depends_on_it_is_undone_first_or_named(database: Path) -> None:
    """The error gives the command that undoes all that cannot stay; that command works."""
    async with manager(database, dependent()) as migrations:
        await migrations.upgrade()
        with pytest.raises(DependencyError) as caught:
            await migrations.rollback(TABLE, to=1)
        told = dict(p.split("=") for p in caught.value.remedy.split() if "=" in p)
        targets = {line: int(version) for line, version in told.items()}
        report = await migrations.rollback(targets)
        validation = await migrations.validate()

    assert targets == {TABLE: 1, "b": 0, "c": 0, "indexes": 0}
    order = [(s.line, s.version) for s in report.steps]
    assert order.index(("c", 5)) < order.index(("b", 1)) < order.index((TABLE, 2))
    assert order.index(("indexes", 3)) < order.index((TABLE, 2))
    assert validation.errors == validation.not_at_target


@pytest.mark.parametrize(
    ("line", "to", "message"),
    [
        ("thing", 1, "Did you mean 'things'"),
        (TABLE, 9, "is at version 7, below 9"),
        (TABLE, 5, "no version 5"),
        (TABLE, -1, "is not a target version"),
        (TABLE, True, "is not a target version"),
    ],
)
async def test_a_target_that_cannot_be_is_named(
    database: Path, line: str, to: Any, message: str
) -> None:
    """Nothing is written for a line or version that is none."""
    async with manager(database, history()) as migrations:
        await migrations.upgrade()
        with pytest.raises(TargetError, match=message):
            await migrations.rollback(line, to=to)


async def test_what_was_not_applied_here_is_not_guessed_at(database: Path) -> None:
    """An adopted version has no savepoint and no known state before: refused, unless `down`."""
    await make(database, T, START)
    steps = [Migration(table=TABLE, version=1, operations=[op.DropColumns("x")])]
    async with manager(database, steps) as migrations:
        await migrations.stamp()
        with pytest.raises(RollbackRefusedError, match="adopted or stamped"):
            await migrations.rollback(TABLE)
        nothing = await migrations.rollback(TABLE, to=1)

    assert nothing.steps == ()


async def test_the_way_out_that_a_refusal_names_works(database: Path) -> None:
    """A `down` that is written afterwards, and accepted by a stamp, undoes a function."""
    await make(database, pa.schema([*T, pa.field("mark", pa.string())]), START)
    once = [Migration(table=TABLE, version=1, up=fill)]
    async with manager(database, once) as migrations:
        await migrations.upgrade()
        await append(database, id=77, n=1)
        with pytest.raises(RollbackRefusedError) as caught:
            await migrations.rollback(TABLE)
    assert f"aiomigrate stamp --table {TABLE} --to 1" in caught.value.remedy
    with_down = [Migration(table=TABLE, version=1, up=fill, down=unfill)]
    async with manager(database, with_down) as migrations:
        await migrations.stamp(tables=[TABLE], to=1)
        await migrations.rollback(TABLE)
    rows = await rows_of(database)
    assert {row["mark"] for row in rows} == {None}
    assert len(rows) == 5

    declared = [Migration(table=TABLE, version=1, operations=[op.Update({"n": 0})])]
    async with manager(database, declared) as migrations:
        await migrations.upgrade()
        await append(database, id=78, n=1)
        with pytest.raises(RollbackRefusedError) as caught:
            await migrations.rollback(TABLE)
    assert "down" not in caught.value.remedy


async def test_a_cleaned_version_is_told_before_anything_is_changed(database: Path) -> None:
    """Without a savepoint, LanceDB's own cleanup ends what a restore can reach."""
    async with manager(database, history(), on_destructive=OnDestructive.ALLOW) as migrations:
        await migrations.upgrade(to=3)
        table = await (await lancedb.connect_async(database)).open_table(TABLE)
        with pytest.warns(UserWarning, match="cleanup"):
            await table.optimize(cleanup_older_than=dt.timedelta(0), delete_unverified=True)
        with pytest.raises((MigrationFailedError, RollbackRefusedError)):
            await migrations.rollback(TABLE, allow_destructive=True)
        status = await migrations.get_status()

    assert status.lines[TABLE].current == 3


# ---- savepoints that are kept -------------------------------------------------------------------


async def test_a_kept_savepoint_survives_cleanup_and_is_pruned(database: Path) -> None:
    """A destructive step can be undone after LanceDB has removed old versions, until `prune`."""
    async with manager(database, history()) as migrations:
        await migrations.upgrade(to=3)
        table = await (await lancedb.connect_async(database)).open_table(TABLE)
        branches = list(await table.branches.list())
        await migrations.rollback(TABLE)
        back = await rows_of(database)
        after = list(await table.branches.list())
        await migrations.upgrade(to=3)
        young = await migrations.prune(older_than=3600)
        pruned = await migrations.prune()
        again = await migrations.prune()

    assert len(branches) == 1
    assert [row["n"] for row in back] == [0, 10, 20, 30]
    assert after == []
    assert young == ()
    assert [(k.key, k.table) for k in pruned] == [((TABLE, 3), TABLE)]
    assert again == ()
    assert list(await table.branches.list()) == []


async def test_old_savepoints_go_with_the_next_run(database: Path) -> None:
    """Nobody has to remember: a run deletes those that are older than asked."""
    async with manager(database, history()) as migrations:
        await migrations.upgrade(to=3)
    later = Clock(wall=lambda: dt.datetime.now(dt.UTC) + dt.timedelta(days=8))
    async with manager(database, history(), clock=later) as migrations:
        await migrations.upgrade(to=4)
        table = await (await lancedb.connect_async(database)).open_table(TABLE)

    assert list(await table.branches.list()) == []


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_contract_gives_up_the_savepoints_it_names(
    database: Path,
    at_once: bool,
) -> None:
    """What completes an expansion ends the keep of its savepoints, in one run with it or later."""
    await make(database, T, START)
    steps = [
        Migration(table=TABLE, version=1, operations=[op.Update({}, sql={"n": "n + 1"})]),
        Migration(table=TABLE, version=2, operations=[op.Update({}, sql={"n": "n + 2"})]),
        Migration(
            line="later", version=1, touches=(TABLE,), contracts={TABLE: 1},
            operations=[op.SetMetadata("n", {"unit": "m"}, table=TABLE)],
        ),
    ]  # fmt: skip
    table = await (await lancedb.connect_async(database)).open_table(TABLE)
    async with manager(database, steps) as migrations:
        if not at_once:
            await migrations.upgrade(tables=[TABLE])
            assert len(await table.branches.list()) == 2
        await migrations.upgrade()
        left = list(await table.branches.list())
        pruned = await migrations.prune()

    assert [name.rsplit("-", 1)[-1] for name in left] == ["2"]
    assert [k.key for k in pruned] == [(TABLE, 2)]


async def test_an_update_of_a_column_that_was_renamed_before_is_undone_too(database: Path) -> None:
    """A column is not one that the migration added because it has another name by then."""
    await make(database, T, START)
    change = [op.RenameColumns({"n": "m"}), op.Update({"m": 0})]
    steps = [Migration(table=TABLE, version=1, operations=change)]
    async with manager(database, steps, on_destructive=OnDestructive.REFUSE) as migrations:
        with pytest.raises(DestructiveError, match="set m = 0"):
            await migrations.plan()
    async with manager(database, steps) as migrations:
        await migrations.upgrade()
        await migrations.rollback(TABLE)

    assert await rows_of(database) == START


async def test_a_table_renamed_back_is_not_taken_for_the_one_before(database: Path) -> None:
    """Its table_versions are those of a copy: what was done before the renaming stays."""
    await make(database, T, START)
    steps = [
        Migration(table=TABLE, version=1, operations=[op.Update({"n": 0})]),
        Migration(table=TABLE, version=2, operations=[op.RenameTable("others")]),
    ]
    async with manager(database, steps) as migrations:
        for _ in range(2):
            await migrations.upgrade()
            await migrations.rollback(TABLE, to=1)
            before = await seen(database)
            with pytest.raises(RollbackRefusedError, match="dropped or renamed since"):
                await migrations.rollback(TABLE, to=0)
            assert await seen(database) == before
            assert {row["n"] for row in before[1]} == {0}
        assert (await migrations.get_status()).lines[TABLE].current == 1


@pytest.mark.parametrize(
    "operations",
    [
        [op.RenameTable("others"), op.Delete("id = 1", table="others")],
        [op.Delete("id = 1"), op.RenameTable("others")],
    ],
)
async def test_a_renamed_table_keeps_no_savepoint(
    database: Path, operations: list[op.Operation]
) -> None:
    """The savepoint is dropped with the old name: what a migration discards beside it must ask."""
    await make(database, T, START)
    steps = [Migration(table=TABLE, version=1, operations=operations)]
    async with manager(database, steps) as migrations:
        with pytest.raises(DestructiveError, match="no savepoint of it can be kept"):
            await migrations.upgrade()

    assert await rows_of(database) == START


async def test_a_plan_marks_what_discards_something_that_is_there(database: Path) -> None:
    """Filling a column that the migration itself adds discards nothing."""
    await make(database, T, START)
    operations = [op.AddColumns({"mark": pa.string()}, values={"mark": "x"}), op.Update({"n": 1})]
    steps = [Migration(table=TABLE, version=1, operations=operations)]
    async with manager(database, steps) as migrations:
        plan = await migrations.plan()

    shown = [line for line in str(plan).splitlines() if "destructive" in line]
    assert shown == ["        - set n = 1  [rewriting, destructive]"]
    told = plan.to_dict()["steps"][0]["operations"]
    assert [operation["destructive"] for operation in told] == [False, False, True]


MOMENT = dt.datetime(2020, 2, 3, 4, 5, 6, 7)  # noqa: DTZ001 - as Arrow gives it back


@pytest.mark.parametrize(
    ("old", "values", "new", "way"),
    [
        (pa.float64(), [0.1, 1e300, None], pa.float32(), "restore"),
        (pa.float64(), [1.5, -2.5], pa.int64(), "restore"),
        (pa.int64(), [2**60 + 1, None], pa.float64(), "restore"),
        (pa.int64(), [0, 7], pa.bool_(), "restore"),
        (pa.string(), ["007", "1"], pa.int64(), "restore"),
        (pa.timestamp("us"), [MOMENT], pa.timestamp("s"), "restore"),
        (pa.timestamp("us"), [MOMENT], pa.date32(), "restore"),
        (pa.list_(pa.float64(), 2), [[0.1, 2.0], None], pa.list_(pa.float32(), 2), "restore"),
        (pa.int64(), [-5, 100, None], pa.int8(), "inverse"),
        (pa.int32(), [-(2**31), 2**31 - 1], pa.float64(), "inverse"),
        (pa.int64(), [-(2**63), 2**63 - 1], pa.string(), "inverse"),
        (pa.float32(), [0.1, None], pa.float64(), "inverse"),
        (pa.string(), ["ä", ""], pa.large_string(), "inverse"),
        (pa.bool_(), [True, False, None], pa.int8(), "inverse"),
        (pa.list_(pa.int32()), [[1, -1], [], None], pa.list_(pa.int64()), "inverse"),
        (pa.timestamp("s"), [dt.datetime(2020, 1, 1)], pa.timestamp("us"), "inverse"),  # noqa: DTZ001
    ],
    ids=str,
)
async def test_a_cast_is_undone_without_losing_a_digit(
    database: Path, old: pa.DataType, values: list[Any], new: pa.DataType, way: str
) -> None:
    """By casting back where that gives every value again, else from the savepoint it kept."""
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("x", old)])
    await make(database, schema, [{"id": n, "x": value} for n, value in enumerate(values)])
    before = await rows_of(database)
    steps = [Migration(table=TABLE, version=1, operations=[op.AlterType({"x": new})])]
    async with manager(database, steps) as migrations:
        plan = await migrations.plan()
        await migrations.upgrade()
        back = await migrations.plan_rollback(TABLE)
        await migrations.rollback(TABLE)
        pruned = await migrations.prune()

    assert await rows_of(database) == before
    assert back.steps[0].undo is not None
    assert back.steps[0].undo.way == way
    assert any("lose precision" in told for told in plan.warnings) == (way == "restore")
    assert plan.steps[0].is_destructive(0) == (way == "restore")
    assert pruned == ()


@pytest.mark.parametrize(
    ("operation", "policy", "refused"),
    [
        (op.DropTable(), OnDestructive.KEEP, "no savepoint of it can be kept"),
        (op.DropTable(), OnDestructive.REFUSE, "destructive steps are refused"),
        (op.DropColumns("n"), OnDestructive.REFUSE, "destructive steps are refused"),
        (op.Update({"n": 1}), OnDestructive.REFUSE, "destructive steps are refused"),
        (op.DropTable(), OnDestructive.ALLOW, None),
        (op.DropColumns("n"), OnDestructive.KEEP, None),
        (op.AddColumns({"x": pa.int64()}, values={"x": 1}), OnDestructive.REFUSE, None),
    ],
)
async def test_what_discards_asks(
    database: Path, operation: op.Operation, policy: OnDestructive, refused: str | None
) -> None:
    """Refused before anything is written, with the option that allows it."""
    await make(database, T, START)
    steps = [Migration(table=TABLE, version=1, operations=[operation])]
    async with manager(database, steps, on_destructive=policy) as migrations:
        if refused is None:
            assert len((await migrations.upgrade()).applied) == 1
            return
        with pytest.raises(DestructiveError, match=refused) as caught:
            await migrations.upgrade()

    assert "--allow-destructive" in caught.value.remedy
    assert not (database / "table_migrations.lance").exists()


# ---- crashes and failures -----------------------------------------------------------------------


async def freed(database: Path) -> None:
    """Frees the lease, as its expiry would."""
    store = await Store.connect(str(database))
    ledger = Ledger(store, "table_migrations", clock=Clock(), log=None)
    await ledger.update_lease({"owner": ""}, "owner <> ''", "run")


async def killed_in_rollback(database: Path, at: int, when: str, to: int) -> int:
    """Rolls back with a port that dies; returns how many commits it got to."""
    migrations = dying_manager(at, when)(
        database, migrations=history(), logger=quiet_logger(), concurrency=1
    )
    calls = 0
    try:
        await migrations.rollback(TABLE, to=to)
    except Died:
        pass
    except BaseExceptionGroup as died:
        if died.subgroup(Died) is None:
            raise
    store = migrations._database.store
    assert isinstance(store, DyingStore)
    calls = len(store.calls)
    await migrations.aclose()
    return calls


async def check_kills(tmp_path: Path, points: list[tuple[int, int, str]]) -> None:
    """Dies at each point of a rollback; then up again, or down again, as if nothing had been."""
    stages = await staged(tmp_path / "expected")
    wrong: dict[Any, Any] = {}
    for to, at, when in points:
        for then in ("up", "down"):
            database = tmp_path / f"{to}-{at}-{when}-{then}"
            async with manager(database, history()) as migrations:
                await migrations.upgrade()
            await killed_in_rollback(database, at, when, to)
            await freed(database)
            async with manager(database, history()) as migrations:
                if then == "up":
                    await migrations.upgrade()
                else:
                    await migrations.rollback(TABLE, to=to)
                validation = await migrations.validate()
            expected = stages[7 if then == "up" else to]
            if await seen(database) != expected or validation.errors != validation.not_at_target:
                wrong[to, at, when, then] = validation.errors
    assert wrong == {}


async def rollback_commits(tmp_path: Path, to: int) -> int:
    """Returns how many commits an undisturbed rollback makes."""
    database = tmp_path / f"count-{to}"
    async with manager(database, history()) as migrations:
        await migrations.upgrade()
    return await killed_in_rollback(database, 0, "before", to)


async def kill_points(tmp_path: Path) -> list[tuple[int, int, str]]:
    """Returns every commit of rolling the last migration back, and of rolling all back."""
    return [
        (to, at, when)
        for to in (6, 0)
        for at in range(1, await rollback_commits(tmp_path, to) + 1)
        for when in ("before", "after")
    ]


async def test_a_rollback_that_died_at_sampled_commits_is_gone_on_with(tmp_path: Path) -> None:
    """The next run needs no human: it finishes the undoing, then does what it was asked."""
    points = await kill_points(tmp_path)
    last = [point for point in points if point[0] == 6][-6:]  # while it cleans up after itself

    await check_kills(tmp_path, sorted({*random.Random(SEED).sample(points, 3), *last[:3]}))


@pytest.mark.campaign
async def test_a_rollback_that_died_at_any_commit_is_gone_on_with(tmp_path: Path) -> None:
    """The whole of the above."""
    await check_kills(tmp_path, await kill_points(tmp_path))


async def test_the_head_is_lowered_before_data_is_touched(database: Path) -> None:
    """At the first commit on the table, head and journal say already that it is not applied."""
    async with manager(database, history()) as migrations:
        await migrations.upgrade()
    told: list[int] = []

    async def look(verb: str, table: str) -> None:
        if table == TABLE and not told:
            async with manager(database, history()) as other:
                told.append((await other.get_status()).lines[TABLE].current)

    kind = watched_manager(before=look)
    async with kind(database, migrations=history(), logger=quiet_logger()) as migrations:
        await migrations.rollback(TABLE)

    assert told == [6]


async def broken_down(context: Context) -> None:
    """Fails after a commit."""
    await context.table().update({"n": -1})
    raise ValueError("wrong on purpose")


async def test_a_failing_inverse_leaves_the_migration_applied(database: Path) -> None:
    """Its commits are undone, head and journal say it is applied, a corrected one goes through."""
    await make(database, T, START)

    async def up(context: Context) -> None:
        await context.table().update({"n": 1})

    async def down(context: Context) -> None:
        await context.table().update({"n": 0})

    steps = [Migration(table=TABLE, version=1, up=up, down=broken_down)]
    async with manager(database, steps) as migrations:
        await migrations.upgrade()
        with pytest.raises(MigrationFailedError, match="wrong on purpose"):
            await migrations.rollback(TABLE)
        status = await migrations.get_status()
        validation = await migrations.validate()
        assert (await migrations.upgrade()).steps == ()
    assert status.lines[TABLE].current == 1
    assert validation.valid
    assert {row["n"] for row in await rows_of(database)} == {1}

    corrected = [Migration(table=TABLE, version=1, up=up, down=down)]
    async with manager(database, corrected) as migrations:
        await migrations.stamp()  # the edited script is accepted
        report = await migrations.rollback(TABLE)

    assert [s.outcome.value for s in report.steps] == ["rolled back"]
    assert {row["n"] for row in await rows_of(database)} == {0}


async def test_an_undoing_whose_script_was_changed_meanwhile_stops(database: Path) -> None:
    """What was begun by one script is not gone on with by another: a person decides."""
    async with manager(database, history()) as migrations:
        await migrations.upgrade()
    await killed_in_rollback(database, 8, "after", 6)
    await freed(database)
    edited = [*history()[:-1], Migration(table=TABLE, version=7, operations=[op.SetNullable("id")])]
    async with manager(database, edited) as migrations:
        with pytest.raises((MigrationFailedError, UnresolvedError)) as caught:
            await migrations.upgrade()

    assert "stamp" in str(caught.value)


async def test_looking_at_a_rollback_writes_nothing(database: Path) -> None:
    """The plan of a rollback is a dry run; of a missing database it is a clear error."""
    async with manager(database, history()) as migrations:
        await migrations.upgrade()
        before = await scenario.snapshot(database)
        plan = await migrations.plan_rollback(TABLE, to=0)
        after = await scenario.snapshot(database)
    async with MigrationManager(database.parent / "none", migrations=history()) as migrations:
        with pytest.raises(TargetError, match="is at version 0"):
            await migrations.plan_rollback(TABLE, to=1)

    assert before == after
    assert [(s.script.version, s.undo and s.undo.to) for s in plan.steps] == [
        (7, 6), (6, 4), (4, 3), (3, 2), (2, 1), (1, 0),
    ]  # fmt: skip
    assert plan.to_dict()["direction"] == "rollback"
    assert "return things to table_version" in str(plan)
    assert not (database.parent / "none").exists()


async def test_code_of_a_line_that_is_no_table_is_applied_and_undone(database: Path) -> None:
    """`Migration(line=..., touches=..., up=..., down=...)` is planned, run and rolled back."""

    async def up(ctx: Context) -> None:
        await ctx.table("a").add([{"id": "x"}])

    async def down(ctx: Context) -> None:
        await ctx.table("a").delete("id = 'x'")

    schema = pa.schema([pa.field("id", pa.string())])
    migrations = [
        Migration(table="a", version=1, operations=[op.CreateTable(schema)]),
        Migration(line="chores", version=1, touches=["a"], depends_on={"a": 1}, up=up, down=down),
        Migration(line="chores", version=2, touches=["a"], up=up),
    ]
    async with manager(database, migrations) as migrating:
        await migrating.initialize()
        assert len(await rows_of(database, "a")) == 2
        await migrating.rollback("chores", to=0)
        assert await rows_of(database, "a") == []
        await migrating.upgrade()
        assert len(await rows_of(database, "a")) == 2
