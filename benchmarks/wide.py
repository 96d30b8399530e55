"""One upgrade of many tables, in a process of its own, so that its memory can be told.

`python -m benchmarks.wide HOW DATABASE TABLES` makes tables and adds a column to each by HOW
(`floor`: by hand; `ours`: by migrations), and prints its peak memory as JSON. For what is judged,
see `footprint`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anyio

from benchmarks import floor, workload
from benchmarks.measure import peak_mb


async def main(how: str, path: str, tables: int) -> None:
    """Runs it and prints what it took."""
    names = workload.table_names(tables)
    facts = {}
    if how == "ours":
        from benchmarks.setting import migrated

        report = await migrated(path, [one for name in names for one in workload.grown(name, 2)])
        assert len(report.applied) == 2 * tables
        facts["ledger_commits"] = report.ledger_commits
    else:
        await floor.grow(path, names, range(1, 3), concurrency=16)
    print(json.dumps({"peak_mb": peak_mb(), **facts}))


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], str(Path(sys.argv[2]).absolute()), int(sys.argv[3]))
