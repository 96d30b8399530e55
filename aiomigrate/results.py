"""What a run returns: a report of its migrations, with their times. Pure values.

Each prints itself (`str`) and gives itself as a dictionary for JSON. How they are computed is for
`runs`; colours and terminals are for `cli`.
"""

from __future__ import annotations

import datetime as dt
import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aiomigrate.text import duration, table


class Outcome(enum.StrEnum):
    """How a migration ended."""

    APPLIED = "applied"
    FAILED = "failed"
    SKIPPED = "skipped"
    ROLLED_BACK = "rolled back"
    CANCELLED = "cancelled"

    @property
    def is_done(self) -> bool:
        """Whether it did what it was to do."""
        return self in (Outcome.APPLIED, Outcome.ROLLED_BACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One migration of a run.

    Attributes:
        line: Its line.
        version: Its version.
        description: Its description.
        outcome: How it ended.
        began_s: Seconds from when the run was planned to its first operation.
        depended_s: Seconds it waited for what it depends on, since the one before it on its line
            had ended.
        waited_s: Seconds it waited for that and for a slot.
        ran_s: Seconds its operations took.
        ledger_s: Seconds it waited for the journal.
        rows: Rows changed.
        commits: Commits made on touched tables.
        size: Bytes of data that its tables hold afterwards, `None` where that was not measured (of
            migrations that changed nothing, or neither rewrite rows nor run code).
        retries: Commits tried again after a conflict.
        tables: table_version before and after, by table; 0 where the table did not exist.
        resumed: Whether it recovered what a crash had interrupted.
        error: Why it failed or was skipped, or empty.
        remedy: What to do about it, or empty.
        told: What its operations tell of their work, JSON values by table and topic: the rows
            that a backfill could not fill (`poison`), the quality of new vectors (`gate`).
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
        """Returns it as a JSON-ready dictionary."""
        out = {name: getattr(self, name) for name in self.__slots__}
        out["tables"] = {t: {"before": b, "after": a} for t, (b, a) in self.tables.items()}
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole run. `str()` is a table of timings; `to_dict()` and `to_json()` are for programs.

    Attributes:
        run_id: Identifies the run in logs and journal.
        database: The database's URI, without secrets.
        started_at: When, UTC.
        total_s: Seconds from start to end.
        lease_s: Seconds waited for the lease; 0 when none was needed.
        steps: Every migration of the plan, in the plan's order; empty when nothing was pending.
        lines: The version each line is at now, by line.
        adopted: Lines that another system had written.
        ledger_commits: Commits made on the two metadata tables.
        deferred: What is left for the background (line and version), in order.
        critical: The migrations that its end waited for, first to last.
        concurrency: How many were at work at once, on average; 0 where there were none.
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
        """The migrations that were not tried because one they follow failed."""
        return tuple(s for s in self.steps if s.outcome is Outcome.SKIPPED)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
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
        """Returns this run and another that came right after it as one."""
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
            concurrency=_mean(self, later),
        )

    def to_json(self) -> str:
        """Returns it as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def __str__(self) -> str:
        return report_text(self)


def _mean(first: Report, second: Report) -> float:
    """Returns how many migrations were at work at once in two runs, on average."""
    total_s = first.total_s + second.total_s
    weighed = first.concurrency * first.total_s + second.concurrency * second.total_s
    return weighed / total_s if total_s else 0.0


REPORT_HEADER = (
    "line", "version", "outcome", "waited", "ran", "ledger", "rows", "commits", "table_version",
)  # fmt: skip
REPORT_RIGHT = (1, 3, 4, 5, 6, 7)


def report_rows(report: Report) -> list[tuple[str, ...]]:
    """Returns the cells of a report's table, one row per migration, as in `REPORT_HEADER`."""
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
    """Returns a run in one line."""
    if not report.steps:
        left = f" but for {len(report.deferred)} in the background" if report.deferred else ""
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
    """Returns a run as a table of timings and a summary; one line when nothing was pending."""
    if not report.steps:
        return report_summary(report)
    out = [table(REPORT_HEADER, report_rows(report), REPORT_RIGHT)]
    out += [
        f"{step.line} {step.version}: {step.error} {step.remedy}".rstrip()
        for step in report.steps
        if not step.outcome.is_done
    ]
    return "\n".join([*out, report_summary(report)])
