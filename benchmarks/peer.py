"""The peer: the algorithm of the TypeScript system that aiomigrate succeeds, in plain Python.

Tables one after another. Per table a filtered query of the metadata table; per pending migration
its work, the query again, a delete and an add. Validation repeats a query per table. Not tuned,
not handicapped: no dry run, no logging, and a handle of the metadata table that is kept open.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import lancedb
import lancedb.index
import pyarrow as pa

from benchmarks import workload

METADATA = "table_migrations"
METADATA_SCHEMA = pa.schema(
    [
        pa.field("tableName", pa.string(), nullable=False),
        pa.field("currentVersion", pa.int32(), nullable=False),
        pa.field("lastMigratedAt", pa.timestamp("ms"), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerMigration:
    """One version of one table.

    Attributes:
        table: The table.
        version: Its new version.
        up: Makes it.
    """

    table: str
    version: int
    up: Callable[[lancedb.AsyncConnection], Awaitable[None]]


@dataclass
class Peer:
    """Migrates one database.

    Attributes:
        migrations: All migrations, by table in order of version.
    """

    migrations: dict[str, list[PeerMigration]]
    _metadata: lancedb.AsyncTable | None = field(default=None, init=False)

    async def initialize(self, connection: lancedb.AsyncConnection) -> None:
        """Makes the metadata table if missing, then migrates table after table."""
        self._metadata = await self._ensure(connection)
        for table, migrations in self.migrations.items():
            current = await self._version(table)
            if current == migrations[-1].version:
                continue
            for migration in migrations:
                if migration.version > current:
                    await migration.up(connection)
                    await self._record(table, migration.version)

    async def validate(self) -> list[str]:
        """Returns the tables that are not at their newest version."""
        errors = []
        for table, migrations in self.migrations.items():
            current, target = await self._version(table), migrations[-1].version
            if current != target:
                errors.append(f"{table}: current v{current}, target v{target}")
        return errors

    async def _ensure(self, connection: lancedb.AsyncConnection) -> lancedb.AsyncTable:
        if METADATA in (await connection.list_tables()).tables:
            return await connection.open_table(METADATA)
        table = await connection.create_table(METADATA, schema=METADATA_SCHEMA)
        await table.create_index("tableName", config=lancedb.index.BTree())
        return table

    async def _rows(self, table: str) -> list[dict[str, object]]:
        assert self._metadata is not None
        return await self._metadata.query().where(f"tableName = '{table}'").to_list()

    async def _version(self, table: str) -> int:
        rows = await self._rows(table)
        version = rows[0]["currentVersion"] if rows else 0
        assert isinstance(version, int)
        return version

    async def _record(self, table: str, version: int) -> None:
        assert self._metadata is not None
        if await self._rows(table):
            await self._metadata.delete(f"tableName = '{table}'")
        row = {
            "tableName": table,
            "currentVersion": version,
            "lastMigratedAt": dt.datetime.now(dt.UTC).replace(tzinfo=None),
        }
        await self._metadata.add(pa.Table.from_pylist([row], schema=METADATA_SCHEMA))


async def start(path: str, peer: Peer) -> None:
    """Does what its application does at startup: connect, initialize, validate."""
    connection = await lancedb.connect_async(path)
    await peer.initialize(connection)
    errors = await peer.validate()
    assert not errors, errors
    connection.close()


def peer_of(names: Sequence[str]) -> Peer:
    """Returns a peer with the workload of these tables."""
    return Peer(
        {
            name: [
                PeerMigration(table=name, version=version, up=_up(name, version))
                for version in range(1, workload.VERSIONS + 1)
            ]
            for name in names
        }
    )


def _up(name: str, version: int) -> Callable[[lancedb.AsyncConnection], Awaitable[None]]:
    async def up(connection: lancedb.AsyncConnection) -> None:
        if version == 1:
            await workload.create(connection, name)
        else:
            await workload.alter(await connection.open_table(name), version)

    return up
