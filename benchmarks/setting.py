"""What the benchmarks have in common: how much is measured, where, and managers that do not print.

What is measured is in `starts`, `runs`, `remote`, `bulk` and `footprint`; `cases` lists it.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import structlog

from aiomigrate import Migration, MigrationManager, OnUnsafeStore, Report
from benchmarks import floor, workload
from benchmarks.measure import Measured, Prepare, Result

HEAD = "table_migrations"
JOURNAL = f"{HEAD}_history"
CONCURRENCY = 16

# What an application does that logs errors only: the library's own logging stays in the figures,
# the terminal's does not.
LOG = structlog.wrap_logger(
    None, wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        rounds: Runs kept of each contender.
        warmups: Rounds before those that are thrown away.
        starts: Runs kept of each contender where one takes milliseconds.
        start_warmups: Rounds before those that are thrown away.
        tables: Tables of the large database of `flat-tables`, and of `memory`.
        events: Journal events of the large database of `flat-events`.
        lines: Tables of `first-run`.
        together: Tables of `together`.
        latency_s: Of each request of the object store.
        simulated_s: Seconds that the run of `overhead` takes on its clock.
        rows: Rows of `rebuild`, and three times as many.
        filled: Rows of `backfill`; its memory is told at `rows` and three times as many.
        repeats: Runs of each side in one pair of `--against`, of what takes milliseconds.
        reruns: The same, of what takes tenths of a second. Their ledger commits vary from run to
            run: a few are too few to see the range.
        is_quick: Whether it is too little to judge times by.
    """

    rounds: int = 7
    warmups: int = 1
    starts: int = 35
    start_warmups: int = 3
    tables: int = 1024
    events: int = 5000
    lines: int = 64
    together: int = 256
    latency_s: float = 0.05
    simulated_s: int = 3600
    rows: int = 1_000_000
    filled: int = 600_000
    repeats: int = 10
    reruns: int = 3
    is_quick: bool = False


FULL = Size()
QUICK = Size(
    rounds=1,
    warmups=0,
    starts=3,
    start_warmups=1,
    tables=64,
    events=200,
    lines=16,
    simulated_s=120,
    rows=20_000,
    filled=6_000,
    repeats=2,
    is_quick=True,
)

Case = Callable[[Size], Awaitable[Result]]
"""One benchmark."""


@dataclass(frozen=True, slots=True)
class Side:
    """What aiomigrate itself does in a benchmark, apart from those that it is compared with.

    A run returns its `Report`, or figures of its own by name (see `side`), or nothing.

    Attributes:
        prepare: Makes one run ready.
        runs: How many runs of each side `--against` makes for one pair.
        is_process: Whether a run is a process of its own, whose calls of LanceDB are not counted.
        counts: Returns what was counted from outside during the last run.
    """

    prepare: Prepare
    runs: int = 1
    is_process: bool = False
    counts: Callable[[], Awaitable[Mapping[str, int]]] | None = None


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Makes a folder, which is removed when the process ends. What is large is removed in between.

    For minutes after files were removed ext4 makes new ones ever more slowly (it passes over what
    it deleted lately, one inode after the other), and most of what is measured is the making of
    small files: ten starts in a row, each on a copy in place of the one before, took 250 ms at
    first and 1,100 ms at last.
    """
    folder = Path(tempfile.mkdtemp(prefix="aiomigrate-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    yield folder


class Scratch:
    """A folder with a path of its own for every run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def fresh(self) -> str:
        """Returns the path of a database that does not exist yet; those before are kept."""
        self._count += 1
        return str(self._folder / f"{self._count}")

    async def copy(self, made: str | Path) -> str:
        """Returns the path of a copy of a database."""
        path = self.fresh()
        await anyio.to_thread.run_sync(shutil.copytree, made, path)
        return path


async def manager_of(
    path: str, migrations: Sequence[Migration], **options: Any
) -> MigrationManager:
    """Returns a manager, its migrations loaded, not connected yet."""
    manager = MigrationManager(
        path, migrations=migrations, concurrency=CONCURRENCY, logger=LOG, **options
    )
    await manager.scripts()
    return manager


async def migrated(path: str, migrations: Sequence[Migration], **options: Any) -> Report:
    """Brings a database to the target."""
    async with await manager_of(path, migrations, **options) as manager:
        return await manager.initialize()


async def grown(
    path: str, names: Sequence[str], version: int, options: Mapping[str, str] | None = None
) -> None:
    """Makes tables of `workload.grown` by hand, and records them as they are."""
    await floor.grow(path, names, range(1, version + 1), concurrency=CONCURRENCY, options=options)
    steps = [one for name in names for one in workload.grown(name, version)]
    # The object store of the tests now and then lets two of many racing commits through. Here
    # none race: each table has one writer.
    async with await manager_of(
        path, steps, storage_options=options, on_unsafe_store=OnUnsafeStore.WARN
    ) as manager:
        await manager.stamp()


def initializing(
    where: Callable[[], Awaitable[str]],
    migrations: Sequence[Migration],
    **options: Any,
) -> Prepare:
    """Returns how to prepare runs of ours, each on a database that `where` makes ready.

    Args:
        where: Returns the database.
        migrations: All of them.
        options: Of the manager.
    """

    async def prepare() -> Measured:
        manager = await manager_of(await where(), migrations, **options)

        async def run() -> Report:
            async with manager:
                return await manager.initialize()

        return run

    return prepare


def start(path: str, migrations: Sequence[Migration], **options: Any) -> Prepare:
    """Returns how to prepare one start of ours with nothing to do."""

    async def prepare() -> Measured:
        manager = await manager_of(path, migrations, **options)

        async def run() -> Report:
            async with manager:
                report = await manager.initialize()
            assert not report.steps
            return report

        return run

    return prepare


def same(run: Measured) -> Prepare:
    """Returns how to prepare what needs no preparation."""

    async def prepare() -> Measured:
        return run

    return prepare


async def told_by(module: str, *arguments: object) -> dict[str, float]:
    """Runs a module in a process of its own; returns the JSON of its last line, if it wrote any."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = await anyio.run_process(command, stderr=None)
    lines = done.stdout.decode().splitlines()
    return json.loads(lines[-1]) if lines else {}
