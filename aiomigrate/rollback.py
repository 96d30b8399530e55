"""One applied migration, undone: the head lowered first, then the data, then recorded.

How it is undone was decided by `undo`; which, and when, is for `runner`. A crash in between leaves
an undoing that the next run goes on with.
"""

from __future__ import annotations

from typing import Any

import anyio

from aiomigrate import events as ev
from aiomigrate.applier import witness_name
from aiomigrate.checksum import ALGORITHM
from aiomigrate.clock import Clock
from aiomigrate.errors import (
    AiomigrateError,
    LeaseLostError,
    RollbackRefusedError,
    TableVersionGoneError,
    UnresolvedError,
)
from aiomigrate.executor import Executor, failure_text, failure_trace, in_hand
from aiomigrate.fold import Unfinished
from aiomigrate.lance import Store
from aiomigrate.model import Kind, Script
from aiomigrate.operations.data import Run
from aiomigrate.recovery import Work, event_of
from aiomigrate.report import Outcome, StepReport
from aiomigrate.undo import Undo, Way
from aiomigrate.writer import Writer


class Reverser:
    """Undoes migrations under one lease."""

    def __init__(
        self, store: Store, writer: Writer, executor: Executor, *, clock: Clock, log: Any
    ) -> None:
        """Binds to the writer whose lease everything happens under."""
        self._store = store
        self._writer = writer
        self._executor = executor
        self._clock = clock
        self._log = log

    async def run(
        self,
        script: Script,
        undo: Undo,
        unfinished: Unfinished | None,
        ready_at: float,
        *,
        depended_s: float = 0.0,
    ) -> StepReport:
        """Undoes one migration, or goes on undoing it.

        Args:
            script: The migration.
            undo: How.
            unfinished: What an interrupted undoing left, for `Way.FINISH`.
            ready_at: Monotonic time since when its wait counts.
            depended_s: Seconds of that wait that were for what is undone before.

        Raises:
            LeaseLostError: Another process has the lease.
            AiomigrateError: The ledger cannot be written.
        """
        log = self._log.bind(table=script.line, version=script.version)
        work = Work(script, started_s=self._clock.monotonic(), depended_s=depended_s)
        work.waited_s = work.started_s - ready_at
        failure: Exception | None = None
        begun = {} if unfinished is None else unfinished.savepoints
        self._executor.forget((*script.touches, *undo.restores, *begun))
        try:
            with self._writer.working():
                if unfinished is None:
                    await self._begin(work, undo)
                else:
                    await self._resume(work, undo, unfinished)
                if undo.way is Way.INVERSE or (undo.way is Way.FINISH and not undo.restores):
                    await self._invert(work, undo, log)
                else:
                    await self._return(work, undo)
        except anyio.get_cancelled_exc_class():
            if self._writer.error is None:
                with anyio.CancelScope(shield=True):
                    await self._fail(work, undo, None, log)
            raise
        except Exception as exc:
            if isinstance(exc, LeaseLostError) or self._writer.error is not None:
                raise
            failure = exc
        finally:
            for touched in work.tables.values():
                touched.ended = True
        report: StepReport
        with anyio.CancelScope(shield=True):
            if failure is None:
                report = await self._finish(work, undo, log)
            else:
                report = await self._fail(work, undo, failure, log)
        return report

    async def _begin(self, work: Work, undo: Undo) -> None:
        script = work.script
        await self._executor.touch(work)
        for table, (head, to) in undo.restores.items():
            if work.tables[table].version != head:
                raise RollbackRefusedError(
                    f"Table {table!r} was committed to since {script} was looked at.",
                    "Run again.",
                )
            if to:
                try:
                    await work.tables[table].table.at(to)
                except TableVersionGoneError as exc:
                    raise RollbackRefusedError(
                        f"{script} cannot be undone: table_version {to} of {table!r} was cleaned "
                        "up.",
                        "Write a migration that changes things back, and upgrade.",
                    ) from exc
        # The head first: it must never be above what the data is.
        self._executor.lift(script.line, undo.to)
        await self._writer.sync()
        await self._executor.record(
            work,
            event_of(
                script,
                Kind.ROLLING_BACK,
                description=script.description,
                checksum=script.checksum,
                algorithm=ALGORITHM,
                source=script.source,
                tables={t.name: {"before": t.before} for t in work.tables.values()},
                detail={
                    "to": undo.to,
                    "way": undo.way.value,
                    "restores": {t: list(pair) for t, pair in undo.restores.items()},
                },
            ),
        )

    async def _resume(self, work: Work, undo: Undo, unfinished: Unfinished) -> None:
        if unfinished.started.checksum != work.script.checksum:
            raise UnresolvedError(
                f"{work.script} was being undone when its script was changed.",
                f"Restore the script and run again, or check the data and run `aiomigrate stamp "
                f"--table {work.script.line} --to VERSION`.",
                line=work.script.line,
                version=work.script.version,
            )
        work.resumed = True
        work.done = unfinished.done_of(len(undo.operations))
        await self._executor.recovery.fence_resumed(work, unfinished)
        work.savepoints = unfinished.savepoints
        await self._executor.touch(work)

    async def _invert(self, work: Work, undo: Undo, log: Any) -> None:
        for position, operation in enumerate(undo.operations):
            if position in work.done:
                continue
            work.doing = in_hand(operation.describe())
            if isinstance(operation, Run):
                await self._executor.run_function(work, operation, log)
                continue
            touched = work.tables[operation.table or ""]
            witness = witness_name(work.script, operation, undo.operations[:position])
            await self._executor.applier.apply(operation, touched, work.script, witness)
            done = {"operations": position + 1}
            work.held_back = [event_of(work.script, Kind.ADVANCED, detail=done)]

    async def _return(self, work: Work, undo: Undo) -> None:
        for table, (head, to) in undo.restores.items():
            touched = work.tables[table]
            await self._executor.recovery.return_table(work, table, to, head)
            known = touched.version
            await touched.reopen()
            touched.foreign = []  # what was given up is told by the plan
            touched.commits += touched.version != known

    async def _finish(self, work: Work, undo: Undo, log: Any) -> StepReport:
        script = work.script
        ran_s = max(0.0, self._clock.monotonic() - work.started_s - work.ledger_s)
        cleanup = [t.name for t in work.tables.values() if t.state and t.state.witnesses()]
        detail: dict[str, Any] = {"to": undo.to, "pruned": dict(undo.branches)}
        if undo.discards:
            detail["discards"] = {t: [list(s) for s in spans] for t, spans in undo.discards.items()}
        await self._executor.record(
            work,
            event_of(
                script,
                Kind.ROLLED_BACK,
                description=script.description,
                checksum=script.checksum,
                algorithm=ALGORITHM,
                source=script.source,
                tables=work.facts(),
                waited_s=work.waited_s,
                ran_s=ran_s,
                ledger_s=work.ledger_s,
                detail={**detail, "cleanup": cleanup, "branches": dict(undo.branches)},
            ),
        )
        await self._executor.clean(script.line, script.version, cleanup, undo.branches)
        self._executor.lift(script.line, undo.to)
        report = self._executor.report(work, Outcome.ROLLED_BACK, ran_s)
        log.info(
            ev.STEP_ROLLED_BACK,
            description=script.description,
            way=undo.way.value,
            to=undo.to,
            waited_s=round(work.waited_s, 4),
            ran_s=round(ran_s, 4),
            commits=report.commits,
            tables={t: f"{b} -> {a}" for t, (b, a) in report.tables.items()},
        )
        return report

    async def _fail(self, work: Work, undo: Undo, exc: Exception | None, log: Any) -> StepReport:
        """Puts the migration back as it was applied, where nothing of others is in the way."""
        script = work.script
        outcome = Outcome.CANCELLED if exc is None else Outcome.FAILED
        why = "cancelled" if exc is None else failure_text(exc, self._store, work.doing)
        remedy = exc.remedy if isinstance(exc, AiomigrateError) else "Correct it and run again."
        if isinstance(exc, RollbackRefusedError) and not work.ledger_s:
            return self._executor.report(work, outcome, 0.0, error=why, remedy=remedy)
        is_back = False
        going_on = work.resumed or self._store.abandoned & work.tables.keys()
        if not going_on and undo.way is Way.INVERSE:
            try:
                await self._executor.recovery.undo(work)
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
                tables={t: {"before": b, "after": a} for t, (b, a) in work.versions().items()},
                error=why if exc is None else failure_trace(exc, self._store),
                detail={"cancelled": True} if exc is None else {},
            )
        ]
        if is_back:
            events.append(event_of(script, Kind.KEPT))
        await self._executor.record(work, *events)
        if is_back:
            self._executor.lift(script.line, script.version)
        else:
            remedy = f"{remedy} The next run goes on undoing it."
        ran_s = self._clock.monotonic() - work.started_s
        log.error(ev.STEP_FAILED, error=why, restored=is_back, ran_s=round(ran_s, 4))
        return self._executor.report(work, outcome, ran_s, error=why, remedy=remedy)
