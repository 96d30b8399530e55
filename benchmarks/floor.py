"""The floor: the same LanceDB calls by hand, concurrent, with no ledger, lease or comparison.

No migration tool can be faster; what it costs above this is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio
import lancedb

from benchmarks import workload

Options = Mapping[str, str] | None


async def start(path: str, head: str, options: Options = None) -> None:
    """Connects and reads one small table: all that a start with nothing to do must read."""
    connection = await _connect(path, options)
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


async def grow(
    path: str,
    names: Sequence[str],
    versions: range,
    *,
    concurrency: int,
    options: Options = None,
) -> None:
    """Makes some versions of `workload.grown`: of new tables from 1 on, else of those there are."""
    connection = await _connect(path, options)
    slots = anyio.CapacityLimiter(concurrency)

    async def line(name: str) -> None:
        async with slots:
            if versions.start == 1:
                table = await workload.create(connection, name)
            else:
                table = await connection.open_table(name)
        for version in range(max(versions.start, 2), versions.stop):
            async with slots:
                await workload.grow(table, version)

    async with anyio.create_task_group() as group:
        for name in names:
            group.start_soon(line, name)
    connection.close()


async def _connect(path: str, options: Options) -> lancedb.AsyncConnection:
    return await lancedb.connect_async(path, storage_options=None if not options else dict(options))
