"""Each operation: up, down and up again, killed on any of these ways, is as if nothing had been."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import lancedb
import pytest

from aiomigrate import Migration, MigrationManager
from aiomigrate.errors import AiomigrateError, RollbackRefusedError
from tests.faults import Died, DyingStore, dying_manager
from tests.guarantees.test_crash_at_every_commit import (
    JOURNEYS,
    LEDGER,
    OPTIONS,
    Crashes,
    Journey,
    Point,
    dies,
    end_of,
    migrated,
    names,
)
from tests.tools import SEED

Tables = dict[str, Any]


def lines_of(migrations: Sequence[Migration]) -> dict[str, int]:
    """Returns the target of going all the way back."""
    return {migration.name: 0 for migration in migrations}


class Undoing(Crashes):
    """A journey there, back and there again.

    Attributes:
        before: The tables before it.
        ways_up: Every mutating call on the way there, and before or after it.
    """

    before: Tables
    ways_up: Sequence[Point] = ()

    async def prepare(self) -> None:
        """Makes the tables, goes there, and back undisturbed."""
        await super().prepare()
        self.ways_up = self.points()
        path = self.copy()
        self.before = await tables_of(path)
        await migrated(path, self.journey.migrations, MigrationManager)
        try:
            self.calls = await undone(path, self.journey.migrations, dying_manager())
        except RollbackRefusedError:  # it drops a table
            self.calls = []

    async def wrong_between(self, up: Point | None, down: Point | None) -> str:
        """Dies on the way there, or back; goes back, and there again; tells what differs."""
        path = self.copy()
        migrations = self.journey.migrations
        try:
            if up is not None:
                await dies(path, migrations, dying_manager(*up))
            await migrated(path, migrations, MigrationManager)
            if down is not None:
                await dies_undoing(path, migrations, dying_manager(*down))
            await undone(path, migrations, MigrationManager)
            back = await tables_of(path)
            await migrated(path, migrations, MigrationManager)
            again = await end_of(path)
        except AiomigrateError as exc:
            return f"{up}, {down}: {exc!r}"
        if back != self.before:
            return f"{up}, {down}: back at {back}, not {self.before}"
        wrong = [key for key in self.expected if self.expected[key] != again[key]]
        return f"{up}, {down}: again {[(k, self.expected[k], again[k]) for k in wrong]}" * bool(
            wrong
        )


async def tables_of(database: Path) -> Tables:
    """Returns all that is to be equal of each table, without what an undone create leaves."""
    tables: Tables = (await end_of(database))["tables"]
    return {name: told for name, told in tables.items() if told["shape"]["fields"]}


async def undone(
    database: Path, migrations: Sequence[Migration], kind: type[MigrationManager]
) -> list[tuple[str, str]]:
    """Goes all the way back; returns the mutating calls if the manager counts them."""
    async with kind(database, migrations=migrations, **OPTIONS) as manager:
        await manager.rollback(lines_of(migrations))
        validation = await manager.validate()
        assert validation.errors == validation.not_at_target
        store = manager._database.store
        return store.calls if isinstance(store, DyingStore) else []


async def dies_undoing(
    database: Path, migrations: Sequence[Migration], kind: type[MigrationManager]
) -> None:
    """Goes back until the process dies, and its lease has expired."""
    tasks = len(asyncio.all_tasks())
    with anyio.fail_after(60):
        manager = kind(database, migrations=migrations, **OPTIONS)
        with contextlib.suppress(Died):
            await manager.rollback(lines_of(migrations))
        await manager.aclose()
    assert len(asyncio.all_tasks()) == tasks
    connection = await lancedb.connect_async(database)
    head = await connection.open_table(LEDGER)
    await head.update({"owner": ""}, where="tableName = ':lease:run' AND owner != ''")
    connection.close()


_CHANCE = random.Random(SEED)


@pytest.mark.parametrize("journey", _CHANCE.sample(JOURNEYS, 6), ids=names)
async def test_a_sampled_operation_is_undone_after_deaths_and_done_again(
    journey: Journey, tmp_path: Path
) -> None:
    """Rows, schema, metadata, indexes with their names and options: as before, then as after."""
    undoing = Undoing(journey, tmp_path)
    await undoing.prepare()
    chance = random.Random(f"{SEED} {journey.name}")
    wrong = []
    if undoing.calls:
        wrong.append(await undoing.wrong_between(None, chance.choice(undoing.points())))
    if undoing.calls and undoing.ways_up:
        wrong.append(await undoing.wrong_between(chance.choice(undoing.ways_up), None))

    assert [text for text in wrong if text] == []


@pytest.mark.campaign
@pytest.mark.parametrize("journey", JOURNEYS, ids=names)
async def test_every_operation_is_undone_after_any_death_and_done_again(
    journey: Journey, tmp_path: Path
) -> None:
    """The whole of the above: every commit on the way back, and some with one on the way there."""
    undoing = Undoing(journey, tmp_path)
    await undoing.prepare()
    chance = random.Random(f"{SEED} {journey.name}")
    wrong = [await undoing.wrong_between(None, point) for point in undoing.points()]
    ways_back = undoing.points() if undoing.ways_up else []
    wrong += [
        await undoing.wrong_between(chance.choice(undoing.ways_up), point)
        for point in chance.sample(ways_back, min(2, len(ways_back)))
    ]

    assert [text for text in wrong if text] == []
