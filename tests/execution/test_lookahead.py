"""Commits are announced together where a death among them leaves nothing unknown, only there."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import anyio
import lancedb
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiomigrate import Migration, MigrationFailedError, op
from aiomigrate.errors import AiomigrateError
from aiomigrate.execution.lookahead import (
    MAX_OPERATIONS,
    UNPREDICTED,
    _PredictedTable,
    predict_commits,
)
from aiomigrate.ledger.history import classify_intents
from aiomigrate.ledger.records import Event, Kind
from aiomigrate.operations.base import Operation
from aiomigrate.operations.target import Target
from aiomigrate.schema.state import TableState
from tests.faults import dying_manager, watched_manager
from tests.guarantees.test_crash_at_every_commit import dies
from tests.ledger.test_history import event
from tests.processes import quiet_logger
from tests.tools import found, make, manager, rows_of

T = pa.schema([pa.field("id", pa.int64()), pa.field("x", pa.int64()), pa.field("y", pa.string())])
ROWS = [{"id": 1, "x": 1, "y": "a"}, {"id": 2, "x": None, "y": None}]
SOFT_DELETE = (
    *op.AddColumns({"gone": pa.int64()}, values={"gone": 0}).expand(),
    op.SetNotNull("gone"),
    op.CreateIndex("gone"),
)
"""Four operations of one commit each."""


def named(operations: Sequence[Operation]) -> list[tuple[Operation, str]]:
    """Returns operations with a witness each."""
    return [(one.on("t"), f"__aiomigrate_{n}") for n, one in enumerate(operations)]


# ---- what is told together ----------------------------------------------------------------------

N = pa.int64()
TOGETHER: dict[str, tuple[Sequence[Operation], int]] = {
    "all of a soft delete": (SOFT_DELETE, 4),
    "columns and their indexes": (
        (op.AddColumns({"a": N}), op.CreateIndex("a"), op.CreateIndex("y")),
        3,
    ),
    "what is there already is passed over": ((op.AddColumns({"x": N}), op.CreateIndex("x")), 1),
    "an index before its column": ((op.DropIndex("y"), op.DropColumns("y")), 2),
    "not what hides that a column was added": (
        (op.AddColumns({"a": N}), op.RenameColumns({"a": "b"})),
        1,
    ),
    "not what drops it again": ((op.AddColumns({"a": N}), op.DropColumns("a")), 1),
    "not what hides that nothing was to be done": (
        (op.AddColumns({"a": N}), op.AddColumns({"x": N}), op.RenameColumns({"x": "b"})),
        1,
    ),
    "nothing after an expression": ((op.Update(sql={"x": "x + 1"}), op.AddColumns({"a": N})), 2),
    "not two changes of rows": ((op.Update({"x": 1}), op.Update({"x": 2}, where="x = 1")), 1),
    "not what drops what an update reads": (
        (op.Update({"x": 1}, where="y = 'a'"), op.DropColumns("y")),
        1,
    ),
    "not what changes the type of what was set": (
        (op.Update({"x": 1}), op.AlterType({"x": pa.float64()})),
        1,
    ),
    "nothing after rows are deleted": ((op.Delete("x = 1"), op.AddColumns({"a": N})), 0),
    "nothing that cannot be": ((op.DropColumns("nowhere else"), op.SetNotNull("z")), 0),
}


@pytest.mark.parametrize(("operations", "count"), TOGETHER.values(), ids=TOGETHER.keys())
async def test_commits_are_told_together_up_to_where_a_look_would_not_do(
    operations: Sequence[Operation], count: int
) -> None:
    """So many commits are told at once of these operations."""
    given_state = TableState(T, (op.Index("BTree", ("y",), "y_idx"),) if count == 2 else ())

    assert len(await predict_commits(named(operations), given_state)) == count


async def test_no_more_are_told_together_than_are_quickly_foreseen() -> None:
    """However many there are, so many are looked at, and the others not even asked for."""
    asked = iter(named([op.AddColumns({f"c{n}": N}) for n in range(3 * MAX_OPERATIONS)]))

    assert len(await predict_commits(asked, TableState(T))) == MAX_OPERATIONS
    assert len(list(asked)) == 2 * MAX_OPERATIONS


async def test_a_table_is_told_with_its_indexes() -> None:
    """A table that is made, and indexed, is announced once; a missing one may be passed over."""
    making = (op.CreateTable(T), op.CreateIndex("id"), op.CreateIndex("y"))
    skipped = (op.AddColumns({"a": N}, when_missing=op.Missing.SKIP), op.CreateTable(T))

    assert [effect["do"] for effect in await predict_commits(named(making), None)] == [
        "create", "shape", "shape",
    ]  # fmt: skip
    assert await predict_commits(named(skipped), None) == []


operations_of = st.lists(
    st.one_of(
        st.sampled_from("xyab").map(lambda c: op.AddColumns({c: N})),
        st.sampled_from("xyab").map(op.DropColumns),
        st.permutations("xyab").map(lambda c: op.RenameColumns({c[0]: c[1]})),
        st.sampled_from("xyab").map(op.SetNotNull),
        st.sampled_from("xyab").map(op.SetNullable),
        st.sampled_from("xyab").map(op.CreateIndex),
        st.sampled_from("xyab").map(op.DropIndex),
        st.sampled_from("xyab").map(lambda c: op.AlterType({c: pa.float64()})),
        st.sampled_from("xyab").map(lambda c: op.Update({c: 1})),
        st.sampled_from("xyab").map(lambda c: op.Update(sql={c: f"{c} + 1"})),
    ),
    min_size=2,
    max_size=6,
)


async def states_of(operations: Sequence[tuple[Operation, str]], state: TableState) -> Any:
    """Returns the states after each commit, as far as operations can be run at all."""
    states = [state]
    for operation, witness in operations:
        try:
            if operation.done(states[-1], witness):
                continue
            future = _PredictedTable(states[-1], witness)
            await operation.apply(cast("Target", future))
        except AiomigrateError:
            break
        states += future.states
    return states


@given(operations_of)
def test_whoever_goes_on_among_commits_told_together_ends_the_same(
    operations: list[Operation],
) -> None:
    """After any of them, operations that look for their effect, from the first on, end alike."""

    async def check() -> None:
        start, told = TableState(T), named(operations)
        effects = await predict_commits(told, start)
        whole = await states_of(told, start)
        if len(effects) >= len(whole):
            return  # the last operation cannot be run: nothing to end alike
        # The operations whose commits are told: those after them have their own announcement.
        counts = [len(await states_of(told[:n], start)) for n in range(len(told) + 1)]
        count = next(n for n, commits in enumerate(counts) if commits > len(effects))
        end = whole[len(effects)]
        for state in whole[: len(effects)]:
            again = await states_of(told[:count], state)
            assert again[-1].shape() == end.shape()

    anyio.run(check)


# ---- what the journal then tells ----------------------------------------------------------------


def intents(*told: tuple[int, bool]) -> list[Event]:
    """Builds announcements by base, foreseen or not."""
    return [
        event(1, n, Kind.INTENDED, 1, detail={"base": base} | ({"foreseen": True} if ahead else {}))
        for n, (base, ahead) in enumerate(told)
    ]


NOW, AHEAD = False, True
STANDING = {
    "one after another": ([(5, NOW), (6, NOW)], [5], [6]),
    "a last one with what follows": ([(5, NOW), (6, NOW), (7, AHEAD)], [5], [6, 7]),
    "all made, and one more": ([(5, NOW), (6, AHEAD), (7, NOW)], [5, 6], [7]),
    "one of them not": ([(5, NOW), (6, AHEAD), (7, AHEAD), (7, NOW)], [5, 6], [7]),
    "none of those ahead": ([(5, NOW), (6, AHEAD), (6, NOW), (7, AHEAD)], [5], [6, 7]),
    "tried again": ([(5, NOW), (6, AHEAD), (5, NOW)], [5], [5]),
    "nothing": ([], [], []),
}


@pytest.mark.parametrize(("told", "made", "last"), STANDING.values(), ids=STANDING.keys())
def test_an_announcement_voids_what_was_foreseen_instead(
    told: list[tuple[int, bool]], made: list[int], last: list[int]
) -> None:
    """Its base is what was seen: what was told for that table_version or later was not made."""
    found_made, found_last = classify_intents(intents(*told))

    assert [e.detail["base"] for e in found_made] == made
    assert [e.detail["base"] for e in found_last] == last


# ---- on real tables -----------------------------------------------------------------------------


def migrations_of(*operations: Operation) -> list[Migration]:
    """Returns one migration."""
    return [Migration(table="t", version=1, operations=operations)]


async def announced(path: Path) -> list[tuple[int, bool]]:
    """Returns base of each announcement in the journal, and whether it was foreseen."""
    connection = await lancedb.connect_async(path)
    journal = await (await connection.open_table("table_migrations_history")).query().to_arrow()
    told = [
        (row["epoch"], row["seq"], json.loads(row["detail"]))
        for row in journal.to_pylist()
        if row["kind"] == Kind.INTENDED
    ]
    return [(d["base"], d.get("foreseen", False)) for _, _, d in sorted(told, key=lambda t: t[:2])]


async def test_four_commits_are_one_commit_of_the_journal(tmp_path: Path) -> None:
    """They are told with the first; the table ends as it would have one by one."""
    await make(tmp_path, T, ROWS, table="t")
    _, version = await found(tmp_path, "t")
    async with manager(tmp_path, migrations_of(*SOFT_DELETE)) as running:
        report = await running.upgrade()

    assert await announced(tmp_path) == [(version + n, n > 0) for n in range(4)]
    assert report.steps[0].commits == 4
    assert await rows_of(tmp_path, "t") == [{**row, "gone": 0} for row in ROWS]


@pytest.mark.parametrize("verb", ["update", "alter_columns", "create_index"])
async def test_what_others_commit_among_them_is_told_anew(tmp_path: Path, verb: str) -> None:
    """After a commit of theirs the next of ours is announced again, and says that it saw it.

    It came before an update, which LanceDB puts on top of it, or before a change of the schema,
    which it refuses then, so that it is made again.
    """
    await make(tmp_path, T, ROWS, table="t")
    theirs = await (await lancedb.connect_async(tmp_path)).open_table("t")

    async def write(seen: str, table: str) -> None:
        if (seen, table) == (verb, "t") and not others:
            await theirs.checkout_latest()
            await theirs.add([{"id": 3, "x": 3, "y": "c", "gone": 3}])
            others.append(await theirs.version())

    others: list[int] = []
    _, version = await found(tmp_path, "t")
    kind = watched_manager(before=write)
    async with kind(
        tmp_path, migrations=migrations_of(*SOFT_DELETE), logger=quiet_logger()
    ) as running:
        await running.upgrade()

    told = await announced(tmp_path)
    assert told[:4] == [(version + n, n > 0) for n in range(4)]
    assert told[4] == (others[0] + 1, False)
    assert [row["gone"] for row in await rows_of(tmp_path, "t")] == [0, 0, 3]


async def deaths(folder: Path) -> AsyncIterator[Path]:
    """Yields databases whose soft delete died after each of its commits, wherever they went."""
    for at in itertools.count(1):
        path = folder / str(at)
        await make(path, T, ROWS, table="t")
        other = Migration(table="other", version=1, operations=[op.CreateTable(T)])
        async with manager(path, [other]) as running:
            await running.upgrade()
        if not await dies(path, migrations_of(*SOFT_DELETE), dying_manager(at, "after")):
            return
        yield path


async def is_recorded(path: Path) -> bool:
    """Returns whether the migration is in the journal as applied."""
    async with manager(path, migrations_of(*SOFT_DELETE)) as running:
        return any(e.kind == Kind.APPLIED for e in await running.history("t"))


async def test_a_corrected_script_begins_where_it_was_whichever_were_made(tmp_path: Path) -> None:
    """Dead after any of the commits: each is known for ours, and all of them are undone."""
    corrected = migrations_of(op.AddColumns({"gone": pa.string()}), op.CreateIndex("id"))
    changed = 0
    async for path in deaths(tmp_path):
        if await is_recorded(path):
            continue
        state, _ = await found(path, "t")
        changed += state is not None and state.has("gone")
        async with manager(path, corrected) as running:
            await running.upgrade()
            assert (await running.validate()).valid
        assert await rows_of(path, "t") == [{**row, "gone": None} for row in ROWS]
    assert changed >= 4


async def test_what_others_commit_in_the_place_of_ours_is_kept(tmp_path: Path) -> None:
    """A commit of theirs at a table_version that was foreseen for ours is not taken for ours."""
    theirs = {"id": 9, "x": 9, "y": "z", "gone": 9}
    kept = 0
    async for path in deaths(tmp_path):
        state, _ = await found(path, "t")
        if state is None or not state.has("gone") or state.indexes:
            continue
        kept += 1
        connection = await lancedb.connect_async(path)
        await (await connection.open_table("t")).add([theirs])
        async with manager(path, migrations_of(op.CreateIndex("y"))) as running:
            with pytest.raises(MigrationFailedError, match="other writers committed"):
                await running.upgrade()
        assert theirs in await rows_of(path, "t")
    assert kept >= 3


def test_every_member_of_a_target_is_predicted_or_listed_as_unpredicted() -> None:
    """A new primitive of `Target` must be decided on: else it would quietly end predictions."""
    members = {name for name in vars(Target) if not name.startswith("_")}
    predicted = {name for name in vars(_PredictedTable) if not name.startswith("_")}

    assert predicted | {"state", "witness"} | UNPREDICTED == members
    assert predicted.isdisjoint(UNPREDICTED)
    with pytest.raises(AttributeError, match="unheard_of"):
        _ = _PredictedTable(None, "w").unheard_of
