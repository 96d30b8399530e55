"""On uvloop, as ASGI servers run: the same ends. All else is tested on asyncio's own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, op
from tests import scenario
from tests.tools import manager, rows_of

pytest.importorskip("uvloop")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """The other event loop."""
    return ("asyncio", {"use_uvloop": True})


async def test_every_kind_of_step(database: Path) -> None:
    """Applied, valid, and undone by its inverses."""
    async with manager(database, scenario.migrations()) as migrating:
        await migrating.initialize()
        assert (await migrating.validate()).valid
        await migrating.rollback({"log": 1})
        await migrating.initialize()
        assert (await migrating.get_status()).is_at_target


async def test_a_cancelled_run_is_undone(database: Path) -> None:
    """What it had committed is gone, and the lease is free for the next."""
    begun = anyio.Event()
    table = pa.schema([("id", pa.int64())])

    async def up(ctx: Context) -> None:
        await ctx.table().add([{"id": 1}])
        if not begun.is_set():
            begun.set()
            await anyio.sleep(60)

    migrations = [
        Migration(table="things", version=1, operations=[op.CreateTable(table)]),
        Migration(table="things", version=2, up=up),
    ]
    async with manager(database, migrations) as migrating:
        async with anyio.create_task_group() as group:
            group.start_soon(migrating.initialize)
            await begun.wait()
            group.cancel_scope.cancel()
        assert await rows_of(database) == []
        await migrating.initialize()

    assert await rows_of(database) == [{"id": 1}]
