"""Removes witness columns and savepoint branches of recorded migrations, then sets the head.

They are removed after `applied` is durable, and the head is set last, so that the next holder of
the lease detects and completes a cleanup that crashed. The removal is done by `execution.applier`.
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
from aiomigrate.errors import TableVersionGoneError
from aiomigrate.execution.applier import Applier
from aiomigrate.execution.open_tables import OpenTables
from aiomigrate.ledger.records import Event, HeadRow, Kind, new_event
from aiomigrate.ledger.writer import Writer
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Table


@dataclass(frozen=True, slots=True)
class _PendingCleanup:
    """A completed migration whose savepoint branches are removed once that is durable."""

    version: int
    branches: Mapping[str, str]
    opened: Mapping[str, Table]
    is_durable: anyio.Event


class Cleanup:
    """Cleans up after recorded migrations under one lease, and sets the head."""

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
        """Starts with no pending cleanup.

        Args:
            store: The database.
            writer: The ledger writer of the lease's holder.
            applier: Removes columns and branches.
            tables: The open tables, which a removal makes stale.
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
        """Defers the cleanup of a migration until its end is durable (see `clean_line`).

        Args:
            line: The version line.
            version: The version of the migration.
            branches: Savepoint branch by table.
            opened: Open handles by table.
            is_durable: Set once the `applied` event is durable.
        """
        self._pending[line] = _PendingCleanup(version, branches, opened, is_durable)

    async def clean(
        self,
        line: str,
        version: int,
        tables: list[str],
        branches: Mapping[str, str],
        opened: Mapping[str, Table] | None = None,
    ) -> None:
        """Removes witness columns and savepoint branches of a migration, and records the commits.

        The head must be set only afterwards, so that the next holder detects a crash in here.

        Args:
            line: The version line.
            version: The version of the migration.
            tables: Tables with witness columns to drop.
            branches: Savepoint branch by table.
            opened: Open handles by table.

        Raises:
            LeaseLostError: Another process has taken over.
        """
        if cleaned := await self._applier.clean(tables, branches, opened):
            await self._record_cleaned(line, version, cleaned)

    async def clean_line(self, line: str) -> None:
        """Performs the deferred cleanup of a line; does nothing if there is none. Shielded.

        Called before the next migration of the line ends, and when none follows at once. So at
        most one cleanup is pending per line, that of the last migration in the journal; after a
        crash the next holder looks only for that one.

        Raises:
            LeaseLostError: Another process has taken over.
        """
        left = self._pending.pop(line, None)
        if left is None or self._writer.error is not None:
            return
        with anyio.CancelScope(shield=True):
            await self._writer.wait_durable(left.is_durable)
            await self.clean(line, left.version, [], left.branches, left.opened)
            self.set_head_later(line, left.version)

    async def clean_after(self, ended: Event) -> None:
        """Repeats the cleanup of a migration whose process may have crashed before its end.

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
        """Returns whether the commit after a table_version is the cleanup of that table."""
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

    def set_head_later(self, line: str, version: int) -> None:
        """Sets the head of a line to a version, with the next head update."""
        self._writer.write_row_later(self.head_row(line, version))

    def head_row(self, line: str, version: int) -> HeadRow:
        """Returns the head row of a line at a version."""
        digest = self._digest_at(line, version)
        return self._writer.lease.row(line, version, at=self._clock.wall(), digest=digest)
