"""The journal adds up to one truth, whatever order its rows are read in and whoever wrote late."""

from __future__ import annotations

import datetime as dt
import random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiomigrate.ledger.history import (
    classify_intents,
    fold,
    pending_cleanup,
    seen_epochs,
    valid_events,
)
from aiomigrate.ledger.records import Event, Kind

AT = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def event(epoch: int, seq: int, kind: str, version: int | None = None, **values: Any) -> Event:
    """Builds an event of the lease `run`, of line `memos` where it has a version."""
    line = None if version is None else "memos"
    given = {"lease": "run", "line": line, **values}
    return Event(epoch=epoch, seq=seq, at=AT, kind=kind, version=version, **given)


def opened(epoch: int, **seen: int) -> Event:
    """Builds the first event of a holder, with what it saw of older ones (`e1=4`)."""
    detail = {"seen": {name[1:]: seq for name, seq in seen.items()}}
    return event(epoch, 0, Kind.OPENED, detail=detail)


def keys(events: list[Event]) -> list[tuple[int, int]]:
    """Returns epoch and sequence of events."""
    return [(e.epoch, e.seq) for e in events]


def test_what_a_fenced_holder_wrote_late_is_void() -> None:
    """Whoever takes over says what it saw; an older holder's events beyond that never count."""
    first = [opened(1), event(1, 1, Kind.STARTED, 1), event(1, 2, Kind.APPLIED, 1)]
    late = [event(1, 3, Kind.STARTED, 2), event(1, 4, Kind.APPLIED, 2)]
    second = [opened(2, e1=2), event(2, 1, Kind.APPLIED, 3)]

    journal = fold([*first, *second, *late])

    assert keys(list(journal.events)) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert journal.of("memos").current == 3
    assert 2 not in journal.of("memos").applied


def test_a_late_take_over_of_a_paused_process_is_void() -> None:
    """An `opened` that is itself void fences nobody: what the real holder wrote stays."""
    first = [opened(1), event(1, 1, Kind.APPLIED, 1)]
    third = [opened(3, e1=1), event(3, 1, Kind.APPLIED, 2)]
    paused = [opened(2), event(2, 1, Kind.APPLIED, 9)]  # took epoch 2, slept, saw nothing

    journal = fold([*first, *third, *paused])

    assert keys(list(journal.events)) == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert journal.of("memos").current == 2
    assert journal.top_epoch == 3


def test_a_chain_of_holders_keeps_what_each_saw_of_the_one_before() -> None:
    """Each `opened` speaks for the epochs since the last one; older ones were settled by that."""
    events = [
        opened(1), event(1, 1, Kind.APPLIED, 1), event(1, 2, Kind.APPLIED, 9),
        opened(2, e1=1), event(2, 1, Kind.APPLIED, 2), event(2, 2, Kind.APPLIED, 9),
        opened(3, e2=1), event(3, 1, Kind.APPLIED, 3),
    ]  # fmt: skip

    assert keys(valid_events(events)) == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert fold(events).of("memos").current == 3


def test_leases_do_not_fence_each_other() -> None:
    """An epoch belongs to one lease; another lease's holders are judged by themselves."""
    other = event(1, 5, Kind.APPLIED, 1, lease="other", line="tags")

    journal = fold([opened(2), event(2, 1, Kind.APPLIED, 1), other])

    assert set(journal.lines) == {"memos", "tags"}


def test_what_a_new_holder_has_seen_reaches_back_to_the_last_take_over() -> None:
    """`seen_epochs` is what the next `opened` records: enough to void everything later."""
    events = [
        opened(1), event(1, 1, Kind.APPLIED, 1),
        opened(2, e1=1), event(2, 7, Kind.APPLIED, 2),
        event(1, 2, Kind.APPLIED, 9),
        event(4, 3, Kind.APPLIED, 1, lease="other"),
    ]  # fmt: skip

    assert seen_epochs(events, "run") == {2: 7}
    assert seen_epochs(events, "other") == {4: 3}
    assert seen_epochs([], "run") == {}


def test_a_crash_leaves_a_migration_unfinished() -> None:
    """`started` without an end is found, with savepoints, progress and announced commits."""
    tables = {"memos": {"before": 4}, "tags": {"before": 0}}
    history = fold(
        [
            opened(1),
            event(1, 1, Kind.APPLIED, 1),
            event(1, 2, Kind.STARTED, 2, tables=tables),
            event(1, 3, Kind.INTENDED, 2, detail={"base": 4}),
            event(1, 4, Kind.ADVANCED, 2, detail={"operations": 1}),
            event(1, 5, Kind.INTENDED, 2, detail={"base": 5}),
            event(1, 6, Kind.ADVANCED, 9, detail={"operations": 7}),
        ]
    ).of("memos")

    assert history.current == 1
    assert history.unfinished is not None
    assert history.unfinished.savepoints == {"memos": 4, "tags": 0}
    assert history.unfinished.done_of(2) == {0}
    assert [i.detail["base"] for i in history.unfinished.intents] == [4, 5]
    assert history.unfinished.failed is None


def test_a_failure_that_was_undone_is_finished_but_told() -> None:
    """`restored` then `failed`: nothing to recover, the failure stays until a success."""
    events = [event(1, 1, Kind.STARTED, 2), event(1, 2, Kind.RESTORED, 2),
              event(1, 3, Kind.FAILED, 2, error="boom")]  # fmt: skip

    failed = fold(events).of("memos")
    corrected = fold([*events, event(2, 1, Kind.APPLIED, 2)]).of("memos")

    assert failed.unfinished is None
    assert failed.failed is not None
    assert failed.failed.error == "boom"
    assert corrected.failed is None


def test_a_failure_that_could_not_be_undone_stays_unfinished() -> None:
    """`failed` without `restored` is for a person, until a stamp or a new attempt ends it."""
    events = [event(1, 1, Kind.STARTED, 2), event(1, 2, Kind.FAILED, 2)]

    left = fold(events).of("memos").unfinished
    stamped = fold([*events, event(2, 1, Kind.STAMPED, 2)]).of("memos")
    again = fold([*events, event(2, 1, Kind.STARTED, 2)]).of("memos").unfinished

    assert left is not None
    assert left.failed is not None
    assert stamped.unfinished is None
    assert again is not None
    assert again.failed is None


def test_a_stamp_and_an_adoption_say_what_is_covered() -> None:
    """They replace what was applied before by the checksums they record."""
    events = [event(1, 1, Kind.APPLIED, 1, checksum="one"), event(1, 2, Kind.APPLIED, 2)]
    known = {"checksums": {"1": "uno", "3": None}}

    history = fold([*events, event(1, 3, Kind.ADOPTED, 3, detail=known)]).of("memos")
    forgotten = fold([*events, event(1, 3, Kind.STAMPED, 0)]).of("memos")

    assert history.current == 3
    assert {v: a.checksum for v, a in history.applied.items()} == {1: "uno", 3: None}
    assert (forgotten.current, dict(forgotten.applied)) == (0, {})


def test_the_shape_of_a_table_is_what_the_last_migration_left() -> None:
    """Later events win, a table without a shape is kept as absent, others say nothing."""
    a, b = {"fields": {"a": "int64"}}, {"fields": {"b": "int64"}}

    journal = fold(
        [
            event(1, 1, Kind.APPLIED, 1, tables={"x": {"shape": a}, "y": {"shape": a}}),
            event(1, 2, Kind.FAILED, 2, tables={"x": {"shape": b}}),
            event(1, 3, Kind.APPLIED, 2, tables={"y": {"shape": b}, "z": {"shape": None}}),
            event(1, 4, Kind.APPLIED, 3, tables={"x": {"after": 3}}),
        ]
    )

    assert journal.shapes == {"x": a, "y": b, "z": None}


def test_an_empty_journal_says_nothing() -> None:
    """No events: no lines, no shapes, version 0 for any line asked."""
    journal = fold([])

    assert (dict(journal.lines), dict(journal.shapes), journal.top_epoch) == ({}, {}, 0)
    assert journal.of("memos").current == 0


def test_kinds_of_newer_releases_change_nothing() -> None:
    """An event this release does not know is kept in the history and otherwise passed over."""
    known = [opened(1), event(1, 1, Kind.APPLIED, 1)]
    unknown = event(1, 2, "rehearsed", 9, tables={"x": {"shape": {}}}, detail={"operations": "?"})

    journal = fold([*known, unknown])

    assert journal.lines == fold(known).lines
    assert journal.shapes == {}
    assert unknown in journal.events


# ---- any journal --------------------------------------------------------------------------------

kinds = st.sampled_from([*Kind, "", "rehearsed", "Applied"])
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)


@st.composite
def journals(draw: st.DrawFn) -> list[Event]:
    """Draws events of any kinds in any epochs, each position of a lease's epoch once."""
    places = draw(
        st.lists(
            st.tuples(st.sampled_from(["run", "b"]), st.integers(1, 5), st.integers(0, 6)),
            unique=True, max_size=25,
        )
    )  # fmt: skip
    result = []
    for lease, epoch, seq in places:
        seen = st.dictionaries(st.sampled_from("12345"), st.integers(-1, 6), max_size=4)
        detail = {
            "seen": draw(seen), "operations": draw(st.integers(0, 3)),
            "checksums": {str(v): None for v in draw(st.lists(st.integers(1, 9), max_size=3))},
        }  # fmt: skip
        shape = draw(st.sampled_from([None, {"fields": {}}]))
        result.append(
            Event(
                lease=lease, epoch=epoch, seq=seq, at=AT, kind=draw(kinds),
                line=draw(st.sampled_from([None, "memos", "tags"])),
                version=draw(st.one_of(st.none(), st.integers(0, 9))),
                tables=draw(st.sampled_from([{}, {"memos": {"before": 2, "shape": shape}}])),
                detail=detail,
            )
        )  # fmt: skip
    return result


@relaxed
@given(journals(), st.randoms(use_true_random=False))
def test_folding_does_not_depend_on_the_order_of_rows(
    events: list[Event], shuffle: random.Random
) -> None:
    """LanceDB returns rows in any order; any kinds in any order never raise."""
    shuffled = list(events)
    shuffle.shuffle(shuffled)

    assert fold(events) == fold(shuffled)
    assert seen_epochs(events, "run") == seen_epochs(shuffled, "run")


@relaxed
@given(journals())
def test_what_does_not_count_may_be_cleaned_away(events: list[Event]) -> None:
    """Compacting a journal to its valid events leaves the same truth, and is stable."""
    valid = valid_events(events)

    assert valid_events(valid) == valid
    assert fold(valid).lines == fold(events).lines
    assert fold(valid).shapes == fold(events).shapes


@relaxed
@given(journals(), journals())
def test_nothing_written_after_a_take_over_by_older_holders_counts(
    before: list[Event], after: list[Event]
) -> None:
    """Once a holder has opened with what it saw, the truth is fixed against all older epochs."""
    seen = seen_epochs(before, "run")
    settled = [*before, opened(6, **{f"e{epoch}": seq for epoch, seq in seen.items()})]
    places = {(e.lease, e.epoch, e.seq) for e in settled}
    # A fenced holder goes on from where it was: its later events have higher sequences. What a
    # holder says it has seen was there, though a drawn journal may lack it.
    last: dict[int, int] = {}
    for known in (e for e in settled if e.lease == "run"):
        last[known.epoch] = max(last.get(known.epoch, -1), known.seq)
        if known.kind == Kind.OPENED:
            for epoch, seq in known.detail["seen"].items():
                last[int(epoch)] = max(last.get(int(epoch), -1), seq)
    late = [
        e for e in after
        if e.lease == "run" and e.seq > last.get(e.epoch, -1)
        and (e.lease, e.epoch, e.seq) not in places
    ]  # fmt: skip

    assert fold([*settled, *late]).events == fold(settled).events


# ---- what is complete, announced, or still to be cleaned up --------------------------------------


def test_a_new_attempt_begins_with_nothing_complete() -> None:
    """What an attempt completed before it was undone is to be done again by the next one."""
    events = [
        event(1, 1, Kind.STARTED, 2),
        event(1, 2, Kind.INTENDED, 2, detail={"base": 4}),
        event(1, 3, Kind.ADVANCED, 2, detail={"operations": 1, "also": [2]}),
        event(1, 4, Kind.FAILED, 2),
        event(1, 5, Kind.RESTORED, 2),
        event(1, 6, Kind.STARTED, 2),
    ]

    left = fold(events).of("memos").unfinished

    assert left is not None
    assert left.started == events[-1]
    assert left.done_of(3) == frozenset()
    assert left.intents == ()
    assert left.failed is None


def test_a_predicted_commit_that_was_announced_anew_was_not_made() -> None:
    """An announcement at a table_version proves the predictions for it wrong, not those before."""
    events = [
        event(1, 1, Kind.INTENDED, 2, detail={"base": 3}),
        event(1, 2, Kind.INTENDED, 2, detail={"base": 4, "foreseen": True}),
        event(1, 3, Kind.INTENDED, 2, detail={"base": 5, "foreseen": True}),
        event(1, 4, Kind.INTENDED, 2, detail={"base": 5}),
        event(1, 5, Kind.INTENDED, 2, detail={"base": 6, "foreseen": True}),
    ]

    made, last = classify_intents(events)

    assert keys(made) == [(1, 1), (1, 2)]
    assert keys(last) == [(1, 4), (1, 5)]


def test_the_cleanup_of_an_earlier_time_does_not_count_for_a_later_one() -> None:
    """Applied, undone and applied again: what the second time left is still to be removed."""
    first = [
        event(1, 1, Kind.APPLIED, 1, detail={"cleanup": ["memos"]}),
        event(1, 2, Kind.CLEANED, 1),
        event(1, 3, Kind.ROLLING_BACK, 1),
        event(1, 4, Kind.ROLLED_BACK, 1),
    ]
    again = event(1, 5, Kind.APPLIED, 1, detail={"cleanup": ["memos"]})
    crashed, ended = fold([*first, again]), fold([*first, again, event(1, 6, Kind.CLEANED, 1)])

    assert pending_cleanup(crashed.of("memos"), crashed) == again
    assert pending_cleanup(ended.of("memos"), ended) is None
