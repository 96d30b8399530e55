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


class Place:
    """One of the places among those that operate at once, held inside `async with`.

    Attributes:
        waited_s: Seconds spent waiting to have it back after it was lent.
    """

    def __init__(
        self, places: anyio.CapacityLimiter, limit: anyio.CancelScope, clock: Clock
    ) -> None:
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
        await self._places.acquire_on_behalf_of(self)
        self._is_held = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives it back."""
        if self._is_held:
            self._is_held = False
            self._places.release_on_behalf_of(self)

    @contextlib.asynccontextmanager
    async def lent(self) -> AsyncIterator[None]:
        """Lets another have it inside; on failure or cancellation it is not asked for again."""
        if not self._is_held:
            yield
            return
        self._is_held = False
        self._places.release_on_behalf_of(self)
        yield
        begun = self._clock.monotonic()
        deadline, self._limit.deadline = self._limit.deadline, math.inf
        await self._places.acquire_on_behalf_of(self)
        self._is_held = True
        waited_s = self._clock.monotonic() - begun
        self._limit.deadline = deadline + waited_s
        self.waited_s += waited_s
