"""One run under one lease: take it, fence older holders, do a job, give it back.

What the job does is for `upgrade`, `downgrade` and `maintenance`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Iterable

import anyio

from aiomigrate import events as ev
from aiomigrate.concurrency import sole_error
from aiomigrate.execution.executor import Executor
from aiomigrate.execution.reverser import Reverser
from aiomigrate.execution.workspace import Workspace
from aiomigrate.ledger.codec import Head
from aiomigrate.ledger.history import seen_epochs
from aiomigrate.ledger.lease import HOST, Lease, acquire, is_unfenced, phase_text
from aiomigrate.ledger.records import BACKGROUND_LEASE, HeadRow, Kind, new_event
from aiomigrate.ledger.writer import Writer
from aiomigrate.planning.preflight import OnDestructive
from aiomigrate.planning.reconcile import digest_at
from aiomigrate.runs.environment import Run
from aiomigrate.runs.progress import ProgressBoard
from aiomigrate.runs.snapshot import Snapshot, View
from aiomigrate.telemetry import LEASE
from aiomigrate.version import __version__

_HEAD_FRAGMENTS = 8
_JOURNAL_FRAGMENTS = 64


class Job:
    """Work that needs the lease.

    Attributes:
        doing: What the lease row shows of it, before a migration runs.
    """

    doing = ""

    async def is_done(self, head: Head) -> bool:
        """Returns whether another process has done it while this one waited for the lease."""
        return False

    def first_rows(self, lease: Lease) -> Iterable[HeadRow]:
        """Returns the lines' rows to make together with the lease's, where that is made."""
        return ()

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Does it; when the lease is lost it is cancelled."""
        raise NotImplementedError


class Session:
    """Holds leases for the jobs of one run.

    Attributes:
        run: The context of the run.
        board: What its migrations are doing.
        lease_s: Seconds that the last lease was waited for.
    """

    def __init__(self, run: Run) -> None:
        """Holds no lease; nothing is read or written yet."""
        self.run = run
        self.board = ProgressBoard(run.options.on_progress, log=run.log)
        self.begun_at = run.clock.monotonic()
        self.lease_s = 0.0
        self._since = run.clock.wall().isoformat(timespec="seconds")

    async def hold(self, job: Job) -> bool:
        """Takes the lease, does a job under it, and gives it back.

        Returns:
            Whether the job was done here.

        Raises:
            LeaseError: The lease could not be had or kept.
            LedgerError: The metadata tables cannot be read or written.
        """
        return await self.in_own_task(lambda: self.hold_here(job))

    async def in_own_task(self, work: Callable[[], Awaitable[bool]]) -> bool:
        """Does what holds a lease in a task of its own, and returns what it returned.

        A task's native cancellation, which passes through shields, then ends here and reaches
        what holds the lease as a cancelled scope.
        """
        worked: list[bool] = []

        async def held() -> None:
            worked.append(await work())

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(held)
        except BaseExceptionGroup as failures:
            raise sole_error(failures) from None
        return worked[0]

    async def hold_here(self, job: Job) -> bool:
        """As `hold`, in the task of the caller."""
        run = self.run
        begun = run.clock.monotonic()
        run.store.abandoned.clear()  # of an earlier run: its lease has to expire first
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
            )
        self.lease_s = run.clock.monotonic() - begun
        if lease is None:
            return False
        run.log.info(ev.LEASE_ACQUIRED, epoch=lease.epoch, waited_s=round(self.lease_s, 4))
        await self.work_under(lease, job)
        return True

    async def work_under(self, lease: Lease, job: Job) -> None:
        """Does a job under a lease that was taken, and gives the lease back."""
        run = self.run
        writer = Writer(
            run.ledger,
            lease,
            run.options.lease,
            clock=run.clock,
            log=run.log,
            stamp={"run_id": run.run_id, "host": HOST, "pid": os.getpid(), "tool": __version__},
            phase=lambda: self.phase(job.doing),
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
        """Returns what the lease row shows of this run."""
        return phase_text(
            self.run.run_id,
            self._since,
            self.run.options.lease.ttl_s,
            self.board.phase or doing,
            self.board.steps,
        )

    async def take_over(self, writer: Writer, lease: Lease, view: View) -> Snapshot:
        """Fences every older holder, then reads and decides again.

        Raises:
            AiomigrateError: What was read forbids running.
        """
        ledger = self.run.ledger
        # Read under the lease, but for the background's: its lines were handed to it afterwards.
        head = None if lease.key == BACKGROUND_LEASE else lease.head
        if is_unfenced(lease.head, lease.key, lease.epoch):
            await ledger.take_rows(lease.key, lease.epoch, lease.owner)
            head = None  # an older holder may have written up to then
        events = await ledger.read_journal()
        seen = {str(epoch): seq for epoch, seq in seen_epochs(events, lease.key).items()}
        opened = new_event(
            Kind.OPENED,
            at=self.run.clock.wall(),
            waited_s=self.lease_s,
            detail={"seen": seen},
        )
        # Later events of older epochs do not count: they were not seen. Where nobody is left who
        # could write them (the last holder shut out those before it, and is done), it is durable
        # early enough with the first event that needs to be.
        if not seen or str(lease.returned) in seen:
            writer.record_later(opened)
        else:
            await writer.record(opened)
        return await view.look(head, events)

    def workspace(self, writer: Writer) -> Workspace:
        """Returns what migrations are executed with under the lease of a writer."""
        run = self.run
        return Workspace.under(
            writer,
            run.store,
            params=run.options.params,
            digest_at=lambda line, version: digest_at(run.scripts, line, version),
            clock=run.clock,
            log=run.log,
            progress=self.board.running,
            telemetry=run.options.telemetry,
        )

    def executor(self, workspace: Workspace) -> Executor:
        """Returns what runs migrations in a workspace."""
        options = self.run.options
        return Executor(
            workspace,
            timeout_s=options.timeout_s,
            concurrency=options.concurrency,
            keeps=options.on_destructive is OnDestructive.KEEP,
        )

    def reverser(self, workspace: Workspace) -> Reverser:
        """Returns what undoes migrations in a workspace."""
        return Reverser(workspace)
