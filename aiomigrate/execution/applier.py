"""One operation on one table, until its effect is there; and removing what only the way needed.

Looks, acts, and on a conflict looks again. In what order operations run, and what is recorded of
them, is for `executor`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import anyio

from aiomigrate import events as ev
from aiomigrate.commits.savepoints import Guard, drop_branch
from aiomigrate.commits.table_target import TableTarget
from aiomigrate.concurrency import run_each
from aiomigrate.errors import (
    CommitConflictError,
    SchemaMismatchError,
    StaleHandleError,
    StoreError,
    TableExistsError,
    WriterCongestionError,
)
from aiomigrate.migration.checksum import operation_digest
from aiomigrate.migration.model import Script
from aiomigrate.operations.base import Missing, Operation
from aiomigrate.operations.rows import Run
from aiomigrate.schema.state import WITNESS_PREFIX, TableState, differences
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Table

_ATTEMPTS = 40
_RETRYABLE = (CommitConflictError, StaleHandleError, WriterCongestionError, TableExistsError)

Progress = Callable[[Script, str, int, int | None], None]
"""Told of a step's progress: script, what it is doing, done, total."""


def witness_name(script: Script, operation: Operation, earlier: Sequence[Operation]) -> str:
    """Returns the column that belongs to one operation of one migration.

    Named by what the operation does, not where it stands: when a script is corrected around an
    update that took effect already, the corrected script knows that it did.

    Args:
        script: The migration.
        operation: The operation.
        earlier: Those before it.

    Returns:
        The name, empty where it needs none.
    """
    if not operation.witnessed:
        return ""
    digest = _operation_key(operation)
    same = sum(
        _operation_key(other) == digest for other in earlier if _may_share_key(operation, other)
    )
    return f"{WITNESS_PREFIX}{script.version}_{digest[:12]}" + (f"_{same}" if same else "")


def _may_share_key(one: Operation, other: Operation) -> bool:
    """Returns whether two could have one mark; cheap, where a mark is not."""
    if one.identity is not None or other.identity is not None:
        return one.identity == other.identity
    return type(one) is type(other) and one.table == other.table


def _operation_key(operation: Operation) -> str:
    if operation.identity is None:
        return operation_digest(operation)
    return hashlib.sha256(operation.identity.encode()).hexdigest()


class Applier:
    """Applies operations under one lease."""

    def __init__(self, store: Store, check: Guard, *, progress: Progress, log: Any) -> None:
        """Binds to a database.

        Args:
            store: The database.
            check: Raises unless the lease is safely ours; asked before every commit.
            progress: Told how operations proceed.
            log: Bound logger.
        """
        self._store = store
        self._check = check
        self._progress = progress
        self._log = log

    async def apply(
        self, operation: Operation, target: TableTarget, script: Script, witness: str
    ) -> None:
        """Runs one operation until its effect is there: look, act, and on a conflict look again.

        Raises:
            OperationError: It does not fit the table as it is.
            SchemaMismatchError: The table is not as predicted afterwards.
            StoreError: LanceDB failed.
        """
        target.witness = witness

        def tell(done: int, total: int | None, note: str) -> None:
            words = operation.describe()
            self._progress(script, f"{words} ({note})" if note else words, done, total)

        target.on_progress = tell
        if target.state is None and operation.when_missing is Missing.SKIP:
            return
        for attempt in range(_ATTEMPTS):
            if operation.done(target.state, witness):
                return
            expected = operation.predict(target.state, witness)
            seen = len(target.foreign)
            try:
                await operation.apply(target)
            except _RETRYABLE as exc:
                if attempt == _ATTEMPTS - 1:
                    raise
                self._log.debug(ev.COMMIT_RETRIED, table=target.name, error=exc.what)
                target.retries += 1
                await _pause(attempt)
                await target.reopen()
                continue
            except StoreError:
                # Unknown: the store may have applied it before it failed. Look, never guess.
                await target.reopen()
                if operation.done(target.state, witness):
                    return
                raise
            if len(target.foreign) == seen:
                _check_prediction(operation, expected, target)
            return

    async def clean(
        self,
        tables: Iterable[str],
        branches: Mapping[str, str],
        opened: Mapping[str, Table] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Removes what a recorded migration needed only while it ran; harmless when repeated.

        Args:
            tables: Tables with witness columns to drop.
            branches: Savepoint branch by table.
            opened: Handles that are open, by table.

        Returns:
            table_version before and after (and what others committed between), of each table that
            was committed to.

        Raises:
            LeaseLostError: Another process has taken over.
        """
        cleaned: dict[str, dict[str, Any]] = {}

        async def drop_witnesses(table: Table) -> None:
            state = await table.state()
            if (ours := state.witnesses()) and not state.is_leftover:
                await self._check()
                before = await table.version()
                after = await table.drop_columns(ours)
                cleaned[table.name] = {"before": before, "after": after}
                if after > before + 1:  # others came between
                    cleaned[table.name]["foreign"] = [[before + 1, after - 1]]

        async def drop_savepoint(name: str) -> None:
            await self._check()
            await drop_branch(self._store, name, branches[name], (opened or {}).get(name))

        await run_each(tables, lambda name: self._retry_change(name, drop_witnesses))
        await run_each(branches, drop_savepoint)
        return cleaned

    async def fence(
        self,
        tables: Iterable[str],
        announce: Callable[[str, int, TableState], Awaitable[None]] | None = None,
    ) -> None:
        """Makes schema changes fail that a dead or paused process has in flight (facts: 10d).

        Args:
            tables: Where; those that do not exist are passed over.
            announce: Makes durable that such a commit comes: table, table_version it is based on,
                and the state, which it leaves as it is.
        """

        async def rename_to_itself(table: Table) -> None:
            state = await table.state()
            if announce is not None:
                await announce(table.name, await table.version(), state)
            await self._check()
            column = state.schema.names[0]
            await table.alter_columns([{"path": column, "rename": column}])

        for name in tables:
            await self._retry_change(name, rename_to_itself)

    async def _retry_change(self, name: str, change: Callable[[Table], Awaitable[None]]) -> None:
        """Changes a table if it exists, on a fresh handle each time another commit came first."""
        for attempt in range(_ATTEMPTS):
            table = await self._store.find(name)
            if table is None:
                return
            try:
                await change(table)
            except _RETRYABLE:
                if attempt == _ATTEMPTS - 1:
                    raise
                await _pause(attempt)
            else:
                return


async def _pause(attempt: int) -> None:
    await anyio.sleep(min(0.005 * 2**attempt, 0.25))


def _check_prediction(
    operation: Operation, expected: TableState | None, target: TableTarget
) -> None:
    """Compares a table with what the operation predicted.

    Raises:
        SchemaMismatchError: They differ.
    """
    if expected is None or target.state is None or isinstance(operation, Run):
        return
    if expected.same(target.state):
        return
    if found := differences(expected.shape(), target.state.shape()):
        raise SchemaMismatchError(
            f"After {operation.describe()!r} table {target.name!r} is not as predicted: "
            + "; ".join(found)
            + ".",
            "Another process may be changing its schema; run again, or report this as a defect.",
        )
