"""Going back discards no commit that is not ours, and ours are told from others'."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiomigrate.commits.commit_identity import foreign_commits, matches_announcement
from aiomigrate.commits.effects import add_effect, digest, insert_effect, merge_effect, shape_effect
from aiomigrate.commits.savepoints import (
    branch_name,
    drop_branch,
    restore_fenced,
    restore_overwritten,
    vacate,
)
from aiomigrate.errors import LeaseLostError, StoreError, UnresolvedError
from aiomigrate.migration.model import Script
from aiomigrate.schema.state import Index, TableState
from aiomigrate.store.commit_log import Commit
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Table

T = TypeVar("T")
Effect = Mapping[str, Any]
Act = Callable[[Table], Awaitable[Any]]

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64()),
        pa.field("n", pa.int64()),
        pa.field("a", pa.string()),
        pa.field("b", pa.string()),
    ]
)
SCRIPT = Script(
    line="t", version=7, description="", operations=(), touches=("t",), depends_on={},
    checksum="", table="t",
)  # fmt: skip
SAVEPOINT = 3
"""The table_version of the tables made here."""


def rows(*ids: int) -> pa.Table:
    """Returns rows of `SCHEMA`."""
    columns: dict[str, Any] = {"id": list(ids), "n": [10 * i for i in ids]}
    columns |= {"a": [f"a{i}" for i in ids], "b": [f"b 名 '{i}'" for i in ids]}
    return pa.table(columns, schema=SCHEMA)


async def made(path: Path, store_type: type[Store] = Store) -> tuple[Store, Table]:
    """Makes table `t` of two fragments, at version 3."""
    store = await store_type.connect(str(path))
    table = await store.create("t", SCHEMA)
    await table.add(rows(1, 2, 3))
    assert await table.add(rows(4, 5)) == SAVEPOINT
    return store, table


async def another(path: Path) -> Table:
    """Opens the table as an application does: through its own connection."""
    return await (await Store.connect(str(path))).open("t")


async def ids(table: Table) -> list[int]:
    """Returns the ids of all rows of a handle's version, sorted."""
    return sorted((await table.read())["id"].to_pylist())


async def safe() -> None:
    """Finds the lease safely ours."""


# ---- fenced restores ----------------------------------------------------------------------------


class ScriptedStore(Store):
    """Lets a test act before the n-th restore; counts them."""

    restores = 0
    acts: Mapping[int, Callable[[], Awaitable[Any]]] = {}

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
    ) -> T:
        if verb == "restore":
            self.restores += 1
            if self.restores in self.acts:
                await self.acts[self.restores]()
        return await super().call(verb, table, run, mutates=mutates)


async def changed(path: Path) -> tuple[ScriptedStore, Table]:
    """Makes the table, and a commit of ours since the savepoint: version 4, rows 1 to 6."""
    store, table = await made(path, ScriptedStore)
    assert isinstance(store, ScriptedStore)
    assert await table.add(rows(6)) == 4
    return store, table


async def go_back(store: Store, guard: Callable[[], Awaitable[None]] = safe) -> int:
    """Returns the table to its savepoint."""
    return await restore_fenced(store, "t", to=SAVEPOINT, head=4, guard=guard, script=SCRIPT)


async def test_an_undisturbed_restore_is_the_savepoint_again(tmp_path: Path) -> None:
    """One commit, equal to the savepoint in rows and schema."""
    store, _ = await changed(tmp_path / "db")
    version = await go_back(store)
    now = await store.open("t")

    assert version == 5
    assert await now.version() == 5
    assert await ids(now) == [1, 2, 3, 4, 5]


async def test_a_restore_refuses_a_head_that_has_moved(tmp_path: Path) -> None:
    """Nothing is written, and the error names the versions that would have been discarded."""
    store, _ = await changed(tmp_path / "db")
    other = await another(tmp_path / "db")
    await other.add(rows(90))
    await other.add(rows(91))
    with pytest.raises(UnresolvedError) as caught:
        await go_back(store)

    assert "(table_version 5 to 6)" in caught.value.what
    assert "since savepoint 3" in caught.value.what
    assert "aiomigrate stamp --table t --to 6" in caught.value.remedy
    assert "table.restore(3)" in caught.value.remedy
    assert (caught.value.line, caught.value.version) == ("t", 7)
    assert store.restores == 0
    assert await ids(await store.open("t")) == [1, 2, 3, 4, 5, 6, 90, 91]


async def test_a_restore_refuses_without_the_lease(tmp_path: Path) -> None:
    """The guard is asked after the look and before the restore; what it raises stops it."""
    store, _ = await changed(tmp_path / "db")

    async def lost() -> None:
        raise LeaseLostError("The lease was lost.", "Run again.")

    with pytest.raises(LeaseLostError):
        await go_back(store, lost)

    assert store.restores == 0
    assert await (await store.open("t")).version() == 4


@pytest.mark.parametrize(("count", "named"), [(1, "5"), (3, "5 to 7")])
async def test_commits_between_look_and_restore_are_brought_back(
    tmp_path: Path, count: int, named: str
) -> None:
    """Our restore covered them: it is undone, nothing is lost, and the error names them."""
    store, _ = await changed(tmp_path / "db")
    other = await another(tmp_path / "db")

    async def crossed() -> None:
        for number in range(count):
            await other.add(rows(90 + number))

    with pytest.raises(UnresolvedError) as caught:
        await go_back(store, crossed)

    assert f"(table_version {named})" in caught.value.what
    assert "aiomigrate stamp" in caught.value.remedy
    assert store.restores == 2
    foreign = [90 + number for number in range(count)]
    assert await ids(await store.open("t")) == [1, 2, 3, 4, 5, 6, *foreign]


@pytest.mark.parametrize(
    "act",
    [
        lambda t: t.update(values={"a": "theirs"}, where="id = 1"),
        lambda t: t.delete("id = 2"),
        lambda t: t.merge("id", rows(1, 90)),
        lambda t: t.add_columns([pa.field("theirs", pa.string())]),
        lambda t: t.drop_columns(["b"]),
        lambda t: t.create_index(Index("BTree", ("id",), "id_idx"), {}),
    ],
    ids=["update", "delete", "merge", "add_columns", "drop_columns", "create_index"],
)
async def test_a_commit_of_any_kind_is_brought_back(tmp_path: Path, act: Act) -> None:
    """Rows, schema and indexes are as the other left them."""
    store, _ = await changed(tmp_path / "db")
    other = await another(tmp_path / "db")

    async def crossed() -> None:
        await act(other)

    with pytest.raises(UnresolvedError, match=r"\(table_version 5\)"):
        await go_back(store, crossed)

    now = await store.open("t")
    theirs = await now.at(5)
    assert await now.read() == await theirs.read()
    assert (await now.state()).shape() == (await theirs.state()).shape()


async def crossed_twice(path: Path) -> tuple[ScriptedStore, UnresolvedError]:
    """Lets others commit before our restore (version 5) and before its undoing (version 7)."""
    store, _ = await changed(path)
    other = await another(path)

    async def append(number: int) -> None:
        await other.refresh()
        await other.add(rows(number))

    store.acts = {1: lambda: append(90), 2: lambda: append(91)}
    with pytest.raises(UnresolvedError) as caught:
        await go_back(store)
    return store, caught.value


async def test_commits_on_both_sides_of_a_restore_stop_it_and_are_kept(tmp_path: Path) -> None:
    """No third restore is tried; the first commit is in the head, the second is named."""
    store, error = await crossed_twice(tmp_path / "db")
    now = await store.open("t")

    assert store.restores == 2
    assert await now.version() == 8
    assert await ids(now) == [1, 2, 3, 4, 5, 6, 90]
    assert await ids(await now.at(7)) == [1, 2, 3, 4, 5, 91]
    assert "its head 8 holds their table_versions 5 to 5" in error.what
    assert "but not 7 to 7" in error.what
    assert "table.checkout(7)" in error.remedy
    assert "aiomigrate stamp --table t --to 6" in error.remedy


async def test_commits_on_both_sides_of_a_restore_are_both_named(tmp_path: Path) -> None:
    """The first commit is in the head, but above a half-done migration: it is named too."""
    _, error = await crossed_twice(tmp_path / "db")

    assert re.search(r"\b5\b", error.what)


# ---- was that commit ours? ----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A commit that was announced, and another that may be found in its place.

    Attributes:
        announced: Returns the effect, given the table before the commit and one after it.
        ours: Makes the commit.
        theirs: Makes a commit of the same kind that is not it.
    """

    announced: Callable[[Table, Table], Awaitable[Effect]]
    ours: Act
    theirs: Act


def fixed(effect: Effect) -> Callable[[Table, Table], Awaitable[Effect]]:
    """Announces what is known beforehand."""

    async def announced(before: Table, after: Table) -> Effect:
        return effect

    return announced


async def shape_after(before: Table, after: Table) -> Effect:
    """Announces the shape the commit leads to."""
    return shape_effect(await after.state())


INDEX = Index("BTree", ("id",), "id_idx")
UPDATE = {"do": "update", "sql": {"a": "'x'", "n": "n + 1"}, "where": "id > 1"}
MERGED = rows(2, 5, 8, 9).set_column(1, SCHEMA.field("n"), pa.array([0, None, 1, 2], pa.int64()))

CASES = {
    "add a column": Case(
        shape_after,
        lambda t: t.add_columns([pa.field("more", pa.string())]),
        lambda t: t.add_columns([pa.field("more", pa.int64())]),
    ),
    "drop a column": Case(
        shape_after, lambda t: t.drop_columns(["a"]), lambda t: t.drop_columns(["b"])
    ),
    "rename a column": Case(
        shape_after,
        lambda t: t.alter_columns([{"path": "a", "rename": "c"}]),
        lambda t: t.alter_columns([{"path": "b", "rename": "c"}]),
    ),
    "tighten a column": Case(
        shape_after,
        lambda t: t.alter_columns([{"path": "a", "nullable": False}]),
        lambda t: t.alter_columns([{"path": "b", "nullable": False}]),
    ),
    "index": Case(
        shape_after,
        lambda t: t.create_index(INDEX, {}),
        lambda t: t.create_index(Index("Bitmap", ("id",), "id_idx"), {}),
    ),
    "add": Case(
        fixed(add_effect(rows(7, 8))), lambda t: t.add(rows(7, 8)), lambda t: t.add(rows(7, 9))
    ),
    "add out of order": Case(
        fixed(add_effect(rows(7, 8))), lambda t: t.add(rows(7, 8)), lambda t: t.add(rows(8, 7))
    ),
    "update": Case(
        fixed(UPDATE),
        lambda t: t.update(values={"a": "x"}, sql={"n": "n + 1"}, where="id > 1"),
        lambda t: t.update(values={"a": "x"}, sql={"n": "n + 1"}, where="id > 2"),
    ),
    "delete": Case(
        fixed({"do": "delete", "where": "id = 2"}),
        lambda t: t.delete("id = 2"),
        lambda t: t.delete("id = 3"),
    ),
    "merge": Case(
        fixed(merge_effect("id", MERGED)),
        lambda t: t.merge("id", MERGED),
        lambda t: t.merge("id", rows(2, 5, 8, 9)),
    ),
    "restore": Case(
        fixed({"do": "restore", "to": 2}), lambda t: t.restore(2), lambda t: t.restore(1)
    ),
}


async def judged(path: Path, case: Case, act: Act) -> bool:
    """Returns whether a commit is taken for the announced one; no branch may be left."""
    _, sample = await made(path / "sample")
    before = await sample.at(SAVEPOINT)
    await case.ours(sample)
    effect = await case.announced(before, sample)
    store, table = await made(path / "db")
    await act(table)
    ours = await matches_announcement(store, "t", SAVEPOINT, effect)

    now = await store.open("t")
    assert await now.branches() == []
    assert await now.version() == SAVEPOINT + 1, "judging changed the table"
    return ours


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_an_announced_commit_is_known_again(tmp_path: Path, case: Case) -> None:
    """Of every kind: what was announced before a crash and was made is ours."""
    assert await judged(tmp_path, case, case.ours)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_another_commit_of_the_same_kind_is_not_ours(tmp_path: Path, case: Case) -> None:
    """However similar it is to what was announced."""
    assert not await judged(tmp_path, case, case.theirs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_an_append_of_someone_else_is_not_ours(tmp_path: Path, case: Case) -> None:
    """Whatever was announced: the most common commit of an application is never taken for it."""
    assert not await judged(tmp_path, case, lambda t: t.add(rows(99)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_a_commit_that_was_not_made_is_not_ours(tmp_path: Path, case: Case) -> None:
    """Announced and never made: there is no commit to be ours."""
    _, sample = await made(tmp_path / "sample")
    before = await sample.at(SAVEPOINT)
    await case.ours(sample)
    effect = await case.announced(before, sample)
    store, _ = await made(tmp_path / "db")

    assert not await matches_announcement(store, "t", SAVEPOINT, effect)


async def test_a_created_table_is_ours_where_there_was_none(tmp_path: Path) -> None:
    """A create is known by its being the first version; it is not where there was a table."""
    store, _ = await made(tmp_path / "db")
    create = {"do": "create"}

    assert await matches_announcement(store, "t", 0, create)
    assert not await matches_announcement(store, "t", 1, create)
    assert not await matches_announcement(store, "absent", 0, create)


async def test_an_update_is_not_ours_where_the_shape_was_to_stay(tmp_path: Path) -> None:
    """Building an index anew leaves the shape alike: the rows tell who committed."""
    store, table = await made(tmp_path / "db")
    await table.create_index(INDEX, {})
    effect = shape_effect(await table.state())
    await table.create_index(INDEX, {})
    await table.update(values={"a": "theirs"}, where="id = 1")

    assert await matches_announcement(store, "t", SAVEPOINT + 1, effect)
    assert not await matches_announcement(store, "t", SAVEPOINT + 2, effect)


async def test_an_unknown_effect_is_not_ours(tmp_path: Path) -> None:
    """What a newer release announced is left to a person, and no branch stays."""
    store, table = await made(tmp_path / "db")
    await table.delete("id = 1")

    assert not await matches_announcement(store, "t", SAVEPOINT, {"do": "explode"})
    assert await table.branches() == []


async def test_a_large_merge_is_known_again(tmp_path: Path) -> None:
    """Replaying puts a thousand rows, updated and inserted, where the commit put them."""
    store, table = await made(tmp_path / "db")
    await table.add(rows(*range(10, 1000)))
    data = rows(*range(1500, 500, -1))
    base = await table.version()
    await table.merge("id", data)

    assert await matches_announcement(store, "t", base, merge_effect("id", data))


async def test_a_swap_of_columns_is_known_again(tmp_path: Path) -> None:
    """Two columns that exchange their names in one commit are ours too."""
    swap = [{"path": "a", "rename": "b"}, {"path": "b", "rename": "a"}]

    async def announced(before: Table, after: Table) -> Effect:
        return shape_effect(await after.state(), renames={"a": "b", "b": "a"})

    case = Case(announced, lambda t: t.alter_columns(swap), lambda t: t.add(rows(9)))

    assert await judged(tmp_path, case, case.ours)


FOREIGN_SHAPES: dict[str, tuple[Effect, Act]] = {
    "update over a dropped column": (
        {"do": "update", "sql": {"n": "0"}, "where": None},
        lambda t: t.drop_columns(["n"]),
    ),
    "update of nothing": (
        {"do": "update", "sql": {"n": "0"}, "where": "id = 99"},
        lambda t: t.handle.add_columns({"theirs": "n * 2"}),
    ),
    "delete of nothing": (
        {"do": "delete", "where": "id = 99"},
        lambda t: t.handle.add_columns({"theirs": "n * 2"}),
    ),
    "merge of the same": (
        merge_effect("id", rows(1, 2, 3, 4, 5)),
        lambda t: t.handle.add_columns({"theirs": "n * 2"}),
    ),
    "restore of the same": (
        {"do": "restore", "to": SAVEPOINT},
        lambda t: t.handle.add_columns({"theirs": "n * 2"}),
    ),
}


@pytest.mark.parametrize("kind", FOREIGN_SHAPES)
async def test_a_change_of_columns_by_someone_else_is_not_ours(tmp_path: Path, kind: str) -> None:
    """A commit that changed no common row, but the schema, is not what was announced."""
    effect, act = FOREIGN_SHAPES[kind]
    case = Case(fixed(effect), lambda t: t.delete("id = 99"), act)

    assert not await judged(tmp_path, case, case.theirs)


# ---- branches -----------------------------------------------------------------------------------


class InterruptedStore(Store):
    """Fails, or cancels a scope, at one verb."""

    verb = ""
    scope: anyio.CancelScope | None = None

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
    ) -> T:
        if verb == self.verb and self.scope is None:
            raise StoreError("connection reset", "Try again.")
        if verb == self.verb and self.scope is not None:
            self.scope.cancel()
        return await super().call(verb, table, run, mutates=mutates)


async def interrupted(path: Path) -> tuple[InterruptedStore, Table]:
    """Makes the table and a commit of ours: version 4, without row 2."""
    store, table = await made(path, InterruptedStore)
    assert isinstance(store, InterruptedStore)
    await table.delete("id = 2")
    return store, table


DELETE = {"do": "delete", "where": "id = 2"}


async def test_a_replay_that_fails_leaves_no_branch(tmp_path: Path) -> None:
    """A replay that LanceDB refuses tells nothing, so the commit is not ours; it cleans up."""
    store, table = await interrupted(tmp_path / "db")
    store.verb = "delete"
    ours = await matches_announcement(store, "t", SAVEPOINT, DELETE)

    assert not ours
    assert await table.branches() == []


async def test_a_branch_that_a_killed_replay_left_does_not_stop_the_next(tmp_path: Path) -> None:
    """It is replaced, and removed in the end."""
    store, table = await interrupted(tmp_path / "db")
    store.verb = "delete_branch"
    assert not await matches_announcement(store, "t", SAVEPOINT, DELETE)
    left = await table.branches()
    store.verb = ""
    ours = await matches_announcement(store, "t", SAVEPOINT, DELETE)

    assert len(left) == 1
    assert ours
    assert await table.branches() == []


@pytest.mark.parametrize(
    "verb",
    ["create_branch", "delete", "count_rows"],
)
async def test_a_cancelled_replay_leaves_no_branch(tmp_path: Path, verb: str) -> None:
    """Cancelled at any call while the branch exists."""
    store, table = await interrupted(tmp_path / "db")
    store.verb = verb
    with anyio.CancelScope() as store.scope:
        await matches_announcement(store, "t", SAVEPOINT, DELETE)

    assert store.scope.cancelled_caught
    assert await table.branches() == []


async def test_a_savepoint_branch_is_dropped_once_and_its_absence_is_no_error(
    tmp_path: Path,
) -> None:
    """The next holder may find the branch gone, or the table."""
    store, table = await made(tmp_path / "db")
    name = branch_name(3, "0a1b", SCRIPT)
    await table.create_branch(name, SAVEPOINT)
    await table.create_branch("someone-elses", SAVEPOINT)
    for _ in range(2):
        await drop_branch(store, "t", name)
    await drop_branch(store, "absent", name)

    assert await table.branches() == ["someone-elses"]


async def test_a_branch_that_another_dropped_first_is_no_error(tmp_path: Path) -> None:
    """Two holders, one of them paused, may both want it gone."""

    class Outrun(Store):
        async def call(
            self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
        ) -> T:
            if verb == "delete_branch":
                await (await another(tmp_path / "db")).delete_branch("mine")
            return await super().call(verb, table, run, mutates=mutates)

    store, table = await made(tmp_path / "db", Outrun)
    await table.create_branch("mine", SAVEPOINT)
    await drop_branch(store, "t", "mine")

    assert await table.branches() == []


def test_a_branch_name_is_never_used_twice() -> None:
    """Epoch, owner and version are in it: another holder's differs, and LanceDB allows it."""
    names = {branch_name(epoch, owner, SCRIPT) for epoch in (1, 11) for owner in ("1", "11")}

    assert len(names) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


# ---- digests ------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "int": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "float": (pa.float64(), st.floats()),
    "half": (pa.float16(), st.floats(width=16)),
    "text": (pa.string(), st.text(max_size=5)),
    "bytes": (pa.binary(), st.binary(max_size=5)),
    "bool": (pa.bool_(), st.booleans()),
    "list": (pa.list_(pa.float32()), st.lists(st.floats(width=32), max_size=3)),
    "vector": (pa.list_(pa.float32(), 3), st.lists(st.floats(width=32), min_size=3, max_size=3)),
    "ids": (pa.list_(pa.int32(), 2), st.lists(st.integers(0, 9), min_size=2, max_size=2)),
    "struct": (pa.struct([("x", pa.int8())]), st.fixed_dictionaries({"x": st.integers(0, 9)})),
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, list[int]]:
    """Draws rows of several types, with and without NULL, and where to cut them."""
    names = draw(st.lists(st.sampled_from(sorted(COLUMNS)), min_size=1, max_size=4, unique=True))
    length = draw(st.integers(0, 8))
    columns = {}
    for name in names:
        kind, values = COLUMNS[name]
        values = values | st.none() if draw(st.booleans()) else values
        columns[name] = pa.array(draw(st.lists(values, min_size=length, max_size=length)), kind)
    cuts = draw(st.lists(st.integers(0, length), max_size=4))
    return pa.table(columns), sorted(cuts)


def cut(data: pa.Table, cuts: list[int]) -> pa.Table:
    """Returns the same rows in chunks that are slices of the first ones, some empty."""
    edges = [0, *cuts, len(data)]
    slices = [data.slice(a, b - a) for a, b in itertools.pairwise(edges)]
    return pa.concat_tables(slices)


def copied(data: pa.Table) -> pa.Table:
    """Returns the same rows after a journey through bytes, as a merge makes it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.schema) as stream:
        stream.write_table(data)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


@given(drawn=tables())
def test_a_digest_does_not_depend_on_chunks(drawn: tuple[pa.Table, list[int]]) -> None:
    """The same rows in one piece, in slices, copied, or cut out of a larger table hash alike."""
    data, cuts = drawn
    expected = digest(data)
    longer = pa.concat_tables([data, data, data]).combine_chunks()

    assert digest(cut(data, cuts)) == expected
    assert digest(data.combine_chunks()) == expected
    assert digest(copied(cut(data, cuts))) == expected
    assert digest(longer.slice(len(data), len(data))) == expected


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        if math.isnan(one) or math.isnan(other):
            return math.isnan(one) and math.isnan(other)
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


@given(name=st.sampled_from(sorted(COLUMNS)), choice=st.data())
def test_a_digest_tells_different_rows_apart(name: str, choice: st.DataObject) -> None:
    """One other value, a NULL, another order, name or number of rows: another digest."""
    kind, values = COLUMNS[name]
    drawn = choice.draw(st.lists(values | st.none(), min_size=1, max_size=4))
    data = pa.table({name: pa.array(drawn, kind)})
    at = choice.draw(st.integers(0, len(drawn) - 1))
    changed_row = [*drawn[:at], choice.draw(values | st.none()), *drawn[at + 1 :]]
    other = pa.table({name: pa.array(changed_row, kind)})

    if not _same(drawn[at], changed_row[at]):
        assert digest(other) != digest(data)
    assert digest(data.rename_columns(["other"])) != digest(data)
    assert digest(pa.concat_tables([data, data])) != digest(data)
    assert digest(data.slice(1)) != digest(data)


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        (pa.float64(), [math.nan], [None]),
        (pa.list_(pa.float32(), 2), [[1, math.nan]], [[1, None]]),
        (pa.list_(pa.float32(), 2), [[1, 2], None], [None, [1, 2]]),
        (pa.list_(pa.int32(), 2), [[1, 2], None], [None, [1, 2]]),
        (pa.string(), ["None"], [None]),
        (pa.string(), ["a", "b"], ["a', 'b", None]),
    ],
)
def test_a_digest_tells_null_from_what_looks_like_it(
    kind: pa.DataType, one: list[Any], other: list[Any]
) -> None:
    """NULL is no NaN and no text, and it counts where it stands."""
    assert digest(pa.table({"x": pa.array(one, kind)})) != digest(
        pa.table({"x": pa.array(other, kind)})
    )


# ---- tables that were made, overwritten or optimized ---------------------------------------------


async def test_a_table_is_not_emptied_without_the_lease(tmp_path: Path) -> None:
    """The guard is asked before the commit that takes a created table away, and stops it."""
    store, _ = await made(tmp_path / "db")

    async def lost() -> None:
        raise LeaseLostError("The lease was lost.", "Run again.")

    with pytest.raises(LeaseLostError):
        await vacate(store, "t", head=SAVEPOINT, guard=lost, script=SCRIPT)

    now = await store.open("t")
    assert await now.version() == SAVEPOINT
    assert await ids(now) == [1, 2, 3, 4, 5]


async def test_a_table_that_was_emptied_again_is_not_the_one_to_be_created(tmp_path: Path) -> None:
    """Where a create was announced, only a commit that leaves a table is that create."""
    store, _ = await made(tmp_path / "db")
    emptied = await vacate(store, "t", head=SAVEPOINT, guard=safe, script=SCRIPT)
    again = await vacate(store, "t", head=emptied, guard=safe, script=SCRIPT)
    await store.create("t", SCHEMA, overwrite=True)

    assert not await matches_announcement(store, "t", emptied, {"do": "create"})
    assert await matches_announcement(store, "t", again, {"do": "create"})


async def test_what_an_overwrite_covered_is_brought_back_once(tmp_path: Path) -> None:
    """A crash before or after the restore: the first look restores, the next does nothing."""
    store, table = await changed(tmp_path / "db")  # here row 6 is of another writer
    schema = pa.schema([*SCHEMA, pa.field("witness", pa.bool_())])
    await store.create("t", schema, overwrite=True)
    versions = []
    for _ in range(2):
        await restore_overwritten(
            store, "t", base=SAVEPOINT, witness="witness", guard=safe, script=SCRIPT
        )
        versions.append(await (await store.open("t")).version())

    await table.refresh()
    assert versions == [6, 6]
    assert await ids(table) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("rows_at_5", [10, 11])
def test_a_commit_that_changed_the_number_of_rows_was_not_made_by_an_optimization(
    rows_at_5: int,
) -> None:
    """However alike schema, indexes and files are: it is named as another writer's."""
    state = TableState(SCHEMA)
    found = [
        Commit(version=version, rows=count, files=("a",), state=state)
        for version, count in [(4, 10), (5, rows_at_5), (6, rows_at_5)]
    ]

    foreign = foreign_commits(found, before=4, after=6, compacted=False)

    assert foreign == ([] if rows_at_5 == 10 else [5])


NO_INSERT: dict[str, Act] = {
    "update": lambda t: t.update(values={"a": "theirs"}, where="id = 1"),
    "delete": lambda t: t.delete("id = 2"),
    "merge": lambda t: t.merge("id", MERGED.slice(0, 1)),
    "add a column": lambda t: t.add_columns([pa.field("theirs", pa.string())]),
    "drop a column": lambda t: t.drop_columns(["n"]),
}


@pytest.mark.parametrize("act", NO_INSERT.values(), ids=NO_INSERT)
async def test_a_commit_that_inserts_nothing_is_not_an_announced_insert(
    tmp_path: Path, act: Act
) -> None:
    """An insert leaves rows and columns as they were: what changes one of them is not ours."""
    case = Case(fixed(insert_effect(rows(7, 8))), lambda t: t.insert_new("id", rows(7, 8)), act)

    assert await judged(tmp_path / "ours", case, case.ours)
    assert not await judged(tmp_path / "theirs", case, case.theirs)
