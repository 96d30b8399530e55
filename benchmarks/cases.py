"""The benchmarks by name. What each measures is in the module of its subject."""

from __future__ import annotations

from benchmarks import bulk, footprint, remote, runs, starts
from benchmarks.setting import Case

CASES: dict[str, Case] = {
    "nothing-to-do": starts.nothing_to_do,
    "flat-tables": starts.flat_tables,
    "flat-events": starts.flat_events,
    "flat-scripts": starts.flat_scripts,
    "process": starts.process,
    "imports": starts.imports,
    "first-run": runs.first_run,
    "together": runs.together,
    "chain": runs.chain,
    "operation": runs.operation,
    "memo-app": runs.memo_app,
    "s3-start": remote.remote_start,
    "s3-run": remote.remote_run,
    "memory": footprint.memory,
    "overhead": footprint.overhead,
    "rebuild": bulk.rebuild,
    "backfill": bulk.backfill,
}
"""In the order they run."""
