"""Computes new columns on a Ray cluster, for tables too large for one machine.

With lance-ray, workers read fragments and write the columns' data files, and one commit adds all
of them. There are no checkpoints in between, and a commit by another writer makes it fail
(measured). Retrying, and rows that changed meanwhile, are for the caller.
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
    """The function that workers apply to a batch; returns vectors, source digests and no errors.

    It is sent to the workers, which need aiomigrate and the modules that the function imports.
    """

    def __init__(self, function: Any, source: str, fields: Sequence[pa.Field[Any]]) -> None:
        """Stores the arguments without calling the function.

        Args:
            function: Async or plain; takes a list of values, returns a vector for each.
            source: The column of the values.
            fields: The columns to add: vector (fixed-size list), digest (int64), error (string).
        """
        self._function = function
        self._source = source
        self._schema = pa.schema(list(fields))

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Returns the new columns of a batch. Calls once for equal values, never for NULL.

        Raises:
            ValueError: The function returned another number of vectors than values.
            Exception: The function raised it, or its result cannot be converted.
        """
        given = batch.select([self._source])
        values, marks = given.column(0).to_pylist(), digests(given)
        wanted = {m: v for m, v in zip(marks, values, strict=True) if v is not None}
        kind = self._schema.field(0).type
        made: Any = pa.nulls(0, kind)
        if wanted:
            made = as_array(_call(self._function, list(wanted.values())), kind)
            if len(made) != len(wanted):
                raise ValueError(f"{len(made)} vectors for {len(wanted)} values")
        at = {mark: position for position, mark in enumerate(wanted)}
        rows = pa.array([None if v is None else at[m] for m, v in zip(marks, values, strict=True)])
        columns = [made.take(rows.cast(pa.int64())), pa.array(marks, pa.int64())]
        columns.append(pa.nulls(len(marks), pa.string()))
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)


def _call(function: Any, values: list[Any]) -> Any:
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
    """Adds columns to a table in one commit, in a thread; the caller must have started Ray.

    A cancellation does not stop the work on the cluster, which may still commit. A crash of this
    process before the commit leaves the table unchanged.

    Args:
        location: URI of the table.
        storage_options: LanceDB's storage options.
        transform: Computes the columns.
        source: The column that workers read.
        batch_rows: Rows per call of the function.
        workers: Number of processes on the cluster.

    Raises:
        ValueError, RuntimeError, OSError: lance-ray failed. Nothing was committed, or all columns
            if the store failed after the commit.
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
