"""Runs one migration: applies its operations and records it, or has it undone.

The order of writes is the protocol: `started` and the announcement of each commit are durable
before the commit, `applied` is durable before witness columns and savepoint branches are removed,
and the head is written last. Single operations are applied by `execution.applier`, and tables are
restored by `execution.recovery`; which migrations run, and when, is decided in `runs.scheduler`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel

from aiomigrate import events as ev
from aiomigrate.commits.savepoints import branch_name, drop_branch
from aiomigrate.commits.table_target import TableTarget
from aiomigrate.concurrency import Slot, Slots, run_each
from aiomigrate.errors import (
    AiomigrateError,
    LeaseLostError,
    MigrationTimeoutError,
    StoreError,
    TableVersionGoneError,
    UnresolvedError,
)
from aiomigrate.execution.applier import witness_name
from aiomigrate.execution.attempt import (
    Attempt,
    event_of,
    failure_text,
    failure_trace,
    remedy_of,
)
from aiomigrate.execution.lookahead import (
    chains,
    is_declarative,
    is_predictable,
    is_quick,
    predict_commits,
)
from aiomigrate.execution.workspace import Workspace
from aiomigrate.ledger.history import Unfinished
from aiomigrate.ledger.records import Event, Kind
from aiomigrate.migration.model import Script
from aiomigrate.planning.destructive import destroys
from aiomigrate.results import Outcome, StepReport
from aiomigrate.schema.state import TableState
from aiomigrate.store.table import Table
from aiomigrate.telemetry import OPERATION


class Executor:
    """Runs migrations under one lease."""

    def __init__(
        self, workspace: Workspace, *, timeout_s: float | None, concurrency: int, keeps: bool
    ) -> None:
        """Binds to the lease of a workspace without I/O.

        Args:
            workspace: The collaborators.
            timeout_s: Seconds that one migration may take, `None` for no limit.
            concurrency: How many migrations may run at once.
            keeps: Whether the savepoints of destructive migrations are kept after their end.
        """
        self._store = workspace.store
        self._writer = workspace.writer
        self._recorder = workspace.recorder
        self._tables = workspace.tables
        self._applier = workspace.applier
        self._functions = workspace.functions
        self._recovery = workspace.recovery
        self._cleanup = workspace.cleanup
        self._clock = workspace.clock
        self._log = workspace.log
        self._progress = workspace.progress
        self._telemetry = workspace.telemetry
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._keeps = keeps
        self._slots = Slots(concurrency)

    async def run(
        self,
        script: Script,
        unfinished: Unfinished | None,
        ready_at: float,
        *,
        depended_s: float = 0.0,
        is_retry: bool = False,
    ) -> StepReport:
        """Runs one migration to its end: applied, or failed and undone.

        Waits for a concurrency slot first. On cancellation, the commits are undone under a shield
        before the cancellation continues. A crash leaves an unfinished attempt in the journal,
        which the next run passes as `unfinished`.

        Args:
            script: The migration.
            unfinished: An earlier attempt that did not end, if there is one; it is recovered.
            ready_at: Monotonic time from which waiting is counted.
            depended_s: Seconds of that wait that were spent waiting for dependencies.
            is_retry: Whether an earlier attempt failed; its remaining savepoint branches are
                deleted.

        Returns:
            The report of an applied or a failed migration; failures do not raise.

        Raises:
            LeaseLostError: Another process has the lease; nothing was undone.
            AiomigrateError: The ledger cannot be written.
        """
        log = self._log.bind(table=script.line, version=script.version)
        limit = anyio.CancelScope()
        slot = Slot(self._slots, limit, self._clock)
        # Quick migrations release their slot while they wait for the journal, so that many of them
        # are announced in one journal commit.
        quick = is_quick(script)
        attempt = Attempt(
            script, is_quick=quick, slot=slot if quick else None, depended_s=depended_s
        )
        try:
            async with slot:  # not held while waiting for the journal at the end
                attempt.begin(self._clock.monotonic(), ready_at)
                log.debug(ev.STEP_STARTED, description=script.description)
                if self._timeout_s is not None:
                    limit.deadline = anyio.current_time() + self._timeout_s
                with limit:
                    with self._writer.working():
                        await self._begin(attempt, unfinished, is_retry=is_retry)
                    await run_each(
                        chains(script.operations, attempt.done),
                        partial(self._run_chain, attempt, log),
                        at_once=self._concurrency,
                    )
                    # A function that swallowed its cancellation has not completed.
                    await anyio.lowlevel.checkpoint_if_cancelled()
            failure = self._timeout_error(script) if limit.cancelled_caught else None
        except anyio.get_cancelled_exc_class():
            if self._writer.error is not None:
                raise  # the lease is lost: write nothing more
            with anyio.CancelScope(shield=True):
                await self._undo(attempt, None, log)
            raise
        except Exception as exc:
            if isinstance(exc, LeaseLostError) or self._writer.error is not None:
                raise
            failure = exc
        finally:
            attempt.add_wait(slot.waited_s)
            attempt.end()
        result: StepReport
        with anyio.CancelScope(shield=True):
            if failure is None:
                result = await self._finish(attempt, log)
            else:
                result = await self._undo(attempt, failure, log)
        return result

    def _timeout_error(self, script: Script) -> Exception:
        return MigrationTimeoutError(
            f"{script} took longer than {self._timeout_s:g} s.",
            "Raise the timeout per migration, or make the migration smaller.",
            line=script.line,
            version=script.version,
        )

    async def _begin(
        self, attempt: Attempt, unfinished: Unfinished | None, *, is_retry: bool
    ) -> None:
        """Recovers what an earlier attempt left, opens the tables, and records the start."""
        script = attempt.script
        if unfinished is not None:
            self._tables.invalidate((*script.touches, *unfinished.savepoints))
            await self._recovery.recover(attempt, unfinished)
        elif is_retry:
            for name in script.touches:
                await self._recovery.drop_leftovers(script, name)
        await self._tables.open_for(attempt)
        if not attempt.resumed:
            _check_operations(attempt.script, attempt.tables)
            await self._start(attempt)

    async def _run_chain(self, attempt: Attempt, log: Any, chain: Sequence[int]) -> None:
        """Runs operations of a migration, given by position, one after another."""
        script = attempt.script
        with self._writer.working(), attempt.operating():
            for number, position in enumerate(chain):
                operation = script.operations[position]
                text = operation.describe()
                attempt.begin_operation(text)
                await self._predict(attempt, chain[number:])
                self._progress(script, text, len(attempt.done), len(script.operations))
                try:
                    await self._apply(attempt, position, log)
                except Exception:
                    attempt.begin_operation(text)  # another chain may have changed it
                    raise
                attempt.complete(position, len(script.operations))

    async def _predict(self, attempt: Attempt, left: Sequence[int]) -> None:
        """Predicts the next commits to a table, if there may be more than one."""
        script = attempt.script
        first = script.operations[left[0]]
        target = attempt.tables.get(first.table or "")
        if target is None or target.is_announced or (len(left) == 1 and first.shows):
            return
        of_table = itertools.takewhile(
            lambda position: is_predictable(script.operations[position], first.table), left
        )
        named = (
            (script.operations[position], _witness_of(script, position)) for position in of_table
        )
        target.expect(await predict_commits(named, target.state))

    async def _apply(self, attempt: Attempt, position: int, log: Any) -> None:
        script = attempt.script
        operation = script.operations[position]
        facts = {"db.operation.name": attempt.doing, "db.collection.name": operation.table or ""}
        with self._telemetry.span(OPERATION, facts):
            if operation.runs_code:
                await self._functions.run(attempt, operation, log)
            else:
                target = attempt.tables[operation.table or ""]
                witness = _witness_of(script, position)
                await self._applier.apply(operation, target, script, witness)

    async def _start(self, attempt: Attempt) -> None:
        script = attempt.script
        declared = [o for o in script.operations if not o.runs_code]
        needing = {o.table for o in declared if o.needs_savepoint and o.table}
        names = script.touches if script.runs_code else sorted(needing)
        lease = self._writer.lease
        # Recorded before they exist: after a crash this is the only reference to them.
        attempt.plan_branches(
            {
                name: branch_name(lease.epoch, lease.owner, script)
                for name in names
                if attempt.tables[name].state is not None
            }
        )
        started = attempt.event(
            Kind.STARTED,
            tables=attempt.begun(),
            detail={"branches": attempt.branches},
        )
        # Each is created before the first commit to its table; unchanged tables need none.
        for name in attempt.branches:
            attempt.tables[name].protect_with(partial(self._protect, attempt, name))
        if all(map(is_declarative, script.operations)):
            attempt.hold_back(started)  # written with the first announcement
        else:
            await self._recorder.record(attempt, started)

    async def _protect(self, attempt: Attempt, name: str) -> None:
        """Creates the savepoint branch of one table, unless its version was cleaned up."""
        branch, target = attempt.branches[name], attempt.tables[name]
        attempt.protect(name, branch)
        await self._writer.check()
        try:
            await target.table.create_branch(branch, target.before)
        except TableVersionGoneError:
            # Other writers committed and cleaned up: it could not be restored in any case.
            attempt.unprotect(name)
            return
        try:
            await self._writer.check()
        except (LeaseLostError, anyio.get_cancelled_exc_class()):
            if self._writer.error is not None:
                # Paused meanwhile: the next holder may have looked for it already.
                with anyio.CancelScope(shield=True):
                    await drop_branch(self._store, name, branch)
            raise

    async def _finish(self, attempt: Attempt, log: Any) -> StepReport:
        """Records the migration as applied; removes what it needed only while it ran."""
        script = attempt.script
        ran_s = max(0.0, self._clock.monotonic() - attempt.started_s - attempt.ledger_s)
        await self._cleanup.clean_line(script.line)
        await self._measure(attempt)
        report = attempt.report(Outcome.APPLIED, ran_s)
        made = attempt.made_branches()
        was = {t.name: t.was for t in attempt.tables.values()}
        destroyed = destroys(script, was) if made and self._keeps else ()
        branches = {t: b for t, b in made.items() if t not in destroyed}
        kept = {t: b for t, b in made.items() if t in destroyed}
        cleanup = [t.name for t in attempt.tables.values() if t.state and t.state.witnesses()]
        applied = self._applied_event(attempt, report, cleanup, branches, kept)
        # If no witness is dropped and no function committed, `applied` need not be durable yet:
        # after a crash that loses it, the next run finds each operation done, or repeats it with
        # the same result. Later commits are announced later in the same journal, so none precedes.
        if cleanup or attempt.acted:
            await self._record_and_clean(attempt, applied, cleanup, branches)
        elif branches:
            is_durable = self._writer.record_later(applied)
            handles = _handles(attempt, branches)
            self._cleanup.postpone(script.line, script.version, branches, handles, is_durable)
        else:
            head_row = self._cleanup.head_row(script.line, script.version)
            self._writer.record_later(applied, head_row=head_row)
        if not (cleanup or script.runs_code):  # else the tables may have changed since
            self._tables.keep(attempt)
        if attempt.ledger_s != report.ledger_s:
            report = replace(report, ledger_s=attempt.ledger_s)
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

    async def _measure(self, attempt: Attempt) -> None:
        """Measures the bytes of data in the tables of a migration that took some time."""
        tables = attempt.tables.values()
        if attempt.is_quick or all(t.version == t.before for t in tables):
            return
        with self._writer.working(), contextlib.suppress(StoreError):
            attempt.measure(await _total_size([t for t in tables if t.state is not None]))

    def _applied_event(
        self,
        attempt: Attempt,
        report: StepReport,
        cleanup: Sequence[str],
        branches: Mapping[str, str],
        kept: Mapping[str, str],
    ) -> Event:
        detail = {
            "cleanup": cleanup,
            "branches": branches,
            "kept": kept,
            "told": attempt.facts(),
            "depended_s": attempt.depended_s,
        }
        return attempt.event(
            Kind.APPLIED,
            at=self._clock.wall(),  # it may be written with a later commit
            tables=attempt.changes(),
            waited_s=attempt.waited_s,
            ran_s=report.ran_s,
            ledger_s=attempt.ledger_s,
            rows=report.rows,
            commits=report.commits,
            retries=report.retries,
            size=attempt.size,
            detail={key: value for key, value in detail.items() if value},
        )

    async def _record_and_clean(
        self, attempt: Attempt, applied: Event, cleanup: list[str], branches: Mapping[str, str]
    ) -> None:
        script = attempt.script
        await self._recorder.record(attempt, applied)
        handles = _handles(attempt, branches)
        await self._cleanup.clean(script.line, script.version, cleanup, branches, handles)
        self._cleanup.set_head_later(script.line, script.version)

    async def _undo(self, attempt: Attempt, exc: Exception | None, log: Any) -> StepReport:
        """Undoes the attempt if no other writer has committed since, and records the failure.

        Args:
            attempt: The attempt.
            exc: What was raised, `None` for a cancellation.
            log: A logger bound to the migration.
        """
        touched = {*attempt.script.touches, *attempt.tables}  # none is open during a recovery
        under_way = sorted(self._store.abandoned & touched)
        restored, error = await self._restore(attempt, exc, under_way, log)
        unresolved = error if isinstance(error, UnresolvedError) else None
        is_back = unresolved is None and not (attempt.keeps_work or under_way)
        why = "cancelled" if exc is None else failure_text(exc, self._store, attempt.doing)
        ran_s = self._clock.monotonic() - attempt.started_s
        detail: dict[str, Any] = {"cancelled": True} if exc is None else {}
        if unresolved is not None:
            detail["unresolved"] = str(unresolved)
        failed = attempt.event(
            Kind.FAILED,
            tables=attempt.left(),
            waited_s=attempt.waited_s,
            ran_s=ran_s,
            error=why if exc is None else failure_trace(exc, self._store),
            detail=detail,
        )
        restored_event = [event_of(attempt.script, Kind.RESTORED)] if is_back else []
        await self._recorder.record(attempt, *restored_event, failed)
        await self._cleanup.clean_line(attempt.script.line)
        if is_back:
            await self._applier.clean([], attempt.made_branches())
        log.error(
            ev.STEP_FAILED, error=why, restored=restored, unresolved=unresolved is not None,
            ran_s=round(ran_s, 4),
        )  # fmt: skip
        remedy = remedy_of(attempt, exc, error)
        if unresolved is not None and exc is not unresolved:
            why = f"{why} {unresolved.what}"
        if is_back and attempt.script.runs_code:
            why += await self._changes_left(attempt)
        if under_way:
            why = f"{why} A commit to {', '.join(under_way)} is still under way."
            remedy = "Run again: the next run finds out whether it was made."
        outcome = Outcome.CANCELLED if exc is None else Outcome.FAILED
        return attempt.report(outcome, ran_s, error=why, remedy=remedy)

    async def _restore(
        self, attempt: Attempt, exc: Exception | None, under_way: Sequence[str], log: Any
    ) -> tuple[bool, AiomigrateError | None]:
        """Returns every table to its savepoint, unless the next run must decide that.

        Returns:
            Whether anything had to be done, and the error that says what to do next, if one does.
        """
        error = exc if isinstance(exc, AiomigrateError) else None
        restored = False
        if under_way:
            # A mutation may still commit at any time: the next holder of the lease recovers.
            log.warning(ev.COMMIT_UNRESOLVED, tables=under_way)
        # A resumed migration is not undone: the next run continues from there again.
        elif not isinstance(exc, UnresolvedError) and not attempt.keeps_work:
            try:
                restored = await self._recovery.undo(attempt)
            except UnresolvedError as unresolvable:
                error = unresolvable
        if isinstance(error, UnresolvedError):
            log.error(ev.STEP_UNRESOLVED, error=str(error))
        return restored, error

    async def _changes_left(self, attempt: Attempt) -> str:
        changed = await self._changed_elsewhere(attempt)
        if not changed:
            return ""
        return (
            f" (Table {', '.join(changed)} was changed by other writers or through "
            "ctx.connection during the migration; those changes were left as they are.)"
        )

    async def _changed_elsewhere(self, attempt: Attempt) -> list[str]:
        """Returns the tables that have commits not made by the migration, and none made by it."""
        found = []
        for target in attempt.tables.values():
            table = await self._store.find(target.name)
            live = 0 if table is None else await table.version()
            if not target.commits and live != target.version:
                found.append(target.name)
        return found


def _handles(attempt: Attempt, tables: Iterable[str]) -> dict[str, Table]:
    """Returns the open handles of some tables."""
    opened = {name: attempt.tables[name].opened for name in tables}
    return {name: handle.table for name, handle in opened.items() if handle is not None}


def _witness_of(script: Script, position: int) -> str:
    return witness_name(script, script.operations[position], script.operations[:position])


async def _total_size(tables: Iterable[TableTarget]) -> int:
    """Returns the bytes of data in some tables."""
    sizes: list[int] = []

    async def one(target: TableTarget) -> None:
        sizes.append(await target.table.size())

    await run_each(tables, one)
    return sum(sizes)


def _check_operations(script: Script, tables: Mapping[str, TableTarget]) -> None:
    """Checks that the operations fit the live tables, before the first commit.

    Operations after a function are not checked, since it may change anything.

    Raises:
        OperationError: One of them does not fit.
    """
    states: dict[str, TableState | None] = {name: t.state for name, t in tables.items()}
    for operation in script.operations:
        if operation.runs_code:
            return
        states = operation.fold(states)
