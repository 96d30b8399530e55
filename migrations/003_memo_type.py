"""Version 3: memos have a type; those that are there are text.

A column is added as metadata, NULL in every row, and then filled: writers that do not know it yet
go on working. It stays nullable for their sake.
"""

from __future__ import annotations

import pyarrow as pa

from aiomigrate import Migration, op

memos = Migration(
    table="memos",
    version=3,
    description="Add type, 'text' where nothing else is known",
    operations=[
        op.AddColumns({"type": pa.string()}),
        op.Update({"type": "text"}, where="type IS NULL"),
    ],
)
