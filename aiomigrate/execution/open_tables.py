"""The open tables of one lease, kept so that the next migration need not look again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from aiomigrate.clock import Clock
from aiomigrate.commits.table_target import TableTarget
from aiomigrate.concurrency import run_each
from aiomigrate.execution.attempt import Attempt, Recorder
from aiomigrate.ledger.writer import Writer
from aiomigrate.operations.tables import CreateTable
from aiomigrate.schema.state import TableState
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Opened


class OpenTables:
    """Opens the tables of migrations, and keeps them open for the next one.

    Attributes:
        has_run_code: Whether a function has run, which may commit through its own connection.
    """

    def __init__(self, store: Store, writer: Writer, recorder: Recorder, *, clock: Clock) -> None:
        """Knows no table yet.

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
        """Opens every table that a migration touches."""
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
            is_seen, known = self._take(attempt, target.name)
            if not (is_seen and known is None):  # else it was not there, as a new `Touched` says
                await target.open(known, is_latest=attempt.is_quick and not self.has_run_code)
            if target.name in attempt.savepoints:
                await target.resume_from(attempt.savepoints[target.name])

        await run_each(tables.values(), opened)
        attempt.tables |= tables  # only now: what is not opened yet has no state to be told of

    def remember(self, seen: Mapping[str, Opened | None], at_s: float) -> None:
        """Takes over tables as they were seen a moment ago, by nobody but whom we know of.

        Args:
            seen: What was seen, by table; `None` where there was none.
            at_s: Monotonic time of it.
        """
        self._recent |= {name: (at_s, opened) for name, opened in seen.items()}

    def invalidate(self, names: Iterable[str]) -> None:
        """Looks at tables anew when their turn comes: something is about to commit to them."""
        for name in names:
            self._recent.pop(name, None)

    async def state_of(self, name: str) -> tuple[int, TableState | None]:
        """Returns table_version and state of a table, as it was a moment ago if it was seen then.

        Raises:
            StoreError: It exists but cannot be opened.
        """
        at_s, opened = self._recent.get(name, (0.0, None))
        if opened is not None and self._clock.monotonic() - at_s < _FRESH_S:
            return opened.version, opened.state
        return await self._store.state_of(name)

    def _take(self, attempt: Attempt, name: str) -> tuple[bool, Opened | None]:
        """Returns whether a table was looked at a moment ago, and what was there.

        To a migration that is quickly done that is good enough: its first commit tells if others
        came between, as it does of those that come right after a look. That there was none is good
        enough for one that begins by making it; code may have made it through its own connection.
        """
        at_s, opened = self._recent.pop(name, (-math.inf, None))
        is_fresh = self._clock.monotonic() - at_s < _FRESH_S and not attempt.savepoints
        if opened is None:
            first = next(iter(attempt.script.operations), None)
            is_fresh = is_fresh and isinstance(first, CreateTable) and first.table == name
        return is_fresh, opened if is_fresh else None

    def keep(self, attempt: Attempt) -> None:
        """Keeps the tables of a migration for the one that comes next."""
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
