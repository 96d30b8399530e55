"""The ledger's writer: the lease is renewed in time, and never trusted close to its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from aiomigrate.errors import LeaseLostError, StoreError
from aiomigrate.ledger.lease import Lease, LeaseOptions
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.ledger.records import HeadRow, Kind, new_event
from aiomigrate.ledger.writer import Writer
from tests.ledger.test_lease import LOG, NOW, Hand, ledger_at, row_of, take

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


async def test_a_renewal_counts_from_before_the_update_that_made_it(tmp_path: Path) -> None:
    """Others may have seen the row from then on: a slow commit shortens what is left of the TTL."""
    hand = Hand()
    ledger, writer = await writer_at(tmp_path / "db", hand)

    def slow() -> str:
        hand.now += 30.0
        return "users 7"

    writer._phase = slow
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        try:
            await writer.sync()
            before = await row_of(ledger)
            hand.now += 9.0
            await writer.check()
            after = await row_of(ledger)
        finally:
            writer._phase = str
            writer.close(release=False)

    assert after.beat != before.beat


async def test_a_renewal_that_was_not_written_is_no_renewal(tmp_path: Path) -> None:
    """A refused update that left the lease row as it was is repeated, even if no line waits."""
    hand = Hand()
    ledger, writer = await writer_at(tmp_path / "db", hand)
    before = await row_of(ledger)
    write_rows, refused = ledger.write_rows, [True]

    async def refuse_once(rows: Sequence[HeadRow], epoch: int, owner: str) -> bool:
        if refused:
            refused.clear()
            raise StoreError("connection reset", "Try again.")
        return await write_rows(rows, epoch, owner)

    ledger.write_rows = refuse_once  # type: ignore[method-assign]
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        try:
            await writer.sync()
            after = await row_of(ledger)
        finally:
            writer.close(release=False)

    assert refused == []
    assert after.beat != before.beat


async def test_the_row_queued_last_is_the_one_that_is_written(tmp_path: Path) -> None:
    """A line's row that waits for its events does not overwrite one that was queued after it."""
    hand = Hand()
    ledger, writer = await writer_at(tmp_path / "db", hand)
    older, newer = (
        writer.lease.row("users", version, at=NOW, digest=f"{version}") for version in (2, 1)
    )
    await ledger.own_rows([older])
    writer.record_later(new_event(Kind.APPLIED, line="users", version=2), head_row=older)
    writer.write_row_later(newer)
    writer.close(release=True)
    await writer.run()

    assert writer.error is None
    assert [(r.name, r.version) for r in (await ledger.read_head()).rows] == [("users", 1)]
