"""From the journal's events to what is true of each line. Pure.

The journal is append-only and several processes may have written to it, one of them after it was
fenced. `fold` decides which events count and what they add up to. It is not for judging a fold
against the head or the scripts (see `reconcile`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiomigrate.ledger.records import Event, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A version a line has, and the checksum it was applied (or adopted) with."""

    version: int
    checksum: str | None
    algorithm: str | None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A migration that was started and neither applied nor undone.

    Attributes:
        started: Its `started` event, with the savepoints.
        advanced: How many of its operations are known to be complete, from the first on.
        also: The positions of others that are.
        intents: Its `intended` events in order: commits announced before being made.
        failed: Its `failed` event, if it ended by failing without being undone.
    """

    started: Event
    advanced: int = 0
    also: frozenset[int] = frozenset()
    intents: tuple[Event, ...] = ()
    failed: Event | None = None

    def done_of(self, count: int) -> frozenset[int]:
        """Returns which of so many operations are known to be complete, by position."""
        return frozenset(p for p in range(count) if p < self.advanced or p in self.also)

    @property
    def savepoints(self) -> Mapping[str, int]:
        """The table_version each touched table had before, by table; 0 if it did not exist."""
        return {t: int(facts["before"]) for t, facts in self.started.tables.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LineHistory:
    """What the journal says of one line.

    Attributes:
        current: The version reached, 0 for none.
        applied: Every version applied, adopted or stamped, by version.
        unfinished: What a crash or an unresolved failure left behind.
        last: The last event that set `current`.
        failed: The last failure, if nothing of that version succeeded since.
    """

    current: int = 0
    applied: Mapping[int, Applied] = field(default_factory=dict)
    unfinished: Unfinished | None = None
    last: Event | None = None
    failed: Event | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """The folded journal.

    Attributes:
        lines: What is true of each line.
        shapes: The shape each table had when a migration last left it, `None` where it had none.
        top_epoch: The highest epoch seen, valid or not.
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
    """Returns the events that count, ordered by epoch and sequence.

    Whoever takes a lease over first appends `opened` with the last sequence it saw of every older
    epoch (`detail.seen`); what an older holder appends after that is void. An `opened` may itself
    be void, so they are judged from the newest down.
    """
    result: list[Event] = []
    leases: dict[str, dict[int, list[Event]]] = {}
    for event in events:
        leases.setdefault(event.lease, {}).setdefault(event.epoch, []).append(event)
    for epochs in leases.values():
        limits: Mapping[str, int] | None = None  # of the nearest newer epoch that opened validly
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
    """Returns the last valid sequence of each epoch not yet closed by a later valid `opened`."""
    seen: dict[int, int] = {}
    for event in valid_events(events):
        if event.lease != lease:
            continue
        if event.kind == Kind.OPENED:
            seen = {}
        seen[event.epoch] = max(seen.get(event.epoch, -1), event.seq)
    return seen


def fold(events: Iterable[Event]) -> Journal:
    """Returns what the events add up to. Events of unknown kind change nothing."""
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
                # Undoing it failed and was itself undone: it is applied as it was.
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


def standing(intents: Iterable[Event]) -> tuple[list[Event], list[Event]]:
    """Returns the commits to one table that were made, and those that may have been.

    What is announced when its turn comes says by its `base` that everything before it was seen:
    what was foreseen for that table_version or a later one was not made. The last one announced,
    and what was foreseen with it, may have been made up to any point.

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


def uncleaned(history: LineHistory, journal: Journal) -> Event | None:
    """Returns the last `applied` or `rolled_back` of a line if it may not have been cleaned after.

    Its process may have died before or while it removed what only the way needed, or before it
    recorded that.
    """
    last = history.last
    if last is None or not (last.detail.get("cleanup") or last.detail.get("branches")):
        return None
    later = [e for e in journal.events if e.line == last.line and e.version == last.version]
    after = later[later.index(last) + 1 :] if last in later else []
    return None if any(e.kind == Kind.CLEANED for e in after) else last
