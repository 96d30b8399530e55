"""The rows of a backfill: what is needed of their table, the check of its key, and chunks.

A chunk is what one commit writes; rows of one fragment stay together.
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

    A commit writes the column anew for each fragment it concerns, so the rows of one fragment
    belong together; small fragments are gathered, large ones cut.
    """

    def __init__(self, limit: int) -> None:
        """Begins with chunk 0.

        Args:
            limit: Rows of a chunk.
        """
        self.number = 0
        self._limit = limit
        self._rows = 0
        self._fragment: int | None = None

    def take(self, fragment: int, rows: int) -> int:
        """Returns how many of the next rows, all of one fragment, belong to chunk `number`."""
        is_new = fragment != self._fragment
        if self._rows >= self._limit or (is_new and 2 * self._rows >= self._limit):
            self.number += 1
            self._rows = 0
        self._fragment = fragment
        taken = min(rows, self._limit - self._rows)
        self._rows += taken
        return taken


def gather(waiting: list[tuple[pa.RecordBatch, list[int]]], most: int, chunk: int) -> Part:
    """Takes at most so many rows off what waits."""
    batches: list[pa.RecordBatch] = []
    told: list[int] = []
    while waiting and len(told) < most:
        batch, own = waiting.pop(0)
        room = most - len(told)
        if len(batch) > room:
            waiting.insert(0, (batch.slice(room), own[room:]))
            batch, own = batch.slice(0, room), own[:room]
        batches.append(batch)
        told += own
    whole = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return Part(chunk, whole[0], pa.array(told, pa.int64()))


def run_length(rows: pa.RecordBatch, fragment: int) -> int:
    """Returns how many of the first rows are of one fragment."""
    ids: list[Any] = rows.column("_rowid").to_pylist()
    if ids[-1] >> 32 == fragment:
        return len(ids)
    return next(n for n, row in enumerate(ids) if row >> 32 != fragment)


def row_width(kind: Any) -> int:
    """Returns about how many bytes a value of a type takes."""
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * row_width(kind.value_type)
    try:
        return max(1, int(kind.bit_width) // 8)
    except ValueError:
        return 256


_COUNTED_AT_ONCE = 300_000


class Fillable(Protocol):
    """A table whose commits are recorded."""

    name: str
    foreign: list[tuple[int, int]]

    @property
    def schema(self) -> pa.Schema:
        """Its schema as last read."""

    async def reopen(self) -> None:
        """Moves to the latest table_version; what others committed is in `foreign`."""

    async def count_rows(self, where: str | None = None) -> int:
        """Returns how many rows match."""

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        """Tells how far it is."""

    def scan(self, where: str, columns: Sequence[str]) -> AsyncIterator[pa.RecordBatch]:
        """Yields the matching rows of the latest table_version, with `_rowid`, in its order."""

    async def is_live(self) -> bool:
        """Returns whether others commit to it."""

    async def cover_key(self, key: str) -> None:
        """Builds the index on the key anew, which loses the fragments that merges write."""

    async def merge_columns(self, key: str, data: pa.Table, *, crowded: bool) -> int:
        """Sets some columns of the rows of equal key, in one commit; returns how many rows."""


async def check_keys(table: Fillable, job: Filling) -> None:
    """Checks that the key is unique and has no NULL."""
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
            told = await anyio.to_thread.run_sync(digests, batch.select([job.key]))
            column = pa.array(told, pa.int64())
        hashes.append(column)
    if not hashes:
        return
    total = sum(len(chunk) for chunk in hashes)
    distinct = await anyio.to_thread.run_sync(_distinct, pa.chunked_array(hashes))
    if distinct != total:
        raise OperationError(
            f"{job.words} on table {table.name!r}: {total - distinct} rows share their "
            f"{job.key!r} with another one.",
            "Name a key that is unique, or remove the duplicates first.",
        )


def _distinct(values: Any) -> int:
    """Returns how many different integers there are, counting a share of them at a time."""
    shares = 1
    while shares * _COUNTED_AT_ONCE < len(values):
        shares *= 2
    low: Any = pc.bit_wise_and(values.cast(pa.int64(), safe=False), shares - 1)
    total = 0
    for share in range(shares):
        mine: Any = pc.equal(low, pa.scalar(share))
        total += int(pc.count_distinct(values.filter(mine)).as_py())
    return total
