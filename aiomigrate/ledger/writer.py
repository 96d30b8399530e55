"""The one task that writes a holder's ledger: group commit, renewals, the head that follows.

Lines run concurrently; if each wrote its own rows, commits would queue behind each other for
seconds (facts: one-row commits by many writers). So all of them hand events to this task, which
appends what is waiting as one journal commit, and lets the head follow in coalesced, fenced
updates that also renew the lease. It decides nothing about migrations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from aiomigrate import events as ev
from aiomigrate.clock import Clock
from aiomigrate.errors import AiomigrateError, LeaseLostError, LedgerError, StoreError
from aiomigrate.ledger.codec import Stamp, lease_row
from aiomigrate.ledger.lease import Lease, LeaseOptions
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.ledger.records import Event, HeadRow

_RIPE_S = 0.02
_MAX_GATHER_S = 0.05


@dataclass(eq=False)
class _Request:
    events: Sequence[Event]
    lifts: HeadRow | None = None
    done: anyio.Event = field(default_factory=anyio.Event)
    error: AiomigrateError | None = None


class Writer:
    """Owns every ledger write between taking the lease and giving it back."""

    def __init__(
        self,
        ledger: Ledger,
        lease: Lease,
        options: LeaseOptions,
        *,
        clock: Clock,
        log: Any,
        stamp: Mapping[str, Any],
        phase: Callable[[], str],
    ) -> None:
        """Prepares; nothing is written before `run`.

        Args:
            ledger: Where to write.
            lease: The lease held.
            options: TTL and beat.
            clock: Clocks.
            log: Bound logger.
            stamp: Fields every event gets: run, host, process, tool.
            phase: Returns the lease row's text about this holder, asked at every renewal.
        """
        self.lease = lease
        self.error: AiomigrateError | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self._ledger = ledger
        self._options = options
        self._clock = clock
        self._log = log
        self._stamp = {"lease": lease.key, "epoch": lease.epoch, **stamp}
        self._phase = phase
        self._requests: list[_Request] = []
        self._asked = 0  # how many of them somebody waits for
        self._gathering = False
        self._dirty: dict[str, HeadRow] = {}
        self._wake = anyio.Event()
        self._closing = False
        self._over = False
        self._release = True
        self._seq = 0
        self._beat = 0
        self._renewed_at = lease.taken_at
        self._renewals: list[anyio.Event] = []
        self._working = 0
        self._append_s = 0.0

    # ---- asked by others ------------------------------------------------------------------------

    def record_later(self, *events: Event, lifts: HeadRow | None = None) -> anyio.Event:
        """Hands in events that nobody waits for: they ride with the next commit to the journal.

        So they are durable before anything is that is recorded later, and not later than the next
        renewal of the lease. A crash before loses them.

        Args:
            events: The events.
            lifts: Head row that follows once they are durable.

        Returns:
            What is set once they are durable, or the lease is lost.

        Raises:
            LeaseLostError: Another process has the lease.
        """
        self._refuse_if_over()
        request = _Request(events, lifts)
        self._requests.append(request)
        return request.done

    async def record(self, *events: Event) -> None:
        """Appends events to the journal; they, and what was handed in before, are durable then.

        Raises:
            LeaseLostError: Another process has the lease; nothing was appended.
            StoreError: The journal could not be written.
        """
        self._refuse_if_over()
        request = _Request(events)
        self._requests.append(request)
        self._asked += 1
        self._wake_if_complete()
        await request.done.wait()
        if request.error is not None:
            raise request.error

    async def wait_durable(self, durable: anyio.Event) -> None:
        """Waits for what `follow` returned: a moment for others to commit it, else it is committed.

        Raises:
            LeaseLostError: Another process has the lease.
            StoreError: The journal could not be written.
        """
        with anyio.move_on_after(_RIPE_S):
            await durable.wait()
        if self.error is not None:
            raise self.error
        if not durable.is_set():
            await self.record()

    def _refuse_if_over(self) -> None:
        if self.error is not None:
            raise self.error
        if self._over:
            raise self._lost("the run has ended")

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Tells that a migration is operating, so that events of it may soon follow."""
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1
            self._wake_if_complete()  # who gathers may be waiting for nobody but this migration

    def _wake_if_complete(self) -> None:
        if not self._gathering or self._working <= self._asked:
            self._wake.set()

    def lift(self, row: HeadRow) -> None:
        """Lets a line's head row follow with the next head update."""
        for request in self._requests:
            if request.lifts is not None and request.lifts.name == row.name:
                request.lifts = None
        self._dirty[row.name] = row

    async def check(self) -> None:
        """Returns if the lease is safely ours, renewing it first if it is about to run out.

        Asked immediately before every mutation of a user's table.

        Raises:
            LeaseLostError: It is not.
        """
        self._refuse_if_over()
        margin = min(2.0, self._options.ttl_s / 4)
        if self._clock.monotonic() < self._renewed_at + self._options.ttl_s - margin:
            return
        await self.sync()

    async def sync(self) -> None:
        """Writes the head now: what was lifted is durable on return, and the lease renewed.

        Raises:
            LeaseLostError: Another process has the lease.
        """
        self._refuse_if_over()
        renewed = anyio.Event()
        self._renewals.append(renewed)
        self._wake.set()
        await renewed.wait()
        if self.error is not None:
            raise self.error

    def close(self, *, release: bool) -> None:
        """Writes what is waiting, updates the head a last time, and gives the lease back.

        Args:
            release: Otherwise the lease is left to expire: a mutation may still be under way.
        """
        self._closing = True
        self._release = release
        self._wake.set()

    # ---- the task -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Writes until closed. Shielded: it outlives the cancellation of the lines it serves.

        Never raises: a lost lease or a broken ledger is kept in `error`, told to everyone who
        waits or asks, and cancels the run through `on_lost`.
        """
        with anyio.CancelScope(shield=True):
            try:
                while not (self._closing and not self._requests):
                    await self._turn()
                await self._write_head(closing=True)
            except AiomigrateError as exc:
                self.error = exc
                if isinstance(exc, LeaseLostError):
                    self._log.error(ev.LEASE_LOST, epoch=self.lease.epoch)
                self.on_lost()
            except Exception as exc:  # noqa: BLE001 - whoever waits must be told, or waits for ever
                self.error = LedgerError(
                    f"The ledger could not be written: {type(exc).__name__}: {exc}.",
                    "This is a defect of aiomigrate: please report it.",
                )
                self.error.__cause__ = exc
                self.on_lost()
            finally:
                self._tell_all()

    def _tell_all(self) -> None:
        self._over = True
        for request in self._requests:
            request.error = self.error
            request.done.set()
        for renewal in self._renewals:
            renewal.set()

    async def _turn(self) -> None:
        due_at = self._renewed_at + self._options.beat_s
        while not (self._asked or self._renewals or self._closing):
            if (due := due_at - self._clock.monotonic()) <= 0:
                break
            with anyio.move_on_after(due):
                await self._wake.wait()
            self._wake = anyio.Event()
        if self._asked:
            await self._gather()
        if batch := self._requests:  # riders too: the head below must not be ahead of them
            self._requests, self._asked = [], 0
            await self._append(batch)
        if self._renewals or self._clock.monotonic() >= due_at:
            # Those that ask while it is written may have lifted what it does not hold.
            asked = list(self._renewals)
            await self._write_head(closing=False)
            self._renewals = [renewal for renewal in self._renewals if renewal not in asked]
            for renewal in asked:
                renewal.set()

    async def _gather(self) -> None:
        """Lets others that are about to hand in events join the commit, for as long as one takes.

        Who waits alone waits for nothing: then no migration operates that is not waiting too.
        """
        await anyio.lowlevel.checkpoint()
        self._gathering = True
        with anyio.move_on_after(min(self._append_s, _MAX_GATHER_S)):
            while self._working > self._asked:
                self._wake = anyio.Event()
                await self._wake.wait()
        self._gathering = False

    async def _append(self, batch: list[_Request]) -> None:
        events = [event for request in batch for event in request.events]
        stamp = Stamp(seq=self._seq, at=self._clock.wall(), common=self._stamp)
        self._seq += len(events)
        begun = self._clock.monotonic()
        try:
            if events:
                await self._ledger.append(events, self.lease.owner, stamp)
            self._append_s = self._clock.monotonic() - begun
        except BaseException:
            self._requests = batch + self._requests  # told with everyone else
            raise
        for request in batch:
            if request.lifts is not None:
                self._dirty[request.lifts.name] = request.lifts
            request.done.set()

    async def _write_head(self, *, closing: bool) -> None:
        """Writes the lease row and what was lifted, until it is there.

        An attempt may renew the lease and yet miss rows that others wrote: then there is a whole
        TTL again for those, and the next attempt has a beat of its own, which others see.
        """
        released = closing and self._release
        self._beat += 1
        while True:
            started = self._clock.monotonic()
            own = lease_row(
                self.lease.key,
                at=self._clock.wall(),
                epoch=self.lease.epoch,
                owner="" if released else self.lease.owner,
                beat=self._beat,
                phase="" if released else self._phase(),
            )
            dirty = dict(self._dirty)
            try:
                rows = [own, *dirty.values()]
                done = await self._ledger.write_rows(rows, self.lease.epoch, self.lease.owner)
            except StoreError as exc:
                done = False
                self._log.warning(ev.LEDGER_RETRIED, error=exc.what)
            if done or await self._is_written(own, dirty, started):
                break
            if self._clock.monotonic() > self._renewed_at + self._options.ttl_s:
                raise self._lost("could not renew it in time")
            await anyio.sleep(min(0.05, self._options.ttl_s / 20))
            if not released:  # given back, it is not written again
                self._beat += 1
        self._renewed_at = started
        for name, row in dirty.items():
            if self._dirty.get(name) is row:  # else it was lifted again meanwhile
                del self._dirty[name]
        if released:
            self._log.debug(ev.LEASE_RELEASED, epoch=self.lease.epoch)
        elif closing:
            self._log.warning(ev.LEASE_LEFT, epoch=self.lease.epoch)

    async def _is_written(self, own: HeadRow, dirty: Mapping[str, HeadRow], started: float) -> bool:
        """Looks why not every row was replaced; returns whether they are there all the same.

        If at least the lease row is, the lease is renewed as of `started`.

        Raises:
            LeaseLostError: The lease row carries a newer epoch, or another owner.
        """
        try:
            head = await self._ledger.read_head()
        except StoreError:
            return False
        row = head.leases.get(self.lease.key)
        if row is None or (row.epoch or 0) < self.lease.epoch:
            # An epoch never goes back: the table was overwritten, and is about to be healed.
            await self._ledger.ensure()
            return False
        mine = {self.lease.owner, own.owner}
        if row.epoch != self.lease.epoch or row.owner not in mine:
            raise self._lost(f"epoch {row.epoch} is held by {row.owner or 'nobody'}")
        have = {r.name: (r.version, r.digest, r.epoch) for r in head.rows}
        want = {n: (r.version, r.digest, r.epoch) for n, r in dirty.items()}
        if row.beat == own.beat:
            self._renewed_at = started
            if all(have.get(n) == v for n, v in want.items()):
                return True
        # Another system rewrote a row of ours meanwhile: take it over again.
        await self._ledger.own_rows([r for n, r in dirty.items() if have.get(n) != want[n]])
        return False

    def _lost(self, why: str) -> LeaseLostError:
        return LeaseLostError(
            f"The lease (epoch {self.lease.epoch}) was lost: {why}. Nothing more was written.",
            "Another process goes on with the migrations; run again to see where they are.",
        )
