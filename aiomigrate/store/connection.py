"""The connection to one database: opens, creates, lists and drops tables, and checks SQL.

Reads and commits of one table are for `store.table`. Tests inject faults by subclassing `Store`
and overriding `call`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import lancedb
import lancedb.index
import pyarrow as pa

from aiomigrate.concurrency import run_each
from aiomigrate.errors import StoreError, TableNotFoundError
from aiomigrate.schema.sql import Statement, as_sql, whole
from aiomigrate.schema.state import TableState
from aiomigrate.store import _native
from aiomigrate.store.calls import Calls, mapped, plain_message
from aiomigrate.store.table import Opened, Table
from aiomigrate.store.uri import is_local, redact, secrets_of

T = TypeVar("T")


class Store(Calls):
    """The tables of one database, through one connection."""

    @classmethod
    async def connect(
        cls,
        uri: str,
        storage_options: Mapping[str, str] | None = None,
        *,
        grace_s: float = 10.0,
    ) -> Store:
        """Connects to a database. LanceDB creates the folder of a local path that is missing.

        Args:
            uri: The URI as `store.uri.locate` returns it.
            storage_options: LanceDB's storage options.
            grace_s: Seconds that a cancelled mutation has to finish.

        Raises:
            StoreError: LanceDB could not connect.
        """
        secrets = secrets_of(uri, storage_options)
        options = dict(storage_options) if storage_options else None
        try:
            connection = await lancedb.connect_async(uri, storage_options=options)
        except (ValueError, RuntimeError, OSError) as exc:
            raise mapped(exc, f"connect to {redact(uri)}", secrets) from None
        return cls(
            connection,
            uri=redact(uri),
            secrets=secrets,
            grace_s=grace_s,
            storage_options=storage_options,
        )

    def close(self) -> None:
        """Closes the connection."""
        self.connection.close()  # type: ignore[no-untyped-call]

    async def table_names(self) -> list[str]:
        """Returns the names of all tables.

        A process killed while it created a table may leave a name that cannot be opened.

        Raises:
            StoreError: LanceDB could not list the tables.
        """
        names: list[str] = []
        token: str | None = None
        while True:
            page = await self.call(
                "list",
                "*",
                lambda t=token: self.connection.list_tables(page_token=t),  # type: ignore[misc]
            )
            names += page.tables
            token = page.page_token
            if not token:
                return names

    async def open(self, name: str) -> Table:
        """Opens a table at its latest version.

        Raises:
            TableNotFoundError: The table does not exist.
            StoreError: The table could not be opened.
        """
        return Table(self, name, await self.open_handle(name))

    async def find(self, name: str) -> Table | None:
        """Opens a table at its latest version; returns `None` if it does not exist.

        Raises:
            StoreError: The table exists but could not be opened.
        """
        try:
            return await self.open(name)
        except TableNotFoundError:
            return None

    async def state_of(self, name: str) -> tuple[int, TableState | None]:
        """Returns a table's table_version and state, `(0, None)` if it does not exist.

        The leftover of a table whose creation was undone counts as not existing.

        Raises:
            StoreError: The table exists but could not be read.
        """
        opened = await self.find_with_state(name)
        return (0, None) if opened is None else (opened.version, opened.state)

    async def find_with_state(self, name: str) -> Opened | None:
        """Opens a table and reads its state; returns `None` if it does not exist.

        The leftover of a table whose creation was undone counts as not existing.

        Raises:
            StoreError: The table exists but could not be read.
        """
        table = await self.find(name)
        state = None if table is None else await table.state()
        if table is None or state is None or state.is_leftover:
            return None
        return Opened(table, await table.version(), state)

    async def find_all(self, names: Sequence[str]) -> dict[str, Opened]:
        """Opens tables, several at a time, and reads their states.

        Returns:
            The tables by name, without those that do not exist.

        Raises:
            StoreError: A table exists but could not be read.
        """
        found: dict[str, Opened] = {}

        async def one(name: str) -> None:
            if (opened := await self.find_with_state(name)) is not None:
                found[name] = opened

        await run_each(names, one)
        return found

    async def has_remains(self, name: str) -> bool:
        """Returns whether the folder of a table that cannot be found contains data files.

        A killed creation of an empty table leaves none. Always `False` for a database that is not
        local.
        """
        if not is_local(self._location):
            return False
        folder = anyio.Path(self._location, f"{name}.lance", "data")
        return await folder.is_dir() and [_ async for _ in folder.iterdir()] != []

    async def create(
        self,
        name: str,
        schema: pa.Schema,
        rows: pa.Table | None = None,
        *,
        overwrite: bool = False,
    ) -> Table:
        """Creates a table, empty unless rows are given.

        This is not exclusive: it overwrites a table that another process creates at the same
        time. Then the `version()` of the result is above 1, and the previous version has the
        other process's content.

        Args:
            name: Name of the table.
            schema: Its schema.
            rows: Its rows.
            overwrite: Whether to replace an existing table.

        Raises:
            TableExistsError: The table exists, and `overwrite` is not set.
            StoreError: LanceDB failed.
        """
        none = pa.RecordBatchReader.from_batches(schema, [])
        reader = none if rows is None else rows.to_reader()
        return await self._create(name, reader, overwrite=overwrite)

    async def _create(self, name: str, reader: pa.RecordBatchReader, *, overwrite: bool) -> Table:
        """Creates a table through lancedb's native layer, see `_native.create_table`."""
        mode = "overwrite" if overwrite else "create"
        made = await self.call(
            mode,
            name,
            lambda: _native.create_table(self.connection, name, mode, reader),
            mutates=True,
        )
        return Table(self, name, made)

    async def create_from(
        self,
        name: str,
        schema: pa.Schema,
        batches: AsyncIterator[pa.RecordBatch],
        *,
        overwrite: bool = False,
    ) -> Table:
        """Creates a table from a stream in one commit; memory is bounded by the batch size.

        An overwrite never fails because of other commits: it discards those made since the stream
        began from the table's head. To detect this, compare the new version with the previous one
        plus one.

        Args:
            name: Name of the table.
            schema: Its schema.
            batches: Its rows.
            overwrite: Whether to replace an existing table.

        Raises:
            StoreError: LanceDB failed; nothing was committed.
            Exception: The stream raised it; nothing was committed.
        """
        failures: list[BaseException] = []

        async def next_batch() -> pa.RecordBatch | None:
            try:
                return await anext(batches, None)
            except BaseException as exc:
                failures.append(exc)
                raise

        refused: StoreError | None = None
        async with anyio.from_thread.BlockingPortal() as portal:

            def pull() -> Iterator[pa.RecordBatch]:  # runs in a thread of LanceDB
                while (batch := portal.call(next_batch)) is not None:
                    yield batch

            reader = pa.RecordBatchReader.from_batches(schema, pull())
            try:
                table = await self._create(name, reader, overwrite=overwrite)
            except StoreError as exc:
                refused = exc  # raised below, as a portal wraps exceptions that leave it
        if refused is not None:
            raise (failures[0] if failures else refused) from (refused if failures else None)
        return table

    async def drop(self, name: str) -> None:
        """Drops a table, or the leftover of one; does nothing if it does not exist."""
        await self.call(
            "drop",
            name,
            lambda: self.connection.drop_table(name, ignore_missing=True),
            mutates=True,
        )


_PREFIXES = (
    r"^(Invalid (user )?input, |Invalid (user )?input: |LanceError\(\w+\): |Schema error: )+"
)


class SqlCheck:
    """Checks SQL statements by running each on an empty table in memory."""

    def __init__(self) -> None:
        """Connects to nothing yet; the first check opens the database in memory."""
        self._tables = itertools.count()
        self._connection: Any = None
        self._valid: set[tuple[object, ...]] = set()

    async def refusal(self, statement: Statement, schema: pa.Schema) -> str | None:
        """Returns LanceDB's reason to refuse a statement, `None` if it accepts it.

        A statement that concerns equal columns of several tables is run once.

        Args:
            statement: The statement.
            schema: Schema of the table it is meant for.
        """
        sets = as_sql(statement.values, statement.sets)
        narrow = _concerned(statement.where or "", sets, schema)
        key = (statement.where, tuple(sets.items()), narrow)
        if key in self._valid:
            return None
        where = None if statement.where is None else whole(statement.where)
        wholes = {column: whole(expression) for column, expression in sets.items()}
        why = await self._execute(where, wholes, narrow)
        if why is None:
            self._valid.add(key)
            return None
        # The message of the whole table names all its columns.
        why = await self._execute(statement.where, sets, schema)
        return why or "it ignores what follows the first complete expression"

    async def _execute(
        self, where: str | None, sets: dict[str, str], schema: pa.Schema
    ) -> str | None:
        if self._connection is None:
            self._connection = await lancedb.connect_async("memory://")
        table = await self._connection.create_table(f"t{next(self._tables)}", schema=schema)
        try:
            if sets:
                await table.update(updates_sql=sets, where=where)
            elif where is not None:
                await table.count_rows(where)
        except (ValueError, RuntimeError, OSError, NotImplementedError) as exc:
            return re.sub(_PREFIXES, "", plain_message(str(exc)))
        return None


def _concerned(where: str, sets: Mapping[str, str], schema: pa.Schema) -> pa.Schema:
    """Returns the columns whose names occur in the SQL, in any case; all if none does."""
    text = " ".join((where, *sets, *sets.values())).casefold()
    named = [field for field in schema if field.name.casefold() in text]
    return pa.schema(named or list(schema))
