"""Upgrading: the migrations that application startup waits for, and the background migrations.

The manager calls `upgrade` and `run_background`. Both read without a lease first, and take one only
if there is something to do. Which migrations run in the background is decided in
`planning.background`; running a plan is for `runs.scheduler`.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial

import anyio

from aiomigrate import events as ev
from aiomigrate.errors import LedgerUnreadableError
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
from aiomigrate.runs.repair import repair_if_clear
from aiomigrate.runs.scheduler import Scheduler
from aiomigrate.runs.session import Job, RunStart, Session
from aiomigrate.runs.settlement import (
    ReportBuilder,
    current_versions,
    head_row,
    run_failure,
    settle,
    unsettled_lines,
)
from aiomigrate.runs.snapshot import (
    Snapshot,
    UpgradeView,
    View,
    check_plan,
    check_tables,
    read_head_fast,
)
from aiomigrate.store.table import Opened


async def upgrade(
    environment: Environment, *, tables: Collection[str] | None, to: Target
) -> Report:
    """Runs pending migrations, except those of the background.

    Takes the lease only if there is something to do. The next run recovers from a crash or a
    cancellation.

    Args:
        environment: The manager's database, options, clocks and logger.
        tables: Lines to upgrade; all if `None`.
        to: `None` for the newest scripts, a maximum version, or a version by line.

    Returns:
        What this process did, without steps if there was nothing to do; `deferred` lists the
        background migrations that are pending.

    Raises:
        MigrationFailedError: A migration failed; its report says what was done.
        AiomigrateError: The run could not start or continue, e.g. because the lease was lost.
    """
    run = await RunStart.begin(environment)
    log, builder, database = run.log, run.builder, environment.database
    store = await database.open()
    ledger = None if store is None else database.ledger(store, log)
    head, at_target = await read_head_fast(ledger, run.scripts, database.targets, database.digests)
    if at_target is not None and tables is None and to is None:
        log.debug(ev.RUN_AT_TARGET, lines=len(at_target.lines), deferred=len(at_target.deferred))
        return builder.build(lines=at_target.lines, deferred=at_target.deferred)
    first_view = UpgradeView(run.reader(store, ledger), tables, to)
    try:
        before = await first_view.read(head)
    except LedgerUnreadableError as exc:
        await repair_if_clear(environment, exc)
        before = await first_view.read()
    deferred = before.plan.deferred or unsettled_lines(before.plan)
    plan = before.plan.part(Part.FAST)
    if not plan.needs_lease:
        log.debug(ev.RUN_AT_TARGET, lines=len(plan.lines), deferred=len(deferred))
        return builder.build(lines=current_versions(plan), deferred=deferred)
    opened_at = environment.clock.monotonic()
    on_destructive = environment.options.on_destructive
    _, opened = await check_plan(store, before.plan, on_destructive=on_destructive)
    await check_tables(before.plan, before.journal, opened)
    log.info(ev.RUN_PLANNED, migrations=len(plan.steps), database=database.name)
    store = store or await database.connect()
    ledger = ledger or database.ledger(store, log)
    session = run.session(store, ledger)
    view = UpgradeView(run.reader(store, ledger), tables, to)
    job = UpgradeJob(session, before, view, opened, opened_at)
    try:
        was_done_here = await session.hold(job)
    except FailedElsewhereError as exc:
        raise run_failure(job.build_report(builder, (exc.step,)), log, elsewhere=True) from None
    if not was_done_here:  # another process did it while this one waited
        head = await ledger.read_head()
        lines = {row.name: row.version for row in head.rows}
        left = ready(head.rows, run.scripts, head.leases.get(BACKGROUND_LEASE)) or frozenset()
        return builder.build(lease_s=session.lease_s, lines=lines, deferred=tuple(sorted(left)))
    result = job.build_report(builder, tuple(job.results.values()))
    return run.finish(
        result,
        applied=len(result.applied),
        total_s=round(result.total_s, 4),
        lease_s=round(result.lease_s, 4),
        ledger_commits=result.ledger_commits,
    )


class UpgradeJob(Job):
    """Runs the migrations of an upgrade, except those of the background.

    Attributes:
        results: The report of each migration that has ended.
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
            before: The snapshot taken without the lease. It may be out of date.
            view: Reads and decides again.
            opened: The tables opened after that snapshot, `None` for those that did not exist.
            opened_at: Monotonic time before they were opened.
        """
        self._session = session
        self._before = before
        self._view = view
        self._opened = opened
        self._opened_at = opened_at
        self._plan = before.plan  # replaced by the plan made under the lease
        self._deferred: tuple[Key, ...] = ()
        self.results: Mapping[Key, StepReport] = {}

    async def is_done(self, head: Head) -> bool:
        """Returns whether another process has brought the database to its target."""
        deferred = ready(head.rows, self._session.run.scripts, head.leases.get(BACKGROUND_LEASE))
        return deferred is not None and not self._before.plan.is_empty

    def first_rows(self, lease: Lease) -> Iterable[HeadRow]:
        """Returns head rows at version 0 for the lines to migrate that have no row yet."""
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
            FailedElsewhereError: One of them failed in another process while this one waited.
            AiomigrateError: The run cannot continue, e.g. because scripts and ledger do not match.
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
        if lease.epoch == (last.epoch or 0 if last else 0) + 1:  # no other run in between
            workspace.tables.remember(self._opened, self._opened_at)
        rows = await settle(run, snapshot, lease, workspace)
        scheduler = Scheduler(session, snapshot, workspace)
        self.results = scheduler.results
        await scheduler.run_plan(rows)
        if any(
            step.script.contracts and scheduler.is_done(step.key) for step in snapshot.plan.steps
        ):
            await writer.sync()
            snapshot = await self._view.read(None, None)
        await prune_savepoints(run, snapshot, workspace, older_than_s=run.options.keep_s)

    def build_report(self, builder: ReportBuilder, steps: tuple[StepReport, ...]) -> Report:
        """Returns the report of the run.

        Args:
            builder: Builds the report.
            steps: The reports of the migrations.
        """
        lines = current_versions(self._plan)
        for step in self.results.values():
            if step.outcome is Outcome.APPLIED:
                lines[step.line] = max(step.version, lines.get(step.line, 0))
        return builder.build(
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
    """Runs the background migrations, under a lease of their own.

    If another process holds that lease, waits for it without a time limit and takes over if it
    crashes. The next run recovers from a crash or a cancellation.

    Args:
        environment: The manager's database, options, clocks and logger.
        tables: Lines; all if `None`.
        to: As for `upgrade`.

    Returns:
        What this process did; without steps if there was nothing to do.

    Raises:
        MigrationFailedError: A migration failed; its report says what was done.
        DependencyError: A dependency is pending and is not a background migration.
        AiomigrateError: The run could not start or continue, e.g. because the lease was lost.
    """
    run = await RunStart.begin(environment, background=True)
    builder, database = run.builder, environment.database
    store = await database.open()
    if store is None and run.scripts.has_background:
        store = await database.connect()
    if store is None:
        return builder.build()
    ledger = database.ledger(store, run.log)
    view = UpgradeView(run.reader(store, ledger), tables, to)
    try:
        before = await view.read()
    except LedgerUnreadableError as exc:
        await repair_if_clear(environment, exc)
        before = await view.read()
    if not before.plan.needs_background:
        return builder.build(lines=current_versions(before.plan))
    _, opened = await check_plan(
        store, before.plan, on_destructive=environment.options.on_destructive
    )
    await check_tables(before.plan, before.journal, opened)
    session = run.session(store, ledger)
    results = await _run_or_wait(session, view)
    lines = {row.name: row.version for row in (await ledger.read_head()).rows}
    result = builder.build(
        lease_s=session.lease_s,
        steps=tuple(results.values()),
        lines=lines,
        ledger_commits=ledger.commits,
    )
    return run.finish(result, applied=len(result.applied), total_s=round(result.total_s, 4))


async def _run_or_wait(session: Session, view: View) -> Mapping[Key, StepReport]:
    """Runs the background migrations, or waits without a time limit for the process that does.

    Takes over if that process does not renew its lease.

    Returns:
        The report of each migration that ran here.
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
            lease = await handover.take_lease()
            if lease is not None:
                job = BackgroundJob(session, view)
                await session.in_own_task(partial(job.run_under, lease))
                return job.results
            if not handover.is_needed:
                return {}
        await anyio.sleep(max(0.1, run.options.lease.ttl_s / 6))


class BackgroundHandover(Job):
    """Takes the background lease and moves the head rows of its lines to it, under the run lease.

    Attributes:
        is_needed: Whether background migrations are pending; `False` before the snapshot.
    """

    doing = "handing over to the background"

    def __init__(self, session: Session, view: View, watch: Watch) -> None:
        """Reads nothing.

        Args:
            session: Takes the run lease.
            view: Reads and decides.
            watch: Has observed the background lease so far.
        """
        self._session = session
        self._view = view
        self._watch = watch
        self._lease: Lease | None = None
        self.is_needed = False

    async def take_lease(self) -> Lease | None:
        """Takes the background lease; `None` if it is not needed or another process holds it.

        A cancellation or an error in between gives the lease back.

        Raises:
            LeaseError: The run lease could not be acquired, or was lost.
            AiomigrateError: Scripts and ledger do not match, or a LanceDB call failed.
        """
        await self._session.in_own_task(self._hold_or_give_back)
        return self._lease

    async def _hold_or_give_back(self) -> bool:
        try:
            return await self._session.hold_here(self)
        except BaseException:
            if self._lease is not None:  # nothing has been done under it yet
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
            return  # another process took it, or its holder is alive
        with anyio.CancelScope(shield=True):
            taken = await take(
                run.ledger, head, BACKGROUND_LEASE, secrets.token_hex(6),
                session.phase("starting"), run.clock,
            )  # fmt: skip
            if not isinstance(taken, Lease):
                return
            self._lease = taken
            await run.ledger.own_rows(
                [head_row(run, taken, line, snapshot.decided.lines[line].current)
                 for line in sorted(_background_lines(plan, snapshot)) if run.scripts.of(line)]
            )  # fmt: skip


class BackgroundJob(Job):
    """Runs the background migrations under the background lease.

    Attributes:
        results: The report of each migration that has ended.
    """

    doing = "starting"

    def __init__(self, session: Session, view: View) -> None:
        """Reads nothing.

        Args:
            session: The session of the run.
            view: Reads and decides.
        """
        self._session = session
        self._view = view
        self.results: Mapping[Key, StepReport] = {}

    async def run_under(self, lease: Lease) -> bool:
        """Does the job under the background lease, and gives the lease back.

        Returns:
            Always `True`, as `Session.in_own_task` expects a value.
        """
        self._session.run.log.info(ev.BACKGROUND_STARTED, epoch=lease.epoch)
        await self._session.work_under(lease, self)
        return True

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Settles the ledger for the background lines, and runs their migrations."""
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
    """Returns the lines of the background migrations in the plan, and those already in use."""
    return {step.script.line for step in plan.steps} | snapshot.plan.busy


def _raise_if_failed_elsewhere(before: Snapshot, snapshot: Snapshot) -> None:
    """Raises if a migration of the plan failed in another process while this one waited.

    Args:
        before: The snapshot taken before waiting for the lease.
        snapshot: The snapshot taken under the lease.

    Raises:
        FailedElsewhereError: It failed, with the script that this process would run.
    """
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
    """A migration failed in another process; caught by `upgrade`, which builds the report.

    Attributes:
        step: The report of the migration.
        event: The journal entry of the failure.
    """

    def __init__(self, step: StepReport, event: Event) -> None:
        super().__init__(step.error)
        self.step = step
        self.event = event
