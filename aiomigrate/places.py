"""How many migrations operate at once: places, lent to others while their holder waits.

Not for what waits for what, which is `runner`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import anyio

from aiomigrate.clock import Clock

MAX_LENT = 256
"""How many may be lent at once: whoever waits wakes at once, and the event loop is kept so long."""


class Places:
    """All places among those that operate at once."""

    def __init__(self, total: int) -> None:
        """All are free.

        Args:
            total: How many there are.
        """
        self.limiter = anyio.CapacityLimiter(total)
        self.lent = 0


class Place:
    """One of the places among those that operate at once, held inside `async with`.

    Attributes:
        waited_s: Seconds spent waiting to have it back after it was lent.
    """

    def __init__(self, places: Places, limit: anyio.CancelScope, clock: Clock) -> None:
        """Waits for nothing yet.

        Args:
            places: All of them.
            limit: The holder's time limit, in which waiting to have it back does not count.
            clock: Clocks.
        """
        self.waited_s = 0.0
        self._places = places
        self._limit = limit
        self._clock = clock
        self._is_held = False

    async def __aenter__(self) -> Self:
        """Waits for it."""
        await self._take()
        return self

    async def _take(self) -> None:
        try:
            self._places.limiter.acquire_on_behalf_of_nowait(self)
        except anyio.WouldBlock:
            await self._places.limiter.acquire_on_behalf_of(self)
        self._is_held = True

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives it back."""
        if self._is_held:
            self._is_held = False
            self._places.limiter.release_on_behalf_of(self)

    @contextlib.asynccontextmanager
    async def lent(self) -> AsyncIterator[None]:
        """Lets another have it inside; on failure or cancellation it is not asked for again.

        Keeps it where enough are lent already.
        """
        if not self._is_held or self._places.lent >= MAX_LENT:
            yield
            return
        self._is_held = False
        self._places.lent += 1
        self._places.limiter.release_on_behalf_of(self)
        try:
            yield
        finally:
            self._places.lent -= 1
        begun = self._clock.monotonic()
        deadline, self._limit.deadline = self._limit.deadline, math.inf
        await self._take()
        waited_s = self._clock.monotonic() - begun
        self._limit.deadline = deadline + waited_s
        self.waited_s += waited_s
