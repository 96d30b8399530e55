"""What is measured over an object store's protocol, where each request waits.

The store is the one of the tests: a real server of S3's protocol in processes of its own, behind a
proxy that delays requests and counts them. Counts of requests are the same on any machine.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import statistics
from collections.abc import Sequence
from functools import partial

import anyio
import anyio.to_thread

from aiomigrate import Migration, Report
from benchmarks import floor, workload
from benchmarks.measure import Measured, Prepare, Result, Target, Unit, interleaved
from benchmarks.setting import CONCURRENCY, HEAD, Side, Size, grown, manager_of, start
from tests.stores import ObjectStore, s3

_LEDGER = f"/{HEAD}"
"""In the path of each request that is the ledger's; the journal's name begins with the head's."""


@functools.cache
def _store() -> ObjectStore:
    """Starts the store, which serves all benchmarks of this process until it ends."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(s3())


async def remote_start(size: Size) -> Result:
    """Measures a start at target over S3, in requests and in time."""
    requests: dict[str, list[float]] = {"ours": [], "floor": []}
    store = await anyio.to_thread.run_sync(_store)
    mine = await start_side(size)

    async def bare() -> Measured:
        await _slow(store, size)
        return lambda: floor.start(f"{store.root}/start", HEAD, store.options)

    async def count(name: str, _: object) -> None:
        requests[name].append(len(await _paths(store)))

    samples = await interleaved(
        {"ours": mine["start"].prepare, "floor": bare}, rounds=size.rounds, after=count
    )
    counts = {f"requests of {name}": found for name, found in requests.items()}
    return Result(
        name="s3-start",
        what=f"start at target, 16 tables, over S3 with {size.latency_s * 1000:g} ms per request",
        samples={**samples, **counts},
        targets=(
            Target(of="requests of ours", against="requests of floor", within=0),
            Target(of="ours", against="floor", at_most=1.1),
        ),
        units=dict.fromkeys(counts, Unit.COUNT),
    )


async def start_side(size: Size) -> dict[str, Side]:
    """Returns how aiomigrate starts at target."""
    names = workload.table_names(16)
    steps = [one for name in names for one in workload.grown(name, 1)]
    store = await anyio.to_thread.run_sync(_store)
    uri = f"{store.root}/start"
    await grown(uri, names, 1, store.options)
    begin = start(uri, steps, storage_options=store.options)

    async def prepare() -> Measured:
        run = await begin()
        await _slow(store, size)
        return run

    return {"start": Side(prepare, counts=partial(_requests, store))}


async def run_side(size: Size) -> dict[str, Side]:
    """Returns how aiomigrate makes one migration on each of 64 tables."""
    store = await anyio.to_thread.run_sync(_store)
    await anyio.to_thread.run_sync(store.rules)
    runs = _Ours(store, "run", workload.table_names(64), size)
    await runs.make()
    return {"run": Side(runs.prepare, counts=partial(_requests, store))}


async def remote_run(size: Size) -> Result:
    """Measures one metadata-only migration on each of 64 tables over S3.

    Each run adds another column to the tables that the run before has left. What the lease and the
    ledger cost however little there is to do is told by runs on one table: it is taken off, but
    not in a quick run, which counts requests only.
    """
    many, one = workload.table_names(64), ["notes"]
    contenders: dict[str, Prepare] = {}
    ledger: dict[str, list[int]] = {}
    requests: dict[str, list[int]] = {}
    commits: list[int] = []
    store = await anyio.to_thread.run_sync(_store)
    await anyio.to_thread.run_sync(store.rules)  # what is made first is made without latency
    for suffix, names in (("", many),) if size.is_quick else (("", many), (" on one", one)):
        for how, kind in (("ours", _Ours), ("floor", _Floor)):
            runs = kind(store, f"{how}{len(names)}", names, size)
            await runs.make()
            contenders[how + suffix] = runs.prepare

    async def count(name: str, result: object) -> None:
        if isinstance(result, Report):
            commits.append(result.ledger_commits)
        paths = await _paths(store)
        requests.setdefault(name, []).append(len(paths))
        ledger.setdefault(name, []).append(sum(_LEDGER in path for path in paths))

    samples: dict[str, list[float]] = await interleaved(
        contenders, rounds=size.rounds, warmups=size.warmups, after=count
    )
    fixed = 0.0
    if not size.is_quick:
        medians = {name: statistics.median(times) for name, times in samples.items()}
        fixed = medians["ours on one"] - medians["floor on one"]
    samples["ours less fixed cost"] = [took - fixed for took in samples["ours"]]
    samples["ledger requests per migration"] = [n / len(many) for n in ledger["ours"]]
    return Result(
        name="s3-run",
        what=(
            f"{len(many)} tables x 1 metadata-only migration over S3 with "
            f"{size.latency_s * 1000:g} ms per request; fixed cost: what one table takes longer "
            "than its floor, for lease and ledger"
        ),
        samples=samples,
        targets=(
            Target(of="ledger requests per migration", within=1),
            Target(of="ours less fixed cost", against="floor", at_most=1.5),
        ),
        units={"ledger requests per migration": Unit.COUNT},
        facts={
            "fixed_cost_s": fixed,
            "requests": requests,
            "ledger_requests": ledger,
            "ledger_commits": commits,
        },
    )


class _Runs:
    """Runs of one contender on one database, each a version further than the one before."""

    def __init__(self, store: ObjectStore, name: str, names: Sequence[str], size: Size) -> None:
        self.store = store
        self.uri = f"{store.root}/{name}"
        self.names = names
        self.size = size
        self.version = 1

    def steps(self) -> list[Migration]:
        return [one for name in self.names for one in workload.grown(name, self.version)]


class _Ours(_Runs):
    async def make(self) -> None:
        """Makes the tables at version 1, and the ledger."""
        await grown(self.uri, self.names, 1, self.store.options)

    async def prepare(self) -> Measured:
        """Prepares the next version by aiomigrate."""
        self.version += 1
        manager = await manager_of(self.uri, self.steps(), storage_options=self.store.options)

        async def run() -> Report:
            async with manager:
                report = await manager.initialize()
            assert len(report.applied) == len(self.names)
            return report

        await _slow(self.store, self.size)
        return run


class _Floor(_Runs):
    async def make(self) -> None:
        """Makes the tables at version 1."""
        await self.by_hand()

    async def prepare(self) -> Measured:
        """Prepares the next version by hand."""
        self.version += 1
        await _slow(self.store, self.size)
        return self.by_hand

    async def by_hand(self) -> None:
        """Makes the version of all tables."""
        await floor.grow(
            self.uri,
            self.names,
            range(self.version, self.version + 1),
            concurrency=CONCURRENCY,
            options=self.store.options,
        )


async def _slow(store: ObjectStore, size: Size) -> None:
    """Lets requests wait from now on, and forgets those there were."""
    await anyio.to_thread.run_sync(partial(store.rules, latency_s=size.latency_s))


async def _requests(store: ObjectStore) -> dict[str, int]:
    return {"requests": len(await _paths(store))}


async def _paths(store: ObjectStore) -> list[str]:
    """Returns the path of each request since the rules were set."""
    return [path for _, path, _ in await anyio.to_thread.run_sync(store.log)]
