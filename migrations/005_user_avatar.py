"""Version 5: users have an avatar.

Some databases of the first release have the column already: an effect that is there is left as it
is.
"""

from __future__ import annotations

import pyarrow as pa

from aiomigrate import Migration, op

users = Migration(
    table="users",
    version=5,
    description="Add avatar",
    operations=[op.AddColumns({"avatar": pa.string()})],
)
