"""Runs the migrations of one plan: lines concurrently, each line strictly in order.

What one migration does is for `execution`; which migrations run was decided by `planning`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import anyio
import anyio.lowlevel

from aiomigrate import events as ev
from aiomigrate.execution.executor import Executor
from aiomigrate.execution.reverser import Reverser
from aiomigrate.execution.workspace import Workspace
from aiomigrate.migration.model import Key, Script
from aiomigrate.planning.plan import Direction, Step
from aiomigrate.planning.reconcile import LineState
from aiomigrate.planning.rollback import Undo, finish
from aiomigrate.results import Outcome, StepReport
from aiomigrate.runs.session import Session
from aiomigrate.runs.settlement import RowsToOwn
from aiomigrate.runs.snapshot import Snapshot
from aiomigrate.telemetry import MIGRATION, TABLE


class UndoDecider(Protocol):
    """Decides how one migration is undone, from what is there when its turn comes."""

    async def decide_again(self, script: Script, state: LineState) -> Undo:
        """Returns how.

        Raises:
            AiomigrateError: It cannot be undone.
        """


class Scheduler:
    """One plan under way.

    Attributes:
        results: What came of each migration that has ended.
    """

    def __init__(
        self,
        session: Session,
        snapshot: Snapshot,
        workspace: Workspace,
        *,
        undos: UndoDecider | None = None,
    ) -> None:
        """Runs nothing yet.

        Args:
            session: Holds the lease.
            snapshot: What was read under it, with the plan.
            workspace: What migrations are executed with.
            undos: Decides how migrations are undone, where the plan goes back.
        """
        self.results: dict[Key, StepReport] = {}
        self._run = session.run
        self._board = session.board
        self._begun_at = session.begun_at
        self._snapshot = snapshot
        self._cleanup = workspace.cleanup
        self._executor: Executor = session.executor(workspace)
        self._reverser: Reverser = session.reverser(workspace)
        self._undos = undos
        self._ended: dict[Key, anyio.Event] = {}
        self._lines: dict[str, list[Step]] = {}
        self._is_owned = anyio.Event()

    def is_done(self, key: Key) -> bool:
        """Returns whether a migration was applied, or undone."""
        result = self.results.get(key)
        return result is not None and result.outcome.is_done

    async def run_plan(self, rows: RowsToOwn | None = None) -> None:
        """Runs the migrations, and owns head rows beside the first of them.

        No line goes on to its second before they are owned: after a crash then, a row that is not
        ours would be believed less than tables as the journal last saw them.

        Raises:
            LeaseLostError: Another process has the lease.
            AiomigrateError: The ledger cannot be written.
        """
        begun = self._run.clock.monotonic()
        for number, step in enumerate(self._snapshot.plan.steps):
            self._ended[step.key] = anyio.Event()
            self._lines.setdefault(step.script.line, []).append(step)
            self._board.waiting(step.script)
            if number % _STARTED_AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()
        async with anyio.create_task_group() as group:
            group.start_soon(self._own_rows, rows)
            for number, line in enumerate(self._lines):
                group.start_soon(self._run_line, line, begun)
                if number % _STARTED_AT_ONCE == 0:
                    await anyio.lowlevel.checkpoint()

    async def _own_rows(self, rows: RowsToOwn | None) -> None:
        if rows is None:
            await anyio.lowlevel.checkpoint()
        else:
            await rows.own()
        self._is_owned.set()

    async def _run_line(self, line: str, begun: float) -> None:
        with self._run.options.telemetry.span(TABLE, {"db.collection.name": line}):
            try:
                await self._run_steps(self._lines[line], begun)
            finally:
                await self._cleanup.clean_line(line)

    async def _run_steps(self, steps: Sequence[Step], free_at: float) -> None:
        """Runs a line's migrations in order, each once those are done that it follows."""
        clock = self._run.clock
        for step in steps:
            for key in step.after:
                if not self._ended[key].is_set():
                    await self._cleanup.clean_line(step.script.line)  # it may take long
                    await self._ended[key].wait()
            result = await self._run_unless_blocked(step, free_at, clock.monotonic() - free_at)
            began_s = free_at - self._begun_at + result.waited_s
            result = replace(result, began_s=began_s)
            free_at = clock.monotonic()
            self.results[step.key] = result
            self._run.options.telemetry.ended(result)
            self._board.ended(step.script, result.outcome.value)
            self._ended[step.key].set()
            if not self._is_owned.is_set():
                await self._is_owned.wait()

    async def _run_unless_blocked(
        self, step: Step, free_at: float, depended_s: float
    ) -> StepReport:
        script = step.script
        if blocked := [k for k in step.after if not self.results[k].outcome.is_done]:
            return self._skipped(script, blocked[0], depended_s)
        facts: dict[str, str | int] = {
            "db.collection.name": script.line,
            "db.operation.name": self._snapshot.plan.direction.value,
            "aiomigrate.version": script.version,
            "aiomigrate.description": script.description,
        }
        with self._run.options.telemetry.span(MIGRATION, facts) as span:
            result = await self._run_step(step, free_at, depended_s)
            if not result.outcome.is_done:
                span.failed(result.error)
        return result

    async def _run_step(self, step: Step, free_at: float, depended_s: float) -> StepReport:
        """Runs one migration, or undoes it, once everything that it follows is done."""
        script, snapshot = step.script, self._snapshot
        state = snapshot.plan.lines[script.line]
        unfinished = state.unfinished if step.resumes else None
        going_on = finish(script, state, snapshot.journal) if unfinished else None
        if going_on is not None:
            self._board.running(script, "undoing", 0, None)
            result = await self._reverser.run(
                script, going_on, unfinished, free_at, depended_s=depended_s
            )
            if step.undo is None and result.outcome.is_done:  # undone at last: once more
                result = await self._executor.run(script, None, free_at, depended_s=depended_s)
            return result
        if self._undos is not None:
            self._board.running(script, "undoing", 0, None)
            undo = await self._undos.decide_again(script, state)
            return await self._reverser.run(script, undo, None, free_at, depended_s=depended_s)
        failed = snapshot.journal.of(script.line).failed
        is_retry = failed is not None and failed.version == script.version
        return await self._executor.run(
            script,
            unfinished,
            free_at,
            depended_s=depended_s,
            is_retry=is_retry,
        )

    def _skipped(self, script: Script, cause: Key, depended_s: float) -> StepReport:
        going_back = self._snapshot.plan.direction is Direction.ROLLBACK
        why = f"{cause[0]} {cause[1]} was not {'undone' if going_back else 'applied'}."
        self._run.log.warning(ev.STEP_SKIPPED, table=script.line, version=script.version, error=why)
        return StepReport(
            line=script.line,
            version=script.version,
            description=script.description,
            outcome=Outcome.SKIPPED,
            depended_s=depended_s,
            waited_s=depended_s,
            error=why,
        )


_STARTED_AT_ONCE = 64
"""How many lines and migrations begin before the event loop is let in between."""
