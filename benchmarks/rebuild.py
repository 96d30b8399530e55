"""One rebuild of a table of vectors, in a process of its own, so that its memory can be told.

`python -m benchmarks.rebuild HOW DATABASE ROWS` makes the table (HOW is `make`), or rebuilds it
(`floor`: the bare overwrite by hand; `ours`: `op.Rebuild`, then its rollback) and prints seconds
and peak memory as JSON. For what is judged, see `cases`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import lancedb
import numpy as np
import pyarrow as pa

from aiomigrate import Migration, MigrationManager, op
from benchmarks.measure import peak_mb

TABLE = "vectors"
DIMENSION = 384
BATCH_ROWS = 4096
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("vector", pa.list_(pa.float32(), DIMENSION)),
    ]
)


def batches(rows: int) -> Iterator[pa.RecordBatch]:
    """Yields the table's rows."""
    rng = np.random.default_rng(7)
    for start in range(0, rows, BATCH_ROWS):
        count = min(BATCH_ROWS, rows - start)
        floats = pa.array(rng.random(count * DIMENSION, dtype=np.float32))
        yield pa.RecordBatch.from_arrays(
            [
                pa.array(np.arange(start, start + count)),
                pa.array([f"{n:<200}" for n in range(start, start + count)]),
                pa.FixedSizeListArray.from_arrays(floats, DIMENSION),
            ],
            schema=SCHEMA,
        )


async def changed(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Does next to nothing: what is measured is the rewriting."""
    return batch.set_column(0, SCHEMA.field("id"), pa.array(batch["id"].to_numpy() + 1))


async def floor(path: str) -> dict[str, Any]:
    """Overwrites the table with what becomes of its own stream, by hand."""
    connection = await lancedb.connect_async(path)
    begun = time.perf_counter()
    table = await connection.open_table(TABLE)
    stream = await table.query().to_batches(max_batch_length=BATCH_ROWS)

    async def following() -> pa.RecordBatch | None:
        batch = await anext(stream, None)
        return None if batch is None else await changed(batch)

    async with anyio.from_thread.BlockingPortal() as portal:

        def pull() -> Iterator[pa.RecordBatch]:
            while (batch := portal.call(following)) is not None:
                yield batch

        reader = pa.RecordBatchReader.from_batches(SCHEMA, pull())
        await connection.create_table(TABLE, reader, schema=SCHEMA, mode="overwrite")
    return {"rebuild_s": time.perf_counter() - begun}


async def ours(path: str) -> dict[str, Any]:
    """Rebuilds the table by a migration, and rolls it back."""
    steps = [Migration(table=TABLE, version=1, operations=[op.Rebuild(changed)])]
    async with MigrationManager(path, migrations=steps) as manager:
        reports = await manager.upgrade(), await manager.rollback(TABLE)
    (step,), (back,) = (report.steps for report in reports)
    return {
        "rebuild_s": step.ran_s + step.ledger_s,
        "rollback_s": back.ran_s + back.ledger_s,
        "ledger_commits": sum(report.ledger_commits for report in reports),
    }


async def main(how: str, path: str, rows: int) -> None:
    """Makes the table, or rebuilds it and prints what that took."""
    if how == "make":
        connection = await lancedb.connect_async(path)
        reader = pa.RecordBatchReader.from_batches(SCHEMA, batches(rows))
        await connection.create_table(TABLE, reader, schema=SCHEMA)
        return
    told = await (ours(path) if how == "ours" else floor(path))
    print(json.dumps({**told, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], str(Path(sys.argv[2]).absolute()), int(sys.argv[3])))
