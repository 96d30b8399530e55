"""Whether a table is the one that the journal records, decided from commit times alone."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiomigrate.ledger.records import Event, Kind
from aiomigrate.planning.table_identity import (
    Match,
    Sighting,
    last_sightings,
    own_commits,
    sightings_before,
)

SECOND = 1_000_000
TIMES = st.lists(st.integers(10, 1000), min_size=1, max_size=12, unique=True).map(sorted)


def commits(times: list[int], *, first: int = 1) -> dict[int, tuple[int, int]]:
    """Returns the commits of a table whose table_versions were made at these seconds."""
    return {first + n: (at * SECOND, at * SECOND) for n, at in enumerate(times)}


@given(times=TIMES, data=st.data())
def test_an_intact_table_is_the_same_whatever_was_cleaned_up(
    times: list[int], data: st.DataObject
) -> None:
    """Later commits and cleanups never make a table look like another one."""
    position = data.draw(st.integers(0, len(times) - 1))
    at = times[position] * SECOND
    since = data.draw(st.sampled_from([0, at - 5, at]))
    until = at + data.draw(st.integers(0, 5))
    live = commits(times)
    head = max(live)
    gone = data.draw(st.sets(st.sampled_from(sorted(live)), max_size=len(live)))
    left = {version: when for version, when in live.items() if version not in gone - {head}}

    assert Sighting(position + 1, since, until).compare(left) is Match.SAME


@given(times=TIMES, table_version=st.integers(1, 20), since=st.sampled_from([0, 5 * SECOND]))
def test_a_table_made_since_is_another_one(
    times: list[int], table_version: int, since: int
) -> None:
    """However many commits it has: none of them is as old as the recorded one."""
    sighting = Sighting(table_version, since, 9 * SECOND)

    assert sighting.compare(commits(times)) is Match.RECREATED


@given(times=TIMES, lost=st.integers(1, 5), more=st.integers(0, 10))
def test_a_table_that_lost_its_newest_commits_is_shortened(
    times: list[int], lost: int, more: int
) -> None:
    """Also after its application has committed again, up to the recorded number and beyond."""
    recorded = Sighting(len(times) + lost, 2000 * SECOND, 2001 * SECOND)
    live = commits([*times, *range(3000, 3000 + more)])

    assert recorded.compare(live) is Match.SHORTENED


def test_a_commit_of_unknown_time_is_not_compared_by_time() -> None:
    """The clock of the writer that made it may be ahead of the recorder's."""
    live = {1: (1 * SECOND, 1 * SECOND), 2: (20 * SECOND, 20 * SECOND)}

    assert Sighting(2, 0, 10 * SECOND).compare(live) is Match.SAME
    assert Sighting(2, 5 * SECOND, 10 * SECOND).compare(live) is Match.SHORTENED


def test_the_hour_that_daylight_saving_repeats_counts_in_favour_of_the_table() -> None:
    """Lancedb tells local time, so a commit of that hour has two possible times."""
    hour = 3600 * SECOND
    live = {1: (0, hour), 2: (hour, 2 * hour)}

    assert Sighting(1, 0, 1).compare(live) is Match.SAME
    assert Sighting(2, hour, hour + 1).compare(live) is Match.SAME
    assert Sighting(2, 2 * hour - 1, 2 * hour).compare(live) is Match.SAME
    assert Sighting(2, 2 * hour + SECOND, 3 * hour).compare(live) is Match.SHORTENED


def event(kind: Kind, **facts: Any) -> Event:
    """Returns an event about table t, written at second 100."""
    at = dt.datetime.fromtimestamp(100, dt.UTC)
    return Event(lease="run", epoch=1, seq=0, at=at, kind=kind, tables={"t": facts})


def test_the_last_event_about_a_table_counts() -> None:
    """A table that a migration dropped is no longer recorded; before it is made again."""
    made = event(Kind.APPLIED, before=0, after=1, committed=[1, 2])
    changed = event(Kind.APPLIED, before=1, after=4, committed=[3, 4])
    dropped = event(Kind.APPLIED, before=4, after=0)
    again = event(Kind.APPLIED, before=0, after=2, committed=[7, 8])

    assert last_sightings([made, changed]) == {"t": Sighting(4, 3, 4)}
    assert last_sightings([made, changed, dropped]) == {}
    assert last_sightings([made, changed, dropped, again]) == {"t": Sighting(2, 7, 8)}
    assert own_commits([made, changed], made, "t") == [Sighting(1, 1, 2), Sighting(4, 3, 4)]
    assert own_commits([made, changed, dropped, again], made, "t") == [Sighting(2, 7, 8)]


@pytest.mark.parametrize("kind", [Kind.STARTED, Kind.ADVANCED])
def test_an_event_that_only_begins_is_no_record_of_what_is_left(kind: Kind) -> None:
    """What it changed since is announced, and recorded when it ends."""
    assert last_sightings([event(kind, before=3, committed=[0, 5])]) == {}


def test_events_of_the_first_release_tell_until_when() -> None:
    """They record no commit time: the commit was made before the event was written."""
    started = event(Kind.STARTED, before=3)
    applied = event(Kind.APPLIED, before=3, after=5)

    assert sightings_before(started) == {"t": Sighting(3, 0, 100 * SECOND)}
    assert last_sightings([applied]) == {"t": Sighting(5, 0, 100 * SECOND)}
