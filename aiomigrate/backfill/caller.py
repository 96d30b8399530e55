"""Calls a user's function: async or in a thread, at a limited rate, and once for equal values.

Which rows it is called for, and what is done with the results, is for `backfill.engine`.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pyarrow as pa
import pyarrow.compute as pc

from aiomigrate.errors import AiomigrateError, KeepsProgressError, OperationError
from aiomigrate.operations.fill import Pace, Survey
from aiomigrate.schema.digests import digests

FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 30.0
_CACHE_BYTES = 128_000_000


class Caller:
    """A user's function that returns values of one type."""

    def __init__(self, function: Any, kind: pa.DataType, pace: Pace, words: str) -> None:
        """Stores the arguments without calling the function.

        Args:
            function: An async function, or a plain one, which runs in a thread.
            kind: Arrow type of the values.
            pace: Limits of concurrent calls, and of calls per second.
            words: What the function is called for, for errors.
        """
        called = getattr(function, "__call__", None)  # noqa: B004 - it may be a callable object
        self.kind: Any = kind
        self._function = function
        self._is_async = any(inspect.iscoroutinefunction(f) for f in (function, called))
        self._slots = anyio.CapacityLimiter(pace.concurrency)
        self._threads = anyio.CapacityLimiter(pace.concurrency)
        self._words = words
        self._limiter: Any = None
        if pace.calls_per_s is not None:
            from aiolimiter import AsyncLimiter

            burst = max(1.0, pace.calls_per_s)
            self._limiter = AsyncLimiter(burst, burst / pace.calls_per_s)

    async def __call__(self, given: Any) -> Any:
        """Calls the function; returns an Arrow array of `kind` with one value per given item.

        A cancellation abandons the thread of a plain function, which runs to its end.

        Args:
            given: The rows or values, passed to the function as they are.

        Raises:
            OperationError: The function returned values of another type or number.
            ValueError: A vector has NaN.
            Exception: The function raised it.
        """
        async with self._slots:
            if self._limiter is not None:
                await self._limiter.acquire()
            if self._is_async:
                result = await self._function(given)
            else:
                result = await anyio.to_thread.run_sync(
                    self._function, given, limiter=self._threads, abandon_on_cancel=True
                )
                if inspect.isawaitable(result):
                    result = await result
        await anyio.lowlevel.cancel_shielded_checkpoint()  # lets the next call start first
        try:
            values = as_array(result, self.kind)
        except (pa.ArrowException, TypeError, ValueError) as exc:
            raise OperationError(
                f"{self._words}: the function did not return {self.kind} values: {exc}.",
                "Return one value of the column's type for each row.",
            ) from exc
        if _has_nan(values):
            raise ValueError("a vector with NaN")  # retried with fewer rows, as others may be good
        if len(values) != len(given):
            raise OperationError(
                f"{self._words}: the function returned {len(values)} values for {len(given)} rows.",
                "Return one value for each row, in their order, or None for a row without a value.",
            )
        return values


class ValueCache:
    """Calls a function once for equal values, those in calls in flight included; never for NULL."""

    def __init__(self, call: Caller) -> None:
        """Starts with an empty cache.

        Args:
            call: The function, which is called with a list of distinct values.
        """
        self._call = call
        self._cached: dict[int, Any] = {}
        self._in_flight: dict[int, anyio.Event] = {}
        self._repeated: frozenset[int] | None = None
        self._bytes = 0

    def keep_only(self, repeated: frozenset[int]) -> None:
        """Limits the cache to values that several rows have.

        Args:
            repeated: The digests of these values.
        """
        self._repeated = repeated
        self._cached = {mark: value for mark, value in self._cached.items() if mark in repeated}
        self._bytes = sum(value.nbytes for value in self._cached.values())

    async def __call__(self, column: Any, marks: Sequence[int]) -> Any:
        """Returns an Arrow array with the function's value for each given value, NULL for NULL.

        Args:
            column: The values, as an Arrow array.
            marks: Their digests.

        Raises:
            Exception: The call raised it.
        """
        values = column.to_pylist()
        wanted = {m: v for m, v in zip(marks, values, strict=True) if v is not None}
        is_plain = len(wanted) == len(values)
        pieces: list[Any] = []
        at: dict[int, int] = {}
        while wanted:
            for mark in [mark for mark in wanted if mark in self._cached]:
                at[mark] = sum(map(len, pieces))
                pieces.append(self._cached[mark])
                del wanted[mark]
            mine = {mark: v for mark, v in wanted.items() if mark not in self._in_flight}
            if mine:
                begin = sum(map(len, pieces))
                pieces.append(await self._call_for(mine))
                if is_plain and len(mine) == len(values):
                    return pieces[0]
                at |= {mark: begin + position for position, mark in enumerate(mine)}
                wanted = {mark: v for mark, v in wanted.items() if mark not in mine}
            elif wanted:  # in another call; if that fails, this one calls for them
                await self._in_flight[next(iter(wanted))].wait()
        rows = [None if v is None else at[m] for m, v in zip(marks, values, strict=True)]
        have = pa.concat_arrays(pieces) if pieces else pa.nulls(0, self._call.kind)
        return have.take(pa.array(rows, pa.int64()))

    async def _call_for(self, mine: Mapping[int, Any]) -> Any:
        for mark in mine:
            self._in_flight[mark] = anyio.Event()
        try:
            made = await self._call(list(mine.values()))
            for position, mark in enumerate(mine):
                if self._repeated is None or mark in self._repeated:
                    self._cache(mark, made, position)
        finally:
            for mark in mine:
                self._in_flight.pop(mark).set()
        return made

    def _cache(self, mark: int, made: Any, position: int) -> None:
        if self._bytes < _CACHE_BYTES:
            one = made.take(pa.array([position]))  # a slice would keep the whole array in memory
            self._cached[mark] = one
            self._bytes += one.nbytes


async def survey(batches: AsyncIterator[pa.RecordBatch], free_bytes: int | None) -> Survey:
    """Returns statistics of the values that a function will be called for.

    Args:
        batches: The rows in which the column is not NULL, with the column as the first.
        free_bytes: Free bytes on the disk, `None` if unknown.
    """
    found: list[pa.Table] = []
    async for batch in batches:
        values: Any = batch.column(0)
        is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        lengths = pc.utf8_length(values).cast(pa.int64()) if is_text else [0] * len(values)
        marks = pa.array(digests(batch.select([0])), pa.int64())
        found.append(pa.table({"mark": marks, "length": lengths}))
        await anyio.lowlevel.checkpoint()
    if not found:
        return Survey(rows=0, distinct=0, characters=0, repeated=frozenset(), free_bytes=free_bytes)
    whole: Any = pa.concat_tables(found)
    counted = whole.group_by("mark").aggregate([("length", "min"), ("length", "count")])
    more = pc.greater(counted["length_count"], pa.scalar(1))
    return Survey(
        rows=len(whole),
        distinct=len(counted),
        characters=pc.sum(counted["length_min"]).as_py(),
        repeated=frozenset(counted["mark"].filter(more).to_pylist()),
        free_bytes=free_bytes,
    )


async def call_with_retries(
    function: Any, values: Sequence[Any], kind: pa.DataType, pace: Pace
) -> list[Any]:
    """Calls a function with values, at most `pace.attempts` times; returns Python values.

    Raises:
        OperationError: The function returned values of another type or number.
        KeepsProgressError: All attempts failed.
    """
    call = Caller(function, kind, pace, "The model, called with known texts")
    try:
        made = await retried(
            lambda: call(list(values)), gives_up=lambda calls: calls >= pace.attempts
        )
    except AiomigrateError:
        raise
    except Exception as exc:
        raise KeepsProgressError(
            f"The model fails for known texts: {type(exc).__name__}: {exc}.",
            "Correct the cause and run again.",
        ) from exc
    return list(made.to_pylist())


async def retried(call: Callable[[], Awaitable[Any]], *, gives_up: Callable[[int], bool]) -> Any:
    """Awaits a call, and retries a failure after growing, random pauses.

    Args:
        call: What to await. An `AiomigrateError` of it is not retried.
        gives_up: Whether to raise the failure after so many calls.

    Raises:
        Exception: What the last call raised.
    """
    try:
        return await call()
    except AiomigrateError:
        raise
    except Exception:
        if gives_up(1):
            raise
    from tenacity import AsyncRetrying, retry_if_not_exception_type, wait_random_exponential

    await anyio.sleep(random.uniform(0, FIRST_PAUSE_S))  # noqa: S311 - no secret
    retrying = AsyncRetrying(
        stop=lambda state: gives_up(int(state.attempt_number) + 1),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=_MAX_PAUSE_S),
        retry=retry_if_not_exception_type((AiomigrateError, anyio.get_cancelled_exc_class())),
        sleep=anyio.sleep,
        reraise=True,
    )
    return await retrying(call)


def as_array(result: Any, kind: pa.DataType) -> Any:
    """Converts the result of a function to an Arrow array.

    Args:
        result: An Arrow array, a numpy array (two-dimensional for fixed-size lists), or an
            iterable of Python values.
        kind: Type of the returned array.

    Raises:
        pyarrow.ArrowException, TypeError, ValueError: The result cannot be converted.
    """
    if isinstance(result, pa.ChunkedArray):
        result = result.combine_chunks()
    if isinstance(result, pa.Array):
        return result if result.type == kind else result.cast(kind)
    if pa.types.is_fixed_size_list(kind):
        wanted: Any = kind
        shape = getattr(result, "shape", None)
        if shape is not None and len(shape) == 2:
            if shape[1] != wanted.list_size:
                raise ValueError(f"{shape[1]} dimensions, not {wanted.list_size}")
            flat = pa.array(result.reshape(-1)).cast(wanted.value_type)
            lists: Any = pa.FixedSizeListArray
            return lists.from_arrays(flat, type=kind)
    return pa.array(list(result), kind)


def _has_nan(values: Any) -> bool:
    kind = values.type
    if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type):
        return False
    return bool(pc.any(pc.is_nan(values.flatten())).as_py())
