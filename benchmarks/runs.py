"""What runs cost that migrate: many tables, a long line, one operation, an application's past."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import anyio
import anyio.to_thread
import lancedb

from aiomigrate import Migration, MigrationManager, Report, op
from benchmarks import byhand, calls, floor, memo, peer, workload
from benchmarks.measure import Measured, Result, Target, Unit, interleaved
from benchmarks.setting import (
    CONCURRENCY,
    LOG,
    Scratch,
    Size,
    grown,
    initializing,
    scratch_folder,
)
from tests import predecessor
from tests.tools import FIXTURES

_MIGRATIONS = Path(__file__).parent.parent / "migrations"


async def first_run(size: Size) -> Result:
    """Measures a first run of four metadata-only versions per table, on a fresh database."""
    names = workload.table_names(size.lines)
    reports: list[Report] = []
    with scratch_folder() as folder:
        contenders = ("ours", "floor", "calls", "peer", "gather")
        scratch = {name: Scratch(folder / name) for name in contenders}

        async def fresh() -> str:
            return scratch["ours"].fresh()

        async def bare() -> Measured:
            path = scratch["floor"].fresh()
            return lambda: floor.first_run(path, names, concurrency=CONCURRENCY)

        async def called() -> Measured:
            path = scratch["calls"].fresh()
            return lambda: calls.first_run(path, names, concurrency=CONCURRENCY)

        async def theirs() -> Measured:
            path = scratch["peer"].fresh()
            return lambda: peer.start(path, peer.peer_of(names))

        async def hand() -> Measured:
            path = scratch["gather"].fresh()
            return lambda: byhand.start(path, names)

        samples = await interleaved(
            {
                "ours": initializing(fresh, workload.migrations(names), reports),
                "floor": bare,
                "calls": called,
                "peer": theirs,
                "gather": hand,
            },
            rounds=size.rounds,
            warmups=size.warmups,
        )
    assert all(len(report.applied) == len(names) * workload.VERSIONS for report in reports)
    return Result(
        name="first-run",
        what=f"fresh database, {len(names)} tables x {workload.VERSIONS} metadata-only migrations",
        samples=samples,
        targets=(
            Target(of="ours", against="floor", at_most=1.5, limit=("calls", "floor")),
            Target(of="ours", against="peer", at_least=8),
        ),
        facts={
            "tables": len(names),
            "migrations": len(names) * workload.VERSIONS,
            "ledger_commits": [report.ledger_commits for report in reports],
            "lease_s": [report.lease_s for report in reports],
        },
    )


async def together(size: Size) -> Result:
    """Measures many tables that finish one metadata-only migration each at about the same time."""
    names = workload.table_names(size.together)
    samples, reports = await _grown(names, range(2, 3), size)
    samples["ledger commits"] = [float(report.ledger_commits) for report in reports]
    return Result(
        name="together",
        what=f"{len(names)} tables at version 1, one metadata-only migration each",
        samples=samples,
        targets=(
            Target(of="ledger commits", within=12),
            Target(of="ours", against="floor", at_most=1.6, limit=("calls", "floor")),
        ),
        units={"ledger commits": Unit.COUNT},
        facts={"lease_s": [report.lease_s for report in reports]},
    )


async def chain(size: Size) -> Result:
    """Measures one table's long line, where nothing can be done at once."""
    last = 21
    samples, reports = await _grown(["notes"], range(2, last + 1), size)
    return Result(
        name="chain",
        what=f"one table at version 1, {last - 1} metadata-only migrations one after another",
        samples=samples,
        targets=(Target(of="ours", against="floor", at_most=3.5, limit=("calls", "floor")),),
        facts={
            "ledger_commits": [report.ledger_commits for report in reports],
            "lease_s": [report.lease_s for report in reports],
        },
    )


async def _grown(
    names: list[str], versions: range, size: Size
) -> tuple[dict[str, list[float]], list[Report]]:
    """Lets ours, the floor and the calls alone bring copies of one database to other versions."""
    reports: list[Report] = []
    with scratch_folder() as folder:
        made = str(folder / "made")
        await grown(made, names, 1)
        scratch = {name: Scratch(folder / name) for name in ("ours", "floor", "calls")}
        steps = [one for name in names for one in workload.grown(name, versions[-1])]

        async def bare() -> Measured:
            path = await scratch["floor"].copy(made)
            return lambda: floor.grow(path, names, versions, concurrency=CONCURRENCY)

        async def called() -> Measured:
            path = await scratch["calls"].copy(made)
            return lambda: calls.grow(path, names, versions, concurrency=CONCURRENCY)

        samples = await interleaved(
            {
                "ours": initializing(lambda: scratch["ours"].copy(made), steps, reports),
                "floor": bare,
                "calls": called,
            },
            rounds=size.rounds,
            warmups=size.warmups,
        )
    assert all(len(report.applied) == len(names) * len(versions) for report in reports)
    return samples, reports[-size.rounds :]


async def operation(size: Size) -> Result:
    """Measures one metadata-only operation, without the ledger, against the bare call."""
    samples: dict[str, list[float]] = {"ours": [], "floor": []}
    with scratch_folder() as folder:
        path = str(folder / "database")
        for number in range(size.starts):
            name = f"table_{number:04}"
            # Of a line that is there: a new one is enrolled meanwhile, which is the ledger's.
            first = Migration(table=name, version=1, operations=[op.CreateTable(workload.SCHEMA)])
            step = Migration(table=name, version=2, operations=[op.AddColumns(workload.TAGS)])
            async with MigrationManager(path, migrations=[first], logger=LOG) as manager:
                await manager.upgrade()
            connection = await lancedb.connect_async(path)
            await workload.create(connection, f"{name}_bare")
            begun = time.perf_counter()
            await workload.alter(await connection.open_table(f"{name}_bare"), 2)
            samples["floor"].append(time.perf_counter() - begun)
            connection.close()
            async with MigrationManager(path, migrations=[first, step], logger=LOG) as manager:
                (report,) = (await manager.upgrade()).steps
            samples["ours"].append(report.ran_s)
    return Result(
        name="operation",
        what="one AddColumns: opening, looking, committing, comparing; ledger and lease apart",
        samples=samples,
        targets=(Target(of="ours", against="floor", at_most=1.5),),
    )


async def memo_app(size: Size) -> Result:
    """Measures a real application's database, from its first release to the latest.

    The database is the one that `AIOMIGRATE_FIXTURES` has, as the predecessor's own code wrote it;
    without it, a small one in its format.
    """
    reports: list[Report] = []
    scripts = peer.Peer(
        {
            table: [peer.PeerMigration(table=table, version=v, up=up) for v, up in versions]
            for table, versions in predecessor.LATEST.items()
        }
    )
    with scratch_folder() as folder:
        made = folder / "made"
        archive = Path(FIXTURES or ".", "memo_app_v1.tar.gz")
        is_there = await anyio.Path(archive).is_file()
        if is_there:
            await anyio.to_thread.run_sync(_unpack, archive, made)
        else:
            await predecessor.build(made, predecessor.State.V1)
        scratch = {name: Scratch(folder / name) for name in ("ours", "floor", "calls", "peer")}

        async def ours() -> Measured:
            path = await scratch["ours"].copy(made)
            manager = MigrationManager(path, migrations=_MIGRATIONS, logger=LOG)
            await manager.scripts()

            async def run() -> None:
                async with manager:
                    reports.append(await manager.initialize())

            return run

        async def bare() -> Measured:
            path = await scratch["floor"].copy(made)
            return lambda: memo.upgrade(path, memo.Bare())

        async def called() -> Measured:
            path = await scratch["calls"].copy(made)
            return lambda: memo.upgrade(path, memo.Careful())

        async def theirs() -> Measured:
            path = await scratch["peer"].copy(made)
            return lambda: peer.start(path, scripts)

        samples = await interleaved(
            {"ours": ours, "floor": bare, "calls": called, "peer": theirs},
            rounds=size.rounds,
            warmups=size.warmups,
        )
    return Result(
        name="memo-app",
        what=(
            "a note-taking application's database from its first release to the latest, "
            + ("as its users have it" if is_there else "built small: AIOMIGRATE_FIXTURES has none")
        ),
        samples=samples,
        targets=(Target(of="ours", against="peer", at_least=8),),
        facts={
            "migrations": len(reports[0].applied),
            "ledger_commits": [report.ledger_commits for report in reports],
        },
    )


def _unpack(archive: Path, path: Path) -> None:
    path.mkdir()
    with tarfile.open(archive) as tar:
        tar.extractall(path, filter="data")
