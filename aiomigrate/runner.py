"""One run under one lease: take over, settle the ledger, run the plan's lines concurrently.

The facade that decides whether a run is needed at all is `manager`; one migration is `executor`.
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel

from aiomigrate import events as ev
from aiomigrate.checksum import ALGORITHM
from aiomigrate.clock import Clock
from aiomigrate.deferral import IDLE, Busy, ready
from aiomigrate.executor import Executor
from aiomigrate.fold import Journal, seen_epochs, uncleaned
from aiomigrate.lance import Opened, Store
from aiomigrate.lease import (
    HOST,
    Lease,
    LeaseOptions,
    Watch,
    acquire,
    give_back,
    is_unfenced,
    phase_text,
    take,
)
from aiomigrate.ledger import Head, Ledger
from aiomigrate.model import BACKGROUND_LEASE, Event, HeadRow, Kind, Params, Script, Scripts
from aiomigrate.order import Key
from aiomigrate.plan import Direction, OnDestructive, Part, Plan, Step
from aiomigrate.reconcile import Act, LineState, Reconciled, digest_at, newly_covered
from aiomigrate.report import Going, Outcome, StepReport
from aiomigrate.rollback import Reverser
from aiomigrate.telemetry import LEASE, MIGRATION, TABLE, Telemetry
from aiomigrate.together import sole
from aiomigrate.undo import Kept, Undo, contracted, finish, kept_savepoints
from aiomigrate.version import __version__
from aiomigrate.writer import Writer

_HEAD_FRAGMENTS = 8
_JOURNAL_FRAGMENTS = 64

_UNSET: dict[str, Any] = {"lease": "", "epoch": 0, "seq": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far one migration is: what an `on_progress` callback is given.

    Attributes:
        line: Its line.
        version: Its version.
        description: Its description.
        state: `waiting`, `running`, or an outcome.
        doing: What it is doing now.
        done: How much is done, in what `total` counts.
        total: How much there is, `None` if unknown.
    """

    line: str
    version: int
    description: str = ""
    state: str = "running"
    doing: str = ""
    done: int = 0
    total: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What every run of a manager has in common.

    Attributes:
        params: Parameters of the migrations.
        concurrency: How many migrations may run at once.
        lease: How the lease is taken and kept.
        timeout_s: Seconds one migration may take, `None` for no limit.
        on_destructive: What to do about steps that discard what is there.
        keep_s: Seconds for which savepoints of such steps are kept.
        on_progress: Told how migrations proceed.
        telemetry: Told of everything that takes time.
    """

    params: Params = field(default_factory=dict)
    concurrency: int = 16
    lease: LeaseOptions = field(default_factory=LeaseOptions)
    timeout_s: float | None = None
    on_destructive: OnDestructive = OnDestructive.KEEP
    keep_s: float = 7 * 86400.0
    on_progress: Callable[[Progress], None] | None = None
    telemetry: Telemetry = field(default_factory=Telemetry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
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


Decide = Callable[[Script, LineState], Awaitable[Undo]]
"""Decides how one migration of a line is undone, from what is there now."""

Look = Callable[[Head | None, Sequence[Event] | None], Awaitable[Seen]]
"""Reads head and journal unless they are given; decides and plans; raises what forbids it."""


class Runner:
    """Runs plans, and other work that needs the lease."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        scripts: Scripts,
        options: RunOptions,
        *,
        run_id: str,
        clock: Clock,
        log: Any,
    ) -> None:
        """Binds to a database; nothing is read or written yet."""
        self._store = store
        self._ledger = ledger
        self._scripts = scripts
        self._options = options
        self._run_id = run_id
        self._clock = clock
        self._log = log
        self._begun_at = clock.monotonic()
        self._since = clock.wall().isoformat(timespec="seconds")
        self._running: dict[str, str] = {}
        self._going: dict[str, Going] = {}
        self._deaf = False
        self.results: dict[Key, StepReport] = {}
        self.plan: Plan | None = None
        self.deferred: tuple[Key, ...] = ()
        self.lease_s = 0.0

    async def hold(
        self,
        work: Callable[[Writer, Lease], Awaitable[None]],
        *,
        is_done: Callable[[Head], Awaitable[bool]],
        doing: str,
        enrol: Callable[[Lease], Iterable[HeadRow]] = lambda _: (),
    ) -> bool:
        """Takes the lease, does some work under it, and gives it back.

        Args:
            work: Called with the writer; when the lease is lost it is cancelled.
            is_done: Whether another process has done it while this one waited.
            doing: What to show in the lease row.
            enrol: Returns the lines' rows to make together with the lease's, where that is made.

        Returns:
            Whether the work was done here.

        Raises:
            LeaseError: The lease could not be had or kept.
            LedgerError: The metadata tables cannot be read or written.
        """
        return await self._apart(lambda: self._hold(work, is_done, doing, enrol))

    async def _apart(self, work: Callable[[], Awaitable[bool]]) -> bool:
        worked: list[bool] = []

        async def held() -> None:
            worked.append(await work())

        # In a task of its own: a task's native cancellation, which passes through shields, then
        # ends here and reaches what holds the lease as a cancelled scope.
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(held)
        except BaseExceptionGroup as failures:
            raise sole(failures) from None
        return worked[0]

    async def _hold(
        self,
        work: Callable[[Writer, Lease], Awaitable[None]],
        is_done: Callable[[Head], Awaitable[bool]],
        doing: str,
        enrol: Callable[[Lease], Iterable[HeadRow]] = lambda _: (),
    ) -> bool:
        begun = self._clock.monotonic()
        self._store.abandoned.clear()  # of an earlier run: its lease has to expire first
        with self._options.telemetry.span(LEASE, {"db.operation.name": doing}):
            lease = await acquire(
                self._ledger,
                owner=secrets.token_hex(6),
                phase=self._said(doing),
                options=self._options.lease,
                clock=self._clock,
                log=self._log,
                is_done=is_done,
                enrol=enrol,
            )
        self.lease_s = self._clock.monotonic() - begun
        if lease is None:
            return False
        self._log.info(ev.LEASE_ACQUIRED, epoch=lease.epoch, waited_s=round(self.lease_s, 4))
        await self._under(lease, work, doing)
        return True

    async def _under(
        self, lease: Lease, work: Callable[[Writer, Lease], Awaitable[None]], doing: str
    ) -> None:
        """Does some work under a lease that was taken, and gives it back."""
        writer = Writer(
            self._ledger,
            lease,
            self._options.lease,
            clock=self._clock,
            log=self._log,
            stamp={"run_id": self._run_id, "host": HOST, "pid": os.getpid(), "tool": __version__},
            phase=lambda: self._said(doing),
        )
        async with anyio.create_task_group() as group:
            try:
                group.start_soon(writer.run)
                with anyio.CancelScope() as scope:
                    writer.on_lost = scope.cancel
                    await work(writer, lease)
                    await self._ledger.compact(
                        head_over=_HEAD_FRAGMENTS, journal_over=_JOURNAL_FRAGMENTS
                    )
            finally:
                writer.close(release=not self._store.abandoned)
        if writer.error is not None:
            raise writer.error

    def _said(self, doing: str) -> str:
        return phase_text(
            self._run_id,
            self._since,
            self._options.lease.ttl_s,
            self._phase() or doing,
            list(self._going.values()),
        )

    def _phase(self) -> str:
        return "; ".join(list(self._running.values())[:3])

    async def take_over(self, writer: Writer, lease: Lease, look: Look) -> Seen:
        """Fences every older holder, then reads and decides again.

        Raises:
            AiomigrateError: What was read forbids running.
        """
        # Read under the lease, but for the background's: its lines were handed to it afterwards.
        head = None if lease.key == BACKGROUND_LEASE else lease.head
        if is_unfenced(lease.head, lease.key, lease.epoch):
            await self._ledger.take_rows(lease.key, lease.epoch, lease.owner)
            head = None  # an older holder may have written up to then
        events = await self._ledger.read_journal()
        seen = {str(epoch): seq for epoch, seq in seen_epochs(events, lease.key).items()}
        opened = Event(
            **_UNSET,
            at=self._clock.wall(),
            kind=Kind.OPENED,
            waited_s=self.lease_s,
            detail={"seen": seen},
        )
        # Later events of older epochs do not count: they were not seen. Where nobody is left who
        # could write them (the last holder shut out those before it, and is done), it is durable
        # early enough with the first event that needs to be.
        if not seen or str(lease.returned) in seen:
            writer.follow(opened)
        else:
            await writer.record(opened)
        return await look(head, events)

    async def upgrade(
        self, before: Seen, look: Look, opened: Mapping[str, Opened | None], opened_at: float
    ) -> bool:
        """Takes the lease and brings the database to the plan's target, but for the background.

        Args:
            before: What was seen without the lease: a hint, and the failures known then.
            look: Reads and decides again.
            opened: Tables as they were seen after that, `None` for those that were not there.
            opened_at: Monotonic time before they were.

        Returns:
            Whether anything was done here; `results` holds the migrations.

        Raises:
            MigrationFailedError: Another process failed with the same migration while this one
                waited for it; this one's own failures are in `results`.
            AiomigrateError: The run could not begin or go on.
        """

        async def is_done(head: Head) -> bool:
            there = ready(head.rows, self._scripts, head.leases.get(BACKGROUND_LEASE))
            return there is not None and not before.plan.is_empty

        async def work(writer: Writer, lease: Lease) -> None:
            seen = await self.take_over(writer, lease, look)
            self.deferred = seen.plan.deferred
            seen = replace(seen, plan=seen.plan.part(Part.FAST))
            self.plan = seen.plan
            if lease.waited:
                _raise_if_failed_elsewhere(before, seen)
            executor = self._executor(writer)
            last = before.head.leases.get(lease.key)
            if lease.epoch == (last.epoch or 0 if last else 0) + 1:  # no other run came between
                executor.know(opened, opened_at)
            own = await self._settle(seen, writer, lease, executor)
            await self._run_plan(seen, executor, self._reverser(writer, executor), own=own)
            if any(step.script.contracts and self._is_done(step.key) for step in seen.plan.steps):
                await writer.sync()
                seen = await look(None, None)
            await self._prune(seen, writer, executor, older_than_s=self._options.keep_s)

        def enrol(lease: Lease) -> list[HeadRow]:
            pending = {step.script.line for step in before.plan.steps if not step.deferred}
            return [
                self._row(line, 0, lease)
                for line, state in before.plan.lines.items()
                if state.act is Act.ENROL and not state.current and line in pending
            ]

        return await self.hold(work, is_done=is_done, doing="starting", enrol=enrol)

    async def background(self, look: Look) -> bool:
        """Does what an application's start does not wait for, under a lease of its own.

        Another process that does it is waited for, as long as it takes: it may die.

        Args:
            look: Reads and decides again.

        Returns:
            Whether anything was done here; `results` holds the migrations.

        Raises:
            DependencyError: What is to be done first is pending and not in the background.
            AiomigrateError: The work could not begin or go on.
        """
        watch = Watch(self._options.lease.ttl_s, self._clock)
        while True:
            head = await self._ledger.read_head()
            row = head.leases.get(BACKGROUND_LEASE)
            if ready(head.rows, self._scripts, row) == frozenset():
                return False
            if row is None or watch.may_take(row):
                lease = await self._begun(look, watch)
                if lease is not None:
                    return await self._apart(partial(self._in_background, lease, look))
                if self.plan is None:
                    return False
            await anyio.sleep(max(0.1, self._options.lease.ttl_s / 6))

    async def _begun(self, look: Look, watch: Watch) -> Lease | None:
        taken: list[Lease] = []
        await self._apart(lambda: self._handed_over(look, watch, taken))
        return taken[0] if taken else None

    async def _handed_over(self, look: Look, watch: Watch, taken: list[Lease]) -> bool:
        """Takes the background lease, under the run lease, with the records of its lines."""

        async def never(_: Head) -> bool:
            return False

        async def work(writer: Writer, lease: Lease) -> None:
            seen = await self.take_over(writer, lease, look)
            self.plan = None
            if not seen.plan.needs_background:
                return
            self.plan = seen.plan.part(Part.BACKGROUND)
            own = await self._settle(seen, writer, lease, self._executor(writer))
            await own()
            await writer.sync()
            await self._ledger.ensure_lease(BACKGROUND_LEASE)
            head = await self._ledger.read_head()
            row = head.leases[BACKGROUND_LEASE]
            if not watch.may_take(row):
                return  # someone was faster, or its holder is alive after all
            with anyio.CancelScope(shield=True):
                mine = await take(
                    self._ledger, head, BACKGROUND_LEASE, secrets.token_hex(6),
                    self._said("starting"), self._clock,
                )  # fmt: skip
                if not isinstance(mine, Lease):
                    return
                taken.append(mine)
                lines = {step.script.line for step in self.plan.steps} | seen.plan.busy
                await self._ledger.own_rows(
                    [self._row(line, seen.decided.lines[line].current, mine)
                     for line in sorted(lines) if self._scripts.of(line)]
                )  # fmt: skip

        try:
            return await self._hold(work, never, "handing over to the background")
        except BaseException:
            if taken:  # nothing was done under it yet
                with anyio.CancelScope(shield=True):
                    await give_back(self._ledger, taken.pop())
            raise

    async def _in_background(self, lease: Lease, look: Look) -> bool:
        self._log.info(ev.BACKGROUND_STARTED, epoch=lease.epoch)

        async def work(writer: Writer, lease: Lease) -> None:
            seen = await self.take_over(writer, lease, look)
            plan = seen.plan.part(Part.BACKGROUND)
            self.plan = plan
            lines = {step.script.line for step in plan.steps} | seen.plan.busy
            seen = replace(seen, plan=plan)
            executor = self._executor(writer)
            own = await self._settle(seen, writer, lease, executor, only=lines)
            await self._run_plan(seen, executor, self._reverser(writer, executor), own=own)

        await self._under(lease, work, "starting")
        return True

    async def rollback(self, read: Look, look: Look, decide: Decide) -> None:
        """Takes the lease and undoes what the plan says; `results` holds the migrations.

        Args:
            read: Reads, so that what a dead process left can be settled first.
            look: Reads, decides and plans.
            decide: Reads and decides again how one migration is undone, when its turn comes.

        Raises:
            AiomigrateError: The run could not begin or go on.
        """

        async def work(writer: Writer, lease: Lease) -> None:
            executor = self._executor(writer)
            seen = await self.take_over(writer, lease, read)
            own = await self._settle(seen, writer, lease, executor)
            await own()
            await writer.sync()
            seen = await look(None, None)
            self.plan = seen.plan
            await self._run_plan(seen, executor, self._reverser(writer, executor), decide)

        await self.hold(work, is_done=_never, doing="rolling back")

    async def prune(self, look: Look, *, older_than_s: float) -> tuple[Kept, ...]:
        """Deletes savepoints that were kept; returns them.

        Raises:
            AiomigrateError: The run could not begin or go on.
        """
        found: list[Kept] = []

        async def work(writer: Writer, lease: Lease) -> None:
            seen = await self.take_over(writer, lease, look)
            executor = self._executor(writer)
            found.extend(await self._prune(seen, writer, executor, older_than_s=older_than_s))

        await self.hold(work, is_done=_never, doing="pruning")
        return tuple(found)

    def _is_done(self, key: Key) -> bool:
        result = self.results.get(key)
        return result is not None and result.outcome.is_done

    async def _prune(
        self, seen: Seen, writer: Writer, executor: Executor, *, older_than_s: float
    ) -> list[Kept]:
        oldest = self._clock.wall() - dt.timedelta(seconds=older_than_s)
        current = {line: state.current for line, state in seen.decided.lines.items()}
        found = kept_savepoints(seen.journal)
        ended = contracted(found, self._scripts, current)
        old = [kept for kept in found if kept.at <= oldest or kept in ended]
        for kept in old:
            await executor.applier.clean([], {kept.table: kept.branch})
        if old:
            events = [
                Event(
                    **_UNSET,
                    at=self._clock.wall(),
                    kind=Kind.PRUNED,
                    line=kept.key[0],
                    version=kept.key[1],
                    detail={"pruned": {kept.table: kept.branch}},
                )
                for kept in old
            ]
            await writer.record(*events)
            self._log.info(ev.SAVEPOINTS_PRUNED, savepoints=len(old))
        return old

    def _reverser(self, writer: Writer, executor: Executor) -> Reverser:
        return Reverser(self._store, writer, executor, clock=self._clock, log=self._log)

    def _executor(self, writer: Writer) -> Executor:
        return Executor(
            self._store,
            writer,
            params=self._options.params,
            digest_at=lambda line, version: digest_at(self._scripts, line, version),
            clock=self._clock,
            log=self._log,
            timeout_s=self._options.timeout_s,
            concurrency=self._options.concurrency,
            keeps=self._options.on_destructive is OnDestructive.KEEP,
            progress=self._tell_running,
            telemetry=self._options.telemetry,
        )

    # ---- before the first migration -------------------------------------------------------------

    async def _settle(
        self,
        seen: Seen,
        writer: Writer,
        lease: Lease,
        executor: Executor,
        *,
        only: Collection[str] | None = None,
    ) -> Callable[[], Awaitable[None]]:
        """Lets the head follow the journal, line by line.

        Args:
            seen: What was read.
            writer: The holder's writer.
            lease: The lease.
            executor: For cleaning.
            only: The lines; by default all but those that work in the background has in hand.

        Returns:
            What makes the rows ours that are not, which need not come before the first migrations.
        """
        pending = {step.script.line for step in seen.plan.steps}
        owned: list[HeadRow] = []
        adopted: list[Event] = []
        lifted: list[LineState] = []
        mine = {
            line: state
            for line, state in seen.plan.lines.items()
            if (line not in seen.plan.busy if only is None else line in only)
        }
        for line, state in mine.items():
            merge = state.rows > 1
            if state.act is Act.ENROL and not (line in pending or state.current):
                continue
            if state.act in (Act.ENROL, Act.ADOPT, Act.REOWN) or merge:
                owned.append(self._row(line, state.current, lease))
            if state.act in (Act.ADOPT, Act.REOWN, Act.LIFT):
                lifted.append(state)
            if state.act is Act.ADOPT:
                adopted.append(await self._adoption(state, executor))
                self._log.info(ev.LEDGER_ADOPTED, table=line, version=state.current)
        durable = writer.follow(*adopted)
        for state in mine.values():
            if (left := uncleaned(state.history, seen.journal)) is not None:
                await executor.clean_after(left)
        for state in lifted:
            executor.lift(state.line, state.current)

        async def own() -> None:
            if adopted:
                await writer.ripen(durable)  # the journal has what the head is about to say
            await self._ledger.own_rows(owned)

        return own

    def _row(self, line: str, version: int, lease: Lease) -> HeadRow:
        digest = digest_at(self._scripts, line, version)
        return lease.row(line, version, at=self._clock.wall(), digest=digest)

    async def _adoption(self, state: LineState, executor: Executor) -> Event:
        tables = [s.table for s in self._scripts.of(state.line) if s.table]
        return Event(
            **_UNSET,
            at=self._clock.wall(),
            kind=Kind.ADOPTED,
            line=state.line,
            version=state.current,
            algorithm=ALGORITHM,
            tables=await _shapes(tables[:1], executor),
            detail={"checksums": newly_covered(state, self._scripts)},
        )

    # ---- the plan -------------------------------------------------------------------------------

    async def _run_plan(
        self,
        seen: Seen,
        executor: Executor,
        reverser: Reverser,
        decide: Decide | None = None,
        *,
        own: Callable[[], Awaitable[None]] = anyio.lowlevel.checkpoint,
    ) -> None:
        """Runs the migrations of a plan, and beside the first of them what `own` does.

        No line goes on to its second before that is done: after a crash then, a row that is not
        ours would be believed less than tables as the journal last saw them.
        """
        plan = seen.plan
        is_owned = anyio.Event()
        ended: dict[Key, anyio.Event] = {}
        begun = self._clock.monotonic()
        lines: dict[str, list[Step]] = {}
        for number, step in enumerate(plan.steps):
            ended[step.key] = anyio.Event()
            lines.setdefault(step.script.line, []).append(step)
            self._tell(step.script, "waiting")
            if number % _STARTED_AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()

        async def run_line(line: str) -> None:
            with self._options.telemetry.span(TABLE, {"db.collection.name": line}):
                try:
                    await self._run_line(lines[line], begun, executor, run_step, ended, is_owned)
                finally:
                    await executor.clean_line(line)

        async def own_rows() -> None:
            await own()
            is_owned.set()

        async def run_step(step: Step, free_at: float, depended_s: float) -> StepReport:
            script = step.script
            if blocked := [k for k in step.after if not self.results[k].outcome.is_done]:
                return self._skipped(script, blocked[0], depended_s)
            facts: dict[str, str | int] = {
                "db.collection.name": script.line,
                "db.operation.name": plan.direction.value,
                "aiomigrate.version": script.version,
                "aiomigrate.description": script.description,
            }
            with self._options.telemetry.span(MIGRATION, facts) as span:
                result = await self._run_step(
                    step, seen, executor, reverser, decide, free_at, depended_s
                )
                if not result.outcome.is_done:
                    span.failed(result.error)
            return result

        async with anyio.create_task_group() as group:
            group.start_soon(own_rows)
            for number, line in enumerate(lines):
                group.start_soon(run_line, line)
                if number % _STARTED_AT_ONCE == 0:
                    await anyio.lowlevel.checkpoint()

    async def _run_line(
        self,
        steps: Sequence[Step],
        free_at: float,
        executor: Executor,
        run_step: Callable[[Step, float, float], Awaitable[StepReport]],
        ended: Mapping[Key, anyio.Event],
        is_owned: anyio.Event,
    ) -> None:
        """Runs a line's migrations in order, each once those are done that it follows."""
        for step in steps:
            for key in step.after:
                if not ended[key].is_set():
                    await executor.clean_line(step.script.line)  # it may take long
                    await ended[key].wait()
            result = await run_step(step, free_at, self._clock.monotonic() - free_at)
            began_s = free_at - self._begun_at + result.waited_s
            result = replace(result, began_s=began_s)
            free_at = self._clock.monotonic()
            self.results[step.key] = result
            self._running.pop(step.script.line, None)
            self._going.pop(step.script.line, None)
            self._options.telemetry.ended(result)
            self._tell(step.script, result.outcome.value)
            ended[step.key].set()
            if not is_owned.is_set():
                await is_owned.wait()

    async def _run_step(
        self,
        step: Step,
        seen: Seen,
        executor: Executor,
        reverser: Reverser,
        decide: Decide | None,
        free_at: float,
        depended_s: float,
    ) -> StepReport:
        """Runs one migration, or undoes it, once everything that it follows is done."""
        script = step.script
        state = seen.plan.lines[script.line]
        unfinished = state.unfinished if step.resumes else None
        going_on = finish(script, state, seen.journal) if unfinished else None
        if going_on is not None:
            self._tell_running(script, "undoing", 0, None)
            result = await reverser.run(
                script, going_on, unfinished, free_at, depended_s=depended_s
            )
            if step.undo is None and result.outcome.is_done:  # undone at last: once more
                result = await executor.run(script, None, free_at, depended_s=depended_s)
            return result
        if decide is not None:
            self._tell_running(script, "undoing", 0, None)
            undo = await decide(script, state)
            return await reverser.run(script, undo, None, free_at, depended_s=depended_s)
        failed = seen.journal.of(script.line).failed
        is_retry = failed is not None and failed.version == script.version
        return await executor.run(
            script,
            unfinished,
            free_at,
            depended_s=depended_s,
            is_retry=is_retry,
        )

    def _skipped(self, script: Script, cause: Key, depended_s: float) -> StepReport:
        going_back = self.plan is not None and self.plan.direction is Direction.ROLLBACK
        why = f"{cause[0]} {cause[1]} was not {'undone' if going_back else 'applied'}."
        self._log.warning(ev.STEP_SKIPPED, table=script.line, version=script.version, error=why)
        return StepReport(
            line=script.line,
            version=script.version,
            description=script.description,
            outcome=Outcome.SKIPPED,
            depended_s=depended_s,
            waited_s=depended_s,
            error=why,
        )

    def _tell_running(self, script: Script, doing: str, done: int, total: int | None) -> None:
        self._running[script.line] = f"{script}: {doing}"
        self._going[script.line] = Going(
            line=script.line, version=script.version, doing=doing, done=done, total=total
        )
        self._tell(script, "running", doing, done, total)

    def _tell(
        self, script: Script, state: str, doing: str = "", done: int = 0, total: int | None = None
    ) -> None:
        if self._options.on_progress is None:
            return
        progress = Progress(
            line=script.line,
            version=script.version,
            description=script.description,
            state=state,
            doing=doing,
            done=done,
            total=total,
        )
        try:
            self._options.on_progress(progress)
        except Exception as exc:  # noqa: BLE001 - whoever watches decides nothing
            if not self._deaf:
                self._log.warning(ev.PROGRESS_FAILED, error=repr(exc))
            self._deaf = True

    # ---- stamping -------------------------------------------------------------------------------

    async def stamp(self, versions: Mapping[str, int], look: Look) -> None:
        """Records lines at versions without running anything, ending what was interrupted.

        Raises:
            LeaseError: The lease could not be had or kept.
            LedgerError: The metadata tables cannot be read or written.
        """

        async def work(writer: Writer, lease: Lease) -> None:
            seen = await self.take_over(writer, lease, look)
            for line in versions:
                seen.busy.refuse_line(line, self._scripts)
            executor = self._executor(writer)
            events, rows = [], []
            for line, version in versions.items():
                covered = self._scripts.up_to(line, version)
                tables = sorted({t for script in covered for t in script.touches})
                checksums = {str(s.version): s.checksum for s in covered}
                if version:
                    checksums.setdefault(str(version), None)  # type: ignore[arg-type]
                events.append(
                    Event(
                        **_UNSET,
                        at=self._clock.wall(),
                        kind=Kind.STAMPED,
                        line=line,
                        version=version,
                        algorithm=ALGORITHM,
                        tables=await _shapes(tables, executor),
                        detail={"checksums": checksums},
                    )
                )
                rows.append(self._row(line, version, lease))
                self._log.info(ev.LINE_STAMPED, table=line, version=version)
            await writer.record(*events)
            await self._ledger.own_rows(rows)
            for line, version in versions.items():
                left = seen.journal.of(line).unfinished
                if left is not None:
                    # Going on below it, its witnesses tell the next run which updates are done.
                    is_below = version < (left.started.version or 0)
                    branches = left.started.detail.get("branches", {})
                    tables = [] if is_below else list(left.savepoints)
                    await executor.clean(line, version, tables, branches)
                executor.lift(line, version)

        await self.hold(work, is_done=_never, doing="stamping")


_STARTED_AT_ONCE = 64
"""How many lines and migrations begin before the event loop is let in between."""


async def _shapes(tables: Sequence[str], executor: Executor) -> dict[str, Any]:
    """Returns version and shape of tables, as events record them; no shape where none is."""
    result: dict[str, Any] = {}
    for name in tables:
        version, state = await executor.state_of(name)
        shape = None if state is None else state.shape()
        result[name] = {"before": version, "after": version, "shape": shape}
    return result


async def _never(_: Head) -> bool:
    return False


def _raise_if_failed_elsewhere(before: Seen, seen: Seen) -> None:
    """Raises a failure of a migration we were about to run, seen while waiting for its holder."""
    known = {(event.epoch, event.seq) for event in before.events}
    planned = {step.key: step.script.checksum for step in seen.plan.steps}
    for event in seen.journal.events:
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
    """Carries a failure of another process to the manager, which has the report to raise it in."""

    def __init__(self, step: StepReport, event: Event) -> None:
        super().__init__(step.error)
        self.step = step
        self.event = event
