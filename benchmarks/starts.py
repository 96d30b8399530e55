"""What a start costs that finds nothing to do, and what it costs to be there at all."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import lancedb

from aiomigrate import Migration
from benchmarks import alembic_peer, byhand, floor, peer, workload
from benchmarks.history import stamped_often
from benchmarks.measure import Prepare, Result, Target, interleaved
from benchmarks.setting import (
    HEAD,
    JOURNAL,
    LOG,
    Size,
    grown,
    manager_of,
    migrated,
    same,
    scratch_folder,
    start,
)

_READ_HEAD = f"""
import asyncio, sys
import lancedb

async def main():
    connection = await lancedb.connect_async(sys.argv[1])
    table = await connection.open_table({HEAD!r})
    print((await table.query().to_arrow()).num_rows)

asyncio.run(main())
"""
"""All that a process must do to learn that it is at target."""

_SCRIPT = """\
import pyarrow as pa

from aiomigrate import Migration, op

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False)])
migrations = [
    Migration(table=f"table_{number:04}", version=1, operations=[op.CreateTable(SCHEMA)])
    for number in range(16)
]
"""


async def nothing_to_do(size: Size) -> Result:
    """Measures a start at target: 16 tables, migrations loaded, connecting included."""
    names = workload.table_names(16)
    steps = workload.migrations(names)
    with scratch_folder() as folder:
        ours, theirs, hand = (str(folder / name) for name in ("ours", "peer", "gather"))
        await migrated(ours, steps)
        await peer.start(theirs, peer.peer_of(names))
        await byhand.start(hand, names)
        alembic = await anyio.to_thread.run_sync(alembic_peer.prepare, folder)
        samples = await interleaved(
            {
                "ours": start(ours, steps),
                "floor": same(partial(floor.start, ours, HEAD)),
                "peer": same(lambda: peer.start(theirs, peer.peer_of(names))),
                "gather": same(partial(byhand.start, hand, names)),
                "alembic": same(partial(alembic_peer.start, alembic)),
            },
            rounds=size.starts,
            warmups=size.start_warmups,
        )
    return Result(
        name="nothing-to-do",
        what=(
            "start at target, 16 tables, migrations loaded, connecting included; alembic: "
            "command.upgrade of one revision on SQLite"
        ),
        samples=samples,
        targets=(
            Target(of="ours", against="floor", at_most=1.25),
            Target(of="ours", against="peer", at_least=15),
            Target(of="ours", against="alembic", at_most=1, limit=("floor", "alembic")),
        ),
        facts={"tables": len(names)},
    )


async def flat_tables(size: Size) -> Result:
    """Measures whether a start at target grows with the number of tables.

    Both databases are made by migrating them: real tables, one migration each.
    """
    few, many = workload.table_names(16), workload.table_names(size.tables)
    steps = {
        name: workload.migrations(tables, 1) for name, tables in (("few", few), ("many", many))
    }
    with scratch_folder() as folder:
        for name, those in steps.items():
            await migrated(str(folder / name), those)
        samples = await _flat(folder, steps, size)
    return Result(
        name="flat-tables",
        what=f"start at target: {len(many)} tables (many) and {len(few)} (few)",
        samples=samples,
        targets=_FLAT,
        facts={"few": len(few), "many": len(many)},
    )


async def flat_scripts(size: Size) -> Result:
    """Measures whether a start at target grows with the number of migrations, once loaded."""
    names = workload.table_names(8)
    versions = {"few": 2, "many": 25}
    steps = {
        name: [one for table in names for one in workload.grown(table, count)]
        for name, count in versions.items()
    }
    loaded = {}
    with scratch_folder() as folder:
        for name, those in steps.items():
            await grown(str(folder / name), names, versions[name])
            begun = time.perf_counter()
            await manager_of(str(folder / name), those)
            loaded[name] = time.perf_counter() - begun
        samples = await _flat(folder, steps, size)
    return Result(
        name="flat-scripts",
        what=f"start at target: {len(steps['many'])} migrations (many), {len(steps['few'])} (few)",
        samples=samples,
        targets=_FLAT,
        facts={"loading_s": loaded},
    )


async def flat_events(size: Size) -> Result:
    """Measures whether a start at target grows with the number of past journal events.

    Eight tables of three migrations leave 26 events. The large history is the same lines recorded
    again and again (see `history`): its head has the versions, its journal the fragments, of
    hundreds of runs. A last stamp and a plan through the library show that it is a valid one.
    """
    names = workload.table_names(8)
    steps = workload.migrations(names, 3)
    with scratch_folder() as folder:
        small, large = str(folder / "few"), str(folder / "many")
        for path in (small, large):
            await migrated(path, steps)
        async with await manager_of(large, steps) as manager:
            runs = await stamped_often(
                large,
                await manager.scripts(),
                ledger_name=HEAD,
                events=size.events - len(names) - 1,
                log=LOG,
            )
            await manager.stamp()
            assert not (await manager.plan()).needs_lease
            assert len(await manager.history()) >= size.events
        events = [await _count(path, JOURNAL) for path in (small, large)]
        heads = [await _fragments(path, HEAD) for path in (small, large)]
        samples = await _flat(folder, {"few": steps, "many": steps}, size)
    return Result(
        name="flat-events",
        what=f"start at target: {events[1]} past events (many) and {events[0]} (few)",
        samples=samples,
        targets=_FLAT,
        facts={
            "few": events[0],
            "many": events[1],
            "runs": runs + 2,
            "head_fragments": [fragments for fragments, _ in heads],
            "head_versions": [version for _, version in heads],
        },
    )


_FLAT = (Target(of="many", against="few", at_most=1.3, limit=("floor of many", "floor of few")),)


async def _flat(
    folder: Path, steps: dict[str, Sequence[Migration]] | dict[str, list[Migration]], size: Size
) -> dict[str, list[float]]:
    contenders: dict[str, Prepare] = {}
    for name in ("few", "many"):
        path = str(folder / name)
        contenders[name] = start(path, steps[name])
        contenders[f"floor of {name}"] = same(partial(floor.start, path, HEAD))
    return await interleaved(contenders, rounds=size.starts, warmups=size.start_warmups)


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


async def process(size: Size) -> Result:
    """Measures a process that only looks: `aiomigrate status` of 16 tables at target."""
    command = await anyio.to_thread.run_sync(_command)
    with scratch_folder() as folder:
        database = str(folder / "database")
        await anyio.Path(folder / "migrations").mkdir()
        await anyio.Path(folder / "migrations" / "001_tables.py").write_text(_SCRIPT)
        await _ran([*command, "upgrade", "--uri", database], folder)
        samples = await interleaved(
            {
                "ours": _process([*command, "status", "--check", "--uri", database], folder),
                "floor": _process([sys.executable, "-c", _READ_HEAD, database], folder),
            },
            rounds=size.rounds,
            warmups=size.warmups,
        )
    return Result(
        name="process",
        what="a process: `aiomigrate status`; floor: one that imports lancedb and reads the head",
        samples=samples,
        targets=(Target(of="ours", against="floor", at_most=1.3),),
    )


async def imports(size: Size) -> Result:
    """Measures what it costs to be imported, and to print the help."""
    command = await anyio.to_thread.run_sync(_command)
    with scratch_folder() as folder:
        samples = await interleaved(
            {
                "import": _process([sys.executable, "-c", "import aiomigrate"], folder),
                "bare Python": _process([sys.executable, "-c", "pass"], folder),
                "--help": _process([*command, "--help"], folder),
            },
            rounds=size.rounds * 2,
        )
    return Result(
        name="imports",
        what="whole processes: `import aiomigrate`, an empty program, `aiomigrate --help`",
        samples=samples,
        targets=(
            Target(of="import", against="bare Python", within=0.060),
            Target(of="--help", within=0.300),
        ),
    )


def _command() -> list[str]:
    """Returns the command as it is installed beside this Python."""
    found = shutil.which("aiomigrate", path=str(Path(sys.executable).parent))
    return [found] if found else [sys.executable, "-m", "aiomigrate"]


def _process(command: Sequence[str], folder: Path) -> Prepare:
    return same(partial(_ran, command, folder))


async def _ran(command: Sequence[str], folder: Path) -> None:
    # Settings of the tests are none that the command knows, and it refuses those. And what is
    # imported is compiled once, as where it is installed.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("AIOMIGRATE_") and name != "PYTHONDONTWRITEBYTECODE"
    }
    await anyio.run_process(command, cwd=folder, env=kept, stderr=None)
