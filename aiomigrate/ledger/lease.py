"""The lease: the right to run migrations, with a fencing epoch.

Taken by one compare-and-set on the lease's row (lancedb `update … WHERE`, judged by
`rows_updated`: facts, single-winner primitives), stolen only after this process has itself seen
the row unchanged for the whole TTL on its own monotonic clock. Renewal is for `writer`, which owns
every write of a holder.

There are two: the run lease, and the background lease, which is only ever taken by who holds the
run lease. So whoever holds that knows that nobody begins to work in the background, and epochs,
each above all others in the head, order what the two leases write of one line.
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
        ttl_s: Seconds after which a silent holder may be succeeded.
        beat_s: Seconds between renewals.
        wait_s: Seconds to wait for another holder.
    """

    ttl_s: float = 30.0
    beat_s: float = 5.0
    wait_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A lease that was taken.

    Attributes:
        key: Its key.
        epoch: Grows with every change of holder.
        owner: This holder's nonce.
        taken_at: Monotonic time before the update that took it: its TTL counts from here.
        waited: Whether another process held it first.
        returned: Epoch of the last holder if it gave it back, so that it writes nothing any more.
        head: The head as read right after it was taken.
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


_TOLD = 32
"""Of how many migrations a holder tells how far they are."""


def phase_text(
    run_id: str, since: str, ttl_s: float, phase: str, going: Iterable[StepProgress] = ()
) -> str:
    """Returns what a holder says of itself in the lease row."""
    said: dict[str, Any] = {"host": HOST, "pid": os.getpid(), "run": run_id, "since": since,
                            "ttl": ttl_s, "phase": phase}  # fmt: skip
    if told := [dataclasses.asdict(one) for one in itertools.islice(going, _TOLD)]:
        said["going"] = told
    return json.dumps(said, ensure_ascii=False)


def holder_of(head: Head, key: str = RUN_LEASE) -> Holder | None:
    """Returns who holds a lease according to the head, `None` if it is free."""
    row = head.leases.get(key)
    if row is None or not row.owner:
        return None
    said = _said(row)
    return Holder(
        host=str(said.get("host", "?")),
        pid=_number(said.get("pid"), int, 0),
        run_id=str(said.get("run", row.owner)),
        phase=str(said.get("phase", "")),
        since=str(said.get("since", "")),
        epoch=row.epoch or 0,
        going=tuple(_going(one) for one in said.get("going") or () if isinstance(one, dict)),
    )


def _going(said: Mapping[str, Any]) -> StepProgress:
    return StepProgress(
        line=str(said.get("line", "")),
        version=_number(said.get("version"), int, 0),
        doing=str(said.get("doing", "")),
        done=_number(said.get("done"), int, 0),
        total=_number(said.get("total"), int, None),
    )


def top_epoch(head: Head) -> int:
    """Returns the highest epoch in the head: that of a new holder of any lease is above it."""
    rows = (*head.rows, *head.leases.values())
    return max((row.epoch or 0 for row in rows), default=0)


class Watch:
    """What this process has itself seen of a lease row, on its own monotonic clock."""

    def __init__(self, ttl_s: float, clock: Clock) -> None:
        """Has seen nothing yet."""
        self._ttl_s = ttl_s
        self._clock = clock
        self._seen: tuple[int | None, str | None, int | None] | None = None
        self._since = 0.0

    def ttl_s(self, row: HeadRow) -> float:
        """Returns the seconds for which a holder may be silent: its own word, or ours if more."""
        return float(max(self._ttl_s, _number(_said(row).get("ttl"), float, 0.0)))

    def may_take(self, row: HeadRow) -> bool:
        """Takes one look; returns whether the lease is free, or its holder was silent too long."""
        state = (row.epoch, row.owner, row.beat)
        if state != self._seen:
            self._seen, self._since = state, self._clock.monotonic()
        return not row.owner or self._clock.monotonic() - self._since >= self.ttl_s(row)


def _said(row: HeadRow) -> dict[str, Any]:
    try:
        said = json.loads(row.phase or "{}")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _number(value: object, kind: type[Any], default: Any) -> Any:
    return kind(value) if isinstance(value, (int, float)) else default


_REFUSED_S = 5.0
"""How long a store that refuses to write is asked again."""


async def acquire(
    ledger: Ledger,
    *,
    owner: str,
    phase: str,
    options: LeaseOptions,
    clock: Clock,
    log: Any,
    is_done: Callable[[Head], Awaitable[bool]],
    enrol: Callable[[Lease], Iterable[HeadRow]] = lambda _: (),
) -> Lease | None:
    """Makes the ledger if need be, and takes the run lease, waiting for another holder.

    Args:
        ledger: The ledger.
        owner: This holder's nonce.
        phase: What to write about ourselves.
        options: TTL and patience.
        clock: Clocks.
        log: Bound logger.
        is_done: Asked whenever the row changed while waiting: whether another process has done
            the work, so that there is nothing left to take the lease for.
        enrol: Returns the lines' rows to make together with the lease's, where that is made here.

    Returns:
        The lease, or `None` if another process did the work meanwhile.

    Raises:
        LeaseTimeoutError: Another holder kept it all the time.
        LedgerError: The ledger cannot be read or made.
    """
    begun = clock.monotonic()

    def first(epoch: int) -> list[HeadRow]:
        lease = Lease(key=RUN_LEASE, epoch=epoch, owner=owner, taken_at=begun, waited=False)
        mine = lease_row(RUN_LEASE, at=clock.wall(), epoch=epoch, owner=owner, phase=phase)
        return [mine, *enrol(lease)]

    head = await _founded(ledger, owner, first)
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
                told = str(holder_of(head))
                log.warning(ev.LEASE_STOLEN, holder=told, silent_s=watch.ttl_s(row))
            # Shielded whole: a lease taken under cancellation must come into hands that
            # give it back.
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
            holder = holder_of(await ledger.read_head()) or "others, one after another"
            raise LeaseTimeoutError(
                f"Waited {options.wait_s:g} s for the lease, which is held by {holder}.",
                "Wait for it to finish, raise the wait, or if that process is dead run "
                "`aiomigrate unlock`.",
            )
        await anyio.sleep(min(0.25, options.ttl_s / 10))
        head = await ledger.read_head()
        if waited and await is_done(head):
            return None


async def _founded(ledger: Ledger, owner: str, first: FirstRows) -> Head:
    """Returns the head, with the lease taken if its row is made here; not so on failure."""
    try:
        return await ledger.ensure(first)
    except BaseException:
        with anyio.CancelScope(shield=True), contextlib.suppress(StoreError, LedgerError):
            if (mine := _held_by(owner, await ledger.read_head())) is not None:
                await give_back(ledger, mine)
        raise


def _held_by(owner: str, head: Head, taken_at: float = 0.0) -> Lease | None:
    """Returns the run lease if the head says that this one has it."""
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
    """Tries once to take a lease that is as the head says, and fences who held it before.

    Args:
        ledger: Its tables exist.
        head: As just read; the lease's row is there, and may be taken.
        key: Which lease.
        owner: This holder's nonce.
        phase: What to write about ourselves.
        clock: Clocks.
        waited: Whether another process held it first.

    Returns:
        The lease; else why the store refused it while nobody else has it, or `None`.
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
        won, refused = None, exc  # unknown: look
    if won == 0:
        return None
    if won and is_unfenced(head, key, epoch):
        # Before it is read, so that what is read is final. What fails here, `runner` does again.
        with contextlib.suppress(StoreError):
            await ledger.take_rows(key, epoch, owner)
    taken = await ledger.read_head()
    now = taken.leases.get(key)
    if now is None or (now.epoch, now.owner) != (epoch, owner):
        unchanged = now is not None and (now.epoch, now.beat) == (row.epoch, row.beat)
        return refused if unchanged else None
    # One that was never held, or that `unlock` took from its holder, has no beat.
    returned = row.epoch if not row.owner and row.beat else None
    return Lease(
        key=key, epoch=epoch, owner=owner, taken_at=taken_at, waited=waited, returned=returned,
        head=taken,
    )  # fmt: skip


def is_unfenced(head: Head, key: str, epoch: int) -> bool:
    """Returns whether a row of a lease still has an older epoch, whose holder could write it."""
    return any(row.lease == key and (row.epoch or 0) < epoch for row in head.rows)


def _as_seen(row: HeadRow) -> str:
    return (
        f"epoch = {row.epoch or 0} AND owner = {sql_literal(row.owner or '')} "
        f"AND beat = {row.beat or 0}"
    )


async def give_back(ledger: Ledger, lease: Lease) -> None:
    """Frees a lease under which nothing was done yet; harmless when it was lost."""
    await ledger.update_lease(
        {"owner": "", "beat": 1, "phase": ""},
        f"epoch = {lease.epoch} AND owner = {sql_literal(lease.owner)}",
        lease.key,
    )


UNLOCKED = "unlocked"
"""Phase of a lease that was taken from its holder rather than given back."""


async def unlock(
    ledger: Ledger, *, options: LeaseOptions, clock: Clock, key: str = RUN_LEASE
) -> Holder | None:
    """Frees a lease whose holder is dead.

    Watches the lease row for its TTL first: a holder that renews is alive.

    Args:
        ledger: Its tables exist, or nothing holds a lease.
        options: TTL.
        clock: Clocks.
        key: Which lease.

    Returns:
        The holder that was removed, `None` if the lease was free.

    Raises:
        LeaseHeldError: The holder renewed the lease while being watched.
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
