"""The progress of a run: for the callback, for streams, and for the lease row.

The manager owns the `ProgressStreams`; each `runs.session` has a `ProgressBoard`, which migrations
report to. The progress shown in a terminal is in `cli.progress`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from aiomigrate import events as ev
from aiomigrate.ledger.records import StepProgress
from aiomigrate.migration.model import Script

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The progress of one migration: the argument of an `on_progress` callback.

    Attributes:
        line: Its line.
        version: Its version.
        description: Its description.
        state: `waiting`, `running`, or an outcome.
        doing: The current operation, as text.
        done: Units of work done, e.g. rows or operations.
        total: Total units of work, `None` if unknown.
    """

    line: str
    version: int
    description: str = ""
    state: str = "running"
    doing: str = ""
    done: int = 0
    total: int | None = None


class ProgressStreams:
    """Passes the progress of a manager's runs to its callback and its streams."""

    def __init__(self, callback: Callable[[Progress], None] | None) -> None:
        """Creates no stream yet.

        Args:
            callback: Called with each `Progress`; `None` for no callback.
        """
        self._callback = callback
        self._streams: set[MemoryObjectSendStream[Progress]] = set()

    @contextlib.contextmanager
    def open(self) -> Iterator[MemoryObjectReceiveStream[Progress]]:
        """Opens a stream and closes it on exit. A full stream drops new values.

        Yields:
            The receiving end.
        """
        send, receive = anyio.create_memory_object_stream[Progress](_STREAM_CAPACITY)
        self._streams.add(send)
        try:
            with receive:
                yield receive
        finally:
            self._streams.discard(send)
            send.close()

    def publish(self, progress: Progress) -> None:
        """Sends a value to every stream, then calls the callback.

        Raises:
            Exception: The callback raised it.
        """
        for stream in self._streams:
            with contextlib.suppress(anyio.WouldBlock, anyio.BrokenResourceError):
                stream.send_nowait(progress)
        if self._callback is not None:
            self._callback(progress)

    def close(self) -> None:
        """Ends every stream."""
        for stream in self._streams:
            stream.close()


_STREAM_CAPACITY = 1000


class ProgressBoard:
    """The current progress of the migrations of one run."""

    def __init__(self, on_progress: Callable[[Progress], None] | None, *, log: Any) -> None:
        """Starts empty.

        Args:
            on_progress: Called with each change. Its first exception is logged; all are ignored.
            log: Bound logger.
        """
        self._on_progress = on_progress
        self._log = log
        self._progress_failed = False
        self._running: dict[str, str] = {}
        self._steps: dict[str, StepProgress] = {}

    @property
    def phase(self) -> str:
        """The first three running migrations, as text; empty if none is running."""
        return "; ".join(list(self._running.values())[:3])

    @property
    def steps(self) -> list[StepProgress]:
        """The progress of each running migration."""
        return list(self._steps.values())

    def running(self, script: Script, doing: str, done: int, total: int | None) -> None:
        """Records and publishes the progress of a running migration.

        Args:
            script: The migration.
            doing: The current operation, as text.
            done: Units of work done.
            total: Total units of work, `None` if unknown.
        """
        self._running[script.line] = f"{script}: {doing}"
        self._steps[script.line] = StepProgress(
            line=script.line, version=script.version, doing=doing, done=done, total=total
        )
        self._publish(script, "running", doing, done, total)

    def waiting(self, script: Script) -> None:
        """Publishes that a migration is waiting to start."""
        self._publish(script, "waiting")

    def ended(self, script: Script, outcome: str) -> None:
        """Removes a migration from the board and publishes its outcome."""
        self._running.pop(script.line, None)
        self._steps.pop(script.line, None)
        self._publish(script, outcome)

    def _publish(
        self, script: Script, state: str, doing: str = "", done: int = 0, total: int | None = None
    ) -> None:
        if self._on_progress is None:
            return
        progress = Progress(
            line=script.line,
            version=script.version,
            description=script.description,
            state=state,
            doing=doing,
            done=done,
            total=total,
        )
        try:
            self._on_progress(progress)
        except Exception as exc:  # noqa: BLE001 - a callback must not stop a run
            if not self._progress_failed:
                self._log.warning(ev.PROGRESS_FAILED, error=repr(exc))
            self._progress_failed = True
