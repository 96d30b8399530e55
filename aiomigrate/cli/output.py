"""Writes the output of the command: text or JSON on stdout, errors and logs on stderr.

Live progress is in `progress`; the verbs are in `migrate` and `inspect`. The library never prints.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from aiomigrate import events as ev
from aiomigrate.errors import ConfigurationError
from aiomigrate.text import error_line

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

    from aiomigrate.ledger.records import Event
    from aiomigrate.results import Report


_SHOWN_AS_TEXT = (
    ev.STEP_FAILED, ev.STEP_SKIPPED, ev.STEP_UNRESOLVED, ev.RUN_FAILED, ev.LINE_AHEAD,
)  # fmt: skip
"""Events that are not logged without `-v`, since the command shows their content as text."""
_MAX_TABLES = 2
"""The maximum number of tables named in one cell of the journal's table."""


class Output:
    """Writes everything the command shows. With `--json`, stdout contains only one document."""

    def __init__(self, *, as_json: bool, verbose: bool, secrets: Sequence[str] = ()) -> None:
        """Creates the output.

        Args:
            as_json: Whether to print one JSON document on stdout instead of text.
            verbose: Whether to show tracebacks and logs of all levels.
            secrets: Texts that are replaced by `***` wherever they occur, longest first.
        """
        self.as_json = as_json
        self.verbose = verbose
        self._out = sys.stdout
        self._hidden = [(text, json.dumps(text)[1:-1]) for text in secrets]

    def scrub(self, text: str) -> str:
        """Returns a text with every secret replaced by `***`."""
        for plain, escaped in self._hidden:
            text = text.replace(plain, "***").replace(escaped, "***")
        return text

    def say(self, text: str) -> None:
        """Writes a text to stdout; does nothing with `--json`."""
        if not self.as_json:
            self._write(self.scrub(text))

    def document(self, value: Callable[[], object]) -> None:
        """Writes the JSON document to stdout; does nothing without `--json`.

        Args:
            value: Called with `--json` only; returns the content of the document.
        """
        if self.as_json:
            self._write(self.scrub(json_text(value())))

    def write_result(self, text: str, path: Path | None) -> None:
        """Writes a text to a file, or to stdout, also with `--json`.

        Args:
            text: The text.
            path: The file, which is overwritten; `None` for stdout.

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
        self.note(f"Wrote {path}.")

    def reserve_stdout(self) -> AbstractContextManager[object]:
        """Redirects what scripts print to stderr with `--json`: stdout is for the document."""
        return redirect_stdout(sys.stderr) if self.as_json else nullcontext()

    def _write(self, text: str) -> None:
        _echo(text, self._out if self.as_json else sys.stdout)

    def note(self, text: str) -> None:
        """Writes a text to stderr."""
        _echo(self.scrub(text), sys.stderr)

    def error(self, what: str, remedy: str, *, trace: BaseException | None = None) -> None:
        """Writes an error to stderr in two lines: what happened, and what to do.

        Args:
            what: What happened.
            remedy: What to do next.
            trace: An exception whose traceback is shown first with `-v`.
        """
        if trace is not None and self.verbose:
            self.note("".join(traceback.format_exception(trace)).rstrip())
        self.note(f"Error: {_one_line(what)}\n{_one_line(remedy)}")


def json_text(value: object) -> str:
    """Returns a value as a JSON document, in ASCII unless stdout is encoded as UTF."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    return json.dumps(value, ensure_ascii=not encoding.startswith("utf"), default=str)


def _echo(text: str, stream: TextIO) -> None:
    """Writes a line. If the reader of the stream is gone, the line is dropped without an error.

    A migration does not fail for want of a reader.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        typer.echo(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    except BrokenPipeError:
        discard_writes(stream)


def discard_writes(stream: TextIO) -> None:
    """Redirects a stream whose reader is gone, such as `head`, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---- logs ---------------------------------------------------------------------------------------


class _Stderr:
    """Writes to the current `sys.stderr`, which a live view may have replaced."""

    def write(self, text: str) -> int:
        try:
            return sys.stderr.write(text)
        except BrokenPipeError:
            discard_writes(sys.stderr)
            return len(text)

    def flush(self) -> None:
        pass  # lines are not buffered


def configure_logs(output: Output) -> None:
    """Configures structlog to write to stderr: formatted on a terminal, JSON lines elsewhere.

    By default warnings and errors are logged, except those that the command shows as text. With
    `--json`, all events of level info and above are logged; with `-v`, all events.
    """
    import structlog  # the import takes as long as all of `--help`

    level = "debug" if output.verbose else "info"

    def select(_: WrappedLogger, method: str, event: EventDict) -> EventDict:
        if output.verbose or output.as_json:
            return event
        name = event["event"]
        if name == ev.LEASE_WAITING:
            output.note(
                f"Waiting up to {event['wait_s']:g} s for {event['holder']}. "
                "If that process has crashed, this one continues when the lease expires."
            )
        elif method in ("warning", "error", "critical") and name not in _SHOWN_AS_TEXT:
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


# ---- results ------------------------------------------------------------------------------------


def show_report(output: Output, report: Report) -> None:
    """Shows a run: the table of timings, the failed and skipped migrations, and a summary."""
    from aiomigrate.results import REPORT_HEADER, REPORT_RIGHT, report_summary
    from aiomigrate.text import table

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
        output.say(f"For the traceback, run: aiomigrate history {report.failed[0].line} -v")
    if report.adopted:
        output.say(f"Adopted the records of another system: {', '.join(report.adopted)}.")
    output.say(report_summary(report))


def timing_rows(report: Report) -> list[tuple[str, ...]]:
    """Returns the cells of the table of timings.

    Each migration is one row; if it changed several tables, one more row follows for each.
    """
    from aiomigrate.results import report_rows

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
    # The box adds one more space between columns.
    padding = 1 if sum(widths) + 2 * len(header) <= console.width else 0
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, padding, 0, 0))
    columns = _visible_columns(header, widths, console.width)
    for position in columns:
        shown.add_column(
            header[position],
            justify="right" if position in right else "left",
            no_wrap=position > 0,  # in a narrow terminal only the line's name wraps
            overflow="fold",
        )
    for row in table[1:]:
        style = STYLES.get(row[2].removesuffix(" (resumed)"), "")
        shown.add_row(*(Text(row[i], style=style if i == 2 else "") for i in columns))
    console.print(shown)


_OPTIONAL_COLUMNS = ("ledger", "waited", "commits", "table_version", "rows")
"""The columns hidden in a narrow terminal, least important first; `report` shows them all."""


def _visible_columns(header: Sequence[str], widths: Sequence[int], total_width: int) -> list[int]:
    """Returns the indexes of the columns that fit, given that the line's name may wrap."""
    columns = list(range(len(header)))
    for name in _OPTIONAL_COLUMNS:
        if min(widths[0], 12) + sum(widths[i] + 1 for i in columns[1:]) + 2 <= total_width:
            break
        columns.remove(header.index(name))
    return columns


HISTORY_HEADER = (
    "time", "line", "version", "kind", "description", "duration", "table_versions", "error",
)  # fmt: skip
HISTORY_RIGHT = (2, 5)


def history_rows(events: Iterable[Event]) -> list[tuple[str, ...]]:
    """Returns the cells of the journal's table: one row per event, columns as `HISTORY_HEADER`."""
    from aiomigrate.text import duration

    return [
        (
            event.at.strftime("%Y-%m-%d %H:%M:%SZ"),
            event.line or "",
            "" if event.version is None else str(event.version),
            str(event.kind),
            event.description or "",
            "" if event.ran_s is None else duration(event.ran_s),
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
    return ", ".join(cells) if len(cells) <= _MAX_TABLES else f"{len(cells)} tables"


STYLES: Mapping[str, str] = {
    "applied": "green",
    "rolled back": "green",
    "failed": "red",
    "skipped": "yellow",
}
