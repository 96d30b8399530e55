"""Runs coroutines concurrently, and limits how many migrations run at the same time.

`runs.scheduler` decides which migrations may run at the same time.
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
    """Awaits `work` for each item, several at a time. The first failure cancels the others.

    Args:
        items: The items. Without items, nothing happens.
        work: Called with one item.
        at_once: The maximum number of items worked on at the same time.

    Raises:
        Exception: The exception that `work` raised; of several, the one of `sole_error`.
    """
    all_items = list(items)
    if at_once == 1 or len(all_items) == 1:
        for item in all_items:
            await work(item)
        return
    remaining = iter(all_items)

    async def worker() -> None:
        for item in remaining:
            await work(item)

    try:
        async with anyio.create_task_group() as group:
            for _ in range(min(at_once, len(all_items))):
                group.start_soon(worker)
    except BaseExceptionGroup as failures:
        raise sole_error(failures) from None


def sole_error(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Returns the exception of a group that the caller should see.

    An exception that is not an `Exception` (such as a cancellation) comes first, then an
    `AiomigrateError`, then any other; of equal ones the first.
    """
    flat: list[BaseException] = []
    stack: list[BaseException] = [failures]
    while stack:
        item = stack.pop()
        if isinstance(item, BaseExceptionGroup):
            stack.extend(reversed(item.exceptions))
        else:
            flat.append(item)
    own = [e for e in flat if isinstance(e, (AiomigrateError, MigrationFailedError))]
    fatal = [e for e in flat if not isinstance(e, Exception)]
    return (fatal or own or flat)[0]


MAX_RELEASED = 256
"""The maximum number of slots released at the same time.

Their holders may all wake in the same moment, which blocks the event loop.
"""


class Slots:
    """The concurrency slots of one run. A migration runs only while it holds a slot.

    Attributes:
        limiter: Counts the slots in use.
        released: The number of slots that are released at the moment.
    """

    def __init__(self, total: int) -> None:
        """Creates the slots; all are free.

        Args:
            total: The number of slots.
        """
        self.limiter = anyio.CapacityLimiter(total)
        self.released = 0


class Slot:
    """One concurrency slot, held inside `async with` and released while its holder waits.

    Attributes:
        waited_s: Seconds spent waiting to take the slot again after it was released.
    """

    def __init__(self, slots: Slots, limit: anyio.CancelScope, clock: Clock) -> None:
        """Prepares a slot without taking it.

        Args:
            slots: The slots of the run.
            limit: The holder's time limit. Waiting to take the slot again does not count toward it.
            clock: The clocks.
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
        """Frees the slot if it is held, also after a failure or a cancellation."""
        if self._is_held:
            self._is_held = False
            self._slots.limiter.release_on_behalf_of(self)

    @contextlib.asynccontextmanager
    async def released(self) -> AsyncIterator[None]:
        """Releases the slot inside `async with`, and takes it again afterwards.

        After a failure or a cancellation inside, the slot is not taken again. The slot is not
        released if it is not held, or if `MAX_RELEASED` slots are already released.
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
        started = self._clock.monotonic()
        deadline, self._limit.deadline = self._limit.deadline, math.inf
        await self._take()
        waited_s = self._clock.monotonic() - started
        self._limit.deadline = deadline + waited_s
        self.waited_s += waited_s
