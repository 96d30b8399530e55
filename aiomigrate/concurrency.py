"""Running several things at once, and how many migrations operate at once.

What runs beside what is decided by `runs.scheduler`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar

import anyio

from aiomigrate.clock import Clock
from aiomigrate.errors import AiomigrateError, MigrationFailedError

T = TypeVar("T")

_AT_ONCE = 16


async def run_each(
    items: Iterable[T], work: Callable[[T], Awaitable[None]], *, at_once: int = _AT_ONCE
) -> None:
    """Runs the same work on each item, a few at once. The first failure cancels the others.

    Args:
        items: The items; with none, nothing happens.
        work: The work on one item.
        at_once: The most items worked on at one time.

    Raises:
        Exception: What `work` raised.
    """
    given = list(items)
    if at_once == 1 or len(given) == 1:
        for item in given:
            await work(item)
        return
    left = iter(given)

    async def some() -> None:
        for item in left:
            await work(item)

    try:
        async with anyio.create_task_group() as group:
            for _ in range(min(at_once, len(given))):
                group.start_soon(some)
    except BaseExceptionGroup as failures:
        raise sole_error(failures) from None


def sole_error(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Returns the one exception a caller should see: an error of ours before any other."""
    flat: list[BaseException] = []
    stack: list[BaseException] = [failures]
    while stack:
        item = stack.pop()
        if isinstance(item, BaseExceptionGroup):
            stack.extend(reversed(item.exceptions))
        else:
            flat.append(item)
    ours = [e for e in flat if isinstance(e, (AiomigrateError, MigrationFailedError))]
    fatal = [e for e in flat if not isinstance(e, Exception)]
    return (fatal or ours or flat)[0]


MAX_RELEASED = 256
"""Most slots released at one time: their holders wake together, which blocks the event loop."""


class Slots:
    """The slots of one run: as many migrations operate at once as there are slots."""

    def __init__(self, total: int) -> None:
        """Makes all slots, free.

        Args:
            total: How many there are.
        """
        self.limiter = anyio.CapacityLimiter(total)
        self.released = 0


class Slot:
    """One concurrency slot, held inside `async with` and released while its holder waits.

    Attributes:
        waited_s: Seconds spent waiting to take it again after it was released.
    """

    def __init__(self, slots: Slots, limit: anyio.CancelScope, clock: Clock) -> None:
        """Takes no slot yet.

        Args:
            slots: All slots of the run.
            limit: The holder's time limit. Waiting to take the slot again does not count in it.
            clock: Clocks.
        """
        self.waited_s = 0.0
        self._slots = slots
        self._limit = limit
        self._clock = clock
        self._is_held = False

    async def __aenter__(self) -> Self:
        """Waits for a free slot and takes it."""
        await self._take()
        return self

    async def _take(self) -> None:
        try:
            self._slots.limiter.acquire_on_behalf_of_nowait(self)
        except anyio.WouldBlock:
            await self._slots.limiter.acquire_on_behalf_of(self)
        self._is_held = True

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the slot back, if it is held."""
        if self._is_held:
            self._is_held = False
            self._slots.limiter.release_on_behalf_of(self)

    @contextlib.asynccontextmanager
    async def released(self) -> AsyncIterator[None]:
        """Releases the slot inside, and takes it again afterwards.

        After a failure or a cancellation it is not taken again. When `MAX_RELEASED` slots are
        released already, this one is kept.
        """
        if not self._is_held or self._slots.released >= MAX_RELEASED:
            yield
            return
        self._is_held = False
        self._slots.released += 1
        self._slots.limiter.release_on_behalf_of(self)
        try:
            yield
        finally:
            self._slots.released -= 1
        begun = self._clock.monotonic()
        deadline, self._limit.deadline = self._limit.deadline, math.inf
        await self._take()
        waited_s = self._clock.monotonic() - begun
        self._limit.deadline = deadline + waited_s
        self.waited_s += waited_s
