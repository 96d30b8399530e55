"""Version 14: repair memos.tagIds where a broken release made it with the Null type.

What is to be done depends on what is found, so this is a function. It changes the table through
the context, which records each commit: after a crash the table is returned to where it began.
"""

from __future__ import annotations

import pyarrow as pa

from aiomigrate import Context, Migration, op


async def repair_tag_ids(context: Context) -> None:
    """Replaces a Null-typed tagIds, which holds nothing, by a list of text."""
    schema = context.table().schema
    position = schema.get_field_index("tagIds")
    if position >= 0 and pa.types.is_null(schema.field(position).type):
        await context.apply(op.DropColumns("tagIds"))
    await context.apply(op.AddColumns({"tagIds": pa.list_(pa.string())}))


memos = Migration(
    table="memos",
    version=14,
    description="Repair tagIds of Null type",
    up=repair_tag_ids,
)
