"""What takes long whatever does it: rewriting a large table, filling a column by a model.

Each run is a process of its own (`rebuild`, `backfill`), so that its memory can be told.
"""

from __future__ import annotations

import os
import shutil

import anyio
import anyio.to_thread

from benchmarks.measure import Result, Target, Unit
from benchmarks.setting import Size, scratch_folder, told_by

_ROUNDS = 3
"""Runs kept of each contender: each takes from seconds to a minute."""


async def rebuild(size: Size) -> Result:
    """Measures rewriting a table of vectors, and returning to where it was."""
    samples: dict[str, list[float]] = {"ours": [], "floor": [], "rollback": []}
    peaks: dict[int, float] = {}
    rounds = min(size.rounds, _ROUNDS)
    with scratch_folder() as folder:
        for rows in (size.rows,) if size.is_quick else (size.rows, 3 * size.rows):
            made = folder / f"made-{rows}"
            await told_by("rebuild", "make", made, rows)
            for round_ in range(rounds if rows == size.rows else 1):
                for how in ("floor", "ours") if round_ % 2 else ("ours", "floor"):
                    path = folder / f"{how}-{rows}"
                    await anyio.to_thread.run_sync(shutil.copytree, made, path)
                    await anyio.to_thread.run_sync(os.sync)  # what is copied is not written later
                    told = await told_by("rebuild", how, path, rows)
                    await anyio.to_thread.run_sync(shutil.rmtree, path)
                    if how == "ours":
                        peaks[rows] = max(told["peak_mb"], peaks.get(rows, 0.0))
                    if rows == size.rows:
                        samples[how].append(told["rebuild_s"])
                    if how == "ours" and rows == size.rows:
                        samples["rollback"].append(told["rollback_s"])
            await anyio.to_thread.run_sync(shutil.rmtree, made)
    return Result(
        name="rebuild",
        what=f"{size.rows:,} rows of 384 floats and text; peak memory of the process in facts",
        samples=samples,
        targets=(
            Target(of="ours", against="floor", at_most=1 / 0.9),
            Target(of="rollback", within=0.1),
        ),
        facts={"peak_mb": {str(rows): round(peak) for rows, peak in peaks.items()}},
    )


async def backfill(size: Size) -> Result:
    """Measures filling a vector column by a model with the latency of a service."""
    names = ("function", "floor", "ours")
    samples: dict[str, list[float]] = {name: [] for name in names}
    told: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with scratch_folder() as folder:
        await told_by("backfill", "make", folder / "made", size.filled, 0)
        for round_ in range(min(size.rounds, _ROUNDS)):
            for name in names[round_ % 3 :] + names[: round_ % 3]:
                path = folder / name
                await anyio.to_thread.run_sync(shutil.copytree, folder / "made", path)
                one = await told_by("backfill", name, path, size.filled, 20)
                samples[name].append(one["took_s"])
                told[name].append(one)
                await anyio.to_thread.run_sync(shutil.rmtree, path)
        peaks = {}
        for rows in () if size.is_quick else (size.rows, 3 * size.rows):
            await told_by("backfill", "make", folder / "large", rows, 0)
            peaks[rows] = (await told_by("backfill", "ours", folder / "large", rows, 0))["peak_mb"]
            await anyio.to_thread.run_sync(shutil.rmtree, folder / "large")
    mine = told["ours"]
    samples["written"] = [one["written"] for one in mine]
    samples["loop delay"] = [one["lag_ms"] / 1000 for one in mine]
    samples["peak"] = [*peaks.values()] or [one["peak_mb"] for one in mine]
    return Result(
        name="backfill",
        what=(
            f"{size.filled:,} vectors of 256 floats, 8 calls of 32 texts and 20 ms in flight; "
            "function: the calls alone, floor: calls and commits by hand"
        ),
        samples=samples,
        targets=(
            Target(of="ours", against="function", at_most=1 / 0.9),
            Target(of="written", within=1.3),
            Target(of="loop delay", within=0.05),
            Target(of="peak", within=1500),
        ),
        units={"written": Unit.SHARE, "peak": Unit.MEGABYTES},
        facts={
            "peak_mb": {str(rows): round(peak) for rows, peak in peaks.items()},
            "floor_written": [one["written"] for one in told["floor"]],
        },
    )
