"""Records what a migration does: its events made durable, its failure described without secrets."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Sequence

from aiomigrate.clock import Clock
from aiomigrate.commits.effects import Effect
from aiomigrate.commits.tracked_table import Announce
from aiomigrate.errors import (
    AiomigrateError,
    KeepsProgressError,
    OperationError,
    OverwriteLostError,
    UnresolvedError,
)
from aiomigrate.execution.attempt import Attempt, intended
from aiomigrate.ledger.records import Event
from aiomigrate.ledger.writer import Writer
from aiomigrate.store.connection import Store
from aiomigrate.telemetry import LEDGER, Telemetry


class Recorder:
    """Writes the journal events of migrations under one lease."""

    def __init__(self, writer: Writer, *, clock: Clock, telemetry: Telemetry) -> None:
        """Binds to the writer of the lease's holder.

        Args:
            writer: Makes events durable.
            clock: Clocks.
            telemetry: Measures everything that takes time.
        """
        self._writer = writer
        self._clock = clock
        self._telemetry = telemetry

    async def record(self, attempt: Attempt, *events: Event) -> None:
        """Makes events durable, and counts the time that takes.

        Raises:
            LeaseLostError: Another process has taken over.
            LedgerError: The journal cannot be written.
        """
        released = attempt.slot.released() if attempt.slot else contextlib.nullcontext()
        with self._telemetry.span(LEDGER, {"aiomigrate.events": len(events)}):
            async with released:
                begun = self._clock.monotonic()
                await self._writer.record(*events)
                waited_s = self._clock.monotonic() - begun
                attempt.ledger_s += waited_s / max(1, attempt.active_operations)

    def announcer(self, attempt: Attempt) -> Announce:
        """Returns what makes the commits of a migration durable before they are made."""

        async def announce(
            table: str, base: int, effects: Sequence[Effect], foreign: Sequence[tuple[int, int]]
        ) -> None:
            held_back, attempt.held_back = attempt.held_back, []
            events = [
                intended(attempt.script, table, base + n, effect, foreign, foreseen=n > 0)
                for n, effect in enumerate(effects)
            ]
            await self.record(attempt, *held_back, *events)

        return announce


def remedy_of(attempt: Attempt, exc: Exception | None, error: AiomigrateError | None) -> str:
    """Returns what to do after a failure."""
    if isinstance(exc, OverwriteLostError):
        return exc.remedy  # unchanged, it goes on where it was
    remedy = error.remedy if error else "Correct the migration and run again."
    if attempt.goes_on and not isinstance(error, (UnresolvedError, KeepsProgressError)):
        remedy = f"{remedy} What it has done is kept: the next run goes on from there."
    return remedy


def in_hand(words: str) -> str:
    """Returns what an operation does, short enough to begin an error."""
    return words if len(words) <= _WORDS else f"{words[:_WORDS]}..."


_WORDS = 80


def failure_text(exc: BaseException, store: Store, doing: str = "") -> str:
    """Returns a failure in one sentence, without secrets.

    Args:
        exc: What was raised.
        store: Knows the secrets.
        doing: The operation in hand, in words.
    """
    leaf = exc
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    told = exc.what if isinstance(exc, AiomigrateError) else f"{type(leaf).__name__}: {leaf}"
    is_told = not doing or doing.removesuffix("...") in told
    return store.scrub(told if is_told else f"{doing!r}: {told}")


def failure_trace(exc: BaseException, store: Store) -> str:
    """Returns a failure as the journal keeps it, without secrets."""
    if isinstance(exc, (OperationError, KeepsProgressError)):
        return store.scrub(str(exc))
    return store.scrub("".join(traceback.format_exception(exc)))
