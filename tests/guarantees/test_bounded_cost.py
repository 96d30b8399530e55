"""Many tables, many runs: files, memory and the ledger stay bounded, and servers keep answering.

The small sizes run by default. `pytest -m campaign tests/guarantees/test_bounded_cost.py` runs
the large ones and watches the event loop. Times are for `benchmarks`.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from pathlib import Path
from typing import Any, Self

import lancedb
import psutil
import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, MigrationFailedError, op
from tests.tools import manager, tree

T = pa.schema([("id", pa.string()), ("n", pa.int64())])


def five_each(tables: int) -> list[Migration]:
    """Returns five migrations for each of some tables."""
    steps: list[Any] = [
        op.CreateTable(T), op.AddColumns({"a": pa.int64()}), op.AddColumns({"b": pa.string()}),
        op.RenameColumns({"a": "c"}), op.DropColumns("b"),
    ]  # fmt: skip
    return [
        Migration(table=f"t{number}", version=version, operations=[step])
        for number in range(tables)
        for version, step in enumerate(steps, 1)
    ]


async def ledger_fragments(database: Path) -> int:
    """Returns how many files a reader of the ledger reads."""
    connection = await lancedb.connect_async(database)
    count = 0
    for name in ("table_migrations", "table_migrations_history"):
        stats = await (await connection.open_table(name)).stats()
        count += stats["fragment_stats"]["num_fragments"]
    connection.close()
    return count


def ledger_files(database: Path) -> int:
    """Returns how many files the ledger consists of."""
    return sum(p.is_file() for t in database.glob("table_migrations*") for p in t.rglob("*"))


class Watch:
    """Watches this process while something runs.

    Attributes:
        files: Most files open at once.
        rss: Most memory, in bytes above the beginning.
        kept_s: Longest time the event loop's thread computed without letting others in, in seconds
            of its CPU (a busy machine adds none), collections of garbage aside.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._base = self._process.memory_info().rss
        self.files = self.rss = 0
        self.kept_s = 0.0
        self._thread = threading.get_ident()
        self._collecting_s = self._begun = 0.0

    def _collected(self, phase: str, _: dict[str, int]) -> None:
        if threading.get_ident() != self._thread:
            return
        now = time.thread_time()
        if phase == "start":
            self._begun = now
        else:
            self._collecting_s += now - self._begun

    async def __aenter__(self) -> Self:
        gc.callbacks.append(self._collected)
        self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._sample())]
        return self

    async def __aexit__(self, *_: object) -> None:
        gc.callbacks.remove(self._collected)
        for task in self._tasks:
            task.cancel()

    async def _beat(self) -> None:
        while True:
            begun = time.thread_time() - self._collecting_s
            await asyncio.sleep(0.002)
            self.kept_s = max(self.kept_s, time.thread_time() - self._collecting_s - begun)

    async def _sample(self) -> None:
        while True:
            self.files = max(self.files, self._process.num_fds())
            self.rss = max(self.rss, self._process.memory_info().rss - self._base)
            await asyncio.sleep(0.1)


async def applied_and_at_target(database: Path, tables: int) -> Watch:
    """Applies five migrations to each of some tables, then starts again; returns the watch."""
    migrations = five_each(tables)
    async with Watch() as watch:
        async with manager(database, migrations) as migrating:
            report = await migrating.initialize()
        async with manager(database, migrations) as migrating:
            again = await migrating.initialize()
            assert (await migrating.get_status()).is_at_target
    assert len(report.applied) == len(migrations)
    assert not again.steps
    return watch


async def test_many_tables(database: Path) -> None:
    """150 tables x 5: no more files are open than for few, and the ledger is compacted."""
    watch = await applied_and_at_target(database, 150)

    assert watch.files < 200
    assert ledger_files(database) < 300


@pytest.mark.campaign
async def test_thousands_of_tables(database: Path) -> None:
    """2,000 tables x 5 from nothing: completes, bounded; keeps the event loop for moments only."""
    watch = await applied_and_at_target(database, 2000)

    assert watch.files < 200
    assert watch.rss < 1 << 30
    assert ledger_files(database) < 2000  # of 10,000 migrations
    assert watch.kept_s < 0.05


async def runs_at_target(database: Path, times: int) -> None:
    """Starts a number of times with nothing to do, and asserts that nothing was written."""
    migrations = five_each(3)
    async with manager(database, migrations) as migrating:
        await migrating.initialize()
    before = tree(database)
    for _ in range(times):
        async with manager(database, migrations) as migrating:
            assert not (await migrating.initialize()).steps
    assert tree(database) == before


async def failing_runs(database: Path, times: int) -> list[tuple[int, float]]:
    """Fails a number of times, as a service that crashes at start; returns fragments and seconds.

    Old versions of the ledger, which nobody reads, stay for two hours.
    """

    async def up(ctx: Context) -> None:
        await ctx.table().add([{"id": "a", "n": 1}])
        raise ValueError("wrong on purpose")

    migrations = [
        Migration(table="t", version=1, operations=[op.CreateTable(T)]),
        Migration(table="t", version=2, up=up),
    ]
    result = []
    for _ in range(times):
        begun = time.monotonic()
        async with manager(database, migrations) as migrating:
            with pytest.raises(MigrationFailedError):
                await migrating.initialize()
        seconds = time.monotonic() - begun
        result.append((await ledger_fragments(database), seconds))
    return result


async def test_runs_in_a_row(database: Path) -> None:
    """Starts at target write nothing; those that fail leave no more to be read."""
    await runs_at_target(database, 20)
    counts = [count for count, _ in await failing_runs(database.parent / "failing", 30)]

    assert max(counts[15:]) <= max(counts[:15])


@pytest.mark.campaign
async def test_a_thousand_runs_in_a_row(database: Path) -> None:
    """No larger and no slower than ten left it: at target, and failing."""
    await runs_at_target(database, 1000)
    told = await failing_runs(database.parent / "failing", 300)

    assert max(count for count, _ in told[100:]) <= max(count for count, _ in told[:100])
    first, last = (sorted(seconds for _, seconds in part)[25] for part in (told[:50], told[-50:]))
    assert last < 3 * first
