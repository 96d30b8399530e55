"""The protocol through which an operation changes a table.

`commits.tracked_table` implements it. An operation sees no other side of the store.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from aiomigrate.schema.state import Index, TableState

Transform = Callable[[pa.RecordBatch], Awaitable[pa.RecordBatch]]
"""What rows become, batch by batch."""


class Target(Protocol):
    """A table in the executor's hands: each change is one recorded, shielded commit."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> TableState | None:
        """The table as last read, `None` if it does not exist."""

    @property
    def witness(self) -> str:
        """A column name that belongs to this operation of this migration alone."""

    def sibling(self, name: str) -> Target:
        """Returns another table that the operation names."""

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        """Tells how far the operation is."""

    def add_fact(self, topic: str, what: Any) -> None:
        """Adds a JSON value to the migration's report and history."""

    async def create(self, schema: pa.Schema, rows: pa.Table | None = None) -> None: ...

    async def drop(self) -> None: ...

    async def overwrite(
        self, schema: pa.Schema, transform: Transform, *, batch_rows: int
    ) -> None: ...

    async def copy_to(self, name: str) -> None: ...

    async def add_columns(self, fields: Sequence[pa.Field[Any]]) -> None: ...

    async def drop_columns(self, names: Sequence[str]) -> None: ...

    async def alter_columns(self, alterations: Sequence[Mapping[str, Any]]) -> None: ...

    async def set_metadata(self, column: str, metadata: Mapping[str, str | None]) -> None: ...

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> None: ...

    async def cover(self, index: Index, timeout_s: float) -> None: ...

    async def drop_index(self, name: str) -> None: ...

    async def update(
        self,
        *,
        values: Mapping[str, Any],
        sql: Mapping[str, str],
        where: str | None,
        unless_live: bool = False,
    ) -> int | None: ...

    async def update_in_batches(
        self,
        *,
        values: Mapping[str, Any],
        sql: Mapping[str, str],
        where: str,
        batch_rows: int | None,
    ) -> int: ...

    async def delete(self, where: str) -> int: ...

    async def insert_missing(self, key: str, rows: pa.Table) -> int: ...

    async def optimize(self, cleanup_older_than_s: float | None) -> None: ...

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
    ) -> None: ...

    async def ask(
        self, function: Callable[..., Any], values: Sequence[Any], kind: pa.DataType, pace: Any
    ) -> list[Any]:
        """Calls a function with values as `fill` would; returns what it gave, as Python values."""

    async def uncovered(self, index: Index) -> int: ...

    async def sample(
        self, where: str, columns: Sequence[str], rows: int, *, seed: str
    ) -> pa.Table: ...

    async def nearest(
        self, column: str, vectors: Sequence[Sequence[float]], rows: int, key: str, where: str
    ) -> list[list[Any]]: ...

    async def set_schema_metadata(self, metadata: Mapping[str, str | None]) -> None: ...

    def free_bytes(self) -> int | None:
        """Returns how much the disk still takes, `None` where that is not known."""

    async def is_live(self) -> bool:
        """Returns whether others commit to it, so that long commits would hold them up."""

    async def count_rows(self, where: str | None = None) -> int: ...

    def batches(
        self, where: str | None, columns: Sequence[str] | None, rows: int
    ) -> AsyncIterator[pa.RecordBatch]: ...
