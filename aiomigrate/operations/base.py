"""What an operation is: a pure half that predicts, an effectful half that acts.

The planner folds `evolve` over schemas, the executor runs `apply` and compares, reports print
`describe`. No operation is defined here, and nothing here knows LanceDB: `apply` acts through the
`Target` protocol.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiomigrate.errors import OperationError
from aiomigrate.operations.target import Target
from aiomigrate.schema.sql import Statement
from aiomigrate.schema.state import TableState, embedding_columns

TUNING = "tuning"
"""In the metadata of an operation's field: it says how, not what, and is no part of a checksum."""


class Missing(enum.Enum):
    """What an operation does when its table does not exist."""

    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What kind of change an operation is, for plans and for people.

    Attributes:
        rewriting: Data files are written, so the cost grows with the table.
        destructive: Data or structure is discarded.
        reversible: By what it can be undone, or empty.
        commits: How many commits it makes, in words.
    """

    rewriting: bool = False
    destructive: bool = False
    reversible: str = ""
    commits: str = "1"

    def __str__(self) -> str:
        words = ["rewriting" if self.rewriting else "metadata-only", f"commits: {self.commits}"]
        if self.destructive:
            words.append("destructive")
        words.append(f"undone by {self.reversible}" if self.reversible else "not reversible")
        return ", ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Base of all declarative operations: a frozen value.

    Attributes:
        table: The table to change; by default the table of the migration.
        when_missing: Whether a missing table is an error or passed over.
    """

    table: str | None = None
    when_missing: Missing = Missing.FAIL

    @property
    def traits(self) -> Traits:
        """What kind of change this is."""
        raise NotImplementedError

    @property
    def shows(self) -> bool:
        """Whether the effect can be seen in the table's schema or indexes."""
        return True

    @property
    def repeats(self) -> bool:
        """Whether, if its effect does not show, making it again does the same to the same rows."""
        return False

    @property
    def witnessed(self) -> bool:
        """Whether it has a column of ours on the table while it runs, its witness."""
        return not self.shows

    @property
    def needs_savepoint(self) -> bool:
        """Whether the table_version before must be kept from cleanup while this runs."""
        return False

    @property
    def identity(self) -> str | None:
        """What makes it the same work when its script is corrected; by default all it is."""
        return None

    @property
    def surveyed(self) -> str | None:
        """The column that a plan reads to tell what the operation will cost, if one."""
        return None

    def estimate(self, survey: Any) -> tuple[str, ...]:
        """Returns what it will cost, one sentence each. Pure.

        Args:
            survey: What was found in the column `surveyed` (see `operations.fill.Survey`).
        """
        return ()

    def discards(self, before: TableState) -> bool:
        """Returns whether it discards something of such a table that `undo` cannot bring back."""
        return self.traits.destructive

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables it changes or reads."""
        return () if self.table is None else (self.table,)

    @property
    def statement(self) -> Statement | None:
        """The SQL in it, to be tried before anything is written."""
        return None

    def expand(self) -> tuple[Operation, ...]:
        """Returns the simple operations that it stands for, by default itself."""
        return (self,)

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        """Returns what it breaks for code and handles still running, one sentence each. Pure.

        Args:
            before: The table before it.
        """
        return ()

    def undo(self, before: TableState | None) -> tuple[Operation, ...] | None:
        """Returns the operations that undo it, `None` where none can. Pure.

        Args:
            before: The table before it.
        """
        return None

    def fold(self, states: Mapping[str, TableState | None]) -> dict[str, TableState | None]:
        """Predicts every table after this operation, given at least those it names. Pure.

        Raises:
            OperationError: The operation cannot be applied to such tables.
        """
        after = dict(states)
        name = self.table
        if name is None:  # code that belongs to no table
            return after
        if states[name] is not None or self.when_missing is not Missing.SKIP:
            after[name] = _evolved(self, states[name])
        return after

    def describe(self) -> str:
        """Returns one line for plans and logs, without the table's name."""
        raise NotImplementedError

    def evolve(self, state: TableState | None) -> TableState | None:
        """Predicts the table after this operation. Pure.

        Args:
            state: The table before, `None` if it does not exist.

        Returns:
            The table after; an equal state when the effect is already there.

        Raises:
            OperationError: The operation cannot be applied to such a table.
        """
        raise NotImplementedError

    def after(self, state: TableState) -> TableState | None:
        """Predicts a table after this operation, once however often it is asked. Pure.

        Raises:
            OperationError: The operation cannot be applied to such a table.
        """
        for known, after in state.predicted:
            if known is self:
                return after
        after = self.evolve(state)
        state.predicted.append((self, after))
        return after

    def done(self, state: TableState | None, witness: str) -> bool:
        """Returns whether the effect is already there, so that nothing is to be done."""
        if not self.shows:
            return False
        after = _evolved(self, state)
        if state is None or after is None:
            return state is after
        return after.same(state)

    def predict(self, state: TableState | None, witness: str) -> TableState | None:
        """Predicts the table after `apply`, which may finish what an interrupted run began. Pure.

        Args:
            state: The table as it is, perhaps halfway.
            witness: The column that belongs to this operation.
        """
        return _evolved(self, state)

    async def apply(self, target: Target) -> int:
        """Makes the change; called only when not `done`. Returns the rows changed."""
        raise NotImplementedError

    def on(self, table: str | None) -> Operation:
        """Returns this operation bound to a table, its own if it names one."""
        if self.table is not None:
            return self
        bound = copy.copy(self)
        object.__setattr__(bound, "table", table)
        return bound

    def existing(self, state: TableState | None) -> TableState:
        """Returns the state.

        Raises:
            OperationError: The table does not exist.
        """
        if state is None:
            raise self.refuse(
                "the table does not exist.",
                "Create it in an earlier migration, or pass when_missing=op.Missing.SKIP.",
            )
        return state

    def refuse(self, why: str, remedy: str) -> OperationError:
        """Builds the error of an operation that does not fit its table."""
        return OperationError(f"{self.describe()} on table {self.table!r}: {why}", remedy)


def refuse_embedding(operation: Operation, state: TableState, columns: Iterable[str]) -> None:
    """Refuses what would leave an embedding function with a column that is not there.

    Raises:
        OperationError: One of the columns is named by one.
    """
    named = embedding_columns(state.schema)
    for column in columns:
        if column in named:
            raise operation.refuse(
                f"the table's embedding function {named[column]!r} uses column {column!r}, and "
                "LanceDB would go on looking for it: the next add() would fail.",
                "Use op.Rebuild(function, schema=...) without or with the renamed column: it "
                "writes the table's metadata anew.",
            )


def _evolved(operation: Operation, state: TableState | None) -> TableState | None:
    return operation.evolve(None) if state is None else operation.after(state)
