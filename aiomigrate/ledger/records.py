"""The records of the ledger: journal events, and rows of the head. Frozen values.

How they are stored is for `ledger.codec`; what a sequence of events means is for
`ledger.history`.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProgress:
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
    going: tuple[StepProgress, ...] = ()

    def __str__(self) -> str:
        doing = f", {self.phase}" if self.phase else ""
        return f"process {self.pid} on {self.host} (run {self.run_id}{doing})"


RUN_LEASE = "run"
"""Key of the lease under which migrations run."""

BACKGROUND_LEASE = "background"
"""Key of the lease under which migrations run that hold up no start."""


class Kind(enum.StrEnum):
    """Kinds of journal events. An event is never changed once written."""

    FOUNDED = "founded"
    OPENED = "opened"
    CLOSED = "closed"
    ADOPTED = "adopted"
    STAMPED = "stamped"
    STARTED = "started"
    ADVANCED = "advanced"
    INTENDED = "intended"
    APPLIED = "applied"
    RESTORED = "restored"
    FAILED = "failed"
    CLEANED = "cleaned"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    KEPT = "kept"
    PRUNED = "pruned"


NOT_YET = dt.datetime.min.replace(tzinfo=dt.UTC)
"""The time of an event that is as old as its entry in the journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One journal entry.

    Attributes:
        lease: Key of the lease it was written under.
        epoch: That lease's epoch.
        seq: Position within the epoch.
        at: When, UTC.
        kind: What happened, a `Kind` value; unknown kinds of newer releases are kept as text.
        run_id: The run.
        line: The line concerned.
        version: The version concerned.
        description: The migration's description.
        checksum: The migration's checksum.
        algorithm: How the checksum was made.
        source: The migration's file.
        tables: Per touched table `before` and `after` (table_version) and `shape`.
        waited_s: Seconds it waited for dependencies and a slot.
        ran_s: Seconds its operations took.
        ledger_s: Seconds spent waiting for the journal.
        rows: Rows changed.
        commits: Commits made on touched tables.
        size: Bytes of data that its tables held afterwards, where that was measured.
        retries: Commits tried again after a conflict.
        host: Host name.
        pid: Process id.
        tool: Version of aiomigrate.
        error: Error with traceback.
        detail: Anything else, per kind.
    """

    lease: str
    epoch: int
    seq: int
    at: dt.datetime
    kind: str
    run_id: str = ""
    line: str | None = None
    version: int | None = None
    description: str | None = None
    checksum: str | None = None
    algorithm: str | None = None
    source: str | None = None
    tables: Mapping[str, Any] = field(default_factory=dict)
    waited_s: float | None = None
    ran_s: float | None = None
    ledger_s: float | None = None
    rows: int | None = None
    commits: int | None = None
    size: int | None = None
    retries: int | None = None
    host: str | None = None
    pid: int | None = None
    tool: str | None = None
    error: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the event as a JSON-ready dictionary, without what is unknown."""
        out: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, dt.datetime):
                out[name] = value.isoformat()
            elif isinstance(value, Mapping):
                if value:
                    out[name] = dict(value)
            elif value is not None:
                out[name] = value
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRow:
    """One row of the head: a line's recorded version, or (for a lease row) who holds a lease.

    Attributes:
        name: The line, or the lease's name.
        version: Its recorded version.
        migrated_at: When that was written, UTC.
        epoch: Epoch of the holder that wrote it; `None` if another system did.
        owner: The holder's nonce; empty on a free lease.
        beat: Counts the holder's renewals.
        phase: On a lease row, JSON about the holder and what it is doing.
        digest: Chain digest of the applied migrations.
        lease: Key of the lease the row belongs to.
    """

    name: str
    version: int
    migrated_at: dt.datetime
    epoch: int | None = None
    owner: str | None = None
    beat: int | None = None
    phase: str | None = None
    digest: str | None = None
    lease: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether aiomigrate wrote it last; another system's write leaves our columns NULL."""
        return self.epoch is not None


def new_event(kind: Kind, **facts: Any) -> Event:
    """Returns an event to be written: the writer fills in lease, epoch and sequence number.

    Args:
        kind: What happened.
        facts: Its other fields. Without `at` it is as old as its entry in the journal.
    """
    return Event(lease="", epoch=0, seq=0, kind=kind, **{"at": NOT_YET, **facts})
