"""Which commits are a crashed migration's own, decided from its announcements alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiomigrate.errors import UnresolvedError
from aiomigrate.execution.attempt import announcement
from aiomigrate.execution.ownership import claim_of
from aiomigrate.ledger.records import Event
from aiomigrate.migration.model import Script

SCRIPT = Script(
    line="t", version=2, description="", operations=(), touches=("t",), depends_on={},
    checksum="", table="t",
)  # fmt: skip


def announced(base: int, do: str = "add", *, predicted: bool = False, foreign: Any = ()) -> Event:
    """Returns the announcement of a commit to table t."""
    return announcement(SCRIPT, "t", base, {"do": do}, foreign, predicted=predicted)


def undo(intents: list[Event], head: int, made: int, savepoint: int = 5) -> int | None:
    """Returns what to restore from, when so many of the announced commits were found made."""
    claim = claim_of(SCRIPT, "t", savepoint, intents)
    assert claim is not None
    return claim.head_to_undo(head, made)


@given(known=st.integers(0, 3), predicted=st.integers(1, 5), data=st.data())
def test_any_leading_part_of_what_was_predicted_is_undone(
    known: int, predicted: int, data: st.DataObject
) -> None:
    """A crash may come after any of the commits announced together; all made ones are undone."""
    made = data.draw(st.integers(0, predicted))
    alone = [announced(5 + n) for n in range(known)]
    together = [announced(5 + known + n, predicted=n > 0) for n in range(predicted)]
    head = 5 + known + made

    assert undo(alone + together, head, made) == head


@given(made=st.integers(0, 3), more=st.integers(1, 4))
def test_a_commit_that_matches_no_announcement_stops_the_recovery(made: int, more: int) -> None:
    """Restoring would discard it; the error names the first table_version that is not known."""
    intents = [announced(5 + n, predicted=n > 0) for n in range(3)]
    with pytest.raises(UnresolvedError, match=f"table_version {6 + made}"):
        undo(intents, 5 + made + more, made)


def test_commits_on_top_of_a_finished_restore_stay() -> None:
    """Once the restore is found made, the table is back, whatever was committed since."""
    assert undo([announced(5), announced(6, "restore")], 9, 1) is None


def test_a_restore_that_was_not_made_is_made_again() -> None:
    """The commit before it is still there."""
    assert undo([announced(5), announced(6, "restore")], 6, 0) == 6


def test_an_optimization_may_have_made_several_commits() -> None:
    """The next announcement begins above the next table_version, and none of them is foreign."""
    assert undo([announced(5, "optimize"), announced(9)], 10, 1) == 10
    assert undo([announced(5, "optimize")], 8, 1) == 8


@pytest.mark.parametrize(
    "intents",
    [
        [announced(6)],
        [announced(5), announced(7)],
        [announced(5), announced(6, foreign=[(6, 6)])],
    ],
    ids=["before the first", "between two", "recorded as foreign"],
)
def test_a_foreign_commit_between_announced_ones_stops_the_recovery(intents: list[Event]) -> None:
    """It would be discarded by the restore, even if the last announced commit is found made."""
    with pytest.raises(UnresolvedError):
        claim_of(SCRIPT, "t", 5, intents)


def test_a_restore_may_be_announced_above_commits_checked_before() -> None:
    """The commits below it were checked by the recovery that announced it."""
    assert undo([announced(5), announced(8, "restore")], 8, 0) == 8


def test_nothing_is_claimed_of_a_table_without_announcements() -> None:
    """Every commit is announced first, so none was made."""
    assert claim_of(SCRIPT, "other", 5, [announced(5)]) is None


def test_the_next_commit_is_compared_only_while_there_is_one() -> None:
    """No announcement is compared with a table_version that does not exist or is a restore's."""
    claim = claim_of(SCRIPT, "t", 5, [announced(5), announced(6, "vacate", predicted=True)])
    assert claim is not None
    assert claim.expected_at(5, 0) is None
    assert claim.expected_at(6, 0) == {"do": "add"}
    assert claim.expected_at(6, 1) is None
    assert claim.expected_at(9, 1) == {"do": "vacate"}
    assert claim.expected_at(9, 2) is None
