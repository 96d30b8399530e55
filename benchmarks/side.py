"""One side of `--against`: a process that runs a benchmark's part in `ours` each time it is asked.

`python -m benchmarks.side NAME FOLDER TREE full|quick` makes its databases in FOLDER with the
aiomigrate of TREE, and prints as JSON what it can run: names, and how often for one pair. For each
name that it then reads it makes a run and prints its figures by name. It ends with its input. It
compares nothing: that is `against`.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import lancedb
import pyarrow as pa
from lancedb import _lancedb as native

import aiomigrate
from benchmarks.measure import timed
from benchmarks.ours import SIDES
from benchmarks.setting import FULL, QUICK, Side, Size

TOOK = "took"
"""Seconds, by the benchmark's own clock or around the run. A figure may also be `... MB`."""

CALLS, COMMITS, REQUESTS = "LanceDB calls", "ledger commits", "requests"
COUNTS = (CALLS, COMMITS, REQUESTS)
"""Figures that are counts."""

SIZES = {
    "full": replace(FULL, events=1000, simulated_s=900, rows=200_000, filled=96_000),
    "quick": QUICK,
}
"""What is large is smaller than where it is held against the floor: each side makes its own, and
does it more often."""


class Calls:
    """Counts the calls of LanceDB's native half that are awaited: its work, whoever asks for it."""

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()

    async def install(self) -> None:
        """Wraps the methods of LanceDB's classes, in this process for good."""
        table: Any = await (await lancedb.connect_async("memory://")).create_table(
            "example", schema=pa.schema([pa.field("id", pa.int64())])
        )
        inner = table._inner  # noqa: SLF001 - what is native is nowhere else
        kinds = (native.Connection, native.Table, native.Query, native.VectorQuery)
        for kind in (*kinds, type(inner.branches), type(inner.tags)):
            for name, method in list(vars(kind).items()):
                if not name.startswith("_") and callable(method):
                    setattr(kind, name, self._wrapped(f"{kind.__name__}.{name}", method))

    def _wrapped(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if inspect.isawaitable(result):
                self.made[name] += 1
            return result

        return call


async def measured(side: Side, calls: Calls) -> dict[str, float]:
    """Returns what a run measured."""
    run = await side.prepare()
    calls.made.clear()
    took, result = await timed(run)
    figures = dict(result) if isinstance(result, Mapping) else {TOOK: took}
    if isinstance(result, aiomigrate.Report):
        figures[COMMITS] = result.ledger_commits
    if not side.is_process:
        figures[CALLS] = calls.made.total()
    if side.counts is not None:
        figures |= await side.counts()
    return figures


async def main(name: str, folder: Path, tree: Path, size: Size) -> None:
    """Makes a run for each line of the input."""
    assert Path(aiomigrate.__file__).is_relative_to(tree), aiomigrate.__file__
    sides = await SIDES[name](folder, size)
    calls = Calls()
    await calls.install()
    print(json.dumps({part: side.runs for part, side in sides.items()}), flush=True)
    while asked := (await anyio.to_thread.run_sync(sys.stdin.readline)).strip():
        print(json.dumps(await measured(sides[asked], calls)), flush=True)


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), SIZES[sys.argv[4]])
