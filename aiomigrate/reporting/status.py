"""Where a database stands: its status, its health, and whether it is valid. Pure values.

Each prints itself (`str`) and gives itself as a dictionary for JSON. `inspection` computes them.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiomigrate.ledger.records import Holder, StepProgress
from aiomigrate.text import table


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
    going: StepProgress | None = None

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


def status_text(status: Status) -> str:
    """Returns a status as a table."""
    rows = []
    for name, line in sorted(status.lines.items()):
        target = "?" if line.target is None else str(line.target)
        if line.target is None:
            note = "unknown: no script; left alone"
        elif line.current > line.target:
            note = "ahead of its scripts"
        elif line.pending:
            note = f"{len(line.pending)} pending{_background(line)}"
        else:
            note = "at target"
        rows.append((name, str(line.current), target, note))
    out = [f"{status.database}" + ("" if status.exists else " (no metadata table yet)")]
    if rows:
        out.append(table(("line", "current", "target", "state"), rows, (1, 2)))
    if status.holder:
        out.append(f"lease held by {status.holder}")
    if status.background:
        out.append(f"in the background: {status.background}")
    return "\n".join(out)


def health_text(health: Health) -> str:
    """Returns health in one line, one for each line that is not at target, and what to do."""
    status = health.status
    said = {
        HealthState.READY: "ready: at target",
        HealthState.RUNNING: "running: this process is migrating",
        HealthState.WAITING: f"waiting for {status.holder}",
        HealthState.PENDING: "pending: not at target, and nobody is at work",
        HealthState.FAILED: "failed: not at target, and the last attempt failed",
    }[health.state]
    is_refused = not any(status.lines[n].pending for n in health.failed if n in status.lines)
    if health.failed and is_refused:
        said = "failed: a start would refuse it, for scripts and database do not fit together"
    out = [f"{said} ({status.database})"]
    for name, line in sorted(status.lines.items()):
        if line.target is None or not (line.pending or name in health.failed):
            continue
        told = f"{name}: {line.current} of {line.target}{_background(line)}"
        out.append(f"{told}: {health.failed[name]}" if name in health.failed else told)
    remedy = {
        HealthState.WAITING: "If that process is dead, `aiomigrate upgrade` takes over from it.",
        HealthState.PENDING: "Run `aiomigrate upgrade`.",
        HealthState.FAILED: "Correct the cause and run `aiomigrate upgrade`; "
        "`aiomigrate history -v` has the traceback.",
    }.get(health.state)
    if health.failed and is_refused:
        remedy = "Run `aiomigrate upgrade` to see what to do about it."
    return "\n".join([*out, remedy] if remedy else out)


def _background(line: LineStatus) -> str:
    if line.background is None:
        return ""
    told = f", {line.background.version} in the background: {line.background.state.value}"
    going = line.background.going
    return told if going is None or going.percent is None else f"{told}, {going.percent:.0f}%"
