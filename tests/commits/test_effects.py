"""What the journal announces of the next commits to a table: pure prefix arithmetic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiomigrate.commits.effects import AnnouncedCommits, Effect

FIRST: Effect = {"do": "shape", "n": 1}
SECOND: Effect = {"do": "update", "n": 2}
OTHER: Effect = {"do": "delete"}


def test_a_prediction_is_announced_only_if_it_begins_with_the_commit() -> None:
    """A commit that was not predicted is announced alone."""
    assert AnnouncedCommits.of(FIRST, [FIRST, SECOND]).effects == (FIRST, SECOND)
    assert AnnouncedCommits.of(OTHER, [FIRST, SECOND]).effects == (OTHER,)
    assert AnnouncedCommits.of(OTHER, []).effects == (OTHER,)


def test_a_commit_that_is_announced_is_not_announced_again() -> None:
    """Only the next announced commit counts: a later one was predicted to come after it."""
    announced = AnnouncedCommits((FIRST, SECOND))

    assert announced.begin_with(FIRST)
    assert not announced.begin_with(SECOND)
    assert not AnnouncedCommits().begin_with(FIRST)


@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 4))
def test_a_foreign_commit_voids_what_was_predicted(base: int, step: int, count: int) -> None:
    """Where a commit is not the next table_version, nothing announced after it holds."""
    announced = AnnouncedCommits(tuple({"do": "shape", "n": n} for n in range(count)))

    after = announced.after_commit(base, base + step)

    assert after.effects == (announced.effects[1:] if step == 1 else ())
    assert announced.first().effects == announced.effects[:1]
