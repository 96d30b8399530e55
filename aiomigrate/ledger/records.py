"""The records of the ledger as frozen values: journal events and rows of the head.

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
    """The progress of a migration that a process is running.

    Attributes:
        line: The migration's line.
        version: The migration's version.
        doing: Description of the current operation.
        done: Amount of completed work, in the unit of `total`.
        total: Amount of work, `None` if unknown.
    """

    line: str
    version: int
    doing: str = ""
    done: int = 0
    total: int | None = None

    @property
    def percent(self) -> float | None:
        """The completed share, 0 to 100, `None` if unknown."""
        return min(100.0, 100 * self.done / self.total) if self.total else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The process that holds a lease, as it describes itself in the lease row.

    Attributes:
        host: Host name.
        pid: Process id.
        run_id: Id of its run.
        phase: Description of what it is doing.
        since: Time at which it took the lease, ISO 8601.
        epoch: The lease's epoch.
        going: Progress of the migrations it is running, as of its last renewal.
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
"""Key of the lease under which background migrations run, which no start waits for."""


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
    REPAIRED = "repaired"


NOT_YET = dt.datetime.min.replace(tzinfo=dt.UTC)
"""Placeholder time: the event gets the time at which it is appended to the journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One journal entry.

    Attributes:
        lease: Key of the lease it was written under.
        epoch: That lease's epoch.
        seq: Position within the epoch.
        at: Time, UTC.
        kind: What happened, a `Kind` value; unknown kinds of newer releases are kept as text.
        run_id: The run.
        line: The line concerned.
        version: The version concerned.
        description: The migration's description.
        checksum: The migration's checksum.
        algorithm: Name of the checksum's algorithm.
        source: The migration's file.
        tables: Per touched table `before` and `after` (table_version) and `shape`.
        waited_s: Seconds it waited for dependencies and a slot.
        ran_s: Seconds its operations took.
        ledger_s: Seconds it waited for commits to the journal.
        rows: Rows changed.
        commits: Commits made on touched tables.
        size: Bytes of data in its tables afterwards, if measured.
        retries: Commits retried after a conflict.
        host: Host name.
        pid: Process id.
        tool: Version of aiomigrate.
        error: Error with traceback.
        detail: Other entries, depending on the kind.
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
        """Returns the event as a JSON-ready dictionary, without unknown and empty fields."""
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
    """One row of the head: the recorded version of a line, or the holder of a lease.

    Attributes:
        name: The line, or the name of the lease row.
        version: The recorded version, 0 on a lease row.
        migrated_at: Time of the last write, UTC.
        epoch: Epoch of the holder that wrote the row; `None` if another system did.
        owner: The holder's nonce; empty on a free lease.
        beat: Number of the holder's renewals.
        phase: On a lease row, a JSON object that describes the holder and its work.
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
        """Whether aiomigrate wrote the row last; other systems leave the added columns NULL."""
        return self.epoch is not None


def new_event(kind: Kind, **facts: Any) -> Event:
    """Returns an event to be written; the writer sets its lease, epoch and sequence number.

    Args:
        kind: What happened.
        facts: Other fields of the event. Without `at` it gets the time of its journal commit.
    """
    return Event(lease="", epoch=0, seq=0, kind=kind, **{"at": NOT_YET, **facts})
