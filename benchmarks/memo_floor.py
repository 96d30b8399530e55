"""The memo application's upgrade by hand: only the changes, tables at once, each in its best order.

No ledger, no lease, no savepoint, nothing looked at: what no migration tool can undercut.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import lancedb
import lancedb.index
import pyarrow as pa

from tests import predecessor

_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())


async def upgrade(path: str) -> None:
    """Brings a database of the first release to the latest."""
    connection = await lancedb.connect_async(path)

    async def users() -> None:
        await _soft_delete(await connection.open_table("users"))

    async def memos() -> None:
        table = await connection.open_table("memos")
        for name, kind, value in (
            ("type", _TEXT, "'text'"), ("isPublic", pa.bool_(), "false"), ("tagIds", _TEXTS, None),
            ("source", _TEXT, None),
        ):  # fmt: skip
            await table.add_columns([pa.field(name, kind)])
            if value is not None:
                await table.update(updates_sql={name: value})
        await _soft_delete(table)

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
        await table.add(pa.Table.from_pylist(rows, schema=schema))
        await _soft_delete(table)

    async def attachments() -> None:
        table = await connection.open_table("attachments")
        await table.add_columns([pa.field("properties", _TEXT)])
        await table.update(updates_sql={"properties": "'{}'"})
        await _soft_delete(table)

    async def relations() -> None:
        await _soft_delete(await connection.open_table("memo_relations"))

    def made(name: str, *indexed: str) -> Callable[[], Coroutine[Any, Any, None]]:
        async def make() -> None:
            schema = predecessor.schema_of(name, latest=True)
            table = await connection.create_table(name, schema=schema)
            for column in (*indexed, "deletedAt"):
                await table.create_index(column, config=lancedb.index.BTree())

        return make

    new = [made(n) for n in ("daily_recommendations", "ai_conversations", "ai_messages")]
    new += [made("push_rules"), made("tags", "tagId", "uid", "createdAt")]
    async with anyio.create_task_group() as group:
        for change in (users, memos, categories, attachments, relations, *new):
            group.start_soon(change)
    connection.close()


async def _soft_delete(table: lancedb.AsyncTable) -> None:
    await table.add_columns([pa.field("deletedAt", pa.int64())])
    await table.update({"deletedAt": 0})
    alteration: Any = {"path": "deletedAt", "nullable": False}
    await table.alter_columns(alteration)
    await table.create_index("deletedAt", config=lancedb.index.BTree())
