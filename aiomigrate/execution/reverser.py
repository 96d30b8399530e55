"""Rolls back one applied migration: lowers the head, changes the data, then records it.

How a migration is rolled back is decided in `planning.rollback`; which, and when, in
`runs.scheduler`. A crash leaves an unfinished rollback, which the next run continues.
"""

from __future__ import annotations

from typing import Any

import anyio

from aiomigrate import events as ev
from aiomigrate.errors import (
    AiomigrateError,
    LeaseLostError,
    RollbackRefusedError,
    TableVersionGoneError,
    UnresolvedError,
)
from aiomigrate.execution.applier import witness_name
from aiomigrate.execution.attempt import Attempt, event_of, failure_text, failure_trace
from aiomigrate.execution.workspace import Workspace
from aiomigrate.ledger.history import Unfinished
from aiomigrate.ledger.records import Kind
from aiomigrate.migration.checksum import ALGORITHM
from aiomigrate.migration.model import Script
from aiomigrate.planning.rollback import Undo, Way
from aiomigrate.results import Outcome, StepReport


class Reverser:
    """Rolls back migrations under one lease."""

    def __init__(self, workspace: Workspace) -> None:
        """Binds to the lease of a workspace without I/O.

        Args:
            workspace: The collaborators.
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

    async def run(
        self,
        script: Script,
        undo: Undo,
        unfinished: Unfinished | None,
        ready_at: float,
        *,
        depended_s: float = 0.0,
    ) -> StepReport:
        """Rolls back one migration, or continues its unfinished rollback.

        A failed or cancelled rollback by inverse operations is undone under a shield, so that the
        migration stays applied; otherwise the next run continues it.

        Args:
            script: The migration.
            undo: How to roll it back.
            unfinished: The unfinished rollback, for `Way.FINISH`.
            ready_at: Monotonic time from which waiting is counted.
            depended_s: Seconds of that wait that were spent on migrations rolled back before.

        Returns:
            The report of a completed or a failed rollback; failures do not raise.

        Raises:
            LeaseLostError: Another process has the lease.
            AiomigrateError: The ledger cannot be written.
        """
        log = self._log.bind(table=script.line, version=script.version)
        attempt = Attempt(script, depended_s=depended_s)
        attempt.begin(self._clock.monotonic(), ready_at)
        failure: Exception | None = None
        begun = {} if unfinished is None else unfinished.savepoints
        self._tables.invalidate((*script.touches, *undo.restores, *begun))
        try:
            with self._writer.working():
                if unfinished is None:
                    await self._begin(attempt, undo)
                else:
                    await self._resume(attempt, undo, unfinished)
                if undo.way is Way.INVERSE or (undo.way is Way.FINISH and not undo.restores):
                    await self._invert(attempt, undo, log)
                else:
                    await self._restore(attempt, undo)
        except anyio.get_cancelled_exc_class():
            if self._writer.error is None:
                with anyio.CancelScope(shield=True):
                    await self._fail(attempt, undo, None, log)
            raise
        except Exception as exc:
            if isinstance(exc, LeaseLostError) or self._writer.error is not None:
                raise
            failure = exc
        finally:
            attempt.end()
        report: StepReport
        with anyio.CancelScope(shield=True):
            if failure is None:
                report = await self._finish(attempt, undo, log)
            else:
                report = await self._fail(attempt, undo, failure, log)
        return report

    async def _begin(self, attempt: Attempt, undo: Undo) -> None:
        script = attempt.script
        await self._tables.open_for(attempt)
        for table, (head, to) in undo.restores.items():
            if attempt.tables[table].version != head:
                raise RollbackRefusedError(
                    f"Table {table!r} has new commits since the rollback of {script} was planned.",
                    "Run again to plan it anew.",
                )
            if to:
                try:
                    await attempt.tables[table].table.at(to)
                except TableVersionGoneError as exc:
                    raise RollbackRefusedError(
                        f"{script} cannot be rolled back: table_version {to} of {table!r} was "
                        "cleaned up.",
                        "Write a migration that reverses the change, and upgrade.",
                    ) from exc
        # The head first: it must never be above the version of the data.
        self._cleanup.set_head_later(script.line, undo.to)
        await self._writer.sync()
        await self._recorder.record(
            attempt,
            attempt.event(
                Kind.ROLLING_BACK,
                tables=attempt.begun(),
                detail={
                    "to": undo.to,
                    "way": undo.way.value,
                    "restores": {t: list(pair) for t, pair in undo.restores.items()},
                },
            ),
        )

    async def _resume(self, attempt: Attempt, undo: Undo, unfinished: Unfinished) -> None:
        if unfinished.started.checksum != attempt.script.checksum:
            raise UnresolvedError(
                f"{attempt.script} was changed during its rollback, which is unfinished.",
                f"Restore the script and run again, or check the data and run `aiomigrate stamp "
                f"--table {attempt.script.line} --to VERSION`.",
                line=attempt.script.line,
                version=attempt.script.version,
            )
        await self._recovery.refuse_other_tables(attempt.script, unfinished)
        attempt.resume(unfinished, unfinished.done_of(len(undo.operations)))
        await self._recovery.fence_resumed(attempt, unfinished)
        await self._tables.open_for(attempt)

    async def _invert(self, attempt: Attempt, undo: Undo, log: Any) -> None:
        for position, operation in enumerate(undo.operations):
            if position in attempt.done:
                continue
            attempt.begin_operation(operation.describe())
            if operation.runs_code:
                await self._functions.run(attempt, operation, log)
            else:
                target = attempt.tables[operation.table or ""]
                witness = witness_name(attempt.script, operation, undo.operations[:position])
                await self._applier.apply(operation, target, attempt.script, witness)
            attempt.complete(position, len(undo.operations))

    async def _restore(self, attempt: Attempt, undo: Undo) -> None:
        for table, (head, to) in undo.restores.items():
            target = attempt.tables[table]
            await self._recovery.restore_table(attempt, table, to, head)
            await target.reopen_restored()

    async def _finish(self, attempt: Attempt, undo: Undo, log: Any) -> StepReport:
        script = attempt.script
        ran_s = max(0.0, self._clock.monotonic() - attempt.started_s - attempt.ledger_s)
        cleanup = [t.name for t in attempt.tables.values() if t.state and t.state.witnesses()]
        detail: dict[str, Any] = {"to": undo.to, "pruned": dict(undo.branches)}
        if undo.discards:
            detail["discards"] = {t: [list(s) for s in spans] for t, spans in undo.discards.items()}
        await self._recorder.record(
            attempt,
            attempt.event(
                Kind.ROLLED_BACK,
                tables=attempt.changes(),
                waited_s=attempt.waited_s,
                ran_s=ran_s,
                ledger_s=attempt.ledger_s,
                detail={**detail, "cleanup": cleanup, "branches": dict(undo.branches)},
            ),
        )
        await self._cleanup.clean(script.line, script.version, cleanup, undo.branches)
        self._cleanup.set_head_later(script.line, undo.to)
        report = attempt.report(Outcome.ROLLED_BACK, ran_s)
        log.info(
            ev.STEP_ROLLED_BACK,
            description=script.description,
            way=undo.way.value,
            to=undo.to,
            waited_s=round(attempt.waited_s, 4),
            ran_s=round(ran_s, 4),
            commits=report.commits,
            tables={t: f"{b} -> {a}" for t, (b, a) in report.tables.items()},
        )
        return report

    async def _fail(
        self, attempt: Attempt, undo: Undo, exc: Exception | None, log: Any
    ) -> StepReport:
        """Records a failed rollback; undoes it first if it ran inverse operations."""
        script = attempt.script
        outcome = Outcome.CANCELLED if exc is None else Outcome.FAILED
        why = "cancelled" if exc is None else failure_text(exc, self._store, attempt.doing)
        remedy = exc.remedy if isinstance(exc, AiomigrateError) else "Correct it and run again."
        if isinstance(exc, RollbackRefusedError) and not attempt.ledger_s:
            return attempt.report(outcome, 0.0, error=why, remedy=remedy)
        is_back = False
        going_on = attempt.resumed or self._store.abandoned & attempt.tables.keys()
        if not going_on and undo.way is Way.INVERSE:
            try:
                await self._recovery.undo(attempt)
                is_back = True
            except UnresolvedError as unresolvable:
                why, remedy = f"{why} {unresolvable.what}", unresolvable.remedy
        events = [
            event_of(
                script,
                Kind.FAILED,
                description=script.description,
                checksum=script.checksum,
                algorithm=ALGORITHM,
                tables=attempt.left(),
                error=why if exc is None else failure_trace(exc, self._store),
                detail={"cancelled": True} if exc is None else {},
            )
        ]
        if is_back:
            events.append(event_of(script, Kind.KEPT))
        await self._recorder.record(attempt, *events)
        if is_back:
            self._cleanup.set_head_later(script.line, script.version)
        else:
            remedy = f"{remedy} The next run continues the rollback."
        ran_s = self._clock.monotonic() - attempt.started_s
        log.error(ev.STEP_FAILED, error=why, restored=is_back, ran_s=round(ran_s, 4))
        return attempt.report(outcome, ran_s, error=why, remedy=remedy)
