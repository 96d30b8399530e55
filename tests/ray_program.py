"""Re-embeds on a local Ray cluster of two workers, and checks what it did.

A program of its own: a cluster starts processes that outlive a test's patience with warnings.
`python -m tests.ray_program DATABASE ROWS INTRUSIONS` prints JSON for `backfill.test_ray`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import lancedb
import numpy as np
import pyarrow as pa
from sklearn.feature_extraction.text import HashingVectorizer

from aiomigrate import Migration, MigrationFailedError, MigrationManager, op
from aiomigrate.errors import StoreError
from aiomigrate.store.table import Table

TABLE = "notes"
OLD, NEW = 16, 32


def embed(texts: list[str]) -> Any:
    """Embeds by hashing words; runs on the workers."""
    return HashingVectorizer(n_features=NEW).transform(texts).toarray().astype(np.float32)


async def make(path: str, rows: int) -> None:
    """Makes the table, in fragments of a tenth of it."""
    connection = await lancedb.connect_async(path)
    table: Any = None
    for start in range(0, rows, rows // 10):
        ids = range(start, start + rows // 10)
        flat = pa.array(np.ones(len(ids) * OLD, np.float32))
        data = pa.table(
            {"id": ids, "text": [f"note number {n}" for n in ids],
             "vector": pa.FixedSizeListArray.from_arrays(flat, OLD)}
        )  # fmt: skip
        if table is None:
            table = await connection.create_table(TABLE, data)
        else:
            await table.add(data)


async def main(path: str, rows: int, intrusions: int) -> dict[str, Any]:  # noqa: C901 - one scene after another
    """Re-embeds; others commit while the first attempts are under way."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    await make(path, rows)
    worst = 0.0
    left = intrusions
    attempts = added = 0
    compute = Table.compute

    async def watched(self: Table, *args: Any, **options: Any) -> int:
        nonlocal left, attempts
        attempts += 1
        result: int | Exception = 0
        async with anyio.create_task_group() as group:
            if left:
                left -= 1
                group.start_soon(intrude)
            try:
                result = await compute(self, *args, **options)
            except StoreError as exc:
                result = exc  # raised outside: a group wraps what leaves it
            group.cancel_scope.cancel()
        if isinstance(result, Exception):
            raise result
        return result

    async def intrude() -> None:
        nonlocal added
        while True:
            await anyio.sleep(0.2)
            with anyio.CancelScope(shield=True):
                table = await (await lancedb.connect_async(path)).open_table(TABLE)
                row = {"id": rows + added, "text": f"note {added}", "vector": [1.0] * OLD}
                known = pa.schema([f for f in await table.schema() if f.name in row])
                await table.add(pa.Table.from_pylist([row], schema=known))
                added += 1

    async def beat() -> None:
        nonlocal worst
        while True:
            begun = time.perf_counter()
            await anyio.sleep(0.01)
            worst = max(worst, time.perf_counter() - begun - 0.01)

    Table.compute = watched  # type: ignore[method-assign]
    operation = op.Reembed(
        source="text", function=embed, dimension=NEW, model="hashing@32", key="id",
        engine=op.Engine.RAY, gate=op.Gate(min_overlap=0, max_duplicates=1),
        pace=op.Pace(concurrency=2, batch_rows=512),
    )  # fmt: skip
    steps = [Migration(table=TABLE, version=1, operations=[operation])]
    begun = time.perf_counter()
    failed = ""
    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        async with MigrationManager(path, migrations=steps) as manager:
            try:
                await manager.upgrade()
            except MigrationFailedError as exc:
                failed = str(exc)
        group.cancel_scope.cancel()
    took = time.perf_counter() - begun
    table = await (await lancedb.connect_async(path)).open_table(TABLE)
    have = await table.query().to_arrow()
    ray.shutdown()
    right = False
    if not failed:
        vectors = have["vector"].combine_chunks().flatten().to_numpy().reshape(-1, NEW)
        right = bool(np.allclose(vectors, embed(have["text"].to_pylist()), atol=1e-6))
    return {
        "rows": len(have), "added": added, "right": right, "failed": failed, "took_s": took,
        "attempts": attempts, "lag_ms": worst * 1000, "columns": sorted(have.schema.names),
    }  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    given = (str(Path(sys.argv[1]).absolute()), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(json.dumps(asyncio.run(main(*given))) + "\n")
