"""Every call that aiomigrate makes of LanceDB, by hand, deciding nothing.

The floor changes tables; this also reads them before and after, and keeps a ledger, as often as
aiomigrate does. What it takes above the floor is the price of the protocol; what aiomigrate takes
above it is Python's. It protects nothing: no lease is judged, no failure looked at.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import anyio
import lancedb

from aiomigrate import Event
from aiomigrate.ledger.codec import (
    HEAD_SCHEMA,
    JOURNAL_SCHEMA,
    events_to_arrow,
    lease_row_name,
    rows_to_arrow,
)
from aiomigrate.ledger.records import RUN_LEASE, HeadRow, Kind
from benchmarks import workload
from benchmarks.setting import HEAD, JOURNAL

_LEASE = lease_row_name(RUN_LEASE)


class Journal:
    """Group commit: one append holds the rows of all who asked while the one before was made."""

    def __init__(self, table: lancedb.AsyncTable) -> None:
        self._table = table
        self._lock = anyio.Lock()
        self._waiting = [_event("", 0)]

    async def record(self, name: str, version: int) -> None:
        """Makes durable what aiomigrate tells of a migration: three events."""
        event = _event(name, version)
        self._waiting += [event, event, event]
        async with self._lock:
            if not any(one is event for one in self._waiting):
                return  # the one before took it along
            batch, self._waiting = self._waiting, []
            await self._table.add(events_to_arrow(batch, "by hand"))


async def grow(path: str, names: Sequence[str], versions: range, *, concurrency: int) -> None:
    """Makes some versions of `workload.grown`, of tables and a ledger that are there."""
    connection = await lancedb.connect_async(path)
    head = await connection.open_table(HEAD)
    journal = await take(connection, reads=3, fences=True)
    log = Journal(journal)
    slots = anyio.CapacityLimiter(concurrency)

    async def line(name: str) -> None:
        async with slots:
            table = await connection.open_table(name)
            await table.version()
            await table.schema()
            await table.list_indices()
        for version in versions:
            await log.record(name, version)
            async with slots:
                await workload.grow(table, version)
                await table.schema()

    async with anyio.create_task_group() as group:
        for name in names:
            group.start_soon(line, name)
    await _end(head, journal, names, versions[-1])
    connection.close()


async def first_run(path: str, names: Sequence[str], *, concurrency: int) -> None:
    """Makes all versions of all tables, and a ledger."""
    connection = await lancedb.connect_async(path)
    head = await connection.create_table(HEAD, schema=HEAD_SCHEMA)
    await head.add(rows_to_arrow([_row(_LEASE, 0), *(_row(name, 0) for name in names)]))
    await connection.create_table(JOURNAL, schema=JOURNAL_SCHEMA)
    journal = await connection.open_table(JOURNAL)
    log = Journal(journal)
    slots = anyio.CapacityLimiter(concurrency)

    async def line(name: str) -> None:
        await log.record(name, 1)
        async with slots:
            table = await workload.create(connection, name)
            await table.version()
            await table.schema()
        for version in range(2, workload.VERSIONS + 1):
            await log.record(name, version)
            async with slots:
                await workload.alter(table, version)
                await table.schema()

    async with anyio.create_task_group() as group:
        for name in names:
            group.start_soon(line, name)
    await _end(head, journal, names, workload.VERSIONS)
    connection.close()


async def take(
    connection: lancedb.AsyncConnection, *, reads: int, fences: bool = False
) -> lancedb.AsyncTable:
    """Reads the ledger, takes the lease and fences who held it before; returns the journal."""
    for _ in range(reads):
        await (await connection.open_table(HEAD)).query().to_arrow()
    await (await connection.open_table(JOURNAL)).query().to_arrow()
    head = await connection.open_table(HEAD)
    await head.update({"epoch": 2}, where=f"tableName = '{_LEASE}'")
    if fences:
        await head.update({"epoch": 2}, where="tableName <> ''")
    return await connection.open_table(JOURNAL)


async def adopt(connection: lancedb.AsyncConnection) -> lancedb.AsyncTable:
    """Makes the predecessor's head fit, and a journal; returns the head."""
    head = await connection.open_table(HEAD)
    await head.query().to_arrow()

    async def found() -> None:
        journal = await connection.create_table(JOURNAL, schema=JOURNAL_SCHEMA)
        merge = journal.merge_insert("id").when_not_matched_insert_all()
        await merge.execute(events_to_arrow([_event("", 0)], "by hand"))

    async def fit() -> None:
        for index in await head.list_indices():
            await head.drop_index(index.name)
        there = (await head.schema()).names
        fields = [field for field in HEAD_SCHEMA if field.name not in there]
        await head.add_columns([field.remove_metadata() for field in fields])

    async with anyio.create_task_group() as group:
        group.start_soon(found)
        group.start_soon(fit)
    merge = head.merge_insert("tableName").when_not_matched_insert_all()
    await merge.execute(rows_to_arrow([_row(_LEASE, 0)]))
    return head


async def own(head: lancedb.AsyncTable, names: Sequence[str]) -> None:
    """Takes rows over that another system wrote, and makes those that are missing."""
    merge = head.merge_insert("tableName").when_not_matched_insert_all()
    await merge.execute(rows_to_arrow([_row(name, 0) for name in names]))
    await head.update({"epoch": 2}, where="epoch IS NULL")
    await head.query().select(["tableName"]).to_arrow()


async def _end(
    head: lancedb.AsyncTable, journal: lancedb.AsyncTable, names: Sequence[str], version: int
) -> None:
    """The last events, and the head that follows."""
    await journal.add(events_to_arrow([_event(name, version) for name in names], "by hand"))
    await follow(head, names, version)


async def follow(head: lancedb.AsyncTable, names: Sequence[str], version: int) -> None:
    """Lets the head follow, and gives the lease back."""
    await head.checkout_latest()  # type: ignore[no-untyped-call]
    merge = head.merge_insert("tableName").when_matched_update_all(where="target.epoch = 2")
    await merge.execute(rows_to_arrow([_row(_LEASE, 0), *(_row(name, version) for name in names)]))


def _event(name: str, version: int) -> Event:
    return Event(
        lease=RUN_LEASE, epoch=2, seq=version, at=dt.datetime.now(dt.UTC), kind=Kind.APPLIED,
        run_id="0123abcd", line=name, version=version, description="Add a column",
        checksum="0" * 64, algorithm="1", source="by hand", host="here", pid=1, tool="0",
        tables={name: {"before": version, "after": version + 1, "shape": _SHAPE}},
        detail={"table": name, "base": version, "effect": _SHAPE},
    )  # fmt: skip


_SHAPE = {"fields": {field.name: str(field.type) for field in workload.SCHEMA}, "indexes": []}


def _row(name: str, version: int) -> HeadRow:
    return HeadRow(
        name=name, version=version, migrated_at=dt.datetime.now(dt.UTC), epoch=2, owner="by hand",
        beat=0, phase="", digest="0" * 32, lease=RUN_LEASE,
    )  # fmt: skip
