"""P2: killed at any instant, the next run needs no human and ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import anyio
import pytest

from aiomigrate import MigrationManager
from tests import predecessor, scenario
from tests.faults import Fault, FaultyStore, faulty_manager
from tests.predecessor import DIARY, State
from tests.processes import MP, initialize, quiet_logger, start
from tests.tools import SEED

T = TypeVar("T")
OPTIONS: dict[str, Any] = {"lease_ttl": 0.5}
MIGRATIONS = Path(__file__).parents[2] / "migrations"
LAST = 24
"""Of a run that is killed more commits are tried than an undisturbed one was counted to make: it
renews its lease besides, and a commit that does not come is a kill that does not strike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgrade:
    """What the run has to do that is disturbed.

    Attributes:
        source: As for `tests.processes.initialize`.
        origin: The database it begins with, which is copied; `None` where there is none.
    """

    source: str = "migrations"
    origin: Path | None = None

    def begin(self, path: Path) -> None:
        """Puts the database there that the run begins with."""
        if self.origin is not None:
            shutil.copytree(self.origin, path)

    def migrations(self) -> Any:
        """Returns the migrations, for a manager in this process."""
        return scenario.migrations() if self.source == "migrations" else self.source


SCENARIO = Upgrade()
UPGRADES = ("scenario", "note application")


async def prepared(name: str, folder: Path) -> Upgrade:
    """Returns the scenario on nothing, or the note application's history on its first release."""
    if name == "scenario":
        return SCENARIO
    await predecessor.build(folder / "origin", State.V1)
    return Upgrade(source=str(MIGRATIONS), origin=folder / "origin")


async def end_of(path: Path) -> dict[str, Any]:
    """Returns everything that must be equal; categories that were made here without their times."""
    end = await scenario.snapshot(path)
    if categories := end["tables"].get("categories"):
        categories["rows"] = sorted(_timeless(row) for row in categories["rows"])
    return end


def _timeless(row: str) -> str:
    values = json.loads(row)
    if values["name"] == DIARY and not values["categoryId"].startswith("categories-"):
        values |= {"createdAt": "then", "updatedAt": "then"}
    return json.dumps(values, sort_keys=True)


async def undisturbed(path: Path, upgrade: Upgrade = SCENARIO) -> tuple[dict[str, Any], int]:
    """Runs once; returns the end and how many commits it took."""
    upgrade.begin(path)
    async with faulty_manager(Fault())(
        path, migrations=upgrade.migrations(), logger=quiet_logger(), concurrency=1
    ) as manager:
        await manager.initialize()
        store = manager._database.store
        assert isinstance(store, FaultyStore)
        return await end_of(path), len(store.calls)


async def recovered(path: Path, upgrade: Upgrade = SCENARIO) -> dict[str, Any]:
    """Runs again, without faults, and returns the end."""
    async with MigrationManager(
        path, migrations=upgrade.migrations(), logger=quiet_logger(), **OPTIONS
    ) as manager:
        await manager.initialize()
        validation = await manager.validate()
        assert validation.valid, validation
    return await end_of(path)


def kill_points(count: int) -> list[tuple[int, str]]:
    """Returns every commit, before and after it."""
    return [(n, when) for n in range(1, count + 1) for when in ("before", "after")]


Kill = Callable[[Path, Upgrade], Awaitable[bool]]
"""Runs an upgrade and kills it; returns whether that struck before the run had ended."""


def killed_at(at: int, when: str) -> Kill:
    """Returns what runs an upgrade in a process that kills itself at a commit."""

    async def kill(path: Path, upgrade: Upgrade) -> bool:
        fault = Fault(action="kill", at=at, when=when)
        process = start(initialize, str(path), upgrade.source, fault, {**OPTIONS, "concurrency": 1})
        await anyio.to_thread.run_sync(process.join, 60)
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    return kill


def killed_after(seconds: float) -> Kill:
    """Returns what runs an upgrade in a process and kills that from outside, by its id.

    A run that had ended by then is tried again with half the time.
    """

    async def kill(path: Path, upgrade: Upgrade) -> bool:
        gate = MP.Barrier(2)
        process = start(initialize, str(path), upgrade.source, Fault(), OPTIONS, None, gate)
        await anyio.to_thread.run_sync(gate.wait, 30)
        await anyio.to_thread.run_sync(process.join, seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            shutil.rmtree(path)
            upgrade.begin(path)
            return await killed_after(seconds / 2)(path, upgrade)
        return True

    return kill


async def duration(path: Path, upgrade: Upgrade) -> float:
    """Returns the seconds that an undisturbed `initialize()` takes in a process of its own."""
    upgrade.begin(path)
    gate, results = MP.Barrier(2), MP.Queue()
    process = start(initialize, str(path), upgrade.source, Fault(), OPTIONS, results, gate)
    await anyio.to_thread.run_sync(gate.wait, 30)
    begun = monotonic()
    outcome, told = await anyio.to_thread.run_sync(lambda: results.get(timeout=60))
    took = monotonic() - begun
    process.join()
    assert outcome == "ok", told
    return took


async def by_twos(items: Iterable[T], work: Callable[[int, T], Awaitable[None]]) -> None:
    """Does the work for each item and its number, two at a time: each waits for a lease to end."""
    slots = anyio.Semaphore(2)

    async def run(number: int, item: T) -> None:
        async with slots:
            await work(number, item)

    async with anyio.create_task_group() as group:
        for number, item in enumerate(items):
            group.start_soon(run, number, item)


async def check_kills(
    tmp_path: Path,
    kills: Sequence[tuple[object, Kill]],
    expected: dict[str, Any],
    upgrade: Upgrade = SCENARIO,
) -> None:
    """Kills a run in each way, runs again, and compares the end with the expected one."""
    failed: list[tuple[object, str]] = []
    struck: list[object] = []

    async def check(number: int, named: tuple[object, Kill]) -> None:
        name, kill = named
        path = tmp_path / f"killed-{number}"
        upgrade.begin(path)
        if await kill(path, upgrade):
            struck.append(name)
        try:
            found = await recovered(path, upgrade)
        except Exception as exc:  # noqa: BLE001 - which kills are not mended is the finding
            failed.append((name, repr(exc)))
            return
        if different := [key for key in expected if expected[key] != found[key]]:
            failed.append((name, f"differs in {different}"))
        else:
            shutil.rmtree(path)

    await by_twos(kills, check)

    assert failed == []
    assert len(struck) >= len(kills) * 2 // 3


async def check_points(
    tmp_path: Path, upgrade: Upgrade = SCENARIO, *, sample: int | None = None
) -> None:
    """Kills a run at each commit, or at a sample of them; see `check_kills`."""
    expected, count = await undisturbed(tmp_path / "expected", upgrade)
    points = kill_points(count + LAST)
    if sample is not None:
        points = sorted(random.Random(SEED).sample(kill_points(count), sample))

    await check_kills(tmp_path, [(p, killed_at(*p)) for p in points], expected, upgrade)


async def check_times(tmp_path: Path, upgrade: Upgrade, *, number: int) -> None:
    """Kills as many runs at times spread evenly over a run's duration; see `check_kills`."""
    took = await duration(tmp_path / "expected", upgrade)
    expected = await end_of(tmp_path / "expected")
    rng = random.Random(SEED)
    times = [rng.uniform(0, took) for _ in range(number)]
    kills = [(f"after {seconds:.4f} of {took:.4f} s", killed_after(seconds)) for seconds in times]

    await check_kills(tmp_path, kills, expected, upgrade)


async def test_sampled_kill_points_recover_to_the_undisturbed_end(tmp_path: Path) -> None:
    """A SIGKILL before or after sampled commits leaves nothing that the next run does not mend."""
    await check_points(tmp_path, sample=12)


async def test_sampled_kill_points_of_an_adoption_recover_to_the_undisturbed_end(
    tmp_path: Path,
) -> None:
    """The same while a database of the predecessor's first release is adopted and upgraded."""
    await check_points(tmp_path, await prepared("note application", tmp_path), sample=4)


@pytest.mark.parametrize(("name", "number"), [("scenario", 4), ("note application", 1)])
async def test_sampled_kills_at_random_times_recover_to_the_undisturbed_end(
    tmp_path: Path, name: str, number: int
) -> None:
    """A SIGKILL from outside at any time, not only at a commit, is mended by the next run."""
    await check_times(tmp_path, await prepared(name, tmp_path), number=number)


@pytest.mark.campaign
@pytest.mark.parametrize("name", UPGRADES)
async def test_every_kill_point_recovers_to_the_undisturbed_end(tmp_path: Path, name: str) -> None:
    """The whole of the above: every commit of user tables and ledger, before and after."""
    await check_points(tmp_path, await prepared(name, tmp_path))


@pytest.mark.campaign
@pytest.mark.parametrize("name", UPGRADES)
async def test_fifty_kills_at_random_times_recover_to_the_undisturbed_end(
    tmp_path: Path, name: str
) -> None:
    """The whole of the above: 50 kills, seeded and spread over the duration of a run."""
    await check_times(tmp_path, await prepared(name, tmp_path), number=50)
