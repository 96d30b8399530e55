"""Runs the migrations of one plan: lines concurrently, each line strictly in order.

The jobs of `runs.upgrade` and `runs.downgrade` create a `Scheduler` when the ledger is settled.
Which migrations run is decided before, by `planning`; how one migration runs is for `execution`.
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
    """Decides how one migration is undone, immediately before it is undone."""

    async def decide_again(self, script: Script, state: LineState) -> Undo:
        """Returns how a migration is undone.

        Args:
            script: The migration.
            state: The state of its line when the plan was made.

        Raises:
            AiomigrateError: It cannot be undone.
        """


class Scheduler:
    """Runs one plan.

    Attributes:
        results: The report of each migration that has ended.
    """

    def __init__(
        self,
        session: Session,
        snapshot: Snapshot,
        workspace: Workspace,
        *,
        undo_decider: UndoDecider | None = None,
    ) -> None:
        """Runs nothing yet.

        Args:
            session: Holds the lease.
            snapshot: The snapshot taken under the lease, with the plan.
            workspace: Executes migrations.
            undo_decider: Decides how migrations are undone, if the plan is a rollback.
        """
        self.results: dict[Key, StepReport] = {}
        self._run = session.run
        self._board = session.board
        self._start = session.start
        self._snapshot = snapshot
        self._cleanup = workspace.cleanup
        self._executor: Executor = session.executor(workspace)
        self._reverser: Reverser = session.reverser(workspace)
        self._undo_decider = undo_decider
        self._ended: dict[Key, anyio.Event] = {}
        self._lines: dict[str, list[Step]] = {}
        self._rows_owned = anyio.Event()

    def is_done(self, key: Key) -> bool:
        """Returns whether a migration of the plan was applied, or undone."""
        result = self.results.get(key)
        return result is not None and result.outcome.is_done

    async def run_plan(self, rows: RowsToOwn | None = None) -> None:
        """Runs the migrations of the plan, and owns head rows beside the first of them.

        A migration that fails does not raise; it is in `results`, and those after it are skipped.

        No line begins its second migration before the rows are owned. Otherwise, after a crash in
        that migration, the next run would find a row that another system wrote and tables that no
        longer match the journal, and report a conflict.

        Args:
            rows: The rows to own; `None` if they are owned already.

        Raises:
            LeaseLostError: Another process has the lease.
            AiomigrateError: The ledger cannot be written.
        """
        start = self._run.clock.monotonic()
        for number, step in enumerate(self._snapshot.plan.steps):
            self._ended[step.key] = anyio.Event()
            self._lines.setdefault(step.script.line, []).append(step)
            self._board.waiting(step.script)
            if number % _CHECKPOINT_EVERY == 0:
                await anyio.lowlevel.checkpoint()
        async with anyio.create_task_group() as group:
            group.start_soon(self._own_rows, rows)
            for number, line in enumerate(self._lines):
                group.start_soon(self._run_line, line, start)
                if number % _CHECKPOINT_EVERY == 0:
                    await anyio.lowlevel.checkpoint()

    async def _own_rows(self, rows: RowsToOwn | None) -> None:
        if rows is None:
            await anyio.lowlevel.checkpoint()
        else:
            await rows.own()
        self._rows_owned.set()

    async def _run_line(self, line: str, start: float) -> None:
        with self._run.options.telemetry.span(TABLE, {"db.collection.name": line}):
            try:
                await self._run_steps(self._lines[line], start)
            finally:
                await self._cleanup.clean_line(line)

    async def _run_steps(self, steps: Sequence[Step], free_at: float) -> None:
        """Runs a line's migrations in order, each after those that it depends on.

        Args:
            steps: The steps of one line.
            free_at: Monotonic time since which the line waits for its first step.
        """
        clock = self._run.clock
        for step in steps:
            for key in step.after:
                if not self._ended[key].is_set():
                    await self._cleanup.clean_line(step.script.line)  # the wait may be long
                    await self._ended[key].wait()
            result = await self._run_unless_blocked(step, free_at, clock.monotonic() - free_at)
            began_s = free_at - self._start + result.waited_s
            result = replace(result, began_s=began_s)
            free_at = clock.monotonic()
            self.results[step.key] = result
            self._run.options.telemetry.ended(result)
            self._board.ended(step.script, result.outcome.value)
            self._ended[step.key].set()
            if not self._rows_owned.is_set():
                await self._rows_owned.wait()

    async def _run_unless_blocked(
        self, step: Step, free_at: float, depended_s: float
    ) -> StepReport:
        """Runs one step in a span; skips it if a migration that it depends on was not done."""
        script = step.script
        if blocked := [k for k in step.after if not self.results[k].outcome.is_done]:
            return self._skipped(script, blocked[0], depended_s)
        attributes: dict[str, str | int] = {
            "db.collection.name": script.line,
            "db.operation.name": self._snapshot.plan.direction.value,
            "aiomigrate.version": script.version,
            "aiomigrate.description": script.description,
        }
        with self._run.options.telemetry.span(MIGRATION, attributes) as span:
            result = await self._run_step(step, free_at, depended_s)
            if not result.outcome.is_done:
                span.failed(result.error)
        return result

    async def _run_step(self, step: Step, free_at: float, depended_s: float) -> StepReport:
        """Applies or undoes one migration.

        First finishes an interrupted undo of it, if there is one.
        """
        script, snapshot = step.script, self._snapshot
        state = snapshot.plan.lines[script.line]
        unfinished = state.unfinished if step.resumes else None
        interrupted_undo = finish(script, state, snapshot.journal) if unfinished else None
        if interrupted_undo is not None:
            self._board.running(script, "undoing", 0, None)
            result = await self._reverser.run(
                script, interrupted_undo, unfinished, free_at, depended_s=depended_s
            )
            if step.undo is None and result.outcome.is_done:  # an upgrade: now apply it again
                result = await self._executor.run(script, None, free_at, depended_s=depended_s)
            return result
        if self._undo_decider is not None:
            self._board.running(script, "undoing", 0, None)
            undo = await self._undo_decider.decide_again(script, state)
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
        is_rollback = self._snapshot.plan.direction is Direction.ROLLBACK
        why = f"{cause[0]} {cause[1]} was not {'undone' if is_rollback else 'applied'}."
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


_CHECKPOINT_EVERY = 64
"""How many lines or migrations are started before the event loop may run other tasks."""
