"""Version 15: rules for notifications."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from aiomigrate import Migration, op

TIME = pa.timestamp("ms")


def required(name: str, kind: pa.DataType) -> pa.Field[Any]:
    """Returns a NOT NULL field."""
    return pa.field(name, kind, nullable=False)


push_rules = Migration(
    table="push_rules",
    version=15,
    description="Create push_rules",
    operations=[
        op.CreateTable(
            pa.schema(
                [
                    required("id", pa.string()),
                    required("uid", pa.string()),
                    required("name", pa.string()),
                    required("pushTime", pa.int32()),
                    required("contentType", pa.string()),
                    pa.field("channels", pa.string()),
                    required("enabled", pa.int32()),
                    required("createdAt", TIME),
                    required("updatedAt", TIME),
                ]
            )
        )
    ],
)
