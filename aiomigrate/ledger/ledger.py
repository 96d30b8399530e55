"""The two metadata tables of one database: reading and writing them.

How they come into being beside other processes is for `founding`; what their events mean is for
`history`; when they are written is for `writer`.
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
from aiomigrate.errors import (
    StoreError,
)
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
from aiomigrate.ledger.founding import (
    ATTEMPTS,
    CREATED_AT,
    Known,
    MetadataTables,
    has_founding,
    has_lease,
)
from aiomigrate.ledger.records import RUN_LEASE, Event, HeadRow
from aiomigrate.schema.sql import sql_literal
from aiomigrate.store.table import Table

_MANY = 32  # events that take longer to put together than the event loop is to be kept

FirstRows = Callable[[int], Sequence[HeadRow]]
"""Returns the rows that a head begins with, given the first epoch that nobody used."""


class Ledger(MetadataTables):
    """Reads and writes the metadata tables of one database."""

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
                beneath = await self._previous_content(table, has_founding)
                content = content if beneath is None else beneath
            elif table is not None and content is not None and has_founding(content):
                self._journal = table  # what `ensure` would look for again
        except StoreError as exc:
            raise self._unreadable(self.journal_name, exc) from exc
        if content is None:
            return []
        events = await anyio.to_thread.run_sync(parse_journal, content, self.journal_name)
        if self._journal is table:  # founded, and not wiped
            self._read = version, events
        return events

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
        known: dict[str, Known] = {}
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
                has_lease,
                known[self.head_name],
            )
            content.append(found)

        await run_each((look_at_journal, look_at_head), lambda look: look())
        is_unwritten = self._journal is None and known[self.journal_name].is_new
        await run_each((found_journal, found_head), lambda make: make())
        return parse_head(content[0], self.head_name)

    async def _found_journal(self, known: Known | None = None) -> Table:
        table, content = await self._founded(
            self.journal_name, JOURNAL_SCHEMA, "id", self._first_event, has_founding, known
        )
        self._journal = table
        if known is not None and known.is_new and await table.version() == CREATED_AT + 1:
            self._read = CREATED_AT + 1, parse_journal(content, self.journal_name)
        return table

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
        for attempt in range(ATTEMPTS):
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
                if attempt == ATTEMPTS - 1:
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
