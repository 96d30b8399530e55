"""Upgrading: what an application's start waits for, and what is done in the background."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial

import anyio

from aiomigrate import events as ev
from aiomigrate.ledger.codec import Head
from aiomigrate.ledger.lease import Lease, Watch, give_back, take
from aiomigrate.ledger.records import BACKGROUND_LEASE, Event, HeadRow, Kind
from aiomigrate.ledger.writer import Writer
from aiomigrate.migration.model import Key, Target
from aiomigrate.planning.background import ready
from aiomigrate.planning.plan import Part, Plan
from aiomigrate.planning.reconcile import Act
from aiomigrate.results import Outcome, Report, StepReport
from aiomigrate.runs.environment import Environment
from aiomigrate.runs.maintenance import prune_savepoints
from aiomigrate.runs.scheduler import Scheduler
from aiomigrate.runs.session import Job, Session
from aiomigrate.runs.settlement import (
    BegunReport,
    current_versions,
    failed,
    head_row,
    settle,
    unsettled_lines,
)
from aiomigrate.runs.snapshot import (
    Snapshot,
    SnapshotReader,
    UpgradeView,
    View,
    checked,
    read_head_fast,
)
from aiomigrate.store.table import Opened


async def upgrade(
    environment: Environment, *, tables: Collection[str] | None, to: Target
) -> Report:
    """Runs what an application's start waits for. Takes the lease only if there is something to do.

    Args:
        environment: What the manager works with.
        tables: Lines to upgrade; all by default.
        to: To the newest scripts (`None`), to at most a version, or line by line.

    Returns:
        What was done, and what is left for the background.

    Raises:
        MigrationFailedError: A migration failed; its report says what was done.
        AiomigrateError: The run could not begin or go on.
    """
    run_id, log = environment.named_run()
    database, options, clock = environment.database, environment.options, environment.clock
    begun, started_at = clock.monotonic(), clock.wall()
    scripts = await database.scripts()
    store = await database.open()
    report = BegunReport(
        Report(run_id=run_id, database=database.name, started_at=started_at), begun, clock, scripts
    )
    ledger = None if store is None else database.ledger(store, log)
    head, there = await read_head_fast(ledger, scripts, database.targets, database.digests)
    if there is not None and tables is None and to is None:
        log.debug(ev.RUN_AT_TARGET, lines=len(there.lines), deferred=len(there.deferred))
        return report.ended(lines=there.lines, deferred=there.deferred)
    reader = SnapshotReader(store, ledger, scripts, on_ahead=options.on_ahead, log=log)
    before = await UpgradeView(reader, tables, to).look(head)
    deferred = before.plan.deferred or unsettled_lines(before.plan)
    plan = before.plan.part(Part.FAST)
    if not plan.needs_lease:
        log.debug(ev.RUN_AT_TARGET, lines=len(plan.lines), deferred=len(deferred))
        return report.ended(lines=current_versions(plan), deferred=deferred)
    opened_at = clock.monotonic()
    _, opened = await checked(store, before.plan, on_destructive=options.on_destructive)
    log.info(ev.RUN_PLANNED, migrations=len(plan.steps), database=database.name)
    store = store or await database.connect()
    ledger = ledger or database.ledger(store, log)
    session = Session(environment.run(store, ledger, scripts, run_id=run_id, log=log))
    reader = SnapshotReader(store, ledger, scripts, on_ahead=options.on_ahead, log=log)
    job = UpgradeJob(session, before, UpgradeView(reader, tables, to), opened, opened_at)
    try:
        worked = await session.hold(job)
    except FailedElsewhereError as exc:
        raise failed(job.ended(report, (exc.step,)), log, elsewhere=True) from None
    if not worked:  # another process did it while this one waited
        head = await ledger.read_head()
        lines = {row.name: row.version for row in head.rows}
        left = ready(head.rows, scripts, head.leases.get(BACKGROUND_LEASE)) or frozenset()
        return report.ended(lease_s=session.lease_s, lines=lines, deferred=tuple(sorted(left)))
    result = job.ended(report, tuple(job.results.values()))
    if any(step.outcome is not Outcome.APPLIED for step in result.steps):
        raise failed(result, log)
    log.info(
        ev.RUN_FINISHED,
        applied=len(result.applied),
        total_s=round(result.total_s, 4),
        lease_s=round(result.lease_s, 4),
        ledger_commits=result.ledger_commits,
    )
    return result


class UpgradeJob(Job):
    """Brings the database to the plan's target, but for the background.

    Attributes:
        results: What came of each migration.
    """

    doing = "starting"

    def __init__(
        self,
        session: Session,
        before: Snapshot,
        view: View,
        opened: Mapping[str, Opened | None],
        opened_at: float,
    ) -> None:
        """Reads nothing.

        Args:
            session: Takes the lease.
            before: What was seen without the lease: a hint, and the failures known then.
            view: Reads and decides again.
            opened: Tables as they were seen after that, `None` for those that were not there.
            opened_at: Monotonic time before they were.
        """
        self._session = session
        self._before = before
        self._view = view
        self._opened = opened
        self._opened_at = opened_at
        self._plan = before.plan  # what was found under the lease, if it was had
        self._deferred: tuple[Key, ...] = ()
        self.results: Mapping[Key, StepReport] = {}

    async def is_done(self, head: Head) -> bool:
        """Returns whether another process has brought the database there."""
        there = ready(head.rows, self._session.run.scripts, head.leases.get(BACKGROUND_LEASE))
        return there is not None and not self._before.plan.is_empty

    def first_rows(self, lease: Lease) -> Iterable[HeadRow]:
        """Returns the rows of lines that have none yet and are about to be migrated."""
        plan = self._before.plan
        pending = {step.script.line for step in plan.steps if not step.deferred}
        return [
            head_row(self._session.run, lease, line, 0)
            for line, state in plan.lines.items()
            if state.act is Act.ENROL and not state.current and line in pending
        ]

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Runs the migrations, then deletes savepoints that were kept long enough.

        Raises:
            FailedElsewhereError: Another process failed with one of them while this one waited.
            AiomigrateError: The run could not go on.
        """
        session, run = self._session, self._session.run
        snapshot = await session.take_over(writer, lease, self._view)
        self._deferred = snapshot.plan.deferred
        snapshot = replace(snapshot, plan=snapshot.plan.part(Part.FAST))
        self._plan = snapshot.plan
        if lease.waited:
            _raise_if_failed_elsewhere(self._before, snapshot)
        workspace = session.workspace(writer)
        last = self._before.head.leases.get(lease.key)
        if lease.epoch == (last.epoch or 0 if last else 0) + 1:  # no other run came between
            workspace.tables.remember(self._opened, self._opened_at)
        rows = await settle(run, snapshot, lease, workspace)
        scheduler = Scheduler(session, snapshot, workspace)
        self.results = scheduler.results
        await scheduler.run_plan(rows)
        if any(
            step.script.contracts and scheduler.is_done(step.key) for step in snapshot.plan.steps
        ):
            await writer.sync()
            snapshot = await self._view.look(None, None)
        await prune_savepoints(run, snapshot, workspace, older_than_s=run.options.keep_s)

    def ended(self, report: BegunReport, steps: tuple[StepReport, ...]) -> Report:
        """Returns the report of the run.

        Args:
            report: As it was begun.
            steps: What came of the migrations.
        """
        lines = current_versions(self._plan)
        for step in self.results.values():
            if step.outcome is Outcome.APPLIED:
                lines[step.line] = max(step.version, lines.get(step.line, 0))
        return report.ended(
            lease_s=self._session.lease_s,
            steps=steps,
            lines=lines,
            adopted=self._plan.adopts,
            ledger_commits=self._session.run.ledger.commits,
            deferred=self._deferred,
        )


async def run_background(
    environment: Environment, *, tables: Collection[str] | None, to: Target
) -> Report:
    """Does what an application's start does not wait for, under a lease of its own.

    Args:
        environment: What the manager works with.
        tables: Lines; all by default.
        to: As for `upgrade`.

    Returns:
        What was done here; without steps when there was nothing to do.

    Raises:
        MigrationFailedError: A migration failed; its report says what was done.
        AiomigrateError: The run could not begin or go on.
    """
    run_id, log = environment.named_run(background=True)
    database, options, clock = environment.database, environment.options, environment.clock
    begun, started_at = clock.monotonic(), clock.wall()
    scripts = await database.scripts()
    report = BegunReport(
        Report(run_id=run_id, database=database.name, started_at=started_at), begun, clock, scripts
    )
    store = await database.open()
    if store is None and scripts.has_background:
        store = await database.connect()
    if store is None:
        return report.ended()
    ledger = database.ledger(store, log)
    reader = SnapshotReader(store, ledger, scripts, on_ahead=options.on_ahead, log=log)
    view = UpgradeView(reader, tables, to)
    before = await view.look()
    if not before.plan.needs_background:
        return report.ended(lines=current_versions(before.plan))
    await checked(store, before.plan, on_destructive=options.on_destructive)
    session = Session(environment.run(store, ledger, scripts, run_id=run_id, log=log))
    results = await _work_in_background(session, view)
    lines = {row.name: row.version for row in (await ledger.read_head()).rows}
    result = report.ended(
        lease_s=session.lease_s,
        steps=tuple(results.values()),
        lines=lines,
        ledger_commits=ledger.commits,
    )
    if any(step.outcome is not Outcome.APPLIED for step in result.steps):
        raise failed(result, log)
    log.info(ev.RUN_FINISHED, applied=len(result.applied), total_s=round(result.total_s, 4))
    return result


async def _work_in_background(session: Session, view: View) -> Mapping[Key, StepReport]:
    """Does the work, or waits for the process that does it, as long as it takes: it may die.

    Returns:
        What came of each migration that ran here.
    """
    run = session.run
    watch = Watch(run.options.lease.ttl_s, run.clock)
    while True:
        head = await run.ledger.read_head()
        row = head.leases.get(BACKGROUND_LEASE)
        if ready(head.rows, run.scripts, row) == frozenset():
            return {}
        if row is None or watch.may_take(row):
            handover = BackgroundHandover(session, view, watch)
            lease = await handover.taken()
            if lease is not None:
                job = BackgroundJob(session, view)
                await session.in_own_task(partial(job.run_under, lease))
                return job.results
            if not handover.is_needed:
                return {}
        await anyio.sleep(max(0.1, run.options.lease.ttl_s / 6))


class BackgroundHandover(Job):
    """Takes the background lease, under the run lease, with the records of its lines.

    Attributes:
        is_needed: Whether anything is to be done in the background, as far as was read.
    """

    doing = "handing over to the background"

    def __init__(self, session: Session, view: View, watch: Watch) -> None:
        """Reads nothing.

        Args:
            session: Takes the run lease.
            view: Reads and decides.
            watch: Has watched the background lease.
        """
        self._session = session
        self._view = view
        self._watch = watch
        self._lease: Lease | None = None
        self.is_needed = False

    async def taken(self) -> Lease | None:
        """Returns the background lease, `None` where it was not needed or is another's."""
        await self._session.in_own_task(self._hold_or_give_back)
        return self._lease

    async def _hold_or_give_back(self) -> bool:
        try:
            return await self._session.hold_here(self)
        except BaseException:
            if self._lease is not None:  # nothing was done under it yet
                lease, self._lease = self._lease, None
                with anyio.CancelScope(shield=True):
                    await give_back(self._session.run.ledger, lease)
            raise

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Settles the ledger, and takes the background lease if it is free or abandoned."""
        session, run = self._session, self._session.run
        snapshot = await session.take_over(writer, lease, self._view)
        self.is_needed = snapshot.plan.needs_background
        if not self.is_needed:
            return
        plan = snapshot.plan.part(Part.BACKGROUND)
        rows = await settle(run, snapshot, lease, session.workspace(writer))
        await rows.own()
        await writer.sync()
        await run.ledger.ensure_lease(BACKGROUND_LEASE)
        head = await run.ledger.read_head()
        row = head.leases[BACKGROUND_LEASE]
        if not self._watch.may_take(row):
            return  # someone was faster, or its holder is alive after all
        with anyio.CancelScope(shield=True):
            mine = await take(
                run.ledger, head, BACKGROUND_LEASE, secrets.token_hex(6),
                session.phase("starting"), run.clock,
            )  # fmt: skip
            if not isinstance(mine, Lease):
                return
            self._lease = mine
            await run.ledger.own_rows(
                [head_row(run, mine, line, snapshot.decided.lines[line].current)
                 for line in sorted(_background_lines(plan, snapshot)) if run.scripts.of(line)]
            )  # fmt: skip


class BackgroundJob(Job):
    """Runs the migrations of the background, under its lease.

    Attributes:
        results: What came of each migration.
    """

    doing = "starting"

    def __init__(self, session: Session, view: View) -> None:
        """Reads nothing.

        Args:
            session: Of the run.
            view: Reads and decides.
        """
        self._session = session
        self._view = view
        self.results: Mapping[Key, StepReport] = {}

    async def run_under(self, lease: Lease) -> bool:
        """Does the job under the background lease, and gives it back."""
        self._session.run.log.info(ev.BACKGROUND_STARTED, epoch=lease.epoch)
        await self._session.work_under(lease, self)
        return True

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Runs the migrations."""
        session, run = self._session, self._session.run
        snapshot = await session.take_over(writer, lease, self._view)
        plan = snapshot.plan.part(Part.BACKGROUND)
        lines = _background_lines(plan, snapshot)
        snapshot = replace(snapshot, plan=plan)
        workspace = session.workspace(writer)
        rows = await settle(run, snapshot, lease, workspace, only=lines)
        scheduler = Scheduler(session, snapshot, workspace)
        self.results = scheduler.results
        await scheduler.run_plan(rows)


def _background_lines(plan: Plan, snapshot: Snapshot) -> set[str]:
    """Returns the lines that the background has in hand, or is about to."""
    return {step.script.line for step in plan.steps} | snapshot.plan.busy


def _raise_if_failed_elsewhere(before: Snapshot, snapshot: Snapshot) -> None:
    """Raises a failure of a migration we were about to run, seen while waiting for its holder."""
    known = {(event.epoch, event.seq) for event in before.events}
    planned = {step.key: step.script.checksum for step in snapshot.plan.steps}
    for event in snapshot.journal.events:
        key = (event.line or "", event.version or 0)
        if (
            event.kind == Kind.FAILED
            and (event.epoch, event.seq) not in known
            and planned.get(key) == event.checksum
            and not event.detail.get("cancelled")
        ):
            step = StepReport(
                line=key[0],
                version=key[1],
                description=event.description or "",
                outcome=Outcome.FAILED,
                ran_s=event.ran_s or 0.0,
                error=event.error or "",
            )
            raise FailedElsewhereError(step, event)


class FailedElsewhereError(Exception):
    """Carries a failure of another process to where the report is made that it is raised with."""

    def __init__(self, step: StepReport, event: Event) -> None:
        super().__init__(step.error)
        self.step = step
        self.event = event
