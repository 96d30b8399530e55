"""What being migrated by aiomigrate costs beside time: memory, and the processor in a long run.

Each run is a process of its own: `wide` migrates many tables, `hour` works for an hour by a clock
that hurries.
"""

from __future__ import annotations

from benchmarks.measure import Result, Target, Unit
from benchmarks.setting import Size, scratch_folder, told_by


async def memory(size: Size) -> Result:
    """Measures the peak memory of migrating many tables, over that of the same calls by hand."""
    told = await _told("wide", size.tables, size)
    samples = {name: [one["peak_mb"] for one in runs] for name, runs in told.items()}
    return Result(
        name="memory",
        what=f"peak memory of a process that migrates {size.tables} tables through two versions",
        samples=samples,
        targets=(Target(of="ours", against="floor", within=150),),
        units=dict.fromkeys(samples, Unit.MEGABYTES),
    )


async def overhead(size: Size) -> Result:
    """Measures what lease, journal and progress cost in a run of an hour, simulated.

    The processor's time, in all threads, that the run takes more than the same work by hand, over
    the time that passed on its clock: what the ledger waits for is waited for beside the work.
    """
    told = await _told("hour", size.simulated_s, size)
    samples = {name: [one["cpu_s"] for one in runs] for name, runs in told.items()}
    samples["overhead"] = [
        100 * (ours["cpu_s"] - floor["cpu_s"]) / ours["simulated_s"]
        for ours, floor in zip(told["ours"], told["floor"], strict=True)
    ]
    return Result(
        name="overhead",
        what=(
            f"processor seconds of a run of {size.simulated_s} s on a clock that hurries: four "
            "lines, a migration every minute on each, progress told every second"
        ),
        samples=samples,
        targets=(Target(of="overhead", within=0.5),),
        units={"overhead": Unit.PERCENT},
        facts={"runs": told["ours"]},
    )


async def _told(module: str, amount: int, size: Size) -> dict[str, list[dict[str, float]]]:
    """Lets processes of ours and of the floor take turns; returns what each tells of itself."""
    names = ("ours", "floor")
    told: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_ in range(size.rounds):
        for name in names if round_ % 2 else names[::-1]:
            with scratch_folder() as folder:
                told[name].append(await told_by(module, name, folder / "database", amount))
    return told
