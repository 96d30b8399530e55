"""The status, the health and the validation of a database, as values. Pure.

`str()` of a value is its text, and `to_dict()` is JSON-ready. `inspection` computes the values.
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
    """The state of a line's background work."""

    PENDING = "pending"
    RUNNING = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """A line's background work.

    Attributes:
        state: Its state.
        version: The version of the migration that is running, or runs next.
        going: The progress of a running migration, as of the holder's last renewal; `None` if it is
            unknown.
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
    """The status of one line.

    Attributes:
        current: Its recorded version, 0 for none.
        target: The version of its newest script, `None` if it has no script.
        pending: The versions to run, in order.
        migrated_at: When its head row was last written.
        background: Its background work, `None` if there is none.
    """

    current: int
    target: int | None
    pending: tuple[int, ...] = ()
    migrated_at: dt.datetime | None = None
    background: Background | None = None

    @property
    def is_unknown(self) -> bool:
        """Whether the line has no script; such a line is not changed."""
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
    """The status of a database. `str()` is a table.

    Attributes:
        database: Its URI, without secrets.
        exists: Whether its metadata table exists.
        lines: Every line that is recorded or has scripts, by name.
        holder: The holder of the lease, `None` if it is free.
        background: The holder of the background lease, `None` if it is free.
        missing: One sentence for each thing that is not there and should perhaps be: the database,
            all scripts, or the scripts of a line that aiomigrate migrated.
    """

    database: str
    exists: bool
    lines: Mapping[str, LineStatus] = field(default_factory=dict)
    holder: Holder | None = None
    background: Holder | None = None
    missing: tuple[str, ...] = ()

    @property
    def is_at_target(self) -> bool:
        """Whether every line that has scripts is at its newest version."""
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
            "missing": list(self.missing),
        }

    def __str__(self) -> str:
        return status_text(self)


class HealthState(enum.StrEnum):
    """The state of a database, from an operator's point of view.

    Attributes:
        READY: At target, except for background work: the application may serve.
        RUNNING: This process is migrating.
        WAITING: Another process is migrating.
        PENDING: Not at target, and no process is migrating.
        FAILED: Not at target, no process is migrating, and the last attempt failed; or an
            application would refuse to start, for example because scripts were edited.
    """

    READY = "ready"
    RUNNING = "running"
    WAITING = "waiting"
    PENDING = "pending"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether an application may use a database, and if not, why. `str()` is a short text.

    Attributes:
        state: The overall state.
        status: The status of every line, and the holders of the leases.
        failed: The error of the last attempt by line, for lines that are not at target; or the
            reason why an application would refuse to start.
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
    """Whether a database matches its ledger and the scripts.

    Attributes:
        errors: One sentence for each difference; empty if the database is valid.
        warnings: One sentence for each warning.
        not_at_target: Those of the errors that only report pending migrations.
        missing: Those of the warnings that report that the database, all scripts, or the scripts
            of a line do not exist.
        deferred: One sentence for each line with background work; this is no error, because an
            application's start does not wait for it.
    """

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    not_at_target: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
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
        kinds = (("error", self.errors), ("warning", self.warnings), ("background", self.deferred))
        lines = [f"{kind}: {text}" for kind, texts in kinds for text in texts]
        return "\n".join(lines) or "valid"


def status_text(status: Status) -> str:
    """Returns a status as a table, with the holders of the leases below it."""
    rows = []
    for name, line in sorted(status.lines.items()):
        target = "?" if line.target is None else str(line.target)
        if line.target is None:
            note = "unknown: no script; not changed"
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
        out.append(f"background lease held by {status.background}")
    out += [f"warning: {text}" for text in status.missing]
    return "\n".join(out)


def health_text(health: Health) -> str:
    """Returns health as text: the state, each line that is not at target, and what to do."""
    status = health.status
    state = {
        HealthState.READY: "ready: at target",
        HealthState.RUNNING: "running: this process is migrating",
        HealthState.WAITING: f"waiting for {status.holder}",
        HealthState.PENDING: "pending: not at target, and no process is migrating",
        HealthState.FAILED: "failed: not at target, and the last attempt failed",
    }[health.state]
    is_refused = not any(status.lines[n].pending for n in health.failed if n in status.lines)
    if health.failed and is_refused:
        state = "failed: an application would refuse to start, because scripts and database differ"
    out = [f"{state} ({status.database})"]
    out += [text for name, text in health.failed.items() if name not in status.lines]
    for name, line in sorted(status.lines.items()):
        if line.target is None or not (line.pending or name in health.failed):
            continue
        text = f"{name}: {line.current} of {line.target}{_background(line)}"
        out.append(f"{text}: {health.failed[name]}" if name in health.failed else text)
    remedy = {
        HealthState.WAITING: "If that process has crashed, `aiomigrate upgrade` takes over.",
        HealthState.PENDING: "Run `aiomigrate upgrade`.",
        HealthState.FAILED: "Correct the cause and run `aiomigrate upgrade`; "
        "`aiomigrate history -v` shows the traceback.",
    }.get(health.state)
    if health.failed and is_refused:
        remedy = "Run `aiomigrate upgrade` to see the remedy."
    return "\n".join([*out, remedy] if remedy else out)


def _background(line: LineStatus) -> str:
    if line.background is None:
        return ""
    text = f", {line.background.version} in the background: {line.background.state.value}"
    going = line.background.going
    return text if going is None or going.percent is None else f"{text}, {going.percent:.0f}%"
