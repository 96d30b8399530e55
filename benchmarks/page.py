"""The results as one HTML file: every run of every contender, and the line each target draws.

It has the page and the look of `aiomigrate report --format html`, and needs the same extra.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from aiomigrate.reporting.html import BLUE, MARK, Page, table
from benchmarks.measure import Result, Unit

_OTHER = "#8a93a0"
_WIDE = 20
"""Between the slowest and the fastest contender: beyond it the axis is logarithmic."""


def page(results: Sequence[Result], machine: Mapping[str, Any]) -> str:
    """Returns the page.

    Args:
        results: In their order.
        machine: What the figures depend on.

    Raises:
        ConfigurationError: Plotly is not installed.
    """
    made = Page("aiomigrate benchmarks", "Benchmarks")
    targets = [target for result in results for target in result.targets]
    missed = sum(len(result.missed) for result in results)
    made.add_paragraph(
        "Contenders took turns within one run. Each dot is a run, the box holds the middle half "
        "and its median; the green mark is where the judged contender's median meets its target."
    )
    made.add_facts({name.replace("_", " "): str(value) for name, value in machine.items()})
    made.add_facts({"targets": str(len(targets)), "met": str(len(targets) - missed)})
    made.add_table(_summary(results))
    for result in results:
        made.add_heading(result.name)
        made.add_paragraph(html.escape(result.what))
        for unit in Unit:
            names = [name for name in result.samples if result.unit(name) is unit]
            if names:
                made.add_plot(_distribution(made, result, names, unit))
    return made.text()


def _summary(results: Sequence[Result]) -> str:
    rows = [
        (
            result.name,
            result.verdict(target),
            target.of,
            result.unit(target.of).text(result.medians[target.of]),
            result.reached(target),
            result.bound(target),
        )
        for result in results
        for target in result.targets
    ]
    header = ("benchmark", "verdict", "judged", "median", "measured", "target")
    return table(header, rows, words=("benchmark", "verdict", "judged", "target"))


def _distribution(made: Page, result: Result, names: Sequence[str], unit: Unit) -> Any:
    """Returns a box of each contender's runs, and marks of the targets of those judged."""
    factor = 1000 if unit is Unit.SECONDS else 1
    judged = {target.of for target in result.targets}
    traces = [
        made.go.Box(
            name=name, x=[value * factor for value in result.samples[name]],
            y=[name] * len(result.samples[name]), orientation="h", boxpoints="all", jitter=0.5,
            pointpos=0, marker={"color": BLUE if name in judged else _OTHER, "size": 5},
            line={"width": 1}, fillcolor="rgba(0,0,0,0)", showlegend=False,
        )
        for name in names
    ]  # fmt: skip
    marked = [target for target in result.targets if target.of in names]
    if marked:
        edges = [target.edge(result.medians) * factor for target in marked]
        traces.append(
            made.go.Scatter(
                name="target", x=edges, y=[target.of for target in marked], mode="markers",
                marker={"symbol": "line-ns-open", "size": 30, "color": MARK,
                        "line": {"width": 3}},
                hovertext=[f"{result.bound(t)}: {result.reached(t)}" for t in marked],
                hoverinfo="text",
            )
        )  # fmt: skip
    medians = [result.medians[name] for name in names]
    is_wide = min(medians) > 0 and max(medians) / min(medians) > _WIDE
    axis = {"title": "milliseconds" if unit is Unit.SECONDS else unit, "automargin": True}
    kind = {"type": "log"} if is_wide else {"rangemode": "tozero"}
    return made.figure(traces, len(names), xaxis={**axis, **kind})
