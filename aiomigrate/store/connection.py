"""The connection to one database: opening, creating, listing and dropping tables; trying SQL.

Tests inject faults by subclassing `Store` and overriding `call`.
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
from aiomigrate.schema.sql import Statement, as_sql
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
        """Connects to a located URI. On a missing local path LanceDB makes the folder.

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
        """Returns the names of all tables; a killed create may have left one that cannot be opened.

        Raises:
            StoreError: LanceDB could not list them.
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
            TableNotFoundError: There is none.
            StoreError: It could not be opened.
        """
        return Table(self, name, await self.open_handle(name))

    async def find(self, name: str) -> Table | None:
        """Opens a table, `None` if there is none.

        Raises:
            StoreError: It exists but could not be opened.
        """
        try:
            return await self.open(name)
        except TableNotFoundError:
            return None

    async def state_of(self, name: str) -> tuple[int, TableState | None]:
        """Returns a table's table_version and state, `(0, None)` if there is none.

        What is left of one whose creation was undone counts as none.

        Raises:
            StoreError: It exists but could not be read.
        """
        opened = await self.look(name)
        return (0, None) if opened is None else (opened.version, opened.state)

    async def look(self, name: str) -> Opened | None:
        """Opens a table and reads its state; `None` as for `state_of`.

        Raises:
            StoreError: It exists but could not be read.
        """
        table = await self.find(name)
        state = None if table is None else await table.state()
        if table is None or state is None or state.is_leftover:
            return None
        return Opened(table, await table.version(), state)

    async def look_at(self, names: Sequence[str]) -> dict[str, Opened]:
        """Opens tables, a few at once, and reads their states; leaves out what does not exist.

        Raises:
            StoreError: One exists but could not be read.
        """
        found: dict[str, Opened] = {}

        async def one(name: str) -> None:
            if (opened := await self.look(name)) is not None:
                found[name] = opened

        await run_each(names, one)
        return found

    async def has_remains(self, name: str) -> bool:
        """Returns whether a table that cannot be found left data files behind.

        A killed create of an empty table leaves none. Told of local databases only.
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

        This is not exclusive: a table that another process creates at the same moment is
        overwritten. A `version()` above 1 on the result tells; its content is one version below.

        Raises:
            TableExistsError: There is one already.
            StoreError: LanceDB failed.
        """
        none = pa.RecordBatchReader.from_batches(schema, [])
        reader = none if rows is None else rows.to_reader()
        return await self._create(name, reader, overwrite=overwrite)

    async def _create(self, name: str, reader: pa.RecordBatchReader, *, overwrite: bool) -> Table:
        """Creates a table past lancedb's Python half.

        That one takes NULL and NaN for bad vectors, and computes the vectors of a batch that has
        none where the table has embedding functions (both measured).
        """
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
        """Creates a table from a stream, in one commit; memory is bounded by the batches.

        An overwrite never fails because of other commits: those made since the stream was begun
        are discarded from the head. Compare its version with the one before plus one.

        Raises:
            StoreError: LanceDB failed; nothing was committed.
            Exception: What the stream raised; nothing was committed.
        """
        failures: list[BaseException] = []

        async def following() -> pa.RecordBatch | None:
            try:
                return await anext(batches, None)
            except BaseException as exc:
                failures.append(exc)
                raise

        refused: StoreError | None = None
        async with anyio.from_thread.BlockingPortal() as portal:

            def pull() -> Iterator[pa.RecordBatch]:  # in a thread of LanceDB's
                while (batch := portal.call(following)) is not None:
                    yield batch

            reader = pa.RecordBatchReader.from_batches(schema, pull())
            try:
                table = await self._create(name, reader, overwrite=overwrite)
            except StoreError as exc:
                refused = exc  # raised outside: a portal wraps what leaves it
        if refused is not None:
            raise (failures[0] if failures else refused) from (refused if failures else None)
        return table

    async def drop(self, name: str) -> None:
        """Drops a table, or the remains of one; nothing happens when there is none."""
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
    """An empty table in memory for each statement, to find out whether LanceDB takes it."""

    def __init__(self) -> None:
        """Prepares; the first question connects."""
        self._tables = itertools.count()
        self._connection: Any = None
        self._taken: set[tuple[object, ...]] = set()

    async def refusal(self, statement: Statement, schema: pa.Schema) -> str | None:
        """Returns why a statement cannot be run on a table of such a schema, `None` if it can.

        One that concerns equal columns of several tables is asked about once.
        """
        sets = as_sql(statement.values, statement.sets)
        narrow = _concerned(statement.where or "", sets, schema)
        key = (statement.where, tuple(sets.items()), narrow)
        if key in self._taken:
            return None
        why = await self._asked(statement.where, sets, narrow)
        if why is None:
            self._taken.add(key)
        elif narrow != schema:  # as LanceDB says it of the table itself
            why = await self._asked(statement.where, sets, schema)
        return why

    async def _asked(
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
    """Returns the columns that SQL may name; all of them where it names none.

    What it names is in its text, in whichever case.
    """
    text = " ".join((where, *sets, *sets.values())).casefold()
    named = [field for field in schema if field.name.casefold() in text]
    return pa.schema(named or list(schema))
