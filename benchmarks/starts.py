"""What a start costs that finds nothing to do, and what it costs to be there at all."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import lancedb

from benchmarks import alembic_peer, byhand, floor, ours, peer, workload
from benchmarks.history import stamped_often
from benchmarks.measure import Prepare, Result, Target, interleaved
from benchmarks.setting import (
    HEAD,
    JOURNAL,
    LOG,
    Side,
    Size,
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


async def nothing_to_do(size: Size) -> Result:
    """Measures a start at target: 16 tables, migrations loaded, connecting included."""
    names = workload.table_names(16)
    with scratch_folder() as folder:
        theirs, hand = (str(folder / name) for name in ("peer", "gather"))
        mine = await ours.nothing_to_do(folder, size)
        await peer.start(theirs, peer.peer_of(names))
        await byhand.start(hand, names)
        alembic = await anyio.to_thread.run_sync(alembic_peer.prepare, folder)
        samples = await interleaved(
            {
                "ours": mine["start"].prepare,
                "floor": same(partial(floor.start, str(folder / "start"), HEAD)),
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
    with scratch_folder() as folder:
        samples = await _flat(folder, await ours.flat_tables(folder, size), size)
    return Result(
        name="flat-tables",
        what=f"start at target: {size.tables} tables (many) and {ours.FEW} (few)",
        samples=samples,
        targets=_FLAT,
        facts={"few": ours.FEW, "many": size.tables},
    )


async def flat_scripts(size: Size) -> Result:
    """Measures whether a start at target grows with the number of migrations, once loaded."""
    steps = ours.scripts()
    loaded = {}
    with scratch_folder() as folder:
        mine = await ours.flat_scripts(folder, size)
        for name, those in steps.items():
            begun = time.perf_counter()
            await manager_of(str(folder / name), those)
            loaded[name] = time.perf_counter() - begun
        samples = await _flat(folder, mine, size)
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
        mine = {name: Side(start(str(folder / name), steps)) for name in ("few", "many")}
        samples = await _flat(folder, mine, size)
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


async def _flat(folder: Path, mine: Mapping[str, Side], size: Size) -> dict[str, list[float]]:
    contenders: dict[str, Prepare] = {}
    for name, side in mine.items():
        contenders[name] = side.prepare
        contenders[f"floor of {name}"] = same(partial(floor.start, str(folder / name), HEAD))
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
        mine = await ours.process(folder, size, command)
        bare = [sys.executable, "-c", _READ_HEAD, str(folder / "database")]
        samples = await interleaved(
            {
                "ours": mine["status"].prepare,
                "floor": same(partial(ours.program, bare, folder)),
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
        mine = await ours.imports(folder, size, command)
        bare = [sys.executable, "-c", "pass"]
        samples = await interleaved(
            {
                "import": mine["import"].prepare,
                "bare Python": same(partial(ours.program, bare, folder)),
                "--help": mine["--help"].prepare,
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
    return [found] if found else ours.COMMAND
