"""Over an object store's protocol: the same end, once each, whatever the network does.

The servers are real; a proxy before them makes latency and faults (`tests.stores`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import lancedb
import pytest
import structlog

from aiomigrate import MigrationManager, OnUnsafeStore
from aiomigrate.errors import AiomigrateError, UnsafeStoreError
from tests import scenario
from tests.faults import Fault
from tests.processes import MP, initialize, quiet_logger, start
from tests.stores import AZURITE, ObjectStore, azure, s3
from tests.tools import SEED

Tables = dict[str, Any]
NONE = Fault()


@pytest.fixture(
    scope="module",
    params=[
        "s3",
        pytest.param("azure", marks=pytest.mark.skipif(not AZURITE, reason="needs azurite (npm)")),
    ],
)
def running(request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    """One server of each kind for all tests of this module."""
    with s3() if request.param == "s3" else azure() as store:
        yield store


@pytest.fixture
def store(running: ObjectStore) -> ObjectStore:
    """The server, without faults."""
    running.rules()
    return running


@pytest.fixture
def uri(store: ObjectStore, request: pytest.FixtureRequest) -> str:
    """A database of the test's own."""
    return f"{store.root}/{abs(hash(request.node.nodeid))}"


def manager(uri: str, store: ObjectStore, migrations: Any = None, **options: Any) -> Any:
    """Returns a manager of a database in a store."""
    return MigrationManager(
        uri,
        migrations=migrations or scenario.few_migrations(),
        storage_options=store.options,
        **{"logger": quiet_logger(), **options},
    )


async def expected(folder: Path, migrations: Any = None) -> Tables:
    """Returns what a local, undisturbed run ends in."""
    path = folder / "expected"
    steps = migrations or scenario.few_migrations()
    async with MigrationManager(path, migrations=steps, logger=quiet_logger()) as migrating:
        await migrating.upgrade()
    return await scenario.snapshot(path)


async def check(uri: str, store: ObjectStore, end: Tables, migrations: Any = None) -> None:
    """Asserts that a database is as expected, recorded once each, and valid.

    Args:
        uri: The database.
        store: Its store; the faults end here.
        end: What is expected.
        migrations: Those that were run, by default the few.
    """
    store.rules()
    assert await scenario.snapshot(uri, storage_options=store.options) == end
    async with manager(uri, store, migrations) as migrating:
        assert (await migrating.validate()).valid
        entries = await migrating.history()
    applied = [(e.line, e.version) for e in entries if e.kind == "applied"]
    assert len(applied) == len(set(applied)) == len(migrations or scenario.few_migrations())


async def test_every_kind_of_step(uri: str, store: ObjectStore, tmp_path: Path) -> None:
    """The whole scenario ends as on a local disk."""
    steps = scenario.migrations()
    async with manager(uri, store, steps) as migrating:
        await migrating.upgrade()
    await check(uri, store, await expected(tmp_path, steps), steps)


async def test_a_start_at_target_asks_as_little_as_by_hand(uri: str, store: ObjectStore) -> None:
    """Connecting, opening the head and reading it: not one request more."""
    async with manager(uri, store) as migrating:
        await migrating.upgrade()
    store.rules()
    async with manager(uri, store) as migrating:
        report = await migrating.initialize()
    ours = store.log()
    store.rules()
    connection = await lancedb.connect_async(uri, storage_options=store.options)
    await (await connection.open_table("table_migrations")).query().to_arrow()
    by_hand = store.log()
    connection.close()

    assert not report.steps
    assert sorted(method + path for method, path, _ in ours) == sorted(
        method + path for method, path, _ in by_hand
    )


async def test_four_processes_far_away(uri: str, store: ObjectStore, tmp_path: Path) -> None:
    """Started together at 50 ms a request: each migration is applied once, by one of them."""
    end = await expected(tmp_path)
    store.rules(latency_s=0.05)
    results, gate = MP.Queue(), MP.Barrier(4)
    options = {"storage_options": store.options}
    processes = [
        start(initialize, uri, "few_migrations", NONE, options, results, gate) for _ in range(4)
    ]
    told = [await anyio.to_thread.run_sync(results.get) for _ in processes]
    for process in processes:
        await anyio.to_thread.run_sync(process.join)

    assert [kind for kind, _ in told] == ["ok"] * 4, told
    assert sorted(key for _, applied in told for key in applied) == sorted(
        (m.name, m.version) for m in scenario.few_migrations()
    )
    await check(uri, store, end)


@pytest.mark.parametrize("at", [1, pytest.param(3, marks=pytest.mark.campaign)])
async def test_a_killed_process_is_succeeded(
    uri: str, store: ObjectStore, tmp_path: Path, at: int
) -> None:
    """Killed right after a commit to a table: the next process finds out and goes on."""
    end = await expected(tmp_path)
    options = {"storage_options": store.options, "lease_ttl": 2.0, "concurrency": 1}
    fault = Fault(action="kill", at=at, table="people", when="after")
    process = start(initialize, uri, "few_migrations", fault, options)
    await anyio.to_thread.run_sync(process.join)
    assert process.exitcode == -9
    async with manager(uri, store, lease_ttl=2.0) as migrating:
        await migrating.initialize()
    await check(uri, store, end)


async def test_a_store_that_loses_commits_is_refused(uri: str, store: ObjectStore) -> None:
    """One that ignores conditional writes is found out when the ledger is founded.

    Nothing of the application's is written, and the trial's table is gone. Who knows better is
    let in, with a warning in the log; a good store passes (every other test).
    """
    if store.root.startswith("az"):
        pytest.skip("a request to Azure is signed with its conditions")
    store.rules(drops_conditions=True, latency_s=0.02)
    async with manager(uri, store) as migrating:
        with pytest.raises(UnsafeStoreError, match="ignores conditional writes") as caught:
            await migrating.initialize()
        assert "on_unsafe_store" in caught.value.remedy
    connection = await lancedb.connect_async(uri, storage_options=store.options)
    tables = (await connection.list_tables()).tables
    connection.close()
    assert all(name.startswith("table_migrations") for name in tables)
    assert not any("trial" in name for name in tables)

    said = structlog.testing.CapturingLogger()
    logger = structlog.wrap_logger(said, processors=[])
    unsafe = OnUnsafeStore.WARN
    async with manager(uri, store, on_unsafe_store=unsafe, logger=logger) as migrating:
        assert len((await migrating.initialize()).applied) == 4
    warned = [call.kwargs["event"] for call in said.calls if call.method_name == "warning"]
    assert "store.unsafe" in warned


async def insist(uri: str, store: ObjectStore, attempts: int) -> int:
    """Starts until one start succeeds, as a supervisor would; returns how many failed."""
    told: list[str] = []
    for attempt in range(attempts):
        try:
            async with manager(uri, store, lease_ttl=3.0) as migrating:
                await migrating.initialize()
        except AiomigrateError as exc:
            told.append(str(exc))
        else:
            assert not any(s in "".join(told) for s in store.secrets)
            return attempt
    raise AssertionError(f"no start succeeded: {told}")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("500", marks=pytest.mark.campaign),
        pytest.param("503", marks=pytest.mark.campaign),
        pytest.param("429", marks=pytest.mark.campaign),
        pytest.param("before", marks=pytest.mark.campaign),
        "after",
        pytest.param("truncated", marks=pytest.mark.campaign),
    ],
)
async def test_faults_of_the_network(
    uri: str, store: ObjectStore, tmp_path: Path, fault: str
) -> None:
    """Every twelfth request fails in one way: it ends as without, after however many starts.

    `after` is the worst: the store has applied a write, and nobody was told.
    """
    end = await expected(tmp_path)
    store.rules(faults=[fault], chance=1 / 12, seed=SEED)
    await insist(uri, store, 12)
    assert [f for _, _, f in store.log() if f == fault]
    await check(uri, store, end)


async def test_a_store_that_throttles(uri: str, store: ObjectStore, tmp_path: Path) -> None:
    """Forty requests a second and no more: slower, and the same."""
    end = await expected(tmp_path)
    store.rules(per_second=40)
    await insist(uri, store, 4)
    assert [f for _, _, f in store.log() if f == "503"]
    await check(uri, store, end)
