"""Computing new columns on a Ray cluster, for tables too large for one machine.

By lance-ray: workers read fragments and write the columns' data files, and one commit adds them
all. There is no checkpoint within, and a commit of someone else's fails it (facts: 37): trying
again, and what changed meanwhile, is for the caller.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import anyio.to_thread
import pyarrow as pa

from aiomigrate.backfill.caller import as_array
from aiomigrate.schema.digests import digests


class Transform:
    """What workers make of a batch: vectors, digests of their sources, and no errors.

    It is sent to the workers, which need aiomigrate and what the function imports.
    """

    def __init__(self, function: Any, source: str, fields: Sequence[pa.Field[Any]]) -> None:
        """Calls nothing yet.

        Args:
            function: From a list of values to a vector for each, async or plain.
            source: The column of the values.
            fields: The columns to make: vector, digest (int64), error (text).
        """
        self._function = function
        self._source = source
        self._schema = pa.schema(list(fields))

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Returns the new columns of a batch. Equal values are paid once, NULL not at all."""
        given = batch.select([self._source])
        values, marks = given.column(0).to_pylist(), digests(given)
        wanted = {m: v for m, v in zip(marks, values, strict=True) if v is not None}
        kind = self._schema.field(0).type
        made: Any = pa.nulls(0, kind)
        if wanted:
            made = as_array(_called(self._function, list(wanted.values())), kind)
            if len(made) != len(wanted):
                raise ValueError(f"{len(made)} vectors for {len(wanted)} values")
        at = {mark: position for position, mark in enumerate(wanted)}
        rows = pa.array([None if v is None else at[m] for m, v in zip(marks, values, strict=True)])
        columns = [made.take(rows.cast(pa.int64())), pa.array(marks, pa.int64())]
        columns.append(pa.nulls(len(marks), pa.string()))
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)


def _called(function: Any, values: list[Any]) -> Any:
    result = function(values)
    if not inspect.isawaitable(result):
        return result

    async def awaited() -> Any:
        return await result

    return asyncio.run(awaited())


async def add_by_ray(
    location: str,
    storage_options: Mapping[str, str] | None,
    *,
    transform: Transform,
    source: str,
    batch_rows: int,
    workers: int,
) -> None:
    """Adds columns to a table in one commit. The event loop goes on; the cluster is the caller's.

    Cancelled, it is left to end by itself, and may still commit.

    Args:
        location: The table.
        storage_options: How its store is reached.
        transform: What makes the columns.
        source: The column that workers read.
        batch_rows: Rows of one call.
        workers: Processes on the cluster.

    Raises:
        ValueError, RuntimeError, OSError: lance-ray failed; nothing was committed, or, where the
            store failed late, all of it.
    """

    def run() -> None:
        import lance_ray

        lance_ray.add_columns(
            location,
            transform=transform,
            read_columns=[source],
            storage_options=None if storage_options is None else dict(storage_options),
            batch_size=batch_rows,
            concurrency=workers,
        )

    await anyio.to_thread.run_sync(run)
