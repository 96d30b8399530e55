"""The floor: the same LanceDB calls by hand, concurrent, with no ledger, lease or comparison.

No migration tool can be faster; what it costs above this is its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import lancedb

from benchmarks import workload


async def start(path: str, head: str) -> None:
    """Connects and reads one small table: all that a start with nothing to do must read."""
    connection = await lancedb.connect_async(path)
    table = await connection.open_table(head)
    await table.query().to_arrow()
    connection.close()


async def first_run(path: str, names: Sequence[str], *, concurrency: int) -> None:
    """Makes all versions of all tables; each table's calls share one handle."""
    connection = await lancedb.connect_async(path)
    slots = anyio.CapacityLimiter(concurrency)

    async def line(name: str) -> None:
        async with slots:
            table = await workload.create(connection, name)
        for version in range(2, workload.VERSIONS + 1):
            async with slots:
                await workload.alter(table, version)

    async with anyio.create_task_group() as group:
        for name in names:
            group.start_soon(line, name)
    connection.close()
