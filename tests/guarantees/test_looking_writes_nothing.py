"""P5, P6: looking changes nothing on disk, and at target a start is one small read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest

from aiomigrate import Migration, MigrationManager, op
from aiomigrate.errors import AiomigrateError, DatabaseAheadError, LedgerError, ScriptError
from tests import predecessor, scenario
from tests.faults import Fault, FaultyStore, faulty_manager
from tests.ledger.test_bad_metadata import on_disk
from tests.processes import initialize, quiet_logger, start
from tests.tools import manager, tree

LOOKS = ("plan", "get_status", "validate", "history")
STATES = ("missing", "empty folder", "ours at target", "ours behind", "predecessor", "interrupted")
HEAD = "table_migrations"
SCHEMA = pa.schema([pa.field("id", pa.string())])


def tables(count: int, version: int = 1) -> list[Migration]:
    """Returns lines of that many tables, up to a version of at most 2."""
    names = [f"t{n}" for n in range(count)]
    given = [Migration(table=n, version=1, operations=[op.CreateTable(SCHEMA)]) for n in names]
    if version > 1:
        more = op.AddColumns({"n": pa.int64()})
        given += [Migration(table=name, version=2, operations=[more]) for name in names]
    return given


@pytest.fixture(scope="module")
async def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database in each state that exists on disk."""
    folder = tmp_path_factory.mktemp("states")
    (folder / "empty folder").mkdir()
    everything = scenario.migrations()
    for name, given in (("ours at target", everything), ("ours behind", everything[:4])):
        async with manager(folder / name, given) as manager_:
            await manager_.initialize()
    await predecessor.build(folder / "predecessor", predecessor.State.V1)
    fault = Fault(action="kill", at=1, verb="update", table="people")
    options = {"concurrency": 1, "lease_ttl": 0.5}
    process = start(initialize, str(folder / "interrupted"), "migrations", fault, options)
    process.join(60)
    assert process.exitcode == -9
    return folder


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """As everywhere, but for the fixture of this module too."""
    return "asyncio"


@pytest.fixture
def state(request: pytest.FixtureRequest, templates: Path, database: Path) -> Path:
    """A database of its own in the state asked for."""
    if (templates / request.param).exists():
        shutil.copytree(templates / request.param, database)
    return database


@pytest.mark.parametrize("state", STATES, indirect=True)
async def test_looking_writes_nothing(state: Path) -> None:
    """Plan, status, validation and history leave every byte as it was, and make no folder."""
    before = on_disk(state)

    async with manager(state, scenario.migrations(), lease_ttl=0.5) as manager_:
        for verb in LOOKS:
            await getattr(manager_, verb)()

            assert on_disk(state) == before, verb
        await manager_.plan(tables=["people"], to=3)
        await manager_.history("people")

    assert on_disk(state) == before


@pytest.mark.parametrize("state", STATES[1:], indirect=True)
async def test_looking_through_an_open_connection_writes_nothing(state: Path) -> None:
    """The same for a connection of the application's own, which is left open."""
    before = tree(state)
    connection = await lancedb.connect_async(state)

    async with manager(connection, scenario.migrations(), lease_ttl=0.5) as manager_:
        for verb in LOOKS:
            await getattr(manager_, verb)()

    assert connection.is_open()
    assert before == tree(state)
    connection.close()


@pytest.mark.parametrize("state", STATES, indirect=True)
async def test_looking_makes_no_mutating_call(state: Path) -> None:
    """Not one call that LanceDB could commit is even begun."""
    async with faulty_manager(Fault())(
        state, migrations=scenario.migrations(), logger=quiet_logger(), lease_ttl=0.5
    ) as manager_:
        for verb in LOOKS:
            await getattr(manager_, verb)()
        store = manager_._database.store

    assert (store.calls if isinstance(store, FaultyStore) else []) == []


async def wrong(database: Path, given: Any, kind: type[AiomigrateError], *verbs: str) -> None:
    """Asserts that looking raises, and changes nothing."""
    before = on_disk(database)

    async with manager(database, given) as manager_:
        for verb in verbs:
            with pytest.raises(kind):
                await getattr(manager_, verb)()

            assert on_disk(database) == before, verb


BAD_SCRIPTS = [
    Migration(table="people", version=1, operations=[op.CreateTable(SCHEMA)]),
    Migration(table="people", version=1, operations=[op.CreateTable(SCHEMA)]),
]


@pytest.mark.parametrize("state", STATES, indirect=True)
async def test_looking_with_wrong_scripts_writes_nothing(state: Path) -> None:
    """Scripts that cannot be loaded are told before the database is touched at all."""
    await wrong(state, BAD_SCRIPTS, ScriptError, "plan", "get_status", "validate", "initialize")


async def test_looking_at_a_newer_database_writes_nothing(templates: Path, database: Path) -> None:
    """Older code that looks at a newer database leaves it alone."""
    shutil.copytree(templates / "ours at target", database)

    await wrong(database, scenario.migrations()[:4], DatabaseAheadError, "plan", "initialize")


@pytest.mark.parametrize("name", [HEAD, f"{HEAD}_history"])
async def test_looking_at_a_broken_ledger_writes_nothing(
    templates: Path, database: Path, name: str
) -> None:
    """Looking does not repair: an unreadable head or journal stays as it is, for a person."""
    shutil.copytree(templates / "ours behind", database)
    shutil.rmtree(database / f"{name}.lance" / "data")
    verbs = ("plan", "initialize", "get_status" if name == HEAD else "history")

    await wrong(database, scenario.migrations(), LedgerError, *verbs)
    before = tree(database)
    async with manager(database, scenario.migrations()) as manager_:
        validation = await manager_.validate()

    assert before == tree(database)
    assert not validation.valid
    assert name in validation.errors[0]


async def test_a_plan_is_what_the_run_then_does(database: Path) -> None:
    """The dry run is the run's own plan: the same migrations, and each after those it follows."""
    async with manager(database, scenario.migrations()) as manager_:
        plan = await manager_.plan()
        report = await manager_.initialize()
        again = await manager_.plan()

    place = {(s.line, s.version): n for n, s in enumerate(report.steps)}
    assert {step.key for step in plan.steps} == set(place)
    assert all(place[key] < place[step.key] for step in plan.steps for key in step.after)
    assert again.is_empty
    assert not again.needs_lease


async def at_target(database: Path, given: Sequence[Migration]) -> list[tuple[str, str]]:
    """Returns every LanceDB call of an `initialize()` that finds nothing to do."""
    async with faulty_manager(Fault(mutations=False))(
        database, migrations=given, logger=quiet_logger()
    ) as manager_:
        report = await manager_.initialize()
        store = manager_._database.store
    assert isinstance(store, FaultyStore)
    assert report.steps == ()
    assert (report.lease_s, report.ledger_commits) == (0.0, 0)
    return store.calls


@pytest.mark.parametrize("count", [1, 40])
async def test_at_target_only_the_head_is_opened_and_nothing_written(
    database: Path, count: int
) -> None:
    """However many tables there are, a start with nothing to do opens and reads one, once."""
    async with manager(database, tables(count)) as manager_:
        await manager_.initialize()
    before = tree(database)

    calls = await at_target(database, tables(count))

    assert calls == [("open", HEAD), ("read", HEAD)]
    assert before == tree(database)


async def test_at_target_the_past_costs_nothing(database: Path) -> None:
    """After several releases the start still reads the head alone, not the journal."""
    for version in (1, 2):
        async with manager(database, tables(3, version)) as manager_:
            await manager_.initialize()

    calls = await at_target(database, tables(3, 2))

    assert calls == [("open", HEAD), ("read", HEAD)]


async def test_at_target_lines_of_others_cost_nothing(database: Path) -> None:
    """Lines that no script knows, left by the predecessor, do not make the start look closer."""
    await predecessor.build(database, predecessor.State.V1)
    given = [Migration(table="users", version=1, operations=[op.CreateTable(SCHEMA)])]
    async with manager(database, given) as manager_:
        await manager_.initialize()

    calls = await at_target(database, given)

    assert calls == [("open", HEAD), ("read", HEAD)]


async def test_at_target_a_held_lease_is_not_waited_for(templates: Path, database: Path) -> None:
    """A start that finds nothing to do does not care who holds the lease."""
    shutil.copytree(templates / "ours at target", database)
    db = await lancedb.connect_async(database)
    head = await db.open_table(HEAD)
    await head.update({"owner": "someone", "beat": 7}, where="tableName = ':lease:run'")
    db.close()

    async with manager(database, scenario.migrations(), lease_ttl=60) as manager_:
        status = await manager_.get_status()
    calls = await at_target(database, scenario.migrations())

    assert status.holder is not None
    assert calls == [("open", HEAD), ("read", HEAD)]


async def test_a_missing_database_is_not_made_by_a_run_that_is_refused(database: Path) -> None:
    """A plan error on a fresh database leaves no folder behind."""
    given = [Migration(table="t", version=1, operations=[op.AddColumns({"n": pa.int64()})])]

    await wrong(database, given, AiomigrateError, "plan", "initialize", "upgrade")
    async with MigrationManager(database, migrations=[], logger=quiet_logger()) as manager_:
        await manager_.upgrade()
        await manager_.stamp()
        await manager_.unlock()

    assert on_disk(database) == (False, {})
