"""Operations on rows: `Update` and `Delete` by SQL, and `Run`, which calls an async function.

Operations that call a function for each row are in `operations.fill` and `operations.rebuild`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import TUNING, Operation, Traits
from aiomigrate.operations.target import Target
from aiomigrate.schema.sql import Literal, Statement, checked_names, quote
from aiomigrate.schema.state import TableState


@dataclass(frozen=True, slots=True)
class Update(Operation):
    """Set columns of the rows that match, in one commit or, beside other writers, in batches.

    It takes effect once, also after a crash or a cancellation. Literals can safely be set twice,
    and make no commit if no row matches. Expressions cannot: the same commit marks each row in a
    witness, a temporary column that is dropped when the migration has been recorded. An
    expression may use the column it sets, but no other column of the same `Update`: LanceDB
    evaluates expressions one after another in no fixed order (measured).

    It rewrites the matching rows. It is undone by restoring the previous table version, which a
    savepoint keeps, or by dropping the columns that it filled.

    Attributes:
        values: New value by column: text, number, boolean or `None`.
        sql: New value by column, as a SQL expression over the row (without `CASE WHEN`): columns
            in `backticks`, texts in 'single quotes'. Double quotes are refused: LanceDB would store
            the name as a text.
        where: SQL condition on the rows; by default all rows.
        batch_rows: Rows of one commit; 0 for all rows in one commit. By default all rows if no
            other process has committed to the table lately, otherwise some thousands: one commit
            that rewrites many rows blocks writers that change them.
    """

    values: Mapping[str, Literal] = field(default_factory=dict)
    sql: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    where: str | None = field(default=None, kw_only=True)
    batch_rows: int | None = field(default=None, kw_only=True, metadata={TUNING: True})

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        checked_names("Update", [*self.values, *self.sql])
        for column, value in self.values.items():
            if value is not None and not isinstance(value, (str, int, float, bool)):
                raise InvalidMigrationError(
                    f"Update: {value!r} for {column!r} is not a literal.",
                    "Use text, a number, a boolean or None; for other values, use op.Run.",
                )
        for column, expression in self.sql.items():
            if not isinstance(expression, str) or not expression.strip():
                raise InvalidMigrationError(
                    f"Update: {expression!r} for {column!r} is not SQL.",
                    "Give an expression as text; for literals, use values=.",
                )
            words = set(re.findall(r"\w+", re.sub(r"'(?:[^']|'')*'", "", expression)))
            if others := sorted((words & {*self.values, *self.sql}) - {column}):
                raise InvalidMigrationError(
                    f"Update: the expression for {column!r} uses {others[0]!r}, which is set too; "
                    "LanceDB evaluates expressions in no fixed order.",
                    "Write two op.Update, in the order you need.",
                )
        object.__setattr__(self, "values", dict(self.values))
        object.__setattr__(self, "sql", dict(self.sql))

    @property
    def fills(self) -> tuple[str, ...]:
        return (*self.values, *self.sql)

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            destructive=True,
            reversible="restoring the previous table version",
            commits="1, or 1 for each batch",
        )

    @property
    def shows(self) -> bool:
        return False

    @property
    def repeats(self) -> bool:
        return not self.sql

    @property
    def needs_savepoint(self) -> bool:
        return True

    @property
    def statement(self) -> Statement:
        return Statement(
            table=self.table or "", where=self.where, sets=self.sql, values=self.values
        )

    def describe(self) -> str:
        parts = [f"{c} = {v!r}" for c, v in self.values.items()]
        parts += [f"{c} = {e}" for c, e in self.sql.items()]
        return "set " + ", ".join(parts) + (f" where {self.where}" if self.where else "")

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        for column in (*self.values, *self.sql):
            if not before.has(column):
                raise self.refuse_missing_column(before, column)
            value, kind = self.values.get(column), before.column(column).type
            if isinstance(value, float) and pa.types.is_integer(kind) and not value.is_integer():
                raise self.refuse(
                    f"{value} does not fit column {column!r}, {kind}.", "Give an integer."
                )
            if self.values.get(column, 0) is None and not before.schema.field(column).nullable:
                raise self.refuse(
                    f"column {column!r} is NOT NULL.", "Allow NULL first with op.SetNullable."
                )
        return before

    async def apply(self, target: Target) -> int:
        done = quote(target.witness)
        at_once = self.batch_rows == 0
        is_begun = self.existing(target.state).has(target.witness)
        if not self.sql and (at_once or not is_begun):
            changed = await target.update(
                values=self.values, sql={}, where=self.where, unless_live=not at_once
            )
            if changed is not None:
                return changed
        if not is_begun:
            await target.add_columns([pa.field(target.witness, pa.bool_())])
        return await target.update_in_batches(
            values={**self.values, target.witness: True},
            sql=self.sql,
            where=f"({self.where}) AND {done} IS NULL" if self.where else f"{done} IS NULL",
            batch_rows=self.batch_rows,
        )


@dataclass(frozen=True, slots=True)
class Delete(Operation):
    """Delete the rows that match, in one commit.

    After a crash it may run again and delete rows that match by then: write a condition that does
    not match rows that the application adds. It is undone by restoring the previous table
    version, which a savepoint keeps.

    Attributes:
        where: SQL condition on the rows; `"true"` for all rows.
    """

    where: str

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        if not isinstance(self.where, str) or not self.where.strip():
            raise InvalidMigrationError(
                f"Delete: {self.where!r} is not a condition.",
                'Give a SQL condition; for all rows, where="true".',
            )

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True, destructive=True, reversible="restoring the previous table version"
        )

    @property
    def shows(self) -> bool:
        return False

    @property
    def needs_savepoint(self) -> bool:
        return True

    @property
    def statement(self) -> Statement:
        return Statement(table=self.table or "", where=self.where)

    def describe(self) -> str:
        return f"delete rows where {self.where}"

    def evolve(self, state: TableState | None) -> TableState:
        return self.existing(state)

    async def apply(self, target: Target) -> int:
        if not await target.count_rows(self.where):
            return 0
        return await target.delete(self.where)


Up = Callable[[Any], Awaitable[None]]
"""An async function of an `aiomigrate.Context`."""


@dataclass(frozen=True, slots=True)
class Run(Operation):
    """Run an async function, for changes that no operation makes.

    **The function must be idempotent**: after a crash it runs again. If all commits since its
    start are known to be aiomigrate's, its tables are first restored to their state at the start;
    if another writer has committed in between, the run stops and the error says what to do. For
    that, change tables through the context (`context.table(...)`, `context.apply(...)`), which
    records each commit. It is undone by `inverse`, otherwise by restoring the previous table
    version, which a savepoint keeps.

    Attributes:
        function: Called with a `Context`; its result is ignored.
        inverse: Called with a `Context` on rollback, to undo the function.
    """

    function: Up
    inverse: Up | None = None

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        for value in (self.function, self.inverse):
            if value is not None and not inspect.iscoroutinefunction(value):
                raise InvalidMigrationError(
                    f"Run: {value!r} is not an async function.",
                    "Define it with `async def` and one argument, the context.",
                )

    @property
    def code(self) -> Up:
        return self.function

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            reversible="its inverse" if self.inverse else "restoring the previous table version",
            commits="as many as it makes",
        )

    @property
    def shows(self) -> bool:
        return False

    @property
    def needs_savepoint(self) -> bool:
        return True

    def undo(self, before: TableState | None) -> tuple[Operation, ...] | None:
        return None if self.inverse is None else (Run(self.inverse, table=self.table),)

    def describe(self) -> str:
        function: Any = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return f"run {getattr(function, '__name__', repr(function))}"

    def evolve(self, state: TableState | None) -> TableState | None:
        """Returns the same state: the effect of a function cannot be predicted."""
        return state

    async def apply(self, target: Target) -> int:
        """Is never called: the executor calls the function with a context."""
        raise AssertionError(target)
