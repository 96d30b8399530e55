"""Runs the functions of migrations, and the context through which they change tables.

Every commit that a function makes through its context is announced in the journal, so that it can
be undone. Undoing it is not done here (`execution.recovery`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pyarrow as pa

from aiomigrate.commits.table_target import TableTarget
from aiomigrate.errors import InvalidMigrationError, OperationError
from aiomigrate.execution.applier import Applier, Progress, witness_name
from aiomigrate.execution.attempt import Attempt
from aiomigrate.execution.context_calls import ContextCalls, awaited
from aiomigrate.execution.open_tables import OpenTables
from aiomigrate.migration.model import Params, Script
from aiomigrate.operations.base import Operation
from aiomigrate.schema.sql import double_quotes
from aiomigrate.schema.state import TableState

MAX_MERGE_BYTES = 1_000_000
"""Most bytes of one `merge`: its rows are stored in the journal until the migration ends."""

Apply = Callable[[Operation, TableTarget], Awaitable[None]]


class RecordedTable:
    """A table of a `Context`. Reads see its latest version; each write is one recorded commit.

    Each write is announced in the journal before it is made, so that after a crash the next run
    recognises it as the migration's and can restore the table to its savepoint. Write many rows
    in one call, since each call is a commit; calls at the same time are made one after another.
    The lease is checked before every write. A call that the function does not await fails the
    migration.

    Attributes:
        calls: The calls of the context and its tables that have not ended.
    """

    def __init__(self, target: TableTarget, calls: ContextCalls) -> None:
        """Wraps an open table that the migration touches."""
        self._target = target
        self.calls = calls

    @property
    def name(self) -> str:
        """The table's name."""
        return self._target.name

    @property
    def state(self) -> TableState | None:
        """Schema and indexes, `None` if the table does not exist."""
        return self._target.state

    @property
    def exists(self) -> bool:
        """Whether the table exists."""
        return self._target.state is not None

    @property
    def schema(self) -> pa.Schema:
        """The table's Arrow schema.

        Raises:
            OperationError: The table does not exist.
        """
        if self._target.state is None:
            raise OperationError(
                f"Table {self.name!r} does not exist.", "Create it in an earlier migration."
            )
        return self._target.state.schema

    @awaited
    async def count_rows(self, where: str | None = None) -> int:
        """Returns the number of matching rows, of all rows by default.

        Raises:
            OperationError: The table does not exist.
            StoreError: LanceDB failed, or the condition is no SQL.
        """
        return await self._target.count_rows(where)

    @awaited
    async def read(
        self, where: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Returns the matching rows as one Arrow table, empty when there are none.

        Raises:
            OperationError: The table does not exist.
            StoreError: LanceDB failed, or the condition is no SQL.
        """
        return await self._target.table.read(where, columns)

    async def batches(
        self,
        where: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        rows: int = 1024,
    ) -> AsyncIterator[pa.RecordBatch]:
        """Yields the matching rows as of the start, in batches of at most `rows` rows.

        Raises:
            OperationError: The table does not exist.
            StoreError: LanceDB failed, or the condition is no SQL.
        """
        async for batch in self._target.table.batches(where, columns, rows):
            yield batch

    @awaited
    async def add(self, rows: pa.Table | Sequence[Mapping[str, Any]]) -> None:
        """Appends rows in one commit; does nothing if there are no rows.

        Args:
            rows: An Arrow table, or dictionaries that are converted with the table's schema;
                missing columns are NULL.

        Raises:
            LeaseLostError: Another process has taken over; nothing was written.
            OperationError: The table does not exist, or the migration has ended.
            StoreError: LanceDB refused the rows.
        """
        data = self._arrow(rows)
        if len(data):
            async with self.calls.turn(self.name):
                await self._target.add(data)

    @awaited
    async def merge(self, rows: pa.Table | Sequence[Mapping[str, Any]], *, on: str) -> int:
        """Updates the rows whose keys exist and inserts the other rows, in one commit.

        Args:
            rows: As for `add`, at most `MAX_MERGE_BYTES` bytes (use several calls for more).
            on: The key column.

        Returns:
            The number of updated and inserted rows; 0 without a commit if there are no rows.

        Raises:
            OperationError: The rows are more than `MAX_MERGE_BYTES`, the table does not exist, or
                the migration has ended.
            LeaseLostError: Another process has taken over; nothing was written.
            StoreError: LanceDB refused the rows.
        """
        data = self._arrow(rows)
        if data.nbytes > MAX_MERGE_BYTES:
            raise OperationError(
                f"merge into {self.name!r}: {data.nbytes} bytes in one call.",
                f"Merge at most {MAX_MERGE_BYTES} bytes at a time.",
            )
        if not len(data):
            return 0
        async with self.calls.turn(self.name):
            return await self._target.merge(on, data)

    @awaited
    async def update(
        self,
        values: Mapping[str, Any] | None = None,
        *,
        sql: Mapping[str, str] | None = None,
        where: str | None = None,
    ) -> int:
        """Sets columns of the matching rows in one commit.

        Args:
            values: Literals by column.
            sql: SQL expressions by column: columns in `backticks`, texts in 'single quotes'.
            where: SQL condition on the rows, `None` for all rows.

        Returns:
            The number of changed rows; 0 if none matched.

        Raises:
            LeaseLostError: Another process has taken over; nothing was written.
            OperationError: The table does not exist, the migration has ended, or an expression
                contains a double-quoted name; nothing was written.
            StoreError: LanceDB refused the update.
        """
        if (wrong := double_quotes(sql or {})) is not None:
            what, remedy = wrong
            raise OperationError(f"Update of table {self.name!r}: {what}", remedy)
        async with self.calls.turn(self.name):
            return await self._target.update(values=values or {}, sql=sql or {}, where=where) or 0

    @awaited
    async def delete(self, where: str) -> int:
        """Deletes the matching rows in one commit; returns their number.

        Raises:
            LeaseLostError: Another process has taken over; nothing was written.
            OperationError: The table does not exist, or the migration has ended.
            StoreError: LanceDB refused the condition.
        """
        async with self.calls.turn(self.name):
            return await self._target.delete(where)

    def _arrow(self, rows: pa.Table | Sequence[Mapping[str, Any]]) -> pa.Table:
        if isinstance(rows, pa.Table):
            return rows
        return pa.Table.from_pylist([dict(row) for row in rows], schema=self.schema)


class Context:
    """The argument of a migration's `up`: its parameters, tables and operations.

    Attributes:
        params: The run's parameters.
        took_connection: Whether the function asked for the connection.
        calls: The calls of the context and its tables that have not ended.
        log: A structlog logger bound to the run and the migration.
    """

    def __init__(
        self,
        script: Script,
        tables: Mapping[str, TableTarget],
        *,
        params: Params,
        connection: Any,
        log: Any,
        apply: Apply,
        progress: Callable[[int, int | None], None],
    ) -> None:
        """Built by `Functions.run`, once per function."""
        self.params = params
        self.took_connection = False
        self.calls = ContextCalls()
        self._connection = connection
        self.log = log
        self._script = script
        self._tables = tables
        self._apply = apply
        self._progress = progress

    @property
    def connection(self) -> Any:
        """LanceDB's `AsyncConnection`.

        Commits made through it are not recorded: after a crash they count as those of another
        writer, and a person must decide how to proceed. Prefer `table`.
        """
        self.took_connection = True
        return self._connection

    def table(self, name: str | None = None) -> RecordedTable:
        """Returns a table that this migration touches, the migration's own by default.

        The table may not exist yet: see `RecordedTable.exists`.

        Raises:
            InvalidMigrationError: The migration does not declare that it touches the table.
        """
        return RecordedTable(self._target_of(name), self.calls)

    def _target_of(self, name: str | None) -> TableTarget:
        wanted = name or self._script.table
        if wanted is None or wanted not in self._tables:
            raise InvalidMigrationError(
                f"{self._script} does not touch table {wanted!r}.",
                f"Declare it: touches={(*sorted(self._tables), wanted)!r}.",
                line=self._script.line,
                version=self._script.version,
            )
        return self._tables[wanted]

    @awaited
    async def apply(self, operation: Operation) -> None:
        """Applies one declarative operation; does nothing if its effect already exists.

        Args:
            operation: An operation on its own table, or on the migration's if it names none.

        Raises:
            OperationError: The operation does not fit the table, its SQL expressions contain
                double quotes, or it is `op.Run`.
            InvalidMigrationError: The migration does not touch the table.
            LeaseLostError: Another process has taken over; nothing was written.
            SchemaMismatchError: The table afterwards is not as predicted.
            StoreError: LanceDB failed.
        """
        bound = operation.on(self._script.table)
        for name in bound.tables:
            self._target_of(name)
        if bound.runs_code:
            raise OperationError(
                "A function applies op.Run.", "Call that function with the context instead."
            )
        async with self.calls.turn(*bound.tables):
            for simple in bound.expand():
                await self._apply(simple, self._target_of(simple.table))

    def progress(self, done: int, total: int | None = None) -> None:
        """Reports the progress of the function. Cheap: nothing is written.

        Args:
            done: Units of work done, in any unit.
            total: Units of work in all, `None` if unknown.
        """
        self._progress(done, total)


class Functions:
    """Runs the functions of migrations under one lease."""

    def __init__(
        self,
        connection: Any,
        applier: Applier,
        tables: OpenTables,
        *,
        params: Params,
        progress: Progress,
    ) -> None:
        """Binds to a database without I/O.

        Args:
            connection: LanceDB's connection, passed on to functions.
            applier: Applies operations on behalf of functions.
            tables: The open tables, which a function makes stale.
            params: The run's parameters.
            progress: Called with the progress of each function.
        """
        self._connection = connection
        self._applier = applier
        self._tables = tables
        self._params = params
        self._progress = progress

    async def run(self, attempt: Attempt, operation: Operation, log: Any) -> None:
        """Runs a migration's function with a context.

        A crash or a cancellation leaves the commits that the function has made.

        Args:
            attempt: The attempt, with open tables; `acted` is set.
            operation: The function.
            log: A logger bound to the run and the migration.

        Raises:
            OperationError: The function did not await a call of its context, raised
                `CancelledError` though the run was not cancelled, or called `sys.exit`.
            Exception: The exception that the function raised.
        """
        function = operation.code
        assert function is not None  # noqa: S101 - the caller asked `runs_code`
        script = attempt.script
        applied: list[Operation] = []

        async def apply(inner: Operation, target: TableTarget) -> None:
            witness = witness_name(script, inner, applied)
            applied.append(inner)
            await self._applier.apply(inner, target, script, witness)

        context = Context(
            script,
            attempt.tables,
            params=self._params,
            connection=self._connection,
            log=log,
            apply=apply,
            progress=lambda done, total: self._progress(script, "running", done, total),
        )
        self._tables.has_run_code = True
        try:
            try:
                await function(context)
            finally:
                not_awaited = await context.calls.end()
            if not_awaited is not None:
                raise not_awaited
            attempt.end_function(took_connection=context.took_connection)
        except anyio.get_cancelled_exc_class() as exc:
            await anyio.lowlevel.checkpoint_if_cancelled()  # raises if the run was cancelled
            raise OperationError(
                f"{operation.describe()} raised {type(exc).__name__}, "
                "but the run was not cancelled.",
                "Suppress CancelledError where the function awaits tasks that it has cancelled.",
            ) from exc
        except SystemExit as exc:
            raise OperationError(
                f"{operation.describe()} called sys.exit({exc.code!r}).",
                "Raise an error to make the migration fail, or return.",
            ) from exc
