"""The two ends of a run: the ledger before the first migration, the report after the last one.

A job calls `settle` right after it has the lease and a snapshot; the entry points build the report,
or the error, when the job has ended. What happens between is for `runs.scheduler`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio

from aiomigrate import events as ev
from aiomigrate.clock import Clock
from aiomigrate.commits import commit_span
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
    """Head rows that this lease has to create or take over, beside the first migrations.

    Attributes:
        ledger: The metadata tables.
        writer: Writes the journal.
        rows: The rows, with the epoch and owner of the lease.
        adoptions_durable: Set once the adoptions of these lines are durable in the journal; `None`
            if there are none.
    """

    ledger: Ledger
    writer: Writer
    rows: Sequence[HeadRow]
    adoptions_durable: anyio.Event | None

    async def own(self) -> None:
        """Writes the rows, after the journal has the versions that they record.

        Does nothing if there are no rows. A crash before leaves the head behind the journal; the
        next run repairs it.

        Raises:
            LeaseLostError: Another process has the lease.
            StoreError: A LanceDB call failed.
        """
        if self.adoptions_durable is not None:
            await self.writer.wait_durable(self.adoptions_durable)
        await self.ledger.own_rows(self.rows)


async def settle(
    run: Run,
    snapshot: Snapshot,
    lease: Lease,
    workspace: Workspace,
    *,
    only: Collection[str] | None = None,
) -> RowsToOwn:
    """Brings the head in line with the journal, line by line. Needs the lease.

    Records adoptions of lines that another system wrote, cleans up after interrupted migrations,
    and schedules updates of head rows. Does nothing for lines whose head row is right.

    Args:
        run: The context of the run.
        snapshot: The snapshot taken under the lease.
        lease: The lease.
        workspace: Writes events, and cleans up.
        only: The lines; by default all except those that background work is using.

    Returns:
        The rows that the lease has to create or take over.

    Raises:
        LeaseLostError: Another process has the lease.
        StoreError: A LanceDB call failed.
    """
    pending = {step.script.line for step in snapshot.plan.steps}
    rows: list[HeadRow] = []
    adoptions: list[Event] = []
    outdated: list[LineState] = []
    lines = {
        line: state
        for line, state in snapshot.plan.lines.items()
        if (line not in snapshot.plan.busy if only is None else line in only)
    }
    for line, state in lines.items():
        has_duplicates = state.rows > 1
        if state.act is Act.ENROL and not (line in pending or state.current):
            continue
        if state.act in (Act.ENROL, Act.ADOPT, Act.REOWN) or has_duplicates:
            rows.append(head_row(run, lease, line, state.current))
        if state.act in (Act.ADOPT, Act.REOWN, Act.LIFT):
            outdated.append(state)
        if state.act is Act.ADOPT:
            adoptions.append(await _adoption(run, state, workspace.tables))
            run.log.info(ev.LEDGER_ADOPTED, table=line, version=state.current)
    durable = workspace.writer.record_later(*adoptions)
    for state in lines.values():
        if (ended := pending_cleanup(state.history, snapshot.journal)) is not None:
            await workspace.cleanup.clean_after(ended)
    for state in outdated:
        workspace.cleanup.set_head_later(state.line, state.current)
    return RowsToOwn(run.ledger, workspace.writer, rows, durable if adoptions else None)


def head_row(run: Run, lease: Lease, line: str, version: int) -> HeadRow:
    """Returns the head row of a line at a version, owned by a lease."""
    digest = digest_at(run.scripts, line, version)
    return lease.row(line, version, at=run.clock.wall(), digest=digest)


async def _adoption(run: Run, state: LineState, opened: OpenTables) -> Event:
    """Returns the event that records the adoption of a line at its current version."""
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
    """Returns version and shape of tables by name, as events record them.

    Args:
        tables: Names of the tables.
        opened: The open tables.

    Returns:
        By table, `before` and `after` (both the current table_version, 0 if the table does not
        exist) and `shape` (`None` if the table does not exist).

    Raises:
        StoreError: A table exists but cannot be read.
    """
    result: dict[str, Any] = {}
    for name in tables:
        version, state = await opened.state_of(name)
        shape = None if state is None else state.shape()
        result[name] = {
            "before": version,
            "after": version,
            "shape": shape,
            "committed": [0, commit_span.now()],
        }
    return result


@dataclass(frozen=True, slots=True)
class ReportBuilder:
    """Builds the report of a run when it has ended.

    Attributes:
        report: The fields known at the start of the run.
        start: Monotonic time of the start.
        clock: Clocks.
        scripts: All migrations, for the critical path.
    """

    report: Report
    start: float
    clock: Clock
    scripts: Scripts

    def build(self, **fields: Any) -> Report:
        """Returns the report of the run.

        Args:
            **fields: Fields of `Report`. With `steps`, the critical path and the concurrency are
                computed.
        """
        if fields.get("steps"):
            spans = spans_of(fields["steps"])
            fields["critical"] = critical_path(spans, dependencies_of(self.scripts))
            fields["concurrency"] = concurrency_of(spans)
        return replace(self.report, total_s=self.clock.monotonic() - self.start, **fields)


def dependencies_of(scripts: Scripts) -> dict[Key, tuple[Key, ...]]:
    """Returns the migrations of other lines that each migration depends on."""
    return {script.key: tuple(script.depends_on.items()) for script in scripts.all}


def current_versions(plan: Plan) -> dict[str, int]:
    """Returns the version of each line when the plan was made."""
    return {name: state.current for name, state in plan.lines.items()}


def unsettled_lines(plan: Plan) -> tuple[Key, ...]:
    """Returns lines, with their versions, whose head rows a crashed background run left outdated.

    Empty if no background run crashed between the journal and the head.
    """
    states = ((line, plan.lines[line]) for line in sorted(plan.busy) if line in plan.lines)
    return tuple((line, state.current) for line, state in states if state.needs_lease)


def run_failure(report: Report, log: Any, *, elsewhere: bool = False) -> MigrationFailedError:
    """Logs that a run failed, and returns the error to raise.

    Args:
        report: The report of the run, in which at least one step was not applied.
        log: Bound logger.
        elsewhere: Whether the migration failed in another process.
    """
    not_applied = [step for step in report.steps if step.outcome is not Outcome.APPLIED]
    step = next(iter(report.failed), not_applied[0])
    more_failed = len(report.failed) - 1
    more = f" ({more_failed} more failed)" if more_failed > 0 else ""
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
        step.remedy or "Correct the migration and run again. Applied migrations stay applied.",
        report=report,
        line=step.line,
        version=step.version,
    )


def behind_targets(report: Report, targets: Mapping[str, int], scripts: Scripts) -> tuple[str, ...]:
    """Returns one sentence for each line that did not reach its target. Pure.

    Args:
        report: The report of an upgrade. Migrations that it deferred do not count.
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
