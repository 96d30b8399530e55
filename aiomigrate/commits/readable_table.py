"""Reads a table during a migration: the methods of `operations.target.Target` that do not write.

The base of `commits.tracked_table`, which opens the table and moves it to each new commit.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pyarrow as pa

from aiomigrate.errors import OperationError
from aiomigrate.schema.state import Index, TableState
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Table

OnProgress = Callable[[int, int | None, str], None]
"""Called with the progress of an operation: done, total if known, and a note."""


class ReadableTable:
    """A table whose rows a migration reads.

    Attributes:
        name: Its name.
    """

    def __init__(self, store: Store, name: str) -> None:
        """Initializes without I/O.

        Args:
            store: The database.
            name: The table.
        """
        self.name = name
        self._store = store
        self._table: Table | None = None
        self._state: TableState | None = None
        self._on_progress: OnProgress = lambda done, total, note: None

    @property
    def state(self) -> TableState | None:
        """Schema and indexes as last read, `None` if the table does not exist."""
        return self._state

    @property
    def table(self) -> Table:
        """The open handle.

        Raises:
            OperationError: The table does not exist.
        """
        if self._table is None:
            what = f"Table {self.name!r} does not exist."
            raise OperationError(what, "Create it in an earlier migration.")
        return self._table

    def _current(self) -> TableState:
        assert self._state is not None  # noqa: S101 - every caller holds an open table
        return self._state

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        """Reports the progress of the current operation, `total` being `None` if unknown."""
        self._on_progress(done, total, note)

    async def count_rows(self, where: str | None = None) -> int:
        """Returns the number of matching rows, of all rows by default."""
        return await self.table.count_rows(where)

    @property
    def schema(self) -> pa.Schema:
        """The table's Arrow schema as last read."""
        return self._current().schema

    async def uncovered(self, index: Index) -> int:
        """Returns the number of rows that an index does not cover."""
        return await self.table.uncovered(index)

    async def batches(
        self, where: str | None, columns: Sequence[str] | None, rows: int
    ) -> AsyncIterator[pa.RecordBatch]:
        """Yields the matching rows as of the start, in batches of at most `rows` rows."""
        async for batch in self.table.batches(where, columns, rows):
            yield batch

    async def scan(self, where: str, columns: Sequence[str]) -> AsyncIterator[pa.RecordBatch]:
        """Yields the matching rows of the latest table_version in the table's order, with `_rowid`.

        Args:
            where: SQL condition on the rows.
            columns: The columns to read besides `_rowid`.
        """
        other = await self._store.open(self.name)  # `table` moves to each new commit
        async for batch in other.scan(where, columns, _SCAN_ROWS):
            yield batch

    async def sample(self, where: str, columns: Sequence[str], rows: int, *, seed: str) -> pa.Table:
        """Returns a random sample of the matching rows.

        Args:
            where: SQL condition on the rows.
            columns: The columns to read.
            rows: The size of the sample; fewer are returned if fewer match.
            seed: The same seed and rows give the same sample.

        Returns:
            One Arrow table, empty if no row matches.
        """
        ids = await self.table.row_ids(where)
        chosen = sorted(random.Random(seed).sample(ids, min(rows, len(ids))))  # noqa: S311
        if not chosen:
            return (await self.table.read("false", columns)).slice(0, 0)
        listed = ", ".join(map(str, chosen))
        return await self.table.read(f"_rowid IN ({listed})", columns)

    async def nearest(
        self, column: str, vectors: Sequence[Sequence[float]], rows: int, key: str, where: str
    ) -> list[list[Any]]:
        """Returns the keys of the nearest rows for each vector.

        Args:
            column: The vector column.
            vectors: The query vectors.
            rows: How many rows to return per vector.
            key: The key column.
            where: SQL condition on the rows.
        """
        found: list[list[Any]] = []
        for done, vector in enumerate(vectors):
            self.progress(done, len(vectors), "comparing neighbours")
            found.append(await self.table.nearest(column, vector, rows, key, where))
        return found

    def free_bytes(self) -> int | None:
        """Returns the free bytes of the disk, `None` if they are unknown."""
        return self._store.free_bytes()


_SCAN_ROWS = 1024
