"""What came of a run, of looking, of validating: values for people and programs. Pure."""

from __future__ import annotations

import datetime as dt
import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


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
        from aiomigrate.render import report_text  # rendering is a layer above the value it prints

        return report_text(self)


def _mean(first: Report, second: Report) -> float:
    """Returns how many migrations were at work at once in two runs, on average."""
    total_s = first.total_s + second.total_s
    weighed = first.concurrency * first.total_s + second.concurrency * second.total_s
    return weighed / total_s if total_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """How far one migration is that a process is at work on.

    Attributes:
        line: Its line.
        version: Its version.
        doing: What it is doing.
        done: How much is done, in what `total` counts.
        total: How much there is, `None` if unknown.
    """

    line: str
    version: int
    doing: str = ""
    done: int = 0
    total: int | None = None

    @property
    def percent(self) -> float | None:
        """How much is done, 0 to 100, `None` if unknown."""
        return min(100.0, 100 * self.done / self.total) if self.total else None


class BackgroundState(enum.StrEnum):
    """How it stands with a line's work in the background."""

    PENDING = "pending"
    RUNNING = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """A line's work in the background.

    Attributes:
        state: How it stands with it.
        version: The migration that is next, or at work.
        going: How far it is, as of the holder's last renewal, of one that is at work.
    """

    state: BackgroundState
    version: int
    going: Going | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
        return {
            "state": self.state.value,
            "version": self.version,
            "doing": self.going.doing if self.going else "",
            "done": self.going.done if self.going else 0,
            "total": self.going.total if self.going else None,
            "percent": self.going.percent if self.going else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LineStatus:
    """Where one line is.

    Attributes:
        current: The recorded version, 0 for none.
        target: Its newest script's version, `None` when no script knows the line.
        pending: Versions to run, in order.
        migrated_at: When the head row was last written.
        background: Its work in the background, `None` if none is pending.
    """

    current: int
    target: int | None
    pending: tuple[int, ...] = ()
    migrated_at: dt.datetime | None = None
    background: Background | None = None

    @property
    def is_unknown(self) -> bool:
        """Whether no script knows the line; it is left alone."""
        return self.target is None

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
        return {
            "current": self.current,
            "target": self.target,
            "pending": list(self.pending),
            "migrated_at": self.migrated_at.isoformat() if self.migrated_at else None,
            "background": self.background.to_dict() if self.background else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds the lease.

    Attributes:
        host: Host name.
        pid: Process id.
        run_id: Its run.
        phase: What it is doing.
        since: When it took the lease.
        epoch: The lease's epoch.
        going: How far the migrations are that it is at work on, as of its last renewal.
    """

    host: str = ""
    pid: int = 0
    run_id: str = ""
    phase: str = ""
    since: str = ""
    epoch: int = 0
    going: tuple[Going, ...] = ()

    def __str__(self) -> str:
        doing = f", {self.phase}" if self.phase else ""
        return f"process {self.pid} on {self.host} (run {self.run_id}{doing})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Where a database is. `str()` is a table.

    Attributes:
        database: Its URI, without secrets.
        exists: Whether its metadata table exists.
        lines: Every line recorded or scripted, by name.
        holder: Who holds the lease, if anyone does.
        background: Who holds the lease for work in the background, if anyone does.
    """

    database: str
    exists: bool
    lines: Mapping[str, LineStatus] = field(default_factory=dict)
    holder: Holder | None = None
    background: Holder | None = None

    @property
    def is_at_target(self) -> bool:
        """Whether every line that has scripts is at its newest."""
        return all(s.current == s.target for s in self.lines.values() if s.target is not None)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
        return {
            "database": self.database,
            "exists": self.exists,
            "at_target": self.is_at_target,
            "holder": str(self.holder) if self.holder else None,
            "background": str(self.background) if self.background else None,
            "lines": {name: status.to_dict() for name, status in self.lines.items()},
        }

    def __str__(self) -> str:
        from aiomigrate.render import status_text  # rendering is a layer above what it prints

        return status_text(self)


class HealthState(enum.StrEnum):
    """What an operator asks first.

    Attributes:
        READY: At target, but for what is done in the background: the application may serve.
        RUNNING: This process is migrating.
        WAITING: Another process is migrating.
        PENDING: Not at target, and nobody is at work.
        FAILED: Not at target, nobody is at work, and the last attempt failed; or a start would
            refuse the database, because its scripts were edited, say.
    """

    READY = "ready"
    RUNNING = "running"
    WAITING = "waiting"
    PENDING = "pending"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether a database may be used, and if not, why. `str()` is one line per thing to know.

    Attributes:
        state: The whole in one word.
        status: Where every line is, and who holds the leases.
        failed: The error of the last attempt, by line, of lines that are not at target, or why a
            start would refuse them.
    """

    state: HealthState
    status: Status
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        """Whether the application may serve."""
        return self.state is HealthState.READY

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
        return {
            "state": self.state.value,
            "ready": self.is_ready,
            "failed": dict(self.failed),
            **self.status.to_dict(),
        }

    def __str__(self) -> str:
        from aiomigrate.render import health_text  # rendering is a layer above what it prints

        return health_text(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Whether a database is what ledger and scripts say.

    Attributes:
        errors: One sentence for each difference; empty when valid.
        warnings: One sentence for each thing worth knowing.
        not_at_target: The errors that only say a line has pending migrations.
        deferred: What is left for the background; no error, since starts do not wait for it.
    """

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    not_at_target: tuple[str, ...] = ()
    deferred: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether there are no errors."""
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
        return {
            "valid": self.valid,
            "errors": list(self.errors),
            "warnings": list(self.warnings),
            "deferred": list(self.deferred),
        }

    def __str__(self) -> str:
        told = (("error", self.errors), ("warning", self.warnings), ("background", self.deferred))
        lines = [f"{word}: {text}" for word, texts in told for text in texts]
        return "\n".join(lines) or "valid"


def error_line(error: str | None) -> str:
    """Returns the telling line of an error: of a traceback that which names its last exception."""
    lines = [line.rstrip() for line in (error or "").splitlines() if line.strip()]
    if not lines:
        return ""
    if not lines[0].startswith("Traceback"):
        return lines[0].strip()
    last = max(i for i, line in enumerate(lines) if line.startswith("Traceback"))
    # Frames are indented; the exception is not, nor is what follows of a message of several lines.
    return next((line for line in lines[last + 1 :] if not line[0].isspace()), lines[-1].strip())
