"""The values that a run returns: a report of its migrations, with durations. Pure.

Each value formats itself as text (`str`) and as a dictionary for JSON. `runs` computes them; `cli`
shows them on a terminal.
"""

from __future__ import annotations

import datetime as dt
import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aiomigrate.text import duration, table


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """How a damaged journal was opened again.

    Attributes:
        latest: The table_version of the journal that could not be read.
        readable: The last table_version that could be read.
        lost: Number of events that could not be read.
        rescued: Number of events of later versions that could be read one by one.
        stamped: The versions that were recorded again, by line, since the head has them.
        unclear: One sentence for each line that a person has to check.
    """

    latest: int
    readable: int
    lost: int = 0
    rescued: int = 0
    stamped: Mapping[str, int] = field(default_factory=dict)
    unclear: tuple[str, ...] = ()

    def __str__(self) -> str:
        done = (
            f"The journal could not be read from table_version {self.readable + 1} to "
            f"{self.latest}. It was opened again at {self.readable}: {self.rescued} later events "
            f"were kept, {self.lost} are lost."
        )
        again = [
            f"{line} is recorded at version {version} again, as the head has it."
            for line, version in sorted(self.stamped.items())
        ]
        return "\n".join([done, *again, *(f"Check {sentence}" for sentence in self.unclear)])

    def to_dict(self) -> dict[str, Any]:
        """Returns the attributes as a JSON-ready dictionary."""
        return {
            "latest": self.latest,
            "readable": self.readable,
            "lost": self.lost,
            "rescued": self.rescued,
            "stamped": dict(self.stamped),
            "unclear": list(self.unclear),
        }


class Outcome(enum.StrEnum):
    """How a migration ended."""

    APPLIED = "applied"
    FAILED = "failed"
    SKIPPED = "skipped"
    ROLLED_BACK = "rolled back"
    CANCELLED = "cancelled"

    @property
    def is_done(self) -> bool:
        """Whether the migration succeeded: it was applied or, in a rollback, undone."""
        return self in (Outcome.APPLIED, Outcome.ROLLED_BACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The result of one migration of a run.

    Attributes:
        line: The line of the migration.
        version: The version of the migration.
        description: The description of the migration.
        outcome: How the migration ended.
        began_s: Seconds between the planning of the run and the migration's first operation.
        depended_s: Seconds spent waiting for dependencies after the line's previous migration had
            ended.
        waited_s: Seconds spent waiting for dependencies and for a slot.
        ran_s: Seconds spent in operations.
        ledger_s: Seconds spent waiting for the journal.
        rows: Number of changed rows.
        commits: Number of commits to the migration's tables.
        size: Bytes of data in the migration's tables afterwards. `None` if not measured, as for
            migrations that changed nothing, or neither rewrite rows nor run code.
        retries: Number of commits repeated after a conflict.
        tables: table_version before and after, by table; 0 if the table did not exist.
        resumed: Whether the migration continued after a crash had interrupted it.
        error: Why the migration failed or was skipped, or empty.
        remedy: What to do about the error, or empty.
        told: Facts reported by the operations, as JSON values by table and topic: the rows that a
            backfill could not fill (`poison`), the quality of new vectors (`gate`).
    """

    line: str
    version: int
    description: str = ""
    outcome: Outcome
    began_s: float = 0.0
    depended_s: float = 0.0
    waited_s: float = 0.0
    ran_s: float = 0.0
    ledger_s: float = 0.0
    rows: int = 0
    commits: int = 0
    size: int | None = None
    retries: int = 0
    tables: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    resumed: bool = False
    error: str = ""
    remedy: str = ""
    told: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a dictionary of JSON values."""
        out = {name: getattr(self, name) for name in self.__slots__}
        out["tables"] = {t: {"before": b, "after": a} for t, (b, a) in self.tables.items()}
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of a run. `str()` returns a table of timings, `to_dict()` and `to_json()` JSON.

    Attributes:
        run_id: Identifies the run in logs and journal.
        database: The URI of the database, without secrets.
        started_at: The start of the run, in UTC.
        total_s: Seconds from start to end.
        lease_s: Seconds spent waiting for the lease; 0 if none was needed.
        steps: The migrations of the plan, in the order of the plan; empty if nothing was pending.
        lines: The current version of each line, by line.
        adopted: Lines whose records were adopted from another system.
        ledger_commits: Number of commits to the two metadata tables.
        deferred: Migrations left for the background (line and version), in order.
        critical: The critical path: the migrations that determined when the run ended, first to
            last.
        concurrency: Number of migrations that ran at the same time, on average; 0 if none ran.
    """

    run_id: str
    database: str
    started_at: dt.datetime
    total_s: float = 0.0
    lease_s: float = 0.0
    steps: tuple[StepReport, ...] = ()
    lines: Mapping[str, int] = field(default_factory=dict)
    adopted: tuple[str, ...] = ()
    ledger_commits: int = 0
    deferred: tuple[tuple[str, int], ...] = ()
    critical: tuple[tuple[str, int], ...] = ()
    concurrency: float = 0.0

    @property
    def applied(self) -> tuple[StepReport, ...]:
        """The migrations that were applied."""
        return tuple(s for s in self.steps if s.outcome is Outcome.APPLIED)

    @property
    def failed(self) -> tuple[StepReport, ...]:
        """The migrations that failed."""
        return tuple(s for s in self.steps if s.outcome is Outcome.FAILED)

    @property
    def skipped(self) -> tuple[StepReport, ...]:
        """The migrations that were not started because an earlier one failed."""
        return tuple(s for s in self.steps if s.outcome is Outcome.SKIPPED)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a dictionary of JSON values."""
        return {
            "run_id": self.run_id,
            "database": self.database,
            "started_at": self.started_at.isoformat(),
            "total_s": self.total_s,
            "lease_s": self.lease_s,
            "applied": len(self.applied),
            "failed": len(self.failed),
            "skipped": len(self.skipped),
            "worked_s": sum(step.ran_s + step.ledger_s for step in self.steps),
            "ledger_s": sum(step.ledger_s for step in self.steps),
            "rows": sum(step.rows for step in self.steps),
            "commits": sum(step.commits for step in self.steps),
            "retries": sum(step.retries for step in self.steps),
            "ledger_commits": self.ledger_commits,
            "concurrency": self.concurrency,
            "critical": [{"line": line, "version": version} for line, version in self.critical],
            "adopted": list(self.adopted),
            "lines": dict(self.lines),
            "deferred": [{"line": line, "version": version} for line, version in self.deferred],
            "steps": [step.to_dict() for step in self.steps],
        }

    def followed_by(self, later: Report) -> Report:
        """Returns one report for this run and a later one, such as its background part.

        Durations, commits and steps are added up; `lines` and `deferred` are those of `later`.
        """
        return replace(
            later,
            run_id=self.run_id,
            started_at=self.started_at,
            total_s=self.total_s + later.total_s,
            lease_s=self.lease_s + later.lease_s,
            steps=(*self.steps, *later.steps),
            adopted=(*self.adopted, *later.adopted),
            ledger_commits=self.ledger_commits + later.ledger_commits,
            critical=(*self.critical, *later.critical),
            concurrency=_mean_concurrency(self, later),
        )

    def to_json(self) -> str:
        """Returns the report as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def __str__(self) -> str:
        return report_text(self)


def _mean_concurrency(first: Report, second: Report) -> float:
    """Returns the concurrency of two runs, averaged over their durations."""
    total_s = first.total_s + second.total_s
    weighted = first.concurrency * first.total_s + second.concurrency * second.total_s
    return weighted / total_s if total_s else 0.0


REPORT_HEADER = (
    "line", "version", "outcome", "waited", "ran", "ledger", "rows", "commits", "table_version",
)  # fmt: skip
REPORT_RIGHT = (1, 3, 4, 5, 6, 7)


def report_rows(report: Report) -> list[tuple[str, ...]]:
    """Returns the cells of a report's table: one row per migration, columns as `REPORT_HEADER`."""
    return [
        (
            step.line,
            str(step.version),
            step.outcome.value + (" (resumed)" if step.resumed else ""),
            duration(step.waited_s),
            duration(step.ran_s),
            duration(step.ledger_s),
            str(step.rows),
            str(step.commits),
            _versions(step.tables),
        )
        for step in report.steps
    ]


def _versions(tables: object) -> str:
    assert hasattr(tables, "items")  # noqa: S101 - a mapping of pairs
    changed = {t: pair for t, pair in tables.items() if pair[0] != pair[1]}
    if len(changed) == 1:
        before, after = next(iter(changed.values()))
        return f"{before} -> {after}"
    return ", ".join(f"{t} {before} -> {after}" for t, (before, after) in changed.items()) or "-"


def report_summary(report: Report) -> str:
    """Returns a one-line summary of a run."""
    if not report.steps:
        count = len(report.deferred)
        noun = "migration" if count == 1 else "migrations"
        left = f" except for {count} background {noun}" if count else ""
        return f"{report.database} is at target{left}: nothing to do ({duration(report.total_s)})."
    undone = sum(step.outcome is Outcome.ROLLED_BACK for step in report.steps)
    parts = [f"{undone} rolled back"] if undone else [f"{len(report.applied)} applied"]
    parts += [f"{len(found)} {word}"
              for word, found in (("failed", report.failed), ("skipped", report.skipped))
              if found]  # fmt: skip
    return (
        f"{', '.join(parts)} in {duration(report.total_s)} "
        f"(lease {duration(report.lease_s)}, {report.ledger_commits} ledger commits)."
    )


def report_text(report: Report) -> str:
    """Returns a table of timings and a summary; only the summary if nothing was pending."""
    if not report.steps:
        return report_summary(report)
    out = [table(REPORT_HEADER, report_rows(report), REPORT_RIGHT)]
    out += [
        f"{step.line} {step.version}: {step.error} {step.remedy}".rstrip()
        for step in report.steps
        if not step.outcome.is_done
    ]
    return "\n".join([*out, report_summary(report)])
