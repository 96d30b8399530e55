"""Decides which commits to a table are those of a migration whose process crashed.

Pure: compares what was announced in the journal with one look at the table. Reading the table is
done in `execution.recovery`, and a single commit is compared with its announcement in
`commits.commit_identity`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiomigrate.commits.savepoints import unresolved
from aiomigrate.ledger.history import classify_intents
from aiomigrate.ledger.records import Event
from aiomigrate.migration.model import Script


@dataclass(frozen=True)
class Claim:
    """What a migration announced to do to one table since its savepoint.

    Attributes:
        script: The migration.
        table: The table.
        savepoint: Its table_version when the migration began, 0 if it did not exist.
        base: The table_version up to which every commit is known to be the migration's.
        uncertain: The effects that may have been committed after `base`, in this order; any leading
            part of them may have been.
    """

    script: Script
    table: str
    savepoint: int
    base: int
    uncertain: tuple[Mapping[str, Any], ...]

    def expected_at(self, head: int, made: int) -> Mapping[str, Any] | None:
        """Returns the announced effect to compare the next commit with, `None` if there is none.

        Args:
            head: The latest table_version.
            made: How many of the effects in `uncertain` were found committed so far.
        """
        restored = made > 0 and goes_back(self.uncertain[made - 1])
        if restored or made == len(self.uncertain) or head == self.base + made:
            return None
        return self.uncertain[made]

    def head_to_undo(self, head: int, made: int) -> int | None:
        """Returns the table_version to restore from, `None` if the table is restored already.

        A commit that was announced and not made also has to be undone: a paused process may still
        make it, and only a restore makes a late append fail (measured).

        Args:
            head: The latest table_version.
            made: How many of the effects in `uncertain` were found committed.

        Raises:
            UnresolvedError: A commit since then is not known to be the migration's.
        """
        if made and goes_back(self.uncertain[made - 1]):
            return None  # commits on top of the restore stay
        last = self.base + made
        if head == last or (made == len(self.uncertain) and _may_commit_twice(self.uncertain[-1])):
            return head
        raise unresolved(self.script, self.table, self.savepoint, [(last + 1, head)])


def claim_of(script: Script, table: str, savepoint: int, intents: Iterable[Event]) -> Claim | None:
    """Returns what a migration announced to do to a table, `None` if it announced nothing.

    Args:
        script: The migration.
        table: The table.
        savepoint: Its table_version when the migration began, 0 if it did not exist.
        intents: Every `intended` event of the migration's unfinished attempt, in order.

    Raises:
        UnresolvedError: Other writers committed between the announced commits.
    """
    known, last = classify_intents(i for i in intents if i.detail["table"] == table)
    if not last:
        return None
    if spans := _foreign(savepoint, (*known, *last)):
        raise unresolved(script, table, savepoint, spans)
    effects = tuple(intent.detail["effect"] for intent in last)
    return Claim(script, table, savepoint, int(last[0].detail["base"]), effects)


def goes_back(effect: Mapping[str, Any]) -> bool:
    """Returns whether an announced effect is a return to a savepoint."""
    return str(effect["do"]) in ("restore", "vacate")


def _foreign(savepoint: int, intents: Sequence[Event]) -> list[tuple[int, int]]:
    """Returns the ranges of foreign commits before the first announcement that shows some."""
    expected = savepoint or int(intents[0].detail["base"])
    several = False
    for intent in intents:
        base, effect = int(intent.detail["base"]), intent.detail["effect"]
        if intent.detail.get("foreign"):
            return [(int(first), int(last)) for first, last in intent.detail["foreign"]]
        # Before a restore was announced, the commits up to its base had been checked.
        if base > expected and not (several or goes_back(effect)):
            return [(expected + 1, base)]
        expected, several = base + 1, _may_commit_twice(effect)
    return []


def _may_commit_twice(effect: Mapping[str, Any]) -> bool:
    return str(effect["do"]) == "optimize"
