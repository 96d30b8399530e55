"""One migration under hostile conditions: functions that misbehave, commits that do not end.

Also scripts that are corrected after a failure or a crash, and tables that other writers change.
Crashes at every commit are in `guarantees.test_crash_at_every_commit`, killed processes in
`guarantees.test_killed_process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import signal
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import lancedb
import pyarrow as pa
import pytest
import structlog
from blockbuster import blockbuster_ctx

from aiomigrate import AiomigrateError, Context, Migration, MigrationFailedError, op
from aiomigrate.clock import Clock
from aiomigrate.errors import (
    ConfigurationError,
    InvalidMigrationError,
    LeaseError,
    OperationError,
    StoreError,
    UnsupportedDatabaseError,
)
from aiomigrate.manager import MigrationManager
from aiomigrate.results import Outcome, Report
from aiomigrate.runs.progress import Progress
from aiomigrate.store.connection import Store
from tests import scenario
from tests.faults import Fault, faulty_manager, watched_manager
from tests.processes import MP, initialize, quiet_logger, start
from tests.tools import found, make, manager, rows_of, tree

R = TypeVar("R")

T = pa.schema([pa.field("id", pa.int64()), pa.field("x", pa.int64())])
OTHER = pa.schema([pa.field("id", pa.int64()), pa.field("y", pa.string())])
FAST = {"lease_ttl": 0.5}


async def made(path: Path, *names: str) -> None:
    """Makes tables with three rows each, as an application would."""
    for name in names or ("t",):
        await make(path, T, [{"id": n, "x": 0} for n in (1, 2, 3)], table=name)


async def column(path: Path, name: str = "x", table: str = "t") -> dict[int, Any]:
    """Returns a column's values by id."""
    return {row["id"]: row[name] for row in await rows_of(path, table)}


async def columns(path: Path, table: str = "t") -> list[str]:
    """Returns the names of a table's columns."""
    opened = await (await lancedb.connect_async(path)).open_table(table)
    return (await opened.schema()).names


async def append(path: Path, number: int, x: int = 100) -> None:
    """Adds a row as an application would: through its own connection."""
    opened = await (await lancedb.connect_async(path)).open_table("t")
    await opened.add([{"id": number, "x": x}])


async def failed(running: MigrationManager) -> Report:
    """Upgrades, which has to fail within a minute; returns the report of it."""
    with anyio.fail_after(60), pytest.raises(MigrationFailedError) as caught:
        await running.upgrade()
    return caught.value.report


def outcomes(report: Report) -> dict[str, Outcome]:
    """Returns how each line's last migration ended."""
    return {step.line: step.outcome for step in report.steps}


def quiet(path: Path, migrations: Sequence[Migration], **options: Any) -> MigrationManager:
    """Returns a manager with a lease that is soon succeeded."""
    return manager(path, migrations, **{**FAST, **options})


async def nothing(context: Context) -> None:
    """Does nothing."""


async def boom(context: Context) -> None:
    """Makes one commit and fails."""
    await context.table().update({"x": 5})
    raise RuntimeError("boom")


# ---- cancellation, timeouts ----------------------------------------------------------------------


async def test_a_function_that_awaits_a_cancelled_task_fails_alone(tmp_path: Path) -> None:
    """Its CancelledError is its own fault: told as such, and no other line is cancelled by it."""
    path = tmp_path / "db"
    await made(path, "t", "u", "v")
    meanwhile = anyio.Event()

    async def up(context: Context) -> None:
        await context.table().update({"x": 1})
        task = asyncio.create_task(anyio.sleep_forever())
        await anyio.lowlevel.checkpoint()
        task.cancel()
        meanwhile.set()
        await task

    async def innocent(context: Context) -> None:
        await context.table().update({"x": 1})
        await meanwhile.wait()
        await context.table().update({"x": 2})

    migrations = [
        Migration(table="t", version=1, up=up),
        Migration(table="u", version=1, up=innocent),
        Migration(table="v", version=2, up=nothing, depends_on={"t": 1}),
    ]
    async with quiet(path, migrations) as running:
        report = await failed(running)

    assert outcomes(report) == {
        "t": Outcome.FAILED,
        "u": Outcome.APPLIED,
        "v": Outcome.SKIPPED,
    }
    assert "raised CancelledError, but the run was not cancelled" in report.failed[0].error
    assert await column(path) == {1: 0, 2: 0, 3: 0}
    assert await column(path, table="u") == {1: 2, 2: 2, 3: 2}


@dataclasses.dataclass
class Stuck:
    """A commit to one table that LanceDB neither ends nor gives up when it is cancelled.

    Attributes:
        reached: Set when it has begun.
        release: Lets it take effect.
        late: The commit itself.
    """

    reached: anyio.Event = dataclasses.field(default_factory=anyio.Event)
    release: anyio.Event = dataclasses.field(default_factory=anyio.Event)
    late: asyncio.Task[Any] | None = None

    def manager_type(self, table: str = "big") -> type[MigrationManager]:
        """Returns a manager class whose first commit to the table is this one."""
        stuck = self

        class StuckStore(Store):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "grace_s": 0.1})

            async def call(
                self,
                verb: str,
                table_: str,
                run: Callable[[], Awaitable[R]],
                *,
                mutates: bool = False,
            ) -> R:
                async def slow() -> R:
                    async def commit() -> R:
                        await stuck.release.wait()
                        return await run()

                    stuck.late = asyncio.ensure_future(commit())
                    stuck.reached.set()
                    return await asyncio.shield(stuck.late)

                if mutates and table_ == table and not stuck.reached.is_set():
                    return await super().call(verb, table_, slow, mutates=mutates)
                return await super().call(verb, table_, run, mutates=mutates)

        return type("StuckManager", (MigrationManager,), {"_store_type": StuckStore})


def beside_big(fails: Callable[[Context], Awaitable[None]]) -> list[Migration]:
    """Returns one line whose commit gets stuck, and one that fails by itself."""
    add = op.AddColumns({"c": pa.string()})
    return [
        Migration(table="big", version=1, operations=[add]),
        Migration(table="t", version=1, up=fails),
    ]


async def test_a_timeout_in_a_commit_that_does_not_end_is_told(tmp_path: Path) -> None:
    """The step failed with a commit still under way; the other line's failure is undone as usual.

    The same manager waits for the lease to expire later, and goes on from what the commit did.
    """
    path = tmp_path / "db"
    await made(path, "big", "t")
    stuck = Stuck()
    async with stuck.manager_type()(
        path, migrations=beside_big(boom), logger=quiet_logger(), concurrency=1, timeout=1, **FAST
    ) as running:
        report = await failed(running)
        held = (await running.get_status()).holder
        kinds = [event.kind for event in await running.history("t")]
        undone = await column(path)
        stuck.release.set()
        assert stuck.late is not None
        await stuck.late
        again = await failed(running)
        free = (await running.get_status()).holder
        validation = await running.validate()

    errors = {step.line: step.error for step in report.failed}
    assert "longer than 1 s" in errors["big"]
    assert "A commit to big is still under way" in errors["big"]
    assert errors["t"] == "'run boom': RuntimeError: boom"
    assert kinds[-2:] == ["restored", "failed"]
    assert undone == {1: 0, 2: 0, 3: 0}
    assert held is not None
    assert outcomes(again) == {"big": Outcome.APPLIED, "t": Outcome.FAILED}
    assert await column(path) == {1: 0, 2: 0, 3: 0}
    assert await columns(path, "big") == ["id", "x", "c"]
    assert free is None
    assert validation.errors == validation.not_at_target


async def test_a_cancellation_in_a_commit_that_does_not_end_is_told(tmp_path: Path) -> None:
    """It reaches the caller, the log tells of the commit, and the same manager goes on later."""
    path = tmp_path / "db"
    await made(path, "big", "t")
    stuck = Stuck()
    logs = structlog.testing.LogCapture()
    log = structlog.wrap_logger(structlog.ReturnLogger(), processors=[logs])
    async with stuck.manager_type()(
        path, migrations=beside_big(nothing), logger=log, **FAST
    ) as running:
        with anyio.fail_after(30), anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def cancel() -> None:
                    await stuck.reached.wait()
                    scope.cancel()

                group.start_soon(cancel)
                await running.upgrade()
        (event,) = [e for e in await running.history("big") if e.kind == "failed"]
        held = (await running.get_status()).holder
        stuck.release.set()
        assert stuck.late is not None
        await stuck.late
        await running.initialize()
        validation = await running.validate()
        free = (await running.get_status()).holder

    assert scope.cancelled_caught
    assert event.detail["cancelled"]
    assert [e["tables"] for e in logs.entries if e["event"] == "commit.unresolved"] == [["big"]]
    assert held is not None
    assert free is None
    assert validation.valid


async def catches(wait: Callable[[], Awaitable[None]]) -> None:
    """Takes its cancellation for the end."""
    try:
        await wait()
    except asyncio.CancelledError:
        return


async def suppresses(wait: Callable[[], Awaitable[None]]) -> None:
    """Lets nothing out."""
    with contextlib.suppress(BaseException):
        await wait()


@pytest.mark.parametrize("swallow", [catches, suppresses])
@pytest.mark.parametrize("by", ["timeout", "caller"])
async def test_a_function_that_swallows_its_cancellation_is_not_applied(
    tmp_path: Path, swallow: Callable[..., Awaitable[None]], by: str
) -> None:
    """Half of it is undone, whoever cancelled it, and recorded as failed."""
    path = tmp_path / "db"
    await made(path)
    begun = anyio.Event()

    async def up(context: Context) -> None:
        async def wait() -> None:
            await context.table().update({"x": 1}, where="id < 2")
            begun.set()
            await anyio.sleep_forever()

        await swallow(wait)

    timeout = 0.7 if by == "timeout" else None
    migrations = [Migration(table="t", version=1, up=up)]
    async with quiet(path, migrations, timeout=timeout) as running:
        if by == "timeout":
            report = await failed(running)
            assert "longer than 0.7 s" in report.failed[0].error
        else:
            with anyio.fail_after(30), anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:

                    async def cancel() -> None:
                        await begun.wait()
                        scope.cancel()

                    group.start_soon(cancel)
                    await running.upgrade()
            assert scope.cancelled_caught
        kinds = [event.kind for event in await running.history("t")]
        status = await running.get_status()

    assert kinds[-2:] == ["restored", "failed"]
    assert "applied" not in kinds
    assert status.lines["t"].current == 0
    assert status.holder is None
    assert await column(path) == {1: 0, 2: 0, 3: 0}


# ---- correcting a script -------------------------------------------------------------------------

ADD = op.AddColumns({"c": pa.string()})
COUNT = op.Update(sql={"x": "x + 1"})
REQUIRE = op.SetNotNull("c")


def declared(*operations: op.Operation) -> list[Migration]:
    """Returns a migration that found the table, and one of these operations."""
    return [
        Migration(table="t", version=1, operations=[op.CreateTable(T)]),
        Migration(table="t", version=2, operations=operations),
    ]


async def failed_over_a_foreign_append(path: Path) -> None:
    """Fails at the last operation, after someone else has appended behind the update."""
    await made(path)
    appended = anyio.Event()

    async def after(verb: str, table: str) -> None:
        if (verb, table) == ("update", "t") and not appended.is_set():
            appended.set()
            await append(path, 99)

    async with watched_manager(after=after)(
        path, migrations=declared(ADD, COUNT, REQUIRE), logger=quiet_logger(), **FAST
    ) as running:
        report = await failed(running)
    assert appended.is_set()
    (step,) = report.failed
    assert "other writers committed" in step.error
    assert "an unchanged migration continues where it stopped" in step.remedy
    assert "aiomigrate stamp --table t --to 1" in step.remedy


async def test_correcting_the_data_lets_an_unresolved_migration_go_on(tmp_path: Path) -> None:
    """The unchanged script goes on where it was; its update has taken effect once."""
    path = tmp_path / "db"
    await failed_over_a_foreign_append(path)
    opened = await (await lancedb.connect_async(path)).open_table("t")
    await opened.update({"c": "filled"})
    async with quiet(path, declared(ADD, COUNT, REQUIRE)) as running:
        await running.initialize()
        validation = await running.validate()

    values = await column(path)
    assert validation.valid
    assert [values[n] for n in (1, 2, 3)] == [1, 1, 1]
    assert values[99] in (100, 101)  # it came after the update, or belongs to it
    assert await columns(path) == ["id", "x", "c"]


@pytest.mark.parametrize(
    "then", [(ADD, COUNT, REQUIRE), (ADD, COUNT), (COUNT, op.AddColumns({"d": pa.string()}))]
)
async def test_the_printed_advice_applies_an_update_once(
    tmp_path: Path, then: Sequence[op.Operation]
) -> None:
    """After stamping below and upgrading, also with a corrected script, and nothing is left."""
    path = tmp_path / "db"
    await failed_over_a_foreign_append(path)
    if REQUIRE in then:
        opened = await (await lancedb.connect_async(path)).open_table("t")
        await opened.update({"c": "filled"})
    async with quiet(path, declared(*then)) as running:
        await running.stamp(tables=["t"], to=1)
        await running.initialize()
        validation = await running.validate()

    state, _ = await found(path, "t")
    values = await column(path)
    assert validation.valid
    assert [values[n] for n in (1, 2, 3)] == [1, 1, 1]
    assert values[99] in (100, 101)
    assert state is not None
    assert state.witnesses() == []
    assert set(await columns(path)) >= {"id", "x", "c"}


KILLED = (ADD, COUNT)
CORRECTED = (op.AddColumns({"d": pa.string()}), op.Update(sql={"x": "x + 10"}))


async def child(path: str, operations: Sequence[op.Operation], fault: Fault) -> None:
    """Migrates in a process of its own, with a fault."""
    await initialize(path, declared(*operations), fault, FAST)


async def test_a_killed_migration_may_be_corrected(tmp_path: Path) -> None:
    """Killed after any of its commits: other operations need no person and meet the old table.

    The savepoint of the dead process (of epoch 1) is gone too.
    """
    await made(tmp_path / "count")
    counting = faulty_manager(Fault(table="t"))
    async with counting(
        tmp_path / "count", migrations=declared(*KILLED), logger=quiet_logger()
    ) as running:
        await running.initialize()
        count = len(running._database.store.calls)  # type: ignore[union-attr]
    paths = {at: tmp_path / str(at) for at in range(1, count + 1)}
    processes = []
    for at, path in paths.items():
        await made(path)
        fault = Fault(action="kill", at=at, when="after", table="t")
        processes.append(start(child, str(path), KILLED, fault))
    for process in processes:
        process.join(60)
    assert {process.exitcode for process in processes} == {-signal.SIGKILL}
    ended: dict[int, Any] = {}

    async def correct(at: int, path: Path) -> None:
        async with quiet(path, declared(*CORRECTED)) as running:
            try:
                await running.initialize()
            except AiomigrateError as exc:
                ended[at] = (type(exc).__name__, await running.history("t"))
                return
            valid = (await running.validate()).valid
        opened = await (await Store.connect(str(path))).open("t")
        branches = [name for name in await opened.branches() if not name.endswith("-2")]
        ended[at] = (valid, await columns(path), await column(path), branches)

    async with anyio.create_task_group() as group:
        for at, path in paths.items():
            group.start_soon(correct, at, path)

    wanted = (True, ["id", "x", "d"], {1: 10, 2: 10, 3: 10}, [])
    # Killed in what comes after `applied`, only its clean-up was left: the script was edited.
    applied = {at for at, found_ in ended.items() if found_[0] == "ChecksumMismatchError"}
    assert {at: ended[at] for at in ended.keys() - applied} == dict.fromkeys(
        ended.keys() - applied, wanted
    )
    assert all(any(e.kind == "applied" and e.version == 2 for e in ended[at][1]) for at in applied)
    assert len(ended) - len(applied) >= 4


async def test_a_corrected_migration_sees_the_table_as_it_was_restored(tmp_path: Path) -> None:
    """Not as it was a moment before: a column that recovering took away is added again."""
    await made(tmp_path)
    first = (op.AddColumns({"a": pa.int64()}), op.AddColumns({"b": pa.int64()}))
    fault = Fault(action="kill", at=1, when="after", verb="add_columns", table="t")
    killed = start(child, str(tmp_path), first, fault)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert await columns(tmp_path) == ["id", "x", "a"]
    connection = await lancedb.connect_async(tmp_path)
    head = await connection.open_table("table_migrations")
    await head.update({"owner": ""}, where="tableName = ':lease:run'")  # as if it had expired
    async with quiet(tmp_path, declared(op.AddColumns({"a": pa.int64()}))) as running:
        await running.initialize()
        assert (await running.validate()).valid

    assert await columns(tmp_path) == ["id", "x", "a"]


@pytest.mark.parametrize("then", [(ADD, COUNT), CORRECTED])
async def test_a_resumed_migration_that_fails_may_be_corrected(
    tmp_path: Path, then: Sequence[op.Operation]
) -> None:
    """Killed, resumed by the same script, failed for the data's sake: still no person is needed."""
    path = tmp_path / "db"
    await made(path)
    fault = Fault(action="kill", at=1, when="after", verb="update", table="t")
    process = start(child, str(path), (ADD, COUNT, REQUIRE), fault)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    async with quiet(path, declared(ADD, COUNT, REQUIRE)) as running:
        report = await failed(running)
    async with quiet(path, declared(*then)) as running:
        await running.initialize()
        validation = await running.validate()

    assert "NULL" in report.failed[0].error.upper()
    assert validation.valid
    assert set((await column(path)).values()) == ({10} if then is CORRECTED else {1})
    assert await columns(path) == ["id", "x", "d" if then is CORRECTED else "c"]


async def makes_and_fails(context: Context) -> None:
    """Makes its table, and fails."""
    await context.apply(op.CreateTable(T))
    await context.table().add([{"id": 1, "x": 1}])
    raise RuntimeError("boom")


def making(how: str) -> list[Migration]:
    """Returns a migration that makes its table and then fails, as a function or declared."""
    if how == "function":
        return [Migration(table="t", version=1, up=makes_and_fails)]
    made = op.CreateTable(T, rows=[{"id": 1}])
    return [Migration(table="t", version=1, operations=[made, op.SetNotNull("x")])]


CORRECTLY_MADE = [Migration(table="t", version=1, operations=[op.CreateTable(OTHER)])]


@pytest.mark.parametrize("how", ["function", "declared"])
async def test_a_table_made_by_a_failed_migration_is_not_there(tmp_path: Path, how: str) -> None:
    """Looking finds none, the unchanged script fails as before, a corrected one makes it anew."""
    path = tmp_path / "db"
    async with quiet(path, making(how)) as running:
        first = await failed(running)
        second = await failed(running)
        validation = await running.validate()
    state, _ = await found(path, "t")
    async with quiet(path, CORRECTLY_MADE) as running:
        planned = await running.plan()
        await running.initialize()
        corrected = await running.validate()
        again = await running.initialize()

    assert first.failed[0].error == second.failed[0].error
    assert validation.errors == validation.not_at_target
    assert state is None or state.is_leftover
    assert [step.key for step in planned.steps] == [("t", 1)]
    assert corrected.valid
    assert again.steps == ()
    assert await columns(path) == ["id", "y"]
    assert await rows_of(path, "t") == []


async def child_making(path: str, how: str, fault: Fault) -> None:
    """Makes a table in a process of its own, with a fault."""
    await initialize(path, making(how), fault, FAST)


async def test_a_table_made_by_a_killed_migration_is_not_there(tmp_path: Path) -> None:
    """Killed after making its table, or while that was undone: a corrected script makes it anew."""
    cases = {
        (how, verb, when): tmp_path / f"{how}-{verb}-{when}"
        for how in ("function", "declared")
        for verb in ("create", "overwrite")
        for when in ("before", "after")
    }
    processes = [
        start(
            child_making,
            str(path),
            how,
            Fault(action="kill", at=1, when=when, verb=verb, table="t"),
        )
        for (how, verb, when), path in cases.items()
    ]
    for process in processes:
        process.join(60)
    assert {process.exitcode for process in processes} == {-signal.SIGKILL}
    wrong: dict[Any, Any] = {}

    async def correct(case: Any, path: Path) -> None:
        async with quiet(path, CORRECTLY_MADE) as running:
            try:
                await running.initialize()
            except AiomigrateError as exc:
                wrong[case] = exc
                return
            if not (await running.validate()).valid or await columns(path) != ["id", "y"]:
                wrong[case] = await columns(path)

    async with anyio.create_task_group() as group:
        for case, path in cases.items():
            group.start_soon(correct, case, path)

    assert wrong == {}


# ---- what others do to tables --------------------------------------------------------------------

LEDGER_TABLES: Mapping[str, tuple[Migration, str]] = {
    "head": (
        Migration(table="table_migrations", version=2, operations=[op.DropColumns("epoch")]),
        "table_migrations",
    ),
    "journal": (
        Migration(table="table_migrations_history", version=2, operations=[op.DropTable()]),
        "table_migrations",
    ),
    "of an operation": (
        Migration(table="t", version=2, operations=[op.DropTable(table="table_migrations")]),
        "table_migrations",
    ),
    "touched": (
        Migration(line="all", version=2, touches=("t", "table_migrations"), up=nothing),
        "table_migrations",
    ),
    "renamed": (
        Migration(table="mine_history", version=2, operations=[op.DropTable()]),
        "mine",
    ),
}


@pytest.mark.parametrize("case", LEDGER_TABLES.values(), ids=LEDGER_TABLES.keys())
async def test_the_ledgers_tables_are_refused(tmp_path: Path, case: tuple[Migration, str]) -> None:
    """A migration that names them is refused by every verb, before anything is written."""
    path = tmp_path / "db"
    migration, ledger = case
    await made(path)
    base = Migration(table="t", version=1, operations=[ADD])
    async with quiet(path, [base], ledger=ledger) as running:
        await running.initialize()
    before = tree(path)
    async with quiet(path, [base, migration], ledger=ledger) as running:
        for verb in ("plan", "upgrade", "initialize", "stamp", "validate", "get_status"):
            with anyio.fail_after(20), pytest.raises(InvalidMigrationError, match="its records"):
                await getattr(running, verb)()

    assert tree(path) == before


@pytest.mark.parametrize("versions", [2, 3, 4])
async def test_a_table_made_again_by_someone_else_is_left_alone(
    tmp_path: Path, versions: int
) -> None:
    """Also where its table_versions coincide with ours: none of its rows is discarded."""
    path = tmp_path / "db"
    await made(path)  # table_version 2
    db = await lancedb.connect_async(path)

    async def up(context: Context) -> None:
        await context.table().update({"x": 1})  # 3
        await db.drop_table("t")
        again = await db.create_table("t", schema=T)
        for number in range(1, versions):
            await again.add([{"id": 1000 + number, "x": number}])
        raise RuntimeError("boom")

    async with quiet(path, [Migration(table="t", version=1, up=up)]) as running:
        report = await failed(running)

    rows = {1000 + number: number for number in range(1, versions)}
    assert await column(path) == rows
    assert "boom" in report.failed[0].error


async def test_a_table_dropped_by_someone_else_fails_its_migration_alone(tmp_path: Path) -> None:
    """One error with a report, which keeps what the function raised; other lines finish."""
    path = tmp_path / "db"
    await made(path, "t", "u")
    dropped = anyio.Event()
    db = await lancedb.connect_async(path)

    async def up(context: Context) -> None:
        await context.table().update({"x": 1})
        await db.drop_table("t")
        dropped.set()
        raise RuntimeError("boom")

    async def other(context: Context) -> None:
        await context.table().update({"x": 1})
        await dropped.wait()
        await context.table().update({"x": 2})

    migrations = [
        Migration(table="t", version=1, up=up),
        Migration(table="u", version=1, up=other),
    ]
    async with quiet(path, migrations) as running:
        report = await failed(running)
        status = await running.get_status()

    assert outcomes(report) == {"t": Outcome.FAILED, "u": Outcome.APPLIED}
    assert "boom" in report.failed[0].error
    assert "dropped by another writer" in report.failed[0].error
    assert await column(path, table="u") == {1: 2, 2: 2, 3: 2}
    assert status.holder is None


async def test_a_commit_through_the_connection_is_told_of(tmp_path: Path) -> None:
    """A function that changed a table past its context and failed says so: that was not undone."""
    path = tmp_path / "db"
    await made(path)

    async def up(context: Context) -> None:
        opened = await context.connection.open_table("t")
        await opened.update({"x": 9})
        raise RuntimeError("boom")

    async with quiet(path, [Migration(table="t", version=1, up=up)]) as running:
        report = await failed(running)

    assert "boom" in report.failed[0].error
    assert "ctx.connection" in report.failed[0].error
    assert "left as they are" in report.failed[0].error


async def deletes_nothing_then_counts(context: Context) -> None:
    """Announces a deletion that matches no row, then changes every row."""
    await context.table().delete("id < 0")
    await context.table().update(sql={"x": "x + 1"})


def counting() -> list[Migration]:
    """Returns that function as a migration."""
    return [Migration(table="t", version=1, up=deletes_nothing_then_counts)]


async def child_counting(path: str, fault: Fault) -> None:
    """Runs it in a process of its own, with a fault."""
    await initialize(path, counting(), fault, FAST)


async def test_a_foreign_column_is_not_taken_for_a_deletion_of_nothing(tmp_path: Path) -> None:
    """Added after a kill between announcing and deleting, it is still there afterwards."""
    path = tmp_path / "db"
    await made(path)
    fault = Fault(action="kill", at=1, when="before", verb="delete", table="t")
    process = start(child_counting, str(path), fault)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    opened = await (await lancedb.connect_async(path)).open_table("t")
    await opened.add_columns(pa.field("theirs", pa.string()))
    async with quiet(path, counting()) as running:
        report = await failed(running)

    assert "other writers committed" in report.failed[0].error
    assert await columns(path) == ["id", "x", "theirs"]
    assert await column(path) == {1: 0, 2: 0, 3: 0}


async def swaps(context: Context) -> None:
    """Swaps two columns."""
    await context.apply(op.RenameColumns({"id": "x", "x": "id"}))


def swapping() -> list[Migration]:
    """Returns that function as a migration."""
    return [Migration(table="t", version=1, up=swaps)]


async def child_swapping(path: str, fault: Fault) -> None:
    """Runs it in a process of its own, with a fault."""
    await initialize(path, swapping(), fault, FAST)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_swap_of_a_killed_function_is_recognised(tmp_path: Path, when: str) -> None:
    """Though names and types are the same before and after, the columns are swapped once."""
    path = tmp_path / "db"
    await make(path, T, [{"id": n, "x": n * 10} for n in (1, 2, 3)], table="t")
    fault = Fault(action="kill", at=1, when=when, verb="alter_columns", table="t")
    process = start(child_swapping, str(path), fault)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    async with quiet(path, swapping()) as running:
        await running.initialize()

    assert await column(path) == {10: 1, 20: 2, 30: 3}


# ---- functions that misbehave --------------------------------------------------------------------


async def test_a_context_is_refused_after_its_migration(tmp_path: Path) -> None:
    """A write with it never hangs and never lands: neither during the run nor after it."""
    path = tmp_path / "db"
    await made(path)
    kept: list[Context] = []
    told: list[str] = []

    async def late() -> None:
        for write in (
            lambda: kept[0].table().add([{"id": 4, "x": 4}]),
            lambda: kept[0].table().update({"x": 4}),
            lambda: kept[0].apply(op.AddColumns({"late": pa.string()})),
        ):
            with anyio.fail_after(10), pytest.raises(OperationError, match="has ended") as caught:
                await write()
            told.append(caught.value.remedy)

    async def keeps(context: Context) -> None:
        kept.append(context)
        await context.table().update({"x": 1})

    async def second(context: Context) -> None:
        await late()

    migrations = [
        Migration(table="t", version=1, up=keeps),
        Migration(table="t", version=2, up=second),
    ]
    async with quiet(path, migrations) as running:
        await running.upgrade()
        await late()
        validation = await running.validate()

    assert await column(path) == {1: 1, 2: 1, 3: 1}
    assert set(told) == {"Await every task that the function starts before it returns."}
    assert len(told) == 6
    assert validation.valid


async def exits(context: Context) -> None:
    """Makes a commit, and ends the process."""
    await context.table().update({"x": 9})
    raise SystemExit(3)


async def child_exiting(path: str, results: Any) -> None:
    """Runs it in a process of its own."""
    await initialize(path, [Migration(table="t", version=1, up=exits)], Fault(), FAST, results)


async def test_sys_exit_is_a_failed_migration(tmp_path: Path) -> None:
    """It is undone and told like any other failure, and the process is able to end."""
    path = tmp_path / "db"
    await made(path)
    results = MP.Queue()
    process = start(child_exiting, str(path), results)
    process.join(30)
    hangs = process.is_alive()
    if hangs:
        process.kill()

    assert not hangs
    kind, (what,) = results.get(timeout=5)
    assert kind == "MigrationFailedError"
    assert "called sys.exit(3)" in what
    assert await column(path) == {1: 0, 2: 0, 3: 0}


@pytest.mark.parametrize("state", ["waiting", "running", "applied"])
async def test_a_callback_that_raises_changes_nothing(tmp_path: Path, state: str) -> None:
    """Whoever watches decides nothing: every migration is applied."""
    path = tmp_path / "db"
    await made(path, "t", "u")

    def broken(progress: Progress) -> None:
        if progress.state == state:
            raise ValueError("the display broke")

    migrations = [
        Migration(table="t", version=1, operations=[ADD]),
        Migration(table="u", version=1, operations=[COUNT, ADD]),
    ]
    async with quiet(path, migrations, on_progress=broken) as running:
        report = await running.initialize()

    assert outcomes(report) == {"t": Outcome.APPLIED, "u": Outcome.APPLIED}
    assert await column(path, table="u") == {1: 1, 2: 1, 3: 1}


async def test_a_function_may_not_apply_a_function(tmp_path: Path) -> None:
    """`apply(op.Run(...))` is refused with what to write instead, whatever the first one did."""
    path = tmp_path / "db"
    await made(path)

    async def nested(context: Context) -> None:
        await context.table().update({"x": 1})
        await context.apply(op.Run(nothing))

    async with quiet(path, [Migration(table="t", version=1, up=nested)]) as running:
        report = await failed(running)

    (step,) = report.failed
    assert "A function applies op.Run" in step.error
    assert "Call that function" in step.remedy
    assert await column(path) == {1: 0, 2: 0, 3: 0}


async def test_a_failing_task_group_names_its_first_failure(tmp_path: Path) -> None:
    """Groups within groups too: the error is the one that counts, not "unhandled errors"."""
    path = tmp_path / "db"
    await made(path)

    async def fails() -> None:
        raise ValueError("the first of them")

    async def up(context: Context) -> None:
        async with asyncio.TaskGroup() as outer, asyncio.TaskGroup() as inner:
            outer.create_task(anyio.sleep_forever())
            inner.create_task(fails())

    async with quiet(path, [Migration(table="t", version=1, up=up)]) as running:
        with pytest.raises(MigrationFailedError, match="ValueError: the first of them") as caught:
            await running.upgrade()

    assert caught.value.report.failed[0].error == "'run up': ValueError: the first of them"
    assert "unhandled" not in str(caught.value)


VALUES: Mapping[str, tuple[pa.DataType, Any]] = {
    "date": (pa.date32(), dt.date(2024, 2, 29)),
    "timestamp": (pa.timestamp("us"), dt.datetime(2024, 2, 29, 12, 30)),  # noqa: DTZ001 - naive
    "bytes": (pa.binary(), b"\x00\xff'"),
    "inf": (pa.float64(), float("inf")),
    "minus inf": (pa.float32(), float("-inf")),
    "nan": (pa.float64(), float("nan")),
    "list": (pa.list_(pa.int64()), [1, 2]),
    "vector": (pa.list_(pa.float32(), 2), [1.0, 2.0]),
    "an object": (pa.string(), object()),
}


@pytest.mark.parametrize("case", VALUES.values(), ids=VALUES.keys())
async def test_update_takes_a_value_or_says_that_it_does_not(
    tmp_path: Path, case: tuple[pa.DataType, Any]
) -> None:
    """A function's update with a literal that is no text or number sets it, or fails clearly."""
    path = tmp_path / "db"
    kind, value = case
    await make(path, T.append(pa.field("v", kind)), [{"id": 1, "x": 0, "v": None}], table="t")

    async def up(context: Context) -> None:
        await context.table().update({"v": value})

    async with quiet(path, [Migration(table="t", version=1, up=up)]) as running:
        with anyio.fail_after(30):
            try:
                await running.upgrade()
                error = None
            except MigrationFailedError as exc:
                error = exc
        status = await running.get_status()

    assert status.holder is None
    stored = (await column(path, "v"))[1]
    if error is None:
        assert repr(stored) == repr(value)
    else:
        assert stored is None
        assert "defect" not in str(error)
        assert error.report.failed[0].remedy
        assert type(value) is object or "update on table 't'" in str(error)


# ---- the manager's own options -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class FastClock(Clock):
    """A clock on which a second takes a fiftieth of one."""

    def __post_init__(self) -> None:
        plain = Clock().monotonic
        object.__setattr__(self, "monotonic", lambda: plain() * 50)


async def test_a_store_that_cannot_be_written_is_told_as_that(tmp_path: Path) -> None:
    """With something to do: the store's own error within seconds, not a wait for "None"."""
    path = tmp_path / "db"
    await made(path)
    base = Migration(table="t", version=1, operations=[ADD])
    async with quiet(path, [base]) as running:
        await running.initialize()

    class ReadOnlyStore(Store):
        async def call(
            self, verb: str, table: str, run: Callable[[], Awaitable[R]], *, mutates: bool = False
        ) -> R:
            if mutates:
                raise StoreError(f"{verb} on {table}: read-only file system.", "Mount it writable.")
            return await super().call(verb, table, run, mutates=mutates)

    class ReadOnly(MigrationManager):
        _store_type = ReadOnlyStore

    migrations = [base, Migration(table="t", version=2, operations=[COUNT])]
    async with ReadOnly(
        path, migrations=migrations, logger=quiet_logger(), clock=FastClock(), lease_ttl=5
    ) as running:
        for verb in ("upgrade", "stamp"):
            with anyio.fail_after(10), pytest.raises(AiomigrateError) as caught:
                await getattr(running, verb)()
            assert "read-only file system" in str(caught.value)
            assert not isinstance(caught.value, LeaseError)
            assert "None" not in str(caught.value)
        assert (await running.plan()).steps


async def test_a_dropped_table_may_be_accepted(tmp_path: Path) -> None:
    """Stamping a line whose table is gone accepts that: validation has nothing to say any more."""
    path = tmp_path / "db"
    migrations = [
        Migration(table="t", version=1, operations=[op.CreateTable(T)]),
        Migration(table="t", version=2, operations=[ADD]),
    ]
    async with quiet(path, migrations) as running:
        await running.initialize()
        await (await lancedb.connect_async(path)).drop_table("t")
        before = await running.validate()
        await running.stamp(tables=["t"], to=2)
        after = await running.validate()
        report = await running.initialize()

    assert not before.valid
    assert after.errors == ()
    assert report.steps == ()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://someone:hunter2@[bucket/db",
        "s3://someone:hunter2@bucket]/db?token=hunter2",
        "db:someone:hunter2@host",
        "db://someone:hunter2@[host",
        "ftp://someone:hunter2@[host/x#hunter2",
        "nope://hunter2@:99999:/x",
    ],
)
def test_a_malformed_uri_shows_no_secret(uri: str) -> None:
    """It is refused as a URI, by an error of ours, without its user information and query."""
    with pytest.raises((ConfigurationError, UnsupportedDatabaseError)) as caught:
        MigrationManager(uri, migrations=[])

    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_a_script_that_tells_a_secret_is_told_without_it(tmp_path: Path) -> None:
    """What a function of the parameters raises is shown without the storage options."""

    def operations(params: Mapping[str, Any]) -> Collection[op.Operation]:
        raise KeyError(params["key"])

    migrations = [Migration(table="t", version=1, operations=operations)]
    secret = {"aws_secret_access_key": "hunter2hunter2"}
    running = manager(
        tmp_path / "db", migrations, params={"key": "hunter2hunter2"}, storage_options=secret
    )
    for verb in ("plan", "upgrade", "get_status"):
        with pytest.raises(AiomigrateError, match="KeyError") as caught:
            await getattr(running, verb)()
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
        assert "hunter2" not in repr(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": "5"},
        {"timeout": float("nan")},
        {"lease_ttl": "30"},
        {"lease_ttl": True},
        {"lease_ttl": float("inf")},
        {"lease_wait": float("nan")},
        {"lease_wait": -1},
        {"lease_wait": None},
        {"concurrency": 1.5},
        {"concurrency": float("inf")},
        {"concurrency": True},
    ],
    ids=repr,
)
def test_an_option_that_is_no_fitting_number_is_refused(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """By its name, when the manager is made."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        MigrationManager(tmp_path / "db", migrations=[], **options)


async def test_a_closed_connection_is_refused(tmp_path: Path) -> None:
    """As the first argument, and by every verb when it was closed since; nothing is written."""
    path = tmp_path / "db"
    await made(path)
    before = tree(path)
    connection = await lancedb.connect_async(path)
    migrations = [Migration(table="t", version=1, operations=[ADD])]
    running = manager(connection, migrations)
    connection.close()
    with pytest.raises(ConfigurationError, match="connection is closed"):
        manager(connection, migrations)
    for verb in ("upgrade", "plan", "get_status", "validate", "stamp", "history"):
        with anyio.fail_after(20), pytest.raises(AiomigrateError, match="closed"):
            await getattr(running, verb)()

    assert tree(path) == before


def test_a_synchronous_connection_is_refused(tmp_path: Path) -> None:
    """With what to pass instead."""
    connection: Any = lancedb.connect(tmp_path / "db")

    with pytest.raises(ConfigurationError, match=r"lancedb\.connect_async"):
        MigrationManager(connection, migrations=[])


async def test_nothing_blocks_the_event_loop(tmp_path: Path) -> None:
    """Migrating, looking and rolling back leave the application's other tasks their turn."""
    manager = MigrationManager(
        tmp_path / "db", migrations=scenario.migrations(), logger=quiet_logger()
    )
    pa.array([0], pa.timestamp("us", tz="UTC")).to_pylist()  # Arrow loads its time zones, once
    await manager.scripts()
    with blockbuster_ctx(scanned_modules=["aiomigrate"]):
        async with manager:
            report = await manager.initialize()
            await manager.plan()
            await manager.get_status()
            validation = await manager.validate()
            await manager.history()
            back = await manager.rollback("log", to=1)

    assert len(report.applied) == len(scenario.migrations())
    assert validation.valid
    assert len(back.steps) == 1
