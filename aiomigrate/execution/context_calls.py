"""Follows the calls that a function makes on its context: all are awaited, and each waits its turn.

A call that is not awaited does nothing, and Python only warns of it. Two writes to a table at once
could not be told from those of another process. What a call does is not done here
(`execution.context`).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import anyio

from aiomigrate.errors import OperationError

_HELD: ContextVar[frozenset[str]] = ContextVar("aiomigrate_held_tables", default=frozenset())
"""The tables that the running call writes to; inherited by tasks that it starts."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class _Calling(Protocol):
    @property
    def calls(self) -> ContextCalls: ...


_Self = TypeVar("_Self", bound=_Calling)


def awaited(
    method: Callable[Concatenate[_Self, _Arguments], Coroutine[Any, Any, _Result]],
) -> Callable[Concatenate[_Self, _Arguments], Coroutine[Any, Any, _Result]]:
    """Returns a coroutine method whose calls are known to the `calls` of its object."""

    def call(
        self: _Self, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Coroutine[Any, Any, _Result]:
        caller = sys._getframe(1)  # noqa: SLF001 - `inspect.stack` reads files
        place = f"{caller.f_code.co_filename}, line {caller.f_lineno}"
        begin = functools.partial(method, self, *args, **kwargs)
        return self.calls.hand_out(begin, f"`{method.__name__}`, called in {place},")

    functools.update_wrapper(call, method)
    return call


@dataclass(frozen=True, slots=True)
class _Call:
    text: str
    coroutine: Coroutine[Any, Any, Any]


class ContextCalls:
    """The calls of one function's context, from when they are handed out until they end."""

    def __init__(self) -> None:
        """Knows no call."""
        self._open: dict[int, _Call] = {}
        self._count = 0
        self._changed = anyio.Event()
        self._is_over = False
        self._turns: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)

    def hand_out(
        self, begin: Callable[[], Coroutine[Any, Any, _Result]], text: str
    ) -> Coroutine[Any, Any, _Result]:
        """Returns a coroutine for a call.

        Args:
            begin: Returns the coroutine of the call itself. It is called when it is awaited.
            text: Which call it is and where it was made, for the error.
        """
        self._count += 1
        coroutine = self._run(begin, self._count)
        self._open[self._count] = _Call(text, coroutine)
        return coroutine

    async def _run(self, begin: Callable[[], Coroutine[Any, Any, _Result]], number: int) -> _Result:
        try:
            if self._is_over:
                raise OperationError(
                    "The migration has ended.",
                    "Await every task that the function starts before it returns.",
                )
            return await begin()
        finally:
            del self._open[number]
            self._changed.set()

    @asynccontextmanager
    async def turn(self, *tables: str) -> AsyncIterator[None]:
        """Enters when no other call writes to these tables.

        Raises:
            OperationError: It was called by a function of the operation that writes to them.
        """
        held = _HELD.get()
        if held & set(tables):
            raise OperationError(
                f"The function of an operation on table {min(held & set(tables))!r} writes to that "
                "table itself.",
                "Return the values instead, or write when `apply` has returned.",
            )
        async with AsyncExitStack() as stack:
            for name in sorted(set(tables)):  # all in one order, so that none waits for ever
                await stack.enter_async_context(self._turns[name])
            token = _HELD.set(held | set(tables))
            try:
                yield
            finally:
                _HELD.reset(token)

    async def end(self) -> OperationError | None:
        """Ends the use of the context: waits for calls that run, and refuses later ones.

        Calls run on in tasks that the function started and did not await. They are waited for also
        under cancellation, since a commit may be under way.

        Returns:
            The error for the first call that was not awaited, `None` if all were.
        """
        self._is_over = True
        error = None
        for number, call in sorted(self._open.items()):
            state = inspect.getcoroutinestate(call.coroutine)
            if state == inspect.CORO_CLOSED:  # its task was cancelled before it began
                del self._open[number]
                continue
            if state == inspect.CORO_CREATED:
                why = f"{call.text} was not awaited: it did nothing."
                call.coroutine.close()
                del self._open[number]
            else:
                why = f"{call.text} was still running when the function returned."
            error = error or OperationError(why, "Write `await` before it, or await its task.")
        with anyio.CancelScope(shield=True):
            while self._open:
                self._changed = anyio.Event()
                await self._changed.wait()
        return error
