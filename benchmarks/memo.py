"""The memo application's upgrade by hand: only the changes, tables at once, each in its best order.

`Bare` makes them and nothing else: what no migration tool can undercut. `Careful` also makes what
aiomigrate's guarantees ask of LanceDB (see `calls`): the ledger taken over and kept, commits
announced first, savepoints, a look before and after; it decides nothing and protects nothing.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import lancedb
import lancedb.index
import pyarrow as pa

from benchmarks import calls
from benchmarks.setting import HEAD, JOURNAL
from tests import predecessor

_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
_OLD = ("users", "memos", "memo_relations", "categories", "attachments")
_NEW = {
    "daily_recommendations": (), "ai_conversations": (), "ai_messages": (), "push_rules": (),
    "tags": ("tagId", "uid", "createdAt"),
}  # fmt: skip
"""Tables of the first release, and those that came later with the columns of their indexes."""

Commit = Callable[[lancedb.AsyncTable], Awaitable[Any]]


class Bare:
    """Makes commits, and nothing else."""

    async def begin(self, connection: lancedb.AsyncConnection) -> None:
        """Comes before everything."""

    async def beside(self) -> None:
        """Goes on beside the first changes."""

    async def end(self) -> None:
        """Comes after everything."""

    async def create(
        self, connection: lancedb.AsyncConnection, name: str, schema: pa.Schema
    ) -> lancedb.AsyncTable:
        """Makes a table."""
        return await connection.create_table(name, schema=schema)

    async def migrate(
        self, table: lancedb.AsyncTable, version: int, *commits: Commit, saved: bool
    ) -> None:
        """Makes the commits of one migration; those that need a savepoint are `saved`."""
        for commit in commits:
            await commit(table)


class Careful(Bare):
    """Also keeps a ledger and savepoints, and looks."""

    async def begin(self, connection: lancedb.AsyncConnection) -> None:
        """Takes over the predecessor's ledger, with the lease."""
        self._head = await calls.adopt(connection)
        self._log = calls.Journal(await connection.open_table(JOURNAL))
        self._saved: dict[str, tuple[lancedb.AsyncTable, str]] = {}

    async def beside(self) -> None:
        """Records what it took over, and makes its rows ours."""
        await self._log.record(HEAD, 1)
        await calls.own(self._head, [*_OLD, *_NEW])

    async def end(self) -> None:
        """Lets savepoints go, and the head follow."""
        await self._log.record(HEAD, 2)
        async with anyio.create_task_group() as group:
            for name in list(self._saved):
                group.start_soon(self._let_go, name)
        await calls.follow(self._head, [*_OLD, *_NEW], 21)

    async def create(
        self, connection: lancedb.AsyncConnection, name: str, schema: pa.Schema
    ) -> lancedb.AsyncTable:
        """Announces it, and looks."""
        await self._log.record(name, 1)
        table = await super().create(connection, name, schema)
        await table.version()
        await table.schema()
        return table

    async def migrate(
        self, table: lancedb.AsyncTable, version: int, *commits: Commit, saved: bool
    ) -> None:
        """Looks, and announces; a savepoint goes once the next announcement is recorded."""
        await table.version()
        await table.schema()
        await table.list_indices()
        savepoint = f"by-hand-{version}"
        await self._log.record(table.name, version)
        if saved:
            await table.branches.create(savepoint)
        for commit in commits:
            await commit(table)
            await table.schema()
            await table.list_indices()
        if table.name in self._saved:
            await self._let_go(table.name)
        if saved:
            self._saved[table.name] = table, savepoint

    async def _let_go(self, name: str) -> None:
        table, savepoint = self._saved.pop(name)
        await table.branches.delete(savepoint)


async def upgrade(path: str, hand: Bare) -> None:
    """Brings a database of the first release to the latest."""
    connection = await lancedb.connect_async(path)
    await hand.begin(connection)

    async def users() -> None:
        await _soft_delete(hand, await connection.open_table("users"))

    async def memos() -> None:
        table = await connection.open_table("memos")
        await hand.migrate(table, 3, *_filled("type", _TEXT, "'text'"), saved=True)
        await hand.migrate(table, 8, *_filled("isPublic", pa.bool_(), "false"), saved=True)
        await hand.migrate(table, 11, _added("tagIds", _TEXTS), saved=False)
        await hand.migrate(table, 16, _added("source", _TEXT), saved=False)
        await _soft_delete(hand, table)

    async def categories() -> None:
        table = await connection.open_table("categories")
        people = await (await connection.open_table("users")).query().select(["uid"]).to_arrow()
        now = dt.datetime(2026, 3, 1)  # noqa: DTZ001 - its columns know no time zone
        schema = await table.schema()
        rows = [
            {"categoryId": uuid.uuid4().hex, "uid": uid, "name": predecessor.DIARY,
             "createdAt": now, "updatedAt": now}
            for uid in people["uid"].to_pylist()
        ]  # fmt: skip
        diaries = pa.Table.from_pylist(rows, schema=schema)
        await hand.migrate(table, 4, lambda table: table.add(diaries), saved=True)
        await _soft_delete(hand, table)

    async def attachments() -> None:
        table = await connection.open_table("attachments")
        await hand.migrate(table, 7, *_filled("properties", _TEXT, "'{}'"), saved=True)
        await _soft_delete(hand, table)

    async def relations() -> None:
        await _soft_delete(hand, await connection.open_table("memo_relations"))

    async def new(name: str) -> None:
        schema = predecessor.schema_of(name, latest=True)
        table = await hand.create(connection, name, schema)
        indexed = (*_NEW[name], "deletedAt")
        await hand.migrate(table, 2, *(_indexed(column) for column in indexed), saved=False)

    async with anyio.create_task_group() as group:
        group.start_soon(hand.beside)
        for change in (users, memos, categories, attachments, relations):
            group.start_soon(change)
        for name in _NEW:
            group.start_soon(new, name)
    await hand.end()
    connection.close()


async def _soft_delete(hand: Bare, table: lancedb.AsyncTable) -> None:
    forbidden: Any = {"path": "deletedAt", "nullable": False}
    await hand.migrate(
        table,
        19,
        *_filled("deletedAt", pa.int64(), "0"),
        lambda table: table.alter_columns(forbidden),
        _indexed("deletedAt"),
        saved=True,
    )


def _added(name: str, kind: pa.DataType) -> Commit:
    return lambda table: table.add_columns([pa.field(name, kind)])


def _filled(name: str, kind: pa.DataType, value: str) -> tuple[Commit, Commit]:
    return _added(name, kind), lambda table: table.update(updates_sql={name: value})


def _indexed(column: str) -> Commit:
    return lambda table: table.create_index(column, config=lancedb.index.BTree())
