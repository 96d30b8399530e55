"""Computes the timings of runs from journal events: spans, critical path, concurrency. Pure.

It reads the journal, so it covers past runs and runs of other processes; the result of the current
run is in `results`. `reporting.html` draws the timings.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiomigrate.ledger.records import Event, Kind
from aiomigrate.migration.model import Key
from aiomigrate.results import StepReport
from aiomigrate.text import bytes_text, duration, error_line, table

_TRACE_ARGUMENTS = (
    "description", "outcome", "rows", "commits", "retries", "ran_s", "ledger_s", "error",
)  # fmt: skip
_OUTCOMES: Mapping[str, str] = {
    Kind.APPLIED: "applied",
    Kind.FAILED: "failed",
    Kind.ROLLED_BACK: "rolled back",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The timing of one migration in a run. All times are in seconds.

    Attributes:
        line: Its line.
        version: Its version.
        description: Its description.
        outcome: `applied`, `failed` or `rolled back`.
        began_s: Time from the start of the run to its first operation.
        depended_s: Time it waited for migrations that it depends on, since the previous migration
            of its line ended.
        waited_s: Time it waited for these and for a slot.
        ran_s: Time spent in its operations.
        ledger_s: Time it waited for the journal between its operations.
        rows: Number of changed rows.
        size: Bytes of data in its tables afterwards, `None` if not measured (for migrations that
            changed nothing, or neither rewrite rows nor run code).
        commits: Number of commits to its tables.
        retries: Number of commits that were retried.
        error: The error in one line, empty if it succeeded.
    """

    line: str
    version: int
    description: str = ""
    outcome: str = "applied"
    began_s: float = 0.0
    depended_s: float = 0.0
    waited_s: float = 0.0
    ran_s: float = 0.0
    ledger_s: float = 0.0
    rows: int = 0
    size: int | None = None
    commits: int = 0
    retries: int = 0
    error: str = ""

    @property
    def key(self) -> Key:
        """Line and version."""
        return (self.line, self.version)

    @property
    def queued_s(self) -> float:
        """Time it waited for a slot."""
        return max(0.0, self.waited_s - self.depended_s)

    @property
    def took_s(self) -> float:
        """Time from its first operation to its end."""
        return self.ran_s + self.ledger_s

    @property
    def ended_s(self) -> float:
        """Time from the start of the run to its end."""
        return self.began_s + self.took_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTiming:
    """The timing of one run.

    Attributes:
        run_id: The id of the run.
        started_at: When it requested the lease, UTC.
        host: The host name.
        pid: The process id.
        lease_s: Seconds it waited for the lease.
        total_s: Seconds from its start to the end of its last migration.
        spans: Its migrations, in the order in which they began.
        critical: The critical path: the migrations that its end waited for, first to last.
    """

    run_id: str
    started_at: dt.datetime
    host: str = ""
    pid: int = 0
    lease_s: float = 0.0
    total_s: float = 0.0
    spans: tuple[Span, ...] = ()
    critical: tuple[Key, ...] = ()

    @property
    def worked_s(self) -> float:
        """The sum of the times of all migrations, in seconds."""
        return sum(span.took_s for span in self.spans)

    @property
    def concurrency(self) -> float:
        """How many migrations ran at once, on average; 0 if there are none."""
        return concurrency_of(self.spans)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
        return {
            "run_id": self.run_id,
            "started_at": self.started_at.isoformat(),
            "host": self.host,
            "pid": self.pid,
            "lease_s": self.lease_s,
            "total_s": self.total_s,
            "worked_s": self.worked_s,
            "ledger_s": sum(span.ledger_s for span in self.spans),
            "rows": sum(span.rows for span in self.spans),
            "commits": sum(span.commits for span in self.spans),
            "retries": sum(span.retries for span in self.spans),
            "concurrency": self.concurrency,
            "critical": [{"line": line, "version": version} for line, version in self.critical],
            "migrations": [
                {name: getattr(span, name) for name in Span.__slots__} for span in self.spans
            ],
        }

    def to_trace(self) -> dict[str, Any]:
        """Returns it in the Trace Event Format, which Perfetto and Chrome's tracing open.

        Each line is a thread. Each migration is a slice, after a slice for its waiting time; its
        journal time is one of the slice's arguments. Times are in microseconds.
        Source: "Trace Event Format", the document of Chromium's catapult project.
        """
        lines = sorted({span.line for span in self.spans})
        number = {line: position for position, line in enumerate(lines, 2)}
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "tid": 0, "name": "process_name",
             "args": {"name": f"aiomigrate run {self.run_id}"}},
            {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "lease"}},
            {"ph": "X", "pid": 1, "tid": 1, "name": "wait for the lease", "cat": "lease",
             "ts": 0, "dur": round(self.lease_s * 1e6)},
        ]  # fmt: skip
        events += [
            {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": line}}
            for line, tid in number.items()
        ]
        free: dict[str, int] = {}  # slices that overlap because of rounding would not be drawn
        for span, waited_s in zip(self.spans, waits(self.spans), strict=True):
            earliest = free.get(span.line, 0)
            asked = max(earliest, round((span.began_s - waited_s) * 1e6))
            began = max(asked, round(span.began_s * 1e6))
            free[span.line] = ended = max(began, round(span.ended_s * 1e6))
            shared = {"ph": "X", "pid": 1, "tid": number[span.line]}
            passed = min(began, asked + round(min(span.depended_s, waited_s) * 1e6))
            waiting = [
                {**shared, "name": f"wait for {what}", "cat": "wait", "ts": at, "dur": until - at}
                for what, at, until in (("others", asked, passed), ("a slot", passed, began))
                if until > at
            ]
            args = {name: getattr(span, name) for name in _TRACE_ARGUMENTS}
            working = {"name": f"{span.line} {span.version}", "cat": span.outcome,
                       "ts": began, "dur": ended - began, "args": args}  # fmt: skip
            events += [*waiting, {**shared, **working}]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def __str__(self) -> str:
        return timing_text(self)


def timing_text(run: RunTiming) -> str:
    """Returns a run as a table of its migrations, in the order in which they began, with totals."""
    header = ("began", "line", "version", "outcome", "waited for deps", "waited for slot", "ran",
              "ledger", "rows", "bytes", "commits", "retries", "")  # fmt: skip
    critical = set(run.critical)
    rows = [
        (
            duration(span.began_s),
            span.line,
            str(span.version),
            span.outcome,
            duration(span.depended_s),
            duration(span.queued_s),
            duration(span.ran_s),
            duration(span.ledger_s),
            str(span.rows),
            "" if span.size is None else bytes_text(span.size),
            str(span.commits),
            str(span.retries),
            "*" if span.key in critical else "",
        )
        for span in run.spans
    ]
    path = " > ".join(f"{line} {version}" for line, version in run.critical)
    head = f"run {run.run_id}, {run.started_at:%Y-%m-%d %H:%M:%SZ}, process {run.pid} on {run.host}"
    total = (
        f"{len(run.spans)} migration{'s'[: len(run.spans) != 1]} in {duration(run.total_s)}: "
        f"{duration(run.lease_s)} for the lease, {duration(run.worked_s)} of work, "
        f"{run.concurrency:.1f} at once."
    )
    shown = table(header, rows, (0, 2, 4, 5, 6, 7, 8, 9, 10, 11))
    return "\n".join([head, shown, total, f"Critical path (*): {path}"])


def runs_of(
    events: Iterable[Event], depends_on: Mapping[Key, Collection[Key]] | None = None
) -> tuple[RunTiming, ...]:
    """Returns the runs in which at least one migration ended, oldest first; empty if none.

    Args:
        events: The valid events of the journal.
        depends_on: The migrations of other lines that each migration depends on, for the critical
            path.
    """
    by_run: dict[str, list[Event]] = {}
    for event in events:
        if event.run_id:
            by_run.setdefault(event.run_id, []).append(event)
    found = [
        _run(run_id, given, depends_on or {})
        for run_id, given in by_run.items()
        if any(event.kind in _OUTCOMES for event in given)
    ]
    return tuple(sorted(found, key=lambda run: run.started_at))


def _run(
    run_id: str, events: Sequence[Event], depends_on: Mapping[Key, Collection[Key]]
) -> RunTiming:
    ended = [event for event in events if event.kind in _OUTCOMES]
    opened = next((event for event in events if event.kind == Kind.OPENED), None)
    lease_s = (opened.waited_s or 0.0) if opened is not None else 0.0
    first = min(_began(event) for event in ended)
    started_at = first if opened is None else min(first, opened.at)
    started_at -= dt.timedelta(seconds=lease_s)
    spans = tuple(
        sorted(
            (_span(event, started_at) for event in ended),
            key=lambda span: (span.began_s, span.line, span.version),
        )
    )
    return RunTiming(
        run_id=run_id,
        started_at=started_at,
        host=ended[0].host or "",
        pid=ended[0].pid or 0,
        lease_s=lease_s,
        total_s=max(span.ended_s for span in spans),
        spans=spans,
        critical=critical_path(spans, depends_on),
    )


def _began(event: Event) -> dt.datetime:
    """Returns when a migration began, from the event that records its end."""
    return event.at - dt.timedelta(seconds=(event.ran_s or 0.0) + (event.ledger_s or 0.0))


def _span(event: Event, started_at: dt.datetime) -> Span:
    return Span(
        line=event.line or "",
        version=event.version or 0,
        description=event.description or "",
        outcome=_OUTCOMES[event.kind],
        began_s=max(0.0, (_began(event) - started_at).total_seconds()),
        depended_s=event.detail.get("depended_s", 0.0),
        waited_s=event.waited_s or 0.0,
        ran_s=event.ran_s or 0.0,
        ledger_s=event.ledger_s or 0.0,
        rows=event.rows or 0,
        size=event.size,
        commits=event.commits or 0,
        retries=event.retries or 0,
        error=error_line(event.error),
    )


def spans_of(steps: Iterable[StepReport]) -> tuple[Span, ...]:
    """Returns the timings of the steps of a report that ran, in the order in which they began."""
    shared = [name for name in Span.__slots__ if name != "outcome"]
    spans = [
        Span(outcome=step.outcome.value, **{name: getattr(step, name) for name in shared})
        for step in steps
        if step.outcome.is_done or step.ran_s
    ]
    return tuple(sorted(spans, key=lambda span: (span.began_s, span.line, span.version)))


def concurrency_of(spans: Sequence[Span]) -> float:
    """Returns how many migrations ran at once, on average; 0 if there are none."""
    if not spans:
        return 0.0
    elapsed = max(s.ended_s for s in spans) - min(s.began_s for s in spans)
    return sum(span.took_s for span in spans) / elapsed if elapsed > 0 else 1.0


def waits(spans: Sequence[Span]) -> tuple[float, ...]:
    """Returns how long each migration waited after the previous one of its line, in seconds.

    Args:
        spans: Migrations, in the order in which they began.
    """
    ended: dict[str, float] = {}
    result = []
    for span in spans:
        result.append(max(0.0, min(span.waited_s, span.began_s - ended.get(span.line, 0.0))))
        ended[span.line] = span.ended_s
    return tuple(result)


def critical_path(
    spans: Sequence[Span], depends_on: Mapping[Key, Collection[Key]]
) -> tuple[Key, ...]:
    """Returns the migrations that the end of a run waited for, first to last; empty if none ran.

    The path is followed backwards from the migration that ended last. Each predecessor is the one
    that ended last among the earlier versions of the same line and the migrations that it depends
    on. Waiting for a slot is not followed.

    Args:
        spans: The migrations of the run.
        depends_on: The migrations of other lines that each migration depends on.
    """
    if not spans:
        return ()
    by_line: dict[str, list[Span]] = {}
    for span in spans:
        by_line.setdefault(span.line, []).append(span)
    at = max(spans, key=lambda span: (span.ended_s, span.key))
    path = [at]
    while True:
        follows = set(depends_on.get(at.key, ()))
        lines = {at.line, *(line for line, _ in follows)}
        before = [
            span for line in lines for span in by_line.get(line, ())
            if span not in path
            and span.ended_s <= at.ended_s
            and ((span.line == at.line and span.version < at.version) or span.key in follows)
        ]  # fmt: skip
        if not before:
            return tuple(span.key for span in reversed(path))
        at = max(before, key=lambda span: (span.ended_s, span.key))
        path.append(at)
