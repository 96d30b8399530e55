"""What aiomigrate itself does in each benchmark, by its public interface alone.

The benchmarks let it take turns with other contenders; `--against` lets it take turns with another
revision of itself (see `side`, `against`). So nothing here, nor what is imported here, imports a
module inside of aiomigrate: those have other names in other revisions.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from aiomigrate import Migration, MigrationManager, Report
from benchmarks import remote, workload
from benchmarks.measure import Measured
from benchmarks.setting import (
    LOG,
    Scratch,
    Side,
    Size,
    grown,
    initializing,
    manager_of,
    migrated,
    same,
    start,
    told_by,
)
from tests import predecessor

COMMAND = [sys.executable, "-m", "aiomigrate"]
"""The command of whichever aiomigrate is imported."""

FEW = 16
"""Tables of the small database of `flat-tables`."""

_MIGRATIONS = Path(__file__).parent.parent / "migrations"

_SCRIPT = """\
import pyarrow as pa

from aiomigrate import Migration, op

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False)])
migrations = [
    Migration(table=f"table_{number:04}", version=1, operations=[op.CreateTable(SCHEMA)])
    for number in range(16)
]
"""


async def nothing_to_do(folder: Path, size: Size) -> dict[str, Side]:
    """Starts at target, 16 tables."""
    steps = workload.migrations(workload.table_names(16))
    path = str(folder / "start")
    await migrated(path, steps)
    return {"start": Side(start(path, steps), runs=size.repeats)}


async def flat_tables(folder: Path, size: Size) -> dict[str, Side]:
    """Starts at target with many tables, and with few."""
    sides = {}
    for name, count in (("few", FEW), ("many", size.tables)):
        steps = workload.migrations(workload.table_names(count), 1)
        path = str(folder / name)
        await migrated(path, steps)
        sides[name] = Side(start(path, steps), runs=size.repeats)
    return sides


def scripts() -> dict[str, list[Migration]]:
    """Returns the migrations of `flat-scripts`: few and many, of the same tables."""
    names = workload.table_names(8)
    return {
        name: [one for table in names for one in workload.grown(table, versions)]
        for name, versions in (("few", 2), ("many", 25))
    }


async def flat_scripts(folder: Path, size: Size) -> dict[str, Side]:
    """Starts at target with many migrations, and with few."""
    sides = {}
    for name, steps in scripts().items():
        path = str(folder / name)
        await grown(path, workload.table_names(8), steps[-1].version)
        sides[name] = Side(start(path, steps), runs=size.repeats)
    return sides


async def flat_events(folder: Path, size: Size) -> dict[str, Side]:
    """Starts at target with many past events, of real stamps, and with few."""
    steps = workload.migrations(workload.table_names(8), 3)
    sides = {}
    for name, events in (("few", 0), ("many", size.events)):
        path = str(folder / name)
        await migrated(path, steps)
        async with await manager_of(path, steps) as manager:
            for _ in range(events // 9):  # a stamp of eight lines is nine events
                await manager.stamp()
        sides[name] = Side(start(path, steps), runs=size.repeats)
    return sides


async def process(
    folder: Path, size: Size, command: Sequence[str] = tuple(COMMAND)
) -> dict[str, Side]:
    """Runs a process that only looks: `aiomigrate status` of 16 tables at target."""
    database = str(folder / "database")
    await anyio.Path(folder / "migrations").mkdir()
    await anyio.Path(folder / "migrations" / "001_tables.py").write_text(_SCRIPT)
    await program([*command, "upgrade", "--uri", database], folder)
    status = [*command, "status", "--check", "--uri", database]
    return {
        "status": Side(same(partial(program, status, folder)), runs=size.reruns, is_process=True)
    }


async def imports(
    folder: Path, size: Size, command: Sequence[str] = tuple(COMMAND)
) -> dict[str, Side]:
    """Runs a process that imports aiomigrate, and one that prints the help."""
    programs = {
        "import": [sys.executable, "-c", "import aiomigrate"],
        "--help": [*command, "--help"],
    }
    return {
        name: Side(same(partial(program, one, folder)), runs=size.repeats, is_process=True)
        for name, one in programs.items()
    }


async def program(command: Sequence[str], folder: Path) -> None:
    """Runs a process."""
    # Settings of the tests are none that the command knows, and it refuses those. And what is
    # imported is compiled once, as where it is installed.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("AIOMIGRATE_") and name != "PYTHONDONTWRITEBYTECODE"
    }
    await anyio.run_process(command, cwd=folder, env=kept, stderr=None)


async def first_run(folder: Path, size: Size) -> dict[str, Side]:
    """Migrates a fresh database: four metadata-only versions per table."""
    scratch = Scratch(folder / "ours")

    async def fresh() -> str:
        return scratch.fresh()

    steps = workload.migrations(workload.table_names(size.lines))
    return {"run": Side(initializing(fresh, steps), runs=size.reruns)}


async def together(folder: Path, size: Size) -> dict[str, Side]:
    """Makes one metadata-only migration on each of many tables."""
    return await grown_from_one(folder, workload.table_names(size.together), 2, size)


async def chain(folder: Path, size: Size) -> dict[str, Side]:
    """Makes twenty metadata-only migrations on one table."""
    return await grown_from_one(folder, ["notes"], 21, size)


async def grown_from_one(
    folder: Path, names: Sequence[str], version: int, size: Size
) -> dict[str, Side]:
    """Brings copies of a database (`made`) from version 1 to another."""
    made = folder / "made"
    await grown(str(made), names, 1)
    scratch = Scratch(folder / "ours")
    steps = [one for name in names for one in workload.grown(name, version)]
    return {"run": Side(initializing(partial(scratch.copy, made), steps), runs=size.reruns)}


async def operation(folder: Path, size: Size) -> dict[str, Side]:
    """Adds a column by one migration; what it took without ledger and lease, by its report."""
    path = str(folder / "database")
    names = iter(workload.table_names(10_000))

    async def prepare() -> Measured:
        # Of a line that is there: a new one is enrolled meanwhile, which is the ledger's.
        steps = workload.migrations([next(names)], 2)
        async with MigrationManager(path, migrations=steps[:1], logger=LOG) as manager:
            await manager.upgrade()

        async def run() -> Mapping[str, float]:
            async with MigrationManager(path, migrations=steps, logger=LOG) as manager:
                report = await manager.upgrade()
            (step,) = report.steps
            return {"took": step.ran_s, "ledger commits": report.ledger_commits}

        return run

    return {"AddColumns": Side(prepare, runs=size.repeats)}


def memo_archive() -> Path | None:
    """Returns the memo application's database as the predecessor wrote it, where there is one."""
    # The tests take the setting out of the environment, and keep it under the other name.
    folder = os.environ.get("AIOMIGRATE_FIXTURES") or os.environ.get("TESTS_FIXTURES")
    archive = Path(folder or ".", "memo_app_v1.tar.gz")
    return archive if archive.is_file() else None


async def memo_app(folder: Path, size: Size) -> dict[str, Side]:
    """Brings copies of an application's database (`made`) from its first release to the last."""
    made = folder / "made"
    archive = memo_archive()
    if archive is None:
        await predecessor.build(made, predecessor.State.V1)
    else:
        await anyio.to_thread.run_sync(_unpack, archive, made)
    scratch = Scratch(folder / "ours")

    async def prepare() -> Measured:
        path = await scratch.copy(made)
        manager = MigrationManager(path, migrations=_MIGRATIONS, logger=LOG)
        await manager.scripts()

        async def run() -> Report:
            async with manager:
                return await manager.initialize()

        return run

    return {"run": Side(prepare, runs=size.reruns)}


def _unpack(archive: Path, path: Path) -> None:
    path.mkdir()
    with tarfile.open(archive) as tar:
        tar.extractall(path, filter="data")


async def s3_start(_: Path, size: Size) -> dict[str, Side]:
    """Starts at target over S3's protocol, 16 tables."""
    return await remote.start_side(size)


async def s3_run(_: Path, size: Size) -> dict[str, Side]:
    """Makes one metadata-only migration on each of 64 tables over S3's protocol."""
    return await remote.run_side(size)


async def memory(folder: Path, size: Size) -> dict[str, Side]:
    """Migrates many tables in a process of its own; its peak memory."""
    scratch = Scratch(folder)

    async def run() -> Mapping[str, float]:
        figures = await told_by("wide", "ours", scratch.fresh(), size.tables)
        return {"peak MB": figures["peak_mb"], "ledger commits": figures["ledger_commits"]}

    return {"run": Side(same(run), is_process=True)}


async def overhead(folder: Path, size: Size) -> dict[str, Side]:
    """Works for long by a clock that hurries, in a process of its own; its processor seconds."""
    scratch = Scratch(folder)

    async def run() -> Mapping[str, float]:
        figures = await told_by("hour", "ours", scratch.fresh(), size.simulated_s)
        return {"processor": figures["cpu_s"]}

    return {"run": Side(same(run), is_process=True)}


async def rebuild(folder: Path, size: Size) -> dict[str, Side]:
    """Rewrites a table of vectors, and returns to where it was, in a process of its own."""
    made = folder / "made"
    await told_by("rebuild", "make", made, size.rows)

    async def run(path: str) -> Mapping[str, float]:
        figures = await told_by("rebuild", "ours", path, size.rows)
        await anyio.to_thread.run_sync(shutil.rmtree, path)
        return {
            "took": figures["rebuild_s"], "rollback": figures["rollback_s"],
            "peak MB": figures["peak_mb"], "ledger commits": figures["ledger_commits"],
        }  # fmt: skip

    return {"run": Side(_on_copies(made, folder, run), is_process=True)}


async def backfill(folder: Path, size: Size) -> dict[str, Side]:
    """Fills a vector column by a model with the latency of a service, in a process of its own."""
    made = folder / "made"
    await told_by("backfill", "make", made, size.filled, 0)

    async def run(path: str) -> Mapping[str, float]:
        figures = await told_by("backfill", "ours", path, size.filled, 20)
        await anyio.to_thread.run_sync(shutil.rmtree, path)
        return {
            "took": figures["took_s"], "peak MB": figures["peak_mb"],
            "ledger commits": figures["ledger_commits"],
        }  # fmt: skip

    return {"run": Side(_on_copies(made, folder, run), is_process=True)}


def _on_copies(
    made: Path, folder: Path, run: Callable[[str], Awaitable[object]]
) -> Callable[[], Awaitable[Measured]]:
    scratch = Scratch(folder / "ours")

    async def prepare() -> Measured:
        return partial(run, await scratch.copy(made))

    return prepare


Ours = Callable[[Path, Size], Awaitable[dict[str, Side]]]
"""Makes databases in a folder, and returns what is run on them, by name."""

SIDES: Mapping[str, Ours] = {
    "nothing-to-do": nothing_to_do,
    "flat-tables": flat_tables,
    "flat-events": flat_events,
    "flat-scripts": flat_scripts,
    "process": process,
    "imports": imports,
    "first-run": first_run,
    "together": together,
    "chain": chain,
    "operation": operation,
    "memo-app": memo_app,
    "s3-start": s3_start,
    "s3-run": s3_run,
    "memory": memory,
    "overhead": overhead,
    "rebuild": rebuild,
    "backfill": backfill,
}
"""By the benchmark's name."""
