"""A long past for a database, written as the library's own runs would have left it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aiomigrate import Event, Scripts
from aiomigrate.clock import Clock
from aiomigrate.ledger.codec import Head
from aiomigrate.ledger.history import seen_epochs
from aiomigrate.ledger.lease import Lease, LeaseOptions, acquire
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.ledger.records import RUN_LEASE, HeadRow, Kind
from aiomigrate.migration.checksum import ALGORITHM
from aiomigrate.store.connection import Store


async def stamped_often(
    path: str,
    scripts: Scripts,
    *,
    ledger_name: str,
    events: int,
    log: Any,
) -> int:
    """Records the lines again where they are, run after run, until the journal has so many events.

    Each run is what `MigrationManager.stamp` commits: the lease taken, its head rows raised to the
    new epoch, `opened`, the `stamped` events, and the last head update that frees the lease. What
    it reads is left out, since a stamp reads the whole journal, and hundreds of them would be all
    that the benchmark spends its time on.

    Returns:
        How many runs it took.
    """
    clock = Clock()
    store = await Store.connect(path)
    ledger = Ledger(store, ledger_name, clock=clock, log=log)
    past = await ledger.read_journal()
    seen = seen_epochs(past, RUN_LEASE)
    count, runs = len(past), 0
    while count < events:
        head = await ledger.read_head()
        lease = await _acquired(ledger, clock, log)
        await ledger.take_rows(lease.key, lease.epoch, lease.owner)
        opened = _event(lease, 0, clock, Kind.OPENED, detail={"seen": _texts(seen)})
        await ledger.append([opened], lease.owner)
        stamps = _stamps(lease, clock, scripts)
        await ledger.append(stamps, lease.owner)
        await _release(ledger, lease, head, clock)
        seen = {lease.epoch: len(stamps)}
        count += 1 + len(stamps)
        runs += 1
    store.close()
    return runs


async def _acquired(ledger: Ledger, clock: Clock, log: Any) -> Lease:
    async def never(_: Head) -> bool:
        return False

    lease = await acquire(
        ledger,
        owner=secrets.token_hex(6),
        phase="{}",
        options=LeaseOptions(),
        clock=clock,
        log=log,
        is_done=never,
    )
    assert lease is not None
    return lease


def _event(lease: Lease, seq: int, clock: Clock, kind: Kind, **more: Any) -> Event:
    return Event(
        lease=lease.key, epoch=lease.epoch, seq=seq, at=clock.wall(), kind=kind,
        run_id=lease.owner, **more,
    )  # fmt: skip


def _stamps(lease: Lease, clock: Clock, scripts: Scripts) -> Sequence[Event]:
    result = []
    for seq, line in enumerate(scripts.line_names(), 1):
        checksums = {str(script.version): script.checksum for script in scripts.of(line)}
        event = _event(
            lease, seq, clock, Kind.STAMPED, line=line, version=scripts.latest(line),
            algorithm=ALGORITHM, detail={"checksums": checksums},
        )  # fmt: skip
        result.append(event)
    return result


async def _release(ledger: Ledger, lease: Lease, head: Head, clock: Clock) -> None:
    rows: list[HeadRow] = [
        replace(row, epoch=lease.epoch, owner=lease.owner, migrated_at=clock.wall())
        for row in head.rows
    ]
    freed = replace(head.leases[lease.key], epoch=lease.epoch, owner="", beat=1, phase="")
    assert await ledger.write_rows([freed, *rows], lease.epoch, lease.owner)


def _texts(seen: dict[int, int]) -> dict[str, int]:
    return {str(epoch): seq for epoch, seq in seen.items()}
