"""Keeps tables open under one lease, so that the next migration need not read them again.

Committing to them is not done here (`commits.tracked_table`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from aiomigrate.clock import Clock
from aiomigrate.commits.table_target import TableTarget
from aiomigrate.concurrency import run_each
from aiomigrate.execution.attempt import Attempt, Recorder
from aiomigrate.ledger.writer import Writer
from aiomigrate.schema.state import TableState
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Opened


class OpenTables:
    """Opens the tables of migrations, and keeps them open for the next migration.

    Attributes:
        has_run_code: Whether a function has run; it may commit through its own connection.
    """

    def __init__(self, store: Store, writer: Writer, recorder: Recorder, *, clock: Clock) -> None:
        """Starts without open tables.

        Args:
            store: The database.
            writer: Checks the lease before every commit.
            recorder: Announces every commit.
            clock: Clocks.
        """
        self._store = store
        self._writer = writer
        self._recorder = recorder
        self._clock = clock
        self._recent: dict[str, tuple[float, Opened | None]] = {}
        self.has_run_code = False

    async def open_for(self, attempt: Attempt) -> None:
        """Opens every table that a migration touches, and adds them to `attempt.tables`.

        Raises:
            StoreError: A table exists but cannot be read.
        """
        tables = {
            name: TableTarget(
                self._store,
                name,
                guard=self._writer.check,
                announce=self._recorder.announcer(attempt),
                others=attempt.tables,
            )
            for name in attempt.script.touches
        }

        async def opened(target: TableTarget) -> None:
            is_fresh, known = self._take(attempt, target.name)
            if not (is_fresh and known is None):  # else it does not exist: a new target says so
                await target.open(known, is_latest=attempt.is_quick and not self.has_run_code)
            if target.name in attempt.savepoints:
                await target.resume_from(attempt.savepoints[target.name])

        await run_each(tables.values(), opened)
        attempt.open(tables)  # only now: unopened tables have no state to report

    def remember(self, seen: Mapping[str, Opened | None], at_s: float) -> None:
        """Remembers tables as they were just read, for the next migration.

        Args:
            seen: Open handles by table, `None` for a table that does not exist.
            at_s: Monotonic time of the read.
        """
        self._recent |= {name: (at_s, opened) for name, opened in seen.items()}

    def invalidate(self, names: Iterable[str]) -> None:
        """Forgets tables that are about to be changed, so that they are read again when needed."""
        for name in names:
            self._recent.pop(name, None)

    async def state_of(self, name: str) -> tuple[int, TableState | None]:
        """Returns table_version and state of a table, as remembered if that is recent enough.

        Returns:
            `None` as the state of a table that does not exist.

        Raises:
            StoreError: The table exists but cannot be opened.
        """
        at_s, opened = self._recent.get(name, (0.0, None))
        if opened is not None and self._clock.monotonic() - at_s < _FRESH_S:
            return opened.version, opened.state
        return await self._store.state_of(name)

    def _take(self, attempt: Attempt, name: str) -> tuple[bool, Opened | None]:
        """Returns whether a remembered table is recent enough to be used, and its handle.

        A quick migration may use it without a new read: its first commit detects foreign commits
        in between, in the same way as foreign commits right after a read. That a table was missing
        is used only if the first operation creates it, since code may have created it through its
        own connection.
        """
        at_s, opened = self._recent.pop(name, (-math.inf, None))
        is_fresh = self._clock.monotonic() - at_s < _FRESH_S and not attempt.savepoints
        if opened is None:
            first = next(iter(attempt.script.operations), None)
            is_created = first is not None and first.creates_table and first.table == name
            is_fresh = is_fresh and is_created
        return is_fresh, opened if is_fresh else None

    def keep(self, attempt: Attempt) -> None:
        """Remembers the tables of a migration for the next one, and drops outdated entries."""
        now = self._clock.monotonic()
        while self._recent:  # oldest first
            name, (at_s, _) = next(iter(self._recent.items()))
            if now - at_s < _FRESH_S:
                break
            del self._recent[name]
        self.remember(
            {t.name: t.opened for t in attempt.tables.values() if t.opened is not None}, now
        )


_FRESH_S = 1.0
