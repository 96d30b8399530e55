"""Head, journal and scripts held against each other: each case has one answer."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiomigrate import OnAhead, Script, Scripts
from aiomigrate.errors import (
    AiomigrateError,
    ChecksumMismatchError,
    DatabaseAheadError,
    LedgerConflictError,
    MissingScriptError,
    OutOfOrderError,
)
from aiomigrate.ledger.history import Journal, fold
from aiomigrate.ledger.records import Event, HeadRow, Kind
from aiomigrate.migration.checksum import ALGORITHM
from aiomigrate.planning.reconcile import (
    Act,
    digest_at,
    disputed,
    is_at_target,
    newly_covered,
    pending,
    reconcile,
)
from aiomigrate.text import nearest

AT = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def script(version: int, line: str = "memos", checksum: str | None = None) -> Script:
    """Builds a script; its checksum follows from its version."""
    return Script(
        line=line, version=version, description="", operations=(), touches=(line,),
        depends_on={}, checksum=checksum or f"sum{version}", source=f"{version:03}_{line}.py",
    )  # fmt: skip


SCRIPTS = Scripts(tuple(script(v) for v in (1, 2, 4)))


def row(version: int, *, ours: bool = True, name: str = "memos", **values: Any) -> HeadRow:
    """Builds a head row, with the digest that belongs to it if it is ours."""
    digest = digest_at(SCRIPTS, name, version) if ours else None
    facts = {"epoch": 3 if ours else None, "digest": digest, **values}
    return HeadRow(name=name, version=version, migrated_at=AT, **facts)


def applied(*versions: int, line: str = "memos", **values: Any) -> Journal:
    """Builds the journal of a line with versions applied, with the checksums of the scripts."""
    return fold(
        Event(
            lease="run", epoch=1, seq=v, at=AT, kind=Kind.APPLIED, line=line, version=v,
            **{"checksum": f"sum{v}", "algorithm": ALGORITHM, "source": f"{v:03}_{line}.py",
               **values},
        )
        for v in versions
    )  # fmt: skip


OURS = row(2)
THEIRS = row(2, ours=False)

CASES: dict[str, tuple[HeadRow | None, Journal, str | None, Act | type[AiomigrateError], int]] = {
    # row, journal, how the data differs from it, what is decided, at which version
    "head and journal agree": (row(2), applied(1, 2), None, Act.KEEP, 2),
    "a line that was never migrated": (None, applied(), None, Act.ENROL, 0),
    "a line at 0": (row(0), applied(), None, Act.KEEP, 0),
    "another system is at the version we know": (
        row(2, ours=False), applied(1, 2), None, Act.REOWN, 2,
    ),
    "another system's row that we never saw": (row(2, ours=False), applied(), None, Act.ADOPT, 2),
    "another system's row at 0": (row(0, ours=False), applied(), None, Act.ADOPT, 0),
    "another system went on": (row(4, ours=False), applied(1, 2), None, Act.ADOPT, 4),
    "another system went on to a version without a script": (
        row(3, ours=False), applied(1, 2), None, Act.ADOPT, 3,
    ),
    "another system went back, the data did not": (
        row(1, ours=False), applied(1, 2), None, Act.LIFT, 2,
    ),
    "another system went back, and the data is otherwise": (
        row(1, ours=False), applied(1, 2), "table memos is missing", LedgerConflictError, 0,
    ),
    "a crash before the head followed": (row(1), applied(1, 2), None, Act.LIFT, 2),
    "the row was lost, the data is as the journal says": (None, applied(1, 2), None, Act.ENROL, 2),
    "the row was lost, and the data is otherwise": (
        None, applied(1, 2), "column a is missing", LedgerConflictError, 0,
    ),
    "our row is above the journal": (row(4), applied(1, 2), None, LedgerConflictError, 0),
    "our row without a journal": (row(2), applied(), None, LedgerConflictError, 0),
    "a digest that is behind": (row(2, digest="old"), applied(1, 2), None, Act.LIFT, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_way_head_and_journal_can_differ_has_one_answer(
    case: tuple[HeadRow | None, Journal, str | None, Act | type[AiomigrateError], int],
) -> None:
    """Adopt, follow the journal, or refuse with the line, both versions and the command."""
    head, journal, mismatch, expected, current = case
    rows = [] if head is None else [head]

    decided = reconcile(rows, journal, SCRIPTS, mismatched={"memos": mismatch} if mismatch else {})

    if isinstance(expected, Act):
        assert decided.problems == ()
        state = decided.lines["memos"]
        assert (state.act, state.current) == (expected, current)
        lost = head is None and current > 0
        assert state.needs_lease is (lost or expected in (Act.ADOPT, Act.REOWN, Act.LIFT))
    else:
        (problem,) = decided.problems
        assert isinstance(problem, expected)
        assert problem.line == "memos"
        assert "aiomigrate stamp --table memos" in problem.remedy
        assert mismatch is None or mismatch in problem.what
        with pytest.raises(expected):
            decided.raise_first()


@pytest.mark.parametrize(
    ("head", "journal", "expected"),
    [
        (None, applied(1, 2), ("memos",)),
        (row(1, ours=False), applied(1, 2), ("memos",)),
        (row(2, ours=False), applied(1, 2), ()),
        (row(4, ours=False), applied(1, 2), ()),
        (row(1), applied(1, 2), ()),
        (None, applied(), ()),
        (None, applied(1, line="tags"), ()),
    ],
)
def test_only_a_lost_or_lowered_row_is_disputed(
    head: HeadRow | None, journal: Journal, expected: tuple[str, ...]
) -> None:
    """For these the live tables are looked at, because the journal wins only if they agree."""
    assert disputed([] if head is None else [head], journal, SCRIPTS) == expected


def test_identical_duplicates_are_merged_and_differing_ones_refused() -> None:
    """Another system may write a row twice; two versions of one line cannot both be true."""
    same = reconcile([THEIRS, THEIRS, OURS], applied(1, 2), SCRIPTS)
    theirs = reconcile([THEIRS, THEIRS], applied(), SCRIPTS)
    different = reconcile([row(1), row(2, ours=False)], applied(1, 2), SCRIPTS)

    assert same.problems == ()
    assert (same.lines["memos"].act, same.lines["memos"].rows) == (Act.KEEP, 3)
    assert same.lines["memos"].needs_lease
    assert theirs.lines["memos"].act is Act.ADOPT
    (problem,) = different.problems
    assert isinstance(problem, LedgerConflictError)
    assert "(1, 2)" in problem.what


def test_a_line_without_any_script_is_left_alone() -> None:
    """It is shown with its version, whatever its rows and the journal say."""
    rows = [row(18, ours=False, name="memo_vectors"), row(3, ours=False, name="memo_vectors")]

    decided = reconcile(rows, applied(9, line="old"), SCRIPTS)

    assert decided.problems == ()
    assert decided.lines["memo_vectors"].act is Act.IGNORE
    assert decided.lines["memo_vectors"].current == 18
    assert decided.lines["old"].act is Act.IGNORE
    assert not decided.lines["memo_vectors"].is_ahead
    assert not decided.lines["memo_vectors"].needs_lease


AHEAD = {
    "recorded by another system": ([row(9, ours=False)], applied()),
    "applied by newer code": ([row(9, digest="newer")], applied(1, 2, 4, 9)),
}


@pytest.mark.parametrize("case", AHEAD.values(), ids=AHEAD.keys())
def test_a_database_newer_than_the_code_is_an_error_or_a_warning(
    case: tuple[list[HeadRow], Journal],
) -> None:
    """By default it stops; with `WARN` an older pod starts, and writes nothing of its own."""
    rows, journal = case

    error = reconcile(rows, journal, SCRIPTS)
    warned = reconcile(rows, journal, SCRIPTS, on_ahead=OnAhead.WARN)

    (problem,) = error.problems
    assert isinstance(problem, DatabaseAheadError)
    assert (problem.line, problem.version) == ("memos", 9)
    assert "newest script is 4" in problem.what
    assert warned.problems == ()
    assert warned.lines["memos"].is_ahead
    assert warned.lines["memos"].act in (Act.KEEP, Act.ADOPT)
    assert pending(warned.lines["memos"], SCRIPTS, None) == ()
    assert not is_at_target(rows, SCRIPTS)


def test_an_applied_migration_that_was_edited_is_told() -> None:
    """The error names the file, the version and both ways out."""
    edited = Scripts((script(1), script(2, checksum="other"), script(4)))

    (problem,) = reconcile([row(4)], applied(1, 2, 4), edited).problems

    assert isinstance(problem, ChecksumMismatchError)
    assert (problem.line, problem.version, problem.path) == ("memos", 2, "002_memos.py")
    assert "edited after it was applied" in problem.what
    assert "--table memos --to 4" in problem.remedy


@pytest.mark.parametrize("values", [{"algorithm": "aiomigrate-0"}, {"checksum": None}])
def test_a_checksum_of_another_algorithm_is_no_edit(values: dict[str, Any]) -> None:
    """What was recorded by another release, or without a checksum, is not compared."""
    edited = Scripts(tuple(script(v, checksum="other") for v in (1, 2, 4)))

    assert reconcile([row(4)], applied(1, 2, 4, **values), edited).problems == ()


def test_a_migration_inserted_below_the_current_version_is_told() -> None:
    """It would never run: the error says to give it a number above."""
    more = Scripts((*SCRIPTS.all, script(3)))

    (problem,) = reconcile([row(4)], applied(1, 2, 4), more).problems

    assert isinstance(problem, OutOfOrderError)
    assert (problem.version, problem.path) == (3, "003_memos.py")
    assert "above 4" in problem.remedy


def test_an_applied_migration_without_a_script_is_told() -> None:
    """A file that was removed is named from the journal."""
    fewer = Scripts((script(1), script(4)))

    (problem,) = reconcile([row(4)], applied(1, 2, 4), fewer).problems

    assert isinstance(problem, MissingScriptError)
    assert (problem.version, problem.path) == (2, "002_memos.py")


def test_what_another_system_applied_needs_no_script() -> None:
    """Below an adopted version, gaps and files of ours that it never ran are no problem."""
    adopted = fold(
        [Event(lease="run", epoch=1, seq=1, at=AT, kind=Kind.ADOPTED, line="memos", version=3,
               algorithm=ALGORITHM, detail={"checksums": {"1": "sum1", "2": "sum2", "3": None}})]
    )  # fmt: skip

    decided = reconcile([row(3)], adopted, SCRIPTS)

    assert decided.problems == ()
    assert [s.version for s in pending(decided.lines["memos"], SCRIPTS, None)] == [4]


def test_what_is_recorded_when_a_line_is_adopted() -> None:
    """Ours keep the checksum they were applied with, theirs get that of the script as it is."""
    journal = applied(1, checksum="as applied")
    state = reconcile([row(3, ours=False)], journal, SCRIPTS).lines["memos"]

    assert newly_covered(state, SCRIPTS) == {"1": "as applied", "2": "sum2", "3": None}


def test_every_problem_is_listed_in_the_order_of_lines() -> None:
    """One broken line does not hide another."""
    scripts = Scripts((script(1), script(1, "tags"), script(2, "users")))
    journal = Journal(lines={**applied(1, 2).lines, **applied(1, line="tags", checksum="x").lines})

    decided = reconcile([row(2), row(1, name="tags", digest=None), row(5, name="users")],
                        journal, scripts)  # fmt: skip

    assert [(type(p).__name__, p.line) for p in decided.problems] == [
        ("DatabaseAheadError", "memos"),
        ("ChecksumMismatchError", "tags"),
        ("LedgerConflictError", "users"),
    ]


# ---- one read ------------------------------------------------------------------------------------

NOT_AT_TARGET: dict[str, list[HeadRow]] = {
    "no row": [],
    "behind": [row(2)],
    "ahead": [row(9)],
    "another system's": [row(4, ours=False)],
    "a digest of edited history": [row(4, digest="x")],
    "no digest": [row(4, digest=None)],
    "a duplicate": [row(4), row(4)],
}


def test_one_read_of_the_head_proves_that_nothing_is_to_be_done() -> None:
    """At target: every line ours, at its newest script, with the digest of the scripts."""
    unknown = row(3, ours=False, name="memo_vectors")

    assert is_at_target([row(4)], SCRIPTS)
    assert is_at_target([row(4), unknown], SCRIPTS)
    assert is_at_target([row(2)], SCRIPTS, 3)
    assert is_at_target([row(2)], SCRIPTS, {"memos": 2})
    assert is_at_target([], SCRIPTS, 0)
    assert is_at_target([], Scripts(()))


@pytest.mark.parametrize("rows", NOT_AT_TARGET.values(), ids=NOT_AT_TARGET.keys())
def test_any_doubt_about_the_head_means_looking_closer(rows: list[HeadRow]) -> None:
    """The fast path never decides what the whole picture would decide otherwise."""
    assert not is_at_target(rows, SCRIPTS)


@pytest.mark.parametrize("to", [True, -1, "4", {"memo": 4}, {"memos": 9}, {"memos": "4"}])
def test_a_target_that_cannot_be_is_not_passed_over(to: Any) -> None:
    """A mistaken `to` is left to the planner, which names it, also when all is at target."""
    assert not is_at_target([row(4)], SCRIPTS, to)


@given(
    st.sets(st.integers(1, 6), min_size=1),
    st.sets(st.integers(1, 6)),
    st.one_of(st.none(), st.tuples(st.integers(0, 7), st.booleans())),
)
def test_the_fast_path_agrees_with_the_whole_picture(
    scripted: set[int], known: set[int], head: tuple[int, bool] | None
) -> None:
    """Whenever one read says "at target", reconciling finds neither problem nor anything to do."""
    scripts = Scripts(tuple(script(v) for v in scripted))
    rows = []
    if head is not None:
        version, ours = head
        rows = [row(version, ours=ours, digest=digest_at(scripts, "memos", version))]
    journal = applied(*sorted(known))

    if is_at_target(rows, scripts) and known == {v for v in scripted if rows}:
        decided = reconcile(rows, journal, scripts)
        assert decided.problems == ()
        assert decided.lines["memos"].act is Act.KEEP
        assert pending(decided.lines["memos"], scripts, None) == ()


def test_a_near_miss_is_suggested() -> None:
    """A mistyped line gets a suggestion, something else none."""
    assert nearest("memo", ["memos", "users"]) == " Did you mean 'memos'?"
    assert nearest("xyz", ["memos", "users"]) == ""
