"""The ledger's writer: the lease is renewed in time, and never trusted close to its end."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from aiomigrate.errors import LeaseLostError
from aiomigrate.ledger.lease import Lease, LeaseOptions
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.ledger.writer import Writer
from tests.ledger.test_lease import LOG, Hand, ledger_at, row_of, take

LONG_TTL_S = 40.0
OPTIONS = LeaseOptions(ttl_s=LONG_TTL_S, beat_s=1e6)


async def writer_at(path: Path, hand: Hand) -> tuple[Ledger, Writer]:
    """Takes the lease as "me", and returns the ledger with the holder's writer."""
    _, ledger = await ledger_at(path)
    lease = await take(ledger, "me", clock=hand.clock, ttl_s=LONG_TTL_S)
    assert isinstance(lease, Lease)
    writer = Writer(
        ledger, lease, OPTIONS, clock=hand.clock, log=LOG, stamp={}, phase=lambda: "users 7"
    )
    return ledger, writer


@pytest.mark.parametrize(
    ("left_s", "renewed"), [(LONG_TTL_S, False), (2.1, False), (1.9, True), (0.1, True)]
)
async def test_the_lease_is_renewed_before_a_mutation_that_its_end_could_overtake(
    tmp_path: Path, left_s: float, renewed: bool
) -> None:
    """Within two seconds of its end no mutation begins under a lease before it is renewed."""
    hand = Hand()
    ledger, writer = await writer_at(tmp_path / "db", hand)
    before = await row_of(ledger)
    hand.now += LONG_TTL_S - left_s
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        try:
            await writer.check()
            after = await row_of(ledger)
        finally:
            writer.close(release=False)

    assert (after.beat != before.beat) is renewed


async def test_no_mutation_begins_under_a_lease_that_ended_and_was_taken(tmp_path: Path) -> None:
    """A holder whose lease ended while it was paused finds its successor before it writes."""
    hand = Hand()
    ledger, writer = await writer_at(tmp_path / "db", hand)
    stolen = {"owner": "another", "epoch": writer.lease.epoch + 1}
    assert await ledger.update_lease(stolen, "TRUE", writer.lease.key) == 1
    hand.now += LONG_TTL_S + 1.0
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        try:
            with pytest.raises(LeaseLostError, match="another"):
                await writer.check()
        finally:
            writer.close(release=False)
