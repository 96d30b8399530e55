"""Several things at once, that end as one: with one exception, not with a group of them.

How many migrations operate at once is for `places`; what runs beside what is for `runner`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import anyio

from aiomigrate.errors import AiomigrateError, MigrationFailedError

T = TypeVar("T")

_AT_ONCE = 16


async def each(
    items: Iterable[T], work: Callable[[T], Awaitable[None]], *, at_once: int = _AT_ONCE
) -> None:
    """Does the same to each item, a few at once; the first failure cancels the others.

    Args:
        items: What it is done to; nothing happens where there are none.
        work: Does it to one.
        at_once: To how many at once, at most.

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
        raise sole(failures) from None


def sole(failures: BaseExceptionGroup[BaseException]) -> BaseException:
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
