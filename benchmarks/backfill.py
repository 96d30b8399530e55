"""One backfill of a vector column, in a process of its own, so that its memory can be told.

`python -m benchmarks.backfill HOW DATABASE ROWS LATENCY_MS` fills it by HOW (`function`: the user's
function alone, which needs no table; `floor`: the same calls and commits by hand; `ours`:
`op.Backfill`), and prints seconds, bytes written as a share of the payload, peak memory and the
worst delay of the event loop as JSON. `make` only makes the table. For what is judged, see `cases`.
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
import lancedb.index
import numpy as np
import pyarrow as pa

from aiomigrate import Migration, MigrationManager, op
from benchmarks.measure import peak_mb

TABLE = "notes"
DIMENSION = 256
FRAGMENT = 100_000
BATCH = 32
FLIGHT = 8
_VECTORS = np.random.default_rng(7).random((4096, DIMENSION), dtype=np.float32)
KIND = pa.list_(pa.float32(), DIMENSION)


class Model:
    """A model with the latency of a service."""

    def __init__(self, latency_s: float) -> None:
        self.latency_s = latency_s

    async def __call__(self, texts: list[str]) -> Any:
        """Returns a vector for each text."""
        if self.latency_s:
            await anyio.sleep(self.latency_s)
        return _VECTORS[: len(texts)]


def fragments(rows: int) -> Iterator[pa.Table]:
    """Yields the table's rows, a fragment at a time."""
    for start in range(0, rows, FRAGMENT):
        ids = range(start, min(rows, start + FRAGMENT))
        texts = [f"note {n}: something that somebody wrote down, of middling length" for n in ids]
        yield pa.table({"id": pa.array(ids, pa.int64()), "text": texts})


async def make(path: str, rows: int) -> None:
    """Makes the table."""
    connection = await lancedb.connect_async(path)
    table: Any = None
    for data in fragments(rows):
        if table is None:
            table = await connection.create_table(TABLE, data)
        else:
            await table.add(data)


async def function(model: Model, rows: int) -> None:
    """Calls the model for all rows, and nothing else."""
    texts = [f"note {n}" for n in range(BATCH)]
    calls = iter(range(-(-rows // BATCH)))

    async def work() -> None:
        for _ in calls:
            await model(texts)

    async with anyio.create_task_group() as group:
        for _ in range(FLIGHT):
            group.start_soon(work)


async def floor(path: str, model: Model) -> None:
    """Does the same by hand: NULL column, index on the key, one merge for each fragment."""
    connection = await lancedb.connect_async(path)
    table = await connection.open_table(TABLE)
    await table.create_index("id", config=lancedb.index.BTree())
    await table.add_columns([pa.field("vector", KIND)])
    limit = anyio.CapacityLimiter(FLIGHT)
    waiting: dict[int, pa.RecordBatch] = {}
    made: dict[int, Any] = {}

    async def call(number: int, texts: list[str]) -> None:
        async with limit:
            made[number] = await model(texts)

    reader = await (await connection.open_table(TABLE)).query().to_batches(max_batch_length=BATCH)
    count = merged = 0

    async def merge(numbers: list[int]) -> None:
        flat = np.concatenate([made.pop(n) for n in numbers]).reshape(-1)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), DIMENSION)
        ids = pa.chunked_array([waiting.pop(n)["id"] for n in numbers])
        data = pa.table({"id": ids, "vector": vectors})
        await table.merge_insert("id").when_matched_update_all().execute(data)

    async with anyio.create_task_group() as group:
        numbers: list[int] = []
        async for batch in reader:
            waiting[count] = batch
            numbers.append(count)
            async with limit:
                pass
            group.start_soon(call, count, batch["text"].to_pylist())
            count += 1
            merged += len(batch)
            if merged % FRAGMENT == 0:
                while not all(n in made for n in numbers):  # noqa: ASYNC110 - by hand
                    await anyio.sleep(0.001)
                group.start_soon(merge, numbers)
                numbers = []
    if numbers:
        await merge(numbers)


async def ours(path: str, model: Model) -> int:
    """Does it by a migration; returns the commits of its ledger."""
    pace = op.Pace(batch_rows=BATCH, concurrency=FLIGHT)

    async def embed(batch: pa.RecordBatch) -> Any:
        return await model(batch["text"].to_pylist())

    fill = op.Backfill("vector", embed, source="text", key="id", pace=pace)
    steps = [
        Migration(
            table=TABLE,
            version=1,
            operations=lambda _: [op.AddColumns({"vector": KIND}), fill],
        )
    ]
    async with MigrationManager(path, migrations=steps) as manager:
        return (await manager.upgrade()).ledger_commits


def size_of(path: str) -> int:
    """Returns the bytes below a folder."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


async def main(how: str, path: str, rows: int, latency_ms: float) -> None:
    """Runs it and prints what it took."""
    model = Model(latency_ms / 1000)
    if how == "make":
        await make(path, rows)
        return
    before = size_of(path) if how != "function" else 0
    worst, commits = 0.0, 0

    async def beat() -> None:
        nonlocal worst
        while True:
            begun = time.perf_counter()
            await anyio.sleep(0.005)
            worst = max(worst, time.perf_counter() - begun - 0.005)

    begun = time.perf_counter()
    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        if how == "function":
            await function(model, rows)
        elif how == "floor":
            await floor(path, model)
        else:
            commits = await ours(path, model)
        took = time.perf_counter() - begun
        group.cancel_scope.cancel()
    written = size_of(path) - before if how != "function" else 0
    told = {
        "took_s": took,
        "written": written / (rows * DIMENSION * 4),
        "peak_mb": peak_mb(),
        "lag_ms": worst * 1000,
        "ledger_commits": commits,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(
        main(sys.argv[1], str(Path(sys.argv[2]).absolute()), int(sys.argv[3]), float(sys.argv[4]))
    )
