"""The port: every LanceDB error by its name, no mutation abandoned silently, text kept as it is."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiomigrate.errors import (
    AiomigrateError,
    CastRefusedError,
    ColumnNotNullableError,
    CommitConflictError,
    StaleHandleError,
    StoreError,
    TableExistsError,
    TableNotFoundError,
    TableVersionGoneError,
    WriterCongestionError,
)
from aiomigrate.schema.sql import Statement, sql_literal
from aiomigrate.store.calls import _CONFLICTS
from aiomigrate.store.connection import SqlCheck, Store
from aiomigrate.store.table import Table

T = TypeVar("T")

SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("text", pa.string())])
STRICT = pa.schema([pa.field("id", pa.int64(), nullable=False)])

CONGESTION = (
    "lance error: Too many concurrent writers. Attempted 5 times, but failed on retry_timeout of "
    "30.000 seconds., /root/.cargo/registry/src/index.crates.io-1949cf8c6b5b557f/"
    "lance-13.0.0/src/io/commit.rs:128:5"
)
"""As measured with 256 writers, and too slow to provoke here (facts: primitives)."""

ODD = [
    "",
    " ",
    "'",
    "''",
    "it's",
    '"',
    "\\",
    "\\'",
    "a\\nb",
    "a\nb\r\n\tc",
    "-- no comment",
    "/* nor */ this",
    "; DROP TABLE t",
    "%_?*",
    "$1 :name {x}",
    "NULL",
    "\x00zero",
    "\u200b\ufeff",
    "n\u0303 is not ñ",
    "名前 🧑‍🚀",
    "x" * 5000,
]


def rows(*ids: int, text: str | None = "x") -> pa.Table:
    """Returns rows of `SCHEMA`."""
    return pa.table({"id": list(ids), "text": [text] * len(ids)}, schema=SCHEMA)


async def made(path: Path, store_type: type[Store] = Store, **options: Any) -> tuple[Store, Table]:
    """Makes a database with an empty table `t`."""
    store = await store_type.connect(str(path), **options)
    return store, await store.create("t", SCHEMA)


# ---- errors -------------------------------------------------------------------------------------


async def missing_table(store: Store, table: Table) -> None:
    """Opens what is not there."""
    await store.open("absent")


async def existing_table(store: Store, table: Table) -> None:
    """Creates what is there."""
    await store.create("t", SCHEMA)


async def preempted(store: Store, table: Table) -> None:
    """Adds a column through a handle from before another's append."""
    stale = await store.open("t")
    await table.add(rows(1))
    await stale.add_columns([pa.field("more", pa.string())])


async def overwritten(store: Store, table: Table) -> None:
    """Appends through a handle from before another's overwrite."""
    await store.connection.create_table("t", schema=SCHEMA, mode="overwrite")
    await table.add(rows(1))


async def version_never_made(store: Store, table: Table) -> None:
    """Opens a table_version above the latest."""
    await table.at(99)


async def restore_of_version_never_made(store: Store, table: Table) -> None:
    """Restores a table_version above the latest."""
    await table.restore(99)


async def _clean(table: Table) -> None:
    await table.add(rows(1))
    with pytest.warns(UserWarning, match="cleanup_older_than=0"):
        await table.handle.optimize(cleanup_older_than=dt.timedelta(0), delete_unverified=True)


async def cleaned_version(store: Store, table: Table) -> None:
    """Opens a table_version that a cleanup has removed."""
    await _clean(table)
    await table.at(1)


async def restore_of_cleaned_version(store: Store, table: Table) -> None:
    """Restores a table_version that a cleanup has removed."""
    await _clean(table)
    await table.restore(1)


async def not_null_over_nulls(store: Store, table: Table) -> None:
    """Makes a column NOT NULL that holds NULL."""
    await table.add(rows(1, text=None))
    await table.alter_columns([{"path": "text", "nullable": False}])


async def null_appended(store: Store, table: Table) -> None:
    """Appends NULL to a NOT NULL column, by a schema that allows it."""
    strict = await store.create("strict", STRICT)
    await strict.add(pa.table({"id": pa.array([None], pa.int64())}))


async def null_appended_under_a_false_schema(store: Store, table: Table) -> None:
    """Appends NULL under a schema that says there is none."""
    strict = await store.create("strict", STRICT)
    await strict.add(pa.Table.from_arrays([pa.array([None], pa.int64())], schema=STRICT))


async def null_merged(store: Store, table: Table) -> None:
    """Merges a NULL into a NOT NULL column."""
    strict = await store.create("strict", STRICT)
    await strict.merge("id", pa.table({"id": pa.array([None], pa.int64())}))


async def null_set(store: Store, table: Table) -> None:
    """Sets a NOT NULL column to NULL."""
    strict = await store.create("strict", STRICT)
    await strict.add(pa.table({"id": [1]}, schema=STRICT))
    await strict.update(values={"id": None})


async def congested(store: Store, table: Table) -> None:
    """Gives up like LanceDB beside too many writers."""

    async def give_up() -> None:
        raise RuntimeError(CONGESTION)

    await store.call("update", "t", give_up, mutates=True)


async def out_of_retries(store: Store, table: Table) -> None:
    """Gives up like LanceDB when every retry of its own lost (seen once, beside eight writers)."""

    async def give_up() -> None:
        raise RuntimeError(
            "lance error: Commit conflict for version 9: Failed to commit the transaction after "
            "20 retries."
        )

    await store.call("update", "t", give_up, mutates=True)


Provoke = Callable[[Store, Table], Awaitable[None]]


async def cast_to_what_it_cannot(_: Store, table: Table) -> None:
    """Retypes a text to a number."""
    await table.alter_columns([{"path": "text", "data_type": pa.int64()}])


PROVOKED: list[tuple[Provoke, type[StoreError]]] = [
    (missing_table, TableNotFoundError),
    (existing_table, TableExistsError),
    (preempted, CommitConflictError),
    (overwritten, StaleHandleError),
    (congested, WriterCongestionError),
    (out_of_retries, CommitConflictError),
    (version_never_made, TableVersionGoneError),
    (restore_of_version_never_made, TableVersionGoneError),
    (cleaned_version, TableVersionGoneError),
    (restore_of_cleaned_version, TableVersionGoneError),
    (not_null_over_nulls, ColumnNotNullableError),
    (null_appended, ColumnNotNullableError),
    (null_appended_under_a_false_schema, ColumnNotNullableError),
    (null_merged, ColumnNotNullableError),
    (null_set, ColumnNotNullableError),
    (cast_to_what_it_cannot, CastRefusedError),
]


@pytest.mark.parametrize(("provoke", "kind"), PROVOKED, ids=lambda p: getattr(p, "__name__", ""))
async def test_what_lancedb_says_in_words_is_an_error_with_a_name(
    tmp_path: Path, provoke: Provoke, kind: type[StoreError]
) -> None:
    """Each failure that LanceDB tells by its text alone has a class, a cause and a remedy."""
    store, table = await made(tmp_path / "db")
    with pytest.raises(StoreError) as caught:
        await provoke(store, table)

    error = caught.value
    assert type(error) is kind
    assert error.remedy == {kind: remedy for _, kind, remedy in _CONFLICTS}[kind]
    assert re.match(r"Could not \w+ on table '\w+': ", error.what)
    assert ".rs:" not in error.what
    assert "lance error" not in error.what
    assert isinstance(error.__cause__, (ValueError, RuntimeError))


def test_every_entry_of_the_error_map_is_provoked() -> None:
    """An entry nobody provokes may have outlived LanceDB's wording; a new one needs a case."""
    assert {kind for _, kind, _ in _CONFLICTS} == {kind for _, kind in PROVOKED}


REFUSED: list[tuple[str, Callable[[Store, Table], Awaitable[Any]]]] = [
    ("bad filter", lambda s, t: t.read("absent = 1")),
    ("bad SQL", lambda s, t: t.count_rows("(((")),
    ("bad cast", lambda s, t: t.read("CAST(text AS INT) > 0")),
    ("unknown column", lambda s, t: t.read(None, ["absent"])),
    ("wrong type", lambda s, t: t.add(pa.table({"id": ["x"]}))),
    ("wrong column", lambda s, t: t.add(pa.table({"absent": [1]}))),
    ("no literal", lambda s, t: t.update(values={"text": object()})),
    ("column to drop", lambda s, t: t.drop_columns(["absent"])),
    ("column to rename", lambda s, t: t.alter_columns([{"path": "absent", "rename": "b"}])),
    ("nameless alteration", lambda s, t: t.alter_columns([{"rename": "b"}])),
    ("column twice", lambda s, t: t.add_columns([SCHEMA.field("id")])),
    ("index to drop", lambda s, t: t.drop_index("absent")),
    ("merge key", lambda s, t: t.merge("absent", rows(1))),
    ("branch name", lambda s, t: t.create_branch("a b", 1)),
    ("branch to delete", lambda s, t: t.delete_branch("absent")),
    ("table name", lambda s, t: s.open("a/b")),
    ("second key", lambda s, t: t.set_primary_key("text")),
    (
        "Enterprise only",
        lambda s, t: s.call("rename", "t", lambda: s.connection.rename_table("t", "u")),
    ),
]


@pytest.mark.parametrize("refused", [r for _, r in REFUSED], ids=[name for name, _ in REFUSED])
async def test_what_else_lancedb_refuses_is_a_store_error(
    tmp_path: Path, refused: Callable[[Store, Table], Awaitable[Any]]
) -> None:
    """Nothing LanceDB raises at a call leaves the port as it is, nor under a wrong name."""
    store, table = await made(tmp_path / "db")
    await table.add(rows(1))
    with pytest.raises(AiomigrateError) as caught:
        await refused(store, table)

    assert type(caught.value) is StoreError
    assert caught.value.what.startswith("Could not ")
    assert caught.value.remedy


@pytest.mark.parametrize(
    "kind",
    [ValueError, RuntimeError, OSError, NotImplementedError, FileNotFoundError, TimeoutError,
     ConnectionResetError, pa.ArrowInvalid, pa.ArrowNotImplementedError],
)  # fmt: skip
@pytest.mark.parametrize("mutates", [True, False])
async def test_an_unknown_failure_of_any_kind_is_a_store_error(
    tmp_path: Path, kind: type[Exception], mutates: bool
) -> None:
    """Whatever the class of a failure and whatever the call, its text is kept, its kind mapped."""
    store = await Store.connect(str(tmp_path / "db"))

    async def fail() -> None:
        raise kind("the disk said no")

    with pytest.raises(StoreError) as caught:
        await store.call("add", "t", fail, mutates=mutates)

    assert type(caught.value) is StoreError
    assert caught.value.what == "Could not add on table 't': the disk said no."
    assert isinstance(caught.value.__cause__, kind)


async def test_a_database_that_cannot_be_connected_to_is_a_store_error() -> None:
    """Connecting is mapped too."""
    with pytest.raises(StoreError, match="Could not connect to abc://x/y: ") as caught:
        await Store.connect("abc://x/y")

    assert type(caught.value) is StoreError


async def test_no_secret_leaves_the_port(tmp_path: Path) -> None:
    """A failure whose text holds a secret is told without it, and without its cause."""
    connection = (await Store.connect(str(tmp_path / "db"))).connection
    store = Store(connection, uri="db", secrets=("hunter2",))

    async def fail() -> None:
        raise OSError("403 for key hunter2")

    with pytest.raises(StoreError) as caught:
        await store.call("open", "t", fail)

    assert caught.value.what == "Could not open on table 't': 403 for key ***."
    assert caught.value.__cause__ is None


async def test_a_failure_while_rows_stream_is_a_store_error(tmp_path: Path) -> None:
    """Batches read later than the call that asked for them are mapped too."""
    _, table = await made(tmp_path / "db")
    await table.add(rows(1))
    with pytest.raises(StoreError):
        [batch async for batch in table.batches("CAST(text AS INT) > 0", None, 10)]


# ---- mutations under cancellation ---------------------------------------------------------------


class GatedStore(Store):
    """Holds each mutation after it has begun until the gate opens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begun = anyio.Event()
        self.gate = anyio.Event()
        self.gate.set()
        self.failure: Exception | None = None

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
    ) -> T:
        async def gated() -> T:
            self.begun.set()
            await self.gate.wait()
            if self.failure is not None:
                raise self.failure
            return await run()

        return await super().call(verb, table, gated, mutates=mutates)

    def shut(self) -> None:
        """Holds what comes next."""
        self.begun = anyio.Event()
        self.gate = anyio.Event()


async def cancel_begun(store: GatedStore, act: Callable[[], Awaitable[Any]]) -> bool:
    """Cancels an action once it has begun, opens the gate; returns whether it was cancelled."""
    store.shut()
    ended = anyio.Event()
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await act()
        ended.set()

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await store.begun.wait()
        scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert not ended.is_set(), "it left its mutation behind"
        store.gate.set()
    return scope.cancelled_caught


MUTATIONS: list[tuple[str, Callable[[Table], Awaitable[Any]]]] = [
    ("add", lambda t: t.add(rows(2))),
    ("update", lambda t: t.update(values={"text": "y"})),
    ("delete", lambda t: t.delete("id = 1")),
    ("merge", lambda t: t.merge("id", rows(1, 2, text="z"))),
    ("add_columns", lambda t: t.add_columns([pa.field("more", pa.string())])),
    ("alter_columns", lambda t: t.alter_columns([{"path": "text", "rename": "word"}])),
    ("drop_columns", lambda t: t.drop_columns(["text"])),
    ("restore", lambda t: t.restore(1)),
]


@pytest.mark.parametrize("mutate", [m for _, m in MUTATIONS], ids=[name for name, _ in MUTATIONS])
async def test_a_cancelled_mutation_is_awaited_to_its_end_and_noted(
    tmp_path: Path, mutate: Callable[[Table], Awaitable[Any]]
) -> None:
    """Its caller is cancelled only once the commit is made and its table_version is known."""
    store, table = await made(tmp_path / "db", GatedStore)
    assert isinstance(store, GatedStore)
    await table.add(rows(1))
    noted: list[int] = []
    table.on_commit = noted.append
    cancelled = await cancel_begun(store, lambda: mutate(table))

    assert cancelled
    assert noted == [3]
    assert await (await store.open("t")).version() == 3
    assert not store.abandoned


async def test_a_mutation_begun_under_cancellation_is_noted_as_well(tmp_path: Path) -> None:
    """What was committed and what was noted agree, even where cancellation came first."""
    store, table = await made(tmp_path / "db")
    noted: list[int] = []
    table.on_commit = noted.append
    with anyio.CancelScope() as scope:
        scope.cancel()
        await table.add(rows(1))

    assert scope.cancelled_caught
    assert noted == list(range(2, await (await store.open("t")).version() + 1))
    assert not store.abandoned


async def test_a_failure_under_cancellation_is_a_cancellation(tmp_path: Path) -> None:
    """Cancellation is not turned into an error, and what failed is not called unresolved."""
    store, table = await made(tmp_path / "db", GatedStore)
    assert isinstance(store, GatedStore)
    store.failure = RuntimeError("refused")
    cancelled = await cancel_begun(store, lambda: table.add(rows(1)))

    assert cancelled
    assert not store.abandoned


async def test_a_mutation_that_does_not_end_is_abandoned_and_said_to_be_unresolved(
    tmp_path: Path,
) -> None:
    """After the grace time, and not before, cancellation goes through and no task is left."""
    grace_s = 0.1
    store, table = await made(tmp_path / "db", GatedStore, grace_s=grace_s)
    assert isinstance(store, GatedStore)
    tasks = asyncio.all_tasks()
    store.shut()
    noted: list[int] = []
    table.on_commit = noted.append
    with anyio.fail_after(5), anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(table.add, rows(1))
            await store.begun.wait()
            begun = anyio.current_time()
            scope.cancel()
    took = anyio.current_time() - begun

    assert scope.cancelled_caught
    assert grace_s <= took < grace_s + 1
    assert store.abandoned
    assert noted == []
    assert asyncio.all_tasks() == tasks


async def test_a_mutation_within_another_is_part_of_it(tmp_path: Path) -> None:
    """It goes on in the same task, and is abandoned with the whole, under the name of that."""
    store, table = await made(tmp_path / "db", grace_s=0.1)
    tasks: list[int] = []

    async def hang() -> None:
        tasks.append(anyio.get_current_task().id)
        await anyio.sleep_forever()

    async def whole() -> None:
        tasks.append(anyio.get_current_task().id)
        await table.add(rows(1))
        await store.call("hang", "part", hang, mutates=True)

    with anyio.fail_after(5), anyio.move_on_after(0.1) as scope:
        await store.settle("whole", whole)

    assert scope.cancelled_caught
    assert tasks[0] == tasks[1] != anyio.get_current_task().id
    assert store.abandoned == {"whole"}
    assert await (await store.open("t")).count_rows() == 1


async def test_a_read_is_cancelled_at_once(tmp_path: Path) -> None:
    """Only mutations are given time: a read has nothing to resolve."""
    store, table = await made(tmp_path / "db", GatedStore, grace_s=60)
    assert isinstance(store, GatedStore)
    store.shut()
    with anyio.fail_after(5), anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(table.read)
            await store.begun.wait()
            scope.cancel()

    assert scope.cancelled_caught
    assert not store.abandoned


async def test_a_mutation_returns_and_raises_as_if_it_were_not_settled(tmp_path: Path) -> None:
    """Undisturbed, the result and the error are the call's own."""
    store, table = await made(tmp_path / "db")

    async def fail() -> None:
        raise KeyError("mine")

    assert await table.add(rows(1)) == 2
    assert await table.update(values={"text": "y"}) == (1, 3)
    with pytest.raises(KeyError, match="mine"):
        await store.settle("t", fail)


# ---- literals -----------------------------------------------------------------------------------


async def found_again(table: Table, texts: list[str]) -> list[str]:
    """Writes each text to a row of its own; returns those that a filter does not find alone."""
    wanted = list(dict.fromkeys(texts))
    start = await table.count_rows()
    await table.add(
        pa.table({"id": range(start, start + len(wanted)), "text": wanted}, schema=SCHEMA)
    )
    lost = []
    for number, text in enumerate(wanted, start):
        have = await table.read(f"id >= {start} AND text = {sql_literal(text)}")
        if have.to_pylist() != [{"id": number, "text": text}]:
            lost.append(text)
    return lost


async def test_odd_text_survives_a_filter(tmp_path: Path) -> None:
    """Quotes, backslashes, line ends, comments and the like select the row that holds them."""
    _, table = await made(tmp_path / "db")
    lost = await found_again(table, ODD)

    assert lost == []


@settings(max_examples=12, deadline=None)
@given(texts=st.lists(st.text(max_size=12), min_size=1, max_size=8))
async def test_any_text_survives_a_filter(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    """No text is too odd to be found again."""
    _, table = await made(tmp_path_factory.mktemp("literals") / "db")
    lost = await found_again(table, texts)

    assert lost == []


@pytest.mark.parametrize("text", ODD)
async def test_odd_text_survives_an_update_beside_an_expression(tmp_path: Path, text: str) -> None:
    """Where values become SQL because expressions are set with them, the text stays the same."""
    _, table = await made(tmp_path / "db")
    await table.add(rows(1))
    await table.update(values={"text": text}, sql={"id": "id + 1"})

    assert (await table.read()).to_pylist() == [{"id": 2, "text": text}]


@pytest.mark.parametrize(
    ("value", "literal"),
    [(None, "NULL"), (True, "true"), (False, "false"), (-7, "-7"), (2.5, "2.5"), (1e300, "1e+300"),
     ("a", "'a'")],
)  # fmt: skip
async def test_a_literal_is_the_value_it_was_made_of(
    tmp_path: Path, value: object, literal: str
) -> None:
    """NULL, booleans, numbers and text are told apart, and LanceDB reads them back as they were."""
    store = await Store.connect(str(tmp_path / "db"))
    column = pa.array([value], pa.string() if value is None else None)
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("value", column.type)])
    table = await store.create("values", schema)
    await table.add(pa.table({"id": [1]}))
    await table.update(values={"value": value}, sql={"id": "id + 1"})

    assert sql_literal(value) == literal
    assert (await table.read()).to_pylist() == [{"id": 2, "value": value}]


# ---- SQL that is tried beforehand ---------------------------------------------------------------


class CountingSketch(SqlCheck):
    """Counts what LanceDB is asked."""

    asked = 0

    async def _execute(self, *statement: Any) -> str | None:
        self.asked += 1
        return await super()._execute(*statement)


async def test_sql_is_tried_once_for_tables_that_have_the_columns_it_names() -> None:
    """Other columns make no difference, another type of the same column does."""
    sketch = CountingSketch()
    fill = Statement(table="t", values={"n": "x"}, where="n IS NULL")
    text, number = pa.field("n", pa.string()), pa.field("n", pa.int64())

    taken = [
        await sketch.refusal(fill, pa.schema([*others, text]))
        for others in ([], [pa.field("id", pa.int64())], [pa.field("vector", pa.list_(pa.int8()))])
    ]
    refused = await sketch.refusal(fill, pa.schema([pa.field("id", pa.int64()), number]))

    assert taken == [None, None, None]
    assert "Cannot cast" in (refused or "")
    assert sketch.asked == 1 + 2  # what is refused is asked of the whole table too, for the words


@pytest.mark.parametrize(
    ("where", "is_taken"),
    [
        ("`a b` = 'x'", True),
        ("meta.lang = 'de' AND Title IS NOT NULL", True),
        ("true", True),
        ("gone = 1 AND meta.lang = 'de'", False),
    ],
)
async def test_sql_names_its_columns_in_any_spelling(where: str, is_taken: bool) -> None:
    """With spaces, as a path, none at all; a refusal lists all columns."""
    schema = pa.schema(
        [
            pa.field("a b", pa.string()),
            pa.field("meta", pa.struct([("lang", pa.string())])),
            pa.field("Title", pa.string()),
            pa.field("other", pa.int64()),
        ]
    )

    told = await SqlCheck().refusal(Statement(table="t", where=where), schema)

    assert (told is None) is is_taken, told
    assert is_taken or "other" in (told or "")
