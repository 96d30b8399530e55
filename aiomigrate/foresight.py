"""What the commits that come next will do, as far as operations tell it beforehand. No I/O.

Each commit of ours is announced in the journal before it is made. Those of several operations on
one table are told at once where that is safe; what then happens otherwise is announced when it
does. Making the commits is `touched`, telling after a crash which were made is `recovery`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from aiomigrate import effects
from aiomigrate.effects import CREATE, Change, Effect, shape_effect
from aiomigrate.errors import AiomigrateError
from aiomigrate.operations.base import Index, Missing, Operation, TableState, Target

MOST = 8
"""Operations told together: 16 take 10 ms to foresee, 100 more than a second (measured)."""

Named = tuple[Operation, str]
"""An operation, and the witness column that belongs to it."""


async def foreseen(operations: Iterable[Named], state: TableState | None) -> list[Effect]:
    """Returns what the next commits to a table will do, in their order; nothing if unknown.

    It ends where a crash could leave more than a look can tell. Whoever goes on after one does
    again what does not show, so only what keeps all columns, and shows, may come after that; and
    what shows must still be seen to be done after each commit that is told with it. Each is asked
    after each: so no more than `MOST` operations are told together.

    Args:
        operations: Those that come next, of this one table; no more are taken than are looked at.
        state: The table, `None` if it does not exist.
    """
    told: list[Effect] = []
    before: list[tuple[Operation, str, TableState | None]] = []
    for operation, witness in itertools.islice(operations, MOST):
        if state is None and operation.when_missing is Missing.SKIP:
            break  # a table that comes later would not be passed over
        future = _Future(state, witness)
        try:
            if not operation.done(state, witness):
                await operation.apply(cast("Target", future))
        except (_UnforeseenError, AiomigrateError):  # told when its turn comes
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


class _UnforeseenError(Exception):
    """An operation asks what only the table can tell, or makes a commit not known beforehand."""


class _Future:
    """A table as it will be: the part of `Target` whose commits are known beforehand."""

    def __init__(self, state: TableState | None, witness: str) -> None:
        self.state = state
        self.witness = witness
        self.effects: list[Effect] = []
        self.states: list[TableState] = []

    def __getattr__(self, name: str) -> Any:
        raise _UnforeseenError(name)

    def _becomes(self, change: Change) -> None:
        self.state, effect = change
        self.states.append(self.state)
        self.effects.append(effect)

    @property
    def _now(self) -> TableState:
        if self.state is None:
            raise _UnforeseenError
        return self.state

    async def create(self, schema: pa.Schema, rows: pa.Table | None = None) -> None:
        self._becomes((TableState(schema), CREATE))

    async def add_columns(self, fields: Sequence[pa.Field[Any]]) -> None:
        self._becomes(effects.adding(self._now, fields))

    async def drop_columns(self, names: Sequence[str]) -> None:
        self._becomes(effects.dropping(self._now, names))

    async def alter_columns(self, alterations: Sequence[Mapping[str, Any]]) -> None:
        self._becomes(effects.altering(self._now, alterations))

    async def set_metadata(self, column: str, metadata: Mapping[str, str | None]) -> None:
        self._becomes((self._now, shape_effect(self._now)))

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> None:
        self._becomes(effects.indexing(self._now, index))

    async def cover(self, index: Index, timeout_s: float) -> None:
        """Hopes that nobody writes meanwhile: then there is nothing to cover."""

    async def drop_index(self, name: str) -> None:
        self._becomes(effects.unindexing(self._now, name))

    async def update(
        self, *, values: Mapping[str, Any], sql: Mapping[str, str], where: str | None, **_how: Any
    ) -> int:
        """Takes the usual: some rows match, and one commit holds nobody up."""
        self._becomes((self._now, effects.updating(values, sql, where)))
        return 0

    update_in_batches = update

    async def count_rows(self, where: str | None = None) -> int:
        return 0  # what is counted are rows to be deleted
