"""Version 8: memos can be public; those that are there are not.

A name with capitals is quoted in SQL, or it would be read in lower case.
"""

from __future__ import annotations

import pyarrow as pa

from aiomigrate import Migration, op

memos = Migration(
    table="memos",
    version=8,
    description="Add isPublic, false by default",
    operations=[
        op.AddColumns({"isPublic": pa.bool_()}),
        op.Update({"isPublic": False}, where="`isPublic` IS NULL"),
    ],
)
