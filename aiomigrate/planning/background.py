"""Decides which migrations an application's start does not wait for. Pure.

Migrations marked `background` run while the application serves, and migrations that must follow
them wait for them. Scripts and recorded versions determine which ones these are, so that a start
with nothing else to do costs one read of the head. `runs.upgrade` runs them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiomigrate.errors import BackgroundBusyError, DependencyError
from aiomigrate.ledger.records import BACKGROUND_LEASE, HeadRow
from aiomigrate.migration.model import Key, Script, Scripts
from aiomigrate.planning.dependencies import Order, ordered
from aiomigrate.planning.reconcile import Reconciled, digest_at, is_at_target


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """The lines and tables that background work is using.

    Attributes:
        lines: Lines whose records only the background work may write.
        tables: Tables that it may be changing.
        holder: The holder of the background lease as text, empty if nobody holds it.
    """

    lines: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()
    holder: str = ""

    def refuse(self, script: Script) -> None:
        """Refuses a migration that would interfere with background work.

        Raises:
            BackgroundBusyError: Background work uses the migration's line or one of its tables.
        """
        shared = self.tables & set(script.touches)
        if script.line in self.lines or shared:
            what = f"table {min(shared)!r}" if shared else f"{script.line!r}"
            raise self._error(str(script), what, line=script.line, version=script.version)

    def refuse_line(self, line: str, scripts: Scripts) -> None:
        """Refuses to change the records of a line while another process runs background work on it.

        Raises:
            BackgroundBusyError: The process uses the line or one of its tables.
        """
        if not self.holder:
            return
        touched = {table for script in scripts.of(line) for table in script.touches}
        if line in self.lines or not touched.isdisjoint(self.tables):
            raise self._error(repr(line), repr(line), line=line)

    def _error(self, subject: str, what: str, **where: Any) -> BackgroundBusyError:
        state = f"is running in {self.holder}" if self.holder else "was interrupted"
        return BackgroundBusyError(
            f"{subject} cannot be changed now: background work on {what} {state}.",
            "Let it finish (`aiomigrate upgrade --background-only`), or stop its process first.",
            **where,
        )


IDLE = Busy()


def busy_with(
    rows: Sequence[HeadRow], decided: Reconciled, scripts: Scripts, *, holder: str | None
) -> Busy:
    """Returns the lines and tables that background work is using.

    Args:
        rows: The head without lease rows.
        decided: The state of every line.
        scripts: All scripts.
        holder: The holder of the background lease, `None` if it is free. It may have crashed.
    """
    lines = background_lines(rows) if holder is not None else set()
    tables: set[str] = set()
    for line, state in decided.lines.items():
        if state.unfinished is not None and state.unfinished.started.lease == BACKGROUND_LEASE:
            lines.add(line)
            tables.update(state.unfinished.savepoints)
    if holder is not None:
        # Another system may have rewritten a row, and erased which lease it belongs to.
        rewritten = {row.name for row in rows if not row.is_ours}
        lines |= {s.line for s in scripts.all if s.background} & rewritten
    for line in lines:
        found = decided.lines.get(line)
        current = 0 if found is None else found.current
        tables.update(t for script in scripts.after(line, current) for t in script.touches)
    return Busy(lines=frozenset(lines), tables=frozenset(tables), holder=holder or "")


def background_lines(rows: Iterable[HeadRow]) -> set[str]:
    """Returns the lines whose head rows belong to the background lease."""
    return {row.name for row in rows if row.lease == BACKGROUND_LEASE}


def known_tables(scripts: Scripts, current: Mapping[str, int]) -> set[str]:
    """Returns the tables that applied migrations touch, which are assumed to exist."""
    return {t for s in scripts.all if s.version <= current.get(s.line, 0) for t in s.touches}


def defer(
    pending: Mapping[Key, Script], order: Order, existing: Collection[str], busy: Busy
) -> frozenset[Key]:
    """Returns the migrations that an application's start does not wait for.

    These are: migrations marked `background`, unless none of their tables exists yet (so that a new
    database reaches its whole target at once); migrations on lines and tables that background work
    is using; and all migrations that must follow them.

    Args:
        pending: The pending migrations.
        order: Their order.
        existing: Tables that exist.
        busy: The lines and tables that background work is using.
    """
    found: set[Key] = set()
    for key in order.keys:
        script = pending[key]
        tables = set(script.touches)
        if (
            (script.background and not tables.isdisjoint(existing))
            or script.line in busy.lines
            or not tables.isdisjoint(busy.tables)
            or not found.isdisjoint(order.before[key])
        ):
            found.add(key)
    return frozenset(found)


def ready(
    rows: Sequence[HeadRow], scripts: Scripts, lease: HeadRow | None
) -> frozenset[Key] | None:
    """Returns the deferred migrations, if the head alone proves that there is nothing else to do.

    Migrations that are deferred by the head alone are also deferred by head and journal together.

    Args:
        rows: The head without lease rows.
        scripts: All scripts.
        lease: The row of the background lease, `None` if there never was one.

    Returns:
        The deferred migrations, empty at target; `None` if the head does not prove it, and the
        journal must be read.
    """
    if is_at_target(rows, scripts):
        return frozenset()
    if not scripts.has_background:
        return None
    recorded: dict[str, HeadRow] = {}
    for row in rows:
        if not scripts.of(row.name):
            continue
        if row.name in recorded or not row.is_ours or row.version > scripts.latest(row.name):
            return None
        if (row.digest or "") != digest_at(scripts, row.name, row.version):
            return None
        recorded[row.name] = row
    held = lease is not None and bool(lease.owner)
    if lease is not None and not held and lease.phase and background_lines(rows):
        return None  # freed after its holder crashed: its rows may be behind its journal
    current = {line: row.version for line, row in recorded.items()}
    deferred = deferred_by_head(rows, scripts, lease)
    is_all = all(s.key in deferred for s in scripts.all if s.version > current.get(s.line, 0))
    return deferred if is_all else None


def deferred_by_head(
    rows: Sequence[HeadRow], scripts: Scripts, lease: HeadRow | None
) -> frozenset[Key]:
    """Returns the deferred migrations according to the head alone; none if dependencies fail.

    Args:
        rows: The head without lease rows.
        scripts: All scripts.
        lease: The row of the background lease, `None` if there never was one.
    """
    if not scripts.has_background:
        return frozenset()
    current = {row.name: row.version for row in rows}
    pending = {s.key: s for s in scripts.all if s.version > current.get(s.line, 0)}
    try:
        order = ordered(pending.values(), current, scripts)
    except DependencyError:
        return frozenset()
    lines = background_lines(rows) if lease is not None and lease.owner else set()
    tables = {t for script in pending.values() if script.line in lines for t in script.touches}
    busy = Busy(lines=frozenset(lines), tables=frozenset(tables))
    return defer(pending, order, known_tables(scripts, current), busy)
