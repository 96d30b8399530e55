"""Version 19: rows are marked as deleted instead of being removed.

The application recorded this under a line of its own, `_all_tables`. A NOT NULL column takes three
steps: add it, fill it, then forbid NULL. Tables that do not exist are passed over.
"""

from __future__ import annotations

import pyarrow as pa

from aiomigrate import Migration, op

TABLES = {
    "users": 1,
    "memos": 1,
    "memo_relations": 1,
    "categories": 1,
    "attachments": 1,
    "daily_recommendations": 1,
    "ai_conversations": 6,
    "ai_messages": 6,
    "tags": 10,
    "push_rules": 15,
}
"""The tables concerned, and the version that creates each."""


def soft_delete(table: str) -> list[op.Operation]:
    """Returns what gives a table an indexed `deletedAt`, 0 for a row that is not deleted."""
    skip = op.Missing.SKIP
    return [
        op.AddColumns({"deletedAt": pa.int64()}, table=table, when_missing=skip),
        op.Update({"deletedAt": 0}, where="`deletedAt` IS NULL", table=table, when_missing=skip),
        op.SetNotNull("deletedAt", table=table, when_missing=skip),
        op.CreateIndex("deletedAt", table=table, when_missing=skip),
    ]


all_tables = Migration(
    line="_all_tables",
    version=19,
    description="Add deletedAt with its index everywhere",
    touches=tuple(TABLES),
    depends_on=TABLES,
    operations=[operation for table in TABLES for operation in soft_delete(table)],
)
