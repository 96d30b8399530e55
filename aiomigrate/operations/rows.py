"""Operations on rows: `Update` and `Delete` by SQL, and `Run`, an async Python function."""

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

    Takes effect once: literal values may safely be set twice, and make no commit where no row
    matches; SQL expressions, which may not, are guarded by a witness, a column of ours that the
    same commit sets and that is dropped once the migration is recorded. An expression may use the
    column it sets, but no other column that is set with it: LanceDB evaluates them one after
    another in no fixed order (measured).

    Attributes:
        values: New value by column: text, numbers, booleans or `None`.
        sql: New value by column as a SQL expression over the row (no `CASE WHEN`).
        where: SQL condition; by default every row.
        batch_rows: Rows of one commit; by default all in one where nobody else has committed to
            the table lately, else some thousands. 0 forces one commit. A rewrite of many rows in
            one commit would hold up writers that change them.
    """

    values: Mapping[str, Literal] = field(default_factory=dict)
    sql: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    where: str | None = field(default=None, kw_only=True)
    batch_rows: int | None = field(default=None, kw_only=True, metadata={TUNING: True})

    def __post_init__(self) -> None:
        checked_names("Update", [*self.values, *self.sql])
        for column, value in self.values.items():
            if value is not None and not isinstance(value, (str, int, float, bool)):
                raise InvalidMigrationError(
                    f"Update: {value!r} for {column!r} is not a literal.",
                    "Use text, a number, a boolean or None; or op.Run for other values.",
                )
        for column, expression in self.sql.items():
            if not isinstance(expression, str) or not expression.strip():
                raise InvalidMigrationError(
                    f"Update: {expression!r} for {column!r} is not SQL.",
                    "Pass an expression as text, or use values= for literals.",
                )
            words = set(re.findall(r"\w+", re.sub(r"'(?:[^']|'')*'", "", expression)))
            if others := sorted((words & {*self.values, *self.sql}) - {column}):
                raise InvalidMigrationError(
                    f"Update: the expression for {column!r} uses {others[0]!r}, which is set too; "
                    "LanceDB evaluates them in no fixed order.",
                    "Write two Updates, in the order you need.",
                )
        object.__setattr__(self, "values", dict(self.values))
        object.__setattr__(self, "sql", dict(self.sql))

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            destructive=True,
            reversible="restoring the table_version before",
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
                raise self.refuse(
                    f"there is no column {column!r}.",
                    f"Its columns are {', '.join(f.name for f in before.fields())}.",
                )
            value, kind = self.values.get(column), before.column(column).type
            if isinstance(value, float) and pa.types.is_integer(kind) and not value.is_integer():
                raise self.refuse(
                    f"{value} does not fit column {column!r}, {kind}.", "Give a whole number."
                )
            if self.values.get(column, 0) is None and not before.schema.field(column).nullable:
                raise self.refuse(
                    f"column {column!r} forbids NULL.", "Allow it first with op.SetNullable."
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

    After a crash it may delete again what matches then: say in `where` what is meant for ever.

    Attributes:
        where: SQL condition.
    """

    where: str

    def __post_init__(self) -> None:
        if not isinstance(self.where, str) or not self.where.strip():
            raise InvalidMigrationError(
                f"Delete: {self.where!r} is no condition.",
                'Say which rows; for all of them, where="true".',
            )

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True, destructive=True, reversible="restoring the table_version before"
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
"""An async function of a `aiomigrate.Context`."""


@dataclass(frozen=True, slots=True)
class Run(Operation):
    """Run an async function: the escape hatch for what no operation can say.

    **The function must be idempotent**: after a crash it runs again. Where every commit since its
    start is known to be ours, the tables it touches are first returned to where it began; where
    someone else committed in between, the run stops and tells what to do. For that, change tables
    through the context (`context.table(...)`, `context.apply(...)`), which records each commit.

    Attributes:
        function: Called with a `Context`; what it returns is ignored.
        inverse: Undoes it, on rollback.
    """

    function: Up
    inverse: Up | None = None

    def __post_init__(self) -> None:
        for value in (self.function, self.inverse):
            if value is not None and not inspect.iscoroutinefunction(value):
                raise InvalidMigrationError(
                    f"Run: {value!r} is not an async function.",
                    "Define it with `async def` and one argument, the context.",
                )

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            reversible="its inverse" if self.inverse else "restoring the table_version before",
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
        """Returns the state as it is: what a function does cannot be predicted."""
        return state

    async def apply(self, target: Target) -> int:
        """Never called: the executor gives the function a context instead."""
        raise AssertionError(target)
