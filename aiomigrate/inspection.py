"""The read-only methods of the manager: plan, status, health, validate, history, timings.

Nothing here writes, takes a lease, or creates a database. Runs that write are in `runs`.
"""

from __future__ import annotations

import enum
import os
import secrets
from collections.abc import Collection

import anyio

from aiomigrate.errors import LedgerError, NotAtTargetError
from aiomigrate.ledger.codec import Head
from aiomigrate.ledger.history import Journal
from aiomigrate.ledger.lease import HOST, holder_of
from aiomigrate.ledger.records import BACKGROUND_LEASE, Event, HeadRow, Holder
from aiomigrate.migration.model import Scripts, Target
from aiomigrate.planning.background import deferred_by_head
from aiomigrate.planning.plan import Plan
from aiomigrate.planning.reconcile import (
    OnAhead,
    Reconciled,
    lost_lines,
    missing_parts,
    pending,
    reconcile,
)
from aiomigrate.planning.table_identity import Match, last_sightings, spell
from aiomigrate.reporting.status import (
    Background,
    BackgroundState,
    Health,
    HealthState,
    LineStatus,
    Status,
    Validation,
)
from aiomigrate.reporting.timing import RunTiming, runs_of
from aiomigrate.results import Report
from aiomigrate.runs.environment import Environment
from aiomigrate.runs.settlement import ReportBuilder, dependencies_of
from aiomigrate.runs.snapshot import (
    SnapshotReader,
    UpgradeView,
    check_plan,
    check_tables,
    estimate_plan,
    read_folded,
    read_head_fast,
)
from aiomigrate.schema.state import differences
from aiomigrate.store.commit_log import commit_times
from aiomigrate.store.connection import Store
from aiomigrate.text import error_line

_MAX_POLL_S = 2.0


class OnPending(enum.StrEnum):
    """What application startup does if migrations are pending.

    Attributes:
        MIGRATE: Runs them, or waits for the process that runs them.
        WAIT: Waits until another process has run them.
        FAIL: Fails at once.
    """

    MIGRATE = "migrate"
    WAIT = "wait"
    FAIL = "fail"


class Inspection:
    """The read-only methods of one manager."""

    def __init__(self, environment: Environment) -> None:
        """Reads nothing yet.

        Args:
            environment: The manager's database, options, clocks and logger.
        """
        self._database = environment.database
        self._options = environment.options
        self._clock = environment.clock
        self._log = environment.log

    async def plan(self, *, tables: Collection[str] | None, to: Target) -> Plan:
        """Returns what an upgrade would do, checked against the live tables, with cost estimates.

        Args:
            tables: Lines to upgrade; all if `None`.
            to: `None` for the newest scripts, a maximum version, or a version by line.

        Raises:
            AiomigrateError: The scripts, the ledger and the live tables do not match, or a LanceDB
                call failed.
        """
        reader = await self._reader()
        snapshot = await UpgradeView(reader, tables, to).read()
        plan, opened = await check_plan(
            reader.store, snapshot.plan, on_destructive=self._options.on_destructive
        )
        await check_tables(plan, snapshot.journal, opened)
        return plan if reader.store is None else await estimate_plan(reader.store, plan)

    async def _reader(self) -> SnapshotReader:
        scripts = await self._database.scripts()
        store = await self._database.open()
        ledger = None if store is None else self._database.ledger(store, self._log)
        return SnapshotReader(
            store, ledger, scripts, on_ahead=self._options.on_ahead, log=self._log
        )

    async def await_target(self, *, waits: bool) -> Report:
        """Waits until other processes have brought the database to its target.

        Args:
            waits: Whether to wait, up to `lease_wait` seconds. If not, fails at once.

        Returns:
            A report without steps.

        Raises:
            NotAtTargetError: The database is not at its target, or was not in time.
            PlanError: There is no script, but applied versions are recorded.
            LedgerError: The head is unreadable or inconsistent.
            StoreError: A LanceDB call failed.
        """
        database, clock = self._database, self._clock
        scripts = await database.scripts()
        start, started_at = clock.monotonic(), clock.wall()
        builder = ReportBuilder(
            Report(run_id=secrets.token_hex(4), database=database.name, started_at=started_at),
            start,
            clock,
            scripts,
        )
        wait_s, delay_s = self._options.lease.wait_s, 0.05
        while True:
            # Without a script there is nothing to wait for, not even for a database.
            store = await database.open()
            ledger = None if store is None else database.ledger(store, self._log)
            _, at_target = await read_head_fast(ledger, scripts, database.targets, database.digests)
            if at_target is not None:
                return builder.build(lines=at_target.lines, deferred=at_target.deferred)
            if not scripts.all:
                await (await self._reader()).read()
                return builder.build()
            left_s = wait_s - (clock.monotonic() - start)
            if not waits or left_s <= 0:
                health = await self.health()
                after = f" after {wait_s:g} s" if waits else ""
                raise NotAtTargetError(
                    f"The database is not at its target{after}, and this process does not migrate "
                    f"it. Its health is {health}.".replace("\n", "; "),
                    "Run `aiomigrate upgrade`, or start the process that migrates it, then start "
                    "this one again.",
                )
            await anyio.sleep(min(delay_s, left_s))
            delay_s = min(2 * delay_s, _MAX_POLL_S)

    async def status(self) -> Status:
        """Returns the version of every line and the lease holders.

        Reads the head; the journal too if there is no head.

        Raises:
            ScriptError: A script is invalid.
            LedgerError: The metadata tables are unreadable or inconsistent.
            StoreError: A LanceDB call failed.
        """
        reader = await self._reader()
        head = Head() if reader.ledger is None else await reader.ledger.read_head()
        return await self._status(reader, head)

    async def _status(self, reader: SnapshotReader, head: Head) -> Status:
        scripts = reader.scripts
        rows: dict[str, HeadRow] = {row.name: row for row in head.rows}
        journal = Journal()
        if reader.ledger is not None and not head.exists:  # lost, or never created
            journal = await read_folded(reader.ledger)
        background = holder_of(head, BACKGROUND_LEASE)
        deferred = deferred_by_head(head.rows, scripts, head.leases.get(BACKGROUND_LEASE))
        lines, lost = {}, {}
        for name in sorted({*rows, *journal.lines, *scripts.line_names()}):
            row = rows.get(name)
            current = row.version if row else journal.of(name).current
            known = bool(scripts.of(name))
            if not known and current and (row.is_ours if row else journal.of(name).current):
                lost[name] = current
            lines[name] = LineStatus(
                current=current,
                target=scripts.latest(name) if known else None,
                pending=tuple(s.version for s in scripts.after(name, current)),
                migrated_at=row.migrated_at if row else None,
                background=_background_of(name, row, deferred, background),
            )
        return Status(
            database=self._database.name,
            exists=head.exists,
            lines=lines,
            holder=holder_of(head),
            background=background,
            missing=missing_parts(lost, scripts, has_database=reader.store is not None),
        )

    async def health(self) -> Health:
        """Returns whether the application may use the database, and why not.

        Reads head and journal, and no other table.

        Raises:
            ScriptError: A script is invalid.
            LedgerError: The metadata tables are unreadable or inconsistent.
            StoreError: A LanceDB call failed.
        """
        reader = await self._reader()
        head = Head() if reader.ledger is None else await reader.ledger.read_head()
        status = await self._status(reader, head)
        behind = {
            name
            for name, line in status.lines.items()
            if line.target is not None and line.current < line.target
        }
        if all(status.lines[name].background is not None for name in behind):
            problems = await self._startup_problems(reader, head)
            state = HealthState.FAILED if problems else HealthState.READY
            return Health(state=state, status=status, failed=problems)
        if (holder := status.holder) is not None:
            is_own = (holder.host, holder.pid) == (HOST, os.getpid())
            state = HealthState.RUNNING if is_own else HealthState.WAITING
            return Health(state=state, status=status)
        failed = {}
        if reader.ledger is not None:
            journal = await read_folded(reader.ledger)
            failed = {
                name: error_line(event.error)
                for name, line in journal.lines.items()
                if name in behind and (event := line.failed) is not None
            }
        state = HealthState.FAILED if failed else HealthState.PENDING
        return Health(state=state, status=status, failed=failed)

    async def _startup_problems(self, reader: SnapshotReader, head: Head) -> dict[str, str]:
        """Returns, by line, why the application must not use it although nothing is pending.

        The head alone shows neither an edited script nor a journal that was lost or restored.
        """
        if reader.ledger is None:
            return {}
        journal = await read_folded(reader.ledger)
        decided = await reader.decide(head, journal)
        return {problem.line or "": problem.what for problem in decided.problems}

    async def validate(self) -> Validation:
        """Compares scripts, ledger and live tables.

        Raises:
            ScriptError: A script is invalid.
            StoreError: A LanceDB call failed.
        """
        reader = await self._reader()
        scripts, store, ledger = reader.scripts, reader.store, reader.ledger
        if store is None or ledger is None:
            decided = reconcile((), Journal(), scripts)
            behind = _behind(decided, scripts)
            missing = missing_parts({}, scripts, has_database=False)
            return Validation(
                errors=behind, warnings=missing, not_at_target=behind, missing=missing
            )
        try:
            head = await ledger.read_head()
            journal = await read_folded(ledger)
        except LedgerError as exc:
            return Validation(errors=(str(exc),))
        decided = await reader.decide(head, journal)
        in_background = deferred_by_head(head.rows, scripts, head.leases.get(BACKGROUND_LEASE))
        behind = _behind(decided, scripts, in_background)
        errors = [*behind, *(problem.what for problem in decided.problems)]
        errors += _head_errors(head, decided, scripts)
        deferred = [
            f"{line}: version {version} is pending" for line, version in sorted(in_background)
        ]
        for line, state in decided.lines.items():
            if state.unfinished is None:
                continue
            version = state.unfinished.started.version
            if state.unfinished.started.lease == BACKGROUND_LEASE:
                deferred.append(f"{line}: version {version} was started and has not finished")
            else:
                errors.append(f"{line}: version {version} was interrupted and not recovered yet")
        table_errors, recreated = await _check_live_tables(store, journal, decided)
        errors += table_errors
        lost = lost_lines(decided.lines, scripts)
        missing = missing_parts(lost, scripts, has_database=True)
        unknown = [
            f"{n}: recorded at v{s.current}, has no script; left unchanged"
            for n, s in decided.lines.items()
            if not scripts.of(n) and n not in lost
        ]
        ahead = [
            f"{n}: recorded at v{s.current}, above its newest script v{s.latest}"
            for n, s in decided.lines.items()
            if s.is_ahead and self._options.on_ahead is OnAhead.WARN
        ]
        return Validation(
            errors=tuple(errors),
            warnings=(*ahead, *unknown, *recreated, *missing),
            not_at_target=behind,
            missing=missing,
            deferred=tuple(deferred),
        )

    async def timings(self) -> tuple[RunTiming, ...]:
        """Returns the timings of every run in the journal, oldest first.

        Raises:
            ScriptError: A script is invalid.
            LedgerError: The journal is unreadable or inconsistent.
            StoreError: A LanceDB call failed.
        """
        return runs_of(await self.history(None), dependencies_of(await self._database.scripts()))

    async def history(self, line: str | None) -> tuple[Event, ...]:
        """Returns the valid journal events in order; empty if there is no journal.

        Args:
            line: The line; all if `None`.

        Raises:
            LedgerError: The journal is unreadable or inconsistent.
            StoreError: A LanceDB call failed.
        """
        store = await self._database.open()
        if store is None:
            return ()
        events = (await read_folded(self._database.ledger(store, self._log))).events
        return tuple(e for e in events if line is None or e.line == line)


async def _check_live_tables(
    store: Store, journal: Journal, decided: Reconciled
) -> tuple[list[str], list[str]]:
    """Returns how live tables differ from what their last migration left, as errors and warnings.

    Skips tables of interrupted migrations, whose state is expected to differ.
    """
    unfinished = {
        table
        for state in decided.lines.values()
        if state.unfinished is not None
        for table in state.unfinished.savepoints
    }
    errors, warnings = [], []
    recorded = last_sightings(journal.events)
    for name, shape in sorted(journal.shapes.items()):
        if shape is None or name in unfinished:
            continue
        opened = await store.find_with_state(name)
        if opened is None:
            errors.append(f"table {name} is missing")
            continue
        found = differences(shape, opened.state.shape())
        errors += [f"table {name}: {difference}" for difference in found]
        if (sighting := recorded.get(name)) is not None:
            match = sighting.compare(await commit_times(opened.table))
            if match is Match.SHORTENED:
                errors.append(spell(match, name, sighting))
            elif match is Match.RECREATED:
                warnings.append(
                    f"{spell(match, name, sighting)}; its migrations cannot be rolled back"
                )
    return errors, warnings


def _background_of(
    line: str,
    row: HeadRow | None,
    deferred: Collection[tuple[str, int]],
    holder: Holder | None,
) -> Background | None:
    """Returns the state of a line's background work, `None` if none is pending."""
    versions = [version for name, version in deferred if name == line]
    if not versions:
        return None
    going = next((one for one in holder.going if one.line == line), None) if holder else None
    is_running = holder is not None and row is not None and row.lease == BACKGROUND_LEASE
    state = BackgroundState.RUNNING if is_running else BackgroundState.PENDING
    return Background(state=state, version=min(versions), going=going)


def _head_errors(head: Head, decided: Reconciled, scripts: Scripts) -> list[str]:
    """Returns one sentence for each line whose head row is behind the journal."""
    recorded = {row.name: row.version for row in head.rows}
    repair = "the next upgrade repairs it"
    errors = []
    for line, state in decided.lines.items():
        if not scripts.of(line):
            continue
        if state.rows > 1:
            errors.append(f"{line}: the head has {state.rows} equal rows; {repair}")
        elif state.history.current and line not in recorded:
            errors.append(
                f"{line}: the head has no row, the journal says v{state.current}; {repair}"
            )
        elif recorded.get(line, 0) < state.history.current:
            errors.append(
                f"{line}: the head says v{recorded[line]}, the journal v{state.current}; {repair}"
            )
    return errors


def _behind(
    decided: Reconciled, scripts: Scripts, deferred: Collection[tuple[str, int]] = ()
) -> tuple[str, ...]:
    """Returns one sentence for each line with pending migrations that are not deferred."""
    return tuple(
        f"{line}: current v{state.current}, target v{state.latest}"
        for line, state in decided.lines.items()
        if any(script.key not in deferred for script in pending(state, scripts, None))
    )
