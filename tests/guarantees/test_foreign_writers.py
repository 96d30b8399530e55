"""P3: commits of others are never discarded silently."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio
import lancedb
import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, MigrationFailedError, MigrationManager, op
from aiomigrate.errors import RollbackRefusedError
from tests.faults import Died, DyingStore, Fault, watched_manager
from tests.processes import initialize, quiet_logger, start
from tests.tools import SEED

V = TypeVar("V")

T = pa.schema([pa.field("id", pa.int64()), pa.field("n", pa.int64())])
FAST = {"lease_ttl": 0.5}


async def made(path: Path) -> None:
    """Makes a table with three rows at version 1 of its line."""
    db = await lancedb.connect_async(path)
    await db.create_table("t", pa.table({"id": [1, 2, 3], "n": [10, 20, 30]}, schema=T))
    async with MigrationManager(path, migrations=first(), logger=quiet_logger()) as manager:
        await manager.initialize()


def first() -> list[Migration]:
    """Returns the migration that adopts the table."""
    return [Migration(table="t", version=1, operations=[op.CreateTable(T)])]


async def append(path: Path | str, number: int) -> None:
    """Adds a row as an application would: through its own connection."""
    table = await (await lancedb.connect_async(path)).open_table("t")
    await table.add([{"id": number, "n": number}])


async def ids(path: Path) -> list[int]:
    """Returns the ids of all rows, sorted."""
    table = await (await lancedb.connect_async(path)).open_table("t")
    return sorted((await table.to_arrow())["id"].to_pylist())


def interrupted_by_a_writer(path: Path) -> list[Migration]:
    """Returns a migration that fails after two commits, another's append between them."""

    async def up(context: Context) -> None:
        await context.apply(op.AddColumns({"extra": pa.string()}))
        await append(path, 99)
        await context.table().update({"n": 0}, where="id = 1")
        raise RuntimeError("boom")

    return [*first(), Migration(table="t", version=2, up=up)]


async def test_a_failure_does_not_undo_over_a_foreign_append(tmp_path: Path) -> None:
    """The row stays, and the error names the versions and the command that resolves it."""
    path = tmp_path / "db"
    await made(path)
    async with MigrationManager(
        path, migrations=interrupted_by_a_writer(path), logger=quiet_logger()
    ) as manager:
        with pytest.raises(MigrationFailedError) as caught:
            await manager.upgrade()
        events = await manager.history("t")

    step = caught.value.report.failed[0]
    assert await ids(path) == [1, 2, 3, 99]
    assert "boom" in step.error
    assert "table_version 3" in step.error
    assert "aiomigrate stamp --table t --to 1" in step.remedy
    assert events[-1].kind == "failed"
    assert "restored" not in [event.kind for event in events]


async def test_what_could_not_be_undone_waits_for_a_person_and_stamp_resolves_it(
    tmp_path: Path,
) -> None:
    """Running again changes nothing until `stamp` accepts the data; then it goes on."""
    path = tmp_path / "db"
    await made(path)
    again: list[int] = []

    async def up(context: Context) -> None:
        again.append(1)
        await context.apply(op.AddColumns({"extra": pa.string()}))

    for _ in range(2):
        async with MigrationManager(
            path, migrations=interrupted_by_a_writer(path), logger=quiet_logger()
        ) as manager:
            with pytest.raises(MigrationFailedError):
                await manager.upgrade()
    fixed = [*first(), Migration(table="t", version=2, up=up)]
    async with MigrationManager(path, migrations=fixed, logger=quiet_logger()) as manager:
        with pytest.raises(MigrationFailedError, match="other writers committed"):
            await manager.upgrade()
        assert again == []
        await manager.stamp(to={"t": 1})
        await manager.upgrade()
        assert (await manager.validate()).valid

    assert again == [1]
    assert await ids(path) == [1, 2, 3, 99]


def declared() -> list[Migration]:
    """Returns a declared migration of several commits."""
    return [
        *first(),
        Migration(
            table="t",
            version=2,
            operations=[
                op.AddColumns({"extra": pa.int64()}),
                op.Update(sql={"extra": "n * 2"}),
                op.CreateIndex("id"),
            ],
        ),
    ]


@pytest.mark.parametrize(("verb", "when"), [("update", "before"), ("update", "after")])
async def test_a_killed_declared_migration_goes_on_over_a_foreign_append(
    tmp_path: Path, verb: str, when: str
) -> None:
    """Rows appended between crash and recovery stay, and the SQL takes effect once."""
    path = tmp_path / "db"
    await made(path)
    fault = Fault(action="kill", at=1, when=when, verb=verb, table="t")
    process = start(child, str(path), fault)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    await append(path, 99)
    async with MigrationManager(
        path, migrations=declared(), logger=quiet_logger(), **FAST
    ) as manager:
        await manager.initialize()
        assert (await manager.validate()).valid

    table = await (await lancedb.connect_async(path)).open_table("t")
    rows = {r["id"]: r["extra"] for r in (await table.to_arrow()).to_pylist()}
    assert rows == {1: 20, 2: 40, 3: 60, 99: 198}
    assert (await table.to_arrow()).column_names == ["id", "n", "extra"]


async def child(path: str, fault: Fault, which: str = "declared") -> None:
    """Migrates in a process of its own, with a fault."""
    await initialize(path, {"declared": declared, "run": killed_run}[which](), fault, FAST)


async def _two_commits(context: Context) -> None:
    await context.table().add([{"id": 4, "n": 40}])
    await context.table().update({"n": 0}, where="id = 1")


def killed_run() -> list[Migration]:
    """Returns a function of two commits."""
    return [*first(), Migration(table="t", version=2, up=_two_commits)]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_killed_function_with_a_foreign_append_stops_and_says_so(
    tmp_path: Path, when: str
) -> None:
    """The one case a person decides: no row is lost, the versions and the way out are named."""
    path = tmp_path / "db"
    await made(path)
    fault = Fault(action="kill", at=1, when=when, verb="update", table="t")
    process = start(child, str(path), fault, "run")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    await append(path, 99)
    async with MigrationManager(
        path, migrations=killed_run(), logger=quiet_logger(), **FAST
    ) as manager:
        with pytest.raises(MigrationFailedError, match="other writers committed") as caught:
            await manager.initialize()

    assert await ids(path) == [1, 2, 3, 4, 99]
    assert "aiomigrate stamp" in str(caught.value)


async def test_a_writer_beside_a_migration_loses_nothing(tmp_path: Path) -> None:
    """An application that appends all the while finds each of its rows afterwards.

    Its rows have an end: on a busy machine LanceDB's own retries may starve beside a writer that
    never pauses (20 of them lost in 20 s, measured), and the more fragments, the longer each takes.
    """
    path = tmp_path / "db"
    await made(path)
    stop = False
    written: list[int] = []

    async def write() -> None:
        number = 1000
        while not stop and number < 1500:
            await append(path, number)
            written.append(number)
            number += 1

    migrations: list[Any] = declared()
    async with anyio.create_task_group() as group:
        group.start_soon(write)
        async with MigrationManager(path, migrations=migrations, logger=quiet_logger()) as manager:
            report = await manager.initialize()
        stop = True

    assert len(report.applied) == 1
    assert await ids(path) == [1, 2, 3, *written]


@pytest.mark.parametrize("fragments", [1, 4])
@pytest.mark.parametrize(
    "what", ["append", "update", "update all", "delete", "add a column", "nothing"]
)
async def test_what_lands_during_an_optimization_is_not_taken_for_a_part_of_it(
    tmp_path: Path, what: str, fragments: int
) -> None:
    """A rollback does not discard it; what the optimization itself committed it may."""
    path = tmp_path / "db"
    await made(path)
    table = await (await lancedb.connect_async(path)).open_table("t")
    for number in range(fragments - 1):
        await append(path, 10 + number)
    await table.create_index("id")
    await append(path, 20)

    landed: list[str] = []

    async def land(verb: str, name: str) -> None:
        if verb != "optimize" or name != "t" or landed:
            return
        landed.append(what)
        other = await (await lancedb.connect_async(path)).open_table("t")
        match what:
            case "append":
                await other.add([{"id": 99, "n": 0}])
            case "update":
                await other.update({"n": 7}, where="id = 1")
            case "update all":
                await other.update({"n": 7})
            case "delete":
                await other.delete("id = 2")
            case "add a column":
                await other.add_columns(pa.field("theirs", pa.string()))

    change = Migration(
        table="t", version=2, operations=[op.Update({"n": 0}, where="id = 3"), op.Optimize()]
    )
    kind = watched_manager(before=land)
    async with kind(path, migrations=[*first(), change], logger=quiet_logger()) as manager:
        await manager.upgrade()
        before = (await table.checkout_latest(), await table.to_arrow())[1]
        if what == "nothing":
            await manager.rollback("t", to=1)
        else:
            with pytest.raises(RollbackRefusedError, match="other writers committed since"):
                await manager.rollback("t", to=1)
    after = (await table.checkout_latest(), await table.to_arrow())[1]

    assert landed == [what]
    assert (after == before) == (what != "nothing")


async def widen(path: Path | str) -> None:
    """Adds a column as another program would, unless it is there."""
    table = await (await lancedb.connect_async(path)).open_table("t")
    if "theirs" not in (await table.schema()).names:
        await table.add_columns(pa.schema([pa.field("theirs", pa.int64())]))


@pytest.mark.parametrize("name", ["rebuild", "rename"])
async def test_a_column_that_others_add_while_rows_are_rewritten_stays(
    tmp_path: Path, name: str
) -> None:
    """Whether the rows are read when it comes, or copied already: it is there in the end."""
    path = tmp_path / "db"
    await made(path)

    async def same(batch: pa.RecordBatch) -> pa.RecordBatch:
        await widen(path)
        return batch

    operation: Any = op.Rebuild(same)
    steps = [*first(), Migration(table="t", version=2, operations=[operation])]
    if name == "rename":
        operation = op.RenameTable("renamed", table="t")
        steps = [Migration(line="all", version=1, touches=("t", "renamed"), operations=[operation])]

    seen: list[str] = []

    async def after(verb: str, table: str) -> None:
        if table == "renamed" and not seen:
            seen.append(verb)
            await widen(path)

    watched = watched_manager(after=after)
    async with watched(path, migrations=steps, logger=quiet_logger()) as manager:
        await manager.upgrade()
    end = await lancedb.connect_async(path)
    table = await end.open_table("renamed" if name == "rename" else "t")

    assert (await table.schema()).names == ["id", "n", "theirs"]
    assert await table.count_rows() == 3


async def test_an_index_that_others_renew_while_it_is_dropped_goes(tmp_path: Path) -> None:
    """LanceDB commits the drop of an index that `optimize` is just renewing, and keeps it."""
    path = tmp_path / "db"
    await made(path)
    others = await (await lancedb.connect_async(path)).open_table("t")
    found: list[int] = []

    async def renew() -> None:
        with contextlib.suppress(RuntimeError):  # the drop came first
            await others.optimize()

    async def before(verb: str, table: str) -> None:
        if verb == "drop_index":
            await others.checkout_latest()
            for number in range(3):
                await others.add([{"id": number, "n": number}])
            group.start_soon(renew)
            await anyio.sleep(chance.uniform(0, 0.02))

    steps = first()
    for version in range(2, 26, 2):
        steps += [
            Migration(table="t", version=version, operations=[op.CreateIndex("n")]),
            Migration(table="t", version=version + 1, operations=[op.DropIndex("n")]),
        ]
    chance = random.Random(SEED)
    watched = watched_manager(before=before)
    async with (
        anyio.create_task_group() as group,
        watched(path, migrations=steps, logger=quiet_logger()) as manager,
    ):
        for version in range(3, 26, 2):
            await manager.upgrade(to=version)
            await others.checkout_latest()
            found.append(len(await others.list_indices()))

    assert found == [0] * 12
    assert await others.count_rows() >= 3 + 12 * 3


# ---- a function that died before its commit ------------------------------------------------------


class DeadAtStore(DyingStore):
    """Dies before the first call of a verb on the table."""

    verb = ""

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[V]], *, mutates: bool = False
    ) -> V:
        self.is_dead = self.is_dead or (verb, table) == (self.verb, "t")
        return await super().call(verb, table, run, mutates=mutates)


async def _copy(context: Context) -> None:
    await context.apply(op.CopyInto("source", key="id"))


async def _fill(context: Context) -> None:
    await context.apply(op.Backfill("n", lambda batch: [0] * len(batch), key="id"))


@pytest.mark.parametrize(
    ("verb", "up", "act"),
    [
        ("insert_new", _copy, "update"),
        ("insert_new", _copy, "delete"),
        ("insert_new", _copy, "append"),
        ("merge", _fill, "update"),
        ("merge", _fill, "delete"),
        ("merge", _fill, "append"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
async def test_what_lands_where_a_killed_functions_commit_was_announced_is_kept(
    tmp_path: Path, verb: str, up: Callable[[Context], Awaitable[None]], act: str
) -> None:
    """A commit in the place of one that was never made is not taken for it, and never discarded."""
    path = tmp_path / "db"
    db = await lancedb.connect_async(path)
    rows = {"id": [1, 2, 3], "n": pa.array([None, None, None], pa.int64())}
    table = await db.create_table("t", pa.table(rows, schema=T))
    await db.create_table("source", pa.table({"id": [4, 5], "n": [40, 50]}, schema=T))
    migrations = [Migration(table="t", version=1, touches=("t", "source"), up=up)]
    store = type("DeadAt", (DeadAtStore,), {"verb": verb})
    dying = type("DyingManager", (MigrationManager,), {"_store_type": store})
    with pytest.raises(Died):
        async with dying(path, migrations=migrations, logger=quiet_logger(), **FAST) as manager:
            await manager.upgrade()
    await table.checkout_latest()
    match act:
        case "update":
            await table.update({"n": 777}, where="id = 1")
        case "delete":
            await table.delete("id = 1")
        case _:
            await table.add([{"id": 99, "n": 777}])
    theirs = await values(path)
    async with MigrationManager(
        path, migrations=migrations, logger=quiet_logger(), **FAST
    ) as manager:
        with contextlib.suppress(MigrationFailedError):
            await manager.upgrade()

    assert {key: n for key, n in (await values(path)).items() if n == 777 or key == 1} == {
        key: n for key, n in theirs.items() if n == 777 or key == 1
    }


async def values(path: Path) -> dict[int, int | None]:
    """Returns `n` of all rows by id."""
    table = await (await lancedb.connect_async(path)).open_table("t")
    return {row["id"]: row["n"] for row in (await table.to_arrow()).to_pylist()}


class OutrunStore(DeadAtStore):
    """Lets another writer append right before an optimization, which commits several times."""

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[V]], *, mutates: bool = False
    ) -> V:
        if (verb, table) == ("optimize", "t"):
            await append(self.uri, 99)
        return await super().call(verb, table, run, mutates=mutates)


async def _optimize(context: Context) -> None:
    await context.apply(op.Optimize())
    await context.table().update({"n": 0}, where="id = 1")


async def test_what_landed_during_an_optimization_stops_the_recovery_of_a_killed_function(
    tmp_path: Path,
) -> None:
    """The table_versions do not tell, as an optimization makes several: the journal does."""
    path = tmp_path / "db"
    await made(path)
    table = await (await lancedb.connect_async(path)).open_table("t")
    await table.create_index("id")
    await append(path, 20)
    migrations = [*first(), Migration(table="t", version=2, up=_optimize)]
    store = type("Outrun", (OutrunStore,), {"verb": "update"})
    dying = type("DyingManager", (MigrationManager,), {"_store_type": store})
    with pytest.raises(Died):
        async with dying(path, migrations=migrations, logger=quiet_logger(), **FAST) as manager:
            await manager.upgrade()
    async with MigrationManager(
        path, migrations=migrations, logger=quiet_logger(), **FAST
    ) as manager:
        with pytest.raises(MigrationFailedError, match="other writers committed"):
            await manager.upgrade()

    assert await ids(path) == [1, 2, 3, 20, 99]


async def _create(context: Context) -> None:
    await context.apply(op.CreateTable(T))


async def test_a_table_that_others_made_where_a_killed_function_would_have_is_kept(
    tmp_path: Path,
) -> None:
    """Its rows are in the commit that made it, so it is not the table that was announced."""
    path = tmp_path / "db"
    migrations = [Migration(table="t", version=1, up=_create)]
    store = type("DeadAt", (DeadAtStore,), {"verb": "create"})
    dying = type("DyingManager", (MigrationManager,), {"_store_type": store})
    with pytest.raises(Died):
        async with dying(path, migrations=migrations, logger=quiet_logger(), **FAST) as manager:
            await manager.upgrade()
    db = await lancedb.connect_async(path)
    await db.create_table("t", pa.table({"id": [1, 2], "n": [777, 778]}, schema=T))
    async with MigrationManager(
        path, migrations=migrations, logger=quiet_logger(), **FAST
    ) as manager:
        with contextlib.suppress(MigrationFailedError):
            await manager.upgrade()

    assert await ids(path) == [1, 2]
