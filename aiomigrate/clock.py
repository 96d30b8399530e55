"""The monotonic and the wall clock, passed as one argument so that tests can replace them."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from dataclasses import dataclass


def _elapsed() -> float:
    # A lease also ages while the machine is suspended, so the clock must count that time.
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


@dataclass(frozen=True, slots=True)
class Clock:
    """A monotonic clock for durations and leases, and a wall clock for records.

    Attributes:
        monotonic: Returns seconds that never decrease; includes suspended time where the system
            provides `CLOCK_BOOTTIME`.
        wall: Returns the current time, aware, in UTC.
    """

    monotonic: Callable[[], float] = _elapsed
    wall: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)
