"""Measures when a migration committed to a table, so that its commits are recognised later.

Comparing that with a live table is for `planning.table_identity`.
"""

from __future__ import annotations

import time


def now() -> int:
    """Returns microseconds since 1970 (UTC), by the clock that LanceDB reads for each commit.

    Not the clock that tests replace: the result is compared with LanceDB's commit times.
    """
    return time.time_ns() // 1000


class CommitSpan:
    """The time from before the first commit of a migration to a table until after its last one."""

    def __init__(self) -> None:
        """Begins without commits."""
        self._span: tuple[int, int] | None = None
        self._is_committed = False

    def begin(self) -> None:
        """Notes that a commit is about to be made."""
        self._extend()

    def end(self) -> None:
        """Notes that a commit was made."""
        self._extend()
        self._is_committed = True

    def _extend(self) -> None:
        moment = now()
        first, last = self._span or (moment, moment)
        self._span = (min(first, moment), max(last, moment))  # the clock may be set back

    def follow(self) -> None:
        """Notes that the latest commit is another writer's."""
        self._is_committed = False

    def recorded(self) -> list[int]:
        """Returns what the journal records: when the table_version was committed, in microseconds.

        If the latest commit is not the migration's, that was at any time before now.
        """
        if self._is_committed and self._span is not None:
            return list(self._span)
        return [0, now()]
