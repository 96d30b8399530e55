"""Databases as the predecessor leaves them, and its algorithm, in plain async Python.

The predecessor is the migration system that aiomigrate succeeds. A *release* of the note-taking
application is a hand-kept list of scripts by table. `migrate` is its algorithm: tables one after
another, and after each script the table's record is deleted and added again. Nothing here uses
aiomigrate.
"""

from __future__ import annotations

import datetime as dt
import enum
import random
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
from lancedb.index import Bitmap, BTree

LEDGER = "table_migrations"
LEDGER_SCHEMA = pa.schema(
    [
        pa.field("tableName", pa.string(), nullable=False),
        pa.field("currentVersion", pa.int32(), nullable=False),
        pa.field("lastMigratedAt", pa.timestamp("ms"), nullable=False),
    ]
)
DIMENSION = 8
DIARY = "日记"
KEYS: Mapping[str, tuple[str, ...]] = {
    "users": ("uid",),
    "memos": ("memoId",),
    "memo_relations": ("relationId",),
    "categories": ("categoryId",),
    "embedding_cache": ("modelHash", "contentHash"),
    "attachments": ("attachmentId",),
    "multimodal_embedding_cache": ("modelHash", "contentHash"),
    "daily_recommendations": ("recommendationId",),
    "ai_conversations": ("conversationId",),
    "ai_messages": ("messageId",),
    "tags": ("tagId",),
    "push_rules": ("id",),
}

Up = Callable[[lancedb.AsyncConnection], Awaitable[None]]
Release = Mapping[str, Sequence[tuple[int, Up]]]


class State(enum.Enum):
    """The states in which the predecessor leaves a database."""

    V1 = "v1"
    UPGRADED = "upgraded"
    NULLTYPE = "nulltype"
    FRESH = "fresh"

    def __str__(self) -> str:
        return self.value


async def build(path: Path, state: State) -> None:
    """Makes a database with rows, at a path that does not exist yet."""
    db = await lancedb.connect_async(path)
    await migrate(db, LATEST if state is State.FRESH else FIRST)
    await populate(db)
    if state is State.UPGRADED:
        await migrate(db, LATEST)
    elif state is State.NULLTYPE:
        await migrate(db, BROKEN)
    db.close()


# ---- its algorithm ------------------------------------------------------------------------------


async def migrate(db: lancedb.AsyncConnection, release: Release) -> list[tuple[str, int]]:
    """Brings a database to a release, as the predecessor does. Returns what it ran."""
    if LEDGER not in (await db.list_tables()).tables:
        ledger = await db.create_table(LEDGER, schema=LEDGER_SCHEMA)
        await ledger.create_index("tableName", config=BTree())
    ran = []
    for table, scripts in release.items():
        current = await current_version(db, table)
        for version, up in scripts:
            if version > current:
                await up(db)
                await record(db, table, version)
                ran.append((table, version))
    return ran


async def current_version(db: lancedb.AsyncConnection, table: str) -> int:
    """Returns the recorded version of a table, 0 if there is none."""
    ledger = await db.open_table(LEDGER)
    rows = await ledger.query().where(f"tableName = '{table}'").limit(1).to_list()
    return int(rows[0]["currentVersion"]) if rows else 0


async def record(db: lancedb.AsyncConnection, table: str, version: int) -> None:
    """Records a version: the row is deleted and added, with the three columns it knows."""
    ledger = await db.open_table(LEDGER)
    if await ledger.count_rows(f"tableName = '{table}'"):
        await ledger.delete(f"tableName = '{table}'")
    row = {
        "tableName": table,
        "currentVersion": version,
        "lastMigratedAt": dt.datetime.now(dt.UTC).replace(tzinfo=None),
    }
    await ledger.add(pa.Table.from_pylist([row], schema=LEDGER_SCHEMA))


async def validate(db: lancedb.AsyncConnection, release: Release) -> list[str]:
    """Returns its errors: it compares nothing but numbers, and passes a newer database."""
    errors = []
    for table, scripts in release.items():
        current, target = await current_version(db, table), scripts[-1][0]
        if current < target:
            errors.append(f"{table}: current v{current}, target v{target}")
    return errors


# ---- its scripts --------------------------------------------------------------------------------

_TYPES = {
    "string": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "bool": pa.bool_(),
    "time": pa.timestamp("ms"),
    "strings": pa.list_(pa.string()),
    "text": pa.list_(pa.float32(), DIMENSION),
    "multimodal": pa.list_(pa.float32(), 1024),
    "sources": pa.list_(
        pa.struct([("memoId", pa.string()), ("content", pa.string()), ("similarity", pa.float32())])
    ),
}

# `!` is NOT NULL; `+` is there only in the latest release.
_FIELDS = {
    "users": "uid! email phone password! salt! nickname avatar status:int32! +deletedAt:int64! "
    "createdAt:time! updatedAt:time!",
    "memos": "memoId! uid! categoryId content! +type +source attachments:strings +tagIds:strings "
    "+isPublic:bool +deletedAt:int64! embedding:text! createdAt:time! updatedAt:time!",
    "memo_relations": "relationId! uid! sourceMemoId! targetMemoId! +deletedAt:int64! "
    "createdAt:time!",
    "categories": "categoryId! uid! name! color +deletedAt:int64! createdAt:time! updatedAt:time!",
    "embedding_cache": "modelHash! contentHash! embedding:text! createdAt:time!",
    "attachments": "attachmentId! uid! filename! type! size:int32! storageType! path! bucket "
    "prefix endpoint region isPublicBucket multimodalEmbedding:multimodal multimodalModelHash "
    "+properties +deletedAt:int64! createdAt:time!",
    "multimodal_embedding_cache": "modelHash! contentHash! modalityType! embedding:multimodal! "
    "createdAt:time!",
    "daily_recommendations": "recommendationId! uid! date! memoIds:strings! +deletedAt:int64! "
    "createdAt:time!",
    "ai_conversations": "conversationId! uid! title! +deletedAt:int64! createdAt:time! "
    "updatedAt:time!",
    "ai_messages": "messageId! conversationId! role! content! sources:sources +deletedAt:int64! "
    "createdAt:time!",
    "tags": "tagId! uid! name! color usageCount:int32! +deletedAt:int64! createdAt:time! "
    "updatedAt:time!",
    "push_rules": "id! uid! name! pushTime:int32! contentType! channels enabled:int32! "
    "+deletedAt:int64! createdAt:time! updatedAt:time!",
}
_INDEXES = {
    "users": ("uid", "email", "phone", "status"),
    "memos": ("memoId", "uid", "categoryId", "createdAt", "updatedAt"),
    "memo_relations": ("relationId", "uid", "sourceMemoId", "targetMemoId"),
    "categories": ("categoryId", "uid", "createdAt"),
    "embedding_cache": ("modelHash", "contentHash"),
    "attachments": ("attachmentId", "uid", "createdAt"),
    "multimodal_embedding_cache": ("modelHash", "contentHash", "modalityType"),
}
_TABLES_OF_19 = (
    "memos", "users", "memo_relations", "categories", "attachments", "tags",
    "ai_conversations", "ai_messages", "daily_recommendations", "push_rules",
)  # fmt: skip


def schema_of(table: str, *, latest: bool) -> pa.Schema:
    """Returns a table's schema, of the first release or the latest."""
    fields = []
    for text in _FIELDS[table].split():
        if text.startswith("+") and not latest:
            continue
        name, _, kind = text.strip("+!").partition(":")
        fields.append(pa.field(name, _TYPES[kind or "string"], nullable=not text.endswith("!")))
    return pa.schema(fields)


def _create(table: str, *, latest: bool) -> Up:
    async def up(db: lancedb.AsyncConnection) -> None:
        await db.create_table(table, schema=schema_of(table, latest=latest))

    return up


def _index(columns: Mapping[str, Sequence[str]]) -> Up:
    async def up(db: lancedb.AsyncConnection) -> None:
        for name, wanted in columns.items():
            table = await db.open_table(name)
            for column in wanted:
                kind = Bitmap() if column in ("status", "modalityType") else BTree()
                await table.create_index(column, config=kind)

    return up


def _add(table: str, column: str, how: str | pa.DataType) -> Up:
    """Adds a column if it is missing: by SQL it becomes NOT NULL, and `NULL` of Null type."""

    async def up(db: lancedb.AsyncConnection) -> None:
        handle = await db.open_table(table)
        if column not in (await handle.schema()).names:
            await handle.add_columns(
                {column: how} if isinstance(how, str) else pa.field(column, how)
            )

    return up


def _soft_delete(*tables: str) -> Up:
    async def up(db: lancedb.AsyncConnection) -> None:
        for name in tables:
            table = await db.open_table(name)
            if "deletedAt" not in (await table.schema()).names:
                await table.add_columns({"deletedAt": "cast(0 as bigint)"})
                await table.create_index("deletedAt", config=BTree())

    return up


async def _diaries(db: lancedb.AsyncConnection) -> None:
    """Adds a diary category to every user who has none, row by row, under a random id."""
    users, categories = await db.open_table("users"), await db.open_table("categories")
    now = dt.datetime(2026, 3, 1, 12, 0, 0, 5000)  # noqa: DTZ001 - its columns know no time zone
    for user in await users.query().select(["uid"]).to_list():
        if not await categories.count_rows(f"uid = '{user['uid']}' AND name = '{DIARY}'"):
            row = {"categoryId": uuid.uuid4().hex, "uid": user["uid"], "name": DIARY,
                   "deletedAt": 0, "createdAt": now, "updatedAt": now}  # fmt: skip
            schema = await categories.schema()
            await categories.add(pa.Table.from_pylist([row], schema=schema))


async def _nothing(_: lancedb.AsyncConnection) -> None:
    """Its effect was withdrawn, its record stays."""


FIRST: Release = {
    **{table: [(1, _create(table, latest=False))] for table in _FIELDS if table in _INDEXES},
    "indexes": [(2, _index(_INDEXES))],
}
"""The first release: recorded by every database of that time."""

LATEST: Release = {
    **{table: [(1, _create(table, latest=True))] for table in _INDEXES},
    "users": [
        (1, _create("users", latest=True)),
        (5, _add("users", "avatar", pa.string())),
    ],
    "memos": [
        (1, _create("memos", latest=True)),
        (3, _add("memos", "type", "'text'")),
        (8, _add("memos", "isPublic", "false")),
        (11, _add("memos", "tagIds", pa.list_(pa.string()))),
        (14, _nothing),
        (16, _add("memos", "source", pa.string())),
        (20, _soft_delete("memos")),
    ],
    "categories": [(1, _create("categories", latest=True)), (4, _diaries)],
    "attachments": [
        (1, _create("attachments", latest=True)),
        (7, _add("attachments", "properties", "'{}'")),
    ],
    "daily_recommendations": [(1, _create("daily_recommendations", latest=True))],
    "indexes": [(2, _index(_INDEXES))],
    "ai_conversations": [(6, _create("ai_conversations", latest=True))],
    "ai_messages": [(6, _create("ai_messages", latest=True))],
    "tags": [
        (10, _create("tags", latest=True)),
        (13, _index({"tags": ("tagId", "uid", "createdAt")})),
    ],
    "push_rules": [(15, _create("push_rules", latest=True))],
    "memo_vectors": [(18, _nothing)],
    "attachment_vectors": [(17, _nothing)],
    "_all_tables": [(19, _soft_delete(*_TABLES_OF_19))],
}
"""Its newest release."""

BROKEN: Release = {
    **FIRST,
    "users": [*FIRST["users"], (5, _nothing)],
    "memos": [
        *FIRST["memos"],
        (3, _add("memos", "type", "'text'")),
        (8, _add("memos", "isPublic", "false")),
        (9, _add("memos", "tags", "NULL")),
        (12, _add("memos", "tagIds", "NULL")),
    ],
    "categories": [*FIRST["categories"], (4, _diaries)],
    "attachments": [*FIRST["attachments"], (7, _add("attachments", "properties", "'{}'"))],
    "daily_recommendations": [(1, _create("daily_recommendations", latest=False))],
    "ai_conversations": [(6, _create("ai_conversations", latest=False))],
    "ai_messages": [(6, _create("ai_messages", latest=False))],
    "tags": [(13, _nothing)],
}
"""A release that left columns of Null type and recorded a table it had not made."""


# ---- its rows -----------------------------------------------------------------------------------


async def populate(db: lancedb.AsyncConnection) -> None:
    """Writes rows as the application does: a bulk add, small adds, deletions, one update."""
    existing = set((await db.list_tables()).tables)
    for name, keys in KEYS.items():
        if name not in existing:
            continue
        table = await db.open_table(name)
        schema = await table.schema()
        rows = [_row(name, schema, number) for number in range(8)]
        for part in (rows[:5], rows[5:6], rows[6:7], rows[7:]):
            await table.add(pa.Table.from_pylist(part, schema=schema))
        await table.delete(f"`{keys[-1]}` = '{rows[2][keys[-1]]}'")
        await table.delete(f"`{keys[-1]}` = '{rows[6][keys[-1]]}'")
        await table.update(
            {"createdAt": dt.datetime(2026, 2, 2, 2, 2, 2, 222000)},  # noqa: DTZ001
            where=f"`{keys[-1]}` = '{rows[3][keys[-1]]}'",
        )


def _row(table: str, schema: pa.Schema, number: int) -> dict[str, Any]:
    rng = random.Random(f"{table} {number}")
    row = {field.name: _value(field, number, rng) for field in schema}
    row["uid"] = f"user-{number}"
    if table == "categories" and number == 1:
        row["name"] = DIARY  # one user has a diary already
    for key in KEYS[table]:
        row[key] = f"user-{number}" if key == "uid" else f"{table}-{key}-{number}"
    return {name: value for name, value in row.items() if name in schema.names}


def _value(field: pa.Field[Any], number: int, rng: random.Random) -> Any:
    if field.name == "deletedAt":
        return 0
    if field.nullable and rng.random() < 0.25:
        return None
    kind = field.type
    if pa.types.is_string(kind):
        words = ["今天", "计划", "🚀", "it's", '"quoted"', "línea", "line\nbreak", "100%", "`x`"]
        return f"{field.name} {number} " + " ".join(rng.choices(words, k=5))
    if pa.types.is_integer(kind):
        return rng.randrange(1000)
    if pa.types.is_boolean(kind):
        return rng.random() < 0.5
    if pa.types.is_timestamp(kind):
        return dt.datetime(2026, 1, 1) + dt.timedelta(milliseconds=rng.randrange(10**9))  # noqa: DTZ001
    if pa.types.is_fixed_size_list(kind):
        return [rng.uniform(-1, 1) for _ in range(kind.list_size)]
    if kind == _TYPES["sources"]:
        return [{"memoId": "m", "content": "笔记", "similarity": 0.5}]
    return [f"{field.name}-{n}" for n in range(rng.randrange(3))]
