"""Applies one operation to one table, and removes witness columns and savepoint branches.

Every step reads the table, acts, and after a conflict reads it again. The order of operations and
what is recorded about them are decided in `execution.executor`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import anyio

from aiomigrate import events as ev
from aiomigrate.commits.commit_span import CommitSpan
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
from aiomigrate.schema.state import WITNESS_PREFIX, TableState, differences
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Table

_ATTEMPTS = 40
_RETRYABLE = (CommitConflictError, StaleHandleError, WriterCongestionError, TableExistsError)

Progress = Callable[[Script, str, int, int | None], None]
"""Called with the progress of a step: script, description of the work, done, total."""


def witness_name(script: Script, operation: Operation, earlier: Sequence[Operation]) -> str:
    """Returns the name of the witness column of one operation of one migration. Pure.

    The name depends on what the operation does, not on its position. If other operations of the
    script are corrected, the corrected script still recognises an update that has taken effect.

    Args:
        script: The migration.
        operation: The operation.
        earlier: The operations before it.

    Returns:
        The name, empty if the operation needs none.
    """
    if not operation.witnessed:
        return ""
    digest = _operation_key(operation)
    same = sum(
        _operation_key(other) == digest for other in earlier if _may_share_key(operation, other)
    )
    return f"{WITNESS_PREFIX}{script.version}_{digest[:12]}" + (f"_{same}" if same else "")


def _may_share_key(one: Operation, other: Operation) -> bool:
    """Returns whether two operations may have the same key, without computing the keys."""
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
        """Binds to a database without I/O.

        Args:
            store: The database.
            check: Raises `LeaseLostError` unless this process safely holds the lease; called
                before every commit.
            progress: Called with the progress of each operation.
            log: Bound logger.
        """
        self._store = store
        self._check = check
        self._progress = progress
        self._log = log

    async def apply(
        self, operation: Operation, target: TableTarget, script: Script, witness: str
    ) -> None:
        """Applies one operation: reads the table, acts, and retries after a conflict.

        Does nothing if the effect already exists, or if the table is missing and the operation
        skips missing tables. A crash or a cancellation leaves the commits that were made.

        Args:
            operation: The operation.
            target: Its table, opened.
            script: Its migration.
            witness: Its witness column, empty if it needs none.

        Raises:
            LeaseLostError: Another process has taken over; nothing more was written.
            OperationError: The operation does not fit the table, or its SQL expressions contain
                double quotes.
            SchemaMismatchError: The table afterwards is not as predicted.
            StoreError: LanceDB failed, or other commits came first `_ATTEMPTS` times.
        """

        def report(done: int, total: int | None, note: str) -> None:
            text = operation.describe()
            self._progress(script, f"{text} ({note})" if note else text, done, total)

        operation.check_expressions()  # of those that a function applies; a plan checks the others
        target.begin_operation(witness, report)
        if target.state is None and operation.when_missing is Missing.SKIP:
            return
        for attempt in range(_ATTEMPTS):
            if operation.done(target.state, witness):
                return
            expected = operation.predict(target.state, witness)
            foreign = len(target.foreign)
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
                # The store may have committed before it failed: read the table to find out.
                await target.reopen()
                if operation.done(target.state, witness):
                    return
                raise
            if len(target.foreign) == foreign:
                _check_prediction(operation, expected, target)
            return

    async def clean(
        self,
        tables: Iterable[str],
        branches: Mapping[str, str],
        opened: Mapping[str, Table] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Removes the witness columns and savepoint branches of a recorded migration. Idempotent.

        Does nothing where there are none. A crash leaves the rest for the next call.

        Args:
            tables: Tables with witness columns to drop.
            branches: Savepoint branch by table.
            opened: Open handles by table.

        Returns:
            table_version before and after, and the foreign commits between them, of each table that
            was committed to.

        Raises:
            LeaseLostError: Another process has taken over.
            StoreError: LanceDB failed.
        """
        cleaned: dict[str, dict[str, Any]] = {}

        async def drop_witnesses(table: Table) -> None:
            state = await table.state()
            if (witnesses := state.witnesses()) and not state.is_leftover:
                await self._check()
                before = await table.version()
                span = CommitSpan()
                span.begin()
                after = await table.drop_columns(witnesses)
                span.end()
                cleaned[table.name] = {
                    "before": before, "after": after, "committed": span.recorded(),
                }  # fmt: skip
                if after > before + 1:  # foreign commits came between
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
        """Makes pending schema changes of a crashed or paused process fail.

        Renames a column of each table to its own name, a commit that changes nothing else.

        Args:
            tables: The tables; those that do not exist are skipped.
            announce: Announces that commit in the journal, if given: called with the table, the
                table_version that the commit is based on, and the state, which stays the same.

        Raises:
            LeaseLostError: Another process has taken over.
            StoreError: LanceDB failed.
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
        """Changes a table if it exists; retries on a fresh handle if another commit came first."""
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
    """Compares the table with the prediction of the operation.

    Raises:
        SchemaMismatchError: They differ.
    """
    if expected is None or target.state is None or operation.runs_code:
        return
    if expected.same(target.state):
        return
    if found := differences(expected.shape(), target.state.shape()):
        raise SchemaMismatchError(
            f"After {operation.describe()!r} table {target.name!r} is not as predicted: "
            + "; ".join(found)
            + ".",
            "Another process may have changed its schema: run again, and if this happens every "
            "time, report it as a bug.",
        )
