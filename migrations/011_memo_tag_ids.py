"""Version 11: memos carry the ids of their tags.

The type is given as an Arrow type. LanceDB would take the SQL expression `NULL` too, but makes a
column of Null type of it, which nothing can ever be written to (see version 14).
"""

from __future__ import annotations

import pyarrow as pa

from aiomigrate import Migration, op

memos = Migration(
    table="memos",
    version=11,
    description="Add tagIds",
    operations=[op.AddColumns({"tagIds": pa.list_(pa.string())})],
)
