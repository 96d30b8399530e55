"""Version 10: tags.

There is no version 9: numbers may have gaps, and one that was withdrawn is never used again.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from aiomigrate import Migration, op

TIME = pa.timestamp("ms")


def required(name: str, kind: pa.DataType) -> pa.Field[Any]:
    """Returns a NOT NULL field."""
    return pa.field(name, kind, nullable=False)


tags = Migration(
    table="tags",
    version=10,
    description="Create tags",
    operations=[
        op.CreateTable(
            pa.schema(
                [
                    required("tagId", pa.string()),
                    required("uid", pa.string()),
                    required("name", pa.string()),
                    pa.field("color", pa.string()),
                    required("usageCount", pa.int32()),
                    required("createdAt", TIME),
                    required("updatedAt", TIME),
                ]
            )
        )
    ],
)
