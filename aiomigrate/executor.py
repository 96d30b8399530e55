"""One migration: recover what a crash left, run its operations, compare, record, or undo.

The order of writes is the protocol: `started` (durable) before the first commit, `advanced`
between operations, `applied` before anything of ours is removed, the head last. Which migrations
run, and when, is for `manager`.
"""

from __future__ import annotations

import datetime as dt
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from aiomigrate import events as ev
from aiomigrate.checksum import ALGORITHM
from aiomigrate.clock import Clock
from aiomigrate.context import Context
from aiomigrate.diff import differences
from aiomigrate.errors import (
    AiomigrateError,
    CommitConflictError,
    LeaseLostError,
    MigrationTimeoutError,
    OperationError,
    SchemaMismatchError,
    StaleHandleError,
    StoreError,
    TableExistsError,
    UnresolvedError,
    WriterCongestionError,
)
from aiomigrate.fold import Unfinished
from aiomigrate.lance import Store, Table
from aiomigrate.model import Event, HeadRow, Kind, Params, Script
from aiomigrate.operations.base import WITNESS_PREFIX, Missing, Operation, TableState
from aiomigrate.operations.data import Run
from aiomigrate.report import Outcome, StepReport
from aiomigrate.savepoint import (
    branch_name,
    drop_branch,
    is_ours,
    restore_fenced,
    uncover,
    unresolved,
)
from aiomigrate.touched import Touched
from aiomigrate.writer import Writer

_ATTEMPTS = 40
_AGAIN = (CommitConflictError, StaleHandleError, WriterCongestionError, TableExistsError)

_UNSET = dt.datetime.min.replace(tzinfo=dt.UTC)  # the writer fills it in

Progress = Callable[[Script, str, int, int | None], None]
"""Told of a step's progress: script, what it is doing, done, total."""


@dataclass(eq=False)
class _Work:
    """One attempt at one migration."""

    script: Script
    tables: dict[str, Touched]
    journaled: bool
    begin_at: int = 0
    resumed: bool = False
    savepoints: Mapping[str, int] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    ledger_s: float = 0.0
    started_s: float = 0.0

    def versions(self) -> dict[str, tuple[int, int]]:
        return {t.name: (t.before, t.version) for t in self.tables.values()}

    def facts(self) -> dict[str, Any]:
        return {
            t.name: {"before": t.before, "after": t.version, "shape": t.shape}
            for t in self.tables.values()
        }


class Executor:
    """Runs migrations under one lease."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        *,
        params: Params,
        digest_at: Callable[[str, int], str],
        clock: Clock,
        log: Any,
        timeout_s: float | None,
        concurrency: int,
        progress: Progress,
    ) -> None:
        """Binds to the writer whose lease everything happens under.

        Args:
            store: The database.
            writer: The holder's ledger writer.
            params: The run's parameters.
            digest_at: Returns a line's chain digest at a version.
            clock: Clocks.
            log: Bound logger.
            timeout_s: Seconds one migration may take.
            concurrency: How many migrations may operate at once.
            progress: Told how steps proceed.
        """
        self._store = store
        self._writer = writer
        self._params = params
        self._digest_at = digest_at
        self._clock = clock
        self._log = log
        self._timeout_s = timeout_s
        self._slots = anyio.CapacityLimiter(concurrency)
        self._progress = progress

    async def run(
        self, script: Script, unfinished: Unfinished | None, ready_at: float
    ) -> StepReport:
        """Runs one migration to its end: applied, or undone and failed.

        Waits for a slot first. On cancellation what was committed is undone under a shield, then
        cancellation goes on.

        Args:
            script: The migration.
            unfinished: What an earlier attempt left, if it did not end.
            ready_at: Monotonic time since when its wait counts.

        Raises:
            LeaseLostError: Another process has the lease; nothing was undone.
            AiomigrateError: The ledger cannot be written.
        """
        log = self._log.bind(table=script.line, version=script.version)
        work = _Work(script, {}, script.is_journaled_before)
        waited_s = 0.0
        try:
            async with self._slots:  # not held while waiting for the journal at the end
                work.started_s = self._clock.monotonic()
                waited_s = work.started_s - ready_at
                log.debug(ev.STEP_STARTED, description=script.description)
                with self._writer.working(), anyio.move_on_after(self._timeout_s) as limit:
                    if unfinished is not None:
                        await self._recover(work, unfinished, log)
                    await self._operate(work, log)
            failure = self._too_slow(script) if limit.cancelled_caught else None
        except anyio.get_cancelled_exc_class():
            if self._writer.error is not None:
                raise  # not ours any more: hands off
            with anyio.CancelScope(shield=True):
                await self._undo(work, None, waited_s, log)
            raise
        except Exception as exc:
            if isinstance(exc, LeaseLostError) or self._writer.error is not None:
                raise
            failure = exc
        result: StepReport
        with anyio.CancelScope(shield=True):
            if failure is None:
                result = await self._finish(work, waited_s, log)
            else:
                result = await self._undo(work, failure, waited_s, log)
        return result

    def _too_slow(self, script: Script) -> Exception:
        return MigrationTimeoutError(
            f"{script} took longer than {self._timeout_s:g} s.",
            "Raise the timeout per migration, or make the migration smaller.",
            line=script.line,
            version=script.version,
        )

    # ---- forward --------------------------------------------------------------------------------

    async def _operate(self, work: _Work, log: Any) -> None:
        script = work.script
        for name in script.touches:
            touched = Touched(
                self._store,
                name,
                guard=self._writer.check,
                announce=self._announcer(work),
                announces_all=script.runs_code,
                others=work.tables,
            )
            await touched.open()
            touched.before = work.savepoints.get(name, touched.before)
            work.tables[name] = touched
        if not work.resumed:
            _check(script, work.tables)
            if work.journaled:
                await self._start(work)
        operations = script.operations[work.begin_at :]
        for position, operation in enumerate(operations, work.begin_at + 1):
            self._progress(script, operation.describe(), position - 1, len(script.operations))
            if isinstance(operation, Run):
                await self._run_function(work, operation, log)
            else:
                await self._apply(operation, work.tables[operation.table or ""], script, position)
            if position < len(script.operations):
                done = {"operations": position}
                await self._record(work, Event(**_of(script, Kind.ADVANCED), detail=done))

    async def _start(self, work: _Work) -> None:
        script = work.script
        needing = {o.table for o in script.operations if o.needs_savepoint and o.table}
        names = script.touches if script.runs_code else sorted(needing)
        lease = self._writer.lease
        # Written before they exist: after a crash this is the only pointer to them.
        work.branches = {
            name: branch_name(lease.epoch, lease.owner, script)
            for name in names
            if work.tables[name].state is not None
        }
        started = Event(
            **_of(script, Kind.STARTED),
            description=script.description,
            checksum=script.checksum,
            algorithm=ALGORITHM,
            source=script.source,
            tables={t.name: {"before": t.before} for t in work.tables.values()},
            detail={"branches": work.branches, "announced": script.runs_code},
        )
        await self._record(work, started)
        for name, branch in work.branches.items():
            touched = work.tables[name]
            await self._writer.check()
            await touched.table.create_branch(branch, touched.before)
            try:
                await self._writer.check()
            except (LeaseLostError, anyio.get_cancelled_exc_class()):
                if self._writer.error is not None:
                    # Paused on the way: the next holder may have looked for it already.
                    with anyio.CancelScope(shield=True):
                        await drop_branch(self._store, name, branch)
                raise

    async def _apply(
        self, operation: Operation, touched: Touched, script: Script, position: int
    ) -> None:
        """Runs one operation until its effect is there: look, act, and on a conflict look again."""
        touched.witness = f"{WITNESS_PREFIX}{script.version}_{position}_{script.checksum[:8]}"
        touched.on_progress = lambda done, total: self._progress(
            script, operation.describe(), done, total
        )
        if touched.state is None and operation.when_missing is Missing.SKIP:
            return
        for attempt in range(_ATTEMPTS):
            if operation.done(touched.state, touched.witness):
                return
            expected = operation.evolve(touched.state)
            seen = len(touched.foreign)
            try:
                await operation.apply(touched)
            except _AGAIN as exc:
                if attempt == _ATTEMPTS - 1:
                    raise
                self._log.debug(ev.COMMIT_RETRIED, table=touched.name, error=exc.what)
                touched.retries += 1
                await anyio.sleep(min(0.005 * 2**attempt, 0.25))
                await touched.reopen()
                continue
            except StoreError:
                # Unknown: the store may have applied it before it failed. Look, never guess.
                await touched.reopen()
                if operation.done(touched.state, touched.witness):
                    return
                raise
            if len(touched.foreign) == seen:
                _compare(operation, expected, touched)
            return

    async def _run_function(self, work: _Work, operation: Run, log: Any) -> None:
        script = work.script
        base = len(script.operations) * 1000

        async def apply(inner: Operation, touched: Touched, number: int) -> None:
            await self._apply(inner, touched, script, base + number)

        context = Context(
            script,
            work.tables,
            params=self._params,
            connection=self._store.connection,
            log=log,
            apply=apply,
            progress=lambda done, total: self._progress(script, "running", done, total),
        )
        await operation.function(context)

    def _announcer(self, work: _Work) -> Any:
        async def announce(
            table: str, base: int, effect: Mapping[str, Any], foreign: Sequence[tuple[int, int]]
        ) -> None:
            detail = {"table": table, "base": base, "effect": dict(effect), "foreign": foreign}
            await self._record(work, Event(**_of(work.script, Kind.INTENDED), detail=detail))

        return announce

    async def _record(self, work: _Work, *events: Event) -> None:
        begun = self._clock.monotonic()
        await self._writer.record(*events)
        work.ledger_s += self._clock.monotonic() - begun

    async def _finish(self, work: _Work, waited_s: float, log: Any) -> StepReport:
        script = work.script
        ran_s = max(0.0, self._clock.monotonic() - work.started_s - work.ledger_s)
        cleanup = [t.name for t in work.tables.values() if t.state and t.state.witnesses()]
        report = self._report(work, Outcome.APPLIED, waited_s, ran_s)
        applied = Event(
            **_of(script, Kind.APPLIED),
            description=script.description,
            checksum=script.checksum,
            algorithm=ALGORITHM,
            source=script.source,
            tables=work.facts(),
            waited_s=waited_s,
            ran_s=ran_s,
            ledger_s=work.ledger_s,
            rows=report.rows,
            commits=report.commits,
            retries=report.retries,
            detail={"cleanup": cleanup, "branches": work.branches}
            if cleanup or work.branches
            else {},
        )
        await self._record(work, applied)
        await self.clean(cleanup, work.branches)
        self.lift(script.line, script.version)
        report = replace(report, ledger_s=work.ledger_s)
        log.info(
            ev.STEP_APPLIED,
            description=script.description,
            waited_s=round(report.waited_s, 4),
            ran_s=round(report.ran_s, 4),
            ledger_s=round(report.ledger_s, 4),
            rows=report.rows,
            commits=report.commits,
            retries=report.retries,
            tables={t: f"{b} -> {a}" for t, (b, a) in report.tables.items()},
        )
        return report

    async def clean(self, tables: list[str], branches: Mapping[str, str]) -> None:
        """Removes what a recorded migration needed only while it ran; harmless when repeated.

        The head follows only afterwards, so that a crash here is seen and made good.

        Args:
            tables: Tables with witness columns to drop.
            branches: Savepoint branch by table.

        Raises:
            LeaseLostError: Another process has taken over.
        """

        async def drop_witnesses(table: Table) -> None:
            if ours := (await table.state()).witnesses():
                await self._writer.check()
                await table.drop_columns(ours)

        for name in tables:
            await self._insist(name, drop_witnesses)
        for name, branch in branches.items():
            await self._writer.check()
            await drop_branch(self._store, name, branch)

    async def _fence(self, tables: Iterable[str]) -> None:
        """Makes schema changes fail that a dead or paused process has in flight (facts: 10d)."""

        async def rename_to_itself(table: Table) -> None:
            column = (await table.state()).schema.names[0]
            await self._writer.check()
            await table.alter_columns([{"path": column, "rename": column}])

        for name in tables:
            await self._insist(name, rename_to_itself)

    async def _insist(self, name: str, change: Callable[[Table], Awaitable[None]]) -> None:
        """Changes a table if it exists, on a fresh handle each time another commit came first."""
        for attempt in range(_ATTEMPTS):
            table = await self._store.find(name)
            if table is None:
                return
            try:
                await change(table)
            except _AGAIN:
                if attempt == _ATTEMPTS - 1:
                    raise
                await anyio.sleep(min(0.005 * 2**attempt, 0.25))
            else:
                return

    def lift(self, line: str, version: int) -> None:
        """Lets the head follow to a version the journal holds."""
        lease = self._writer.lease
        self._writer.lift(
            HeadRow(
                name=line,
                version=version,
                migrated_at=self._clock.wall(),
                epoch=lease.epoch,
                owner=lease.owner,
                digest=self._digest_at(line, version),
                lease=lease.key,
            )
        )

    def _report(
        self, work: _Work, outcome: Outcome, waited_s: float, ran_s: float, **more: Any
    ) -> StepReport:
        tables = work.tables.values()
        return StepReport(
            line=work.script.line,
            version=work.script.version,
            description=work.script.description,
            outcome=outcome,
            waited_s=waited_s,
            ran_s=ran_s,
            ledger_s=work.ledger_s,
            rows=sum(t.rows for t in tables),
            commits=sum(t.commits for t in tables),
            retries=sum(t.retries for t in tables),
            tables=work.versions(),
            resumed=work.resumed,
            **more,
        )

    # ---- back -----------------------------------------------------------------------------------

    async def _undo(
        self, work: _Work, exc: Exception | None, waited_s: float, log: Any
    ) -> StepReport:
        """Returns every table to where it was, if all commits since are ours, and records it."""
        script = work.script
        if self._store.unresolved:
            # A mutation may still commit under us: whoever takes the lease next recovers.
            log.warning(ev.COMMIT_UNRESOLVED)
            return self._report(work, Outcome.CANCELLED, waited_s, 0.0)
        error: AiomigrateError | None = exc if isinstance(exc, AiomigrateError) else None
        restored = False
        changed = [t for t in work.tables.values() if t.commits and t.version > max(t.before, 1)]
        # A resumed migration stays where it is: what the dead process committed before is not
        # known commit by commit, and the next run goes on from there again.
        if not isinstance(exc, UnresolvedError) and not work.resumed:
            try:
                restored = await self._restore(work, changed)
            except UnresolvedError as unresolvable:
                error = unresolvable
        why = "cancelled" if exc is None else _tell(exc, self._store)
        trace = "" if exc is None else _trace(exc, self._store)
        unresolved_now = isinstance(error, UnresolvedError)
        if unresolved_now:
            log.error(ev.STEP_UNRESOLVED, error=str(error))
        events = []
        if not unresolved_now and not work.resumed and (restored or work.journaled):
            events.append(Event(**_of(script, Kind.RESTORED)))
        detail: dict[str, Any] = {"cancelled": True} if exc is None else {}
        if unresolved_now and error is not None:
            detail["unresolved"] = str(error)
        ran_s = self._clock.monotonic() - work.started_s
        events.append(
            Event(
                **_of(script, Kind.FAILED),
                description=script.description,
                checksum=script.checksum,
                algorithm=ALGORITHM,
                source=script.source,
                tables={t: {"before": b, "after": a} for t, (b, a) in work.versions().items()},
                waited_s=waited_s,
                ran_s=ran_s,
                error=trace or why,
                detail=detail,
            )
        )
        await self._record(work, *events)
        if not unresolved_now and not work.resumed:
            await self.clean([], work.branches)
        log.error(
            ev.STEP_FAILED, error=why, restored=restored, unresolved=unresolved_now,
            ran_s=round(ran_s, 4),
        )  # fmt: skip
        if unresolved_now and error is not None and exc is not error:
            why = f"{why} {error.what}"
        return self._report(
            work,
            Outcome.CANCELLED if exc is None else Outcome.FAILED,
            waited_s,
            ran_s,
            error=why,
            remedy=error.remedy if error else "Correct the migration and run again.",
        )

    async def _restore(self, work: _Work, changed: list[Touched]) -> bool:
        if not changed:
            return False
        for touched in changed:
            if touched.foreign:
                raise unresolved(work.script, touched.name, touched.before, touched.foreign)
        # Announced first: a crash after the restore must not take its commit for someone else's.
        intents = [
            _restore_intent(work.script, t.name, max(t.before, 1), t.version) for t in changed
        ]
        if work.journaled:
            await self._record(work, *intents)
        for touched in changed:
            touched.version = await restore_fenced(
                self._store,
                touched.name,
                to=max(touched.before, 1),
                head=touched.version,
                guard=self._writer.check,
                script=work.script,
            )
        return True

    # ---- after a crash --------------------------------------------------------------------------

    async def _recover(self, work: _Work, unfinished: Unfinished, log: Any) -> None:
        """Decides what to do with a migration that was started and neither applied nor undone.

        Unchanged operations go on where the journal says (each looks for its own effect first).
        Anything else is returned to its savepoints, if every commit since is known to be ours.

        Raises:
            UnresolvedError: Others committed in between: a person must decide.
        """
        script = work.script
        log.info(ev.STEP_RECOVERING, savepoints=dict(unfinished.savepoints))
        unchanged = unfinished.started.checksum == script.checksum
        going_back = any(i.detail["effect"]["do"] == "restore" for i in unfinished.intents)
        if unchanged and not script.runs_code and not going_back:
            work.begin_at = unfinished.advanced
            work.resumed = True
            work.savepoints = unfinished.savepoints
            work.branches = dict(unfinished.started.detail.get("branches", {}))
            overwrites = [i for i in unfinished.intents if i.detail["effect"]["do"] == "overwrite"]
            for intent in overwrites:
                await uncover(
                    self._store,
                    intent.detail["table"],
                    base=int(intent.detail["base"]),
                    witness=intent.detail["effect"]["witness"],
                    guard=self._writer.check,
                    script=script,
                )
            await self._fence(unfinished.savepoints)
            return
        restores: list[tuple[str, int, int]] = []
        for table, savepoint in unfinished.savepoints.items():
            head = await self._owned_head(script, unfinished, table, savepoint)
            if head is not None:
                restores.append((table, max(savepoint, 1), head))
        if restores:
            await self._record(work, *[_restore_intent(script, *r) for r in restores])
        for table, to, head in restores:
            await restore_fenced(
                self._store, table, to=to, head=head, guard=self._writer.check, script=script
            )
        await self._record(work, Event(**_of(script, Kind.RESTORED)))
        log.info(ev.STEP_RESTORED, tables={t: to for t, to, _ in restores})
        # A restore fences what it returned. Only now: a commit of ours before the event would be
        # taken for someone else's if we died too.
        await self._fence(unfinished.savepoints.keys() - {table for table, _, _ in restores})
        await self.clean([], unfinished.started.detail.get("branches", {}))

    async def _owned_head(
        self, script: Script, unfinished: Unfinished, table: str, savepoint: int
    ) -> int | None:
        """Returns the table_version to restore from, `None` if there is nothing to undo.

        Raises:
            UnresolvedError: A commit since the savepoint is not known to be ours.
        """
        found = await self._store.find(table)
        head = 0 if found is None else await found.version()
        intents = [i for i in unfinished.intents if i.detail["table"] == table]
        if not intents:
            # Where commits are announced, none was made; else only an untouched head is safe.
            announced = unfinished.started.detail.get("announced") or unfinished.intents
            if announced or head <= max(savepoint, 1):
                return None
            raise unresolved(script, table, savepoint, [(savepoint + 1, head)])
        expected = savepoint
        for intent in intents:
            base = int(intent.detail["base"])
            restoring = intent.detail["effect"]["do"] == "restore"  # ours was checked before it
            if intent.detail.get("foreign"):
                spans = [(int(a), int(b)) for a, b in intent.detail["foreign"]]
                raise unresolved(script, table, savepoint, spans)
            if base > expected and not restoring:
                raise unresolved(script, table, savepoint, [(expected + 1, base)])
            expected = base + 1
        last = intents[-1]
        base = int(last.detail["base"])
        effect = last.detail["effect"]
        if head == base:
            return None if head == 0 else head
        if await is_ours(self._store, table, base, effect):
            if effect["do"] == "restore":
                return None  # it is back; what was committed on top of that stays
            if head == base + 1:
                return head
        raise unresolved(script, table, savepoint, [(base + 1, head)])


def _of(script: Script, kind: Kind) -> dict[str, Any]:
    """Returns the fields every event of a migration has; the writer fills in the rest."""
    return {"lease": "", "epoch": 0, "seq": 0, "at": _UNSET, "kind": kind,
            "line": script.line, "version": script.version}  # fmt: skip


def _restore_intent(script: Script, table: str, to: int, head: int) -> Event:
    return Event(
        **_of(script, Kind.INTENDED),
        detail={"table": table, "base": head, "effect": {"do": "restore", "to": to}},
    )


def _check(script: Script, tables: Mapping[str, Touched]) -> None:
    """Folds the operations over the live tables before the first commit."""
    states: dict[str, TableState | None] = {name: t.state for name, t in tables.items()}
    for operation in script.operations:
        if isinstance(operation, Run):
            return
        states = operation.fold(states)


def _compare(operation: Operation, expected: TableState | None, touched: Touched) -> None:
    """Compares a table with what the operation predicted.

    Raises:
        SchemaMismatchError: They differ.
    """
    if expected is None or touched.state is None or isinstance(operation, Run):
        return
    if found := differences(expected.shape(), touched.state.shape()):
        raise SchemaMismatchError(
            f"After {operation.describe()!r} table {touched.name!r} is not as predicted: "
            + "; ".join(found)
            + ".",
            "Another process may be changing its schema; run again, or report this as a defect.",
        )


def _tell(exc: BaseException, store: Store) -> str:
    text = exc.what if isinstance(exc, AiomigrateError) else f"{type(exc).__name__}: {exc}"
    return store.scrub(text)


def _trace(exc: BaseException, store: Store) -> str:
    if isinstance(exc, OperationError):
        return store.scrub(str(exc))
    return store.scrub("".join(traceback.format_exception(exc)))
