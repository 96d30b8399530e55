"""How one applied migration is undone follows from the journal and the tables' heads alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from aiomigrate import Context, Script, Scripts, op
from aiomigrate.errors import RollbackRefusedError
from aiomigrate.ledger.history import Journal, fold
from aiomigrate.ledger.records import Event, HeadRow, Kind
from aiomigrate.planning.reconcile import digest_at, reconcile
from aiomigrate.planning.rollback import Undo, Way, decide
from tests.planning.test_reconcile import AT

Span = tuple[int, int]


async def fill(context: Context) -> None:
    """Has no inverse: only a restore undoes it."""


def script(line: str, version: int) -> Script:
    """Builds a script on the table `memos` that only a restore undoes."""
    return Script(
        line=line, version=version, description="", operations=(op.Run(fill),),
        touches=("memos",), depends_on={}, checksum=f"{line}{version}", source="", table=line,
    )  # fmt: skip


SCRIPTS = Scripts((script("memos", 1), script("tags", 1), script("tags", 2)))


def event(
    seq: int, line: str, version: int, span: Span, *foreign: Span, kind: str = Kind.APPLIED
) -> Event:
    """Builds the end of a migration that took `memos` from one table_version to another."""
    facts: dict[str, Any] = {"before": span[0], "after": span[1]}
    if foreign:
        facts["foreign"] = [list(other) for other in foreign]
    return Event(
        lease="run", epoch=1, seq=seq, at=AT, kind=kind, line=line, version=version,
        checksum=f"{line}{version}", tables={"memos": facts},
    )  # fmt: skip


def decided(journal: Journal, heads: Mapping[str, int], *, allow: bool = False) -> Undo:
    """Decides how `memos` 1 is undone."""
    rows = [
        HeadRow(name=n, version=v.current, migrated_at=AT, epoch=1,
                digest=digest_at(SCRIPTS, n, v.current))
        for n, v in journal.lines.items() if n
    ]  # fmt: skip
    state = reconcile(rows, journal, SCRIPTS).lines["memos"]
    return decide(SCRIPTS.all[0], state, journal, heads, allow_destructive=allow)


FOREIGN = {
    "none": ([], 4, []),
    "while it ran": ([event(2, "tags", 1, (4, 5))], 5, [(2, 2)]),
    "after it": ([], 6, [(5, 6)]),
    "before a later migration": ([event(2, "tags", 1, (6, 7))], 7, [(5, 6)]),
    "once before a later migration": ([event(2, "tags", 1, (5, 6))], 6, [(5, 5)]),
    "while a later migration ran": ([event(2, "tags", 1, (4, 7), (5, 6))], 7, [(5, 6)]),
    "while a later migration ran that failed": (
        [event(2, "tags", 1, (4, 8), (5, 5), kind=Kind.FAILED)], 8, [(5, 5)],
    ),
    "while two later migrations ran": (
        [event(2, "tags", 1, (4, 6), (5, 5)), event(3, "tags", 2, (6, 9), (7, 8))],
        9, [(5, 5), (7, 8)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("when", FOREIGN)
def test_commits_of_other_writers_are_found_whenever_they_were_made(when: str) -> None:
    """A restore that would discard one is refused, and names it; allowed, it is recorded."""
    later, head, spans = FOREIGN[when]
    own = [(2, 2)] if when == "while it ran" else []
    journal = fold([event(1, "memos", 1, (1, 4), *own), *later])
    if spans:
        with pytest.raises(RollbackRefusedError) as refused:
            decided(journal, {"memos": head})
        assert all(str(first) in refused.value.what for first, _ in spans)
    undo = decided(journal, {"memos": head}, allow=True)

    assert undo.way is Way.RESTORE
    assert undo.restores == {"memos": (head, 1)}
    assert undo.discards == ({"memos": spans} if spans else {})


def test_a_table_behind_its_migration_is_not_the_one_it_changed() -> None:
    """A table whose head is below what the journal records was dropped and made again."""
    journal = fold([event(1, "memos", 1, (1, 4))])

    with pytest.raises(RollbackRefusedError, match="not the one that it changed"):
        decided(journal, {"memos": 3})


def test_a_migration_that_was_stamped_since_is_not_restored_by_what_was_recorded_before() -> None:
    """A stamp says that the data is as it should be now: the old table_versions are void."""
    stamp = Event(
        lease="run", epoch=2, seq=1, at=AT, kind=Kind.STAMPED, line="memos", version=1,
        detail={"checksums": {"1": "memos1"}},
    )  # fmt: skip
    journal = fold([event(1, "memos", 1, (1, 4)), stamp])

    with pytest.raises(RollbackRefusedError, match="did not apply it"):
        decided(journal, {"memos": 4})
