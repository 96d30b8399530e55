"""Where the time of runs went: from the journal, as a table, JSON, a trace and a page."""

from __future__ import annotations

import datetime as dt
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiomigrate import Context, Migration, MigrationFailedError, RunTiming, op
from aiomigrate.ledger.records import Event, Kind
from aiomigrate.reporting.html import report_html
from aiomigrate.reporting.timing import Span, critical_path, runs_of, waits
from tests.tools import manager

AT = dt.datetime(2026, 11, 27, 12, tzinfo=dt.UTC)
T = pa.schema([("id", pa.string())])


def ended(line: str, version: int, at_s: float, ran_s: float, **more: Any) -> Event:
    """Returns the event of a migration that ended some seconds after `AT`."""
    return Event(
        lease="run", epoch=1, seq=0, at=AT + dt.timedelta(seconds=at_s), line=line,
        version=version, ran_s=ran_s, **{"kind": Kind.APPLIED, "run_id": "r1", **more},
    )  # fmt: skip


def opened(lease_s: float) -> Event:
    """Returns the event of a run that had waited for the lease until `AT`."""
    return Event(
        lease="run", epoch=1, seq=0, at=AT, kind=Kind.OPENED, run_id="r1", waited_s=lease_s
    )


def test_times_count_from_when_the_lease_was_asked_for() -> None:
    """Waiting for it comes first; a migration began as long before its end as it took."""
    (run,) = runs_of([opened(2.0), ended("a", 1, 5.0, 3.0, ledger_s=1.0, waited_s=0.5)])

    assert (run.started_at, run.lease_s, run.total_s) == (AT - dt.timedelta(seconds=2), 2.0, 7.0)
    assert (run.spans[0].began_s, run.spans[0].took_s, run.spans[0].ended_s) == (3.0, 4.0, 7.0)
    assert run.worked_s == 4.0


def test_the_critical_path_follows_line_and_dependencies() -> None:
    """Not what ran beside: b 1 ended late but nothing waited for it."""
    run = runs_of(
        [ended("a", 1, 2.0, 2.0), ended("b", 1, 4.5, 4.5), ended("c", 1, 5.0, 3.0),
         ended("c", 2, 6.0, 1.0)],
        {("c", 1): [("a", 1)]},
    )[0]  # fmt: skip

    assert run.critical == (("a", 1), ("c", 1), ("c", 2))
    assert run.concurrency == pytest.approx(10.5 / 6.0)


def test_failures_and_undoing_are_told_and_runs_without_migrations_left_out() -> None:
    """With the telling line of the error; another run is a run of its own."""
    failure = "Traceback (most recent call last):\n  here\nValueError: no"
    events = [
        ended("a", 1, 1.0, 1.0, kind=Kind.FAILED, error=failure),
        ended("a", 1, 9.0, 1.0, kind=Kind.ROLLED_BACK, run_id="r2"),
        Event(lease="run", epoch=3, seq=0, at=AT, kind=Kind.OPENED, run_id="r3"),
    ]
    first, second = runs_of(events)

    assert (first.spans[0].outcome, first.spans[0].error) == ("failed", "ValueError: no")
    assert second.spans[0].outcome == "rolled back"
    assert runs_of([]) == ()


spans = st.lists(
    st.builds(
        Span,
        line=st.sampled_from("abc"),
        version=st.integers(1, 9),
        began_s=st.floats(0, 100),
        depended_s=st.floats(0, 100),
        waited_s=st.floats(0, 100),
        ran_s=st.floats(0, 100),
        ledger_s=st.floats(0, 10),
    ),
    max_size=8,
    unique_by=lambda span: span.key,
)


@given(spans)
def test_any_spans_have_a_path_and_a_trace(drawn: list[Span]) -> None:
    """The path ends with what ended last, and no slice of a trace has a negative length."""
    drawn.sort(key=lambda span: span.began_s)
    path = critical_path(drawn, {})
    run = RunTiming(run_id="r", started_at=AT, spans=tuple(drawn), critical=path)
    slices = [e for e in run.to_trace()["traceEvents"] if e["ph"] == "X"]

    assert len(set(path)) == len(path)
    assert not drawn or path[-1] == max(drawn, key=lambda s: (s.ended_s, s.key)).key
    assert all(e["dur"] >= 0 for e in slices)
    assert all(0 <= w <= s.waited_s for w, s in zip(waits(drawn), drawn, strict=True))
    assert json.loads(json.dumps(run.to_dict()))["migrations"] == run.to_dict()["migrations"]


@given(spans)
def test_a_trace_is_one_that_viewers_draw(drawn: list[Span]) -> None:
    """Whole microseconds, a name for each thread, and no two slices of a thread overlap."""
    drawn.sort(key=lambda span: span.began_s)
    run = RunTiming(run_id="r", started_at=AT, lease_s=0.5, spans=tuple(drawn))
    trace = run.to_trace()["traceEvents"]
    named = {e["tid"] for e in trace if e["ph"] == "M" and e["name"] == "thread_name"}
    ended: dict[int, int] = {}

    assert {e["ph"] for e in trace} == {"M", "X"}
    assert all({"ph", "pid", "tid", "name"} <= set(e) for e in trace)
    assert all(e["args"]["name"] for e in trace if e["ph"] == "M")
    for event in (e for e in trace if e["ph"] == "X"):
        assert event["tid"] in named
        assert type(event["ts"]) is type(event["dur"]) is int
        assert event["ts"] >= ended.get(event["tid"], 0)
        ended[event["tid"]] = event["ts"] + event["dur"]


async def ran(database: Path) -> tuple[RunTiming, ...]:
    """Runs migrations that wait for one another, one of which fails; returns the timings."""

    async def slow(ctx: Context) -> None:
        await anyio.sleep(0.2)

    async def wrong(ctx: Context) -> None:
        raise ValueError("<b>wrong</b> on purpose")

    steps = [
        Migration(table="a", version=1, operations=[op.CreateTable(T), op.Run(slow)]),
        Migration(table="b", version=1, operations=[op.CreateTable(T)], depends_on={"a": 1}),
        Migration(table="b", version=2, operations=[op.Run(slow)], touches=("b",)),
        Migration(table="c", version=1, operations=[op.CreateTable(T)]),
    ]
    async with manager(database, steps) as migrating:
        await migrating.upgrade()
        await migrating.rollback({"c": 0})
    failing = Migration(table="a", version=2, description="Break", up=wrong)
    async with manager(database, [*steps, failing]) as migrating:
        with pytest.raises(MigrationFailedError):
            await migrating.upgrade()
        return await migrating.timings()


async def test_real_runs_are_timed(database: Path) -> None:
    """What slept took that long, what depended on it began after it, and that is the path."""
    runs = await ran(database)
    first = runs[0]
    took = {span.key: span for span in first.spans}

    assert [sorted(s.outcome for s in run.spans) for run in runs] == [
        ["applied"] * 4, ["rolled back"], ["applied", "failed"],
    ]  # fmt: skip
    assert took["a", 1].ran_s >= 0.2
    assert took["c", 1].size is None
    assert took["a", 1].size is not None
    assert took["b", 1].began_s >= took["a", 1].ended_s - 0.01
    assert took["b", 1].depended_s >= 0.19
    assert took["b", 1].waited_s >= took["b", 1].depended_s
    assert took["b", 2].depended_s < 0.05  # since the one before it on its line had ended
    assert first.critical == (("a", 1), ("b", 1), ("b", 2))
    assert first.total_s >= 0.4
    assert 0 < first.lease_s < first.total_s
    assert "a 1 > b 1 > b 2" in str(first)


async def test_a_report_tells_the_same_as_the_history(database: Path) -> None:
    """Waits by cause, totals, critical path and concurrency: fresh, and read back later."""

    async def slow(ctx: Context) -> None:
        await anyio.sleep(0.2)

    steps = [
        Migration(table="a", version=1, operations=[op.CreateTable(T), op.Run(slow)]),
        Migration(table="b", version=1, operations=[op.CreateTable(T)], depends_on={"a": 1}),
        Migration(table="c", version=1, operations=[op.CreateTable(T), op.Run(slow)]),
    ]
    async with manager(database, steps, concurrency=1) as migrating:
        report = await migrating.upgrade()
        (run,) = await migrating.timings()
    told, fresh = run.to_dict(), report.to_dict()
    waits = {s.line: (s.depended_s, s.waited_s - s.depended_s) for s in report.steps}

    assert report.critical == run.critical
    assert report.critical[-1] == max((s.ended_s, s.key) for s in run.spans)[1]
    assert report.concurrency == pytest.approx(run.concurrency, abs=0.3)
    assert 0 < report.concurrency < 1.5
    assert waits["a"][0] < 0.05
    assert waits["b"][0] >= 0.19
    assert max(waits["a"][1], waits["c"][1]) >= 0.19  # one of them had to wait for the slot
    assert waits["c"][0] < 0.05
    for name in ("rows", "commits", "retries"):
        assert fresh[name] == told[name]
    assert fresh["worked_s"] == pytest.approx(told["worked_s"], abs=0.1)
    by_line = {span.line: span for span in run.spans}
    for step in report.steps:
        assert by_line[step.line].depended_s == pytest.approx(step.depended_s)


async def test_the_page_holds_everything_and_nothing_of_others(database: Path) -> None:
    """One file: timeline, slowest, trend, table; texts escaped; no request to anywhere."""
    runs = await ran(database)
    page = report_html(runs[-1], runs[:-1], database="s3://bucket/<db>")
    own = re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)

    for title in ("Timeline", "Slowest", "Trend", "Migrations"):
        assert f"<h2>{title}</h2>" in own
    assert "&lt;b&gt;wrong&lt;/b&gt; on purpose" in own
    assert "<b>wrong</b>" not in own
    assert "s3://bucket/&lt;db&gt;" in own
    assert not re.findall(r"(?:src|href)=", own)
    assert page.count("Plotly.newPlot") >= 3


async def test_the_command_reports_in_every_form(database: Path, tmp_path: Path) -> None:
    """By default the last run as a table; by id another; to a file; a wrong id names the last."""
    runs = await ran(database)
    (tmp_path / "migrations").mkdir()

    def report(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "aiomigrate", "report", "--uri", str(database), *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    page = tmp_path / "page.html"
    table, trace = report(), report(runs[0].run_id[:6], "--format", "trace")
    html, wrong = report("--format", "html", "--output", str(page)), report("nonsense")

    assert f"run {runs[-1].run_id}" in table.stdout
    assert runs[0].run_id in str(json.loads(trace.stdout)["traceEvents"][0])
    assert html.returncode == 0
    assert "<h2>Timeline</h2>" in page.read_text()
    assert wrong.returncode == 2
    assert runs[-1].run_id in wrong.stderr
