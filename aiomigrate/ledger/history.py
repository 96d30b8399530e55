"""Computes the state of each line from the events of the journal. Pure.

The journal is append-only, and several processes may have written to it, some of them after they
were fenced. `fold` decides which events are valid and applies them in order. Comparing the result
with the head and the scripts is for `planning.reconcile`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiomigrate.ledger.records import Event, Kind

COMMITTING_KINDS = (Kind.APPLIED, Kind.CLEANED, Kind.FAILED, Kind.ROLLED_BACK)
"""Kinds of events that record commits to tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """An applied version of a line, with the checksum recorded when it was applied or adopted."""

    version: int
    checksum: str | None
    algorithm: str | None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A migration that was started and neither applied nor undone.

    Attributes:
        started: Its `started` event, which has the savepoints.
        advanced: Number of leading operations known to be complete.
        also: Positions of further operations known to be complete.
        intents: Its `intended` events in order: commits announced before they were made.
        failed: Its `failed` event, if it failed without being undone.
    """

    started: Event
    advanced: int = 0
    also: frozenset[int] = frozenset()
    intents: tuple[Event, ...] = ()
    failed: Event | None = None

    def done_of(self, count: int) -> frozenset[int]:
        """Returns the positions below `count` of the operations known to be complete."""
        return frozenset(p for p in range(count) if p < self.advanced or p in self.also)

    @property
    def savepoints(self) -> Mapping[str, int]:
        """The table_version of each touched table before the migration; 0 if it did not exist."""
        return {t: int(facts["before"]) for t, facts in self.started.tables.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LineHistory:
    """The state of one line according to the journal.

    Attributes:
        current: The current version, 0 for none.
        applied: All applied, adopted and stamped versions, by version.
        unfinished: The migration that a crash or an unresolved failure left unfinished.
        last: The last event that set `current`.
        failed: The last failure, unless its version or a later one was reached since.
    """

    current: int = 0
    applied: Mapping[int, Applied] = field(default_factory=dict)
    unfinished: Unfinished | None = None
    last: Event | None = None
    failed: Event | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """The state of all lines according to the journal.

    Attributes:
        lines: The state of each line.
        shapes: The shape of each table after the last migration that touched it, `None` if the
            table did not exist then.
        top_epoch: The highest epoch of all events, valid or not.
        events: The valid events in order.
    """

    lines: Mapping[str, LineHistory] = field(default_factory=dict)
    shapes: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    top_epoch: int = 0
    events: tuple[Event, ...] = ()

    def of(self, line: str) -> LineHistory:
        """Returns a line's history, an empty one for an unknown line."""
        return self.lines.get(line, LineHistory())


def valid_events(events: Iterable[Event]) -> list[Event]:
    """Returns the valid events, ordered by epoch and sequence number.

    A process that takes a lease first appends `opened` with the last sequence number it read of
    every older epoch (`detail.seen`); events that an older holder appends after that are void. An
    `opened` event may itself be void, so epochs are processed from the newest to the oldest.
    """
    result: list[Event] = []
    leases: dict[str, dict[int, list[Event]]] = {}
    for event in events:
        leases.setdefault(event.lease, {}).setdefault(event.epoch, []).append(event)
    for epochs in leases.values():
        limits: Mapping[str, int] | None = None  # of the next newer epoch with a valid `opened`
        for epoch in sorted(epochs, reverse=True):
            limit = None if limits is None else limits.get(str(epoch), -1)
            written = sorted(epochs[epoch], key=lambda e: e.seq)
            kept = [e for e in written if limit is None or e.seq <= limit]
            result.extend(kept)
            opened = next((e for e in kept if e.kind == Kind.OPENED), None)
            if opened is not None:
                limits = opened.detail.get("seen", {})
    return sorted(result, key=lambda e: (e.epoch, e.seq, e.lease))


def seen_epochs(events: Sequence[Event], lease: str) -> dict[int, int]:
    """Returns the last valid sequence number by epoch, since the last valid `opened` of a lease.

    This is what the next `opened` event of the lease records as `seen`.
    """
    seen: dict[int, int] = {}
    for event in valid_events(events):
        if event.lease != lease:
            continue
        if event.kind == Kind.OPENED:
            seen = {}
        seen[event.epoch] = max(seen.get(event.epoch, -1), event.seq)
    return seen


def fold(events: Iterable[Event]) -> Journal:
    """Returns the state of all lines after all events. Events of unknown kinds change nothing."""
    given = list(events)
    valid = valid_events(given)
    lines: dict[str, _Line] = {}
    shapes: dict[str, Mapping[str, Any] | None] = {}
    for event in valid:
        if event.line is not None:
            lines.setdefault(event.line, _Line()).take(event)
        if event.kind in (Kind.APPLIED, Kind.ADOPTED, Kind.STAMPED, Kind.ROLLED_BACK):
            for table, facts in event.tables.items():
                if "shape" in facts:
                    shapes[table] = facts["shape"]
    return Journal(
        lines={name: line.freeze() for name, line in lines.items()},
        shapes=shapes,
        top_epoch=max((event.epoch for event in given), default=0),
        events=tuple(valid),
    )


class _Line:
    """Accumulates one line's events."""

    def __init__(self) -> None:
        self.current = 0
        self.applied: dict[int, Applied] = {}
        self.last: Event | None = None
        self.failed: Event | None = None
        self.started: Event | None = None
        self.advanced = 0
        self.also: frozenset[int] = frozenset()
        self.intents: list[Event] = []
        self.unresolved: Event | None = None
        self.undone: Applied | None = None

    def take(self, event: Event) -> None:  # noqa: C901 - a closed case list
        match event.kind:
            case Kind.STARTED:
                self._end()
                self.started = event
            case Kind.ADVANCED if self._is_of_started(event):
                self.advanced = int(event.detail.get("operations", 0))
                self.also = frozenset(event.detail.get("also", ()))
            case Kind.INTENDED if self._is_of_started(event):
                self.intents.append(event)
            case Kind.RESTORED:
                self._end()
            case Kind.ROLLING_BACK:
                self._end()
                self.started = event
                self.undone = self.applied.pop(event.version or 0, None)
                self.current = int(event.detail.get("to", 0))
                self.last = event
            case Kind.ROLLED_BACK:
                self._end()
                self.last = event
            case Kind.KEPT if self._is_of_started(event):
                # The rollback failed and was itself undone: the migration is applied again.
                if self.undone is not None:
                    self.applied[self.undone.version] = self.undone
                    self.current = self.undone.version
                self._end()
                self.last = event
            case Kind.FAILED:
                self.failed = event
                if self.started is not None:
                    self.unresolved = event
            case Kind.APPLIED:
                self._end()
                self._reach(event, {event.version or 0: event.checksum})
            case Kind.ADOPTED | Kind.STAMPED:
                self._end()
                self.applied = {}
                known = event.detail.get("checksums", {})
                self._reach(event, {int(v): c for v, c in known.items()})
            case _:
                pass

    def _is_of_started(self, event: Event) -> bool:
        return self.started is not None and self.started.version == event.version

    def _reach(self, event: Event, checksums: Mapping[int, str | None]) -> None:
        self.current = event.version or 0
        self.last = event
        for version, digest in checksums.items():
            self.applied[version] = Applied(
                version=version, checksum=digest, algorithm=event.algorithm, source=event.source
            )
        if self.failed is not None and (self.failed.version or 0) <= self.current:
            self.failed = None

    def _end(self) -> None:
        self.started = None
        self.advanced = 0
        self.also = frozenset()
        self.intents = []
        self.unresolved = None

    def freeze(self) -> LineHistory:
        unfinished = None
        if self.started is not None:
            unfinished = Unfinished(
                started=self.started,
                advanced=self.advanced,
                also=self.also,
                intents=tuple(self.intents),
                failed=self.unresolved,
            )
        return LineHistory(
            current=self.current,
            applied=self.applied,
            unfinished=unfinished,
            last=self.last,
            failed=self.failed,
        )


def classify_intents(intents: Iterable[Event]) -> tuple[list[Event], list[Event]]:
    """Returns the announced commits to a table that were made, and those that may have been made.

    Some commits are announced immediately before they are made, others are predicted ahead of
    time (`detail.foreseen`). An immediate announcement was written after all commits before its
    `base` had been observed, so commits predicted for that table_version or a later one were not
    made. Of the last immediate announcement and the predictions that follow it, any leading part
    may have been made.

    Args:
        intents: The `intended` events of one table in one unfinished migration, in order.
    """
    made: list[Event] = []
    last: list[Event] = []
    for intent in intents:
        if not intent.detail.get("foreseen"):
            base = int(intent.detail["base"])
            seen = [e for e in last[1:] if int(e.detail["base"]) < base]
            made, last = [*made, *last[:1], *seen], []
        last.append(intent)
    return made, last


def pending_cleanup(history: LineHistory, journal: Journal) -> Event | None:
    """Returns the last event of a line if the cleanup it calls for is not recorded as done.

    Such an event is an `applied` or a `rolled_back` whose process may have crashed before or while
    it removed temporary columns and branches, or before it recorded that. Returns `None` if there
    is nothing to clean up.
    """
    last = history.last
    if last is None or not (last.detail.get("cleanup") or last.detail.get("branches")):
        return None
    later = [e for e in journal.events if e.line == last.line and e.version == last.version]
    after = later[later.index(last) + 1 :] if last in later else []
    return None if any(e.kind == Kind.CLEANED for e in after) else last
