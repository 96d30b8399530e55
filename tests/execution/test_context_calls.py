"""A call of a function's context that nobody awaits fails the migration, and is named."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, MigrationFailedError, op
from aiomigrate.execution.context import RecordedTable
from tests.tools import TABLE, make, manager, rows_of

SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("n", pa.int64())])
ROWS = [{"id": 1, "n": 1}, {"id": 2, "n": 2}]
NEW = [{"id": 3, "n": 3}]
HERE = Path(__file__).name
Function = Callable[[Context], Awaitable[Any]]

CALLS: dict[str, Callable[[Context], Any]] = {
    "add": lambda context: context.table().add(NEW),
    "merge": lambda context: context.table().merge(NEW, on="id"),
    "update": lambda context: context.table().update({"n": 7}),
    "delete": lambda context: context.table().delete("id = 1"),
    "read": lambda context: context.table().read(),
    "count_rows": lambda context: context.table().count_rows(),
    "apply": lambda context: context.apply(op.AddColumns({"x": pa.int64()})),
}


def line_of(function: Callable[..., Any]) -> int:
    """Returns the line of a function that is written in one line."""
    return function.__code__.co_firstlineno


async def failure(database: Path, up: Function, **more: Any) -> str:
    """Returns the error of a migration with a function; asserts that no row was changed."""
    await make(database, SCHEMA, ROWS)
    async with manager(database, [Migration(table=TABLE, version=1, up=up, **more)]) as migrations:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of coroutines that were never awaited
            with pytest.raises(MigrationFailedError) as caught:
                await migrations.upgrade()
        status = await migrations.get_status()

    assert status.lines[TABLE].current == 0
    assert await rows_of(database) == ROWS
    return str(caught.value)


def test_every_coroutine_of_a_context_is_tried() -> None:
    """A coroutine method that is added is known to the calls, and one of the cases."""
    methods = {**vars(Context), **vars(RecordedTable)}

    assert {name for name, value in methods.items() if hasattr(value, "__wrapped__")} == set(CALLS)
    assert not [name for name, value in methods.items() if inspect.iscoroutinefunction(value)]


@pytest.mark.parametrize("name", CALLS)
async def test_a_forgotten_await_fails_the_migration(database: Path, name: str) -> None:
    """The error names the call, its file and its line, and nothing of it was done."""
    call = CALLS[name]

    async def up(context: Context) -> None:
        call(context)

    told = await failure(database, up)

    assert f"`{name}`" in told
    assert f"{HERE}, line {line_of(call)}, was not awaited: it did nothing." in told
    assert "Write `await` before it" in told


async def test_what_was_awaited_before_and_after_is_undone(database: Path) -> None:
    """The migration is undone as any that fails."""

    async def up(context: Context) -> None:
        table = context.table()
        await table.add(NEW)
        table.delete("id = 1")
        await table.update({"n": 0})

    assert "`delete`" in await failure(database, up)


async def test_a_coroutine_that_is_returned_or_kept_is_not_awaited(database: Path) -> None:
    """An async function whose last line lacks its `await` hands the coroutine to nobody."""
    kept = []

    async def up(context: Context) -> Any:
        kept.append(context.table().update({"n": 0}))
        return context.table().add(NEW)

    assert "`update`" in await failure(database, up)


@pytest.mark.parametrize("delay", [0, 0.001, 0.05])
async def test_a_task_that_nobody_awaits_is_no_await(database: Path, delay: float) -> None:
    """Whether it has begun or not: it may not have ended when the migration is recorded."""
    tasks = []

    async def up(context: Context) -> None:
        async def forever() -> None:
            while True:
                await context.table().add(NEW)

        tasks.append(asyncio.create_task(forever()))
        tasks.append(asyncio.create_task(context.table().read()))
        await anyio.sleep(delay)

    assert "awaited" in (told := await failure(database, up)) or "still running" in told
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert "migration has ended" in str(results[0])


async def test_the_error_of_a_gathered_call_is_told_and_its_siblings_are_waited_for(
    database: Path,
) -> None:
    """`asyncio.gather` leaves the others running when one fails: they cannot commit later."""

    async def fail() -> None:
        raise ValueError("wrong on purpose")

    async def up(context: Context) -> None:
        await asyncio.gather(*(context.table().add(NEW) for _ in range(3)), fail())

    assert "wrong on purpose" in await failure(database, up)
    await anyio.sleep(0.3)
    assert await rows_of(database) == ROWS


async def test_concurrent_calls_that_are_awaited_are_no_error(database: Path) -> None:
    """Task groups, gather, wait_for, and tasks that were cancelled before they began."""

    async def up(context: Context) -> None:
        table = context.table()
        await asyncio.gather(table.read(), table.count_rows())
        await asyncio.wait_for(table.update({"n": 5}, where="id = 1"), 10)
        task = asyncio.create_task(table.delete("id = 2"))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with anyio.create_task_group() as group:
            group.start_soon(table.read)
            group.cancel_scope.cancel()
        waiting = table.read()
        waiting.close()

    await make(database, SCHEMA, ROWS)
    async with manager(database, [Migration(table=TABLE, version=1, up=up)]) as migrations:
        await migrations.upgrade()

    assert await rows_of(database) == [{"id": 1, "n": 5}, {"id": 2, "n": 2}]


async def test_writes_at_the_same_time_are_made_in_turn(database: Path) -> None:
    """Of one function, to one table: each is known as the migration's own, and undone with it."""
    fails = True

    async def up(context: Context) -> None:
        table = context.table()
        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(table.add, [{"id": 10 + number, "n": number}])
                group.start_soon(context.apply, op.AddColumns({f"x{number}": pa.int64()}))
                group.start_soon(table.delete, f"id = {100 + number}")
        if fails:
            raise ValueError("wrong on purpose")

    assert "not undone" not in await failure(database, up)
    fails = False
    async with manager(database, [Migration(table=TABLE, version=1, up=up)]) as migrations:
        await migrations.upgrade()
        (event,) = [e for e in await migrations.history() if e.kind == "applied"]
        await migrations.rollback(TABLE)

    assert "foreign" not in str(event.detail)
    assert await rows_of(database) == ROWS


async def test_the_function_of_an_operation_cannot_write_to_its_table(database: Path) -> None:
    """It would wait for the operation, which waits for it."""
    await make(database, SCHEMA, ROWS)

    async def up(context: Context) -> None:
        async def fill(batch: pa.RecordBatch) -> list[int]:
            await context.table().update({"n": 0})
            return [0] * len(batch)

        await context.apply(op.AddColumns({"x": pa.int64()}))
        await context.apply(op.Backfill("x", fill, key="id", source=["n"]))

    async with manager(database, [Migration(table=TABLE, version=1, up=up)]) as migrations:
        with anyio.fail_after(20):
            with pytest.raises(MigrationFailedError, match="writes to that table itself"):
                await migrations.upgrade()


async def test_a_rollback_notices_it_too(database: Path) -> None:
    """`down` is run with the same context."""

    async def up(context: Context) -> None:
        await context.table().update({"n": 0})

    async def down(context: Context) -> None:
        context.table().update({"n": 1})

    await make(database, SCHEMA, ROWS)
    step = Migration(table=TABLE, version=1, up=up, down=down)
    async with manager(database, [step]) as migrations:
        await migrations.upgrade()
        with pytest.raises(MigrationFailedError, match=r"`update`.*was not awaited"):
            await migrations.rollback(TABLE)
        assert [row["n"] for row in await rows_of(database)] == [0, 0]
