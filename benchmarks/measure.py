"""Interleaved runs, their medians, and what machine they ran on.

Absolute times say little on a shared machine; ratios of contenders that took turns within one run
say much. Nothing here knows what is measured: for that see `cases`.
"""

from __future__ import annotations

import enum
import gc
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio.to_thread

Measured = Callable[[], Awaitable[object]]
"""What is timed."""

Prepare = Callable[[], Awaitable[Measured]]
"""Makes one run ready, untimed, and returns what is to be timed."""


class Unit(enum.StrEnum):
    """What a contender's samples are numbers of."""

    SECONDS = "s"
    MEGABYTES = "MB"
    PERCENT = "%"
    COUNT = "count"
    SHARE = "x"

    def text(self, value: float) -> str:
        """Returns a value as a person reads it."""
        if self is Unit.SECONDS:
            return f"{value:.2f} s" if abs(value) >= 10 else f"{value * 1000:.4g} ms"
        if self is Unit.COUNT:
            return f"{value:g}"
        return f"{value:.2f} {self}" if abs(value) < 100 else f"{value:.0f} {self}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One bound on what was measured: on a ratio, on a difference, or on a figure by itself.

    Attributes:
        of: The contender that is judged, by its median.
        against: The contender it is compared with; none where the figure is bounded by itself.
        at_most: Upper bound of `of / against`.
        at_least: Lower bound of `against / of`: how many times faster.
        within: Upper bound of `of - against`, or of `of` where there is no `against`, in the unit
            of its samples.
        limit: Two contenders, the first over the second: what nobody can be below who does what is
            judged. Where that is above the bound, it is out of reach.
    """

    of: str
    against: str | None = None
    at_most: float | None = None
    at_least: float | None = None
    within: float | None = None
    limit: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        bounds = (self.at_most, self.at_least, self.within)
        assert sum(bound is not None for bound in bounds) == 1, "one bound"
        assert self.limit is None or self.at_most is not None, "a limit is that of a ratio"
        assert self.within is not None or self.against is not None, "a ratio has two sides"

    def measured(self, medians: Mapping[str, float]) -> float:
        """Returns the figure that the bound is about."""
        value = medians[self.of]
        if self.against is None:
            return value
        if self.within is not None:
            return value - medians[self.against]
        ratio = value / medians[self.against]
        return ratio if self.at_least is None else 1 / ratio

    def is_met(self, medians: Mapping[str, float]) -> bool:
        """Returns whether the figure is within the bound."""
        value = self.measured(medians)
        if self.at_least is not None:
            return value >= self.at_least
        bound = self.within if self.at_most is None else self.at_most
        return bound is not None and value <= bound

    def out_of_reach(self, medians: Mapping[str, float]) -> float | None:
        """Returns the ratio of its limit where that is above the bound, else `None`."""
        if self.limit is None or self.at_most is None:
            return None
        one, other = self.limit
        ratio = medians[one] / medians[other]
        return ratio if ratio > self.at_most else None

    def edge(self, medians: Mapping[str, float]) -> float:
        """Returns the median of `of` at which the target is just met."""
        other = 0.0 if self.against is None else medians[self.against]
        if self.within is not None:
            return other + self.within
        return other * self.at_most if self.at_most is not None else other / (self.at_least or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one benchmark measured.

    Attributes:
        name: The benchmark.
        what: One sentence on what was measured.
        samples: The figure of every run, by contender, in the order they were made.
        units: Of those contenders whose samples are not seconds.
        targets: What the medians are held against.
        facts: Figures worth keeping that no target is about.
    """

    name: str
    what: str
    samples: Mapping[str, Sequence[float]]
    targets: Sequence[Target]
    units: Mapping[str, Unit] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def medians(self) -> dict[str, float]:
        """Median by contender."""
        return {name: statistics.median(values) for name, values in self.samples.items()}

    @property
    def missed(self) -> list[Target]:
        """The targets that are not met."""
        return [target for target in self.targets if not target.is_met(self.medians)]

    @property
    def missed_counts(self) -> list[Target]:
        """Those of them that are about counts, which no busy machine excuses."""
        return [target for target in self.missed if self.unit(target.of) is Unit.COUNT]

    def unit(self, contender: str) -> Unit:
        """Returns what a contender's samples are numbers of."""
        return self.units.get(contender, Unit.SECONDS)

    def bound(self, target: Target) -> str:
        """Returns a target as text."""
        if target.at_most is not None:
            return f"<= {target.at_most:.4g} x {target.against}"
        if target.at_least is not None:
            return f">= {target.at_least:g} x faster than {target.against}"
        limit = self.unit(target.of).text(target.within or 0)
        return f"<= {limit}" if target.against is None else f"<= {limit} over {target.against}"

    def reached(self, target: Target) -> str:
        """Returns what a target's figure came to, as text."""
        value = target.measured(self.medians)
        return f"{value:.2f} x" if target.within is None else self.unit(target.of).text(value)

    def verdict(self, target: Target) -> str:
        """Returns whether a target is met, and if not whether it could be, as text."""
        if target.is_met(self.medians):
            return "met"
        beyond = target.out_of_reach(self.medians)
        if beyond is None or target.limit is None:
            return "missed"
        one, other = target.limit
        return f"missed, out of reach: {one} {beyond:.2f} x {other}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as a JSON-ready dictionary."""
        medians = self.medians
        return {
            "name": self.name,
            "what": self.what,
            "units": {name: str(self.unit(name)) for name in self.samples},
            "medians": medians,
            "samples": {name: list(values) for name, values in self.samples.items()},
            "targets": [
                {
                    "target": self.bound(target),
                    "of": target.of,
                    "against": target.against,
                    "measured": target.measured(medians),
                    "at_most": target.at_most,
                    "at_least": target.at_least,
                    "within": target.within,
                    "met": target.is_met(medians),
                    "out_of_reach": target.out_of_reach(medians),
                }
                for target in self.targets
            ],
            "facts": dict(self.facts),
        }


async def interleaved(
    contenders: Mapping[str, Prepare],
    *,
    rounds: int,
    warmups: int = 1,
    after: Callable[[str, object], Awaitable[None]] | None = None,
) -> dict[str, list[float]]:
    """Lets every contender run once per round, in turns.

    The one that begins moves on by one each round, so that none always follows the same other.

    Args:
        contenders: By name.
        rounds: How many runs of each are kept.
        warmups: Rounds before those, whose times are thrown away.
        after: Called with the contender's name and what the run returned, after each run that is
            kept, untimed.

    Returns:
        Seconds by contender, in the order of the rounds.
    """
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmups, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took, result = await timed(await contenders[name]())
            if number >= 0:
                samples[name].append(took)
                if after is not None:
                    await after(name, result)
    return samples


async def timed(run: Measured) -> tuple[float, object]:
    """Returns the seconds that a run takes, and what it returns."""
    gc.collect()
    # What was written before, by whoever came first, is on the disk: it slows nobody.
    await anyio.to_thread.run_sync(os.sync)
    begun = time.perf_counter()
    result = await run()
    return time.perf_counter() - begun, result


def peak_mb() -> float:
    """Returns the peak memory of this process in MB.

    Not `ru_maxrss` where there is better: on Linux that begins with what the parent had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))
        if found:
            return int(found[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def machine() -> dict[str, Any]:
    """Returns what the figures depend on."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_gb": await anyio.to_thread.run_sync(_memory_gb),
        **{name: importlib.metadata.version(name) for name in ("aiomigrate", "lancedb", "pyarrow")},
    }


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
