"""Opens a journal again whose newest versions cannot be read.

A failed write of the disk can leave a version that no later one can be read without. What is lost
by going back is decided in `planning.lost_events`, and recorded by `runs.repair`. Preventing it is
for `ledger.read_back`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from aiomigrate.errors import StoreError, TableVersionGoneError
from aiomigrate.ledger.read_back import damaged
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Table


@dataclass(frozen=True, slots=True)
class Damage:
    """A table whose newest versions cannot be read.

    Attributes:
        latest: The latest table_version.
        readable: The last one that can be read.
        schema: The schema of `readable`.
        content: The rows of `readable`.
        rescued: The rows of later versions that can be read one by one.
        lost: The number of rows that cannot.
    """

    latest: int
    readable: int
    schema: pa.Schema
    content: pa.Table
    rescued: pa.Table
    lost: int

    @property
    def is_total(self) -> bool:
        """Whether no event can be read, so that the whole history is lost."""
        return not self.content.num_rows and not self.rescued.num_rows

    def rows(self) -> pa.Table:
        """Returns every row that can be read."""
        rows = pa.concat_tables([self.content, self.rescued], promote_options="default")
        return rows.select(self.schema.names).cast(self.schema)


async def find_damage(table: Table, key: str) -> Damage | None:
    """Returns what is damaged in a table, at the version of its handle.

    Args:
        table: The table.
        key: The column that identifies a row.

    Returns:
        `None` if the table can be read, or if none of its versions can.

    Raises:
        StoreError: The table cannot be opened.
    """
    latest = await table.version()
    if await _read(table) is not None:
        return None
    for version in range(latest - 1, 0, -1):
        try:
            older = await table.at(version)
            content = await _read(older)
        except TableVersionGoneError:
            return None
        except StoreError:
            continue  # its manifest is damaged
        if content is not None:
            break
    else:
        return None
    found, lost = await _rescue(table, 0, await table.count_rows())
    have = set(content[key].to_pylist())
    rescued = [part.filter(pa.array([k not in have for k in part[key].to_pylist()], pa.bool_()))
               for part in found]  # fmt: skip
    return Damage(
        latest,
        version,
        (await older.state(indexed=False)).schema,
        content,
        pa.concat_tables([content.slice(0, 0), *rescued], promote_options="default"),
        lost,
    )


async def _read(table: Table) -> pa.Table | None:
    for _ in range(_READ_ATTEMPTS):
        try:
            return await table.read()
        except StoreError:
            continue
    return None


async def _rescue(table: Table, start: int, count: int) -> tuple[list[pa.Table], int]:
    """Returns the rows that can be read of a range, and the number of those that cannot."""
    if not count:
        return [], 0
    names = (await table.state(indexed=False)).schema.names
    try:
        return [await table.window(names, start, count)], 0
    except StoreError:
        if count == 1:
            return [], 1
    half = count // 2
    first, lost_first = await _rescue(table, start, half)
    second, lost_second = await _rescue(table, start + half, count - half)
    return [*first, *second], lost_first + lost_second


async def reopen(store: Store, name: str, rows: pa.Table, latest: int) -> Table:
    """Replaces a damaged table by the rows that can be read, in one commit.

    The caller holds the lease. A crash leaves the table as it was, or opened again.

    Args:
        store: The database.
        name: The table.
        rows: The rows that can be read.
        latest: The latest table_version, which is damaged.

    Raises:
        StoreError: Another process committed meanwhile; its commit was not discarded.
    """
    table = await store.create(name, rows.schema, rows, overwrite=True)
    made = await table.version()
    if made != latest + 1:
        await table.restore(made - 1)
        raise damaged(name)
    return table


_READ_ATTEMPTS = 3
