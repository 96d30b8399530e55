"""What the commits that come next will do, as far as operations tell it beforehand. No I/O.

Each commit of ours is announced in the journal before it is made. Those of several operations on
one table are told at once where that is safe; what then happens otherwise is announced when it
does. Making the commits is `touched`, telling after a crash which were made is `recovery`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from aiomigrate.commits import effects
from aiomigrate.commits.effects import CREATE, Change, Effect, shape_effect
from aiomigrate.errors import AiomigrateError
from aiomigrate.migration.model import Script
from aiomigrate.operations.base import Missing, Operation
from aiomigrate.operations.rows import Run
from aiomigrate.operations.target import Target
from aiomigrate.schema.state import Index, TableState

MAX_OPERATIONS = 8
"""Operations told together: 16 take 10 ms to foresee, 100 more than a second (measured)."""

WitnessedOperation = tuple[Operation, str]
"""An operation, and the witness column that belongs to it."""


async def predict_commits(
    operations: Iterable[WitnessedOperation], state: TableState | None
) -> list[Effect]:
    """Returns what the next commits to a table will do, in their order; nothing if unknown.

    It ends where a crash could leave more than a look can tell. Whoever goes on after one does
    again what does not show, so only what keeps all columns, and shows, may come after that; and
    what shows must still be seen to be done after each commit that is told with it. Each is asked
    after each: so no more than `MAX_OPERATIONS` operations are told together.

    Args:
        operations: Those that come next, of this one table; no more are taken than are looked at.
        state: The table, `None` if it does not exist.
    """
    told: list[Effect] = []
    before: list[tuple[Operation, str, TableState | None]] = []
    for operation, witness in itertools.islice(operations, MAX_OPERATIONS):
        if state is None and operation.when_missing is Missing.SKIP:
            break  # a table that comes later would not be passed over
        future = _PredictedTable(state, witness)
        try:
            if not operation.done(state, witness):
                await operation.apply(cast("Target", future))
        except (_UnpredictedError, AiomigrateError):  # told when its turn comes
            break
        if not operation.shows and not all(earlier.shows for earlier, _, _ in before):
            break
        if not all(_may_follow(now, *earlier) for now in future.states for earlier in before):
            break
        told += future.effects
        state = future.state
        if not (operation.shows or operation.repeats):
            break
        before.append((operation, witness, state))
    return told


def _may_follow(
    now: TableState, operation: Operation, witness: str, after: TableState | None
) -> bool:
    """Returns whether a table may come to be so while it is unknown if an operation is done."""
    if not operation.shows:
        kept = {(f.name, f.type) for f in now.schema}
        return after is not None and all((f.name, f.type) in kept for f in after.schema)
    try:
        return operation.done(now, witness)
    except AiomigrateError:
        return False


class _UnpredictedError(Exception):
    """An operation asks what only the table can tell, or makes a commit not known beforehand."""


class _PredictedTable:
    """A table as it will be: the part of `Target` whose commits are known beforehand."""

    def __init__(self, state: TableState | None, witness: str) -> None:
        self.state = state
        self.witness = witness
        self.effects: list[Effect] = []
        self.states: list[TableState] = []

    def __getattr__(self, name: str) -> Any:
        raise _UnpredictedError(name)

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
        self._commit((TableState(schema), CREATE))

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
        """Hopes that nobody writes meanwhile: then there is nothing to cover."""

    async def drop_index(self, name: str) -> None:
        self._commit(effects.drop_index(self._current, name))

    async def update(
        self, *, values: Mapping[str, Any], sql: Mapping[str, str], where: str | None, **_how: Any
    ) -> int:
        """Takes the usual: some rows match, and one commit holds nobody up."""
        self._commit((self._current, effects.update(values, sql, where)))
        return 0

    update_in_batches = update

    async def count_rows(self, where: str | None = None) -> int:
        return 0  # what is counted are rows to be deleted


def chains(operations: Sequence[Operation], done: Collection[int]) -> list[list[int]]:
    """Returns what is to be run at once, and in which order within each. Pure.

    Operations of one table stay in order. Those of others wait for each other only where one
    may need another to have succeeded: where a table is dropped, code runs, work is paid for, or an
    operation concerns more than one table.

    Args:
        operations: Of a migration.
        done: Positions of those that are complete.

    Returns:
        Chains of positions.
    """
    left = [position for position in range(len(operations)) if position not in done]
    if not all(_is_independent(operation) for operation in operations):
        return [left] if left else []
    by_table: dict[str | None, list[int]] = {}
    for position in left:
        by_table.setdefault(operations[position].table, []).append(position)
    return list(by_table.values())


def is_predictable(operation: Operation, table: str | None) -> bool:
    """Returns whether the commits of an operation on a table can be predicted with those before."""
    return is_declarative(operation) and operation.table == table


def is_declarative(operation: Operation) -> bool:
    """Returns whether an operation is neither code nor work that is paid for."""
    return not isinstance(operation, Run) and operation.identity is None


def _is_independent(operation: Operation) -> bool:
    return (
        is_declarative(operation)
        and (operation.needs_savepoint or not operation.traits.destructive)
        and operation.tables == (operation.table,)
    )


def advance_detail(done: Collection[int]) -> dict[str, Any]:
    """Returns what an `advanced` event tells of the operations that are complete. Pure.

    Args:
        done: Their positions.
    """
    count = next(number for number in itertools.count() if number not in done)
    also = sorted(position for position in done if position > count)
    return {"operations": count, **({"also": also} if also else {})}


def is_quick(script: Script) -> bool:
    """Returns whether a migration neither rewrites rows nor runs code."""
    return not any(o.traits.rewriting or isinstance(o, Run) for o in script.operations)
