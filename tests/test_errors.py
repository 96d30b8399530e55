"""Errors that only real contention, cleanup or a defect brings about: each is named, once."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import lancedb
import pyarrow as pa
import pytest

from aiomigrate import Migration, MigrationFailedError, load, op
from aiomigrate.errors import (
    AiomigrateError,
    ColumnNotNullableError,
    CommitConflictError,
    LeaseError,
    LeaseHeldError,
    LeaseTimeoutError,
    OutOfOrderError,
    PlanError,
    SchemaMismatchError,
    StaleHandleError,
    StoreError,
    TableExistsError,
    TableNotFoundError,
    TableVersionGoneError,
    UnresolvedError,
    WriterCongestionError,
)
from aiomigrate.lance import Store
from aiomigrate.savepoint import restore_fenced
from tests.tools import make, manager

T = pa.schema([pa.field("id", pa.int64()), pa.field("n", pa.int64())])
ROWS = [{"id": 1, "n": 10}, {"id": 2, "n": None}]
HEAD = "table_migrations"


def first() -> Migration:
    """Returns the migration that creates the table."""
    return Migration(table="t", version=1, operations=[op.CreateTable(T)])


@pytest.fixture
async def store(database: Path) -> Store:
    """The port on a database with one table, made by LanceDB alone."""
    await make(database, T, ROWS, table="t")
    return await Store.connect(str(database))


async def test_a_table_that_is_missing_or_there_already(store: Store) -> None:
    """LanceDB's bare ValueErrors about a table's existence are told apart, and name the table."""
    with pytest.raises(TableNotFoundError, match="'none'"):
        await store.open("none")
    with pytest.raises(TableExistsError, match="'t'"):
        await store.create("t", T)

    assert await store.find("none") is None


async def test_null_in_a_column_that_is_to_be_not_null(store: Store) -> None:
    """LanceDB's refusal names its cause, and what to fill the column with."""
    table = await store.open("t")

    with pytest.raises(ColumnNotNullableError, match=r"op\.Update"):
        await table.alter_columns([{"path": "n", "nullable": False}])


async def test_two_commits_from_one_version(store: Store) -> None:
    """Who comes second is told that the same call may succeed on a fresh handle, and it does."""
    one, other = await store.open("t"), await store.open("t")
    await one.add_columns([pa.field("x", pa.int64())])
    with pytest.raises(CommitConflictError, match="Run it again"):
        await other.add_columns([pa.field("y", pa.int64())])
    await (await store.open("t")).add_columns([pa.field("y", pa.int64())])

    assert (await (await store.open("t")).state()).schema.names == ["id", "n", "x", "y"]


async def test_a_handle_from_before_a_restore(store: Store) -> None:
    """It is refused with the advice to reopen: what was decided on it may be wrong."""
    stale = await store.open("t")
    await (await store.open("t")).restore(1)

    with pytest.raises(StaleHandleError, match="Reopen"):
        await stale.add(pa.table({"id": [3], "n": [3]}))


async def test_a_table_version_that_was_cleaned_up(store: Store) -> None:
    """Going back to it fails by name, whether LanceDB speaks of cleanup or of a missing file."""
    table = await store.open("t")
    await table.add(pa.table({"id": [3], "n": [3]}))
    with pytest.warns(UserWarning, match="removes every version"):
        await table.handle.optimize(cleanup_older_than=dt.timedelta(0))

    with pytest.raises(TableVersionGoneError):
        await table.at(1)
    with pytest.raises(TableVersionGoneError):
        await (await store.open("t")).restore(1)


async def test_too_many_writers_for_lancedb(store: Store) -> None:
    """LanceDB's giving up, which takes it 30 s, is told apart from other failures."""

    async def gives_up() -> None:
        raise RuntimeError("lance error: Too many concurrent writers. retry_timeout of 30 seconds")

    with pytest.raises(WriterCongestionError, match="fewer processes"):
        await store.call("add", "t", gives_up, mutates=True)


async def test_a_restore_over_the_commit_of_another(store: Store) -> None:
    """A head that is not the one we know is left as it is; its table_versions are named."""
    table = await store.open("t")
    known = await table.version()
    await (await store.open("t")).add(pa.table({"id": [3], "n": [3]}))

    async def guard() -> None:
        """The lease is ours."""

    (script,) = load([first()], {}).all
    with pytest.raises(UnresolvedError, match=rf"table_version {known + 1}\)"):
        await restore_fenced(store, "t", to=1, head=known, guard=guard, script=script)

    assert await (await store.open("t")).count_rows() == 3


async def held(database: Path) -> lancedb.AsyncTable:
    """Makes a database whose lease another process holds; returns its head."""
    async with manager(database, [first()]) as migrations:
        await migrations.initialize()
    head = await (await lancedb.connect_async(database)).open_table(HEAD)
    await head.update({"owner": "another", "beat": 1}, where="tableName = ':lease:run'")
    return head


def second() -> list[Migration]:
    """Returns a set with something to do."""
    more = op.AddColumns({"x": pa.int64()})
    return [first(), Migration(table="t", version=2, operations=[more])]


async def test_a_holder_that_is_waited_for_in_vain(database: Path) -> None:
    """The error names the holder and the way out, and nothing was run."""
    await held(database)
    async with manager(database, second(), lease_ttl=60, lease_wait=0.3) as migrations:
        with pytest.raises(LeaseTimeoutError, match="aiomigrate unlock") as caught:
            await migrations.initialize()
        status = await migrations.get_status()

    assert isinstance(caught.value, LeaseError)
    assert status.lines["t"].current == 1


async def test_unlock_of_a_holder_that_is_alive(database: Path) -> None:
    """A lease that is renewed while it is watched is not broken."""
    head = await held(database)
    raised: list[LeaseHeldError] = []

    async def unlock() -> None:
        async with manager(database, second(), lease_ttl=1) as migrations:
            with pytest.raises(LeaseHeldError, match="alive") as caught:
                await migrations.unlock()
            raised.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(unlock)
        while not raised:
            await anyio.sleep(0.1)
            await head.checkout_latest()
            await head.update(updates_sql={"beat": "beat + 1"}, where="tableName = ':lease:run'")
    rows = await head.query().where("tableName = ':lease:run'").to_list()

    assert [row["owner"] for row in rows] == ["another"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Liar(op.Operation):
    """Adds another column than it predicts."""

    @property
    def traits(self) -> op.Traits:
        return op.Traits()

    def describe(self) -> str:
        return "lie"

    def evolve(self, state: op.TableState | None) -> op.TableState | None:
        return op.AddColumns({"told": pa.int64()}).evolve(state)

    async def apply(self, target: Any) -> int:
        await target.add_columns([pa.field("done", pa.int64())])
        return 0


async def test_an_operation_that_did_not_do_what_it_predicted(database: Path) -> None:
    """A table that is not as predicted fails the migration and is returned to where it was."""
    given = [first(), Migration(table="t", version=2, operations=[Liar()])]
    async with manager(database, given) as migrations:
        with pytest.raises(MigrationFailedError, match="not as predicted"):
            await migrations.initialize()
        (failed,) = [e for e in await migrations.history("t") if e.kind == "failed"]
        validation = await migrations.validate()
    table = await (await Store.connect(str(database))).open("t")

    assert SchemaMismatchError.__name__ in (failed.error or "")
    assert (await table.state()).schema.names == ["id", "n"]
    assert validation.not_at_target == validation.errors


def test_errors_form_one_tree_that_can_be_caught_by_kind() -> None:
    """Whoever catches a kind of error catches its cases, and all are AiomigrateErrors."""
    cases = {
        PlanError: OutOfOrderError,
        LeaseError: LeaseTimeoutError,
        StoreError: CommitConflictError,
    }

    for kind, case in cases.items():
        assert issubclass(case, kind)
        assert issubclass(kind, AiomigrateError)
