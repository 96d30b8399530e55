"""Operations on rows: `Update` in SQL, `Run` for everything else."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import (
    Literal,
    Operation,
    TableState,
    Target,
    Traits,
    checked_names,
    quote,
)


@dataclass(frozen=True, slots=True)
class Update(Operation):
    """Set columns of the rows that match, in one commit.

    Takes effect once: literal values may safely be set twice; SQL expressions, which may not, are
    guarded by a witness, a column of ours that the same commit sets and that is dropped once the
    migration is recorded. An expression may use the column it sets, but no other column that is
    set with it: LanceDB evaluates them one after another in no fixed order (measured).

    Attributes:
        values: New value by column: text, numbers, booleans or `None`.
        sql: New value by column as a SQL expression over the row (no `CASE WHEN`).
        where: SQL condition; by default every row.
    """

    values: Mapping[str, Literal] = field(default_factory=dict)
    sql: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    where: str | None = field(default=None, kw_only=True)

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
            rewriting=True, destructive=True, reversible="restoring the table_version before"
        )

    @property
    def shows(self) -> bool:
        return False

    @property
    def needs_savepoint(self) -> bool:
        return True

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
            if self.values.get(column, 0) is None and not before.schema.field(column).nullable:
                raise self.refuse(
                    f"column {column!r} forbids NULL.", "Allow it first with op.SetNullable."
                )
        return before

    async def apply(self, target: Target) -> int:
        if not self.sql:
            return await target.update(values=self.values, sql={}, where=self.where)
        if not self.existing(target.state).has(target.witness):
            await target.add_columns([pa.field(target.witness, pa.bool_())])
        todo = f"{quote(target.witness)} IS NULL"
        return await target.update(
            values={**self.values},
            sql={**self.sql, target.witness: "true"},
            where=f"({self.where}) AND {todo}" if self.where else todo,
        )


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
            destructive=True,
            reversible="its inverse" if self.inverse else "restoring the table_version before",
        )

    @property
    def shows(self) -> bool:
        return False

    @property
    def needs_savepoint(self) -> bool:
        return True

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
