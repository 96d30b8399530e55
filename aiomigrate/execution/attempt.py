"""What one migration has done so far, its journal events, and how a failure of it is described.

`Attempt` is the state, `Recorder` makes its events durable. Nothing here decides what to do next.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiomigrate.clock import Clock
from aiomigrate.commits.effects import Effect
from aiomigrate.commits.table_target import TableTarget
from aiomigrate.commits.tracked_table import Announce
from aiomigrate.concurrency import Slot
from aiomigrate.errors import (
    AiomigrateError,
    KeepsProgressError,
    OperationError,
    OverwriteLostError,
    UnresolvedError,
)
from aiomigrate.ledger.records import Event, Kind, new_event
from aiomigrate.ledger.writer import Writer
from aiomigrate.migration.model import Script
from aiomigrate.results import Outcome, StepReport
from aiomigrate.schema.state import encode
from aiomigrate.store.connection import Store
from aiomigrate.telemetry import LEDGER, Telemetry


@dataclass(eq=False)
class Attempt:
    """One attempt at one migration.

    Attributes:
        script: The migration.
        is_quick: Whether it neither rewrites rows nor runs code.
        slot: Its concurrency slot, if it releases it while it waits for the journal.
        tables: The tables it touches, opened, by name.
        done: Positions of the operations that are known to be complete.
        doing: The operation in hand, in words; empty before the first.
        resumed: Whether it goes on where a dead process was.
        acted: Whether code of it did what a crash must not make it do again, as far as we know.
        savepoints: table_version of each table when it was first begun, where it is resumed.
        branches: Savepoint branch by table, made or to be made.
        protected: The tables whose branch was made.
        held_back: Events to be written with the next commit's announcement, which needs them.
        abreast: How many of its operations are in hand.
        depended_s: Seconds spent waiting for what it depends on.
        waited_s: Seconds spent waiting for that and for its place.
        ledger_s: Seconds spent waiting for the journal, shared out among the operations in hand.
        size: Bytes of data that its tables hold afterwards, `None` where that is not measured.
        started_s: Monotonic time when it began.
    """

    script: Script
    is_quick: bool = False
    slot: Slot | None = None
    tables: dict[str, TableTarget] = field(default_factory=dict)
    done: frozenset[int] = frozenset()
    doing: str = ""
    resumed: bool = False
    acted: bool = False
    savepoints: Mapping[str, int] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    protected: frozenset[str] = frozenset()
    held_back: list[Event] = field(default_factory=list)
    active_operations: int = 0
    depended_s: float = 0.0
    waited_s: float = 0.0
    ledger_s: float = 0.0
    size: int | None = None
    started_s: float = 0.0

    @property
    def goes_on(self) -> bool:
        """Whether a failure leaves it where it is, for the next run to go on."""
        return self.resumed or any(t.keeps_progress for t in self.tables.values())

    @contextlib.contextmanager
    def operating(self) -> Iterator[None]:
        """Counts one more operation in hand, inside."""
        self.active_operations += 1
        try:
            yield
        finally:
            self.active_operations -= 1

    def made_branches(self) -> dict[str, str]:
        """Returns the savepoint branch by table, of those that were made."""
        return {table: b for table, b in self.branches.items() if table in self.protected}

    def versions(self) -> dict[str, tuple[int, int]]:
        """Returns each table's table_version before and after."""
        return {t.name: (t.before, t.version) for t in self.tables.values()}

    def facts(self) -> dict[str, dict[str, Any]]:
        """Returns what operations report of their work, by table."""
        return {t.name: t.facts for t in self.tables.values() if t.facts}

    def changes(self) -> dict[str, Any]:
        """Returns what an `applied` event records of the tables."""
        return {t.name: _change_of(t) for t in self.tables.values()}

    def report(self, outcome: Outcome, ran_s: float, **more: Any) -> StepReport:
        """Returns what came of the migration."""
        tables = self.tables.values()
        return StepReport(
            line=self.script.line,
            version=self.script.version,
            description=self.script.description,
            outcome=outcome,
            depended_s=self.depended_s,
            waited_s=self.waited_s,
            ran_s=ran_s,
            ledger_s=self.ledger_s,
            rows=sum(t.rows for t in tables),
            commits=sum(t.commits for t in tables),
            retries=sum(t.retries for t in tables),
            size=self.size,
            tables=self.versions(),
            told=self.facts(),
            resumed=self.resumed,
            **more,
        )


def _change_of(target: TableTarget) -> dict[str, Any]:
    change: dict[str, Any] = {
        "before": target.before,
        "after": target.version if target.state is not None else 0,
        "shape": target.shape,
    }
    if target.commits or target.before != target.version:
        change["was"] = encode(target.was)
    if target.foreign:
        change["foreign"] = [list(span) for span in target.foreign]
    return change


def event_of(script: Script, kind: Kind, **facts: Any) -> Event:
    """Returns an event of a migration; the writer fills in where, and when unless it is given."""
    return new_event(kind, line=script.line, version=script.version, **facts)


def announcement(
    script: Script,
    table: str,
    base: int,
    effect: Effect,
    foreign: Sequence[tuple[int, int]] = (),
    *,
    predicted: bool = False,
) -> Event:
    """Returns the announcement of a commit.

    Args:
        script: The migration that makes it.
        table: The table.
        base: The table_version it is computed from.
        effect: What it does, as `savepoint.matches_announcement` knows it again.
        foreign: table_versions that others are known to have committed before.
        predicted: Whether it follows the one announced before it, if all goes as foreseen.
    """
    detail = {"table": table, "base": base, "effect": dict(effect), "foreign": list(foreign)}
    if predicted:
        detail["foreseen"] = True
    return event_of(script, Kind.INTENDED, detail=detail)


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
                announcement(attempt.script, table, base + n, effect, foreign, predicted=n > 0)
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


def shorten(words: str) -> str:
    """Returns what an operation does, short enough to begin an error."""
    return words if len(words) <= _MAX_LENGTH else f"{words[:_MAX_LENGTH]}..."


_MAX_LENGTH = 80


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
