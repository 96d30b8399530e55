"""Interleaved runs, their medians, and what machine they ran on.

Absolute times say little on a shared machine; ratios of contenders that took turns within one run
say much. Nothing here knows what is measured: for that see `cases`.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread

Measured = Callable[[], Awaitable[object]]
"""What is timed."""

Prepare = Callable[[], Awaitable[Measured]]
"""Makes one run ready, untimed, and returns what is to be timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound on the ratio of two contenders' medians.

    Attributes:
        of: The contender that is judged.
        against: The contender it is compared with.
        at_most: Upper bound of `of / against`, if there is one.
        at_least: Lower bound of `against / of`: how many times faster, if there is one.
    """

    of: str
    against: str
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        if self.at_most is not None:
            return f"<= {self.at_most:g} x {self.against}"
        return f">= {self.at_least:g} x faster than {self.against}"

    def ratio(self, medians: Mapping[str, float]) -> float:
        """Returns the ratio that the bound is about."""
        ratio = medians[self.of] / medians[self.against]
        return ratio if self.at_most is not None else 1 / ratio

    def is_met(self, medians: Mapping[str, float]) -> bool:
        """Returns whether the ratio is within the bound."""
        ratio = self.ratio(medians)
        if self.at_most is not None:
            return ratio <= self.at_most
        return self.at_least is None or ratio >= self.at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one benchmark measured.

    Attributes:
        name: The benchmark.
        what: One sentence on what was measured.
        samples: Seconds of every run, by contender, in the order they were made.
        targets: What the medians are held against.
        facts: Figures worth keeping that are not times.
    """

    name: str
    what: str
    samples: Mapping[str, Sequence[float]]
    targets: Sequence[Target]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds by contender."""
        return {name: statistics.median(times) for name, times in self.samples.items()}

    @property
    def is_met(self) -> bool:
        """Whether every target is met."""
        return all(target.is_met(self.medians) for target in self.targets)

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as a JSON-ready dictionary."""
        medians = self.medians
        return {
            "name": self.name,
            "what": self.what,
            "medians_s": medians,
            "samples_s": {name: list(times) for name, times in self.samples.items()},
            "targets": [
                {
                    "target": str(target),
                    "of": target.of,
                    "against": target.against,
                    "ratio": target.ratio(medians),
                    "at_most": target.at_most,
                    "at_least": target.at_least,
                    "met": target.is_met(medians),
                }
                for target in self.targets
            ],
            "facts": dict(self.facts),
        }


async def interleaved(
    contenders: Mapping[str, Prepare], *, rounds: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Lets every contender run once per round, in turns.

    The one that begins moves on by one each round, so that none always follows the same other.

    Args:
        contenders: By name.
        rounds: How many runs of each are kept.
        warmups: Rounds before those, whose times are thrown away.

    Returns:
        Seconds by contender, in the order of the rounds.
    """
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmups, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            run = await contenders[name]()
            gc.collect()
            begun = time.perf_counter()
            await run()
            took = time.perf_counter() - begun
            if number >= 0:
                samples[name].append(took)
    return samples


async def machine() -> dict[str, Any]:
    """Returns what the figures depend on."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory_gb": await anyio.to_thread.run_sync(_memory_gb),
        **{name: importlib.metadata.version(name) for name in ("aiomigrate", "lancedb", "pyarrow")},
    }


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
