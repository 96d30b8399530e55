"""The lease: one holder at a time, stolen only from the silent, given back only from the dead."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest
import structlog

from aiomigrate.clock import Clock
from aiomigrate.errors import (
    LeaseHeldError,
    LeaseTimeoutError,
    LedgerUnreadableError,
    StoreError,
)
from aiomigrate.ledger.codec import Head
from aiomigrate.ledger.lease import Lease, LeaseOptions, acquire, is_unfenced, phase_text, unlock
from aiomigrate.ledger.lease import take as try_take
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.ledger.records import BACKGROUND_LEASE, RUN_LEASE, HeadRow
from aiomigrate.ledger.writer import Writer
from aiomigrate.schema.sql import sql_literal
from aiomigrate.store.connection import Store

T = TypeVar("T")
Hook = Callable[[int], Awaitable[None]]

HEAD = "table_migrations"
JOURNAL = f"{HEAD}_history"
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
LOG = structlog.wrap_logger(structlog.ReturnLogger())
TTL_S = 0.01
"""Ours in most tests: the real time between two looks is a tenth of it."""


class Hand:
    """A monotonic clock that moves by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.clock = Clock(monotonic=lambda: self.now)


class ScriptedStore(Store):
    """Lets a test act between the calls of the code under test.

    Attributes:
        looked: Called after each read of the head, with its number from 1.
        updating: Called once, before the next update; may raise instead of it.
        updated: Called once, after the next update was applied; may raise although it was.
        journaling: Called once, before the first event is inserted; may raise instead of it.
    """

    journaling: Callable[[], Awaitable[None]] | None = None

    looked: Hook | None = None
    updating: Callable[[], Awaitable[None]] | None = None
    updated: Callable[[], Awaitable[None]] | None = None
    looks = 0

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
    ) -> T:
        if verb == "update" and self.updating is not None:
            act, self.updating = self.updating, None
            await act()
        if (verb, table) == ("insert_missing", JOURNAL) and self.journaling is not None:
            act, self.journaling = self.journaling, None
            await act()
        result = await super().call(verb, table, run, mutates=mutates)
        if verb == "update" and self.updated is not None:
            act, self.updated = self.updated, None
            await act()
        if verb == "read" and self.looked is not None:
            self.looks += 1
            await self.looked(self.looks)
        return result


async def reset() -> None:
    """Fails like a connection that broke."""
    raise StoreError("connection reset", "Try again.")


async def ledger_at(path: Path) -> tuple[ScriptedStore, Ledger]:
    """Opens a database's ledger through a connection of its own, founding it if need be."""
    store = await ScriptedStore.connect(str(path))
    assert isinstance(store, ScriptedStore)
    ledger = Ledger(store, HEAD, clock=Clock(), log=LOG)
    await ledger.ensure()
    return store, ledger


async def never(head: Head) -> bool:
    """Says that the work is not done."""
    return False


async def always(head: Head) -> bool:
    """Says that the work is done."""
    return True


async def take(
    ledger: Ledger,
    owner: str,
    *,
    row_ttl_s: float = TTL_S,
    is_done: Callable[[Head], Awaitable[bool]] = never,
    clock: Clock | None = None,
    **options: float,
) -> Lease | None:
    """Acquires the lease as a process with this nonce would."""
    return await acquire(
        ledger,
        owner=owner,
        phase=phase_text(f"run-of-{owner}", NOW.isoformat(), row_ttl_s, "users 7"),
        options=LeaseOptions(**{"ttl_s": TTL_S, **options}),
        clock=clock or Clock(),
        log=LOG,
        is_done=is_done,
    )


async def row_of(ledger: Ledger) -> HeadRow:
    """Returns the lease's row."""
    return (await ledger.read_head()).leases[RUN_LEASE]


async def beat(ledger: Ledger, owner: str) -> None:
    """Renews the lease as its holder would."""
    row = await row_of(ledger)
    where = f"epoch = {row.epoch} AND owner = {sql_literal(owner)}"
    assert await ledger.update_lease({"beat": (row.beat or 0) + 1}, where, RUN_LEASE) == 1


async def release(ledger: Ledger, lease: Lease) -> None:
    """Gives the lease back as its holder would."""
    where = f"epoch = {lease.epoch} AND owner = {sql_literal(lease.owner)}"
    assert await ledger.update_lease({"owner": ""}, where, RUN_LEASE) == 1


# ---- founding -----------------------------------------------------------------------------------


async def founder(path: Path) -> tuple[ScriptedStore, Ledger]:
    """Opens the ledger of a database that has none yet."""
    store = await ScriptedStore.connect(str(path))
    assert isinstance(store, ScriptedStore)
    return store, Ledger(store, HEAD, clock=Clock(), log=LOG)


async def test_who_founds_the_ledger_holds_the_lease_at_once(tmp_path: Path) -> None:
    """The row is made as that of its holder: no update takes it, and whoever comes next waits."""
    store, ledger = await founder(tmp_path / "db")
    store.updating = reset
    lease = await take(ledger, "founder")
    row = await row_of(ledger)
    _, other = await ledger_at(tmp_path / "db")

    assert lease is not None
    assert (lease.epoch, lease.owner, lease.waited, lease.returned) == (1, "founder", False, None)
    assert (row.epoch, row.owner, row.beat) == (1, "founder", 0)
    assert lease.head == await ledger.read_head()
    assert store.updating is reset, "nothing was updated"
    with pytest.raises(LeaseTimeoutError):
        await take(other, "next", row_ttl_s=60, ttl_s=60, wait_s=0.1)


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_founding_that_fails_leaves_the_lease_free(tmp_path: Path, cancelled: bool) -> None:
    """It may have been taken along with the head while the journal could not be made."""
    store, ledger = await founder(tmp_path / "db")

    async def head_is_there() -> None:
        with anyio.fail_after(10):
            while not (await ledger.read_head()).leases:  # noqa: ASYNC110 - it is in a table
                await anyio.sleep(0.01)
        if not cancelled:
            raise StoreError("disk full", "Make room.")
        scope.cancel()

    store.journaling = head_is_there
    with anyio.CancelScope() as scope:
        with contextlib.suppress(LedgerUnreadableError):
            await take(ledger, "founder")
            raise AssertionError("nothing failed")

    row = await row_of(ledger)
    assert store.journaling is None
    assert scope.cancelled_caught is cancelled
    assert (row.epoch, row.owner) == (1, "")
    lease = await take(ledger, "next")
    assert lease is not None
    assert lease.epoch == 2


# ---- stealing -----------------------------------------------------------------------------------


async def stolen_at(
    path: Path, *, row_ttl_s: float, ttl_s: float = TTL_S, step_s: float = 10, beats: int = 0
) -> float:
    """Waits for a holder that beats at the first few looks; returns the seconds until the theft."""
    _, holder = await ledger_at(path)
    assert await take(holder, "holder", row_ttl_s=row_ttl_s) is not None
    hand = Hand()
    looks = itertools.count(1)

    async def is_done(head: Head) -> bool:
        hand.now += step_s
        if next(looks) <= beats:
            await beat(holder, "holder")
        return False

    _, waiter = await ledger_at(path)
    with anyio.fail_after(10):
        lease = await take(waiter, "waiter", is_done=is_done, clock=hand.clock, ttl_s=ttl_s)

    assert lease == Lease(key="run", epoch=2, owner="waiter", taken_at=hand.now, waited=True)
    row = await row_of(waiter)
    assert (row.epoch, row.owner, row.beat) == (2, "waiter", 0)
    return hand.now - 1000


async def test_a_silent_holder_is_stolen_from_after_a_whole_ttl_of_watching(tmp_path: Path) -> None:
    """What the row says of the past does not count: the TTL runs from this process's first look."""
    assert await stolen_at(tmp_path / "db", row_ttl_s=30) == 30


@pytest.mark.parametrize(("beats", "stolen"), [(1, 50), (2, 60), (4, 80)])
async def test_a_beat_makes_the_wait_begin_again(tmp_path: Path, beats: int, stolen: int) -> None:
    """A TTL of silence after the last beat seen, however long this process has waited before."""
    # The n-th beat comes at 10 * n, after that look's read, so that it is seen 10 later.
    assert await stolen_at(tmp_path / "db", row_ttl_s=30, beats=beats) == stolen


@pytest.mark.parametrize(
    ("row_ttl_s", "ttl_s", "stolen"), [(90, 0.01, 90), (0.01, 0.01, 10), (0.001, 0.02, 10)]
)
async def test_a_holder_with_a_longer_ttl_of_its_own_is_given_it(
    tmp_path: Path, row_ttl_s: float, ttl_s: float, stolen: float
) -> None:
    """The longer of the two TTLs counts: the one in the row, or ours."""
    found = await stolen_at(tmp_path / "db", row_ttl_s=row_ttl_s, ttl_s=ttl_s)

    assert found == stolen


async def test_a_shorter_ttl_in_the_row_does_not_hasten_a_theft(tmp_path: Path) -> None:
    """Ours is never undercut by what a row says."""
    found = await stolen_at(tmp_path / "db", row_ttl_s=1 / 1024, ttl_s=1 / 64, step_s=1 / 256)

    assert found == 1 / 64


@pytest.mark.parametrize("phase", ["", "no JSON", "[1]", '{"ttl": "long"}', '{"ttl": null}'])
async def test_a_row_that_says_nothing_of_its_ttl_is_watched_for_ours(
    tmp_path: Path, phase: str
) -> None:
    """Whatever a holder wrote about itself, it can be succeeded."""
    _, ledger = await ledger_at(tmp_path / "db")
    held = {"epoch": 7, "owner": "other", "phase": phase}
    assert await ledger.update_lease(held, "epoch = 0", RUN_LEASE) == 1
    with anyio.fail_after(10):
        lease = await take(ledger, "me")

    assert lease is not None
    assert lease.epoch == 8


async def test_a_beat_at_the_moment_of_the_theft_keeps_the_lease(tmp_path: Path) -> None:
    """The update that steals requires the row as it was watched, beat included."""
    _, holder = await ledger_at(tmp_path / "db")
    assert await take(holder, "holder") is not None
    store, waiter = await ledger_at(tmp_path / "db")
    store.updating = lambda: beat(holder, "holder")
    hand = Hand()
    asked: list[HeadRow] = []

    async def is_done(head: Head) -> bool:
        hand.now += 10
        asked.append(head.leases[RUN_LEASE])
        return len(asked) == 2

    lease = await take(waiter, "waiter", is_done=is_done, clock=hand.clock)

    assert lease is None
    assert store.updating is None, "it never tried"
    assert [(row.epoch, row.owner, row.beat) for row in asked] == [
        (1, "holder", 0),
        (1, "holder", 1),
    ]


# ---- taking -------------------------------------------------------------------------------------


async def test_of_many_racers_one_has_the_lease_and_epochs_never_repeat(tmp_path: Path) -> None:
    """Twenty rounds of five: one winner each, its epoch above all before, and the row is its."""
    ledgers = [(await ledger_at(tmp_path / "db"))[1] for _ in range(5)]
    epochs: list[int] = []
    wrong: list[str] = []
    for number in range(20):
        won: list[Lease] = []

        async def race(ledger: Ledger, owner: str, won: list[Lease] = won) -> None:
            # Nobody waits out a TTL: whoever sees another holder leaves.
            lease = await take(ledger, owner, is_done=always, ttl_s=0.05, row_ttl_s=60)
            if lease is not None:
                won.append(lease)

        async with anyio.create_task_group() as group:
            for racer, ledger in enumerate(ledgers):
                group.start_soon(race, ledger, f"{number}-{racer}")
        row = await row_of(ledgers[0])
        if [(row.epoch, row.owner)] != [(lease.epoch, lease.owner) for lease in won]:
            wrong.append(f"round {number}: {won}, row {row}")
            continue
        epochs.append(won[0].epoch)
        await release(ledgers[0], won[0])

    assert wrong == []
    assert epochs == sorted(set(epochs))


async def test_of_many_thieves_one_has_the_lease(tmp_path: Path) -> None:
    """A dead holder is succeeded once, however many have watched it die."""
    ledgers = [(await ledger_at(tmp_path / "db"))[1] for _ in range(5)]
    assert await take(ledgers[0], "dead") is not None
    leases: list[Lease] = []

    async def steal(ledger: Ledger, owner: str) -> None:
        async def is_taken(head: Head) -> bool:
            return head.leases[RUN_LEASE].owner != "dead"

        # The winner's row says a minute, so that nobody can succeed it in turn.
        lease = await take(ledger, owner, is_done=is_taken, row_ttl_s=60)
        if lease is not None:
            leases.append(lease)

    async with anyio.create_task_group() as group:
        for number, ledger in enumerate(ledgers):
            group.start_soon(steal, ledger, f"thief-{number}")
    row = await row_of(ledgers[0])

    assert [(lease.epoch, lease.owner) for lease in leases] == [(2, row.owner)]


async def test_an_update_that_failed_after_taking_effect_has_taken_the_lease(
    tmp_path: Path,
) -> None:
    """An error means unknown: the row is read, and holds our nonce, so the lease is ours."""
    store, ledger = await ledger_at(tmp_path / "db")
    store.updated = reset
    lease = await take(ledger, "me")

    assert lease is not None
    assert (lease.epoch, lease.owner, lease.waited) == (1, "me", False)
    assert store.updated is None, "nothing failed"
    assert (await row_of(ledger)).owner == "me"


async def test_an_update_that_failed_without_effect_is_tried_again(tmp_path: Path) -> None:
    """An error means unknown: the row is read, is free, and is taken on the next turn."""
    store, ledger = await ledger_at(tmp_path / "db")
    store.updating = reset
    lease = await take(ledger, "me")

    assert lease is not None
    assert store.updating is None, "nothing failed"
    assert (await row_of(ledger)).owner == "me"


async def test_a_lease_taken_under_cancellation_comes_into_hands_that_give_it_back(
    tmp_path: Path,
) -> None:
    """Cancelled at the very update that takes it, the lease is returned all the same."""
    store, ledger = await ledger_at(tmp_path / "db")
    lease: Lease | None = None
    with anyio.CancelScope() as scope:

        async def cancel() -> None:
            scope.cancel()

        store.updated = cancel
        lease = await take(ledger, "me")

    assert store.updated is None, "nobody cancelled"
    assert lease is not None
    assert (await row_of(ledger)).owner == lease.owner == "me"


@pytest.mark.parametrize("fails", [True, False])
async def test_a_lease_that_another_took_first_is_never_claimed(
    tmp_path: Path, fails: bool
) -> None:
    """Whether the update changed nothing or failed: the row holds another's nonce."""
    _, other = await ledger_at(tmp_path / "db")
    store, ledger = await ledger_at(tmp_path / "db")

    async def outrun() -> None:
        assert await take(other, "other", row_ttl_s=60) is not None
        if fails:
            await reset()

    store.updating = outrun
    lease = await take(ledger, "me", is_done=always)

    assert lease is None
    assert (await row_of(ledger)).owner == "other"


async def test_work_that_another_has_done_meanwhile_needs_no_lease(tmp_path: Path) -> None:
    """A waiter asks with the head as it is now, and writes nothing when there is nothing to do."""
    _, holder = await ledger_at(tmp_path / "db")
    assert await take(holder, "holder", row_ttl_s=60) is not None
    before = await (await holder.store.open(HEAD)).version()
    _, waiter = await ledger_at(tmp_path / "db")
    lease = await take(waiter, "waiter", is_done=always)

    assert lease is None
    assert await (await holder.store.open(HEAD)).version() == before


# ---- waiting too long ---------------------------------------------------------------------------


async def test_a_waiter_that_gives_up_names_the_holder(tmp_path: Path) -> None:
    """The error tells host, process, run, phase, and the command that helps if it is dead."""
    _, holder = await ledger_at(tmp_path / "db")
    assert await take(holder, "holder", row_ttl_s=600) is not None
    hand = Hand()
    said = await row_of(holder)

    async def is_done(head: Head) -> bool:
        hand.now += 70
        return False

    _, waiter = await ledger_at(tmp_path / "db")
    with pytest.raises(LeaseTimeoutError) as caught:
        await take(waiter, "waiter", is_done=is_done, clock=hand.clock, wait_s=100)

    assert hand.now - 1000 == 140
    assert said.phase is not None
    for fact in ("100 s", "run-of-holder", "users 7"):
        assert fact in caught.value.what
    assert "aiomigrate unlock" in caught.value.remedy
    assert await row_of(holder) == said


async def test_a_waiter_that_gives_up_after_a_lost_race_names_the_winner(tmp_path: Path) -> None:
    """The holder told is the one that has the lease now, not the nobody who had it before."""
    _, other = await ledger_at(tmp_path / "db")
    store, ledger = await ledger_at(tmp_path / "db")

    async def outrun() -> None:
        assert await take(other, "other", row_ttl_s=60) is not None

    store.updating = outrun
    with pytest.raises(LeaseTimeoutError) as caught:
        await take(ledger, "me", wait_s=0)

    assert "run-of-other" in caught.value.what


# ---- unlocking ----------------------------------------------------------------------------------


async def held(path: Path, row_ttl_s: float) -> tuple[Ledger, ScriptedStore, Ledger]:
    """Returns the ledger of a holder, and the store and ledger of who is to unlock it."""
    _, holder = await ledger_at(path)
    assert await take(holder, "holder", row_ttl_s=row_ttl_s) is not None
    store, other = await ledger_at(path)
    return holder, store, other


async def test_unlock_frees_a_dead_holders_lease_after_its_whole_ttl(tmp_path: Path) -> None:
    """The holder's own, longer TTL is waited for; then the epoch is raised, which fences it."""
    holder, store, ledger = await held(tmp_path / "db", row_ttl_s=0.25)
    hand = Hand()

    async def pass_time(look: int) -> None:
        if look > 1:
            hand.now += 0.125

    store.looked = pass_time
    with anyio.fail_after(10):
        removed = await unlock(ledger, options=LeaseOptions(ttl_s=TTL_S), clock=hand.clock)
    row = await row_of(holder)

    assert removed is not None
    assert (removed.run_id, removed.epoch) == ("run-of-holder", 1)
    assert hand.now - 1000 == 0.375  # and one look after it
    assert (row.epoch, row.owner) == (2, "")
    late = HeadRow(name=row.name, version=0, migrated_at=NOW, epoch=1, owner="holder", beat=9)
    assert not await holder.write_rows([late], 1, "holder")
    assert await row_of(holder) == row


async def test_unlock_refuses_to_break_the_lease_of_a_live_holder(tmp_path: Path) -> None:
    """One beat within the TTL proves that it lives: the error names it, its lease stays."""
    holder, store, ledger = await held(tmp_path / "db", row_ttl_s=0.25)
    hand = Hand()

    async def pass_time(look: int) -> None:
        hand.now += 0.04
        if look == 4:
            await beat(holder, "holder")

    store.looked = pass_time
    with pytest.raises(LeaseHeldError, match="run-of-holder"):
        await unlock(ledger, options=LeaseOptions(ttl_s=TTL_S), clock=hand.clock)
    row = await row_of(holder)

    assert (row.epoch, row.owner, row.beat) == (1, "holder", 1)


async def test_unlock_refuses_when_another_has_succeeded_the_holder(tmp_path: Path) -> None:
    """Who was watched is gone, but the lease is held by one that lives."""
    holder, store, ledger = await held(tmp_path / "db", row_ttl_s=0.02)
    hand = Hand()

    async def succeed(look: int) -> None:
        if look == 1:
            assert await take(holder, "successor", row_ttl_s=60) is not None

    store.looked = succeed
    with pytest.raises(LeaseHeldError):
        await unlock(ledger, options=LeaseOptions(ttl_s=TTL_S), clock=hand.clock)

    assert (await row_of(holder)).owner == "successor"


async def test_unlock_of_a_free_lease_writes_nothing(tmp_path: Path) -> None:
    """Nobody holds it, or gives it back while being watched: there is nothing to remove."""
    holder, store, ledger = await held(tmp_path / "db", row_ttl_s=0.25)
    lease = Lease(key=RUN_LEASE, epoch=1, owner="holder", taken_at=0, waited=False)

    async def give_back(look: int) -> None:
        if look == 1:
            await release(holder, lease)

    store.looked = give_back
    options = LeaseOptions(ttl_s=TTL_S)
    removed: list[Any] = [await unlock(ledger, options=options, clock=Hand().clock)]
    version = await (await store.open(HEAD)).version()
    removed.append(await unlock(ledger, options=options, clock=Hand().clock))

    assert removed == [None, None]
    assert await (await store.open(HEAD)).version() == version
    assert (await row_of(holder)).epoch == 1


async def test_unlock_that_a_beat_outran_refuses(tmp_path: Path) -> None:
    """A holder that renews after the last look is alive too, and the lease is not free."""
    holder, store, ledger = await held(tmp_path / "db", row_ttl_s=0.0)
    store.updating = lambda: beat(holder, "holder")

    with pytest.raises(LeaseHeldError):
        await unlock(ledger, options=LeaseOptions(ttl_s=0.0), clock=Hand().clock)


# ---- fencing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [False, True], ids=["fenced", "the store refuses it"])
async def test_who_takes_the_lease_fences_who_held_it(tmp_path: Path, refused: bool) -> None:
    """The head in hand has no row that the one before could write; or it says that it has."""
    store, ledger = await ledger_at(tmp_path / "db")
    older = await take(ledger, "older")
    assert older is not None
    row = older.row("users", 1, at=NOW, digest="")
    await ledger.own_rows([row])
    await ledger.update_lease({"owner": ""}, f"epoch = {older.epoch}", RUN_LEASE)

    async def then_refuse() -> None:
        store.updating = reset

    store.updated = then_refuse if refused else None
    newer = await take(ledger, "newer")

    assert newer is not None
    assert is_unfenced(newer.head, RUN_LEASE, newer.epoch) is refused
    assert await ledger.write_rows([row], older.epoch, "older") is refused


# ---- renewing -----------------------------------------------------------------------------------


async def test_a_row_that_another_system_keeps_taking_does_not_cost_the_lease(
    tmp_path: Path,
) -> None:
    """A head update that renews the lease but misses a row has a whole TTL for the next attempt."""
    store, ledger = await ledger_at(tmp_path / "db")
    hand = Hand()
    lease = await take(ledger, "holder", clock=hand.clock)
    assert lease is not None
    row = lease.row("users", 1, at=NOW, digest="")
    options = LeaseOptions(ttl_s=TTL_S, beat_s=TTL_S * 100)
    writer = Writer(
        ledger, lease, options, clock=hand.clock, log=LOG, stamp={}, phase=lambda: "users 1"
    )
    beats = []

    async def theirs() -> None:
        await ledger.own_rows([row])
        head = await store.open(HEAD)
        await head.update(values={"epoch": None, "owner": None}, where="tableName = 'users'")

    async def taken_again() -> None:
        hand.now += 0.8 * TTL_S
        beats.append((await row_of(ledger)).beat)
        if len(beats) < 3:
            await theirs()
            store.updated = taken_again

    await theirs()
    store.updated = taken_again
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        writer.write_row_later(row)
        await writer.sync()
        writer.close(release=True)

    head = await ledger.read_head()
    assert beats == [1, 2, 3]
    assert [(r.name, r.version, r.epoch) for r in head.rows] == [("users", 1, lease.epoch)]
    assert writer.error is None


# ---- what a taken lease says of itself ----------------------------------------------------------


async def test_each_lease_begins_above_every_epoch_of_the_other(tmp_path: Path) -> None:
    """Epochs of both leases order what they write for one line, so none repeats or falls back."""
    _, ledger = await ledger_at(tmp_path / "db")
    held = {"epoch": 7, "owner": "me"}
    assert await ledger.update_lease(held, "epoch = 0", RUN_LEASE) == 1
    await ledger.ensure_lease(BACKGROUND_LEASE)
    background = await try_take(
        ledger, await ledger.read_head(), BACKGROUND_LEASE, "behind", "", Clock()
    )
    assert await ledger.update_lease({"owner": ""}, "epoch = 7", RUN_LEASE) == 1
    run = await take(ledger, "next")

    assert isinstance(background, Lease)
    assert run is not None
    assert (background.epoch, run.epoch) == (8, 9)


@pytest.mark.parametrize("how", ["given back", "unlocked", "never held"])
async def test_only_a_lease_that_was_given_back_vouches_for_its_holder(
    tmp_path: Path, how: str
) -> None:
    """Whoever was unlocked may only be paused: it has not said that it writes nothing more."""
    _, ledger = await ledger_at(tmp_path / "db")
    if how != "never held":
        lease = await take(ledger, "holder", row_ttl_s=0.0)
        assert lease is not None
        if how == "unlocked":
            assert await unlock(ledger, options=LeaseOptions(ttl_s=0.0), clock=Hand().clock)
        else:
            writer = Writer(
                ledger, lease, LeaseOptions(), clock=Clock(), log=LOG, stamp={}, phase=str
            )
            writer.close(release=True)
            await writer.run()
    taken = await take(ledger, "next")

    assert taken is not None
    assert taken.returned == (1 if how == "given back" else None)


async def test_a_lease_counts_from_before_the_update_that_took_it(tmp_path: Path) -> None:
    """Others may have seen the row from then on: a slow commit shortens what is left of the TTL."""
    store, ledger = await ledger_at(tmp_path / "db")
    hand = Hand()

    async def pass_time() -> None:
        hand.now += 20

    store.updating = store.updated = pass_time
    lease = await take(ledger, "me", clock=hand.clock)

    assert lease is not None
    assert hand.now == 1040
    assert lease.taken_at == 1000
