"""The lease: the exclusive right to run migrations, with a fencing epoch.

A process takes a lease by one compare-and-set on the lease row (lancedb `update … WHERE`; exactly
one of several concurrent updates reports `rows_updated` 1, measured). It takes another holder's
lease only after it has itself observed the row unchanged for the whole TTL on its own monotonic
clock. Renewing a lease is for `ledger.writer`, which does all writes of a holder.

There are two leases: the run lease, and the background lease, which a process takes only while it
holds the run lease. So while a process holds the run lease, no other process starts background
work. Each new epoch is above all others in the head, which orders the writes that the two leases
make for one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import itertools
import json
import os
import platform
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio

from aiomigrate import events as ev
from aiomigrate.clock import Clock
from aiomigrate.errors import LeaseHeldError, LeaseTimeoutError, LedgerError, StoreError
from aiomigrate.ledger.codec import Head, lease_row
from aiomigrate.ledger.ledger import FirstRows, Ledger
from aiomigrate.ledger.records import RUN_LEASE, HeadRow, Holder, StepProgress
from aiomigrate.schema.sql import sql_literal

HOST = platform.node()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseOptions:
    """How a lease is taken and kept.

    Attributes:
        ttl_s: Seconds without a renewal after which another process may take the lease.
        beat_s: Seconds between renewals.
        wait_s: Seconds to wait for another holder to release it.
    """

    ttl_s: float = 30.0
    beat_s: float = 5.0
    wait_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A lease that this process took.

    Attributes:
        key: Its key.
        epoch: Its epoch, which grows with every change of holder.
        owner: This holder's nonce.
        taken_at: Monotonic time before the update that took it, from which its TTL counts.
        waited: Whether this process waited for another holder.
        returned: Epoch of the previous holder if it released the lease, which proves that it
            writes nothing more; else `None`.
        head: The head as read right after the lease was taken.
    """

    key: str
    epoch: int
    owner: str
    taken_at: float
    waited: bool
    returned: int | None = None
    head: Head = field(default_factory=Head, repr=False, compare=False)

    def row(self, line: str, version: int, *, at: dt.datetime, digest: str) -> HeadRow:
        """Returns a line's head row as this holder writes it."""
        return HeadRow(
            name=line,
            version=version,
            migrated_at=at,
            epoch=self.epoch,
            owner=self.owner,
            digest=digest,
            lease=self.key,
        )


_MAX_STEPS = 32
"""Maximum number of migrations whose progress is stored in the lease row."""


def phase_text(
    run_id: str, since: str, ttl_s: float, phase: str, going: Iterable[StepProgress] = ()
) -> str:
    """Returns the JSON text by which a holder describes itself in the lease row.

    Args:
        run_id: Id of the run.
        since: Time at which the lease was taken, ISO 8601.
        ttl_s: The holder's TTL, which other processes respect.
        phase: Description of what the holder is doing.
        going: Progress of the running migrations; at most 32 are stored.
    """
    fields: dict[str, Any] = {"host": HOST, "pid": os.getpid(), "run": run_id, "since": since,
                              "ttl": ttl_s, "phase": phase}  # fmt: skip
    if steps := [dataclasses.asdict(step) for step in itertools.islice(going, _MAX_STEPS)]:
        fields["going"] = steps
    return json.dumps(fields, ensure_ascii=False)


def holder_of(head: Head, key: str = RUN_LEASE) -> Holder | None:
    """Returns the holder of a lease according to the head, `None` if the lease is free."""
    row = head.leases.get(key)
    if row is None or not row.owner:
        return None
    fields = _phase_fields(row)
    return Holder(
        host=str(fields.get("host", "?")),
        pid=_number(fields.get("pid"), int, 0),
        run_id=str(fields.get("run", row.owner)),
        phase=str(fields.get("phase", "")),
        since=str(fields.get("since", "")),
        epoch=row.epoch or 0,
        going=tuple(_progress(one) for one in fields.get("going") or () if isinstance(one, dict)),
    )


def _progress(fields: Mapping[str, Any]) -> StepProgress:
    return StepProgress(
        line=str(fields.get("line", "")),
        version=_number(fields.get("version"), int, 0),
        doing=str(fields.get("doing", "")),
        done=_number(fields.get("done"), int, 0),
        total=_number(fields.get("total"), int, None),
    )


def top_epoch(head: Head) -> int:
    """Returns the highest epoch in the head; a new holder of any lease uses a higher one."""
    rows = (*head.rows, *head.leases.values())
    return max((row.epoch or 0 for row in rows), default=0)


class Watch:
    """Observes a lease row over time, on this process's own monotonic clock."""

    def __init__(self, ttl_s: float, clock: Clock) -> None:
        """Starts without an observation.

        Args:
            ttl_s: This process's TTL in seconds.
            clock: Clocks.
        """
        self._ttl_s = ttl_s
        self._clock = clock
        self._seen: tuple[int | None, str | None, int | None] | None = None
        self._since = 0.0

    def ttl_s(self, row: HeadRow) -> float:
        """Returns the TTL in seconds: the holder's, or this process's if that is longer."""
        return float(max(self._ttl_s, _number(_phase_fields(row).get("ttl"), float, 0.0)))

    def may_take(self, row: HeadRow) -> bool:
        """Records an observation; returns whether the lease is free or its TTL has passed."""
        state = (row.epoch, row.owner, row.beat)
        if state != self._seen:
            self._seen, self._since = state, self._clock.monotonic()
        return not row.owner or self._clock.monotonic() - self._since >= self.ttl_s(row)


def _phase_fields(row: HeadRow) -> dict[str, Any]:
    try:
        fields = json.loads(row.phase or "{}")
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _number(value: object, kind: type[Any], default: Any) -> Any:
    return kind(value) if isinstance(value, (int, float)) else default


_REFUSED_S = 5.0
"""Seconds for which a refused write of the lease row is retried."""


async def acquire(  # noqa: C901 - the protocol of waiting and taking: proved as a whole
    ledger: Ledger,
    *,
    owner: str,
    phase: str,
    options: LeaseOptions,
    clock: Clock,
    log: Any,
    is_done: Callable[[Head], Awaitable[bool]],
    line_rows: Callable[[Lease], Iterable[HeadRow]] = lambda _: (),
    is_founded: bool = False,
) -> Lease | None:
    """Creates the ledger if it does not exist, and takes the run lease, waiting for its holder.

    A cancellation gives a lease back that was taken with the creation of the head. A crash leaves
    the lease to expire after its TTL.

    Args:
        ledger: The ledger.
        owner: This holder's nonce.
        phase: Text of the lease row that describes this holder, see `phase_text`.
        options: TTL and waiting time.
        clock: Clocks.
        log: Bound logger.
        is_done: Called with the head after each wait: whether another process has done the work,
            so that this one does not need the lease.
        line_rows: Returns the lines' rows to insert together with the lease row if this process
            creates the head.
        is_founded: Whether both tables exist, so that the journal need not be read.

    Returns:
        The lease, or `None` if another process did the work meanwhile.

    Raises:
        LeaseTimeoutError: Other processes held the lease for `wait_s`.
        LedgerError: The ledger cannot be read or created.
        StoreError: The store refused to write the lease row.
    """
    begun = clock.monotonic()

    def first(epoch: int) -> list[HeadRow]:
        lease = Lease(key=RUN_LEASE, epoch=epoch, owner=owner, taken_at=begun, waited=False)
        mine = lease_row(RUN_LEASE, at=clock.wall(), epoch=epoch, owner=owner, phase=phase)
        return [mine, *line_rows(lease)]

    head = await (ledger.read_head() if is_founded else _ensure(ledger, owner, first))
    if (mine := _held_by(owner, head, begun)) is not None:
        return mine
    watch = Watch(options.ttl_s, clock)
    waited = False
    refused: StoreError | None = None
    while True:
        row = head.leases.get(RUN_LEASE)
        if row is None:
            await ledger.ensure()
        elif watch.may_take(row):
            if row.owner:
                holder_text = str(holder_of(head))
                log.warning(ev.LEASE_STOLEN, holder=holder_text, silent_s=watch.ttl_s(row))
            # Shielded as a whole: a lease taken under cancellation must reach the caller,
            # which gives it back.
            with anyio.CancelScope(shield=True):
                lease = await take(ledger, head, RUN_LEASE, owner, phase, clock, waited=waited)
            if isinstance(lease, Lease):
                return lease
            refused = lease
        elif not waited:
            waited = True
            log.info(ev.LEASE_WAITING, holder=str(holder_of(head)), wait_s=options.wait_s)
        if refused is not None and clock.monotonic() - begun > min(options.wait_s, _REFUSED_S):
            raise refused
        if clock.monotonic() - begun > options.wait_s:
            holder = holder_of(await ledger.read_head()) or "several processes in turn"
            raise LeaseTimeoutError(
                f"Waited {options.wait_s:g} s for the lease, which is held by {holder}.",
                "Wait for that process to finish, increase the waiting time, or run "
                "`aiomigrate unlock` if it has crashed.",
            )
        await anyio.sleep(min(0.25, options.ttl_s / 10))
        head = await ledger.read_head()
        if waited and await is_done(head):
            return None


async def _ensure(ledger: Ledger, owner: str, first: FirstRows) -> Head:
    """Creates the ledger; on failure gives the lease back if its row was inserted as taken."""
    try:
        return await ledger.ensure(first)
    except BaseException:
        with anyio.CancelScope(shield=True), contextlib.suppress(StoreError, LedgerError):
            if (mine := _held_by(owner, await ledger.read_head())) is not None:
                await give_back(ledger, mine)
        raise


def _held_by(owner: str, head: Head, taken_at: float = 0.0) -> Lease | None:
    """Returns the run lease if `owner` holds it according to the head, else `None`."""
    row = head.leases.get(RUN_LEASE)
    if row is None or row.owner != owner:
        return None
    return Lease(
        key=RUN_LEASE, epoch=row.epoch or 0, owner=owner, taken_at=taken_at, waited=False, head=head
    )


async def take(
    ledger: Ledger,
    head: Head,
    key: str,
    owner: str,
    phase: str,
    clock: Clock,
    *,
    waited: bool = False,
) -> Lease | StoreError | None:
    """Tries once to take a lease, and fences its previous holder.

    Args:
        ledger: The ledger, whose tables exist.
        head: The head as just read. It contains the lease's row, which may be taken.
        key: The lease's key.
        owner: This holder's nonce.
        phase: Text of the lease row that describes this holder, see `phase_text`.
        clock: Clocks.
        waited: Whether this process waited for another holder.

    Returns:
        The lease; the store's error if the store refused the update and the row is unchanged;
        `None` if the row is no longer as in `head`.
    """
    row = head.leases[key]
    epoch = top_epoch(head) + 1
    taken_at = clock.monotonic()
    refused: StoreError | None = None
    try:
        won = await ledger.update_lease(
            {"epoch": epoch, "owner": owner, "beat": 0, "phase": phase}, _as_seen(row), key
        )
    except StoreError as exc:
        won, refused = None, exc  # the update may have been made: read the head
    if won == 0:
        return None
    if won and is_unfenced(head, key, epoch):
        # Before the head is read, so that the older holder can no longer change what is read.
        # `runs.session` repeats it if it fails here.
        with contextlib.suppress(StoreError):
            await ledger.take_rows(key, epoch, owner)
    taken = await ledger.read_head()
    now = taken.leases.get(key)
    if now is None or (now.epoch, now.owner) != (epoch, owner):
        unchanged = now is not None and (now.epoch, now.beat) == (row.epoch, row.beat)
        return refused if unchanged else None
    # A lease that was never held, or that `unlock` freed, has no beat.
    returned = row.epoch if not row.owner and row.beat else None
    return Lease(
        key=key, epoch=epoch, owner=owner, taken_at=taken_at, waited=waited, returned=returned,
        head=taken,
    )  # fmt: skip


def is_unfenced(head: Head, key: str, epoch: int) -> bool:
    """Returns whether a row of the lease has an older epoch, whose holder could still write it."""
    return any(row.lease == key and (row.epoch or 0) < epoch for row in head.rows)


def _as_seen(row: HeadRow) -> str:
    return (
        f"epoch = {row.epoch or 0} AND owner = {sql_literal(row.owner or '')} "
        f"AND beat = {row.beat or 0}"
    )


async def give_back(ledger: Ledger, lease: Lease) -> None:
    """Frees a lease under which nothing was written yet; has no effect if it was lost."""
    await ledger.update_lease(
        {"owner": "", "beat": 1, "phase": ""},
        f"epoch = {lease.epoch} AND owner = {sql_literal(lease.owner)}",
        lease.key,
    )


UNLOCKED = "unlocked"
"""Phase of a lease that `unlock` freed."""


async def unlock(
    ledger: Ledger, *, options: LeaseOptions, clock: Clock, key: str = RUN_LEASE
) -> Holder | None:
    """Frees a lease whose holder has crashed.

    First observes the lease row for the whole TTL: a holder that renews it is alive. Takes no
    lease itself. A cancellation or a crash leaves the lease either as it was or free.

    Args:
        ledger: The ledger.
        options: TTL.
        clock: Clocks.
        key: The lease's key.

    Returns:
        The removed holder, `None` if the lease was free or became free meanwhile.

    Raises:
        LeaseHeldError: The holder renewed the lease meanwhile, or another process took it.
        LedgerError: The head cannot be read.
        StoreError: The store refused to write the lease row.
    """
    head = await ledger.read_head()
    row = head.leases.get(key)
    holder = holder_of(head, key)
    if row is None or holder is None:
        return None
    ttl = Watch(options.ttl_s, clock).ttl_s(row)
    deadline = clock.monotonic() + ttl
    while clock.monotonic() < deadline:
        await anyio.sleep(min(0.25, ttl / 10))
        now = (await ledger.read_head()).leases.get(key)
        if now is None or not now.owner:
            return None
        if (now.epoch, now.owner, now.beat) != (row.epoch, row.owner, row.beat):
            raise LeaseHeldError(
                f"The lease is held by {holder}, which is alive.",
                "Wait for it, or stop that process first.",
            )
    freed = 0
    try:
        freed = await ledger.update_lease(
            {"epoch": (row.epoch or 0) + 1, "owner": "", "beat": 0, "phase": UNLOCKED},
            _as_seen(row),
            key,
        )
    finally:
        now = (await ledger.read_head()).leases.get(key)
        is_freed = now is not None and (now.epoch, now.owner) == ((row.epoch or 0) + 1, "")
    if freed or is_freed:
        return holder
    if now is None or not now.owner:
        return None
    raise LeaseHeldError(
        f"The lease is held by {holder_of(await ledger.read_head(), key)}, which is alive.",
        "Wait for it, or stop that process first.",
    )
