"""Reads back what was written to a metadata table, and takes back what cannot be read.

LanceDB does not notice every failed write: a data file can be shorter than its commit says, and
then no later version of the table can be read either (measured, with a disk that returns EIO).
Opening a journal that is already damaged again is for `ledger.damage`.
"""

from __future__ import annotations

import pyarrow as pa

from aiomigrate.errors import StoreError
from aiomigrate.store.table import Table

READ_BACK_ATTEMPTS = 5
"""Attempts to write something that cannot be read back."""

_READ_ATTEMPTS = 3


async def reads_back(table: Table, written: pa.Table | None = None) -> bool:
    """Returns whether the newest rows of a table can be read and are those written.

    Args:
        table: The table, at the version of the commit.
        written: The rows that the commit appended; by default all rows are read, whatever they
            are.
    """
    for _ in range(_READ_ATTEMPTS):  # reading may fail too, for the moment
        try:
            count = await table.count_rows()
            if written is None:
                return len(await table.read()) == count
            start = count - len(written)
            found = await table.window(written.schema.names, start, len(written))
        except StoreError:
            continue
        return bool(found.equals(written))
    return False


async def take_back(table: Table, version: int, *, to: int | None = None) -> None:
    """Restores a table to its version before a commit that cannot be read.

    Args:
        table: The table, at the version of that commit.
        version: The table_version of that commit.
        to: The table_version to restore, by default the one before.

    Raises:
        StoreError: Another process has committed on top of it; its commit was not discarded.
    """
    restored = await table.restore(version - 1 if to is None else to)
    if restored != version + 1:
        await table.restore(restored - 1)
        raise damaged(table.name)


def damaged(name: str) -> StoreError:
    """Returns the error for a metadata table of which written rows cannot be read."""
    return StoreError(
        f"what was written to {name!r} could not be read back.",
        "Check the disk, then run `aiomigrate repair`.",
    )
