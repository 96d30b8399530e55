"""Reads and writes the two metadata tables of one database.

Creating them concurrently with other processes is for `ledger.founding`; the meaning of their
events is for `ledger.history`; when they are written is for `ledger.writer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio
import anyio.to_thread
import pyarrow as pa

from aiomigrate import events as ev
from aiomigrate.concurrency import run_each
from aiomigrate.errors import LedgerError, StoreError
from aiomigrate.ledger.codec import (
    HEAD_SCHEMA,
    JOURNAL_SCHEMA,
    Head,
    Stamp,
    events_to_arrow,
    lease_row,
    lease_row_name,
    parse_head,
    parse_journal,
    rows_to_arrow,
)
from aiomigrate.ledger.damage import Damage, find_damage, reopen
from aiomigrate.ledger.founding import (
    ATTEMPTS,
    CREATED_AT,
    Known,
    MetadataTables,
    has_founding,
    has_lease,
)
from aiomigrate.ledger.history import Journal, fold
from aiomigrate.ledger.read_back import READ_BACK_ATTEMPTS, damaged, reads_back, take_back
from aiomigrate.ledger.records import RUN_LEASE, Event, HeadRow, Kind, new_event
from aiomigrate.schema.sql import sql_literal
from aiomigrate.store.table import Table

_THREAD_EVENTS = 32  # more events are converted in a thread, not to block the event loop

FirstRows = Callable[[int], Sequence[HeadRow]]
"""Returns the first rows of a new head, given the first unused epoch."""


class Ledger(MetadataTables):
    """Reads and writes the metadata tables of one database."""

    # ---- reading --------------------------------------------------------------------------------

    async def read_head(self) -> Head:
        """Reads the whole head in one scan.

        Returns:
            The head, an empty one if the table does not exist.

        Raises:
            LedgerUnreadableError: The table exists but cannot be read.
            LedgerCorruptError: The table contains invalid values.
            LedgerFormatError: A newer release of aiomigrate wrote the table.
        """
        content = await self.read_head_content()
        return Head() if content is None else parse_head(content, self.head_name)

    async def read_head_content(self) -> pa.Table | None:
        """Reads the whole head in one scan, without checks; `None` if it does not exist.

        Raises:
            LedgerUnreadableError: The table exists but cannot be read.
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
        """Reads all events, valid or not, unordered; an empty list if there is no journal.

        Returns the events of the previous read if nothing was committed since: on an object store
        each fragment costs a request.

        Raises:
            LedgerUnreadableError: The table exists but cannot be read.
            LedgerCorruptError: The table contains invalid values.
            LedgerFormatError: A newer release of aiomigrate wrote the table.
        """
        version = 0
        try:
            table = await self._find(self.journal_name)
            version = 0 if table is None else await table.version()
            if self._read is not None and self._read[0] == version:
                return self._read[1]
            content = None if table is None else await table.read()
            if table is not None and content is not None and not len(content):
                # Overwritten by a late creator and not restored yet, or never written to.
                previous = await self._previous_content(table, has_founding)
                content = content if previous is None else previous
            elif table is not None and content is not None and has_founding(content):
                self._journal = table  # saves `ensure` from opening it again
        except StoreError as exc:
            raise self._unreadable(self.journal_name, exc) from exc
        if content is None:
            return []
        events = await anyio.to_thread.run_sync(parse_journal, content, self.journal_name)
        if self._journal is table:  # founded, and not overwritten
            self._read = version, events
        return events

    async def find_damage(self) -> Damage | None:
        """Returns what is damaged in the journal, `None` if nothing is or nothing can be read."""
        try:
            table = await self.store.find(self.journal_name)
        except StoreError:  # its newest manifest is damaged: LanceDB opens no other
            return None
        return None if table is None else await find_damage(table, "id")

    async def reopen(self, damage: Damage) -> None:
        """Replaces a damaged journal by the events that can be read. The caller holds the lease.

        Raises:
            StoreError: Another process committed meanwhile; its commit was not discarded.
        """
        rows = damage.rows()
        if not has_founding(rows):
            first = events_to_arrow([new_event(Kind.FOUNDED, at=self._clock.wall())], "")
            rows = pa.concat_tables([first.select(rows.schema.names).cast(rows.schema), rows])
        self._journal = await reopen(self.store, self.journal_name, rows, damage.latest)
        self._read = None
        self.commits += 1

    def fold_rows(self, rows: pa.Table) -> Journal:
        """Returns the state of all lines according to rows of the journal.

        Raises:
            LedgerCorruptError: The rows contain invalid values.
        """
        return fold(parse_journal(rows, self.journal_name))

    # ---- founding and adopting ------------------------------------------------------------------

    async def ensure(self, first: FirstRows | None = None) -> Head:
        """Creates both tables, or adopts an existing head; several processes may do so at once.

        It needs no lease. After a crash or a cancellation the next call continues.

        Args:
            first: Returns the first rows, including the row of the run lease, given the first
                unused epoch. It is called only if this process creates the rows. By default they
                are the row of the free run lease.

        Returns:
            The head, which contains the row of the run lease.

        Raises:
            LedgerError: A table cannot be read or created.
            UnsafeStoreError: The store, tested when the journal is created, loses commits.
        """
        known: dict[str, Known] = {}
        content: list[pa.Table] = []

        async def open_journal() -> None:
            if self._journal is None:
                known[self.journal_name] = await self._open_or_create(
                    self.journal_name, JOURNAL_SCHEMA
                )

        async def open_head() -> None:
            adopted = await self._adopt_structure()
            known[self.head_name] = adopted or await self._open_or_create(
                self.head_name, HEAD_SCHEMA
            )

        is_unwritten = False  # whether the journal had no events when it was opened

        async def first_rows() -> pa.Table:
            nonlocal is_unwritten
            # Above all epochs ever used, so that no event of an earlier head passes for a new one.
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
            _, found = await self._open_founded(
                self.head_name,
                HEAD_SCHEMA,
                "tableName",
                first_rows,
                has_lease,
                known[self.head_name],
            )
            content.append(found)

        await run_each((open_journal, open_head), lambda step: step())
        is_unwritten = self._journal is None and known[self.journal_name].is_new
        await run_each((found_journal, found_head), lambda step: step())
        return parse_head(content[0], self.head_name)

    async def _found_journal(self, known: Known | None = None) -> Table:
        table, content = await self._open_founded(
            self.journal_name, JOURNAL_SCHEMA, "id", self._first_event, has_founding, known
        )
        self._journal = table
        if known is not None and known.is_new and await table.version() == CREATED_AT + 1:
            self._read = CREATED_AT + 1, parse_journal(content, self.journal_name)
        return table

    # ---- writing --------------------------------------------------------------------------------

    async def ensure_lease(self, key: str) -> None:
        """Inserts the row of a free lease unless it exists. The head must exist."""
        table = await self.store.open(self.head_name)
        self.commits += 1
        await table.insert_missing(
            "tableName", rows_to_arrow([lease_row(key, at=self._clock.wall())])
        )

    async def update_lease(self, values: Mapping[str, Any], condition: str, key: str) -> int:
        """Updates a lease row if it meets an SQL condition; returns 1 if it did, else 0."""
        table = await self.store.open(self.head_name)
        self.commits += 1
        rows, _ = await table.update(
            values=values, where=f"tableName = {sql_literal(lease_row_name(key))} AND {condition}"
        )
        return rows

    async def take_rows(self, key: str, epoch: int, owner: str) -> None:
        """Raises all rows of a lease to the holder's epoch, so that older holders' writes fail."""
        table = await self.store.open(self.head_name)
        self.commits += 1
        await table.update(
            values={"epoch": epoch, "owner": owner},
            where=f"lease = {sql_literal(key)} AND epoch < {epoch}",
        )

    async def own_rows(self, rows: Sequence[HeadRow]) -> None:
        """Inserts rows for lines, or takes over the existing rows that other systems wrote.

        Merges identical duplicates that another system left. The caller must hold the lease.
        """
        if not rows:
            return
        table = await self.store.open(self.head_name)
        self.commits += 1
        inserted = await table.insert_missing("tableName", rows_to_arrow(rows))
        if inserted == len(rows):
            return
        names = ", ".join(sql_literal(row.name) for row in rows)
        # Never a newer holder's row: the process may have been paused before this call.
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
                # The journal already has the version: after a crash here it restores the row.
                await table.delete(f"tableName = {sql_literal(name)} AND {not_newer}")
                await table.refresh()
                keep = [row for row in rows if row.name == name]
                await table.insert_missing("tableName", rows_to_arrow(keep))
                await table.refresh()
                self.commits += 2

    async def write_rows(self, rows: Sequence[HeadRow], epoch: int, owner: str) -> bool:
        """Replaces rows, each only if it still carries the holder's epoch and owner.

        Returns:
            Whether all rows were replaced. If not, another process or system wrote some of them.
        """
        table = await self.store.open(self.head_name)
        self.commits += 1
        fence = f"target.epoch = {epoch} AND target.owner = {sql_literal(owner)}"
        changed = await table.replace_matching("tableName", rows_to_arrow(rows), fence)
        return changed == len(rows)

    async def append(self, events: Sequence[Event], owner: str, stamp: Stamp | None = None) -> None:
        """Appends events in one commit; they are durable on return.

        If LanceDB fails, the commit may still have been made: the journal is checked, restored if
        it was overwritten, and the append is retried if the events are missing. On a local disk
        the events are read back, and taken back and appended again if they differ.

        Args:
            events: The events, at least one.
            owner: The writer's nonce.
            stamp: The fields that all events share, `None` if the events have them already.

        Raises:
            StoreError: LanceDB failed, and the journal does not contain the events.
            LedgerUnreadableError: What was written could not be read back.
        """
        if len(events) > _THREAD_EVENTS:
            data = await anyio.to_thread.run_sync(events_to_arrow, events, owner, stamp)
        else:
            data = events_to_arrow(events, owner, stamp)
        wanted = data["id"][0].as_py()
        for attempt in range(ATTEMPTS):
            try:
                if self._journal is None:
                    self._journal = await self.store.open(self.journal_name)
                self.commits += 1
                version = await self._journal.append(data)
                if not self._reads_back or await reads_back(self._journal, data):
                    return
                self._log.warning(ev.LEDGER_RETRIED, error="the journal could not be read back")
                await take_back(self._journal, version)
                self.commits += 1
                if attempt == READ_BACK_ATTEMPTS - 1:
                    raise self._unreadable(self.journal_name, damaged(self.journal_name))
            except LedgerError:
                raise
            except StoreError:
                # The commit may have been made: check, and restore an overwritten journal.
                journal = await self._found_journal()
                if await journal.count_rows(f"id = {sql_literal(wanted)}"):
                    return
                if attempt == ATTEMPTS - 1:
                    raise
                await anyio.sleep(min(0.01 * 2**attempt, 0.5))

    async def compact(self, *, head_over: int, journal_over: int) -> None:
        """Compacts each table that has more fragments than given. The caller holds the lease."""
        for name, limit in ((self.head_name, head_over), (self.journal_name, journal_over)):
            table = await self.store.find(name)
            if table is not None and await table.fragments() > limit:
                before = await table.version()
                await table.compact()
                self.commits += 1
                if self._reads_back and not await reads_back(table):
                    await take_back(table, await table.version(), to=before)
                    self._log.warning(ev.LEDGER_RETRIED, error=f"{name} could not be compacted")
                    continue
                self._log.debug(ev.LEDGER_COMPACTED, ledger_table=name)
