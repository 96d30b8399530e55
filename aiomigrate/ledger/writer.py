"""The one task that does all ledger writes of a lease holder.

Lines run concurrently; if each wrote its own rows, their commits would queue for seconds
(measured: one-row commits by many writers). So lines pass their events to this task, which
appends all waiting events in one journal commit (group commit), and afterwards updates the head
in combined, fenced updates that also renew the lease. It decides nothing about migrations.
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

_JOIN_S = 0.02  # how long `wait_durable` waits for a commit that others ask for
_MAX_GATHER_S = 0.05


@dataclass(eq=False)
class _Request:
    events: Sequence[Event]
    head_row: HeadRow | None = None
    done: anyio.Event = field(default_factory=anyio.Event)
    error: AiomigrateError | None = None


class Writer:
    """Does all ledger writes between taking the lease and giving it back."""

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
        """Stores the arguments; nothing is written before `run`.

        Args:
            ledger: The ledger to write.
            lease: The lease that this process holds.
            options: TTL and beat.
            clock: Clocks.
            log: Bound logger.
            stamp: Fields to set on every event: run, host, process, tool.
            phase: Returns the lease row's text about this holder; called at every renewal.
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
        self._asked = 0  # number of requests with a waiting caller
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

    # ---- called by the lines --------------------------------------------------------------------

    def record_later(self, *events: Event, head_row: HeadRow | None = None) -> anyio.Event:
        """Queues events for the next commit to the journal, without waiting for it.

        They become durable no later than any event recorded afterwards, and no later than the
        next renewal of the lease. A crash before that loses them.

        Args:
            events: The events.
            head_row: Head row to write once they are durable.

        Returns:
            An event that is set once they are durable, or once the writer has ended or failed.

        Raises:
            LeaseLostError: Another process has the lease, or the run has ended.
            AiomigrateError: The writer has failed before.
        """
        self._refuse_if_over()
        request = _Request(events, head_row)
        self._requests.append(request)
        return request.done

    async def record(self, *events: Event) -> None:
        """Appends events to the journal; they and all queued events are durable on return.

        If the caller is cancelled, the events are appended all the same.

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
        """Waits until events passed to `record_later` are durable.

        Waits a moment for a commit that another caller asks for, then asks for one itself.

        Args:
            durable: The event that `record_later` returned.

        Raises:
            LeaseLostError: Another process has the lease.
            StoreError: The journal could not be written.
        """
        with anyio.move_on_after(_JOIN_S):
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
        """Counts a running migration: a journal commit may wait briefly for its events."""
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1
            self._wake_if_complete()  # `_gather` may be waiting for this migration only

    def _wake_if_complete(self) -> None:
        if not self._gathering or self._working <= self._asked:
            self._wake.set()

    def write_row_later(self, row: HeadRow) -> None:
        """Queues a line's head row for the next update of the head."""
        for request in self._requests:
            if request.head_row is not None and request.head_row.name == row.name:
                request.head_row = None
        self._dirty[row.name] = row

    async def check(self) -> None:
        """Checks that this process holds the lease, renewing it if it is about to expire.

        Called immediately before every mutation of a user's table.

        Raises:
            LeaseLostError: This process does not hold the lease any more.
        """
        self._refuse_if_over()
        margin = min(2.0, self._options.ttl_s / 4)
        if self._clock.monotonic() < self._renewed_at + self._options.ttl_s - margin:
            return
        await self.sync()

    async def sync(self) -> None:
        """Updates the head; on return the queued rows are durable and the lease is renewed.

        Raises:
            LeaseLostError: Another process has the lease.
            AiomigrateError: The writer failed.
        """
        self._refuse_if_over()
        renewed = anyio.Event()
        self._renewals.append(renewed)
        self._wake.set()
        await renewed.wait()
        if self.error is not None:
            raise self.error

    def close(self, *, release: bool) -> None:
        """Asks the task to write what is queued, update the head, give the lease back and end.

        Args:
            release: Whether to give the lease back; otherwise it is left to expire, as a mutation
                may still be in progress.
        """
        self._closing = True
        self._release = release
        self._wake.set()

    # ---- the task -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Writes until closed. Shielded: the cancellation of the lines does not end it.

        Never raises an error: a lost lease or a failure of the ledger is kept in `error`, raised
        to all present and later callers, and cancels the run through `on_lost`.
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
            except Exception as exc:  # noqa: BLE001 - callers that wait must get it, or never end
                self.error = LedgerError(
                    f"The ledger could not be written: {type(exc).__name__}: {exc}.",
                    "This is a defect of aiomigrate: please report it.",
                )
                self.error.__cause__ = exc
                self.on_lost()
            finally:
                self._finish_requests()

    def _finish_requests(self) -> None:
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
        if batch := self._requests:  # all: the head written below must not be ahead of them
            self._requests, self._asked = [], 0
            await self._append(batch)
        if self._renewals or self._clock.monotonic() >= due_at:
            # Requests made during the write may concern rows that it does not contain.
            asked = list(self._renewals)
            await self._write_head(closing=False)
            self._renewals = [renewal for renewal in self._renewals if renewal not in asked]
            for renewal in asked:
                renewal.set()

    async def _gather(self) -> None:
        """Waits for more events to join the commit, at most as long as the last commit took.

        Ends as soon as all migrations that execute operations are waiting for the commit, so a
        single migration does not wait at all.
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
            self._requests = batch + self._requests  # `_finish_requests` sets their error
            raise
        for request in batch:
            if request.head_row is not None:
                self._dirty[request.head_row.name] = request.head_row
            request.done.set()

    async def _write_head(self, *, closing: bool) -> None:
        """Writes the lease row and the queued rows, retrying until all of them are written.

        An attempt may renew the lease and yet miss rows that other systems wrote: then a whole TTL
        is left for those, and the next attempt has a new beat, which other processes see.
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
            if not released:  # a lease given back is not renewed again
                self._beat += 1
        self._renewed_at = started
        for name, row in dirty.items():
            if self._dirty.get(name) is row:  # else a newer row was queued meanwhile
                del self._dirty[name]
        if released:
            self._log.debug(ev.LEASE_RELEASED, epoch=self.lease.epoch)
        elif closing:
            self._log.warning(ev.LEASE_LEFT, epoch=self.lease.epoch)

    async def _is_written(self, own: HeadRow, dirty: Mapping[str, HeadRow], started: float) -> bool:
        """Returns whether the head has all rows although the update did not replace all of them.

        If it has the lease row, the lease counts as renewed at `started`. Takes over rows that
        another system wrote, for the next attempt.

        Raises:
            LeaseLostError: The lease row has a newer epoch or another owner.
        """
        try:
            head = await self._ledger.read_head()
        except StoreError:
            return False
        row = head.leases.get(self.lease.key)
        if row is None or (row.epoch or 0) < self.lease.epoch:
            # An epoch never decreases: the table was overwritten, and `ensure` restores it.
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
        # Another system rewrote some of these rows meanwhile: take them over again.
        await self._ledger.own_rows([r for n, r in dirty.items() if have.get(n) != want[n]])
        return False

    def _lost(self, why: str) -> LeaseLostError:
        return LeaseLostError(
            f"The lease (epoch {self.lease.epoch}) was lost: {why}. Nothing more was written.",
            "Run again: the next run, or the process that took the lease, continues.",
        )
