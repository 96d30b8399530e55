"""The base of all operations: a pure half that predicts, and `apply`, which changes the table.

The planner folds `evolve` over table states, the executor runs `apply` and compares the table with
the prediction, and plans print `describe`. This module defines no operation and imports no
LanceDB: `apply` acts through the `Target` protocol.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

from aiomigrate.errors import OperationError
from aiomigrate.operations.target import Target
from aiomigrate.option_checks import check_flag, check_policy
from aiomigrate.schema.sql import Statement, double_quotes
from aiomigrate.schema.state import TableState, embedding_columns

TUNING = "tuning"
"""Key in a field's metadata: the field says how the operation runs, and is not in its checksum."""


class Missing(enum.Enum):
    """What an operation does when its table does not exist."""

    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """The kind of change that an operation makes. `str()` is its text in plans.

    Attributes:
        rewriting: Whether it writes data files, so that its cost grows with the table.
        destructive: Whether it discards data or structure.
        reversible: How it is undone, as text; empty if it cannot be undone.
        commits: How many commits it makes, as text.
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
    """Base class of all declarative operations: a frozen value.

    Constructing one with an invalid argument raises `InvalidMigrationError`, or
    `ConfigurationError` for a policy or flag, so that the import of its script fails.
    Only `apply` needs the lease; all other methods read no table.

    Attributes:
        table: The table to change; by default the table of the migration.
        when_missing: Whether to fail or to do nothing when the table does not exist.
    """

    table: str | None = None
    when_missing: Missing | str = Missing.FAIL

    def __post_init__(self) -> None:
        """Converts policies that were given as text, and checks flags.

        A subclass that has a `__post_init__` of its own calls this one by its class:
        `super()` does not work in dataclasses with slots.

        Raises:
            ConfigurationError: A policy is none of its choices, or a flag is not a boolean.
        """
        for given in fields(self):
            where = f"{type(self).__name__}: {given.name}"
            if isinstance(given.default, enum.Enum):
                policy = check_policy(type(given.default), getattr(self, given.name), where)
                object.__setattr__(self, given.name, policy)
            elif given.type == "bool":
                check_flag(getattr(self, given.name), where)

    @property
    def traits(self) -> Traits:
        """The kind of change."""
        raise NotImplementedError

    @property
    def shows(self) -> bool:
        """Whether the effect is visible in the table's schema or indexes."""
        return True

    @property
    def repeats(self) -> bool:
        """Whether one without a visible effect may run twice with the same result."""
        return False

    @property
    def witnessed(self) -> bool:
        """Whether it keeps a witness while it runs: a temporary column that marks its work."""
        return not self.shows

    @property
    def needs_savepoint(self) -> bool:
        """Whether the table version before it must be protected from cleanup while it runs."""
        return False

    @property
    def code(self) -> Callable[[Any], Awaitable[None]] | None:
        """The user's function that it runs with a context, `None` for a declarative operation."""
        return None

    @property
    def runs_code(self) -> bool:
        """Whether it runs a function of the user, so that its effect cannot be predicted."""
        return self.code is not None

    @property
    def creates_table(self) -> bool:
        """Whether it creates its table."""
        return False

    @property
    def removes_table(self) -> bool:
        """Whether its table no longer exists under its name afterwards."""
        return False

    @property
    def fills(self) -> tuple[str, ...]:
        """The columns whose values it sets, if that is all it does; empty for all others."""
        return ()

    @property
    def index_config(self) -> tuple[str, Mapping[str, Any]] | None:
        """Kind and options of the index it builds, for LanceDB to check; `None` for no index."""
        return None

    @property
    def identity(self) -> str | None:
        """Text that stays the same when its script is corrected; `None` for the whole operation.

        The witness is named after it, so a corrected script resumes the work of the earlier one.
        """
        return None

    @property
    def surveyed(self) -> str | None:
        """The column that a plan reads to estimate the cost, `None` for no column."""
        return None

    def estimate(self, survey: Any) -> tuple[str, ...]:
        """Returns the estimated cost, one sentence each; empty by default. Pure.

        Args:
            survey: The `operations.fill.Survey` of the column `surveyed`.
        """
        return ()

    def discards(self, before: TableState) -> bool:
        """Returns whether it discards something of this table that `undo` cannot restore."""
        return self.traits.destructive

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables it changes or reads."""
        return () if self.table is None else (self.table,)

    @property
    def statement(self) -> Statement | None:
        """The SQL it contains, which is checked before anything is written; `None` for no SQL."""
        return None

    def expand(self) -> tuple[Operation, ...]:
        """Returns the simple operations that it consists of, by default itself."""
        return (self,)

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        """Returns what it breaks for running code and open handles, one sentence each. Pure.

        Args:
            before: The table before it, `None` if it does not exist.
        """
        return ()

    def undo(self, before: TableState | None) -> tuple[Operation, ...] | None:
        """Returns the operations that undo it; `None` if no operation does. Pure.

        Args:
            before: The table before it, `None` if it does not exist.
        """
        return None

    def fold(self, states: Mapping[str, TableState | None]) -> dict[str, TableState | None]:
        """Applies `evolve` to this operation's table, among all tables. Pure.

        Args:
            states: The tables before, by name; at least those in `tables`.

        Raises:
            OperationError: The operation does not fit these tables.
        """
        after = dict(states)
        name = self.table
        if name is None:  # code that belongs to no table
            return after
        if states[name] is not None or self.when_missing is not Missing.SKIP:
            after[name] = self.evolve(states[name])
        return after

    def describe(self) -> str:
        """Returns one line for plans and logs, without the table's name."""
        raise NotImplementedError

    def evolve(self, state: TableState | None) -> TableState | None:
        """Predicts the table after this operation. Pure.

        Args:
            state: The table before, `None` if it does not exist.

        Returns:
            The table after; an equal state if the effect is already there.

        Raises:
            OperationError: The operation does not fit this table.
        """
        raise NotImplementedError

    def done(self, state: TableState | None, witness: str) -> bool:
        """Returns whether the effect is already there. Pure.

        Args:
            state: The table as it is, `None` if it does not exist.
            witness: The name of the operation's witness column.

        Raises:
            OperationError: The operation does not fit this table.
        """
        if not self.shows:
            return False
        after = self.evolve(state)
        if state is None or after is None:
            return state is after
        return after.same(state)

    def predict(self, state: TableState | None, witness: str) -> TableState | None:
        """Predicts the table after `apply`, which may resume; by default as `evolve`. Pure.

        Args:
            state: The table as it is, perhaps half changed.
            witness: The name of the operation's witness column.

        Returns:
            The table after; `None` if it is dropped, or if it cannot be predicted.

        Raises:
            OperationError: The operation does not fit this table.
        """
        return self.evolve(state)

    async def apply(self, target: Target) -> int:
        """Changes the table; called only if not `done`. Returns the number of rows changed.

        After a crash or a cancellation between two of its commits, the next call resumes.

        Raises:
            OperationError: The operation does not fit the table.
            StoreError: LanceDB failed.
        """
        raise NotImplementedError

    def on(self, table: str | None) -> Operation:
        """Returns this operation bound to a table; one that names its own table is unchanged."""
        if self.table is not None:
            return self
        bound = copy.copy(self)
        object.__setattr__(bound, "table", table)
        return bound

    def existing(self, state: TableState | None) -> TableState:
        """Returns the state of a table that must exist.

        Raises:
            OperationError: The table does not exist.
        """
        if state is None:
            raise self.refuse(
                "the table does not exist.",
                "Create it in an earlier migration, or pass when_missing=op.Missing.SKIP.",
            )
        return state

    def require(self, extra: str, *modules: str) -> None:
        """Checks that the libraries of an extra are installed.

        Called by `evolve`, so that a plan finds out, not the run.

        Args:
            extra: The extra of aiomigrate that brings them.
            modules: Their modules.

        Raises:
            OperationError: One is not installed.
        """
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            raise self.refuse(
                f"it needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not "
                "installed.",
                f"pip install 'aiomigrate[{extra}]'",
            )

    def check_expressions(self) -> None:
        """Refuses double quotes in SQL expressions, which LanceDB reads otherwise than SQL. Pure.

        Not part of `evolve`, which also predicts migrations that are applied already.

        Raises:
            OperationError: An expression contains a double-quoted name.
        """
        statement = self.statement
        if statement is not None and (wrong := double_quotes(statement.sets)) is not None:
            raise self.refuse(*wrong)

    def refuse(self, why: str, remedy: str) -> OperationError:
        """Returns the error to raise if the operation does not fit its table."""
        return OperationError(f"{self.describe()} on table {self.table!r}: {why}", remedy)

    def refuse_missing_column(
        self, state: TableState, column: str, *, table: str | None = None
    ) -> OperationError:
        """Returns the error to raise if a table lacks a column; it lists the columns there are.

        Args:
            state: The table that lacks the column.
            column: The column, by path.
            table: The name of that table, if it is not the operation's own.
        """
        where = "" if table is None else f" in table {table!r}"
        columns = ", ".join(f.name for f in state.fields())
        return self.refuse(
            f"there is no column {column!r}{where}.", f"Use one of its columns: {columns}."
        )


def refuse_embedding(operation: Operation, state: TableState, columns: Iterable[str]) -> None:
    """Refuses to drop or rename a column that an embedding function of the table uses.

    Raises:
        OperationError: An embedding function uses one of the columns.
    """
    named = embedding_columns(state.schema)
    for column in columns:
        if column in named:
            raise operation.refuse(
                f"the table's embedding function {named[column]!r} uses column {column!r}; "
                "LanceDB would still look for it, and the next add() would fail.",
                "Use op.Rebuild(function, schema=...) with a schema that drops or renames the "
                "column: it also rewrites the table's metadata.",
            )
