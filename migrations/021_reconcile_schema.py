"""Version 21: every table, by whatever road it came, equals that of a fresh database.

Databases of this application differ: some releases added columns NOT NULL that a fresh database
has nullable, one left columns of Null type, some recorded tables that they never made. What is to
be done depends on what is found, so this is a function, given to each table's line with that
table's whole shape: tables stay independent, and a crash undoes only the table in hand.

No row is touched but by filling columns that are missing. Nothing that holds a value is thrown
away: a column that should not be there, or is of another type, goes only if it is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from aiomigrate import Context, Migration, RecordedTable, errors, op

VERSION = 21
TIME = pa.timestamp("ms")
TEXT_VECTOR = pa.list_(pa.float32(), 1536)
"""Stands for a text embedding of any dimension; see `text_vectors` below."""
MULTIMODAL_VECTOR = pa.list_(pa.float32(), 1024)
SOURCE = pa.struct(
    [
        pa.field("memoId", pa.string()),
        pa.field("content", pa.string()),
        pa.field("similarity", pa.float32()),
    ]
)


async def conform(
    context: Context,
    *,
    schema: pa.Schema,
    indexes: Mapping[str, str],
    fill: Mapping[str, Any],
    text_vectors: Sequence[str] = (),
) -> None:
    """Gives the migration's table its shape. Running it again finds nothing to do.

    Args:
        context: Of the migration.
        schema: The fields, in any order.
        indexes: The kind of index by column; there are no others.
        fill: Values of rows that were there before the column.
        text_vectors: Columns whose dimension is that of the table, or the run's if it is new.
    """
    table = context.table()
    found = table.schema if table.exists else pa.schema([])
    wanted = fitted(schema, text_vectors, found, int(context.params.get("dimension", 1536)))
    if not table.exists:
        await context.apply(op.CreateTable(wanted))
    await drop_columns(context, wanted)
    await add_columns(context, wanted, fill)
    await set_nullability(context, wanted)
    await set_indexes(context, indexes)


def fitted(
    schema: pa.Schema, text_vectors: Sequence[str], found: pa.Schema, dimension: int
) -> pa.Schema:
    """Returns the schema with its text vectors as the table has them, or of a dimension."""
    fields = []
    for field in schema:
        if field.name in text_vectors:
            kind = pa.list_(pa.float32(), dimension)
            if field.name in found.names:
                have = found.field(field.name).type
                if pa.types.is_fixed_size_list(have) and have.value_type == pa.float32():
                    kind = have
            field = field.with_type(kind)  # noqa: PLW2901 - the field as this table has it
        fields.append(field)
    return pa.schema(fields)


async def drop_columns(context: Context, wanted: pa.Schema) -> None:
    """Drops, with their indexes, the columns that are not wanted, or not as they are.

    Raises:
        OperationError: Such a column holds values.
    """
    table = context.table()
    gone = [
        field
        for field in table.schema
        if field.name not in wanted.names or field.type != wanted.field(field.name).type
    ]
    for field in gone:
        if count := await count_values(table, field):
            raise errors.OperationError(
                f"Column {field.name!r} ({field.type}) of table {table.name!r} is not part of "
                f"this application, but {count} rows have a value in it.",
                "Move the values elsewhere and drop the column, or rename it and give it to "
                "another table; then run again.",
            )
    if gone:
        await context.apply(op.DropColumns(*[field.name for field in gone]))


async def count_values(table: RecordedTable, field: pa.Field[Any]) -> int:
    """Returns how many rows have a value in a column."""
    if pa.types.is_null(field.type):
        return 0
    return await table.count_rows(f"`{field.name}` IS NOT NULL")


async def add_columns(context: Context, wanted: pa.Schema, fill: Mapping[str, Any]) -> None:
    """Adds the columns that are missing, and fills those that have a value for old rows."""
    have = context.table().schema
    missing = {field.name: field.type for field in wanted if field.name not in have.names}
    if missing:
        await context.apply(op.AddColumns(missing))
    for name in missing:
        if name in fill:
            await context.apply(op.Update({name: fill[name]}, where=f"`{name}` IS NULL"))


async def set_nullability(context: Context, wanted: pa.Schema) -> None:
    """Allows and forbids NULL as wanted; a NULL where none may be is not made up for."""
    have = context.table().schema
    wrong = [field for field in wanted if have.field(field.name).nullable != field.nullable]
    if allow := [field.name for field in wrong if field.nullable]:
        await context.apply(op.SetNullable(*allow))
    if forbid := [field.name for field in wrong if not field.nullable]:
        await context.apply(op.SetNotNull(*forbid))


async def set_indexes(context: Context, wanted: Mapping[str, str]) -> None:
    """Drops the indexes that are not wanted and makes those that are missing."""
    state = context.table().state
    found = state.indexes if state else ()
    for index in found:
        if wanted.get(index.columns[0]) != index.kind:
            await context.apply(op.DropIndex(index.columns[0]))
    for column, kind in wanted.items():
        await context.apply(op.CreateIndex(column, kind=kind))


def required(name: str, kind: pa.DataType) -> pa.Field[Any]:
    """Returns a NOT NULL field."""
    return pa.field(name, kind, nullable=False)


def btree(*columns: str) -> dict[str, str]:
    """Returns a BTree index for each column."""
    return dict.fromkeys(columns, "BTree")


def migration(
    table: str,
    schema: pa.Schema,
    indexes: Mapping[str, str],
    *,
    fill: Mapping[str, Any] | None = None,
    text_vectors: Sequence[str] = (),
) -> Migration:
    """Returns the migration of one table. Its shape is part of its checksum."""
    if "deletedAt" in schema.names:
        fill = {"deletedAt": 0, **(fill or {})}
    return Migration(
        table=table,
        version=VERSION,
        description="Equal a fresh database",
        up=partial(
            conform, schema=schema, indexes=indexes, fill=fill or {}, text_vectors=text_vectors
        ),
    )


users = migration(
    "users",
    pa.schema(
        [
            required("uid", pa.string()),
            pa.field("email", pa.string()),
            pa.field("phone", pa.string()),
            required("password", pa.string()),
            required("salt", pa.string()),
            pa.field("nickname", pa.string()),
            pa.field("avatar", pa.string()),
            required("status", pa.int32()),
            required("deletedAt", pa.int64()),
            required("createdAt", TIME),
            required("updatedAt", TIME),
        ]
    ),
    {**btree("uid", "email", "phone", "deletedAt"), "status": "Bitmap"},
)

memos = migration(
    "memos",
    pa.schema(
        [
            required("memoId", pa.string()),
            required("uid", pa.string()),
            pa.field("categoryId", pa.string()),
            required("content", pa.string()),
            pa.field("type", pa.string()),
            pa.field("source", pa.string()),
            pa.field("attachments", pa.list_(pa.string())),
            pa.field("tagIds", pa.list_(pa.string())),
            pa.field("isPublic", pa.bool_()),
            required("deletedAt", pa.int64()),
            required("embedding", TEXT_VECTOR),
            required("createdAt", TIME),
            required("updatedAt", TIME),
        ]
    ),
    btree("memoId", "uid", "categoryId", "createdAt", "updatedAt", "deletedAt"),
    fill={"type": "text", "isPublic": False},
    text_vectors=["embedding"],
)

memo_relations = migration(
    "memo_relations",
    pa.schema(
        [
            required("relationId", pa.string()),
            required("uid", pa.string()),
            required("sourceMemoId", pa.string()),
            required("targetMemoId", pa.string()),
            required("deletedAt", pa.int64()),
            required("createdAt", TIME),
        ]
    ),
    btree("relationId", "uid", "sourceMemoId", "targetMemoId", "deletedAt"),
)

categories = migration(
    "categories",
    pa.schema(
        [
            required("categoryId", pa.string()),
            required("uid", pa.string()),
            required("name", pa.string()),
            pa.field("color", pa.string()),
            required("deletedAt", pa.int64()),
            required("createdAt", TIME),
            required("updatedAt", TIME),
        ]
    ),
    btree("categoryId", "uid", "createdAt", "deletedAt"),
)

embedding_cache = migration(
    "embedding_cache",
    pa.schema(
        [
            required("modelHash", pa.string()),
            required("contentHash", pa.string()),
            required("embedding", TEXT_VECTOR),
            required("createdAt", TIME),
        ]
    ),
    btree("modelHash", "contentHash"),
    text_vectors=["embedding"],
)

attachments = migration(
    "attachments",
    pa.schema(
        [
            required("attachmentId", pa.string()),
            required("uid", pa.string()),
            required("filename", pa.string()),
            required("type", pa.string()),
            required("size", pa.int32()),
            required("storageType", pa.string()),
            required("path", pa.string()),
            pa.field("bucket", pa.string()),
            pa.field("prefix", pa.string()),
            pa.field("endpoint", pa.string()),
            pa.field("region", pa.string()),
            pa.field("isPublicBucket", pa.string()),
            pa.field("multimodalEmbedding", MULTIMODAL_VECTOR),
            pa.field("multimodalModelHash", pa.string()),
            pa.field("properties", pa.string()),
            required("deletedAt", pa.int64()),
            required("createdAt", TIME),
        ]
    ),
    btree("attachmentId", "uid", "createdAt", "deletedAt"),
    fill={"properties": "{}"},
)

multimodal_embedding_cache = migration(
    "multimodal_embedding_cache",
    pa.schema(
        [
            required("modelHash", pa.string()),
            required("contentHash", pa.string()),
            required("modalityType", pa.string()),
            required("embedding", MULTIMODAL_VECTOR),
            required("createdAt", TIME),
        ]
    ),
    {**btree("modelHash", "contentHash"), "modalityType": "Bitmap"},
)

daily_recommendations = migration(
    "daily_recommendations",
    pa.schema(
        [
            required("recommendationId", pa.string()),
            required("uid", pa.string()),
            required("date", pa.string()),
            required("memoIds", pa.list_(pa.string())),
            required("deletedAt", pa.int64()),
            required("createdAt", TIME),
        ]
    ),
    btree("deletedAt"),
)

ai_conversations = migration(
    "ai_conversations",
    pa.schema(
        [
            required("conversationId", pa.string()),
            required("uid", pa.string()),
            required("title", pa.string()),
            required("deletedAt", pa.int64()),
            required("createdAt", TIME),
            required("updatedAt", TIME),
        ]
    ),
    btree("deletedAt"),
)

ai_messages = migration(
    "ai_messages",
    pa.schema(
        [
            required("messageId", pa.string()),
            required("conversationId", pa.string()),
            required("role", pa.string()),
            required("content", pa.string()),
            pa.field("sources", pa.list_(SOURCE)),
            required("deletedAt", pa.int64()),
            required("createdAt", TIME),
        ]
    ),
    btree("deletedAt"),
)

tags = migration(
    "tags",
    pa.schema(
        [
            required("tagId", pa.string()),
            required("uid", pa.string()),
            required("name", pa.string()),
            pa.field("color", pa.string()),
            required("usageCount", pa.int32()),
            required("deletedAt", pa.int64()),
            required("createdAt", TIME),
            required("updatedAt", TIME),
        ]
    ),
    btree("tagId", "uid", "createdAt", "deletedAt"),
)

push_rules = migration(
    "push_rules",
    pa.schema(
        [
            required("id", pa.string()),
            required("uid", pa.string()),
            required("name", pa.string()),
            required("pushTime", pa.int32()),
            required("contentType", pa.string()),
            pa.field("channels", pa.string()),
            required("enabled", pa.int32()),
            required("deletedAt", pa.int64()),
            required("createdAt", TIME),
            required("updatedAt", TIME),
        ]
    ),
    btree("deletedAt"),
)
