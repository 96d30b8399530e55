"""The ledger before the first migration, and the report after the last one.

Before: the head follows the journal, line by line. After: what the run returns or raises.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio

from aiomigrate import events as ev
from aiomigrate.clock import Clock
from aiomigrate.errors import MigrationFailedError
from aiomigrate.execution.open_tables import OpenTables
from aiomigrate.execution.workspace import Workspace
from aiomigrate.ledger.history import pending_cleanup
from aiomigrate.ledger.lease import Lease
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.ledger.records import Event, HeadRow, Kind, new_event
from aiomigrate.ledger.writer import Writer
from aiomigrate.migration.checksum import ALGORITHM
from aiomigrate.migration.model import Key, Scripts
from aiomigrate.planning.plan import Plan
from aiomigrate.planning.reconcile import Act, LineState, digest_at, newly_covered
from aiomigrate.reporting.timing import concurrency_of, critical_path, spans_of
from aiomigrate.results import Outcome, Report
from aiomigrate.runs.environment import Run
from aiomigrate.runs.snapshot import Snapshot
from aiomigrate.text import error_line


@dataclass(frozen=True, slots=True)
class RowsToOwn:
    """Head rows that are not ours yet. Owning them need not come before the first migrations."""

    ledger: Ledger
    writer: Writer
    rows: Sequence[HeadRow]
    adopted: anyio.Event | None

    async def own(self) -> None:
        """Makes the rows ours, once the journal has what the head is about to say."""
        if self.adopted is not None:
            await self.writer.wait_durable(self.adopted)
        await self.ledger.own_rows(self.rows)


async def settle(
    run: Run,
    snapshot: Snapshot,
    lease: Lease,
    workspace: Workspace,
    *,
    only: Collection[str] | None = None,
) -> RowsToOwn:
    """Lets the head follow the journal, line by line. Needs the lease.

    Args:
        run: The context of the run.
        snapshot: What was read under the lease.
        lease: The lease.
        workspace: Writes, and cleans up after interrupted migrations.
        only: The lines; by default all but those that work in the background has in hand.

    Returns:
        The rows that are to become ours.
    """
    pending = {step.script.line for step in snapshot.plan.steps}
    owned: list[HeadRow] = []
    adopted: list[Event] = []
    lifted: list[LineState] = []
    mine = {
        line: state
        for line, state in snapshot.plan.lines.items()
        if (line not in snapshot.plan.busy if only is None else line in only)
    }
    for line, state in mine.items():
        merge = state.rows > 1
        if state.act is Act.ENROL and not (line in pending or state.current):
            continue
        if state.act in (Act.ENROL, Act.ADOPT, Act.REOWN) or merge:
            owned.append(head_row(run, lease, line, state.current))
        if state.act in (Act.ADOPT, Act.REOWN, Act.LIFT):
            lifted.append(state)
        if state.act is Act.ADOPT:
            adopted.append(await _adoption(run, state, workspace.tables))
            run.log.info(ev.LEDGER_ADOPTED, table=line, version=state.current)
    durable = workspace.writer.record_later(*adopted)
    for state in mine.values():
        if (left := pending_cleanup(state.history, snapshot.journal)) is not None:
            await workspace.cleanup.clean_after(left)
    for state in lifted:
        workspace.cleanup.lift(state.line, state.current)
    return RowsToOwn(run.ledger, workspace.writer, owned, durable if adopted else None)


def head_row(run: Run, lease: Lease, line: str, version: int) -> HeadRow:
    """Returns the head row of a line at a version, owned by a lease."""
    digest = digest_at(run.scripts, line, version)
    return lease.row(line, version, at=run.clock.wall(), digest=digest)


async def _adoption(run: Run, state: LineState, opened: OpenTables) -> Event:
    tables = [s.table for s in run.scripts.of(state.line) if s.table]
    return new_event(
        Kind.ADOPTED,
        at=run.clock.wall(),
        line=state.line,
        version=state.current,
        algorithm=ALGORITHM,
        tables=await shapes_of(tables[:1], opened),
        detail={"checksums": newly_covered(state, run.scripts)},
    )


async def shapes_of(tables: Sequence[str], opened: OpenTables) -> dict[str, Any]:
    """Returns version and shape of tables, as events record them; no shape where none is.

    Raises:
        StoreError: A table exists but cannot be read.
    """
    result: dict[str, Any] = {}
    for name in tables:
        version, state = await opened.state_of(name)
        shape = None if state is None else state.shape()
        result[name] = {"before": version, "after": version, "shape": shape}
    return result


@dataclass(frozen=True, slots=True)
class BegunReport:
    """A report whose run is under way.

    Attributes:
        report: What is known so far.
        begun: Monotonic time when the run began.
        clock: Clocks.
        scripts: All migrations, for the critical path.
    """

    report: Report
    begun: float
    clock: Clock
    scripts: Scripts

    def ended(self, **facts: Any) -> Report:
        """Returns the report of the run, which has ended, with some fields set."""
        if facts.get("steps"):
            spans = spans_of(facts["steps"])
            facts["critical"] = critical_path(spans, follows(self.scripts))
            facts["concurrency"] = concurrency_of(spans)
        return replace(self.report, total_s=self.clock.monotonic() - self.begun, **facts)


def follows(scripts: Scripts) -> dict[Key, tuple[Key, ...]]:
    """Returns what each migration follows besides its own line."""
    return {script.key: tuple(script.depends_on.items()) for script in scripts.all}


def current_versions(plan: Plan) -> dict[str, int]:
    """Returns the version of each line, as the plan found it."""
    return {name: state.current for name, state in plan.lines.items()}


def unsettled_lines(plan: Plan) -> tuple[Key, ...]:
    """Returns what a dead holder of the background lease did and did not record in the head."""
    states = ((line, plan.lines[line]) for line in sorted(plan.busy) if line in plan.lines)
    return tuple((line, state.current) for line, state in states if state.needs_lease)


def failed(report: Report, log: Any, *, elsewhere: bool = False) -> MigrationFailedError:
    """Logs that a run failed, and returns the error to raise.

    Args:
        report: The run.
        log: Bound logger.
        elsewhere: Whether it failed in another process.
    """
    bad = [step for step in report.steps if step.outcome is not Outcome.APPLIED]
    step = next(iter(report.failed), bad[0])
    others = len(report.failed) - 1
    more = f" ({others} more failed)" if others > 0 else ""
    where = " in another process" if elsewhere else ""
    log.error(
        ev.RUN_FAILED,
        applied=len(report.applied),
        failed=len(report.failed),
        skipped=len(report.skipped),
        total_s=round(report.total_s, 4),
    )
    return MigrationFailedError(
        f"Migration {step.line} {step.version} failed{where}: "
        f"{error_line(step.error).rstrip('.')}{more}. "
        f"{len(report.applied)} applied, {len(report.skipped)} skipped.",
        step.remedy or "Correct the migration and run again; what was applied stays.",
        report=report,
        line=step.line,
        version=step.version,
    )


def behind_targets(report: Report, targets: Mapping[str, int], scripts: Scripts) -> tuple[str, ...]:
    """Returns the lines that did not arrive at their target, one sentence each. Pure.

    Args:
        report: The run that was to bring them there; what it deferred is not behind.
        targets: The newest version of each line.
        scripts: All migrations.
    """
    if report.lines == targets or targets.items() <= report.lines.items():
        return ()
    deferred = set(report.deferred)
    return tuple(
        f"{line}: current v{current}, target v{latest}"
        for line, latest in targets.items()
        if (current := report.lines.get(line, 0)) < latest
        and any(s.key not in deferred for s in scripts.after(line, current))
    )
