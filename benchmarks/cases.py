"""The benchmarks: which contenders take turns at what, and the targets they are held against."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import lancedb
import structlog

from aiomigrate import Migration, MigrationManager, Report, op
from benchmarks import floor, peer, workload
from benchmarks.history import stamped_often
from benchmarks.measure import Measured, Prepare, Result, Target, interleaved

HEAD = "table_migrations"
JOURNAL = f"{HEAD}_history"
CONCURRENCY = 16

# What an application does that logs errors only: the library's own logging stays in the figures,
# the terminal's does not.
_LOG = structlog.wrap_logger(
    None, wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        rounds: Runs kept of each contender.
        tables: Tables of the large database of `flat-tables`.
        events: Journal events of the large database of `flat-events`.
        lines: Tables of `first-run`.
        rows: Rows of `rebuild`, and three times as many.
        rebuilds: Runs of it kept of each contender.
        filled: Rows of `backfill`; its memory is told at `rows` and three times as many.
        is_quick: Whether it is too little to judge times by.
    """

    rounds: int = 7
    tables: int = 1024
    events: int = 5000
    lines: int = 64
    rows: int = 1_000_000
    rebuilds: int = 3
    filled: int = 600_000
    is_quick: bool = False


FULL = Size()
QUICK = Size(
    rounds=3,
    tables=128,
    events=500,
    lines=16,
    rows=20_000,
    rebuilds=1,
    filled=20_000,
    is_quick=True,
)


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="aiomigrate-benchmark-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Scratch:
    """A folder with a fresh path for every run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def fresh(self) -> str:
        """Returns the path of a database that does not exist yet, and removes the one before."""
        shutil.rmtree(self._folder / f"{self._count}", ignore_errors=True)
        self._count += 1
        return str(self._folder / f"{self._count}")


async def manager_of(path: str, names: Sequence[str], **options: Any) -> MigrationManager:
    """Returns a manager of the workload, its migrations loaded, not connected yet."""
    versions = options.pop("versions", workload.VERSIONS)
    manager = MigrationManager(
        path,
        migrations=workload.migrations(names, versions),
        concurrency=CONCURRENCY,
        logger=_LOG,
        **options,
    )
    await manager.scripts()
    return manager


async def _migrated(path: str, names: Sequence[str], versions: int = workload.VERSIONS) -> Report:
    async with await manager_of(path, names, versions=versions) as manager:
        return await manager.initialize()


async def _count(path: str, table: str) -> int:
    connection = await lancedb.connect_async(path)
    rows = await (await connection.open_table(table)).count_rows()
    connection.close()
    return rows


async def _fragments(path: str, table: str) -> tuple[int, int]:
    connection = await lancedb.connect_async(path)
    handle = await connection.open_table(table)
    stats: Any = await handle.stats()
    found = int(stats["fragment_stats"]["num_fragments"]), await handle.version()
    connection.close()
    return found


def _start(path: str, names: Sequence[str], versions: int = workload.VERSIONS) -> Prepare:
    """Returns how to prepare one start of ours with nothing to do."""

    async def prepare() -> Measured:
        manager = await manager_of(path, names, versions=versions)

        async def run() -> None:
            async with manager:
                report = await manager.initialize()
            assert not report.steps

        return run

    return prepare


def _same(run: Callable[[], Awaitable[object]]) -> Prepare:
    async def prepare() -> Measured:
        return run

    return prepare


async def nothing_to_do(size: Size) -> Result:
    """Measures a start at target: 16 tables, migrations loaded, connecting included."""
    names = workload.table_names(16)
    with _folder() as folder:
        ours, theirs = str(folder / "ours"), str(folder / "peer")
        await _migrated(ours, names)
        await peer.start(theirs, peer.peer_of(names))
        samples = await interleaved(
            {
                "ours": _start(ours, names),
                "floor": _same(partial(floor.start, ours, HEAD)),
                "peer": _same(lambda: peer.start(theirs, peer.peer_of(names))),
            },
            rounds=size.rounds * 5,
        )
    return Result(
        name="nothing-to-do",
        what="start at target, 16 tables, migrations loaded, connecting included",
        samples=samples,
        targets=(
            Target(of="ours", against="floor", at_most=1.5),
            Target(of="ours", against="peer", at_least=10),
        ),
        facts={"tables": len(names)},
    )


async def first_run(size: Size) -> Result:
    """Measures a first run of four metadata-only versions per table, on a fresh database."""
    names = workload.table_names(size.lines)
    last: list[Report] = []
    with _folder() as folder:

        async def ours() -> Measured:
            manager = await manager_of(scratch["ours"].fresh(), names)

            async def run() -> None:
                async with manager:
                    last[:] = [await manager.initialize()]

            return run

        async def bare() -> Measured:
            path = scratch["floor"].fresh()
            return lambda: floor.first_run(path, names, concurrency=CONCURRENCY)

        async def theirs() -> Measured:
            path = scratch["peer"].fresh()
            return lambda: peer.start(path, peer.peer_of(names))

        contenders = {"ours": ours, "floor": bare, "peer": theirs}
        scratch = {name: Scratch(folder / name) for name in contenders}
        samples = await interleaved(contenders, rounds=size.rounds)
    (report,) = last
    assert len(report.applied) == len(names) * workload.VERSIONS
    return Result(
        name="first-run",
        what=f"fresh database, {len(names)} tables x {workload.VERSIONS} metadata-only migrations",
        samples=samples,
        targets=(
            Target(of="ours", against="floor", at_most=2),
            Target(of="ours", against="peer", at_least=5),
        ),
        facts={
            "tables": len(names),
            "migrations": len(report.applied),
            "ledger_commits": report.ledger_commits,
            "lease_s": report.lease_s,
        },
    )


async def flat_tables(size: Size) -> Result:
    """Measures whether a start at target grows with the number of tables.

    Both databases are made by migrating them: real tables, one migration each.
    """
    few, many = workload.table_names(16), workload.table_names(size.tables)
    with _folder() as folder:
        small, large = str(folder / "small"), str(folder / "large")
        await _migrated(small, few, versions=1)
        await _migrated(large, many, versions=1)
        samples = await interleaved(
            {
                "few": _start(small, few, versions=1),
                "many": _start(large, many, versions=1),
                "floor of few": _same(partial(floor.start, small, HEAD)),
                "floor of many": _same(partial(floor.start, large, HEAD)),
            },
            rounds=size.rounds * 5,
        )
    return Result(
        name="flat-tables",
        what=f"start at target: {len(many)} tables (many) and {len(few)} (few)",
        samples=samples,
        targets=(Target(of="many", against="few", at_most=1.5),),
        facts={"few": len(few), "many": len(many)},
    )


async def flat_events(size: Size) -> Result:
    """Measures whether a start at target grows with the number of past journal events.

    Eight tables of three migrations leave 26 events. The large history is the same lines recorded
    again and again (see `history`): its head has the versions, its journal the fragments, of
    hundreds of runs. A last stamp and a plan through the library show that it is a valid one.
    """
    names = workload.table_names(8)
    versions = 3
    with _folder() as folder:
        small, large = str(folder / "small"), str(folder / "large")
        for path in (small, large):
            await _migrated(path, names, versions=versions)
        async with await manager_of(large, names, versions=versions) as manager:
            runs = await stamped_often(
                large,
                await manager.scripts(),
                ledger_name=HEAD,
                events=size.events - len(names) - 1,
                log=_LOG,
            )
            await manager.stamp()
            assert not (await manager.plan()).needs_lease
            assert len(await manager.history()) >= size.events
        events = [await _count(path, JOURNAL) for path in (small, large)]
        heads = [await _fragments(path, HEAD) for path in (small, large)]
        samples = await interleaved(
            {
                "few": _start(small, names, versions),
                "many": _start(large, names, versions),
                "floor of few": _same(partial(floor.start, small, HEAD)),
                "floor of many": _same(partial(floor.start, large, HEAD)),
            },
            rounds=size.rounds * 5,
        )
    return Result(
        name="flat-events",
        what=f"start at target: {events[1]} past events (many) and {events[0]} (few)",
        samples=samples,
        targets=(Target(of="many", against="few", at_most=1.5),),
        facts={
            "few": events[0],
            "many": events[1],
            "runs": runs + 2,
            "head_fragments": [fragments for fragments, _ in heads],
            "head_versions": [version for _, version in heads],
        },
    )


async def operation(size: Size) -> Result:
    """Measures one metadata-only operation, without the ledger, against the bare call."""
    samples: dict[str, list[float]] = {"ours": [], "floor": []}
    with _folder() as folder:
        path = str(folder / "database")
        for number in range(size.rounds * 5):
            name = f"table_{number:04}"
            connection = await lancedb.connect_async(path)
            await workload.create(connection, name)
            await workload.create(connection, f"{name}_bare")
            begun = time.perf_counter()
            await workload.alter(await connection.open_table(f"{name}_bare"), 2)
            samples["floor"].append(time.perf_counter() - begun)
            connection.close()
            step = Migration(table=name, version=1, operations=[op.AddColumns(workload.TAGS)])
            async with MigrationManager(path, migrations=[step], logger=_LOG) as manager:
                (report,) = (await manager.upgrade()).steps
            samples["ours"].append(report.ran_s)
    return Result(
        name="operation",
        what="one AddColumns: opening, looking, committing, comparing; ledger and lease apart",
        samples=samples,
        targets=(Target(of="ours", against="floor", at_most=1.5),),
    )


async def rebuild(size: Size) -> Result:
    """Measures rewriting a table of vectors, and returning to where it was."""
    samples: dict[str, list[float]] = {"ours": [], "floor": [], "rollback": [], "0.1 s": []}
    peaks: dict[int, float] = {}
    with _folder() as folder:
        for rows in (size.rows, 3 * size.rows):
            for round_ in range(size.rebuilds if rows == size.rows else 1):
                for how in ("floor", "ours") if round_ % 2 else ("ours", "floor"):
                    path = folder / f"{how}-{rows}"
                    await _rebuilt(how, path, rows)
                    told = await _rebuilt(how, path, rows)
                    await anyio.to_thread.run_sync(shutil.rmtree, path)
                    if how == "ours":
                        peaks[rows] = max(told["peak_mb"], peaks.get(rows, 0.0))
                    if rows == size.rows:
                        samples[how].append(told["rebuild_s"])
                    if how == "ours" and rows == size.rows:
                        samples["rollback"].append(told["rollback_s"])
                        samples["0.1 s"].append(0.1)
    return Result(
        name="rebuild",
        what=f"{size.rows:,} rows of 384 floats and text; peak memory of the process in facts",
        samples=samples,
        targets=(
            Target(of="ours", against="floor", at_most=1 / 0.9),
            Target(of="rollback", against="0.1 s", at_most=1),
        ),
        facts={"peak_mb": {str(rows): round(peak) for rows, peak in peaks.items()}},
    )


async def _rebuilt(how: str, path: Path, rows: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.rebuild", how, str(path), str(rows)]
    done = await anyio.run_process(command, stderr=None)
    lines = done.stdout.decode().splitlines()
    return json.loads(lines[-1]) if lines else {}


async def backfill(size: Size) -> Result:
    """Measures filling a vector column by a model with the latency of a service."""
    names = ("function", "floor", "ours")
    samples: dict[str, list[float]] = {name: [] for name in names}
    told: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with _folder() as folder:
        await _backfilled("make", folder / "made", size.filled, 0)
        for round_ in range(size.rebuilds):
            for name in names[round_ % 3 :] + names[: round_ % 3]:
                path = folder / name
                await anyio.to_thread.run_sync(shutil.copytree, folder / "made", path)
                one = await _backfilled(name, path, size.filled, 20)
                samples[name].append(one["took_s"])
                told[name].append(one)
                await anyio.to_thread.run_sync(shutil.rmtree, path)
        peaks = {}
        for rows in () if size.is_quick else (size.rows, 3 * size.rows):
            await _backfilled("make", folder / "large", rows, 0)
            peaks[rows] = (await _backfilled("ours", folder / "large", rows, 0))["peak_mb"]
            await anyio.to_thread.run_sync(shutil.rmtree, folder / "large")
    mine = told["ours"]
    samples["written"] = [one["written"] for one in mine]
    samples["1.3 x payload"] = [1.3 for _ in mine]
    samples["loop delay"] = [one["lag_ms"] / 1000 for one in mine]
    samples["50 ms"] = [0.05 for _ in mine]
    samples["peak"] = [peak / 1000 for peak in peaks.values()] or [
        one["peak_mb"] / 1000 for one in mine
    ]
    samples["1.5 GB"] = [1.5 for _ in samples["peak"]]
    return Result(
        name="backfill",
        what=(
            f"{size.filled:,} vectors of 256 floats, 8 calls of 32 texts and 20 ms in flight; "
            "function: the calls alone, floor: calls and commits by hand"
        ),
        samples=samples,
        targets=(
            Target(of="ours", against="function", at_most=1 / 0.9),
            Target(of="written", against="1.3 x payload", at_most=1),
            Target(of="loop delay", against="50 ms", at_most=1),
            Target(of="peak", against="1.5 GB", at_most=1),
        ),
        facts={
            "peak_mb": {str(rows): round(peak) for rows, peak in peaks.items()},
            "floor_written": [one["written"] for one in told["floor"]],
        },
    )


async def _backfilled(how: str, path: Path, rows: int, latency_ms: float) -> dict[str, float]:
    command = [
        sys.executable, "-m", "benchmarks.backfill", how, str(path), str(rows), str(latency_ms),
    ]  # fmt: skip
    done = await anyio.run_process(command, stderr=None)
    lines = done.stdout.decode().splitlines()
    return json.loads(lines[-1]) if lines else {}


Case = Callable[[Size], Awaitable[Result]]

CASES: dict[str, Case] = {
    "nothing-to-do": nothing_to_do,
    "first-run": first_run,
    "flat-tables": flat_tables,
    "flat-events": flat_events,
    "operation": operation,
    "rebuild": rebuild,
    "backfill": backfill,
}
"""Every benchmark by name, in the order they run."""

__all__ = ["CASES", "FULL", "QUICK", "Case", "Size"]
