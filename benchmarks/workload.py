"""The history that all contenders bring to their databases, each in its own words.

Four metadata-only versions per table, each one LanceDB call: create, add a column, add another,
rename one. Here they are given to aiomigrate; `floor` and `peer` make the same calls by hand.
`grown` is another, as long as you like. aiomigrate is imported where it is given something, so that
it is no part of the floor's process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lancedb
import pyarrow as pa

if TYPE_CHECKING:
    from aiomigrate import Migration

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uid", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("createdAt", pa.timestamp("ms")),
    ]
)
TAGS: Mapping[str, pa.DataType] = {"tags": pa.list_(pa.string())}
SOURCE: Mapping[str, pa.DataType] = {"source": pa.string(), "pinned": pa.bool_()}
RENAMED = {"title": "name"}

VERSIONS = 4


def table_names(count: int) -> list[str]:
    """Returns the names of the workload's tables."""
    return [f"table_{number:04}" for number in range(count)]


def migrations(names: Sequence[str], versions: int = VERSIONS) -> list[Migration]:
    """Returns the history of these tables up to a version, as aiomigrate is given it."""
    from aiomigrate import Migration, op

    operations: Mapping[int, op.Operation] = {
        1: op.CreateTable(SCHEMA),
        2: op.AddColumns(TAGS),
        3: op.AddColumns(SOURCE),
        4: op.RenameColumns(RENAMED),
    }
    return [
        Migration(table=name, version=version, operations=[operations[version]])
        for name in names
        for version in range(1, versions + 1)
    ]


def grown(name: str, versions: int) -> list[Migration]:
    """Returns a line of one table: made by version 1, a NULL column more by each that follows."""
    from aiomigrate import Migration, op

    return [
        Migration(
            table=name,
            version=version,
            operations=[op.CreateTable(SCHEMA) if version == 1 else op.AddColumns(column(version))],
        )
        for version in range(1, versions + 1)
    ]


def column(version: int) -> Mapping[str, pa.DataType]:
    """Returns the column that a version of `grown` adds."""
    return {f"column_{version}": pa.string()}


async def grow(table: lancedb.AsyncTable, version: int) -> None:
    """Makes a version of `grown`, from 2 on, by hand."""
    await table.add_columns([pa.field(name, kind) for name, kind in column(version).items()])


async def create(connection: lancedb.AsyncConnection, name: str) -> lancedb.AsyncTable:
    """Makes version 1 of a table."""
    return await connection.create_table(name, schema=SCHEMA)


async def alter(table: lancedb.AsyncTable, version: int) -> None:
    """Makes version 2, 3 or 4 of a table."""
    if version == VERSIONS:
        alterations: list[Any] = [{"path": a, "rename": b} for a, b in RENAMED.items()]
        await table.alter_columns(*alterations)
    else:
        columns = TAGS if version == 2 else SOURCE
        await table.add_columns([pa.field(name, kind) for name, kind in columns.items()])
