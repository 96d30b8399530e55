"""What a migration needs only while it runs, removed once its end is recorded; then the head.

Witness columns and savepoint branches go after `applied` is durable; the head follows last, so
that a crash in between is seen and made good by the next holder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel

from aiomigrate.clock import Clock
from aiomigrate.commits.commit_identity import matches_announcement
from aiomigrate.commits.effects import shape_effect
from aiomigrate.errors import (
    TableVersionGoneError,
)
from aiomigrate.execution.applier import Applier
from aiomigrate.execution.open_tables import OpenTables
from aiomigrate.ledger.records import Event, HeadRow, Kind, new_event
from aiomigrate.ledger.writer import Writer
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Table


@dataclass(frozen=True, slots=True)
class _PendingCleanup:
    """A migration that is done, and whose savepoint branches go once that is durable."""

    version: int
    branches: Mapping[str, str]
    opened: Mapping[str, Table]
    is_durable: anyio.Event


class Cleanup:
    """Removes what recorded migrations have left, and lets the head follow."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        applier: Applier,
        tables: OpenTables,
        *,
        digest_at: Callable[[str, int], str],
        clock: Clock,
    ) -> None:
        """Has nothing to remove yet.

        Args:
            store: The database.
            writer: The holder's ledger writer.
            applier: Removes columns and branches.
            tables: What was seen of the tables, which a removal makes stale.
            digest_at: Returns a line's chain digest at a version.
            clock: Clocks.
        """
        self._store = store
        self._writer = writer
        self._applier = applier
        self._tables = tables
        self._digest_at = digest_at
        self._clock = clock
        self._pending: dict[str, _PendingCleanup] = {}

    def postpone(
        self,
        line: str,
        version: int,
        branches: Mapping[str, str],
        opened: Mapping[str, Table],
        is_durable: anyio.Event,
    ) -> None:
        """Keeps the branches of a migration until its end is durable (see `clean_line`)."""
        self._pending[line] = _PendingCleanup(version, branches, opened, is_durable)

    async def clean(
        self,
        line: str,
        version: int,
        tables: list[str],
        branches: Mapping[str, str],
        opened: Mapping[str, Table] | None = None,
    ) -> None:
        """Removes what a recorded migration needed only while it ran, and records those commits.

        The head follows only afterwards, so that a crash here is seen and made good.

        Raises:
            LeaseLostError: Another process has taken over.
        """
        if cleaned := await self._applier.clean(tables, branches, opened):
            await self._record_cleaned(line, version, cleaned)

    async def clean_line(self, line: str) -> None:
        """Cleans after the last migration of a line, if that is still to be done.

        Before the next one ends, so there is one at most, the last that the journal has: whoever
        comes after a crash looks for no other. And when none follows at once. Shielded.

        Raises:
            LeaseLostError: Another process has taken over.
        """
        left = self._pending.pop(line, None)
        if left is None or self._writer.error is not None:
            return
        with anyio.CancelScope(shield=True):
            await self._writer.wait_durable(left.is_durable)
            await self.clean(line, left.version, [], left.branches, left.opened)
            self.lift(line, left.version)

    async def clean_after(self, ended: Event) -> None:
        """Cleans after a migration whose process may have died before, or while, it did so.

        Args:
            ended: Its `applied` or `rolled_back` event, after which nothing else was recorded.

        Raises:
            LeaseLostError: Another process has taken over.
        """
        tables = list(ended.detail.get("cleanup", []))
        self._tables.invalidate(tables)
        cleaned = await self._applier.clean(tables, ended.detail.get("branches", {}))
        for name in tables:
            after = int(ended.tables.get(name, {}).get("after", 0))
            if name not in cleaned and await self._was_cleaned(name, after):
                cleaned[name] = {"before": after, "after": after + 1}
        if cleaned:
            await self._record_cleaned(ended.line or "", ended.version or 0, cleaned)

    async def _was_cleaned(self, name: str, after: int) -> bool:
        """Returns whether the commit after a table_version is the one that cleaned it."""
        table = await self._store.find(name)
        if table is None:
            return False
        try:
            state = await (await table.at(after)).state()
        except TableVersionGoneError:
            return False
        effect = shape_effect(state.with_fields(state.fields()))
        return await matches_announcement(self._store, name, after, effect)

    async def _record_cleaned(self, line: str, version: int, tables: Mapping[str, Any]) -> None:
        event = new_event(
            Kind.CLEANED, at=self._clock.wall(), line=line, version=version, tables=tables
        )
        await self._writer.record(event)

    def lift(self, line: str, version: int) -> None:
        """Lets the head follow to a version the journal holds."""
        self._writer.write_row_later(self.head_row(line, version))

    def head_row(self, line: str, version: int) -> HeadRow:
        """Returns the head row of a line at a version."""
        digest = self._digest_at(line, version)
        return self._writer.lease.row(line, version, at=self._clock.wall(), digest=digest)
