"""The timing report as one HTML file: what waited for what, what was slow, how it changed.

Needs the extra `report` (Plotly, whose script is put into the file, so that it opens anywhere and
asks no one). Not for deciding what a run's times are: that is `timing`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from aiomigrate.errors import ConfigurationError
from aiomigrate.render import bytes_text, seconds
from aiomigrate.timing import RunTiming, Span, waits

_SLOWEST = 12
_COLOURS = {"applied": "#2f80c2", "failed": "#d1495b", "rolled back": "#8e6bbf"}
_WAITED, _DEPENDED, _LEDGER, _MARK = "#b9bec6", "#8b93a1", "#f0a43a", "#19b38a"
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


def report_html(run: RunTiming, earlier: Sequence[RunTiming], *, database: str) -> str:
    """Returns a run's timing report as one self-contained HTML page.

    Args:
        run: The run.
        earlier: Other runs of the same database, for the trend; in any order.
        database: What to call the database: its URI, without secrets.

    Raises:
        ConfigurationError: Plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
        import plotly.io
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            "The HTML report needs Plotly, which is not installed.",
            "pip install 'aiomigrate[report]', or choose another --format.",
        ) from exc

    parts: list[str] = []

    def draw(title: str, note: str, figure: Any) -> None:
        if figure is None:
            return
        drawn = plotly.io.to_html(
            figure,
            full_html=False,
            include_plotlyjs=not any("Plotly.newPlot" in part for part in parts),
            config={"responsive": True, "displaylogo": False, "displayModeBar": False},
        )
        parts.append(f"<h2>{title}</h2><p>{note}</p>{drawn}")

    draw(
        "Timeline",
        "Grey is waiting (for what comes first, or for a slot), blue the operations (red where "
        "they failed, violet where they were undone), orange the journal; a green frame marks "
        "what the end waited for.",
        _timeline(go, run),
    )
    draw("Slowest", "The migrations that took longest.", _slowest(go, run))
    draw(
        "Trend",
        "How long each run was at work, and each migration that ran more than once.",
        _trend(go, [*earlier, run]),
    )
    return _page(run, database, "".join(parts))


def _page(run: RunTiming, database: str, drawn: str) -> str:
    facts = {
        "total": seconds(run.total_s),
        "waited for the lease": seconds(run.lease_s),
        "work, added up": seconds(run.worked_s),
        "at once, on average": f"{run.concurrency:.1f}",
        "migrations": str(len(run.spans)),
        "failed": str(sum(span.outcome == "failed" for span in run.spans)),
    }
    told = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    path = " → ".join(html.escape(f"{line} {version}") for line, version in run.critical)
    when = f"{run.started_at:%Y-%m-%d %H:%M:%S} UTC"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>aiomigrate run {html.escape(run.run_id)}</title><style>{_STYLE}</style></head><body>
<h1>Run {html.escape(run.run_id)}</h1>
<p>{html.escape(database)}<br>{when}, process {run.pid} on {html.escape(run.host)}</p>
<dl>{told}</dl>
<p>The end waited for: {path}</p>
{drawn}
<h2>Migrations</h2><div class="wide">{_table(run)}</div>
<script>{_SCRIPT}</script></body></html>
"""


def _table(run: RunTiming) -> str:
    header = ("line", "version", "outcome", "began", "for others", "for a slot", "ran", "ledger",
              "rows", "bytes", "commits", "retries", "description")  # fmt: skip
    texts = {"line", "outcome", "description"}

    def cell(tag: str, name: str, value: str) -> str:
        kind = " class='text why'" if name == "description" else " class='text'"
        return f"<{tag}{kind if name in texts else ''}>{html.escape(value)}</{tag}>"

    rows = ["".join(cell("th", name, name) for name in header)]
    for span in run.spans:
        values = (
            span.line, str(span.version), span.outcome, seconds(span.began_s),
            seconds(span.depended_s), seconds(span.queued_s), seconds(span.ran_s),
            seconds(span.ledger_s), str(span.rows),
            "" if span.size is None else bytes_text(span.size), str(span.commits),
            str(span.retries), span.error or span.description,
        )  # fmt: skip
        rows.append("".join(cell("td", n, v) for n, v in zip(header, values, strict=True)))
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _hover(span: Span) -> str:
    lines = [
        f"<b>{html.escape(span.line)} {span.version}</b> {span.outcome}",
        html.escape((span.error or span.description)[:120]),
        f"waited {seconds(span.depended_s)} for others, {seconds(span.queued_s)} for a slot",
        f"ran {seconds(span.ran_s)}, ledger {seconds(span.ledger_s)}",
        f"{span.rows} rows, {span.commits} commits, {span.retries} retries",
    ]
    return "<br>".join(line for line in lines if line)


def _bars(go: Any, spans: Sequence[Span], where: Sequence[str], *, in_time: bool) -> list[Any]:
    """Returns bars of waiting, running and journal, one behind the other.

    In time, waiting is drawn from where the one before of its line has ended.
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
        bar("waited for others", [b - w for b, w in zip(began, waited, strict=True)], depended,
            _DEPENDED),
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
        name="the end waited for it", y=[_short(s.line) for s in marked],
        x=[s.took_s for s in marked], base=[s.began_s for s in marked], orientation="h",
        marker={"color": "rgba(0,0,0,0)", "line": {"color": _MARK, "width": 2}}, hoverinfo="skip",
    )  # fmt: skip
    bars = _bars(go, run.spans, where, in_time=True)
    if run.lease_s:
        bars.append(go.Bar(name="lease", y=["(lease)"], x=[run.lease_s], orientation="h",
                           marker={"color": _WAITED}, showlegend=False,
                           hovertext=[f"waited {seconds(run.lease_s)} for the lease"],
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
    lines = [line("whole runs", [(run.started_at, run.total_s) for run in runs],
                  line={"dash": "dot", "color": _WAITED})]  # fmt: skip
    lines += [line(name, again[name]) for name in longest]
    return _figure(
        go, lines, 8,
        xaxis={"title": "", "automargin": True, "type": "date"},
        yaxis={"title": "seconds", "automargin": True, "rangemode": "tozero"},
    )  # fmt: skip
