"""One run under one lease: take the lease, fence older holders, do a job, give the lease back.

The entry points in `runs.upgrade`, `runs.downgrade` and `runs.maintenance` create a `Session` and
give it a `Job`; the job calls `take_over` first. How a lease is taken and renewed is for
`ledger.lease` and `ledger.writer`; which migrations a job runs is for the job.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio

from aiomigrate import events as ev
from aiomigrate.concurrency import sole_error
from aiomigrate.execution.executor import Executor
from aiomigrate.execution.reverser import Reverser
from aiomigrate.execution.workspace import Workspace
from aiomigrate.ledger.codec import Head
from aiomigrate.ledger.history import seen_epochs
from aiomigrate.ledger.lease import HOST, Lease, acquire, is_unfenced, phase_text
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.ledger.records import BACKGROUND_LEASE, HeadRow, Kind, new_event
from aiomigrate.ledger.writer import Writer
from aiomigrate.migration.model import Scripts
from aiomigrate.planning.preflight import OnDestructive
from aiomigrate.planning.reconcile import digest_at
from aiomigrate.results import Report
from aiomigrate.runs.environment import Environment, Run
from aiomigrate.runs.progress import ProgressBoard
from aiomigrate.runs.settlement import ReportBuilder, run_failure
from aiomigrate.runs.snapshot import Snapshot, SnapshotReader, View
from aiomigrate.store.connection import Store
from aiomigrate.telemetry import LEASE
from aiomigrate.version import __version__

_HEAD_FRAGMENTS = 8
_JOURNAL_FRAGMENTS = 64


@dataclass(frozen=True, slots=True)
class RunStart:
    """A run that has begun: what every verb that takes the lease has in common.

    Attributes:
        environment: The manager's database, options, clocks and logger.
        run_id: The identifier of the run.
        log: A logger bound to the run.
        scripts: All migrations.
        builder: Builds the report when the run has ended.
    """

    environment: Environment
    run_id: str
    log: Any
    scripts: Scripts
    builder: ReportBuilder

    @classmethod
    async def begin(cls, environment: Environment, **keys: object) -> RunStart:
        """Begins a run and loads the scripts. Reads no database.

        Args:
            environment: The manager's database, options, clocks and logger.
            keys: Further keys of the run's log entries.

        Raises:
            ScriptError: A script is wrong.
        """
        run_id, log = environment.new_run(**keys)
        clock, database = environment.clock, environment.database
        start, started_at = clock.monotonic(), clock.wall()
        scripts = await database.scripts()
        report = Report(run_id=run_id, database=database.name, started_at=started_at)
        builder = ReportBuilder(report, start, clock, scripts)
        return cls(environment, run_id, log, scripts, builder)

    def reader(self, store: Store | None, ledger: Ledger | None) -> SnapshotReader:
        """Returns what reads the database for the run; both are `None` where there is none."""
        on_ahead = self.environment.options.on_ahead
        return SnapshotReader(store, ledger, self.scripts, on_ahead=on_ahead, log=self.log)

    def session(self, store: Store, ledger: Ledger) -> Session:
        """Returns what takes the lease for the run."""
        context = self.environment.context(
            store, ledger, self.scripts, run_id=self.run_id, log=self.log
        )
        return Session(context)

    def finish(self, report: Report, **facts: object) -> Report:
        """Logs that the run has finished, with some facts, and returns its report.

        Raises:
            MigrationFailedError: A migration was not applied, or not undone.
        """
        if any(not step.outcome.is_done for step in report.steps):
            raise run_failure(report, self.log)
        self.log.info(ev.RUN_FINISHED, **facts)
        return report


class Job:
    """Work that needs the lease.

    Attributes:
        doing: The text that the lease row shows while no migration is running.
    """

    doing = ""
    is_founded = False  # whether the metadata tables are known to exist

    async def is_done(self, head: Head) -> bool:
        """Returns whether another process did the job while this one waited for the lease."""
        return False

    def first_rows(self, lease: Lease) -> Iterable[HeadRow]:
        """Returns the head rows to create together with the lease's row, if that is created."""
        return ()

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Does the job. Cancelled if the lease is lost.

        Args:
            writer: Writes the journal and the head.
            lease: The lease.
        """
        raise NotImplementedError


class Session:
    """Holds leases for the jobs of one run.

    Attributes:
        run: The context of the run.
        board: The progress of its migrations.
        start: Monotonic time when the session was created.
        lease_s: Seconds it took to acquire the run lease the last time; 0 before.
    """

    def __init__(self, run: Run) -> None:
        """Takes no lease. Reads and writes nothing yet.

        Args:
            run: The context of the run.
        """
        self.run = run
        self.board = ProgressBoard(run.options.on_progress, log=run.log)
        self.start = run.clock.monotonic()
        self.lease_s = 0.0
        self._since = run.clock.wall().isoformat(timespec="seconds")

    async def hold(self, job: Job) -> bool:
        """Takes the run lease, does a job under it, and gives the lease back.

        A cancellation gives the lease back too. A crash leaves it; other processes take it after
        its TTL.

        Args:
            job: The job.

        Returns:
            Whether this process did the job; `False` if another one did it meanwhile.

        Raises:
            LeaseError: The lease could not be acquired, or was lost.
            LedgerError: The metadata tables cannot be read or written.
            AiomigrateError: The job failed.
        """
        return await self.in_own_task(lambda: self.hold_here(job))

    async def in_own_task(self, work: Callable[[], Awaitable[bool]]) -> bool:
        """Runs a function that holds a lease in a task of its own.

        A native cancellation of the calling task passes through shields. It ends here, and
        reaches the function as the cancellation of a scope.

        Args:
            work: The function.

        Returns:
            The function's result.
        """
        results: list[bool] = []

        async def work_in_task() -> None:
            results.append(await work())

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(work_in_task)
        except BaseExceptionGroup as failures:
            raise sole_error(failures) from None
        return results[0]

    async def hold_here(self, job: Job) -> bool:
        """Does the same as `hold`, in the task of the caller."""
        run = self.run
        start = run.clock.monotonic()
        run.store.abandoned.clear()  # from an earlier run, whose lease has to expire first
        with run.options.telemetry.span(LEASE, {"db.operation.name": job.doing}):
            lease = await acquire(
                run.ledger,
                owner=secrets.token_hex(6),
                phase=self.phase(job.doing),
                options=run.options.lease,
                clock=run.clock,
                log=run.log,
                is_done=job.is_done,
                line_rows=job.first_rows,
                is_founded=job.is_founded,
            )
        self.lease_s = run.clock.monotonic() - start
        if lease is None:
            return False
        run.log.info(ev.LEASE_ACQUIRED, epoch=lease.epoch, waited_s=round(self.lease_s, 4))
        await self.work_under(lease, job)
        return True

    async def work_under(self, lease: Lease, job: Job) -> None:
        """Does a job under a lease that was taken, compacts the ledger, and gives the lease back.

        The lease is left to expire if a cancelled mutation may still commit.

        Args:
            lease: The lease.
            job: The job.

        Raises:
            LeaseLostError: Another process has taken the lease.
            AiomigrateError: The job failed, or the ledger could not be written.
        """
        run = self.run
        writer = Writer(
            run.ledger,
            lease,
            run.options.lease,
            clock=run.clock,
            log=run.log,
            stamp={"run_id": run.run_id, "host": HOST, "pid": os.getpid(), "tool": __version__},
            phase=partial(self.phase, job.doing),
        )
        async with anyio.create_task_group() as group:
            try:
                group.start_soon(writer.run)
                with anyio.CancelScope() as scope:
                    writer.on_lost = scope.cancel
                    await job.work(writer, lease)
                    await run.ledger.compact(
                        head_over=_HEAD_FRAGMENTS, journal_over=_JOURNAL_FRAGMENTS
                    )
            finally:
                writer.close(release=not run.store.abandoned)
        if writer.error is not None:
            raise writer.error

    def phase(self, doing: str) -> str:
        """Returns the text of the lease row about this run.

        Args:
            doing: What to show if no migration is running.
        """
        return phase_text(
            self.run.run_id,
            self._since,
            self.run.options.lease.ttl_s,
            self.board.phase or doing,
            self.board.steps,
        )

    async def take_over(self, writer: Writer, lease: Lease, view: View) -> Snapshot:
        """Fences every older holder of the lease, then reads and decides again.

        Afterwards, older holders can write neither the head nor an event that counts.

        Args:
            writer: Writes the journal.
            lease: The lease.
            view: What to read.

        Raises:
            LeaseLostError: Another process has taken the lease.
            AiomigrateError: The view found a problem that prevents the run.
        """
        ledger = self.run.ledger
        # The head was read when the lease was taken. The background lease got its lines after that.
        head = None if lease.key == BACKGROUND_LEASE else lease.head
        if is_unfenced(lease.head, lease.key, lease.epoch):
            await ledger.take_rows(lease.key, lease.epoch, lease.owner)
            head = None  # an older holder may have written until now
        events = await ledger.read_journal()
        seen = {str(epoch): seq for epoch, seq in seen_epochs(events, lease.key).items()}
        opened = new_event(
            Kind.OPENED,
            at=self.run.clock.wall(),
            waited_s=self.lease_s,
            detail={"seen": seen},
        )
        # Events of older epochs that are not in `seen` do not count. If no holder is left that
        # could write one (the last holder fenced those before it, and gave the lease back), this
        # event may become durable with the first event that has to.
        if not seen or str(lease.returned) in seen:
            writer.record_later(opened)
        else:
            await writer.record(opened)
        return await view.read(head, events)

    def workspace(self, writer: Writer) -> Workspace:
        """Returns the collaborators that execute migrations under the lease of a writer."""
        run = self.run
        return Workspace.under(
            writer,
            run.store,
            params=run.options.params,
            digest_at=partial(digest_at, run.scripts),
            clock=run.clock,
            log=run.log,
            progress=self.board.running,
            telemetry=run.options.telemetry,
        )

    def executor(self, workspace: Workspace) -> Executor:
        """Returns an executor, which applies migrations in a workspace."""
        options = self.run.options
        return Executor(
            workspace,
            timeout_s=options.timeout_s,
            concurrency=options.concurrency,
            keeps=options.on_destructive is OnDestructive.KEEP,
        )

    def reverser(self, workspace: Workspace) -> Reverser:
        """Returns a reverser, which undoes migrations in a workspace."""
        return Reverser(workspace)
