"""What runs cost that migrate: many tables, a long line, one operation, an application's past."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import lancedb

from aiomigrate import Report
from benchmarks import byhand, calls, floor, memo, ours, peer, workload
from benchmarks.measure import Measured, Result, Target, Unit, interleaved
from benchmarks.setting import CONCURRENCY, Scratch, Size, scratch_folder
from tests import predecessor


async def first_run(size: Size) -> Result:
    """Measures a first run of four metadata-only versions per table, on a fresh database."""
    names = workload.table_names(size.lines)
    reports: list[Report] = []
    with scratch_folder() as folder:
        contenders = ("floor", "calls", "peer", "gather")
        scratch = {name: Scratch(folder / name) for name in contenders}
        mine = await ours.first_run(folder, size)

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
                "ours": mine["run"].prepare,
                "floor": bare,
                "calls": called,
                "peer": theirs,
                "gather": hand,
            },
            rounds=size.rounds,
            warmups=size.warmups,
            after=_keeping(reports),
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
        mine = await ours.grown_from_one(folder, names, versions[-1], size)
        made = folder / "made"
        scratch = {name: Scratch(folder / name) for name in ("floor", "calls")}

        async def bare() -> Measured:
            path = await scratch["floor"].copy(made)
            return lambda: floor.grow(path, names, versions, concurrency=CONCURRENCY)

        async def called() -> Measured:
            path = await scratch["calls"].copy(made)
            return lambda: calls.grow(path, names, versions, concurrency=CONCURRENCY)

        samples = await interleaved(
            {
                "ours": mine["run"].prepare,
                "floor": bare,
                "calls": called,
            },
            rounds=size.rounds,
            warmups=size.warmups,
            after=_keeping(reports),
        )
    assert all(len(report.applied) == len(names) * len(versions) for report in reports)
    return samples, reports


def _keeping(reports: list[Report]) -> Callable[[str, object], Awaitable[None]]:
    async def keep(_: str, result: object) -> None:
        if isinstance(result, Report):
            reports.append(result)

    return keep


async def operation(size: Size) -> Result:
    """Measures one metadata-only operation, without the ledger, against the bare call."""
    samples: dict[str, list[float]] = {"ours": [], "floor": []}
    with scratch_folder() as folder:
        mine = await ours.operation(folder, size)
        for name in workload.table_names(size.starts):
            run = await mine["AddColumns"].prepare()
            connection = await lancedb.connect_async(str(folder / "database"))
            await workload.create(connection, f"{name}_bare")
            begun = time.perf_counter()
            await workload.alter(await connection.open_table(f"{name}_bare"), 2)
            samples["floor"].append(time.perf_counter() - begun)
            connection.close()
            told: Any = await run()
            samples["ours"].append(told["took"])
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
        mine = await ours.memo_app(folder, size)
        made = folder / "made"
        scratch = {name: Scratch(folder / name) for name in ("floor", "calls", "peer")}

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
            {"ours": mine["run"].prepare, "floor": bare, "calls": called, "peer": theirs},
            rounds=size.rounds,
            warmups=size.warmups,
            after=_keeping(reports),
        )
    return Result(
        name="memo-app",
        what=(
            "a note-taking application's database from its first release to the latest, "
            + (
                "as its users have it"
                if ours.memo_archive()
                else "built small: AIOMIGRATE_FIXTURES has none"
            )
        ),
        samples=samples,
        targets=(Target(of="ours", against="peer", at_least=8),),
        facts={
            "migrations": len(reports[0].applied),
            "ledger_commits": [report.ledger_commits for report in reports],
        },
    )
