"""The state of one attempt of a migration, its journal events and its error texts.

`Attempt` holds the state and `Recorder` writes events durably. Deciding what to do next is not done
here (`execution.executor`, `execution.recovery`, `execution.reverser`).
"""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from aiomigrate.ledger.history import Unfinished
from aiomigrate.ledger.records import Event, Kind, new_event
from aiomigrate.ledger.writer import Writer
from aiomigrate.migration.checksum import ALGORITHM
from aiomigrate.migration.model import Script
from aiomigrate.results import Outcome, StepReport
from aiomigrate.schema.state import encode
from aiomigrate.store.connection import Store
from aiomigrate.telemetry import LEDGER, Telemetry


@dataclass(eq=False)
class Attempt:
    """One attempt of a migration. Only its own methods and the `Recorder` change it.

    Attributes:
        script: The migration.
        is_quick: Whether the migration neither rewrites rows nor runs code.
        slot: The concurrency slot, if it is released while waiting for the journal.
        tables: The open tables that the migration touches, by name.
        done: Positions of the operations that are known to be complete.
        doing: The description of the current operation, empty before the first.
        resumed: Whether it continues an attempt whose process crashed.
        is_recovering: Whether the recovery of a crashed process's attempt has not succeeded yet.
        acted: Whether its function committed or took the connection, so that it must not run again.
        savepoints: table_version of each table when the first attempt began, if it is resumed.
        branches: Savepoint branch by table, created or still to be created.
        protected: The tables whose savepoint branch was created.
        held_back: Events that must be durable before the next commit; written together with its
            announcement.
        active_operations: Number of operations that are running.
        depended_s: Seconds spent waiting for dependencies.
        waited_s: Seconds spent waiting for dependencies and for the concurrency slot.
        ledger_s: Seconds spent waiting for the journal, divided by the running operations.
        size: Bytes of data in its tables afterwards, `None` if not measured.
        started_s: Monotonic time when it began.
    """

    script: Script
    is_quick: bool = False
    slot: Slot | None = None
    tables: dict[str, TableTarget] = field(default_factory=dict)
    done: frozenset[int] = frozenset()
    doing: str = ""
    resumed: bool = False
    is_recovering: bool = False
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

    def begin(self, now_s: float, ready_at: float) -> None:
        """Starts counting the time that the migration runs.

        Args:
            now_s: Monotonic time.
            ready_at: Monotonic time from which waiting is counted.
        """
        self.started_s = now_s
        self.waited_s = now_s - ready_at

    def add_wait(self, waited_s: float) -> None:
        """Counts seconds that it waited for its slot since it began as time that it waited."""
        self.waited_s += waited_s
        self.started_s += waited_s

    def begin_recovery(self) -> None:
        """Notes that an earlier attempt must be recovered before anything else is done."""
        self.is_recovering = True

    def end_recovery(self) -> None:
        """Notes that the earlier attempt is recovered."""
        self.is_recovering = False

    def resume(self, unfinished: Unfinished, done: frozenset[int]) -> None:
        """Continues an attempt that did not end.

        Args:
            unfinished: The earlier attempt.
            done: Positions of the operations that it completed.
        """
        self.resumed = True
        self.done = done
        self.savepoints = unfinished.savepoints
        self.branches = dict(unfinished.started.detail.get("branches", {}))

    def open(self, tables: Mapping[str, TableTarget]) -> None:
        """Adds open tables."""
        self.tables |= tables

    def end(self) -> None:
        """Ends the use of its tables: they refuse every later commit."""
        for target in self.tables.values():
            target.end()

    def plan_branches(self, branches: Mapping[str, str]) -> None:
        """Sets the savepoint branch of each table, before they are created."""
        self.branches = dict(branches)

    def protect(self, table: str, branch: str) -> None:
        """Notes that the savepoint branch of a table exists, or may exist."""
        self.branches[table] = branch
        self.protected |= {table}

    def unprotect(self, table: str) -> None:
        """Notes that a table has no savepoint branch, since its table_version was cleaned up."""
        self.protected -= {table}

    def begin_operation(self, text: str) -> None:
        """Notes the description of the operation that runs now, for the text of a failure."""
        self.doing = shorten(text)

    def complete(self, position: int, count: int) -> None:
        """Notes a completed operation; its event is written before the next commit of a table.

        Args:
            position: Its position.
            count: The number of operations.
        """
        self.done |= {position}
        self.held_back = [e for e in self.held_back if e.kind != Kind.ADVANCED]
        if len(self.done) < count:
            self.hold_back(event_of(self.script, Kind.ADVANCED, detail=advance_detail(self.done)))

    def hold_back(self, event: Event) -> None:
        """Keeps an event until the next announcement of a commit, and writes it with that."""
        self.held_back.append(event)

    def take_held_back(self) -> list[Event]:
        """Returns the events to be written before the next commit, and forgets them."""
        taken, self.held_back = self.held_back, []
        return taken

    def end_function(self, *, took_connection: bool) -> None:
        """Notes that the function returned; it must not run again if it may have committed."""
        self.acted = took_connection or any(t.commits for t in self.tables.values())

    def measure(self, size: int) -> None:
        """Sets the bytes of data in its tables."""
        self.size = size

    @property
    def keeps_work(self) -> bool:
        """Whether a failure leaves everything as it is, for the next run to continue.

        Also while an earlier attempt is recovered: its tables are not open yet, so that nothing
        here could undo it, and nothing may be recorded as restored before it is.
        """
        return (
            self.is_recovering
            or self.resumed
            or any(t.keeps_progress for t in self.tables.values())
        )

    @contextlib.contextmanager
    def operating(self) -> Iterator[None]:
        """Counts one more running operation within the context."""
        self.active_operations += 1
        try:
            yield
        finally:
            self.active_operations -= 1

    def made_branches(self) -> dict[str, str]:
        """Returns the savepoint branch by table, for branches that were created."""
        return {table: b for table, b in self.branches.items() if table in self.protected}

    def begun(self) -> dict[str, Any]:
        """Returns what a `started` or `rolling_back` event records about the tables, by table."""
        return {
            t.name: {"before": t.before, "committed": t.committed} for t in self.tables.values()
        }

    def left(self) -> dict[str, Any]:
        """Returns what a `failed` event records about the tables, by table."""
        return {
            t.name: {"before": t.before, "after": t.version, "committed": t.committed}
            for t in self.tables.values()
        }

    def versions(self) -> dict[str, tuple[int, int]]:
        """Returns the table_version before and after the attempt, by table."""
        return {t.name: (t.before, t.version) for t in self.tables.values()}

    def facts(self) -> dict[str, dict[str, Any]]:
        """Returns what operations reported about their work, by table."""
        return {t.name: t.facts for t in self.tables.values() if t.facts}

    def changes(self) -> dict[str, Any]:
        """Returns what an `applied` event records about the tables, by table."""
        return {t.name: _change_of(t) for t in self.tables.values()}

    def event(self, kind: Kind, **facts: Any) -> Event:
        """Returns an event with what identifies the script: description, checksum and source."""
        script = self.script
        return event_of(
            script,
            kind,
            description=script.description,
            checksum=script.checksum,
            algorithm=ALGORITHM,
            source=script.source,
            **facts,
        )

    def report(self, outcome: Outcome, ran_s: float, **more: Any) -> StepReport:
        """Returns the result of the attempt.

        Args:
            outcome: The outcome.
            ran_s: Seconds that the migration ran.
            more: Further attributes of `StepReport`.
        """
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
        "committed": target.committed,
    }
    if target.commits or target.before != target.version:
        change["was"] = encode(target.was)
    if target.foreign:
        change["foreign"] = [list(span) for span in target.foreign]
    return change


def advance_detail(done: Collection[int]) -> dict[str, Any]:
    """Returns which operations are complete, as an `advanced` event records it."""
    count = next(number for number in itertools.count() if number not in done)
    also = sorted(position for position in done if position > count)
    return {"operations": count, **({"also": also} if also else {})}


def event_of(script: Script, kind: Kind, **facts: Any) -> Event:
    """Returns an event of a migration; the writer adds host and process, and the time."""
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
        effect: What it does (`commits.effects`); checked by
            `commits.commit_identity.matches_announcement` after a crash.
        foreign: Ranges of foreign table_versions that are known to precede it.
        predicted: Whether it was predicted to follow the commit announced before it.
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
            writer: Writes events durably.
            clock: Clocks.
            telemetry: Creates spans for everything that takes time.
        """
        self._writer = writer
        self._clock = clock
        self._telemetry = telemetry

    async def record(self, attempt: Attempt, *events: Event) -> None:
        """Writes events durably and adds the time that this takes to `Attempt.ledger_s`.

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
        """Returns the function that announces the commits of an attempt in the journal."""

        async def announce(
            table: str, base: int, effects: Sequence[Effect], foreign: Sequence[tuple[int, int]]
        ) -> None:
            held_back = attempt.take_held_back()
            events = [
                announcement(attempt.script, table, base + n, effect, foreign, predicted=n > 0)
                for n, effect in enumerate(effects)
            ]
            await self.record(attempt, *held_back, *events)

        return announce


def remedy_of(attempt: Attempt, exc: Exception | None, error: AiomigrateError | None) -> str:
    """Returns what to do after a failure.

    Args:
        attempt: The attempt that failed.
        exc: What was raised, `None` for a cancellation.
        error: The error to report, if it is one of aiomigrate.
    """
    if isinstance(exc, OverwriteLostError):
        return exc.remedy  # an unchanged migration continues
    remedy = error.remedy if error else "Correct the migration and run again."
    if attempt.keeps_work and not isinstance(error, (UnresolvedError, KeepsProgressError)):
        kept = (
            "the next run recovers it"
            if attempt.is_recovering
            else "the next run continues from there"
        )
        remedy = f"{remedy} Completed work is kept: {kept}."
    return remedy


def shorten(text: str) -> str:
    """Returns the description of an operation, shortened for the start of an error."""
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


_MAX_LENGTH = 80


def failure_text(exc: BaseException, store: Store, doing: str = "") -> str:
    """Returns a failure in one sentence, without secrets.

    Args:
        exc: What was raised; of a group, its first exception.
        store: Removes the secrets.
        doing: The description of the current operation, put first unless the text contains it.
    """
    leaf = exc
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    text = exc.what if isinstance(exc, AiomigrateError) else f"{type(leaf).__name__}: {leaf}"
    is_named = not doing or doing.removesuffix("...") in text
    return store.scrub(text if is_named else f"{doing!r}: {text}")


def failure_trace(exc: BaseException, store: Store) -> str:
    """Returns a failure as stored in the journal, without secrets.

    Expected errors are stored as text, all others with their traceback.
    """
    if isinstance(exc, (OperationError, KeepsProgressError)):
        return store.scrub(str(exc))
    return store.scrub("".join(traceback.format_exception(exc)))
