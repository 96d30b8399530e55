"""What an application's start does not wait for. Pure.

Migrations marked `background` run beside the application, and everything that comes after them
waits for them. Which those are follows from scripts and recorded versions, so that a start with
nothing else to do costs one read of the head.
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
    """What work in the background has in hand.

    Attributes:
        lines: Lines whose records are its own to write.
        tables: Tables it may be changing.
        holder: Who holds the lease for it, in words.
    """

    lines: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()
    holder: str = ""

    def refuse(self, script: Script) -> None:
        """Refuses what would come between.

        Raises:
            BackgroundBusyError: The migration's line or a table of it is in hand.
        """
        shared = self.tables & set(script.touches)
        if script.line in self.lines or shared:
            what = f"table {min(shared)!r}" if shared else f"{script.line!r}"
            raise self._error(str(script), what, line=script.line, version=script.version)

    def refuse_line(self, line: str, scripts: Scripts) -> None:
        """Refuses to change what is recorded of a line while a process works on it.

        Raises:
            BackgroundBusyError: The line or a table of it is in hand.
        """
        if not self.holder:
            return
        touched = {table for script in scripts.of(line) for table in script.touches}
        if line in self.lines or not touched.isdisjoint(self.tables):
            raise self._error(repr(line), repr(line), line=line)

    def _error(self, subject: str, what: str, **where: Any) -> BackgroundBusyError:
        by = f" by {self.holder}" if self.holder else ", interrupted"
        return BackgroundBusyError(
            f"{subject} cannot be changed now: work in the background on {what} is under way{by}.",
            "Let it end (`aiomigrate upgrade --background-only`), or stop its process first.",
            **where,
        )


IDLE = Busy()


def busy_with(
    rows: Sequence[HeadRow], decided: Reconciled, scripts: Scripts, *, holder: str | None
) -> Busy:
    """Returns what work in the background has in hand.

    Args:
        rows: The head without lease rows.
        decided: The state of every line.
        scripts: All scripts.
        holder: Who holds the background lease, `None` if it is free. It may be dead.
    """
    lines = lent(rows) if holder is not None else set()
    tables: set[str] = set()
    for line, state in decided.lines.items():
        if state.unfinished is not None and state.unfinished.started.lease == BACKGROUND_LEASE:
            lines.add(line)
            tables.update(state.unfinished.savepoints)
    if holder is not None:
        # Another system may have rewritten a row, and wiped off whose it is.
        rewritten = {row.name for row in rows if not row.is_ours}
        lines |= {s.line for s in scripts.all if s.background} & rewritten
    for line in lines:
        found = decided.lines.get(line)
        current = 0 if found is None else found.current
        tables.update(t for script in scripts.after(line, current) for t in script.touches)
    return Busy(lines=frozenset(lines), tables=frozenset(tables), holder=holder or "")


def lent(rows: Iterable[HeadRow]) -> set[str]:
    """Returns the lines whose head rows were handed to the background lease and not back."""
    return {row.name for row in rows if row.lease == BACKGROUND_LEASE}


def known_tables(scripts: Scripts, current: Mapping[str, int]) -> set[str]:
    """Returns the tables that an applied migration touches: taken to exist without a look."""
    return {t for s in scripts.all if s.version <= current.get(s.line, 0) for t in s.touches}


def defer(
    pending: Mapping[Key, Script], order: Order, existing: Collection[str], busy: Busy
) -> frozenset[Key]:
    """Returns what an application's start does not wait for.

    That is what is marked, unless no table of it exists yet (then nobody waits for it, and a fresh
    database comes to its whole target at once); what work in the background has in hand; and all
    that comes after those.

    Args:
        pending: What is to run.
        order: Its order.
        existing: Tables that exist.
        busy: What work in the background has in hand.
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
    """Returns what is deferred, if the head alone proves that nothing else is to be done.

    `None` means "look closer". What is deferred by this is also deferred by the whole picture.

    Args:
        rows: The head without lease rows.
        scripts: All scripts.
        lease: The row of the background lease, `None` if there never was one.
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
    if lease is not None and not held and lease.phase and lent(rows):
        return None  # freed of a dead holder: its rows may be behind its journal
    current = {line: row.version for line, row in recorded.items()}
    deferred = deferred_by_head(rows, scripts, lease)
    is_all = all(s.key in deferred for s in scripts.all if s.version > current.get(s.line, 0))
    return deferred if is_all else None


def deferred_by_head(
    rows: Sequence[HeadRow], scripts: Scripts, lease: HeadRow | None
) -> frozenset[Key]:
    """Returns what is deferred as far as the head alone tells; none where scripts do not fit.

    Args:
        rows: The head without lease rows.
        scripts: All scripts.
        lease: The row of the background lease, `None` if there never was one.
    """
    if not scripts.has_background:
        return frozenset()
    current = {row.name: row.version for row in rows}
    pend = {s.key: s for s in scripts.all if s.version > current.get(s.line, 0)}
    try:
        order = ordered(pend.values(), current, scripts)
    except DependencyError:
        return frozenset()
    lines = lent(rows) if lease is not None and lease.owner else set()
    tables = {t for script in pend.values() if script.line in lines for t in script.touches}
    busy = Busy(lines=frozenset(lines), tables=frozenset(tables))
    return defer(pend, order, known_tables(scripts, current), busy)
