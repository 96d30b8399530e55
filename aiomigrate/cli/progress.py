"""Shows the progress of a run on a terminal or in a log.

The timings after a run are shown by `output`.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from aiomigrate.cli.output import STYLES, Output

if TYPE_CHECKING:
    from aiomigrate.migration.model import Key
    from aiomigrate.runs.progress import Progress


_PLAIN_EVERY_S = 10.0


class Tracker:
    """Stores the progress of each migration, and shows it inside `showing()`.

    Attributes:
        seen: The last progress of each migration, by line and version.
    """

    def __init__(self, output: Output) -> None:
        """Creates a tracker that shows nothing yet.

        Args:
            output: Where progress is shown.
        """
        self._output = output
        self._view: PlainView | LiveView | None = None
        self.seen: dict[Key, Progress] = {}

    def __call__(self, progress: Progress) -> None:
        """Stores and shows one `Progress`. Passed to the manager as `on_progress`."""
        self.seen[progress.line, progress.version] = progress
        if self._view is not None:
            self._view.update(progress)

    def showing(self) -> AbstractContextManager[object]:
        """Returns a context manager that shows progress.

        On a terminal the view is live; elsewhere each change is a line. With `--json` nothing is
        shown.
        """
        if self._output.as_json:
            return nullcontext()
        self._view = LiveView() if sys.stdout.isatty() else PlainView(self._output)
        return self._view

    def in_state(self, *states: str) -> list[Key]:
        """Returns the migrations whose last progress has one of the states."""
        return [key for key, progress in self.seen.items() if progress.state in states]


class PlainView:
    """Shows progress as lines of text, for logs and pipes."""

    def __init__(self, output: Output) -> None:
        """Creates the view.

        Args:
            output: Where the lines are written.
        """
        self._output = output
        self._started: dict[Key, float] = {}
        self._printed: dict[Key, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, progress: Progress) -> None:
        """Writes a line when a migration starts or ends, and every 10 s while it runs."""
        key, now = (progress.line, progress.version), time.monotonic()
        if progress.state == "waiting":
            return
        if progress.state == "running" and key not in self._started:
            self._started[key] = self._printed[key] = now
        elif progress.state == "running":
            if now - self._printed[key] < _PLAIN_EVERY_S:
                return
            self._printed[key] = now
        self._output.say(step_line(progress, now - self._started.get(key, now)))


class LiveView:
    """Shows progress on a terminal: a row per running migration, a line per ended one."""

    def __init__(self) -> None:
        """Creates the view. It shows nothing before it is entered."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        self._rows: dict[Key, Any] = {}
        self._started: dict[Key, float] = {}
        self._ended = 0
        self._known: set[Key] = set()
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn(
                "{task.fields[doing]}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(highlight=False, markup=False, emoji=False),
            transient=True,
            expand=True,
            redirect_stdout=False,
            redirect_stderr=sys.stderr.isatty(),  # a stderr that is a file is not redirected
        )
        self._all = self._live.add_task("migrations", total=None, doing="")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def update(self, progress: Progress) -> None:
        """Updates the row of a migration, or replaces it with a line when the migration ended."""
        key = (progress.line, progress.version)
        self._known.add(key)
        if progress.state == "running":
            self._advance(key, progress)
        elif progress.state != "waiting":
            self._end(key, progress)
        total = len(self._known)
        self._live.update(
            self._all, total=total, completed=self._ended, doing=f"{self._ended}/{total}"
        )

    def _advance(self, key: Key, progress: Progress) -> None:
        if key not in self._rows:
            self._started[key] = time.monotonic()
            self._rows[key] = self._live.add_task(f"{key[0]} {key[1]}", total=None, doing="")
        counted = progress.total if progress.total and progress.total > 1 else None
        count = f"{progress.done}/{counted} " if counted else ""
        elapsed_s = time.monotonic() - self._started[key]
        if counted and progress.done and elapsed_s > 1:
            count += f"({progress.done / elapsed_s:.0f}/s) "
        self._live.update(
            self._rows[key],
            completed=progress.done,
            total=counted,
            doing=count + progress.doing,
        )

    def _end(self, key: Key, progress: Progress) -> None:
        row = self._rows.pop(key, None)
        if row is not None:
            self._live.remove_task(row)
        self._ended += 1
        now = time.monotonic()
        self._live.console.print(
            step_line(progress, now - self._started.get(key, now)),
            style=STYLES.get(progress.state),
            no_wrap=True,
            overflow="ellipsis",
        )


def step_line(progress: Progress, elapsed_s: float) -> str:
    """Returns the progress of a migration as one line.

    Args:
        progress: The progress.
        elapsed_s: Seconds since the migration started.
    """
    from aiomigrate.text import duration

    parts = [f"{progress.state:<8} {progress.line} {progress.version}"]
    if progress.description:
        parts.append(progress.description)
    if progress.state == "running":
        if progress.done and progress.total:
            parts.append(f"{progress.done}/{progress.total}")
        if elapsed_s >= 1:
            parts.append(f"for {duration(elapsed_s)}")
    elif progress.state != "skipped":
        parts.append(f"({duration(elapsed_s)})")
    return "  ".join(parts)
