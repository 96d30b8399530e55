"""The functions of migrations: running one, and the context through which it works.

Every commit that a function makes through its context is recorded, so that it can be undone.
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
from aiomigrate.execution.open_tables import OpenTables
from aiomigrate.migration.model import Params, Script
from aiomigrate.operations.base import Operation
from aiomigrate.operations.rows import Run
from aiomigrate.schema.state import TableState

MAX_MERGE_BYTES = 1_000_000
"""Of one `merge`: its rows are kept in the journal until the migration ends."""

Apply = Callable[[Operation, TableTarget], Awaitable[None]]


class RecordedTable:
    """A table of a `Context`. Reads see its latest version; each write is one recorded commit.

    Before each write, what it will do is made durable in the journal, so that after a crash the
    next run knows it as ours and can return the table to where the migration began. Batch writes:
    one commit for many rows. The lease is checked before every write.
    """

    def __init__(self, target: TableTarget) -> None:
        """Wraps a table that the migration touches."""
        self._target = target

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

    async def count_rows(self, where: str | None = None) -> int:
        """Returns how many rows match, all by default.

        Raises:
            OperationError: The table does not exist.
            StoreError: LanceDB failed, or the condition is no SQL.
        """
        return await self._target.count_rows(where)

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
        """Yields the matching rows in batches of at most `rows`, as they were at the start.

        Raises:
            OperationError: The table does not exist.
            StoreError: LanceDB failed, or the condition is no SQL.
        """
        async for batch in self._target.table.batches(where, columns, rows):
            yield batch

    async def add(self, rows: pa.Table | Sequence[Mapping[str, Any]]) -> None:
        """Appends rows in one commit; nothing happens for none.

        Args:
            rows: An Arrow table, or dictionaries that are converted with the table's schema;
                columns left out are NULL.

        Raises:
            LeaseLostError: Another process has taken over; nothing was written.
            StoreError: LanceDB refused the rows.
        """
        data = self._arrow(rows)
        if len(data):
            await self._target.add(data)

    async def merge(self, rows: pa.Table | Sequence[Mapping[str, Any]], *, on: str) -> int:
        """Updates the rows whose key is there and inserts the others, in one commit.

        Args:
            rows: As for `add`, at most `MAX_MERGE_BYTES` (use several calls for more).
            on: The key column.

        Returns:
            How many rows were changed; 0 for none.

        Raises:
            OperationError: The rows are too many for one call.
            LeaseLostError: Another process has taken over; nothing was written.
            StoreError: LanceDB refused the rows.
        """
        data = self._arrow(rows)
        if data.nbytes > MAX_MERGE_BYTES:
            raise OperationError(
                f"merge into {self.name!r}: {data.nbytes} bytes in one call.",
                f"Merge at most {MAX_MERGE_BYTES} bytes at a time.",
            )
        return await self._target.merge(on, data) if len(data) else 0

    async def update(
        self,
        values: Mapping[str, Any] | None = None,
        *,
        sql: Mapping[str, str] | None = None,
        where: str | None = None,
    ) -> int:
        """Sets columns of the matching rows in one commit; returns how many rows.

        Raises:
            LeaseLostError: Another process has taken over; nothing was written.
            StoreError: LanceDB refused it.
        """
        return await self._target.update(values=values or {}, sql=sql or {}, where=where) or 0

    async def delete(self, where: str) -> int:
        """Deletes the matching rows in one commit; returns how many there were.

        Raises:
            LeaseLostError: Another process has taken over; nothing was written.
            StoreError: LanceDB refused it.
        """
        return await self._target.delete(where)

    def _arrow(self, rows: pa.Table | Sequence[Mapping[str, Any]]) -> pa.Table:
        if isinstance(rows, pa.Table):
            return rows
        return pa.Table.from_pylist([dict(row) for row in rows], schema=self.schema)


class Context:
    """Given to a migration's `up`.

    Attributes:
        params: The run's parameters.
        took_connection: Whether the function asked for the connection.
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
        """Built by the executor."""
        self.params = params
        self.took_connection = False
        self._connection = connection
        self.log = log
        self._script = script
        self._tables = tables
        self._apply = apply
        self._progress = progress

    @property
    def connection(self) -> Any:
        """LanceDB's `AsyncConnection`.

        Commits made through it are not recorded: after a crash they count as someone else's, and a
        person must decide. Prefer `table`.
        """
        self.took_connection = True
        return self._connection

    def table(self, name: str | None = None) -> RecordedTable:
        """Returns a table that this migration touches, the migration's own by default.

        The table may not exist yet: see `RecordedTable.exists`.

        Raises:
            InvalidMigrationError: The migration does not declare that it touches the table.
        """
        return RecordedTable(self._target_of(name))

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

    async def apply(self, operation: Operation) -> None:
        """Runs one declarative operation; nothing happens when its effect is already there.

        Args:
            operation: On its own table, or on the migration's.

        Raises:
            OperationError: It does not fit the table.
            InvalidMigrationError: The migration does not touch that table.
            LeaseLostError: Another process has taken over; nothing was written.
        """
        bound = operation.on(self._script.table)
        for name in bound.tables:
            self._target_of(name)
        if isinstance(bound, Run):
            raise OperationError(
                "A function applies op.Run.", "Call that function with the context instead."
            )
        for simple in bound.expand():
            await self._apply(simple, self._target_of(simple.table))

    def progress(self, done: int, total: int | None = None) -> None:
        """Tells how far the function is, in whatever it counts. Costs nothing."""
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
        """Binds to a database.

        Args:
            connection: LanceDB's connection, which functions are given.
            applier: Applies the operations that a function asks for.
            tables: The open tables, which a function makes stale.
            params: The run's parameters.
            progress: Called with how far a function is.
        """
        self._connection = connection
        self._applier = applier
        self._tables = tables
        self._params = params
        self._progress = progress

    async def run(self, attempt: Attempt, operation: Run, log: Any) -> None:
        """Runs a migration's function with a context.

        Raises:
            OperationError: It raised `CancelledError` or `SystemExit` by itself.
            Exception: What it raised.
        """
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
            await operation.function(context)
            attempt.acted = context.took_connection or any(
                t.commits for t in attempt.tables.values()
            )
        except anyio.get_cancelled_exc_class() as exc:
            await anyio.lowlevel.checkpoint_if_cancelled()  # the run's own goes on
            raise OperationError(
                f"{operation.describe()} raised {type(exc).__name__}, but nobody cancelled it.",
                "Await tasks that were cancelled with contextlib.suppress(CancelledError).",
            ) from exc
        except SystemExit as exc:
            raise OperationError(
                f"{operation.describe()} called sys.exit({exc.code!r}).",
                "Raise an error to make the migration fail, or return.",
            ) from exc
