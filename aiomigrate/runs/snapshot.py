"""Reads a database and decides what each line needs. Writes nothing.

A run reads twice: first without the lease, to find out whether there is anything to do, then under
the lease (`runs.session.Session.take_over`). A `View` is what it reads both times, and a `Snapshot`
the result. `inspection` uses the same readers. Decisions themselves are pure and in `planning`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import anyio
import anyio.to_thread
import pyarrow as pa

from aiomigrate import events as ev
from aiomigrate.backfill.caller import survey
from aiomigrate.errors import ConfigurationError, LedgerConflictError
from aiomigrate.ledger.codec import Head, parse_head, versions_if_current
from aiomigrate.ledger.history import Journal, fold
from aiomigrate.ledger.lease import holder_of
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.ledger.records import BACKGROUND_LEASE, Event
from aiomigrate.migration.model import Scripts, Target
from aiomigrate.planning.background import IDLE, Busy, busy_with, known_tables, ready
from aiomigrate.planning.plan import Plan, build_plan
from aiomigrate.planning.preflight import OnDestructive, check_operations, in_script
from aiomigrate.planning.reconcile import OnAhead, Reconciled, disputed, reconcile
from aiomigrate.planning.table_identity import Match, last_sightings, spell
from aiomigrate.schema.sql import quote
from aiomigrate.schema.state import TableState, differences
from aiomigrate.store.commit_log import commit_times
from aiomigrate.store.connection import SqlCheck, Store
from aiomigrate.store.table import Opened, index_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The metadata tables as they were read, and the decisions based on them.

    Attributes:
        head: The head.
        events: All journal events.
        journal: The folded events.
        decided: The state of every line.
        plan: The migrations to run; empty if the view plans nothing.
        busy: The lines and tables that background work is using.
    """

    head: Head
    events: Sequence[Event]
    journal: Journal
    decided: Reconciled
    plan: Plan
    busy: Busy = IDLE


@dataclass(frozen=True, slots=True)
class AtTarget:
    """A database whose head alone proves that startup has nothing to do.

    Attributes:
        lines: The version of each line.
        deferred: Background migrations that are pending, as line and version.
    """

    lines: dict[str, int]
    deferred: tuple[tuple[str, int], ...] = ()


async def read_head_fast(
    ledger: Ledger | None,
    scripts: Scripts,
    targets: Mapping[str, int],
    digests: Mapping[str, str],
) -> tuple[Head, AtTarget | None]:
    """Reads the head once, and parses it only if necessary.

    Args:
        ledger: The metadata tables, `None` if there is no database.
        scripts: All migrations.
        targets: The newest version of each line.
        digests: The chain digest of each line at that version.

    Returns:
        The head, empty if it was not parsed or does not exist; and an `AtTarget` if the head alone
        proves that startup has nothing to do, else `None`.

    Raises:
        LedgerError: The head is unreadable or inconsistent.
    """
    if ledger is None:
        return Head(), None
    if not scripts.all:  # the journal tells whether there should be some
        return await ledger.read_head(), None
    content = await ledger.read_head_content()
    if content is None:
        return Head(), None
    lines = versions_if_current(content, targets, digests)
    if lines is not None:
        return Head(), AtTarget(lines)
    head = parse_head(content, ledger.head_name)
    deferred = ready(head.rows, scripts, head.leases.get(BACKGROUND_LEASE))
    if not deferred:
        return head, None
    return head, AtTarget({row.name: row.version for row in head.rows}, tuple(sorted(deferred)))


async def read_folded(ledger: Ledger) -> Journal:
    """Reads the journal and folds it, in a thread: a long one would block the event loop.

    Returns:
        The folded journal; empty if there is no journal.

    Raises:
        LedgerError: The journal is unreadable or inconsistent.
    """
    return await anyio.to_thread.run_sync(fold, await ledger.read_journal())


class SnapshotReader:
    """Reads the metadata of one database and decides the state of its lines."""

    def __init__(
        self,
        store: Store | None,
        ledger: Ledger | None,
        scripts: Scripts,
        *,
        on_ahead: OnAhead,
        log: Any,
    ) -> None:
        """Reads nothing yet.

        Args:
            store: The database, `None` if there is none.
            ledger: Its metadata tables, `None` if there is no database.
            scripts: All migrations.
            on_ahead: Whether a database that is newer than the scripts is an error.
            log: Bound logger.
        """
        self.store = store
        self.ledger = ledger
        self.scripts = scripts
        self._on_ahead = on_ahead
        self._log = log

    async def read(
        self, head: Head | None = None, events: Sequence[Event] | None = None
    ) -> Snapshot:
        """Reads head and journal unless they are given, and decides the state of every line.

        Reads both again, up to three times in all, if they contradict each other.

        Args:
            head: The head, if it has been read.
            events: All journal events, if they have been read.

        Returns:
            A snapshot with an empty plan.

        Raises:
            AiomigrateError: The first problem that prevents any migration from running.
        """
        for attempt in range(_READ_ATTEMPTS):
            if self.ledger is not None:
                head = head or await self.ledger.read_head()
                events = await self.ledger.read_journal() if events is None else events
            events = events or ()
            journal = await anyio.to_thread.run_sync(fold, events)
            decided = await self.decide(head or Head(), journal)
            is_torn = any(isinstance(p, LedgerConflictError) for p in decided.problems)
            if not is_torn or attempt == _READ_ATTEMPTS - 1:
                break
            # Another process may have rolled back between the two reads: read both again.
            head = events = None
            await anyio.sleep(0.05)
        events = events or ()
        decided.raise_first()
        for name, state in decided.lines.items():
            if not self.scripts.of(name):
                log = self._log.warning if state.history.current else self._log.debug
                log(ev.LINE_UNKNOWN, table=name, version=state.current)
            if state.is_ahead:
                self._log.warning(
                    ev.LINE_AHEAD, table=name, version=state.current, target=state.latest
                )
        head = head or Head()
        return Snapshot(
            head=head,
            events=events,
            journal=journal,
            decided=decided,
            plan=Plan(),
            busy=_busy(head, decided, self.scripts),
        )

    async def read_planned(
        self,
        *,
        tables: Collection[str] | None,
        to: Target,
        head: Head | None = None,
        events: Sequence[Event] | None = None,
    ) -> Snapshot:
        """Reads head and journal unless they are given, decides, and plans an upgrade.

        Args:
            tables: Lines to upgrade; all if `None`.
            to: `None` for the newest scripts, a maximum version, or a version by line.
            head: The head, if it has been read.
            events: All journal events, if they have been read.

        Raises:
            AiomigrateError: The first problem that prevents any migration from running.
        """
        snapshot = await self.read(head, events)
        existing: set[str] = set()
        if self.scripts.has_background and self.store is not None:
            current = {line: state.current for line, state in snapshot.decided.lines.items()}
            existing = known_tables(self.scripts, current) | set(await self.store.table_names())
        build = functools.partial(
            build_plan, snapshot.decided, self.scripts, tables=tables, to=to, existing=existing,
            busy=snapshot.busy, has_database=self.store is not None,
        )  # fmt: skip
        # In a thread: planning thousands of migrations would block the event loop.
        return replace(snapshot, plan=await anyio.to_thread.run_sync(build))

    async def decide(self, head: Head, journal: Journal) -> Reconciled:
        """Decides the state of every line. Reads the tables of disputed lines.

        Args:
            head: The head.
            journal: The folded journal.

        Raises:
            StoreError: A table exists but cannot be read.
        """
        mismatched = {}
        if self.store is not None:
            for line in disputed(head.rows, journal, self.scripts):
                last = journal.of(line).last
                for name in sorted(last.tables if last else ()):
                    shape = journal.shapes.get(name)
                    _, state = await self.store.state_of(name)
                    if shape is None:
                        continue
                    if state is None:
                        mismatched[line] = f"table {name} is missing"
                    elif found := differences(shape, state.shape()):
                        mismatched[line] = f"table {name}: {'; '.join(found)}"
        decide_lines = functools.partial(
            reconcile,
            head.rows,
            journal,
            self.scripts,
            on_ahead=self._on_ahead,
            mismatched=mismatched,
        )
        return await anyio.to_thread.run_sync(decide_lines)


def _busy(head: Head, decided: Reconciled, scripts: Scripts) -> Busy:
    """Returns the lines and tables that background work is using."""
    holder = holder_of(head, BACKGROUND_LEASE)
    return busy_with(head.rows, decided, scripts, holder=None if holder is None else str(holder))


class View(Protocol):
    """What a run reads, without the lease and again under it."""

    async def read(
        self, head: Head | None = None, events: Sequence[Event] | None = None
    ) -> Snapshot:
        """Reads head and journal unless they are given, and decides.

        Raises:
            AiomigrateError: The first problem that prevents the run.
        """


@dataclass(frozen=True, slots=True)
class LedgerView:
    """The state of every line, without a plan: for pruning."""

    reader: SnapshotReader

    async def read(
        self, head: Head | None = None, events: Sequence[Event] | None = None
    ) -> Snapshot:
        """Calls `SnapshotReader.read`."""
        return await self.reader.read(head, events)


@dataclass(frozen=True, slots=True)
class UpgradeView:
    """The state of every line, and the plan of an upgrade.

    Attributes:
        reader: Reads the database.
        tables: Lines to upgrade; all if `None`.
        to: `None` for the newest scripts, a maximum version, or a version by line.
    """

    reader: SnapshotReader
    tables: Collection[str] | None
    to: Target

    async def read(
        self, head: Head | None = None, events: Sequence[Event] | None = None
    ) -> Snapshot:
        """Calls `SnapshotReader.read_planned`."""
        return await self.reader.read_planned(
            tables=self.tables, to=self.to, head=head, events=events
        )


@dataclass(frozen=True, slots=True)
class UncheckedView:
    """Head and journal, not compared with the scripts: for stamping.

    Attributes:
        ledger: The metadata tables.
        scripts: All migrations.
    """

    ledger: Ledger
    scripts: Scripts

    async def read(
        self, head: Head | None = None, events: Sequence[Event] | None = None
    ) -> Snapshot:
        """Reads head and journal unless they are given. Decides nothing."""
        events = await self.ledger.read_journal() if events is None else events
        nothing = Reconciled(lines={}, problems=())
        head = head or await self.ledger.read_head()
        return Snapshot(
            head=head,
            events=events,
            journal=fold(events),
            decided=nothing,
            plan=Plan(),
            busy=_busy(head, nothing, self.scripts),
        )


_READ_ATTEMPTS = 3


async def check_plan(
    store: Store | None, plan: Plan, *, on_destructive: OnDestructive
) -> tuple[Plan, Mapping[str, Opened | None]]:
    """Checks every operation of a plan against the live tables.

    Args:
        store: The database, `None` if there is none.
        plan: The migrations to run.
        on_destructive: What to do about steps that discard data.

    Returns:
        The plan, with warnings and with the operations that discard data marked; and the opened
        tables by name, `None` for those that do not exist.

    Raises:
        OperationError: An operation does not fit its table.
        DestructiveError: A step discards data, which is not allowed.
        StoreError: A LanceDB call failed.
    """
    states: dict[str, TableState | None] = dict.fromkeys(plan.touched())
    existing = set() if store is None else set(await store.table_names())
    tables: dict[str, Opened | None] = dict.fromkeys(states.keys() - existing)
    if store is not None:
        found = await store.find_all([name for name in states if name in existing])
        states |= {name: opened.state for name, opened in found.items()}
        tables |= found
    checked, trials = await anyio.to_thread.run_sync(check_operations, plan, states, on_destructive)
    for step in plan.steps:
        for operation in step.script.operations:
            if operation.index_config is not None:
                try:
                    index_config(*operation.index_config)
                except ConfigurationError as exc:
                    refused = operation.refuse(exc.what, exc.remedy)
                    raise in_script(refused, step.script) from exc
    sql = SqlCheck()
    for trial in trials:
        schema = pa.schema(trial.state.fields())
        if (why := await sql.refusal(trial.statement, schema)) is not None:
            raise trial.refused(why)
    return checked, tables


async def check_tables(plan: Plan, journal: Journal, tables: Mapping[str, Opened | None]) -> None:
    """Checks that the tables of a plan have not lost commits that the journal records.

    Compares commit times only if a table has few versions, or fewer than the journal records: each
    time costs a request on an object store. A table that its application dropped and created again
    passes; its operations are checked like those of any other table.

    Args:
        plan: The migrations to run.
        journal: The folded journal.
        tables: The opened tables by name, `None` for those that do not exist.

    Raises:
        LedgerConflictError: A table has lost commits. Nothing was written.
        StoreError: A LanceDB call failed.
    """
    recorded = last_sightings(journal.events)
    for name in plan.touched():
        opened, sighting = tables.get(name), recorded.get(name)
        if opened is None or sighting is None:
            continue
        if opened.version >= max(sighting.table_version, _MANY_VERSIONS):
            continue
        match = sighting.compare(await commit_times(opened.table))
        if match is Match.SHORTENED:
            step = next(s for s in plan.steps if name in s.script.touches)
            raise LedgerConflictError(
                f"{step.script}: {spell(match, name, sighting)}. Nothing was changed.",
                "Restore the table from a copy that has them. Or, if its data is right, run "
                f"`aiomigrate stamp --table {step.script.line} --to VERSION` with the version that "
                "it has, then `aiomigrate upgrade`.",
                line=step.script.line,
                version=step.script.version,
            )


_MANY_VERSIONS = 100


async def estimate_plan(store: Store, plan: Plan) -> Plan:
    """Returns the plan with cost estimates of its operations added to its warnings.

    Scans every surveyed column once: all rows in which it is not NULL.

    Raises:
        StoreError: A LanceDB call failed.
    """
    warnings: list[str] = []
    for step in plan.steps:
        for operation in step.script.operations:
            column, table = operation.surveyed, operation.table
            if column is None or table is None or step.undo is not None:
                continue
            state = (await store.state_of(table))[1]
            if state is None or not state.has(column):
                continue  # an earlier step creates it: the cost is unknown
            opened = await store.open(table)
            rows = opened.scan(f"{quote(column)} IS NOT NULL", [column], _SURVEY_BATCH_ROWS)
            warnings += operation.estimate(await survey(rows, store.free_bytes()))
    return replace(plan, warnings=(*plan.warnings, *warnings))


_SURVEY_BATCH_ROWS = 1024
