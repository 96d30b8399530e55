"""Predicts the next commits of a migration to a table, and orders its operations. No I/O.

Every commit is announced in the journal before it is made. The commits of several operations on
one table are announced together where that is safe; a commit that was not predicted is announced
when it is made. Commits are made by `commits.tracked_table`; after a crash, `execution.recovery`
finds out which of them were made.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from aiomigrate.commits import effects
from aiomigrate.commits.effects import Change, Effect, create_effect, shape_effect
from aiomigrate.errors import AiomigrateError
from aiomigrate.migration.model import Script
from aiomigrate.operations.base import Missing, Operation
from aiomigrate.operations.target import Target
from aiomigrate.schema.state import Index, TableState

MAX_OPERATIONS = 8
"""Most operations predicted together: 16 take 10 ms, 100 more than a second (measured)."""

WitnessedOperation = tuple[Operation, str]
"""An operation and the name of its witness column."""


async def predict_commits(
    operations: Iterable[WitnessedOperation], state: TableState | None
) -> list[Effect]:
    """Returns the effects of the next commits to a table, in order; empty if unknown.

    The prediction ends where, after a crash, the table could not show which commits were made.
    The next run repeats operations whose effect the table does not show. So only operations that
    the table shows, and that keep all columns, may follow one of those; and operations that the
    table shows must still be recognised as done after every later predicted commit. Each operation
    is checked against all later commits: therefore at most `MAX_OPERATIONS` are predicted.

    Args:
        operations: The next operations on this table; consumed only as far as needed.
        state: The table before them, `None` if it does not exist.
    """
    predicted: list[Effect] = []
    before: list[tuple[Operation, str, TableState | None]] = []
    for operation, witness in itertools.islice(operations, MAX_OPERATIONS):
        if state is None and operation.when_missing is Missing.SKIP:
            break  # the operation would run if the table is created meanwhile
        future = _PredictedTable(state, witness)
        try:
            if not operation.done(state, witness):
                await operation.apply(cast("Target", future))
        except (_UnpredictedError, AiomigrateError):  # announced when it runs
            break
        if not operation.shows and not all(earlier.shows for earlier, _, _ in before):
            break
        if not all(_may_follow(now, *earlier) for now in future.states for earlier in before):
            break
        predicted += future.effects
        state = future.state
        if not (operation.shows or operation.repeats):
            break
        before.append((operation, witness, state))
    return predicted


def _may_follow(
    now: TableState, operation: Operation, witness: str, after: TableState | None
) -> bool:
    """Returns whether a predicted state is safe while an earlier operation may not be done.

    Args:
        now: The predicted state.
        operation: The earlier operation.
        witness: Its witness column.
        after: The state after it.
    """
    if not operation.shows:
        kept = {(f.name, f.type) for f in now.schema}
        return after is not None and all((f.name, f.type) in kept for f in after.schema)
    try:
        return operation.done(now, witness)
    except AiomigrateError:
        return False


UNPREDICTED = frozenset({
    "name", "sibling", "progress", "add_fact", "drop", "overwrite", "copy_to", "delete",
    "insert_missing", "optimize", "fill", "compute", "ask", "uncovered", "sample", "nearest",
    "set_schema_metadata", "free_bytes", "is_live", "batches",
})  # fmt: skip
"""The members of `Target` after whose use nothing more is predicted. All others are predicted."""


class _UnpredictedError(Exception):
    """An operation needs data of the table, or makes a commit that cannot be predicted."""


class _PredictedTable:
    """A table after the predicted commits: the part of `Target` that can be predicted."""

    def __init__(self, state: TableState | None, witness: str) -> None:
        self.state = state
        self.witness = witness
        self.effects: list[Effect] = []
        self.states: list[TableState] = []

    def __getattr__(self, name: str) -> Any:
        if name in UNPREDICTED:
            raise _UnpredictedError(name)
        raise AttributeError(name)

    def _commit(self, change: Change) -> None:
        self.state, effect = change
        self.states.append(self.state)
        self.effects.append(effect)

    @property
    def _current(self) -> TableState:
        if self.state is None:
            raise _UnpredictedError
        return self.state

    async def create(self, schema: pa.Schema, rows: pa.Table | None = None) -> None:
        self._commit((TableState(schema), create_effect(schema, rows)))

    async def add_columns(self, fields: Sequence[pa.Field[Any]]) -> None:
        self._commit(effects.add_columns(self._current, fields))

    async def drop_columns(self, names: Sequence[str]) -> None:
        self._commit(effects.drop_columns(self._current, names))

    async def alter_columns(self, alterations: Sequence[Mapping[str, Any]]) -> None:
        self._commit(effects.alter_columns(self._current, alterations))

    async def set_metadata(self, column: str, metadata: Mapping[str, str | None]) -> None:
        self._commit((self._current, shape_effect(self._current)))

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> None:
        self._commit(effects.create_index(self._current, index))

    async def cover(self, index: Index, timeout_s: float) -> None:
        """Assumes that no other writer commits: then the index covers all rows."""

    async def drop_index(self, name: str) -> None:
        self._commit(effects.drop_index(self._current, name))

    async def update(
        self, *, values: Mapping[str, Any], sql: Mapping[str, str], where: str | None, **_how: Any
    ) -> int:
        """Assumes the usual case: some rows match, and one commit blocks no other writer."""
        self._commit((self._current, effects.update(values, sql, where)))
        return 0

    update_in_batches = update

    async def count_rows(self, where: str | None = None) -> int:
        return 0  # operations count rows that they will delete


def chains(operations: Sequence[Operation], done: Collection[int]) -> list[list[int]]:
    """Returns chains of operations that may run concurrently, each in its own order. Pure.

    Operations on one table keep their order. Operations on different tables wait for each other
    only if one may depend on the success of another: if a table is dropped, code runs, work is
    paid for, or an operation concerns more than one table.

    Args:
        operations: The operations of a migration.
        done: Positions of the operations that are complete.

    Returns:
        Chains of positions, empty if all operations are complete.
    """
    left = [position for position in range(len(operations)) if position not in done]
    if not all(_is_independent(operation) for operation in operations):
        return [left] if left else []
    by_table: dict[str | None, list[int]] = {}
    for position in left:
        by_table.setdefault(operations[position].table, []).append(position)
    return list(by_table.values())


def is_predictable(operation: Operation, table: str | None) -> bool:
    """Returns whether the commits of an operation can be predicted with earlier ones on a table."""
    return is_declarative(operation) and operation.table == table


def is_declarative(operation: Operation) -> bool:
    """Returns whether an operation neither runs code nor does work that is paid for."""
    return not operation.runs_code and operation.identity is None


def _is_independent(operation: Operation) -> bool:
    return (
        is_declarative(operation)
        and (operation.needs_savepoint or not operation.traits.destructive)
        and operation.tables == (operation.table,)
    )


def is_quick(script: Script) -> bool:
    """Returns whether a migration neither rewrites rows nor runs code."""
    return not any(o.traits.rewriting or o.runs_code for o in script.operations)
