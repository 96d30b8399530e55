"""Reads a database, decides and plans from what was read, and checks a plan. Writes nothing.

`Snapshot` is what was read and decided. The views say what a run reads again once it has the
lease: each has a method `look`, which takes what is known already.
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
from aiomigrate.operations.indexes import CreateIndex
from aiomigrate.planning.background import IDLE, Busy, busy_with, known_tables, ready
from aiomigrate.planning.plan import Plan, build_plan
from aiomigrate.planning.preflight import OnDestructive, check_operations, in_script
from aiomigrate.planning.reconcile import OnAhead, Reconciled, disputed, reconcile
from aiomigrate.schema.sql import quote
from aiomigrate.schema.state import TableState, differences
from aiomigrate.store.connection import SqlCheck, Store
from aiomigrate.store.table import Opened, index_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What was read of a database, and decided from it.

    Attributes:
        head: The head.
        events: All journal events.
        journal: Their fold.
        decided: The state of every line.
        plan: What is to run.
        busy: What work in the background has in hand.
    """

    head: Head
    events: Sequence[Event]
    journal: Journal
    decided: Reconciled
    plan: Plan
    busy: Busy = IDLE


@dataclass(frozen=True, slots=True)
class AtTarget:
    """That a start has nothing to do, as the head alone proves it.

    Attributes:
        lines: The version of each line.
        deferred: What is left for the background.
    """

    lines: dict[str, int]
    deferred: tuple[tuple[str, int], ...] = ()


async def read_head_fast(
    ledger: Ledger | None,
    scripts: Scripts,
    targets: Mapping[str, int],
    digests: Mapping[str, str],
) -> tuple[Head, AtTarget | None]:
    """Reads the head, once.

    Args:
        ledger: The metadata tables, `None` where there is no database.
        scripts: All migrations.
        targets: The newest version of each line.
        digests: The chain digest of each line there.

    Returns:
        The head (empty where it was not parsed), and, if it alone proves that a start has nothing
        to do, what it says.

    Raises:
        LedgerError: The head cannot be trusted.
    """
    if ledger is None:
        return Head(), None
    content = await ledger.read_head_content()
    if content is None:
        return Head(), None
    lines = versions_if_current(content, targets, digests)
    if lines is not None:
        return Head(), AtTarget(lines)
    head = parse_head(content, ledger.head_name)
    left = ready(head.rows, scripts, head.leases.get(BACKGROUND_LEASE))
    if not left:
        return head, None
    return head, AtTarget({row.name: row.version for row in head.rows}, tuple(sorted(left)))


async def read_folded(ledger: Ledger) -> Journal:
    """Reads the journal and folds it, in a thread: a long one would block the event loop.

    Raises:
        LedgerError: The journal cannot be trusted.
    """
    return await anyio.to_thread.run_sync(fold, await ledger.read_journal())


class SnapshotReader:
    """Reads one database, as often as it is asked."""

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
            store: The database, `None` where there is none.
            ledger: Its metadata tables, `None` where there is no database.
            scripts: All migrations.
            on_ahead: Whether a database newer than the code is an error.
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
        """Reads head and journal, where they are not given, and decides the state of every line.

        Raises:
            AiomigrateError: What forbids running.
        """
        for attempt in range(_LOOKS):
            if self.ledger is not None:
                head = head or await self.ledger.read_head()
                events = await self.ledger.read_journal() if events is None else events
            events = events or ()
            journal = await anyio.to_thread.run_sync(fold, events)
            decided = await self.decide(head or Head(), journal)
            crossed = any(isinstance(p, LedgerConflictError) for p in decided.problems)
            if not crossed or attempt == _LOOKS - 1:
                break
            # Read while another process went back from one to the other: look again.
            head = events = None
            await anyio.sleep(0.05)
        events = events or ()
        decided.raise_first()
        for name, state in decided.lines.items():
            if not self.scripts.of(name):
                self._log.debug(ev.LINE_UNKNOWN, table=name, version=state.current)
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
        """Reads head and journal, decides, and plans an upgrade.

        Raises:
            AiomigrateError: What forbids running.
        """
        seen = await self.read(head, events)
        existing: set[str] = set()
        if self.scripts.has_background and self.store is not None:
            current = {line: state.current for line, state in seen.decided.lines.items()}
            existing = known_tables(self.scripts, current) | set(await self.store.table_names())
        build = functools.partial(
            build_plan, seen.decided, self.scripts, tables=tables, to=to, existing=existing,
            busy=seen.busy,
        )  # fmt: skip
        # In a thread: for thousands of migrations it takes longer than a server may be silent.
        return replace(seen, plan=await anyio.to_thread.run_sync(build))

    async def decide(self, head: Head, journal: Journal) -> Reconciled:
        """Decides the state of every line, and looks at the tables of lines in dispute."""
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
    holder = holder_of(head, BACKGROUND_LEASE)
    return busy_with(head.rows, decided, scripts, holder=None if holder is None else str(holder))


class View(Protocol):
    """What a run reads once it has the lease."""

    async def look(
        self, head: Head | None = None, events: Sequence[Event] | None = None
    ) -> Snapshot:
        """Reads head and journal unless they are given; decides; raises what forbids it."""


@dataclass(frozen=True, slots=True)
class LedgerView:
    """The state of every line, without a plan."""

    reader: SnapshotReader

    async def look(
        self, head: Head | None = None, events: Sequence[Event] | None = None
    ) -> Snapshot:
        """As `SnapshotReader.read`."""
        return await self.reader.read(head, events)


@dataclass(frozen=True, slots=True)
class UpgradeView:
    """The state of every line, and the plan of an upgrade."""

    reader: SnapshotReader
    tables: Collection[str] | None
    to: Target

    async def look(
        self, head: Head | None = None, events: Sequence[Event] | None = None
    ) -> Snapshot:
        """As `SnapshotReader.read_planned`."""
        return await self.reader.read_planned(
            tables=self.tables, to=self.to, head=head, events=events
        )


@dataclass(frozen=True, slots=True)
class UncheckedView:
    """Head and journal as they are, whatever the scripts say of them: for stamping."""

    ledger: Ledger
    scripts: Scripts

    async def look(
        self, head: Head | None = None, events: Sequence[Event] | None = None
    ) -> Snapshot:
        """Reads head and journal unless they are given; decides nothing."""
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


_LOOKS = 3


async def checked(
    store: Store | None, plan: Plan, *, on_destructive: OnDestructive
) -> tuple[Plan, Mapping[str, Opened | None]]:
    """Returns a plan that fits the tables as they are, and the tables as they were seen.

    Args:
        store: The database, `None` where there is none.
        plan: What is to run.
        on_destructive: What to do about steps that discard what is there.

    Raises:
        AiomigrateError: It does not fit.
    """
    states: dict[str, TableState | None] = dict.fromkeys(plan.touched())
    existing = set() if store is None else set(await store.table_names())
    seen: dict[str, Opened | None] = dict.fromkeys(states.keys() - existing)
    if store is not None:
        found = await store.find_all([name for name in states if name in existing])
        states |= {name: opened.state for name, opened in found.items()}
        seen |= found
    fitting, trials = await anyio.to_thread.run_sync(check_operations, plan, states, on_destructive)
    for step in plan.steps:
        for operation in step.script.operations:
            if isinstance(operation, CreateIndex):
                try:
                    index_config(operation.kind, operation.options)
                except ConfigurationError as exc:
                    refused = operation.refuse(exc.what, exc.remedy)
                    raise in_script(refused, step.script) from exc
    sql = SqlCheck()
    for trial in trials:
        schema = pa.schema(trial.state.fields())
        if (why := await sql.refusal(trial.statement, schema)) is not None:
            raise trial.refused(why)
    return fitting, seen


async def estimated(store: Store, plan: Plan) -> Plan:
    """Returns the plan with what its costly operations will cost, which takes reading rows.

    Raises:
        StoreError: LanceDB failed.
    """
    warnings: list[str] = []
    for step in plan.steps:
        for operation in step.script.operations:
            column, table = operation.surveyed, operation.table
            if column is None or table is None or step.undo is not None:
                continue
            state = (await store.state_of(table))[1]
            if state is None or not state.has(column):
                continue  # an earlier step makes it: nobody knows yet
            opened = await store.open(table)
            rows = opened.scan(f"{quote(column)} IS NOT NULL", [column], _SURVEY_ROWS)
            warnings += operation.estimate(await survey(rows, store.free_bytes()))
    return replace(plan, warnings=(*plan.warnings, *warnings))


_SURVEY_ROWS = 1024
