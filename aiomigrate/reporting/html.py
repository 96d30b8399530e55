"""Renders the timing report as one HTML file: timeline, slowest migrations, trend.

It needs the extra `report` (Plotly). The file contains Plotly's script, so that it works offline.
The benchmarks use the same page. `reporting.timing` computes the timings.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from aiomigrate.errors import ConfigurationError
from aiomigrate.reporting.timing import RunTiming, Span, waits
from aiomigrate.text import bytes_text, duration

_SLOWEST = 12
BLUE = "#2f80c2"
_COLOURS = {"applied": BLUE, "failed": "#d1495b", "rolled back": "#8e6bbf"}
_WAITED, _DEPENDED, _LEDGER, MARK = "#b9bec6", "#8b93a1", "#f0a43a", "#19b38a"
_ROW_PX, _HEAD_PX = 26, 110

_STYLE = """
:root { color-scheme: light dark;
        --back: #ffffff; --text: #1d2430; --soft: #5b6575; --line: #d9dee6; }
@media (prefers-color-scheme: dark) {
  :root { --back: #12161c; --text: #e6eaf0; --soft: #9aa5b4; --line: #2c3440; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 1.2rem; background: var(--back);
       color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; }
p { margin: .2rem 0; color: var(--soft); overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem;
     margin: 1rem 0; }
dl div { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .7rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-size: 1.15rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } .text { text-align: left; }
.why { white-space: normal; min-width: 14rem; }
"""

_SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function paint() {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue('--text').trim();
  const line = style.getPropertyValue('--line').trim();
  for (const plot of document.querySelectorAll('.js-plotly-plot'))
    Plotly.relayout(plot, {'font.color': text, 'xaxis.gridcolor': line, 'yaxis.gridcolor': line,
                           'xaxis.zerolinecolor': line, 'yaxis.zerolinecolor': line});
}
dark.addEventListener('change', paint);
paint();
"""


class Page:
    """A self-contained HTML page with a heading, facts and sections of plots; it works offline."""

    def __init__(self, title: str, heading: str) -> None:
        """Makes an empty page.

        Args:
            title: The title of the document.
            heading: The heading on the page.

        Raises:
            ConfigurationError: Plotly is not installed.
        """
        try:
            import plotly.graph_objects
            import plotly.io
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                "The HTML report needs Plotly, which is not installed.",
                "pip install 'aiomigrate[report]', or choose another --format.",
            ) from exc
        self.go: Any = plotly.graph_objects
        self._to_html: Any = plotly.io.to_html
        self._title = title
        self._heading = heading
        self._has_script = False
        self._parts: list[str] = []

    def add_paragraph(self, text: str) -> None:
        """Adds a paragraph; `text` is HTML."""
        self._parts.append(f"<p>{text}</p>")

    def add_facts(self, facts: Mapping[str, str]) -> None:
        """Adds short facts in boxes, values by name."""
        boxes = (
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
            for name, value in facts.items()
        )
        self._parts.append(f"<dl>{''.join(boxes)}</dl>")

    def add_heading(self, title: str) -> None:
        """Adds a heading, which begins a section."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")

    def add_table(self, table: str) -> None:
        """Adds a table, created by the function `table`; it may be wider than the page."""
        self._parts.append(f'<div class="wide">{table}</div>')

    def add_plot(self, figure: Any) -> None:
        """Adds a plot, created by `figure`."""
        plot = self._to_html(
            figure,
            full_html=False,
            include_plotlyjs=not self._has_script,
            config={"responsive": True, "displaylogo": False, "displayModeBar": False},
        )
        self._has_script = True
        self._parts.append(plot)

    def figure(self, traces: Sequence[Any], rows: int, **layout: Any) -> Any:
        """Returns a figure of horizontal bars, boxes or lines, with a height for its rows."""
        return _figure(self.go, traces, rows, **layout)

    def text(self) -> str:
        """Returns the page as HTML."""
        return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(self._heading)}</h1>
{"".join(self._parts)}
<script>{_SCRIPT}</script></body></html>
"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: Collection[str]) -> str:
    """Returns a table as HTML.

    Args:
        header: The names of its columns.
        rows: The rows, each with a value for every column.
        words: The columns that contain text, not numbers; the last of them may be long.
    """
    long = [name for name in header if name in words][-1:]

    def cell(tag: str, name: str, value: str) -> str:
        kind = " class='text why'" if name in long else " class='text'"
        return f"<{tag}{kind if name in words else ''}>{html.escape(value)}</{tag}>"

    lines = ["".join(cell("th", name, name) for name in header)]
    lines += ["".join(cell("td", n, v) for n, v in zip(header, r, strict=True)) for r in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def report_html(run: RunTiming, earlier: Sequence[RunTiming], *, database: str) -> str:
    """Returns a run's timing report as one self-contained HTML page.

    Args:
        run: The run.
        earlier: Other runs of the same database, for the trend, in any order.
        database: The name of the database: its URI, without secrets.

    Raises:
        ConfigurationError: Plotly is not installed.
    """
    page = Page(f"aiomigrate run {run.run_id}", f"Run {run.run_id}")
    when = f"{run.started_at:%Y-%m-%d %H:%M:%S} UTC"
    page.add_paragraph(
        f"{html.escape(database)}<br>{when}, process {run.pid} on {html.escape(run.host)}"
    )
    page.add_facts(
        {
            "total": duration(run.total_s),
            "waited for the lease": duration(run.lease_s),
            "total work": duration(run.worked_s),
            "average concurrency": f"{run.concurrency:.1f}",
            "migrations": str(len(run.spans)),
            "failed": str(sum(span.outcome == "failed" for span in run.spans)),
        }
    )
    path = " → ".join(html.escape(f"{line} {version}") for line, version in run.critical)
    page.add_paragraph(f"Critical path: {path}")
    page.add_heading("Timeline")
    page.add_paragraph(
        "Grey is time spent waiting for dependencies or for a slot, blue is time spent in "
        "operations (red if they failed, violet if they were rolled back), and orange is time "
        "spent on the journal. A green frame marks the critical path: the migrations that the end "
        "of the run waited for."
    )
    page.add_plot(_timeline(page.go, run))
    page.add_heading("Slowest")
    page.add_paragraph("The migrations that took longest.")
    page.add_plot(_slowest(page.go, run))
    if (trend := _trend(page.go, [*earlier, run])) is not None:
        page.add_heading("Trend")
        page.add_paragraph("The duration of each run, and of each migration that ran repeatedly.")
        page.add_plot(trend)
    page.add_heading("Migrations")
    page.add_table(_table(run))
    return page.text()


def _table(run: RunTiming) -> str:
    header = ("line", "version", "outcome", "began", "waited for deps", "waited for slot", "ran",
              "ledger", "rows", "bytes", "commits", "retries", "description")  # fmt: skip
    rows = (
        (
            span.line, str(span.version), span.outcome, duration(span.began_s),
            duration(span.depended_s), duration(span.queued_s), duration(span.ran_s),
            duration(span.ledger_s), str(span.rows),
            "" if span.size is None else bytes_text(span.size), str(span.commits),
            str(span.retries), span.error or span.description,
        )
        for span in run.spans
    )  # fmt: skip
    return table(header, rows, words=("line", "outcome", "description"))


def _hover(span: Span) -> str:
    lines = [
        f"<b>{html.escape(span.line)} {span.version}</b> {span.outcome}",
        html.escape((span.error or span.description)[:120]),
        f"waited {duration(span.depended_s)} for dependencies",
        f"waited {duration(span.queued_s)} for a slot",
        f"ran {duration(span.ran_s)}, ledger {duration(span.ledger_s)}",
        f"{span.rows} rows, {span.commits} commits, {span.retries} retries",
    ]
    return "<br>".join(line for line in lines if line)


def _bars(go: Any, spans: Sequence[Span], where: Sequence[str], *, in_time: bool) -> list[Any]:
    """Returns bars for waiting, running and the journal, one after the other.

    Args:
        go: The module `plotly.graph_objects`.
        spans: The migrations.
        where: The row of each migration.
        in_time: Whether bars start at their time in the run, and waiting starts where the previous
            migration of the same line ended; otherwise every bar starts at zero.
    """
    waited = waits(spans) if in_time else [span.waited_s for span in spans]
    hover = [_hover(span) for span in spans]

    def bar(name: str, base: Sequence[float], long: Sequence[float], colour: Any) -> Any:
        return go.Bar(
            name=name, y=where, x=long, base=base, orientation="h", marker={"color": colour},
            hovertext=hover, hoverinfo="text",
        )  # fmt: skip

    began = [span.began_s if in_time else span.waited_s for span in spans]
    depended = [min(s.depended_s, w) for s, w in zip(spans, waited, strict=True)]
    queued = [w - d for w, d in zip(waited, depended, strict=True)]
    running = [_COLOURS.get(span.outcome, _COLOURS["applied"]) for span in spans]
    return [
        bar("waited for dependencies", [b - w for b, w in zip(began, waited, strict=True)],
            depended, _DEPENDED),
        bar("waited for a slot", [b - q for b, q in zip(began, queued, strict=True)], queued,
            _WAITED),
        bar("ran", began, [s.ran_s for s in spans], running),
        bar("ledger", [b + s.ran_s for b, s in zip(began, spans, strict=True)],
            [s.ledger_s for s in spans], _LEDGER),
    ]  # fmt: skip


def _figure(go: Any, bars: Sequence[Any], rows: int, **layout: Any) -> Any:
    return go.Figure(
        data=list(bars),
        layout={
            "barmode": "overlay",
            "height": _HEAD_PX + _ROW_PX * max(rows, 2),
            "margin": {"l": 10, "r": 10, "t": 10, "b": 40},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
            "xaxis": {"title": "seconds", "rangemode": "tozero", "automargin": True},
            "yaxis": {"automargin": True, "autorange": "reversed", "type": "category"},
            **layout,
        },
    )


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _timeline(go: Any, run: RunTiming) -> Any:
    where = [_short(span.line) for span in run.spans]
    critical = set(run.critical)
    marked = [span for span in run.spans if span.key in critical]
    frame = go.Bar(
        name="critical path", y=[_short(s.line) for s in marked],
        x=[s.took_s for s in marked], base=[s.began_s for s in marked], orientation="h",
        marker={"color": "rgba(0,0,0,0)", "line": {"color": MARK, "width": 2}}, hoverinfo="skip",
    )  # fmt: skip
    bars = _bars(go, run.spans, where, in_time=True)
    if run.lease_s:
        bars.append(go.Bar(name="lease", y=["(lease)"], x=[run.lease_s], orientation="h",
                           marker={"color": _WAITED}, showlegend=False,
                           hovertext=[f"waited {duration(run.lease_s)} for the lease"],
                           hoverinfo="text"))  # fmt: skip
    order = ["(lease)"] * bool(run.lease_s) + list(dict.fromkeys(where))
    figure = _figure(go, [*bars, frame], len(order))
    figure.update_yaxes(categoryorder="array", categoryarray=order)
    return figure


def _slowest(go: Any, run: RunTiming) -> Any:
    spans = sorted(run.spans, key=lambda span: -span.took_s)[:_SLOWEST]
    where = [_short(f"{span.line} {span.version}") for span in spans]
    return _figure(go, _bars(go, spans, where, in_time=False), len(spans))


def _trend(go: Any, runs: Sequence[RunTiming]) -> Any:
    runs = sorted(runs, key=lambda run: run.started_at)
    if len(runs) < 2:
        return None

    def line(name: str, points: Sequence[tuple[Any, float]], **more: Any) -> Any:
        return go.Scatter(name=name, x=[at for at, _ in points], y=[took for _, took in points],
                          mode="lines+markers", **more)  # fmt: skip

    found: dict[str, list[tuple[Any, float]]] = {}
    for run in runs:
        for span in run.spans:
            name = _short(f"{span.line} {span.version}")
            found.setdefault(name, []).append((run.started_at, span.took_s))
    again = {name: points for name, points in found.items() if len(points) > 1}
    longest = sorted(again, key=lambda name: -max(took for _, took in again[name]))[:_SLOWEST]
    lines = [line("whole run", [(run.started_at, run.total_s) for run in runs],
                  line={"dash": "dot", "color": _WAITED})]  # fmt: skip
    lines += [line(name, again[name]) for name in longest]
    return _figure(
        go, lines, 8,
        xaxis={"title": "", "automargin": True, "type": "date"},
        yaxis={"title": "seconds", "automargin": True, "rangemode": "tozero"},
    )  # fmt: skip
