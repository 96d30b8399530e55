"""The rows of a backfill: the table's protocol, the check of its key, and chunks.

A chunk is the rows of one commit; rows of one fragment stay together. Calling the function and
committing its values is for `backfill.engine`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
import anyio.lowlevel
import anyio.to_thread
import pyarrow as pa
import pyarrow.compute as pc

from aiomigrate.errors import OperationError
from aiomigrate.operations.fill import Filling
from aiomigrate.schema.digests import digests
from aiomigrate.schema.sql import quote


@dataclass(eq=False)
class Part:
    """Rows for one call."""

    chunk: int
    rows: pa.RecordBatch
    digests: Any


class Chunks:
    """Decides which rows are committed together: whole fragments, up to a limit.

    A commit rewrites the column in each fragment that it touches, so the rows of one fragment
    belong together; small fragments are combined, large ones split.
    """

    def __init__(self, limit: int) -> None:
        """Starts with chunk 0.

        Args:
            limit: Maximum number of rows in a chunk.
        """
        self.number = 0
        self._limit = limit
        self._rows = 0
        self._fragment: int | None = None

    def take(self, fragment: int, rows: int) -> int:
        """Assigns the next rows of a fragment to chunk `number`.

        It first starts a new chunk if the current one is full, or if a new fragment begins and it
        is at least half full.

        Returns:
            How many of the rows belong to the chunk. Call it again for the rest.
        """
        is_new = fragment != self._fragment
        if self._rows >= self._limit or (is_new and 2 * self._rows >= self._limit):
            self.number += 1
            self._rows = 0
        self._fragment = fragment
        taken = min(rows, self._limit - self._rows)
        self._rows += taken
        return taken


def take_part(queue: list[tuple[pa.RecordBatch, list[int]]], max_rows: int, chunk: int) -> Part:
    """Removes up to `max_rows` rows from a non-empty queue of (rows, digests); returns them."""
    batches: list[pa.RecordBatch] = []
    marks: list[int] = []
    while queue and len(marks) < max_rows:
        batch, own = queue.pop(0)
        room = max_rows - len(marks)
        if len(batch) > room:
            queue.insert(0, (batch.slice(room), own[room:]))
            batch, own = batch.slice(0, room), own[:room]
        batches.append(batch)
        marks += own
    whole = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return Part(chunk, whole[0], pa.array(marks, pa.int64()))


def run_length(rows: pa.RecordBatch, fragment: int) -> int:
    """Returns how many of the leading rows belong to a fragment."""
    ids: list[Any] = rows.column("_rowid").to_pylist()
    if ids[-1] >> 32 == fragment:
        return len(ids)
    return next(n for n, row in enumerate(ids) if row >> 32 != fragment)


def row_width(kind: Any) -> int:
    """Returns the approximate size of a value of an Arrow type in bytes."""
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * row_width(kind.value_type)
    try:
        return max(1, int(kind.bit_width) // 8)
    except ValueError:
        return 256


_COUNT_ROWS = 300_000  # keys that `_distinct` counts at a time, to bound its memory


class BackfillTable(Protocol):
    """The table of a backfill; the implementation records its commits.

    Attributes:
        name: Name of the table.
        foreign: Ranges of table_versions that other writers committed, as (first, last).
    """

    name: str
    foreign: list[tuple[int, int]]

    @property
    def schema(self) -> pa.Schema:
        """The schema as last read."""

    async def reopen(self) -> None:
        """Moves to the latest table_version; adds commits by other writers to `foreign`."""

    async def count_rows(self, where: str | None = None) -> int:
        """Returns the number of matching rows."""

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        """Reports the progress in rows."""

    def scan(self, where: str, columns: Sequence[str]) -> AsyncIterator[pa.RecordBatch]:
        """Yields the matching rows of the latest table_version in its order, with `_rowid`."""

    async def is_live(self) -> bool:
        """Returns whether other writers are committing to the table."""

    async def cover_key(self, key: str) -> None:
        """Rebuilds the index on the key, which does not cover the fragments that merges write."""

    async def merge_columns(self, key: str, data: pa.Table, *, crowded: bool) -> int:
        """Sets some columns of the rows of equal key in one commit; returns the number of rows.

        `crowded` says that other writers are committing.
        """


async def check_keys(table: BackfillTable, job: Filling) -> None:
    """Checks that the key is unique and has no NULL.

    Raises:
        OperationError: The key has NULL or duplicates.
    """
    nulls = await table.count_rows(f"{quote(job.key)} IS NULL")
    if nulls:
        raise OperationError(
            f"{job.words} on table {table.name!r}: {nulls} rows have no {job.key!r}.",
            "Fill the key first, or name another one.",
        )
    hashes: list[Any] = []
    async for batch in table.scan("true", [job.key]):
        column: Any = batch.column(job.key)
        if not pa.types.is_integer(column.type):
            marks = await anyio.to_thread.run_sync(digests, batch.select([job.key]))
            column = pa.array(marks, pa.int64())
        hashes.append(column)
    if not hashes:
        return
    total = sum(len(chunk) for chunk in hashes)
    distinct = await anyio.to_thread.run_sync(_distinct, pa.chunked_array(hashes))
    if distinct != total:
        raise OperationError(
            f"{job.words} on table {table.name!r}: {total - distinct} rows share their "
            f"{job.key!r} with another row.",
            "Name a key that is unique, or remove the duplicates first.",
        )


def _distinct(values: Any) -> int:
    """Returns the number of distinct integers, counting a share of them at a time."""
    shares = 1
    while shares * _COUNT_ROWS < len(values):
        shares *= 2
    low: Any = pc.bit_wise_and(values.cast(pa.int64(), safe=False), shares - 1)
    total = 0
    for share in range(shares):
        mine: Any = pc.equal(low, pa.scalar(share))
        total += int(pc.count_distinct(values.filter(mine)).as_py())
    return total
