"""Another peer: what many applications write by hand, `asyncio.gather` and a one-row version table.

One version for the whole database, compared at startup; all tables' changes at once, then the row
is replaced. No lease, no history: two that start together both migrate, and after a crash midway
everything runs again, on tables that have it already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import lancedb
import pyarrow as pa

from benchmarks import workload

TABLE = "schema_version"
_SCHEMA = pa.schema([pa.field("version", pa.int32(), nullable=False)])


async def start(path: str, names: Sequence[str]) -> None:
    """Does what its application does at startup: connect, compare, migrate, record."""
    connection = await lancedb.connect_async(path)
    if TABLE in (await connection.list_tables()).tables:
        table = await connection.open_table(TABLE)
    else:
        table = await connection.create_table(TABLE, [{"version": 0}], schema=_SCHEMA)
    (row,) = await table.query().to_list()
    if row["version"] < workload.VERSIONS:
        await asyncio.gather(*(_line(connection, name, row["version"]) for name in names))
        await table.update({"version": workload.VERSIONS})
    connection.close()


async def _line(connection: lancedb.AsyncConnection, name: str, current: int) -> None:
    if current == 0:
        table = await workload.create(connection, name)
    else:
        table = await connection.open_table(name)
    for version in range(max(current, 1) + 1, workload.VERSIONS + 1):
        await workload.alter(table, version)
