"""Version 20: version 19 once more for memos, which an early release of it left out.

Where 19 has done it there is nothing left to do: operations look for their effect first.
"""

from __future__ import annotations

import pyarrow as pa

from aiomigrate import Migration, op

memos = Migration(
    table="memos",
    version=20,
    description="Add deletedAt with its index where version 19 did not",
    operations=[
        op.AddColumns({"deletedAt": pa.int64()}),
        op.Update({"deletedAt": 0}, where="`deletedAt` IS NULL"),
        op.SetNotNull("deletedAt"),
        op.CreateIndex("deletedAt"),
    ],
)
