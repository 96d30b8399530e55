"""Re-embedding killed again and again beside a writer: every row right, nothing paid for twice."""

from __future__ import annotations

import inspect
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import anyio
import lancedb
import numpy as np
import pyarrow as pa
import pytest
from sklearn.feature_extraction.text import HashingVectorizer

from aiomigrate import Migration, MigrationManager, op
from tests.processes import quiet_logger, start
from tests.tools import SEED, TABLE

OLD, NEW = 64, 256
PACE = op.Pace(batch_rows=50, concurrency=8, chunk_rows=1000)
IN_FLIGHT = 2 * 1000 + 50
"""Rows that a kill can cost: `Pace` takes no more before they are committed."""


def embed(texts: Sequence[str], dimension: int) -> np.ndarray[Any, Any]:
    """Embeds by hashing words."""
    made: np.ndarray[Any, Any] = HashingVectorizer(n_features=dimension).transform(texts).toarray()
    return made.astype(np.float32)


@cache
def docstrings() -> list[str]:
    """Returns the docstrings of the standard library's modules that are loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [sys.modules[n] for n in sorted(sys.stdlib_module_names & sys.modules.keys())]
        return list(dict.fromkeys(text for module in modules for text in _within(module)))


def _within(module: Any) -> Iterator[str]:
    for _, thing in inspect.getmembers(module):
        text = inspect.getdoc(thing)
        if text and len(text) > 40:
            yield " ".join(text.split())[:300]


class Metered:
    """The new model, as a service with 5 ms of latency that writes down what it is paid for."""

    def __init__(self, bill: Path) -> None:
        self.bill = bill

    async def __call__(self, texts: list[str]) -> Any:
        with self.bill.open("a") as out:
            out.write(f"{len(texts)}\n")
        await anyio.sleep(0.005)
        return embed(texts, NEW)

    def paid(self) -> int:
        """Returns how many texts were paid for."""
        return sum(map(int, self.bill.read_text().split())) if self.bill.exists() else 0


async def reembed(database: str, bill: str) -> None:
    """Upgrades, in a process of its own."""
    operation = op.Reembed(
        source="text",
        function=Metered(Path(bill)),
        dimension=NEW,
        model="hashing@256",
        key="id",
        gate=op.Gate(min_overlap=0, max_duplicates=1, max_zero=1),
        pace=PACE,
    )
    migrations = [Migration(table=TABLE, version=1, operations=[operation])]
    async with MigrationManager(
        database, migrations=migrations, logger=quiet_logger(), lease_ttl=0.5
    ) as manager:
        await manager.upgrade()


class Writer:
    """Old code: adds, changes and deletes rows, and knows no new column."""

    def __init__(self, table: lancedb.AsyncTable, rows: int, chance: random.Random) -> None:
        self.table = table
        self.rows = rows
        self.chance = chance
        self.texts: set[int] = set()
        self.touched = 0
        self.over = anyio.Event()

    def row(self, number: int) -> dict[str, Any]:
        """Returns a new row."""
        text = f"{self.chance.choice(docstrings())} written {self.touched}"
        return {"id": number, "text": text, "vector": embed([text], OLD)[0].tolist()}

    async def run(self) -> None:
        """Writes until it is told to stop."""
        number = 10 * self.rows
        while not self.over.is_set():
            number += 1
            added, changed = self.row(number), self.row(self.chance.randrange(self.rows))
            await self.table.checkout_latest()
            schema = pa.schema([f for f in await self.table.schema() if f.name in added])
            await self.table.add(pa.Table.from_pylist([added], schema=schema))
            values = {"text": changed["text"], "vector": changed["vector"]}
            await self.table.update(values, where=f"id = {changed['id']}")
            await self.table.delete(f"id = {self.chance.randrange(self.rows)}")
            self.touched += 2
            with anyio.move_on_after(0.1):
                await self.over.wait()


async def killed_and_finished(database: Path, *, rows: int, kills: int) -> None:
    """Re-embeds under a writer, killed so many times, and checks what is there at the end."""
    chance = random.Random(SEED)
    known = docstrings()
    texts = [f"{known[n % len(known)]} {n}" for n in range(rows)]
    flat = pa.array(embed(texts, OLD).reshape(-1), pa.float32())
    data = pa.table(
        {"id": range(rows), "text": texts,
         "vector": pa.FixedSizeListArray.from_arrays(flat, OLD)}
    )  # fmt: skip
    table = await (await lancedb.connect_async(database)).create_table(TABLE, data)
    model = Metered(database.parent / "bill")
    writer = Writer(table, rows, chance)
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        for turn in range(kills + 1):
            begun = model.paid()
            process = start(reembed, str(database), str(model.bill))
            # Killed somewhere within its share of what is left, once it has begun to pay.
            share = chance.uniform(0.1, 0.9) * (rows - begun) / (kills + 1 - turn)
            while process.is_alive() and model.paid() < begun + max(share, 5):  # noqa: ASYNC110
                await anyio.sleep(0.005)
            if turn == kills:
                writer.over.set()
            else:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
            await anyio.to_thread.run_sync(process.join)
    assert process.exitcode == 0

    await table.checkout_latest()
    have = await table.query().to_arrow()
    assert set(have.schema.names) == {"id", "text", "vector", "vector_old"}
    ids = have["id"].to_pylist()
    assert len(ids) == len(set(ids))
    assert {n for n in ids if n > 10 * rows} == {
        10 * rows + 1 + n for n in range(writer.touched // 2)
    }
    vectors = have["vector"].combine_chunks().flatten().to_numpy().reshape(-1, NEW)
    assert np.allclose(vectors, embed(have["text"].to_pylist(), NEW), atol=1e-6)
    probes = 3 * (kills + 1)
    assert model.paid() <= rows + kills * IN_FLIGHT + writer.touched + probes


async def test_killed_a_few_times(database: Path) -> None:
    """P2 and the bill, on a sample of the whole below."""
    await killed_and_finished(database, rows=8_000, kills=2)


@pytest.mark.campaign
async def test_killed_twenty_times(database: Path) -> None:
    """100,000 rows, 64 to 256 dimensions, 20 kills: right, none lost or doubled, none paid twice.

    The bill: at most the rows, what was in flight at each kill, and what the writer touched.
    """
    await killed_and_finished(database, rows=100_000, kills=20)
