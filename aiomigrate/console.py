"""What the command shows: text or JSON on stdout, errors and logs on stderr, live progress.

Not for deciding or running anything (that is `cli`), and not for the library, which never prints.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import typer

from aiomigrate import events as ev
from aiomigrate.errors import ConfigurationError
from aiomigrate.report import error_line

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

    from aiomigrate.model import Event
    from aiomigrate.report import Report
    from aiomigrate.runner import Progress

Key = tuple[str, int]

_TOLD = (ev.STEP_FAILED, ev.STEP_SKIPPED, ev.STEP_UNRESOLVED, ev.RUN_FAILED, ev.LINE_AHEAD)
"""Events whose content the command shows itself."""

_PLAIN_EVERY_S = 10.0
_MOST_TABLES = 2  # named in one cell of the journal's table


class Output:
    """Where everything goes. With `--json` stdout holds one document and nothing else."""

    def __init__(self, *, as_json: bool, verbose: bool, secrets: Sequence[str] = ()) -> None:
        """Chooses what to show.

        Args:
            as_json: Whether stdout is for one JSON document.
            verbose: Whether logs of all levels and tracebacks are shown.
            secrets: Texts that are never shown, longest first.
        """
        self.as_json = as_json
        self.verbose = verbose
        self._out = sys.stdout
        self._hidden = [(text, json.dumps(text)[1:-1]) for text in secrets]

    def scrub(self, text: str) -> str:
        """Returns a text without the secrets."""
        for plain, escaped in self._hidden:
            text = text.replace(plain, "***").replace(escaped, "***")
        return text

    def say(self, text: str) -> None:
        """Shows a text to people; not with `--json`."""
        if not self.as_json:
            self._write(self.scrub(text))

    def document(self, value: Callable[[], object]) -> None:
        """Shows the one JSON document; only with `--json`."""
        if self.as_json:
            self._write(self.scrub(json_text(value())))

    def deliver(self, text: str, path: Path | None) -> None:
        """Shows a text that was asked for in a form of its own, or writes it to a file.

        Raises:
            ConfigurationError: The file cannot be written.
        """
        if path is None:
            self._write(self.scrub(text))
            return
        try:
            path.write_text(f"{self.scrub(text)}\n", encoding="utf-8")
        except OSError as exc:
            raise ConfigurationError(
                f"{path} cannot be written: {exc.strerror}.", "Choose another --output."
            ) from exc
        self.note(f"Written: {path}")

    def alone(self) -> AbstractContextManager[object]:
        """With `--json`, sends what scripts print to stderr: stdout is for the document."""
        return redirect_stdout(sys.stderr) if self.as_json else nullcontext()

    def _write(self, text: str) -> None:
        _echo(text, self._out if self.as_json else sys.stdout)

    def note(self, text: str) -> None:
        """Says something on stderr."""
        _echo(self.scrub(text), sys.stderr)

    def error(self, what: str, remedy: str, *, trace: BaseException | None = None) -> None:
        """Says what happened and what to do, in two lines; with `-v` the traceback first."""
        if trace is not None and self.verbose:
            self.note("".join(traceback.format_exception(trace)).rstrip())
        self.note(f"Error: {_one_line(what)}\n{_one_line(remedy)}")


def json_text(value: object) -> str:
    """Returns a value as a JSON document, escaped where stdout cannot hold every character."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    return json.dumps(value, ensure_ascii=not encoding.startswith("utf"), default=str)


def _echo(text: str, stream: TextIO) -> None:
    """Writes a line; without a reader it is dropped, for no migration fails by that."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        typer.echo(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    except BrokenPipeError:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Sends what is still written to a stream whose reader has gone, such as `head`, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---- logs ---------------------------------------------------------------------------------------


class _Stderr:
    """The stderr of the moment, which a live display may have replaced."""

    def write(self, text: str) -> int:
        try:
            return sys.stderr.write(text)
        except BrokenPipeError:
            silence(sys.stderr)
            return len(text)

    def flush(self) -> None:
        pass  # a line is written at once


def configure_logs(output: Output) -> None:
    """Sends structlog's events to stderr: pretty on a terminal, JSON lines elsewhere.

    Warnings and errors, less what the command tells itself; with `--json`, where it tells
    nothing, all that is worth knowing; with `-v` everything.
    """
    import structlog  # takes as long as all of `--help`

    level = "debug" if output.verbose else "info"

    def select(_: WrappedLogger, method: str, event: EventDict) -> EventDict:
        if output.verbose or output.as_json:
            return event
        name = event["event"]
        if name == ev.LEASE_WAITING:
            output.note(
                f"Waiting up to {event['wait_s']:g} s for {event['holder']}; "
                "if it is dead, this goes on once its lease has run out."
            )
        elif method in ("warning", "error", "critical") and name not in _TOLD:
            return event
        raise structlog.DropEvent

    render = _renderer()

    def scrubbed(logger: WrappedLogger, method: str, event: EventDict) -> str:
        return output.scrub(str(render(logger, method, event)))

    structlog.configure(
        processors=[
            select,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            scrubbed,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=_Stderr()),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )


def _renderer() -> Callable[..., Any]:
    import structlog

    if sys.stderr.isatty():
        return structlog.dev.ConsoleRenderer(
            colors="NO_COLOR" not in os.environ,
            exception_formatter=structlog.dev.plain_traceback,
        )
    exceptions = structlog.processors.format_exc_info
    encode = structlog.processors.JSONRenderer(default=str, ensure_ascii=False)

    def render(logger: WrappedLogger, method: str, event: EventDict) -> Any:
        return encode(logger, method, exceptions(logger, method, event))

    return render


# ---- progress -----------------------------------------------------------------------------------


class Tracker:
    """Remembers how far each migration is, and shows it while it is entered."""

    def __init__(self, output: Output) -> None:
        """Shows nothing yet."""
        self._output = output
        self._view: PlainView | LiveView | None = None
        self.seen: dict[Key, Progress] = {}

    def __call__(self, progress: Progress) -> None:
        """Takes one `Progress`: the manager's `on_progress`."""
        self.seen[progress.line, progress.version] = progress
        if self._view is not None:
            self._view.tell(progress)

    def showing(self) -> AbstractContextManager[object]:
        """Shows progress within: live on a terminal, a line for each change elsewhere."""
        if self._output.as_json:
            return nullcontext()
        self._view = LiveView() if sys.stdout.isatty() else PlainView(self._output)
        return self._view

    def in_state(self, *states: str) -> list[Key]:
        """Returns the migrations last seen in some states."""
        return [key for key, progress in self.seen.items() if progress.state in states]


class PlainView:
    """Progress as lines of text, for logs and pipes."""

    def __init__(self, output: Output) -> None:
        """Writes to some output."""
        self._output = output
        self._begun: dict[Key, float] = {}
        self._told: dict[Key, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def tell(self, progress: Progress) -> None:
        """Writes a line when a migration begins, ends, or has gone on for a while."""
        key, now = (progress.line, progress.version), time.monotonic()
        if progress.state == "waiting":
            return
        if progress.state == "running" and key not in self._begun:
            self._begun[key] = self._told[key] = now
        elif progress.state == "running":
            if now - self._told[key] < _PLAIN_EVERY_S:
                return
            self._told[key] = now
        self._output.say(step_line(progress, now - self._begun.get(key, now)))


class LiveView:
    """Progress on a terminal: a row for each migration at work, lines for those that ended."""

    def __init__(self) -> None:
        """Shows nothing before it is entered."""
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
        self._begun: dict[Key, float] = {}
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
            redirect_stderr=sys.stderr.isatty(),  # else a file, which is to stay one
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

    def tell(self, progress: Progress) -> None:
        """Updates the row of a migration, or replaces it by a line when it ended."""
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
            self._begun[key] = time.monotonic()
            self._rows[key] = self._live.add_task(f"{key[0]} {key[1]}", total=None, doing="")
        counted = progress.total if progress.total and progress.total > 1 else None
        count = f"{progress.done}/{counted} " if counted else ""
        elapsed_s = time.monotonic() - self._begun[key]
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
            step_line(progress, now - self._begun.get(key, now)),
            style=_STYLES.get(progress.state),
            no_wrap=True,
            overflow="ellipsis",
        )


_STYLES: Mapping[str, str] = {
    "applied": "green",
    "rolled back": "green",
    "failed": "red",
    "skipped": "yellow",
}


def step_line(progress: Progress, elapsed_s: float) -> str:
    """Returns how far a migration is, in one line."""
    from aiomigrate.render import seconds

    parts = [f"{progress.state:<8} {progress.line} {progress.version}"]
    if progress.description:
        parts.append(progress.description)
    if progress.state == "running":
        if progress.done and progress.total:
            parts.append(f"{progress.done}/{progress.total}")
        if elapsed_s >= 1:
            parts.append(f"for {seconds(elapsed_s)}")
    elif progress.state != "skipped":
        parts.append(f"({seconds(elapsed_s)})")
    return "  ".join(parts)


# ---- results ------------------------------------------------------------------------------------


def show_report(output: Output, report: Report) -> None:
    """Shows a run: the table of timings, why others did not run, and a summary."""
    from aiomigrate.render import REPORT_HEADER, REPORT_RIGHT, report_summary, table

    if report.steps:
        output.say("")
        rows = timing_rows(report)
        if sys.stdout.isatty() and not output.as_json:
            _rich_table(REPORT_HEADER, rows, REPORT_RIGHT)
        else:
            output.say(table(REPORT_HEADER, rows, REPORT_RIGHT))
        output.say("")
    for step in report.failed if len(report.failed) > 1 else ():
        output.say(f"failed   {step.line} {step.version}: {_one_line(step.error)}")
    for step in report.skipped:
        output.say(f"skipped  {step.line} {step.version}: {_one_line(step.error)}")
    if report.failed:
        output.say(f"Its traceback: aiomigrate history {report.failed[0].line} -v")
    if report.adopted:
        output.say(f"Adopted what another system had recorded: {', '.join(report.adopted)}.")
    output.say(report_summary(report))


def timing_rows(report: Report) -> list[tuple[str, ...]]:
    """Returns the cells of the table of timings; each of several tables gets a row of its own."""
    from aiomigrate.render import report_rows

    rows: list[tuple[str, ...]] = []
    for step, row in zip(report.steps, report_rows(report), strict=True):
        changed = [(name, *pair) for name, pair in step.tables.items() if pair[0] != pair[1]]
        if len(changed) < 2:
            rows.append(row)
            continue
        rows.append((*row[:-1], f"{len(changed)} tables:"))
        blank = ("",) * (len(row) - 2)
        rows += [(f"  {name}", *blank, f"{before} -> {after}") for name, before, after in changed]
    return rows


def _rich_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    table = [tuple(header), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    gap = 1 if sum(widths) + 2 * len(header) <= console.width else 0  # besides the one of the box
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0))
    columns = _fitting(header, widths, console.width)
    for position in columns:
        shown.add_column(
            header[position],
            justify="right" if position in right else "left",
            no_wrap=position > 0,  # in a narrow terminal only the line's name is folded
            overflow="fold",
        )
    for row in table[1:]:
        style = _STYLES.get(row[2].removesuffix(" (resumed)"), "")
        shown.add_row(*(Text(row[i], style=style if i == 2 else "") for i in columns))
    console.print(shown)


_SPARED = ("ledger", "waited", "commits", "table_version", "rows")
"""What a narrow terminal is not shown of a run, first what says least; `report` has it all."""


def _fitting(header: Sequence[str], widths: Sequence[int], room: int) -> list[int]:
    """Returns the columns that fit beside a folded name of the line."""
    columns = list(range(len(header)))
    for name in _SPARED:
        if min(widths[0], 12) + sum(widths[i] + 1 for i in columns[1:]) + 2 <= room:
            break
        columns.remove(header.index(name))
    return columns


HISTORY_HEADER = (
    "time", "line", "version", "kind", "description", "duration", "table_versions", "error",
)  # fmt: skip
HISTORY_RIGHT = (2, 5)


def history_rows(events: Iterable[Event]) -> list[tuple[str, ...]]:
    """Returns the cells of the journal's table, one row per event."""
    from aiomigrate.render import seconds

    return [
        (
            event.at.strftime("%Y-%m-%d %H:%M:%SZ"),
            event.line or "",
            "" if event.version is None else str(event.version),
            str(event.kind),
            event.description or "",
            "" if event.ran_s is None else seconds(event.ran_s),
            _table_versions(event.tables),
            error_line(event.error),
        )
        for event in events
    ]


def _table_versions(tables: Mapping[str, Any]) -> str:
    cells = []
    for name, facts in tables.items():
        if not isinstance(facts, Mapping):
            continue
        before, after = facts.get("before"), facts.get("after")
        if after is not None and before != after:
            cells.append(f"{name} {before} -> {after}")
        elif before is not None:
            cells.append(f"{name} {before}")
    return ", ".join(cells) if len(cells) <= _MOST_TABLES else f"{len(cells)} tables"
