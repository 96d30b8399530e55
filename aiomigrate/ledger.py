"""The two metadata tables: reading, founding, adopting, and single guarded writes.

`table_migrations` (the head) has a row per line and a row per lease; `table_migrations_history`
(the journal) is append-only. Both are made in races without a lock and survive a late creator's
overwrite (see `_founded`). Who may write, and when, is for `lease` and `writer`; what the content
means is for `fold` and `reconcile`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import enum
import json
import operator
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import pyarrow as pa

from aiomigrate import events as ev
from aiomigrate.clock import Clock
from aiomigrate.errors import (
    CommitConflictError,
    LedgerCorruptError,
    LedgerFormatError,
    LedgerUnreadableError,
    StaleHandleError,
    StoreError,
    TableExistsError,
    UnsafeStoreError,
    WriterCongestionError,
)
from aiomigrate.lance import Store, Table, is_local
from aiomigrate.model import MAX_VERSION, NOT_YET, RUN_LEASE, Event, HeadRow, Kind
from aiomigrate.operations.literals import sql_literal
from aiomigrate.together import each
from aiomigrate.wellformed import fault_of

FORMAT = 1
"""Of the metadata tables; a higher one found on disk is refused."""

LEASE_PREFIX = ":lease:"
"""Start of the names of lease rows: no table and no line can have such a name."""

_PRIMARY_KEY = b"lance-schema:unenforced-primary-key"
_FORMAT_KEY = b"aiomigrate:format"
_MANY = 32  # events that take longer to put together than the event loop is to be kept
_ATTEMPTS = 40
_MADE = 1
"""table_version of a table that was made where there was none."""

FirstRows = Callable[[int], Sequence[HeadRow]]
"""Returns the rows that a head begins with, given the first epoch that nobody used."""

T = TypeVar("T")

_KEYED = {_PRIMARY_KEY: b"true"}
_OURS: tuple[pa.Field[Any], ...] = (
    pa.field("epoch", pa.int64(), metadata={_FORMAT_KEY: str(FORMAT).encode()}),
    pa.field("owner", pa.string()),
    pa.field("beat", pa.int64()),
    pa.field("phase", pa.string()),
    pa.field("digest", pa.string()),
    pa.field("lease", pa.string()),
)
_HEAD_FIELDS: list[pa.Field[Any]] = [
    pa.field("tableName", pa.string(), nullable=False, metadata=_KEYED),
    pa.field("currentVersion", pa.int32(), nullable=False),
    pa.field("lastMigratedAt", pa.timestamp("ms"), nullable=False),
    *_OURS,
]
_JOURNAL_FIELDS: list[pa.Field[Any]] = [
    pa.field("id", pa.string(), nullable=False, metadata=_KEYED),
    pa.field("lease", pa.string(), nullable=False),
    pa.field("epoch", pa.int64(), nullable=False, metadata={_FORMAT_KEY: str(FORMAT).encode()}),
    pa.field("seq", pa.int64(), nullable=False),
    pa.field("at", pa.timestamp("us", tz="UTC"), nullable=False),
    pa.field("kind", pa.string(), nullable=False),
    pa.field("run_id", pa.string()),
    pa.field("line", pa.string()),
    pa.field("version", pa.int32()),
    pa.field("description", pa.string()),
    pa.field("checksum", pa.string()),
    pa.field("algorithm", pa.string()),
    pa.field("source", pa.string()),
    pa.field("tables", pa.string()),
    pa.field("waited_s", pa.float64()),
    pa.field("ran_s", pa.float64()),
    pa.field("ledger_s", pa.float64()),
    pa.field("rows", pa.int64()),
    pa.field("commits", pa.int64()),
    pa.field("size", pa.int64()),
    pa.field("retries", pa.int64()),
    pa.field("host", pa.string()),
    pa.field("pid", pa.int64()),
    pa.field("tool", pa.string()),
    pa.field("error", pa.string()),
    pa.field("detail", pa.string()),
]
HEAD_SCHEMA = pa.schema(_HEAD_FIELDS)
JOURNAL_SCHEMA = pa.schema(_JOURNAL_FIELDS)
_JSON = ("tables", "detail")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What all events of a commit to the journal get.

    Attributes:
        seq: Sequence number of the first; the others follow.
        at: When, for those that do not say.
        common: Other fields.
    """

    seq: int
    at: dt.datetime
    common: Mapping[str, Any]


_TRIAL = pa.schema([pa.field("id", pa.int64())])
_TRIALS = 8


class OnUnsafeStore(enum.Enum):
    """What to do about a store that loses commits it has acknowledged."""

    ERROR = "error"
    WARN = "warn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The head as read.

    Attributes:
        exists: Whether the table is there.
        rows: A row per line, in no order; duplicates are possible where another system wrote.
        leases: The lease rows by key.
        is_adopted: Whether our columns are there.
    """

    exists: bool = False
    rows: tuple[HeadRow, ...] = ()
    leases: Mapping[str, HeadRow] = field(default_factory=dict)
    is_adopted: bool = False


@dataclass(frozen=True, slots=True)
class _Known:
    """A head as it was read a moment ago.

    Attributes:
        table: Its handle.
        content: Its rows; columns that were added since are not in it.
        is_new: Whether no version of it is beneath that had its first rows.
    """

    table: Table
    content: pa.Table
    is_new: bool


class Ledger:
    """The metadata tables of one database."""

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

    # ---- reading --------------------------------------------------------------------------------

    async def read_head(self) -> Head:
        """Reads the whole head in one scan.

        Returns:
            An empty `Head` when the table does not exist.

        Raises:
            LedgerUnreadableError: It exists but cannot be read.
            LedgerCorruptError: It holds what cannot be.
            LedgerFormatError: A newer aiomigrate wrote it.
        """
        content = await self.read_head_content()
        return Head() if content is None else parse_head(content, self.head_name)

    async def read_head_content(self) -> pa.Table | None:
        """Reads the whole head in one scan, unchecked; `None` when it does not exist.

        Raises:
            LedgerUnreadableError: It exists but cannot be read.
        """
        try:
            table = await self._find(self.head_name)
            if table is None:
                return None
            content = await table.read()
        except StoreError as exc:
            raise self._unreadable(self.head_name, exc) from exc
        self._seen = table, content
        return content

    async def read_journal(self) -> list[Event]:
        """Reads all events, valid or not, in no order; none when there is no journal.

        What was read before is given again where nothing was committed since: on an object store
        each fragment is a request.

        Raises:
            LedgerUnreadableError: It exists but cannot be read.
            LedgerCorruptError: It holds what cannot be.
            LedgerFormatError: A newer aiomigrate wrote it.
        """
        version = 0
        try:
            table = await self._find(self.journal_name)
            version = 0 if table is None else await table.version()
            if self._read is not None and self._read[0] == version:
                return self._read[1]
            content = None if table is None else await table.read()
            if table is not None and content is not None and not len(content):
                # Wiped by a late creator and not healed yet, or never written to.
                beneath = await self._beneath(table, _has_founding)
                content = content if beneath is None else beneath
            elif table is not None and content is not None and _has_founding(content):
                self._journal = table  # what `ensure` would look for again
        except StoreError as exc:
            raise self._unreadable(self.journal_name, exc) from exc
        if content is None:
            return []
        events = await anyio.to_thread.run_sync(parse_journal, content, self.journal_name)
        if self._journal is table:  # founded, and not wiped
            self._read = version, events
        return events

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

    # ---- founding and adopting ------------------------------------------------------------------

    async def ensure(self, first: FirstRows | None = None) -> Head:
        """Makes both tables, or makes an existing head fit, safely beside others doing the same.

        A crash leaves a state from which the next caller goes on.

        Args:
            first: Returns the rows to begin with, its run lease among them, if it is this call that
                makes them, given the first epoch that nobody used; by default that lease, free.

        Returns:
            The head, which has the run lease.

        Raises:
            LedgerError: A table cannot be read or made.
            UnsafeStoreError: The store, asked when the journal is founded, loses commits.
        """
        known: dict[str, _Known] = {}
        content: list[pa.Table] = []

        async def look_at_journal() -> None:
            if self._journal is None:
                known[self.journal_name] = await self._made(self.journal_name, JOURNAL_SCHEMA)

        async def look_at_head() -> None:
            adopted = await self._adopt_structure()
            known[self.head_name] = adopted or await self._made(self.head_name, HEAD_SCHEMA)

        is_unwritten = False  # the journal, as far as this first look tells

        async def first_rows() -> pa.Table:
            nonlocal is_unwritten
            # Above every epoch ever used: no event of an earlier head is taken for a new one.
            events = [] if is_unwritten else await self.read_journal()
            is_unwritten = False
            top = max((event.epoch for event in events), default=0)
            if first is not None:
                return rows_to_arrow(first(top + 1))
            return rows_to_arrow([lease_row(RUN_LEASE, at=self._clock.wall(), epoch=top)])

        async def found_journal() -> None:
            if self._journal is None:
                await self._found_journal(known[self.journal_name])

        async def found_head() -> None:
            _, found = await self._founded(
                self.head_name,
                HEAD_SCHEMA,
                "tableName",
                first_rows,
                _has_lease,
                known[self.head_name],
            )
            content.append(found)

        await each((look_at_journal, look_at_head), lambda look: look())
        is_unwritten = self._journal is None and known[self.journal_name].is_new
        await each((found_journal, found_head), lambda make: make())
        return parse_head(content[0], self.head_name)

    async def _found_journal(self, known: _Known | None = None) -> Table:
        table, content = await self._founded(
            self.journal_name, JOURNAL_SCHEMA, "id", self._first_event, _has_founding, known
        )
        self._journal = table
        if known is not None and known.is_new and await table.version() == _MADE + 1:
            self._read = _MADE + 1, parse_journal(content, self.journal_name)
        return table

    async def _made(self, name: str, schema: pa.Schema) -> _Known:
        return await self._among_rivals(name, lambda: self._make(name, schema))

    async def _make(self, name: str, schema: pa.Schema) -> _Known:
        """Opens and reads a table, making it if need be."""
        found = await self._find(name)
        if found is not None:
            return _Known(found, await found.read(), is_new=False)
        table = await self.store.create(name, schema)
        return _Known(table, schema.empty_table(), is_new=await table.version() == _MADE)

    async def _founded(
        self,
        name: str,
        schema: pa.Schema,
        key: str,
        first: Callable[[], Awaitable[pa.Table]],
        is_founded: Callable[[pa.Table], bool],
        known: _Known | None = None,
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
            rows = None if here.is_new else await self._beneath(here.table, is_founded)
            if is_first := rows is None:
                rows = await first()
            elif len(rows):
                self._log.warning(ev.LEDGER_HEALED, ledger_table=name, rows=len(rows))
            self.commits += 1
            if await here.table.insert_missing(key, rows) < len(rows) or not is_first:
                return None
            # What others have written since is seen by whoever takes the lease.
            return here.table, pa.concat_tables([here.content, rows], promote_options="default")

        return await self._among_rivals(name, found)

    async def _among_rivals(self, name: str, make: Callable[[], Awaitable[T | None]]) -> T:
        """Does what makes a table, until it returns something: others may be doing the same."""
        last: StoreError | None = None
        for attempt in range(_ATTEMPTS):
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

    async def _beneath(
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
        event = Event(lease="", epoch=0, seq=0, at=self._clock.wall(), kind=Kind.FOUNDED)
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

    async def _adopt_structure(self) -> _Known | None:
        """Adds our columns to a head that another system made, and makes its key primary.

        Returns:
            The table with its content, `None` where there is no head.
        """
        content: pa.Table | None = None
        checked: pa.Table | None = None
        version = 0
        seen, self._seen = self._seen, None
        for attempt in range(_ATTEMPTS):
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
                missing = [f for f in _OURS if not state.has(f.name)]
                keyed = state.schema.field("tableName").metadata or {}
                if state.indexes:  # with an index the primary key would not protect
                    await table.drop_index(state.indexes[0].name)
                elif not any(k.startswith(_PRIMARY_KEY) for k in keyed):
                    await table.set_primary_key("tableName")
                elif missing:
                    await table.add_columns(missing)
                    self._log.info(ev.LEDGER_ADOPTED, ledger_table=self.head_name)
                else:
                    is_new = len(content) > 0 and not set(content.schema.names).issuperset(
                        f.name for f in _OURS
                    )
                    return _Known(table, content, is_new)
                version += 1  # what is there otherwise was not made by us alone
                self.commits += 1
            except StoreError as exc:  # another process is adopting too: look again
                if attempt == _ATTEMPTS - 1:
                    raise self._unreadable(self.head_name, exc) from exc
                await anyio.sleep(0.01)
        return None

    # ---- writing --------------------------------------------------------------------------------

    async def ensure_lease(self, key: str) -> None:
        """Makes the row of a lease, free, unless it is there. The head exists."""
        table = await self.store.open(self.head_name)
        self.commits += 1
        await table.insert_missing(
            "tableName", rows_to_arrow([lease_row(key, at=self._clock.wall())])
        )

    async def update_lease(self, values: Mapping[str, Any], condition: str, key: str) -> int:
        """Changes a lease row if it is as the condition says; returns 1 if it was, else 0."""
        table = await self.store.open(self.head_name)
        self.commits += 1
        rows, _ = await table.update(
            values=values, where=f"tableName = {sql_literal(lease_row_name(key))} AND {condition}"
        )
        return rows

    async def take_rows(self, key: str, epoch: int, owner: str) -> None:
        """Raises every row of a lease to the holder's epoch: older holders' writes then miss."""
        table = await self.store.open(self.head_name)
        self.commits += 1
        await table.update(
            values={"epoch": epoch, "owner": owner},
            where=f"lease = {sql_literal(key)} AND epoch < {epoch}",
        )

    async def own_rows(self, rows: Sequence[HeadRow]) -> None:
        """Makes rows for these lines, or takes over those that other systems wrote.

        Identical duplicates that another system left are merged. Called under the lease.
        """
        if not rows:
            return
        table = await self.store.open(self.head_name)
        self.commits += 1
        inserted = await table.insert_missing("tableName", rows_to_arrow(rows))
        if inserted == len(rows):
            return
        names = ", ".join(sql_literal(row.name) for row in rows)
        # Never a newer holder's row: this very call may be made late, by a paused process.
        mine = f"owner = {sql_literal(rows[0].owner or '')}"
        not_newer = (
            f"(epoch IS NULL OR epoch < {rows[0].epoch} OR (epoch = {rows[0].epoch} AND {mine}))"
        )
        table = await self.store.open(self.head_name)
        self.commits += 1
        await table.update(
            values={"epoch": rows[0].epoch, "owner": rows[0].owner, "lease": rows[0].lease},
            where=f"tableName IN ({names}) AND {not_newer}",
        )
        table = await self.store.open(self.head_name)
        have = await table.read(f"tableName IN ({names})", ["tableName"])
        for name, count in Counter(have["tableName"].to_pylist()).items():
            if count > 1:
                # The journal already holds the version: a crash in between is healed from it.
                await table.delete(f"tableName = {sql_literal(name)} AND {not_newer}")
                await table.refresh()
                keep = [row for row in rows if row.name == name]
                await table.insert_missing("tableName", rows_to_arrow(keep))
                await table.refresh()
                self.commits += 2

    async def write_rows(self, rows: Sequence[HeadRow], epoch: int, owner: str) -> bool:
        """Replaces rows, each only if it still carries the holder's epoch and owner.

        Returns:
            Whether every row was replaced. If not, someone else has written: look.
        """
        table = await self.store.open(self.head_name)
        self.commits += 1
        fence = f"target.epoch = {epoch} AND target.owner = {sql_literal(owner)}"
        changed = await table.replace_matching("tableName", rows_to_arrow(rows), fence)
        return changed == len(rows)

    async def append(self, events: Sequence[Event], owner: str, stamp: Stamp | None = None) -> None:
        """Appends events as one commit; durable on return.

        Args:
            events: The events.
            owner: The nonce of who writes them.
            stamp: What all of them get; `None` where they have it already.

        Raises:
            StoreError: LanceDB failed and the events are known not to be there.
        """
        if len(events) > _MANY:
            data = await anyio.to_thread.run_sync(events_to_arrow, events, owner, stamp)
        else:
            data = events_to_arrow(events, owner, stamp)
        wanted = data["id"][0].as_py()
        for attempt in range(_ATTEMPTS):
            try:
                if self._journal is None:
                    self._journal = await self.store.open(self.journal_name)
                self.commits += 1
                await self._journal.append(data)
            except StoreError:
                # Unknown: it may have been committed. Look; and heal if it was overwritten.
                journal = await self._found_journal()
                if await journal.count_rows(f"id = {sql_literal(wanted)}"):
                    return
                if attempt == _ATTEMPTS - 1:
                    raise
                await anyio.sleep(min(0.01 * 2**attempt, 0.5))
            else:
                return

    async def compact(self, *, head_over: int, journal_over: int) -> None:
        """Compacts each table that consists of more fragments than given. Under the lease only."""
        for name, limit in ((self.head_name, head_over), (self.journal_name, journal_over)):
            table = await self.store.find(name)
            if table is not None and await table.fragments() > limit:
                await table.compact()
                self.commits += 1
                self._log.debug(ev.LEDGER_COMPACTED, ledger_table=name)


# ---- rows and events as Arrow -------------------------------------------------------------------


def lease_row_name(key: str) -> str:
    """Returns the name of a lease's row in the head."""
    return LEASE_PREFIX + key


def lease_row(
    key: str,
    *,
    at: dt.datetime,
    epoch: int = 0,
    owner: str = "",
    beat: int = 0,
    phase: str = "",
) -> HeadRow:
    """Returns the row of a lease, free unless it has an owner."""
    return HeadRow(
        name=lease_row_name(key),
        version=0,
        migrated_at=at,
        epoch=epoch,
        owner=owner,
        beat=beat,
        phase=phase,
        lease=key,
    )


def _has_lease(content: pa.Table) -> bool:
    return lease_row_name(RUN_LEASE) in content["tableName"].to_pylist()


def _has_founding(content: pa.Table) -> bool:
    return "kind" in content.schema.names and Kind.FOUNDED in content["kind"].to_pylist()


def rows_to_arrow(rows: Iterable[HeadRow]) -> pa.Table:
    """Returns head rows as Arrow, in `HEAD_SCHEMA`."""
    return pa.Table.from_pylist(
        [
            {
                "tableName": row.name,
                "currentVersion": row.version,
                "lastMigratedAt": row.migrated_at.replace(tzinfo=None),
                "epoch": row.epoch,
                "owner": row.owner,
                "beat": row.beat,
                "phase": row.phase,
                "digest": row.digest,
                "lease": row.lease,
            }
            for row in rows
        ],
        schema=HEAD_SCHEMA,
    )


def events_to_arrow(events: Iterable[Event], owner: str, stamp: Stamp | None = None) -> pa.Table:
    """Returns events as Arrow, in `JOURNAL_SCHEMA`; the id is unique per holder and sequence."""
    rows: list[dict[str, Any]] = []
    common = {} if stamp is None else dict(stamp.common)
    for number, event in enumerate(events):
        row = dict(zip(_TOLD, _told_by(event), strict=True)) | common
        if stamp is not None:
            row["seq"] = stamp.seq + number
            row["at"] = stamp.at if event.at == NOT_YET else event.at
        row["id"] = f"{row['lease']}:{row['epoch']}:{row['seq']}:{owner}"
        row["kind"] = str(event.kind)
        for name in _JSON:
            row[name] = _as_json(row[name]) if row[name] else None
        rows.append(row)
    # As structs: four times as fast as column by column, for the few rows of most commits.
    structs: Any = pa.array(rows, _EVENT)
    return pa.Table.from_struct_array(structs)


_as_json = json.JSONEncoder(ensure_ascii=False).encode
_EVENT = pa.struct(list(JOURNAL_SCHEMA))
_TOLD = [name for name in JOURNAL_SCHEMA.names if name != "id"]
_told_by = operator.attrgetter(*_TOLD)


def parse_head(content: pa.Table, name: str) -> Head:
    """Returns the head's rows as values.

    Raises:
        LedgerCorruptError: A column is missing or of another type, or a value cannot be.
        LedgerFormatError: A newer aiomigrate wrote it.
    """
    _check_columns(content.schema, HEAD_SCHEMA, name, required=3)
    adopted = all(f.name in content.schema.names for f in _OURS)
    if adopted:
        _check_format(content.schema, name)
    columns = [n for n in HEAD_SCHEMA.names if n in content.schema.names]
    values = {column: content[column].to_pylist() for column in columns}
    empty = [None] * len(content)
    rows: list[HeadRow] = []
    leases: dict[str, HeadRow] = {}
    zipped = zip(*(values.get(n, empty) for n in HEAD_SCHEMA.names), strict=True)
    for table, version, at, epoch, owner, beat, phase, digest, lease in zipped:
        if not isinstance(table, str) or not isinstance(version, int) or at is None:
            raise LedgerCorruptError(
                f"The metadata table {name!r} has a row with NULL: "
                f"tableName {table!r}, currentVersion {version!r}.",
                "Correct the row, or restore an earlier table_version of that table.",
            )
        if not 0 <= version <= MAX_VERSION:
            raise LedgerCorruptError(
                f"The metadata table {name!r} records version {version} for {table!r}.",
                "Versions are 0 or more: correct the row.",
                line=table,
                version=version,
            )
        row = HeadRow(
            name=table,
            version=version,
            migrated_at=at.replace(tzinfo=dt.UTC),
            epoch=epoch,
            owner=owner,
            beat=beat,
            phase=phase,
            digest=digest,
            lease=lease,
        )
        if table.startswith(LEASE_PREFIX):
            leases[table.removeprefix(LEASE_PREFIX)] = row
        else:
            rows.append(row)
    return Head(exists=True, rows=tuple(rows), leases=leases, is_adopted=adopted)


def _repeated(names: Sequence[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}


def versions_if_current(
    content: pa.Table, versions: Mapping[str, int], digests: Mapping[str, str]
) -> dict[str, int] | None:
    """Returns the version of every line if the head proves that nothing is to be done.

    What every start costs, so it looks at few columns, builds no rows, and makes one pass (Arrow's
    own comparisons take longer: 0.3 ms where there is nothing to compare).
    Any doubt is `None`: look closer.

    Args:
        content: The head as read.
        versions: Version at target, by line.
        digests: Chain digest at target, by line.
    """
    if not content.schema.equals(HEAD_SCHEMA, check_metadata=False):
        return None
    if _format_of(content.schema) != FORMAT:
        return None
    columns = ("tableName", "currentVersion", "digest")
    values: list[list[Any]] = [content[column].to_pylist() for column in columns]
    names, found, marks = values
    if content["epoch"].null_count:
        # Rows of lines without scripts stay as other systems left them, twice or not.
        epochs = content["epoch"].to_pylist()
        foreign = {name for name, epoch in zip(names, epochs, strict=True) if epoch is None}
        if not foreign.isdisjoint(versions):
            return None
    others = {
        name: version
        for name, version, mark in zip(names, found, marks, strict=True)
        if versions.get(name) != version or digests.get(name) != mark
    }
    unique = set(names)
    if not others.keys().isdisjoint(versions) or len(unique) != len(versions) + len(others):
        return None
    if len(unique) != len(names) and not versions.keys().isdisjoint(_repeated(names)):
        return None
    return {**versions, **{n: v for n, v in others.items() if not n.startswith(LEASE_PREFIX)}}


def parse_journal(content: pa.Table, name: str) -> list[Event]:
    """Returns the journal's events as values.

    Raises:
        LedgerCorruptError: A column is missing or of another type, or a value cannot be.
        LedgerFormatError: A newer aiomigrate wrote it.
    """
    _check_columns(content.schema, JOURNAL_SCHEMA, name, required=len(JOURNAL_SCHEMA))
    _check_format(content.schema, name)
    fields = [n for n in JOURNAL_SCHEMA.names if n != "id"]
    events = []
    for row in content.select(fields).to_pylist():
        for column in _JSON:
            row[column] = _json_object(row[column])
            if row[column] is None:
                raise LedgerCorruptError(
                    f"The metadata table {name!r} has an event whose {column!r} is no JSON object "
                    f"(epoch {row['epoch']}, seq {row['seq']}).",
                    "Restore an earlier table_version of that table.",
                )
        if None in (row["lease"], row["epoch"], row["seq"], row["at"], row["kind"]):
            raise LedgerCorruptError(
                f"The metadata table {name!r} has an event with NULL "
                f"(kind {row['kind']!r}, epoch {row['epoch']}, seq {row['seq']}).",
                "Restore an earlier table_version of that table.",
            )
        event = Event(**row)
        if fault := fault_of(event):
            raise LedgerCorruptError(
                f"The metadata table {name!r} has an event of kind {event.kind!r} with {fault} "
                f"(epoch {event.epoch}, seq {event.seq}).",
                "Restore an earlier table_version of that table.",
            )
        events.append(event)
    return events


def _json_object(text: str | None) -> dict[str, Any] | None:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _check_columns(have: pa.Schema, want: pa.Schema, name: str, *, required: int) -> None:
    for position, wanted in enumerate(want):
        index = have.get_field_index(wanted.name)
        if index < 0:
            if position < required:
                raise LedgerCorruptError(
                    f"The metadata table {name!r} has no column {wanted.name!r}.",
                    "It is not a ledger: choose another name for ours, or restore the table.",
                )
            continue
        if have.field(index).type != wanted.type:
            raise LedgerCorruptError(
                f"The metadata table {name!r} has column {wanted.name!r} of type "
                f"{have.field(index).type}, not {wanted.type}.",
                "It is not a ledger: choose another name for ours, or restore the table.",
            )


def _check_format(schema: pa.Schema, name: str) -> None:
    found = _format_of(schema)
    if found > FORMAT:
        raise LedgerFormatError(
            f"The metadata table {name!r} has format {found}, "
            f"this aiomigrate writes format {FORMAT}.",
            "Upgrade aiomigrate.",
        )


def _format_of(schema: pa.Schema) -> int:
    written = (schema.field("epoch").metadata or {}).get(_FORMAT_KEY, b"1")
    return int(written) if written.isdigit() else MAX_VERSION
