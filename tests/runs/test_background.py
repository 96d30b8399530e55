"""Migrations in the background: a start does not wait for them, and they are done once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import lancedb
import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, MigrationFailedError, MigrationManager, OnAhead, op
from aiomigrate.errors import BackgroundBusyError
from tests.processes import MP, quiet_logger, start
from tests.tools import SEED, manager, rows_of

NOTES = pa.schema([pa.field("id", pa.int64()), pa.field("n", pa.int64())])
STEPS = 6


async def slow(ctx: Context) -> None:
    """Adds 1 to each row, one after another, each in a commit of its own; idempotent."""
    table = ctx.table("notes")
    for done in range(STEPS):
        await asyncio.sleep(0.15)
        await table.update(sql={"n": f"{done + 1}"}, where=f"id = {done} AND n = 0")
        ctx.progress(done + 1, STEPS)


def history(*more: Migration, slowly: Any = slow) -> list[Migration]:
    """Returns notes that are worked on in the background, and users."""
    return [
        Migration(table="notes", version=1, operations=[op.CreateTable(NOTES)]),
        Migration(table="users", version=1, operations=[op.CreateTable(NOTES)]),
        Migration(table="notes", version=2, up=slowly, background=True),
        Migration(table="notes", version=3, operations=[op.AddColumns({"x": pa.int64()})]),
        *more,
    ]


async def made(database: Path) -> None:
    """Makes the first release's database, with rows."""
    async with manager(database, history()[:2]) as migrating:
        await migrating.upgrade()
    table = await (await lancedb.connect_async(database)).open_table("notes")
    await table.add([{"id": n, "n": 0} for n in range(STEPS)])


async def versions(database: Path, migrations: Sequence[Migration]) -> dict[str, int]:
    """Returns the version of each line."""
    async with manager(database, migrations) as migrating:
        return {name: line.current for name, line in (await migrating.get_status()).lines.items()}


async def is_done(database: Path) -> bool:
    """Returns whether each row was worked on once, and what comes after was applied."""
    rows = await rows_of(database, "notes")
    return [row["n"] for row in rows] == [n + 1 for n in range(STEPS)] and "x" in rows[0]


async def test_a_start_does_not_wait(database: Path) -> None:
    """`initialize` returns at once, also when it runs again; the rest is done by a task."""
    await made(database)
    async with manager(database, history()) as migrating:
        begun = anyio.current_time()
        report = await migrating.initialize()
        again = await migrating.initialize()
        took = anyio.current_time() - begun
        status = await migrating.get_status()
        validation = await migrating.validate()
        later = await migrating.run_background()
        last = await migrating.initialize()

    assert took < STEPS * 0.15
    assert report.deferred == again.deferred == (("notes", 2), ("notes", 3))
    assert report.lines["notes"] == 1
    assert status.lines["notes"].background is not None
    assert status.lines["users"].background is None
    assert validation.valid
    assert [(s.line, s.version) for s in later.applied] == [("notes", 2), ("notes", 3)]
    assert last.deferred == ()
    assert last.lines == {"notes": 3, "users": 1}
    assert await is_done(database)


async def test_a_fresh_database_comes_to_its_target_at_once(database: Path) -> None:
    """There is nothing to wait for where there is no data."""
    async with manager(database, history()) as migrating:
        report = await migrating.initialize()
        nothing = await migrating.run_background()
    assert report.deferred == ()
    assert report.lines == {"notes": 3, "users": 1}
    assert nothing.steps == ()


async def test_upgrade_does_all(database: Path) -> None:
    """A job or an operator waits for both parts, in one report."""
    await made(database)
    async with manager(database, history()) as migrating:
        report = await migrating.upgrade()
    assert [(s.line, s.version) for s in report.applied] == [("notes", 2), ("notes", 3)]
    assert await is_done(database)


async def test_others_are_not_held_up(database: Path) -> None:
    """Migrations of other tables run meanwhile; those of its table are put off."""
    await made(database)
    later = history(
        Migration(table="users", version=2, operations=[op.AddColumns({"y": pa.int64()})]),
        Migration(line="all", version=1, touches=("notes",), operations=[
            op.SetMetadata("n", {"unit": "m"}, table="notes")]),
    )  # fmt: skip
    async with manager(database, history()) as migrating, anyio.create_task_group() as group:
        await migrating.initialize()
        group.start_soon(migrating.run_background)
        await anyio.sleep(0.4)
        async with manager(database, later) as other:
            report = await other.initialize()
            status = await other.get_status()
            with pytest.raises(BackgroundBusyError, match="is running in process"):
                await other.rollback("notes")
    assert [(s.line, s.version) for s in report.applied] == [("users", 2)]
    assert ("all", 1) in report.deferred
    going = status.lines["notes"].background
    assert going is not None
    assert going.state.value == "running"
    assert status.background is not None
    assert await is_done(database)
    async with manager(database, later) as migrating:
        await migrating.upgrade()
    assert await versions(database, later) == {"all": 1, "notes": 3, "users": 2}


async def test_a_failure_is_told_and_gone_on_with(database: Path) -> None:
    """What fails in the background fails its task; starts go on as before."""
    await made(database)

    async def bad(ctx: Context) -> None:
        raise RuntimeError("no model")

    async with manager(database, history(slowly=bad)) as migrating:
        await migrating.initialize()
        with pytest.raises(MigrationFailedError, match="no model"):
            await migrating.run_background()
        report = await migrating.initialize()
    assert report.deferred == (("notes", 2), ("notes", 3))
    async with manager(database, history()) as migrating:
        await migrating.run_background()
    assert await is_done(database)


async def test_cancelled_it_gives_the_lease_back(database: Path) -> None:
    """The next one goes on at once."""
    await made(database)
    async with manager(database, history()) as migrating:
        await migrating.initialize()
        with anyio.move_on_after(0.4):
            await migrating.run_background()
        status = await migrating.get_status()
        begun = anyio.current_time()
        await migrating.run_background()
        took = anyio.current_time() - begun
    assert status.background is None
    assert took < STEPS * 0.15 + 2
    assert await is_done(database)


async def test_a_backfill_in_the_background_is_paid_once(database: Path) -> None:
    """Cancelled, it commits what was paid for; the next one embeds the rest."""
    await made(database)
    table = await (await lancedb.connect_async(database)).open_table("notes")
    await table.add([{"id": n, "n": n} for n in range(STEPS, 500)])
    paid = 0

    async def double(batch: pa.RecordBatch) -> Any:
        nonlocal paid
        await asyncio.sleep(0.01)
        paid += len(batch)
        return [2 * n for n in batch["n"].to_pylist()]

    pace = op.Pace(batch_rows=10, concurrency=2, chunk_rows=50)
    steps = [
        *history()[:2],
        Migration(
            table="notes",
            version=2,
            background=True,
            operations=lambda _: [
                op.AddColumns({"m": pa.int64()}),
                op.Backfill("m", double, key="id", source="n", pace=pace),
            ],
        ),
    ]
    async with manager(database, steps) as migrating:
        await migrating.initialize()
        async with anyio.create_task_group() as group:
            group.start_soon(migrating.run_background)
            while paid < 100:  # noqa: ASYNC110 - a model sets no events
                await asyncio.sleep(0.001)
            group.cancel_scope.cancel()
        assert paid < 500
        await migrating.run_background()
        assert paid == 500
        assert [row["m"] == 2 * row["n"] for row in await rows_of(database, "notes")] == [
            True
        ] * 500
        await migrating.rollback("notes")
        assert "m" not in (await rows_of(database, "notes"))[0]
        await migrating.upgrade()
    assert paid == 1000


async def application(database: str, ready: Any = None) -> None:
    """A worker of the application: starts, then works in the background."""
    async with MigrationManager(
        database, migrations=history(), logger=quiet_logger(), lease_ttl=0.6
    ) as migrating:
        await migrating.initialize()
        if ready is not None:
            ready.put(os.getpid())
        await migrating.run_background()


async def test_four_workers_do_it_once(database: Path) -> None:
    """All start together; one works, the others wait for it; nothing is done twice."""
    await made(database)
    processes = [start(application, str(database)) for _ in range(4)]
    for process in processes:
        await anyio.to_thread.run_sync(process.join)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert await is_done(database)
    async with manager(database, history()) as migrating:
        entries = await migrating.history("notes")
    assert [e.version for e in entries if e.kind == "applied"] == [1, 2, 3]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
async def test_a_holder_that_goes_is_succeeded(database: Path, how: signal.Signals) -> None:
    """Killed, stopped or paused: another worker goes on; one that wakes writes nothing more."""
    await made(database)
    ready = MP.Queue()
    first = start(application, str(database), ready)
    pid = await anyio.to_thread.run_sync(ready.get)
    await anyio.sleep(0.4)
    os.kill(pid, how)
    second = start(application, str(database))
    await anyio.to_thread.run_sync(second.join)
    if how == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
    await anyio.to_thread.run_sync(first.join)
    assert second.exitcode == 0
    assert await is_done(database)
    assert await versions(database, history()) == {"notes": 3, "users": 1}
    async with manager(database, history()) as migrating:
        assert (await migrating.validate()).valid
        entries = await migrating.history("notes")
    assert [e.version for e in entries if e.kind == "applied"] == [1, 2, 3]


async def doubled(batch: pa.RecordBatch) -> Any:
    """A model with some latency."""
    await asyncio.sleep(0.02)
    return [2 * n for n in batch["id"].to_pylist()]


ROWS = 400


def release(number: int) -> list[Migration]:
    """Returns what the worker of a release knows: the second has a fast migration more."""
    pace = op.Pace(batch_rows=10, concurrency=2, chunk_rows=40)
    fill = op.Backfill("m", doubled, key="id", source="id", pace=pace)
    known = [
        *history()[:2],
        Migration(
            table="notes",
            version=2,
            background=True,
            operations=lambda _: [op.AddColumns({"m": pa.int64()}), fill],
        ),
        Migration(table="notes", version=3, operations=[op.AddColumns({"x": pa.int64()})]),
        Migration(table="users", version=2, operations=[op.AddColumns({"y": pa.int64()})]),
    ]
    return known if number > 1 else known[:-1]


async def worker(database: str, number: int) -> None:
    """A worker of a release: starts, then works in the background."""
    async with MigrationManager(
        database,
        migrations=release(number),
        logger=quiet_logger(),
        lease_ttl=0.6,
        on_ahead=OnAhead.WARN,
    ) as migrating:
        await migrating.initialize()
        await migrating.run_background()


def _signal(process: Any, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(process.pid, how)


async def with_workers_that_come_and_go(database: Path, chance: random.Random) -> str:
    """Kills, stops and pauses workers of two releases at random; tells what is wrong after all."""
    await made(database)
    table = await (await lancedb.connect_async(database)).open_table("notes")
    await table.add([{"id": n, "n": n} for n in range(STEPS, ROWS)])
    alive: list[Any] = []
    paused: list[Any] = []
    for turn in range(12):
        alive = [process for process in alive if process.is_alive()]
        while len(alive) < 3:
            alive.append(start(worker, str(database), 1 if turn < 6 else 2))
        await anyio.sleep(chance.uniform(0.05, 0.7))
        one = chance.choice(alive)
        how = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
        _signal(one, how)
        alive.remove(one)
        if how == signal.SIGSTOP:
            paused.append(one)
        if paused and chance.random() < 0.4:
            woken = paused.pop(0)
            _signal(woken, signal.SIGCONT)
            alive.append(woken)
    for process in paused:
        _signal(process, signal.SIGCONT)
    last = start(worker, str(database), 2)
    for process in [*alive, *paused, last]:
        await anyio.to_thread.run_sync(process.join)
    if last.exitcode != 0:
        return f"the last worker ended with {last.exitcode}"
    rows = await rows_of(database, "notes")
    wrong = [row for row in rows if row["m"] != 2 * row["id"]]
    async with manager(database, release(2)) as migrating:
        problems = (await migrating.validate()).errors
        entries = await migrating.history()
    applied = [(e.line, e.version) for e in entries if e.kind == "applied"]
    expected = [("notes", 1), ("notes", 2), ("notes", 3), ("users", 1), ("users", 2)]
    if wrong or len(rows) != ROWS or problems or sorted(applied) != expected:
        return f"{wrong[:3]} of {len(rows)}, {problems}, {sorted(applied)}"
    return ""


async def test_workers_come_and_go(database: Path) -> None:
    """Whoever is killed, stopped or paused, and wakes: each migration is done once, each row right.

    Beside the work in the background a second release brings a fast migration of its own.
    """
    assert await with_workers_that_come_and_go(database, random.Random(SEED)) == ""


@pytest.mark.campaign
@pytest.mark.parametrize("number", range(15))
async def test_workers_come_and_go_many_times(database: Path, number: int) -> None:
    """The same, with other chances."""
    assert await with_workers_that_come_and_go(database, random.Random(f"{SEED} {number}")) == ""
