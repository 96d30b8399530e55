"""The two clocks, as one argument, so that tests can hold them."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from dataclasses import dataclass


def _elapsed() -> float:
    # Time passes for a lease while the machine sleeps, so the clock must count that too.
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


@dataclass(frozen=True, slots=True)
class Clock:
    """A monotonic clock for durations and leases, a wall clock for records.

    Attributes:
        monotonic: Seconds that never go back, counting time asleep where the system can.
        wall: The moment, UTC-aware.
    """

    monotonic: Callable[[], float] = _elapsed
    wall: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)
