"""Plain-text tables of plans, reports and statuses. Pure; colours and terminals are the CLI's."""

from __future__ import annotations

from collections.abc import Sequence

from aiomigrate.plan import Direction, Plan
from aiomigrate.report import Health, HealthState, LineStatus, Outcome, Report, Status
from aiomigrate.timing import RunTiming


def seconds(value: float) -> str:
    """Returns a duration for people: `12 ms`, `3.4 s`, `2 min 5 s`."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


def bytes_text(value: float) -> str:
    """Returns a size for people: `812 B`, `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Returns aligned columns; `right` are the indexes of right-aligned ones."""
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def plan_text(plan: Plan) -> str:
    """Returns a plan as text: one paragraph per migration, its operations beneath."""
    if plan.is_empty:
        going_back = plan.direction is Direction.ROLLBACK
        head = "Nothing to undo." if going_back else "Everything is at target; nothing to do."
    else:
        lines = len({step.script.line for step in plan.steps})
        count = len(plan.steps)
        undo = "Undo " if plan.direction is Direction.ROLLBACK else ""
        head = f"{undo}{count} migration{'s'[: count != 1]} on {lines} line{'s'[: lines != 1]}:"
    out = [head]
    for step in plan.steps:
        script = step.script
        title = f"  {script.version:>4}  {script.line}"
        if script.description:
            title += f"  {script.description}"
        if step.resumes:
            title += "  (interrupted; will be recovered)"
        if step.deferred:
            title += "  (in the background)"
        out.append(title)
        if step.undo is not None:
            out += [f"        - {line}" for line in step.undo.describe()]
            out.append(f"        then {script.line} is at {step.undo.to}")
            continue
        for position, operation in enumerate(script.operations):
            where = "" if operation.table in (None, script.table) else f"{operation.table}: "
            traits = operation.traits
            marks = [
                word
                for word, on in (
                    ("rewriting", traits.rewriting),
                    ("destructive", step.is_destructive(position)),
                    ("irreversible", not traits.reversible),
                )
                if on
            ]
            marked = f"  [{', '.join(marks)}]" if marks else ""
            out.append(f"        - {where}{operation.describe()}{marked}")
        others = [f"{line} {version}" for line, version in step.after if line != script.line]
        if others:
            out.append(f"        after {', '.join(others)}")
    out += [f"adopt: {line} was written by another system" for line in plan.adopts]
    out += [f"unknown: {line} is recorded at {v}, no script knows it; left alone"
            for line, v in sorted(plan.unknown.items())]  # fmt: skip
    out += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(out)


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
            seconds(step.waited_s),
            seconds(step.ran_s),
            seconds(step.ledger_s),
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
        return f"{report.database} is at target{left}: nothing to do ({seconds(report.total_s)})."
    undone = sum(step.outcome is Outcome.ROLLED_BACK for step in report.steps)
    parts = [f"{undone} rolled back"] if undone else [f"{len(report.applied)} applied"]
    parts += [f"{len(found)} {word}"
              for word, found in (("failed", report.failed), ("skipped", report.skipped))
              if found]  # fmt: skip
    return (
        f"{', '.join(parts)} in {seconds(report.total_s)} "
        f"(lease {seconds(report.lease_s)}, {report.ledger_commits} ledger commits)."
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


def _background(line: LineStatus) -> str:
    if line.background is None:
        return ""
    told = f", {line.background.version} in the background: {line.background.state.value}"
    going = line.background.going
    return told if going is None or going.percent is None else f"{told}, {going.percent:.0f}%"


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


def timing_text(run: RunTiming) -> str:
    """Returns a run as a table of timings in the order of beginning, and where its time went."""
    header = ("began", "line", "version", "outcome", "for others", "for a slot", "ran", "ledger",
              "rows", "bytes", "commits", "retries", "")  # fmt: skip
    critical = set(run.critical)
    rows = [
        (
            seconds(span.began_s),
            span.line,
            str(span.version),
            span.outcome,
            seconds(span.depended_s),
            seconds(span.queued_s),
            seconds(span.ran_s),
            seconds(span.ledger_s),
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
        f"{len(run.spans)} migration{'s'[: len(run.spans) != 1]} in {seconds(run.total_s)}: "
        f"{seconds(run.lease_s)} for the lease, {seconds(run.worked_s)} of work, "
        f"{run.concurrency:.1f} at once."
    )
    shown = table(header, rows, (0, 2, 4, 5, 6, 7, 8, 9, 10, 11))
    return "\n".join([head, shown, total, f"The end waited for (*): {path}"])


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
