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

from benchmarks.measure import Result, machine

FORMAT = 1
"""Of the JSON document."""

_COLUMNS = ("benchmark", "ours", "floor", "peer", "few", "many", "ratio", "target", "verdict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs benchmarks and returns the exit code.

    Returns:
        0 when every target is met, or with `--quick`; 1 when one is missed.
    """
    # Before lancedb is imported: it warns on stderr of every table in a new folder.
    os.environ.setdefault("RUST_LOG", "error")
    from benchmarks.cases import CASES, FULL, QUICK

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Ratios of aiomigrate to bare LanceDB (floor) and to its predecessor (peer).",
    )
    parser.add_argument("--quick", action="store_true", help="few and small; times only warn")
    parser.add_argument("--only", metavar="NAME", choices=CASES, action="append",
                        help=f"one of {', '.join(CASES)}; may be repeated")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the JSON there instead")
    options = parser.parse_args(arguments)

    size = QUICK if options.quick else FULL
    names = [name for name in CASES if not options.only or name in options.only]

    async def run() -> dict[str, Any]:
        begun = time.perf_counter()
        results: list[Result] = []
        facts = await machine()
        for name in names:
            print(f"{name} ...", file=sys.stderr, end=" ", flush=True)
            started = time.perf_counter()
            results.append(await CASES[name](size))
            print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        print(table(results, quick=size.is_quick))
        return {
            "format": FORMAT,
            "quick": size.is_quick,
            "met": all(result.is_met for result in results),
            "took_s": time.perf_counter() - begun,
            "machine": facts,
            "benchmarks": [result.to_dict() for result in results],
        }

    document = anyio.run(run)
    text = json.dumps(document, indent=None if options.json is None else 2)
    if options.json is None:
        print(text)
    else:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if document["met"] or options.quick else 1


def table(results: Sequence[Result], *, quick: bool) -> str:
    """Returns the results as text: a line per target, medians in milliseconds."""
    lines: list[tuple[str, ...]] = [_COLUMNS]
    for result in results:
        medians = result.medians
        cells = [f"{medians[c] * 1000:.1f} ms" if c in medians else "" for c in _COLUMNS[1:6]]
        for target in result.targets:
            missed = "missed (quick: a warning)" if quick else "MISSED"
            verdict = "met" if target.is_met(medians) else missed
            ratio = f"{target.ratio(medians):.2f}"
            lines.append((result.name, *cells, ratio, str(target), verdict))
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines]  # fmt: skip
    notes = [f"{result.name}: {result.what}" for result in results]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:], "", *notes])


if __name__ == "__main__":
    sys.exit(main())
