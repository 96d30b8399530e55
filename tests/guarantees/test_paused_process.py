"""P1, P4: a holder paused past its lease, at any step, does no harm when it wakes."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from aiomigrate import MigrationManager
from aiomigrate.errors import LeaseLostError
from tests import scenario
from tests.faults import Fault, FaultyStore, faulty_manager
from tests.guarantees.test_killed_process import (
    SCENARIO,
    Upgrade,
    by_twos,
    kill_points,
    undisturbed,
)
from tests.processes import MP, initialize, quiet_logger, start
from tests.tools import SEED

OPTIONS: dict[str, Any] = {"lease_ttl": 0.5, "concurrency": 1}
HEAD = "table_migrations"
JOURNAL = "table_migrations_history"
STOP = Fault(action="stop", mutations=False)
Call = tuple[str, str]
Step = tuple[str, str, str]
"""Verb, table, and whether before or after the first such call that a holder makes."""

HOLDING: dict[str, Step] = {
    "its journal is not read": ("open", JOURNAL, "before"),
    "what it read may be out of date": ("version", JOURNAL, "after"),
    "its first event is written, which it does not know": ("add", JOURNAL, "after"),
    "a table is read, its migration not started": ("list_indices", "people", "after"),
    "it is about to keep a savepoint, after the last look at the lease": (
        "create_branch", "people", "before"),
    "a function has read what it will write": ("read", "people", "after"),
    "a migration is recorded, its savepoint there, the head below": (
        "delete_branch", "people", "before"),
    "all is recorded, the head below": ("stats", HEAD, "before"),
    "all is done but the last update of the head": ("stats", JOURNAL, "after"),
}  # fmt: skip
"""Of a run on nothing, from the moment it has the lease."""

RESTORING: dict[str, Step] = {
    "the lease is stolen, which it does not know": ("update", HEAD, "after"),
    "the dead one's journal is not read": ("open", JOURNAL, "before"),
    "it is about to look at the dead one's table": ("open", "people", "before"),
    "it compares commits with what was announced": ("checkout", "people", "after"),
    "it is about to restore": ("restore", "people", "before"),
    "it has restored, which is not recorded": ("restore", "people", "after"),
    "the restore is recorded, the savepoint there": ("list_branches", "people", "before"),
}
"""Of a run that finds a function interrupted: it goes back to the savepoint."""

RESUMING: dict[str, Step] = {
    "it is about to fence the dead one": ("alter_columns", "people", "before"),
    "it has fenced the dead one": ("alter_columns", "people", "after"),
    "it looks at what the dead one left": ("version", "people", "after"),
    "it goes on with the SQL of the dead one": ("update", "people", "before"),
}
"""Of a run that finds declared operations interrupted: it goes on where they were."""

CRASHES = {
    "restoring": Fault(action="kill", at=2, verb="add", table="people"),
    "resuming": Fault(action="kill", at=2, verb="update", table="people"),
}
"""Where the process died whose migration is recovered."""


async def woken(path: Path, fault: Fault, upgrade: Upgrade = SCENARIO) -> str | None:
    """Pauses a holder at a call until another has finished, wakes it, and compares the end.

    How many calls a run makes varies a little: one that ends before the call is not paused.

    Returns:
        What was wrong, or `None`.
    """
    expected = await scenario.snapshot(path.parent / "expected")
    before = {} if upgrade.origin is None else await scenario.applied_counts(upgrade.origin)
    mark = path.parent / f"{path.name}.stopped"
    results = MP.Queue()
    upgrade.begin(path)
    striking = replace(fault, signal_file=str(mark))
    process = start(initialize, str(path), upgrade.source, striking, OPTIONS, results)
    assert process.pid is not None
    try:
        with anyio.fail_after(30):
            while not mark.exists():
                if not process.is_alive():
                    return None if process.exitcode == 0 else f"it died with {process.exitcode}"
                await anyio.sleep(0.01)
        async with MigrationManager(
            path, migrations=upgrade.migrations(), logger=quiet_logger(), **OPTIONS
        ) as manager:
            report = await manager.initialize()
        os.kill(process.pid, signal.SIGCONT)
        outcome, told = await anyio.to_thread.run_sync(lambda: results.get(timeout=30))
    finally:
        process.kill()
        process.join()
    # Paused while the tables were being made, or once all was recorded, it holds no lease yet, or
    # none any more: it then finds the work done, by the other or by itself.
    if outcome not in (LeaseLostError.__name__, "ok"):
        return f"it ended with {outcome}: {told}"
    applied = await scenario.applied_counts(path)
    claimed = [*told, *((s.line, s.version) for s in report.applied)]
    if outcome == "ok" and sorted(claimed) != sorted(applied.keys() - before.keys()):
        return f"both together claim {claimed}"
    twice = {key: n for key, n in applied.items() if n != 1}
    if twice:
        return f"applied more than once: {twice}"
    found = await scenario.snapshot(path)
    different = [key for key in expected if expected[key] != found[key]]
    return f"{different}: {[(found[k], expected[k]) for k in different]}" if different else None


async def check(tmp_path: Path, faults: Sequence[Fault], upgrade: Upgrade = SCENARIO) -> None:
    """Pauses a holder by each fault and tells which ended wrongly."""
    wrong = {}

    async def pause(number: int, fault: Fault) -> None:
        found = await woken(tmp_path / f"paused-{number}", fault, upgrade)
        if found is not None:
            wrong[fault] = found

    await by_twos(faults, pause)

    assert wrong == {}
    assert count_paused(tmp_path) >= len(faults) - len(faults) // 20


def count_paused(folder: Path) -> int:
    """Returns how many processes were paused."""
    return len(list(folder.glob("*.stopped")))


def at_commits(points: Sequence[tuple[int, str]]) -> list[Fault]:
    """Returns what pauses at these commits."""
    return [replace(STOP, mutations=True, at=at, when=when) for at, when in points]


async def crashed(name: str, folder: Path) -> Upgrade:
    """Returns the scenario on a database that a dead process left."""
    origin = folder / "origin"
    process = start(initialize, str(origin), "migrations", CRASHES[name], OPTIONS)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    return Upgrade(origin=origin)


async def calls_of(path: Path, upgrade: Upgrade) -> tuple[list[Call], int]:
    """Runs once; returns its calls, and how many it made before it had the lease."""
    upgrade.begin(path)
    async with faulty_manager(Fault(mutations=False))(
        path, migrations=upgrade.migrations(), logger=quiet_logger(), **OPTIONS
    ) as manager:
        await manager.initialize()
        store = manager._database.store
    assert isinstance(store, FaultyStore)
    # Taken by an update, or inserted with the head.
    taking = {("update", HEAD), ("insert_missing", HEAD)}
    return store.calls, next(at for at, call in enumerate(store.calls) if call in taking)


async def at_steps(path: Path, upgrade: Upgrade, steps: Sequence[Step]) -> list[Fault]:
    """Returns what pauses a holder at these steps, counted in an undisturbed run."""
    calls, held = await calls_of(path, upgrade)
    faults = []
    for verb, table, when in steps:
        number = calls.index((verb, table), held)
        at = calls[: number + 1].count((verb, table))
        faults.append(replace(STOP, verb=verb, table=table, at=at, when=when))
    return faults


async def test_a_holder_paused_at_sampled_commits_does_no_harm_when_it_wakes(
    tmp_path: Path,
) -> None:
    """Stopped before or after a commit until its lease is taken: nothing is applied twice."""
    _, count = await undisturbed(tmp_path / "expected")
    points = random.Random(SEED).sample(kill_points(count - 2), 12)

    await check(tmp_path, at_commits(sorted(points)))


async def test_a_holder_paused_between_commits_does_no_harm_when_it_wakes(tmp_path: Path) -> None:
    """Nor where it has read, or waits for the journal, or the head has not followed yet."""
    await undisturbed(tmp_path / "expected")
    steps = random.Random(SEED).sample(sorted(HOLDING.values()), 6)

    await check(tmp_path, await at_steps(tmp_path / "calls", SCENARIO, steps))


async def test_a_function_paused_before_its_first_append_appends_nothing_when_it_wakes(
    tmp_path: Path,
) -> None:
    """Though the table was as it had found it when the next holder came: that one restores it.

    So too where it had not kept its savepoint yet.
    """
    await undisturbed(tmp_path / "expected")
    steps = [
        ("create_branch", "people", "before"),
        ("add", "people", "before"),
        ("add", "notes", "before"),
    ]

    await check(tmp_path, await at_steps(tmp_path / "calls", SCENARIO, steps))


@pytest.mark.parametrize(("name", "steps"), [("restoring", RESTORING), ("resuming", RESUMING)])
async def test_a_holder_paused_while_it_recovers_does_no_harm_when_it_wakes(
    tmp_path: Path, name: str, steps: dict[str, Step]
) -> None:
    """Nor in the middle of mending what a third process left when it was killed."""
    await undisturbed(tmp_path / "expected")
    upgrade = await crashed(name, tmp_path)
    sample = random.Random(SEED).sample(sorted(steps.values()), 2)

    await check(tmp_path, await at_steps(tmp_path / "calls", upgrade, sample), upgrade)


@pytest.mark.campaign
async def test_a_holder_paused_at_any_commit_does_no_harm_when_it_wakes(tmp_path: Path) -> None:
    """The whole of the above: every commit of user tables and ledger."""
    _, count = await undisturbed(tmp_path / "expected")

    await check(tmp_path, at_commits(kill_points(count - 2)))


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["holding", *CRASHES])
async def test_a_holder_paused_at_any_call_does_no_harm_when_it_wakes(
    tmp_path: Path, name: str
) -> None:
    """The whole of the above: every call, reading or writing, from the lease to the end."""
    await undisturbed(tmp_path / "expected")
    upgrade = SCENARIO if name == "holding" else await crashed(name, tmp_path)
    steps = {"holding": HOLDING, "restoring": RESTORING, "resuming": RESUMING}[name]
    named = await at_steps(tmp_path / "named", upgrade, list(steps.values()))
    calls, held = await calls_of(tmp_path / "calls", upgrade)
    every = [replace(STOP, at=n, when="before") for n in range(held + 1, len(calls) + 1)]

    await check(tmp_path, [*named, *every], upgrade)
