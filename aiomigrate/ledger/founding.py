"""Creates the metadata tables, or adopts an existing head, safe against concurrent processes.

Reading and writing the tables once they exist is for `ledger.ledger`.
"""

from __future__ import annotations

import contextlib
import enum
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import pyarrow as pa

from aiomigrate import events as ev
from aiomigrate.clock import Clock
from aiomigrate.errors import (
    CommitConflictError,
    LedgerUnreadableError,
    StaleHandleError,
    StoreError,
    TableExistsError,
    UnsafeStoreError,
    WriterCongestionError,
)
from aiomigrate.ledger.codec import (
    ADDED_FIELDS,
    PRIMARY_KEY,
    events_to_arrow,
    lease_row_name,
    parse_head,
)
from aiomigrate.ledger.read_back import reads_back, take_back
from aiomigrate.ledger.records import RUN_LEASE, Event, Kind, new_event
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Table
from aiomigrate.store.uri import is_local

T = TypeVar("T")

ATTEMPTS = 40
CREATED_AT = 1
"""table_version of a table that was created without overwriting another one."""


_TRIAL = pa.schema([pa.field("id", pa.int64())])
_TRIALS = 8


class OnUnsafeStore(enum.Enum):
    """How to react to a store that loses commits it has acknowledged."""

    ERROR = "error"
    WARN = "warn"


@dataclass(frozen=True, slots=True)
class Known:
    """A metadata table that was just read.

    Attributes:
        table: The handle.
        content: All rows, without columns that were added since.
        is_new: Whether no earlier version can have had the first rows.
    """

    table: Table
    content: pa.Table
    is_new: bool


def has_lease(content: pa.Table) -> bool:
    """Returns whether a head contains the row of the run lease."""
    return lease_row_name(RUN_LEASE) in content["tableName"].to_pylist()


def has_founding(content: pa.Table) -> bool:
    """Returns whether a journal contains its `founded` event."""
    return "kind" in content.schema.names and Kind.FOUNDED in content["kind"].to_pylist()


class MetadataTables:
    """Finds, creates and adopts the two metadata tables of one database.

    Attributes:
        store: The database.
        head_name: Name of the head.
        journal_name: Name of the journal.
        commits: Number of commits made to both tables.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        clock: Clock,
        log: Any,
        on_unsafe_store: OnUnsafeStore = OnUnsafeStore.ERROR,
    ) -> None:
        """Binds to the tables `name` and `name_history` without reading them.

        Args:
            store: The database.
            name: Name of the head.
            clock: Clocks.
            log: Bound logger.
            on_unsafe_store: How to react to a store that loses commits.
        """
        self.store = store
        self.head_name = name
        self.journal_name = f"{name}_history"
        self.commits = 0
        self._clock = clock
        self._log = log
        self._on_unsafe_store = on_unsafe_store
        # An object store confirms an object as a whole; a disk may keep half a file.
        self._reads_back = is_local(store.uri)
        self._journal: Table | None = None
        self._read: tuple[int, list[Event]] | None = None
        self._seen: tuple[Table, pa.Table] | None = None

    async def _find(self, name: str) -> Table | None:
        table = await self.store.find(name)
        if table is None and await self.store.has_remains(name):
            # Another process may have created it between the two calls.
            table = await self.store.find(name)
            if table is None:
                raise StoreError("it has data files, but no readable version.", "")
        return table

    def _unreadable(self, name: str, exc: StoreError) -> LedgerUnreadableError:
        repair = "run `aiomigrate repair` or " if name == self.journal_name else ""
        return LedgerUnreadableError(
            f"The metadata table {name!r} exists but cannot be read: {exc.what}",
            "No migration was run. Correct the cause that LanceDB reports (disk space, "
            f"permissions, network); if the files themselves are damaged, {repair}restore the "
            "table to an earlier table_version or from a backup.",
        )

    async def _open_or_create(self, name: str, schema: pa.Schema) -> Known:
        return await self._retry_race(name, lambda: self._try_open_or_create(name, schema))

    async def _try_open_or_create(self, name: str, schema: pa.Schema) -> Known:
        """Opens and reads a table, creating it if it does not exist."""
        found = await self._find(name)
        if found is not None:
            return Known(found, await found.read(), is_new=False)
        table = await self.store.create(name, schema)
        return Known(table, schema.empty_table(), is_new=await table.version() == CREATED_AT)

    async def _open_founded(
        self,
        name: str,
        schema: pa.Schema,
        key: str,
        first: Callable[[], Awaitable[pa.Table]],
        is_founded: Callable[[pa.Table], bool],
        known: Known | None = None,
    ) -> tuple[Table, pa.Table]:
        """Opens and reads a table, creating it and inserting its first rows if they are missing.

        `create_table` is not exclusive: a process that was paused before it created the table
        overwrites what other processes have created meanwhile. A table without its first rows is
        therefore treated as overwritten: the rows of the previous version are inserted again, or
        the first rows if there are none. The merge only inserts, on the primary key, through a
        handle pinned to the overwritten version: of several concurrent processes one inserts each
        key, and if the table was overwritten again meanwhile LanceDB refuses the merge.

        Args:
            name: Name of the table.
            schema: Its schema.
            key: Its primary key.
            first: Returns the first rows.
            is_founded: Returns whether rows include the first ones.
            known: The table if it was just read: the first attempt uses it instead of reading.

        Returns:
            The table and its rows. Rows that other processes inserted meanwhile may be missing.
        """
        seen = [] if known is None else [known]  # for the first attempt only

        async def found() -> tuple[Table, pa.Table] | None:
            here = seen.pop() if seen else await self._try_open_or_create(name, schema)
            if is_founded(here.content):
                return here.table, here.content
            rows = None if here.is_new else await self._previous_content(here.table, is_founded)
            if is_first := rows is None:
                rows = await first()
            elif len(rows):
                self._log.warning(ev.LEDGER_HEALED, ledger_table=name, rows=len(rows))
            self.commits += 1
            if await here.table.insert_missing(key, rows) < len(rows) or not is_first:
                return None
            if self._reads_back and not await reads_back(here.table):
                await take_back(here.table, await here.table.version())
                return None
            # A process that takes the lease reads the rows that others have written since.
            return here.table, pa.concat_tables([here.content, rows], promote_options="default")

        return await self._retry_race(name, found)

    async def _retry_race(self, name: str, make: Callable[[], Awaitable[T | None]]) -> T:
        """Calls `make` until it returns a value, as other processes may create the same table."""
        last: StoreError | None = None
        for attempt in range(ATTEMPTS):
            try:
                if (made := await make()) is not None:
                    return made
            except (
                TableExistsError,
                CommitConflictError,
                StaleHandleError,
                WriterCongestionError,
            ) as exc:
                last = exc
                await anyio.sleep(min(0.005 * 2**attempt, 0.2))
            except StoreError as exc:
                raise self._unreadable(name, exc) from exc
        raise LedgerUnreadableError(
            f"The metadata table {name!r} could not be created: {last}",
            "Run again when fewer processes write to it.",
        )

    async def _previous_content(
        self, table: Table, is_founded: Callable[[pa.Table], bool]
    ) -> pa.Table | None:
        version = await table.version() - 1
        while version >= 1:
            older = await table.at(version)
            version -= 1
            try:
                content = await older.read()
            except StoreError:
                if await older.count_rows() > 1:
                    raise
                continue  # its first row, which could not be read back
            if is_founded(content):
                return content
            if len(content):
                return None
        return None

    async def _first_event(self) -> pa.Table:
        if not is_local(self.store.uri):
            await self._try_store()
        self._log.info(ev.LEDGER_FOUNDED, ledger_table=self.journal_name)
        event = new_event(Kind.FOUNDED, at=self._clock.wall())
        return events_to_arrow([event], "")

    async def _try_store(self) -> None:
        """Tests on a temporary table whether the store keeps concurrent commits.

        On a store that ignores conditional writes, concurrent commits overwrite each other: 31 of
        99 appends were lost (measured). A crash leaves the temporary table, of one column, behind.

        Raises:
            UnsafeStoreError: The store loses commits, and `on_unsafe_store` is `ERROR`.
        """
        name = f"{self.head_name}_trial_{secrets.token_hex(6)}"
        await self.store.create(name, _TRIAL)
        done = 0

        async def add(table: Table, number: int) -> None:
            nonlocal done
            with contextlib.suppress(StoreError):  # not acknowledged, so not expected
                await table.add(pa.table({"id": [number]}, _TRIAL))
                done += 1

        try:
            tables = [await self.store.open(name) for _ in range(_TRIALS)]
            async with anyio.create_task_group() as group:
                for number, table in enumerate(tables):
                    group.start_soon(add, table, number)
            found = await (await self.store.open(name)).count_rows()
        finally:
            with anyio.CancelScope(shield=True):
                await self.store.drop(name)
        if found >= done:
            return
        if self._on_unsafe_store is OnUnsafeStore.WARN:
            self._log.warning(ev.STORE_UNSAFE, lost=done - found, commits=done)
            return
        raise UnsafeStoreError(
            f"The store loses commits: of {done} concurrent commits that it acknowledged, "
            f"{done - found} are missing. It ignores conditional writes (If-None-Match), without "
            "which two processes overwrite each other's commits, in your tables too.",
            "Use a store, or a version of it, that supports conditional writes. If only one "
            "process ever writes, pass on_unsafe_store=OnUnsafeStore.WARN "
            "(--on-unsafe-store warn).",
        )

    async def _adopt_structure(self) -> Known | None:  # noqa: C901 - one loop of look, decide, change: proved as a whole
        """Adds aiomigrate's columns and primary key to a head that another system created.

        Returns:
            The table with its content, `None` if there is no head.
        """
        content: pa.Table | None = None
        checked: pa.Table | None = None
        version = 0
        seen, self._seen = self._seen, None
        for attempt in range(ATTEMPTS):
            try:
                table = await self.store.find(self.head_name)
                if table is None:
                    return None
                state = await table.state()
                if seen is not None:  # the caller has just read it
                    content, version = seen[1], await seen[0].version()
                    seen = None
                if content is None or await table.version() != version:
                    content, version = await table.read(), await table.version()
                if content is not checked:  # refuse an invalid head before changing it
                    parse_head(content, self.head_name)
                    checked = content
                missing = [f for f in ADDED_FIELDS if not state.has(f.name)]
                keyed = state.schema.field("tableName").metadata or {}
                if state.indexes:  # an index would disable the primary key's exclusive insert
                    await table.drop_index(state.indexes[0].name)
                elif not any(k.startswith(PRIMARY_KEY) for k in keyed):
                    await table.set_primary_key("tableName")
                elif missing:
                    await table.add_columns(missing)
                    self._log.info(ev.LEDGER_ADOPTED, ledger_table=self.head_name)
                else:
                    is_new = len(content) > 0 and not set(content.schema.names).issuperset(
                        f.name for f in ADDED_FIELDS
                    )
                    return Known(table, content, is_new)
                version += 1  # another version means that another process committed as well
                self.commits += 1
            except StoreError as exc:  # another process may be adopting the head too: retry
                if attempt == ATTEMPTS - 1:
                    raise self._unreadable(self.head_name, exc) from exc
                await anyio.sleep(0.01)
        return None
