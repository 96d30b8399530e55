"""Decides whether a table is the one that the journal records. Pure.

A name and a table_version do not identify a table: an application may drop a table and create it
again, and a table may lose its newest commits in a power failure or when a backup is restored. The
commit time of a table_version does, so the journal records between which two moments it was
committed. The commit times of the live table are read by the callers (`store.table`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiomigrate.ledger.history import COMMITTING_KINDS
from aiomigrate.ledger.records import Event, Kind

Commits = Mapping[int, tuple[int, int]]
"""The commit time of each table_version that still exists: the earliest and the latest possible, in
microseconds since 1970 (UTC)."""


class Match(enum.Enum):
    """How a live table relates to the one that the journal records."""

    SAME = "same"
    RECREATED = "recreated"  # dropped and created again
    SHORTENED = "shortened"  # its newest commits were lost


@dataclass(frozen=True, slots=True)
class Sighting:
    """A table_version that the journal records.

    Attributes:
        table_version: The table_version.
        since: The time from which it may have been committed, in microseconds since 1970 (UTC); 0
            if unknown.
        until: The time at which it had been committed, likewise.
    """

    table_version: int
    since: int
    until: int

    def compare(self, commits: Commits) -> Match:
        """Returns how a table with these commits relates to the one that was recorded.

        `Match.SAME` also if the commits that could tell were cleaned up.

        Args:
            commits: The commits of the live table, at least one.
        """
        oldest, latest = min(commits), self.until + _TOLERANCE
        if oldest <= self.table_version and commits[oldest][0] > latest:
            return Match.RECREATED
        if self.since and self.table_version in commits:
            earliest, last = commits[self.table_version]
            if last < self.since - _TOLERANCE or earliest > latest:
                return Match.SHORTENED  # and committed to again
        return Match.SHORTENED if max(commits) < self.table_version else Match.SAME


_TOLERANCE = 1000
"""Microseconds by which two readings of the same clock may differ, from rounding."""


def sightings_before(event: Event) -> dict[str, Sighting]:
    """Returns the tables that existed when a migration or its rollback began, as recorded then."""
    found = {table: _sighting(event, table, "before") for table in event.tables}
    return {table: sighting for table, sighting in found.items() if sighting is not None}


def last_sightings(events: Iterable[Event]) -> dict[str, Sighting]:
    """Returns what the last event about each table records; without tables that were dropped.

    Args:
        events: The valid events in order.
    """
    found: dict[str, Sighting | None] = {}
    for event in events:
        if event.kind in _SEEING_KINDS:
            for table, facts in event.tables.items():
                if "after" in facts:
                    found[table] = _sighting(event, table, "after")
    return {table: sighting for table, sighting in found.items() if sighting is not None}


_SEEING_KINDS = frozenset({*COMMITTING_KINDS, Kind.ADOPTED, Kind.STAMPED})


def own_commits(events: Sequence[Event], since: Event, table: str) -> list[Sighting]:
    """Returns the table_versions that migrations left of a table, from one of them on.

    If a later migration dropped the table, only those of the table created after that.

    Args:
        events: The valid events in order.
        since: The first event to consider.
        table: The table.
    """
    found: list[Sighting] = []
    for event in events[events.index(since) :]:
        facts = event.tables.get(table, {})
        if event.kind in COMMITTING_KINDS and "after" in facts:
            sighting = _sighting(event, table, "after")
            found = [] if sighting is None else [*found, sighting]
    return found


def _sighting(event: Event, table: str, key: str) -> Sighting | None:
    facts: Mapping[str, Any] = event.tables[table]
    table_version = int(facts.get(key) or 0)
    if not table_version:
        return None
    # Events of release 0.1.0 have no commit time; it was before the event.
    since, until = facts.get("committed", (0, round(event.at.timestamp() * 1e6)))
    return Sighting(table_version, since, until)


def spell(match: Match, table: str, sighting: Sighting) -> str:
    """Returns a sentence without a full stop about a table that is not as recorded."""
    if match is Match.RECREATED:
        return f"table {table!r} was dropped and created again"
    return (
        f"table {table!r} has lost commits: the journal records table_version "
        f"{sighting.table_version}, which the table no longer has as it was"
    )
