"""How far a run is: what callbacks and streams are given, and what the lease row shows of it."""

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
    """How far one migration is: what an `on_progress` callback is given.

    Attributes:
        line: Its line.
        version: Its version.
        description: Its description.
        state: `waiting`, `running`, or an outcome.
        doing: What it is doing now.
        done: How much is done, in what `total` counts.
        total: How much there is, `None` if unknown.
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
        """Has no stream yet.

        Args:
            callback: Called with each `Progress`, if given.
        """
        self._callback = callback
        self._streams: set[MemoryObjectSendStream[Progress]] = set()

    @contextlib.contextmanager
    def open(self) -> Iterator[MemoryObjectReceiveStream[Progress]]:
        """Opens a stream, which is closed at the end. A full stream drops the newest values."""
        send, receive = anyio.create_memory_object_stream[Progress](_KEPT)
        self._streams.add(send)
        try:
            with receive:
                yield receive
        finally:
            self._streams.discard(send)
            send.close()

    def publish(self, progress: Progress) -> None:
        """Sends to every stream and calls the callback.

        Raises:
            Exception: What the callback raised.
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


_KEPT = 1000


class ProgressBoard:
    """What the migrations of one run are doing now."""

    def __init__(self, on_progress: Callable[[Progress], None] | None, *, log: Any) -> None:
        """Shows nothing yet.

        Args:
            on_progress: Called with each change. What it raises is logged once and ignored.
            log: Bound logger.
        """
        self._on_progress = on_progress
        self._log = log
        self._progress_failed = False
        self._running: dict[str, str] = {}
        self._steps: dict[str, StepProgress] = {}

    @property
    def phase(self) -> str:
        """The first three of the running migrations, in words."""
        return "; ".join(list(self._running.values())[:3])

    @property
    def steps(self) -> list[StepProgress]:
        """How far each running migration is."""
        return list(self._steps.values())

    def running(self, script: Script, doing: str, done: int, total: int | None) -> None:
        """Shows what a migration is doing."""
        self._running[script.line] = f"{script}: {doing}"
        self._steps[script.line] = StepProgress(
            line=script.line, version=script.version, doing=doing, done=done, total=total
        )
        self._publish(script, "running", doing, done, total)

    def waiting(self, script: Script) -> None:
        """Shows that a migration waits for its turn."""
        self._publish(script, "waiting")

    def ended(self, script: Script, outcome: str) -> None:
        """Shows that a migration has ended."""
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
        except Exception as exc:  # noqa: BLE001 - a callback decides nothing
            if not self._progress_failed:
                self._log.warning(ev.PROGRESS_FAILED, error=repr(exc))
            self._progress_failed = True
