"""`python -m benchmarks`: runs them, prints a table and JSON, judges by the exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio

from benchmarks import against
from benchmarks.measure import Result, Target, machine

FORMAT = 2
"""Of the JSON document."""

_COLUMNS = ("benchmark", "judged", "against", "measured", "target", "verdict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs benchmarks and returns the exit code.

    Returns:
        0 when every target is met; with `--quick`, when every count is; else 1.
    """
    # Before lancedb is imported: it warns on stderr of every table in a new folder.
    os.environ.setdefault("RUST_LOG", "error")
    from benchmarks.cases import CASES
    from benchmarks.setting import FULL, QUICK

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Ratios of aiomigrate to bare LanceDB (floor) and to its predecessor (peer); "
        "with --against to another revision of itself.",
        epilog=against.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*",
                        help="a benchmark, as by --only; all by default")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="few and small; times only warn, counts still fail")  # fmt: skip
    parser.add_argument("--only", metavar="NAME", choices=CASES, action="append",
                        help=f"one of {', '.join(CASES)}; may be repeated")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the JSON there instead")
    parser.add_argument("--html", metavar="FILE", type=Path,
                        help="write a page of plots there too (needs Plotly)")  # fmt: skip
    parser.add_argument("--against", metavar="REV",
                        help="compare with a git revision; fails if slower")  # fmt: skip
    parser.add_argument("--pairs", metavar="N", type=int,
                        help=f"runs of both, with --against: {against.PAIRS}, quick "
                        f"{against.QUICK_PAIRS}")  # fmt: skip
    options = parser.parse_args(arguments)

    chosen = [*options.names, *(options.only or ())]
    if unknown := [name for name in chosen if name not in CASES]:
        parser.error(f"no benchmark {', '.join(unknown)}: there are {', '.join(CASES)}")
    names = [name for name in CASES if not chosen or name in chosen]
    if options.against is not None:
        if options.html is not None:
            parser.error("--html is not for --against")
        if options.pairs is not None and options.pairs < 2:
            parser.error("--pairs: two at least")
        return against.main(
            options.against,
            names,
            pairs=options.pairs or (against.QUICK_PAIRS if options.quick else against.PAIRS),
            quick=options.quick,
            written=options.json,
            machine=anyio.run(machine),
        )
    if options.pairs is not None:
        parser.error("--pairs is for --against")
    size = QUICK if options.quick else FULL

    async def run() -> tuple[list[Result], dict[str, Any]]:
        begun = time.perf_counter()
        results: list[Result] = []
        facts = await machine()
        for name in names:
            print(f"{name} ...", file=sys.stderr, end=" ", flush=True)
            started = time.perf_counter()
            results.append(await CASES[name](size))
            print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        print(table(results, quick=size.is_quick))
        return results, {
            "format": FORMAT,
            "quick": size.is_quick,
            "met": not any(result.missed for result in results),
            "took_s": time.perf_counter() - begun,
            "machine": facts,
            "benchmarks": [result.to_dict() for result in results],
        }

    results, document = anyio.run(run)
    text = json.dumps(document, indent=None if options.json is None else 2)
    if options.json is None:
        print(text)
    else:
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.html is not None:
        from benchmarks.page import page

        options.html.write_text(page(results, document["machine"]), encoding="utf-8")
    return exit_code(results, quick=size.is_quick)


def exit_code(results: Sequence[Result], *, quick: bool) -> int:
    """Returns 1 where a target is missed; in a quick run only where a count is."""
    failed = [r for r in results if (r.missed_counts if quick else r.missed)]
    return 1 if failed else 0


def verdict(result: Result, target: Target, *, quick: bool) -> str:
    """Returns whether a target is met, as text."""
    told = result.verdict(target)
    if quick and target in result.missed and target not in result.missed_counts:
        return f"{told} (quick: a warning)"
    return told.replace("missed", "MISSED")


def table(results: Sequence[Result], *, quick: bool) -> str:
    """Returns the results as text: a line for each target."""
    lines: list[tuple[str, ...]] = [_COLUMNS]
    for result in results:

        def median(name: str | None, result: Result = result) -> str:
            return "" if name is None else f"{name} {result.unit(name).text(result.medians[name])}"

        lines.extend(
            (
                result.name,
                median(target.of),
                median(target.against),
                result.reached(target),
                result.bound(target),
                verdict(result, target, quick=quick),
            )
            for target in result.targets
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines]  # fmt: skip
    notes = [f"{result.name}: {result.what}{_beside(result)}" for result in results]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:], "", *notes])


def _beside(result: Result) -> str:
    """Returns the medians of those that no target speaks of, as text."""
    judged = {name for target in result.targets for name in (target.of, target.against)}
    medians = result.medians
    said = [
        f"{name} {result.unit(name).text(medians[name])}" for name in medians if name not in judged
    ]
    return f" ({', '.join(said)})" if said else ""


if __name__ == "__main__":
    sys.exit(main())
