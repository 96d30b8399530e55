"""P2: a process that dies while it returns a table to its savepoint leaves what the next one ends.

Every mutating call of the way back is a point to die at. How migrations die on the way forward is
in `guarantees.test_crash_at_every_commit`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from aiomigrate import Context, Migration, MigrationManager, op
from aiomigrate.errors import AiomigrateError, MigrationFailedError, StoreError
from tests.faults import DyingStore, Fault, dying_manager, faulty_manager
from tests.guarantees.test_crash_at_every_commit import (
    OPTIONS,
    Crashes,
    Given,
    Journey,
    dies,
    migrated,
)
from tests.operations.test_operations import THINGS
from tests.tools import TABLE

T = TypeVar("T")

MANY = [{"id": f"r{n}", "n": n, "text": f"text {n}", "tags": [str(n)]} for n in range(7)]


async def double(context: Context) -> None:
    """Changes every row twice: running it again without going back first doubles once more."""
    things = context.table(TABLE)
    await things.update(sql={"n": "n * 2"})
    await things.update(sql={"n": "n + 1"})


DECLARED = Journey(
    name="declared",
    tables={TABLE: Given(rows=MANY)},
    migrations=[
        Migration(
            table=TABLE,
            version=1,
            operations=[
                op.Update(sql={"n": "n + 10"}),
                op.RenameColumns({"text": "words"}),
                op.CreateIndex("id"),
            ],
        )
    ],
)
FUNCTION = Journey(
    name="function",
    tables={TABLE: Given(rows=MANY)},
    migrations=[Migration(table=TABLE, version=1, up=double)],
)


class FailingStore(DyingStore):
    """Fails at one call of a verb, and dies at the n-th mutating call after that."""

    verb = ""
    nth = 1
    has_failed = False

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
    ) -> T:
        if verb == self.verb and table == TABLE and not self.has_failed:
            self.nth -= 1
            if self.nth == 0:
                self.has_failed = True
                raise StoreError("injected", "Try again.")
        if self.has_failed:
            return await super().call(verb, table, run, mutates=mutates)
        return await super(DyingStore, self).call(verb, table, run, mutates=mutates)


def failing_manager(
    verb: str, nth: int, at: int = 0, when: str = "before"
) -> type[MigrationManager]:
    """Returns a manager class whose migration fails at a verb, and that dies on the way back."""
    store = type("Failing", (FailingStore,), {"verb": verb, "nth": nth, "at": at, "when": when})
    return type("FailingManager", (MigrationManager,), {"_store_type": store})


async def calls_of_the_way_back(crashes: Crashes, verb: str, nth: int) -> list[tuple[str, str]]:
    """Lets a migration fail, and returns the mutating calls that undo it."""
    kind = failing_manager(verb, nth)
    async with kind(crashes.copy(), migrations=crashes.journey.migrations, **OPTIONS) as manager:
        with pytest.raises(MigrationFailedError):
            await manager.upgrade()
        store: Any = manager._database.store
        return list(store.calls)


async def died_failing(path: Path, migrations: Sequence[Migration], kind: Any) -> bool:
    """Runs until the process dies on the way back; `False` where it only failed."""
    try:
        return await dies(path, migrations, kind)
    except MigrationFailedError:
        return False


@pytest.mark.parametrize(
    ("journey", "verb", "nth"),
    [(DECLARED, "create_index", 1), (FUNCTION, "update", 2)],
    ids=["declared", "function"],
)
async def test_a_death_while_a_failed_migration_is_undone(
    journey: Journey, verb: str, nth: int, tmp_path: Path
) -> None:
    """Dead before or after any call of the undoing, the next run ends as if nothing had failed.

    A restore that was announced counts as made or not made by what is there: operations that the
    journal says are complete are run again, since the restore took them away.
    """
    crashes = Crashes(journey, tmp_path)
    await crashes.prepare()
    back = await calls_of_the_way_back(crashes, verb, nth)
    assert ("restore", TABLE) in back
    wrong = []
    for at in range(1, len(back) + 1):
        for when in ("before", "after"):
            path = crashes.copy()
            await died_failing(path, journey.migrations, failing_manager(verb, nth, at, when))
            wrong.append(await crashes.difference(path, f"died {when} {back[at - 1]}"))

    assert [text for text in wrong if text] == []


async def test_a_death_while_a_killed_function_is_undone(tmp_path: Path) -> None:
    """Dead twice, in the function and anywhere in its recovery: no branch and no change is left."""
    crashes = Crashes(FUNCTION, tmp_path)
    await crashes.prepare()
    first = next(
        n for n, (verb, table) in enumerate(crashes.calls, 1) if (verb, table) == ("update", TABLE)
    )
    path = crashes.copy()
    assert await dies(path, FUNCTION.migrations, dying_manager(first, "after"))
    recovery = await migrated(path, FUNCTION.migrations, dying_manager())
    wrong = []
    for at in range(1, len(recovery) + 1):
        for when in ("before", "after"):
            path = crashes.copy()
            await dies(path, FUNCTION.migrations, dying_manager(first, "after"))
            await dies(path, FUNCTION.migrations, dying_manager(at, when))
            wrong.append(await crashes.difference(path, f"died {when} {recovery[at - 1]}"))

    assert ("restore", TABLE) in recovery
    assert [text for text in wrong if text] == []


async def recovery_calls(crashes: Crashes, first: int) -> int:
    """Returns how many calls a run makes that recovers a killed function, reads included."""
    path = crashes.copy()
    await dies(path, FUNCTION.migrations, dying_manager(first, "after"))
    async with counting_manager()(path, migrations=FUNCTION.migrations, **OPTIONS) as manager:
        await manager.upgrade()
        store: Any = manager._database.store
        return len(store.calls)


def counting_manager() -> type[MigrationManager]:
    """Returns a manager class that counts its calls on the table."""
    return faulty_manager(Fault(mutations=False, table=TABLE))


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_failure_while_a_killed_function_is_undone(tmp_path: Path, when: str) -> None:
    """Where recovery itself fails, at a read or at the restore, the next run recovers.

    Nothing may be recorded as restored that was not: the function would run on what it left.
    """
    crashes = Crashes(FUNCTION, tmp_path)
    await crashes.prepare()
    first = next(
        n for n, (verb, table) in enumerate(crashes.calls, 1) if (verb, table) == ("update", TABLE)
    )
    wrong = []
    failed = 0
    for at in range(1, await recovery_calls(crashes, first) + 1):
        path = crashes.copy()
        await dies(path, FUNCTION.migrations, dying_manager(first, "after"))
        fault = Fault(action="reset", at=at, when=when, mutations=False, table=TABLE)
        try:
            await migrated(path, FUNCTION.migrations, faulty_manager(fault))
        except AiomigrateError:
            failed += 1
        wrong.append(await crashes.difference(path, f"failed {when} call {at}"))

    assert failed > 3
    assert [text for text in wrong if text] == []


MADE = Journey(
    name="made",
    tables={},
    migrations=[
        Migration(
            table=TABLE,
            version=1,
            operations=[
                op.CreateTable(THINGS, rows=MANY),
                op.Update(sql={"n": "n + 10"}),
                op.CreateIndex("id"),
            ],
        )
    ],
)


async def test_a_death_while_a_table_that_was_made_is_taken_away_again(tmp_path: Path) -> None:
    """Dead before or after any call, the next run makes the table again, with all its rows."""
    crashes = Crashes(MADE, tmp_path)
    await crashes.prepare()
    back = await calls_of_the_way_back(crashes, "create_index", 1)
    wrong = []
    for at in range(1, len(back) + 1):
        for when in ("before", "after"):
            path = crashes.copy()
            kind = failing_manager("create_index", 1, at, when)
            await died_failing(path, MADE.migrations, kind)
            wrong.append(await crashes.difference(path, f"died {when} {back[at - 1]}"))

    assert ("overwrite", TABLE) in back
    assert [text for text in wrong if text] == []
