"""Version 7: attachments have properties, a JSON object as text; empty for those that are there."""

from __future__ import annotations

import pyarrow as pa

from aiomigrate import Migration, op

attachments = Migration(
    table="attachments",
    version=7,
    description="Add properties, an empty object by default",
    operations=[
        op.AddColumns({"properties": pa.string()}),
        op.Update({"properties": "{}"}, where="properties IS NULL"),
    ],
)
