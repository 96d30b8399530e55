"""Version 16: memos know where they were written; unknown for those that are there."""

from __future__ import annotations

import pyarrow as pa

from aiomigrate import Migration, op

memos = Migration(
    table="memos",
    version=16,
    description="Add source",
    operations=[op.AddColumns({"source": pa.string()})],
)
