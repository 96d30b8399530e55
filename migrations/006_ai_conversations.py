"""Version 6: conversations with the assistant, and their messages."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from aiomigrate import Migration, op

TIME = pa.timestamp("ms")
SOURCE = pa.struct(
    [
        pa.field("memoId", pa.string()),
        pa.field("content", pa.string()),
        pa.field("similarity", pa.float32()),
    ]
)
"""A memo that the assistant cites."""


def required(name: str, kind: pa.DataType) -> pa.Field[Any]:
    """Returns a NOT NULL field."""
    return pa.field(name, kind, nullable=False)


ai_conversations = Migration(
    table="ai_conversations",
    version=6,
    description="Create ai_conversations",
    operations=[
        op.CreateTable(
            pa.schema(
                [
                    required("conversationId", pa.string()),
                    required("uid", pa.string()),
                    required("title", pa.string()),
                    required("createdAt", TIME),
                    required("updatedAt", TIME),
                ]
            )
        )
    ],
)

ai_messages = Migration(
    table="ai_messages",
    version=6,
    description="Create ai_messages",
    operations=[
        op.CreateTable(
            pa.schema(
                [
                    required("messageId", pa.string()),
                    required("conversationId", pa.string()),
                    required("role", pa.string()),
                    required("content", pa.string()),
                    pa.field("sources", pa.list_(SOURCE)),
                    required("createdAt", TIME),
                ]
            )
        )
    ],
)
