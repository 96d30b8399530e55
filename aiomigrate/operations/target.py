"""The protocol through which an operation reads and changes a table.

`commits.table_target` implements it. An operation has no other access to the store.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from aiomigrate.schema.state import Index, TableState

Transform = Callable[[pa.RecordBatch], Awaitable[pa.RecordBatch]]
"""From a batch of rows to the batch that replaces it."""


class Target(Protocol):
    """A table that one migration changes.

    Each change is one commit, which is recorded, guarded by the lease and shielded from
    cancellation. Methods that change the table raise `StoreError` if LanceDB fails.
    """

    @property
    def name(self) -> str:
        """The table's name."""

    @property
    def state(self) -> TableState | None:
        """The table as last read, `None` if it does not exist."""

    @property
    def witness(self) -> str:
        """The name of the column that is reserved for this operation of this migration."""

    def sibling(self, name: str) -> Target:
        """Returns another table that the operation names."""

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        """Reports the progress of the operation.

        Args:
            done: Finished units, such as rows.
            total: All units, `None` if not known.
            note: What it is working on.
        """

    def add_fact(self, topic: str, what: Any) -> None:
        """Adds a JSON value to the migration's report and history."""

    async def create(self, schema: pa.Schema, rows: pa.Table | None = None) -> None:
        """Creates the table, empty or with rows."""

    async def drop(self) -> None:
        """Drops the table."""

    async def overwrite(self, schema: pa.Schema, transform: Transform, *, batch_rows: int) -> None:
        """Replaces all rows, batch by batch, in one commit."""

    async def copy_to(self, name: str) -> None:
        """Copies the table, its rows and its indexes, to another name."""

    async def add_columns(self, fields: Sequence[pa.Field[Any]]) -> None:
        """Adds nullable columns; an existing struct gets the fields that it lacks."""

    async def drop_columns(self, names: Sequence[str]) -> None:
        """Drops columns, by path."""

    async def alter_columns(self, alterations: Sequence[Mapping[str, Any]]) -> None:
        """Renames columns, or changes their nullability or their type, in one commit."""

    async def set_metadata(self, column: str, metadata: Mapping[str, str | None]) -> None:
        """Sets entries of a column's metadata; `None` removes an entry."""

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> None:
        """Creates an index."""

    async def cover(self, index: Index, timeout_s: float) -> None:
        """Updates an index until it covers the rows present now; raises after `timeout_s`."""

    async def drop_index(self, name: str) -> None:
        """Drops an index."""

    async def update(
        self,
        *,
        values: Mapping[str, Any],
        sql: Mapping[str, str],
        where: str | None,
        unless_live: bool = False,
    ) -> int | None:
        """Sets columns of the matching rows in one commit; returns how many.

        With `unless_live` it does nothing and returns `None` if the commit would block other
        writers.
        """

    async def update_in_batches(
        self,
        *,
        values: Mapping[str, Any],
        sql: Mapping[str, str],
        where: str,
        batch_rows: int | None,
    ) -> int:
        """Sets columns so that no row matches any more; returns how many rows it changed."""

    async def delete(self, where: str) -> int:
        """Deletes the matching rows; returns how many."""

    async def insert_missing(self, key: str, rows: pa.Table) -> int:
        """Inserts the rows whose key the table does not contain; returns how many."""

    async def optimize(self, cleanup_older_than_s: float | None) -> None:
        """Compacts the table, updates its indexes, and removes versions that are older."""

    async def fill(self, filling: Any) -> int:
        """Fills a column by a function (see `operations.fill.Filling`); returns the rows filled."""

    async def compute(
        self,
        function: Any,
        source: str,
        fields: Sequence[pa.Field[Any]],
        *,
        batch_rows: int,
        workers: int,
    ) -> None:
        """Adds columns that a Ray cluster computes, in one commit."""

    async def ask(
        self, function: Callable[..., Any], values: Sequence[Any], kind: pa.DataType, pace: Any
    ) -> list[Any]:
        """Calls a function with values as `fill` does; returns its results as Python values."""

    async def uncovered(self, index: Index) -> int:
        """Returns the number of rows that an index does not cover."""

    async def sample(self, where: str, columns: Sequence[str], rows: int, *, seed: str) -> pa.Table:
        """Returns some of the matching rows; the same for the same seed and rows."""

    async def nearest(
        self, column: str, vectors: Sequence[Sequence[float]], rows: int, key: str, where: str
    ) -> list[list[Any]]:
        """Returns, for each vector, the keys of the nearest rows."""

    async def set_schema_metadata(self, metadata: Mapping[str, str | None]) -> None:
        """Sets entries of the schema's metadata; `None` removes an entry."""

    def free_bytes(self) -> int | None:
        """Returns the free disk space, `None` if it is not known."""

    async def is_live(self) -> bool:
        """Returns whether other processes commit to it, so that long commits would block them."""

    async def count_rows(self, where: str | None = None) -> int:
        """Returns the number of matching rows."""

    def batches(
        self, where: str | None, columns: Sequence[str] | None, rows: int
    ) -> AsyncIterator[pa.RecordBatch]:
        """Yields the matching rows, as they are when it is called, in batches of `rows`."""
