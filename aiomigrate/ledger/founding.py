"""Creates the metadata tables safely beside other processes, or adopts an existing head."""

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
    OUR_FIELDS,
    PRIMARY_KEY,
    events_to_arrow,
    lease_row_name,
    parse_head,
)
from aiomigrate.ledger.records import RUN_LEASE, Event, Kind, new_event
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Table
from aiomigrate.store.uri import is_local

T = TypeVar("T")

ATTEMPTS = 40
CREATED_AT = 1
"""table_version of a table that was made where there was none."""


_TRIAL = pa.schema([pa.field("id", pa.int64())])
_TRIALS = 8


class OnUnsafeStore(enum.Enum):
    """What to do about a store that loses commits it has acknowledged."""

    ERROR = "error"
    WARN = "warn"


@dataclass(frozen=True, slots=True)
class Known:
    """A head as it was read a moment ago.

    Attributes:
        table: Its handle.
        content: Its rows; columns that were added since are not in it.
        is_new: Whether no version of it is beneath that had its first rows.
    """

    table: Table
    content: pa.Table
    is_new: bool


def has_lease(content: pa.Table) -> bool:
    """Returns whether a head has the row of the run lease."""
    return lease_row_name(RUN_LEASE) in content["tableName"].to_pylist()


def has_founding(content: pa.Table) -> bool:
    """Returns whether a journal has the event of its founding."""
    return "kind" in content.schema.names and Kind.FOUNDED in content["kind"].to_pylist()


class MetadataTables:
    """The two metadata tables of one database: created, found and adopted.

    Attributes:
        store: The database.
        head_name: Name of the head.
        journal_name: Name of the journal.
        commits: How many commits were made to both tables.
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
        """Binds to the tables `name` and `name_history`; nothing is read yet.

        Args:
            store: The database.
            name: Of the head.
            clock: Clocks.
            log: Bound logger.
            on_unsafe_store: What to do where a store turns out to lose commits.
        """
        self.store = store
        self.head_name = name
        self.journal_name = f"{name}_history"
        self.commits = 0
        self._clock = clock
        self._log = log
        self._on_unsafe_store = on_unsafe_store
        self._journal: Table | None = None
        self._read: tuple[int, list[Event]] | None = None
        self._seen: tuple[Table, pa.Table] | None = None

    async def _find(self, name: str) -> Table | None:
        table = await self.store.find(name)
        if table is None and await self.store.has_remains(name):
            # Found again: a rival has created it between the two looks.
            table = await self.store.find(name)
            if table is None:
                raise StoreError("it has data files, but no readable version.", "")
        return table

    def _unreadable(self, name: str, exc: StoreError) -> LedgerUnreadableError:
        return LedgerUnreadableError(
            f"The metadata table {name!r} exists but cannot be read: {exc.what}",
            "Nothing was run. Correct what LanceDB says (space, rights, network); only if that is "
            "not it, restore the table (an earlier table_version, or a backup).",
        )

    async def _made(self, name: str, schema: pa.Schema) -> Known:
        return await self._retry_race(name, lambda: self._make(name, schema))

    async def _make(self, name: str, schema: pa.Schema) -> Known:
        """Opens and reads a table, making it if need be."""
        found = await self._find(name)
        if found is not None:
            return Known(found, await found.read(), is_new=False)
        table = await self.store.create(name, schema)
        return Known(table, schema.empty_table(), is_new=await table.version() == CREATED_AT)

    async def _founded(
        self,
        name: str,
        schema: pa.Schema,
        key: str,
        first: Callable[[], Awaitable[pa.Table]],
        is_founded: Callable[[pa.Table], bool],
        known: Known | None = None,
    ) -> tuple[Table, pa.Table]:
        """Opens and reads a table that has its first rows, making both if need be.

        `create_table` is not exclusive: a late creator overwrites what others have made, and may
        have been paused for long before. So a table without its first rows is taken as wiped: what
        the version beneath holds is inserted again, else the first rows. The insert is
        insert-only on the primary key through a handle pinned to the wiped version: one of many
        racers inserts each key, and if the table was overwritten meanwhile LanceDB refuses it.
        """
        seen = [] if known is None else [known]  # a moment ago

        async def found() -> tuple[Table, pa.Table] | None:
            here = seen.pop() if seen else await self._make(name, schema)
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
            # What others have written since is seen by whoever takes the lease.
            return here.table, pa.concat_tables([here.content, rows], promote_options="default")

        return await self._retry_race(name, found)

    async def _retry_race(self, name: str, make: Callable[[], Awaitable[T | None]]) -> T:
        """Does what makes a table, until it returns something: others may be doing the same."""
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
            f"The metadata table {name!r} could not be made: {last}",
            "Run again when fewer processes write to it.",
        )

    async def _previous_content(
        self, table: Table, is_founded: Callable[[pa.Table], bool]
    ) -> pa.Table | None:
        version = await table.version() - 1
        while version >= 1:
            older = await table.at(version)
            content = await older.read()
            if is_founded(content):
                return content
            if len(content):
                return None
            version -= 1
        return None

    async def _first_event(self) -> pa.Table:
        if not is_local(self.store.uri):
            await self._try_store()
        self._log.info(ev.LEDGER_FOUNDED, ledger_table=self.journal_name)
        event = new_event(Kind.FOUNDED, at=self._clock.wall())
        return events_to_arrow([event], "")

    async def _try_store(self) -> None:
        """Lets several handles commit at once to a table of its own, and looks what is there.

        A store that ignores the condition on a write lets each think that it came first: there
        31 of 99 appends were lost (measured). A crash leaves a table of one column behind.

        Raises:
            UnsafeStoreError: It loses commits, and that is not allowed.
        """
        name = f"{self.head_name}_trial_{secrets.token_hex(6)}"
        await self.store.create(name, _TRIAL)
        done = 0

        async def add(table: Table, number: int) -> None:
            nonlocal done
            with contextlib.suppress(StoreError):  # not acknowledged, so not asked for
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
            f"The store loses commits: of {done} that it acknowledged, made at the same time, "
            f"{done - found} are gone. It ignores conditional writes (If-None-Match), without "
            "which two processes overwrite each other, in your tables too.",
            "Use a store, or a version of it, that has them. If only one process ever writes, "
            "pass on_unsafe_store=OnUnsafeStore.WARN (--on-unsafe-store warn).",
        )

    async def _adopt_structure(self) -> Known | None:
        """Adds our columns to a head that another system made, and makes its key primary.

        Returns:
            The table with its content, `None` where there is no head.
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
                if seen is not None:  # by the caller, a moment ago
                    content, version = seen[1], await seen[0].version()
                    seen = None
                if content is None or await table.version() != version:
                    content, version = await table.read(), await table.version()
                if content is not checked:  # refuse what is none before it is changed
                    parse_head(content, self.head_name)
                    checked = content
                missing = [f for f in OUR_FIELDS if not state.has(f.name)]
                keyed = state.schema.field("tableName").metadata or {}
                if state.indexes:  # with an index the primary key would not protect
                    await table.drop_index(state.indexes[0].name)
                elif not any(k.startswith(PRIMARY_KEY) for k in keyed):
                    await table.set_primary_key("tableName")
                elif missing:
                    await table.add_columns(missing)
                    self._log.info(ev.LEDGER_ADOPTED, ledger_table=self.head_name)
                else:
                    is_new = len(content) > 0 and not set(content.schema.names).issuperset(
                        f.name for f in OUR_FIELDS
                    )
                    return Known(table, content, is_new)
                version += 1  # what is there otherwise was not made by us alone
                self.commits += 1
            except StoreError as exc:  # another process is adopting too: look again
                if attempt == ATTEMPTS - 1:
                    raise self._unreadable(self.head_name, exc) from exc
                await anyio.sleep(0.01)
        return None
