"""The parts shared by the verbs of the command: options, settings, exit codes, error output.

The verbs themselves are in `migrate` and `inspect`.
"""

from __future__ import annotations

import enum
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aiomigrate import settings
from aiomigrate.cli.output import Output, configure_logs
from aiomigrate.cli.progress import Tracker
from aiomigrate.errors import AiomigrateError, ConfigurationError, MigrationFailedError
from aiomigrate.settings import Settings

if TYPE_CHECKING:
    from aiomigrate.manager import MigrationManager


class Exit(enum.IntEnum):
    """The exit codes of the command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_AT_TARGET = 3
    INTERRUPTED = 130
    TERMINATED = 143


# ---- groups of options that verbs share ---------------------------------------------------------


def database_options(
    *,
    uri: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Path or URI of the database. Default: ./data/app.lancedb.",
            show_default=False,
        ),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of the table that records versions. Default: table_migrations.",
        ),
    ] = None,
    storage_options: Annotated[
        list[str] | None,
        typer.Option(
            "-o", "--storage-option", metavar="KEY=VALUE", help="Storage option; repeatable."
        ),
    ] = None,
) -> None:
    """The options that select the database."""


def folder_options(
    *,
    migrations: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder of the migrations. Default: ./migrations."),
    ] = None,
) -> None:
    """The option that selects the migrations."""


def param_options(
    *,
    params: Annotated[
        list[str] | None,
        typer.Option(
            "-x", "--param", metavar="KEY=VALUE", help="Parameter of the migrations; repeatable."
        ),
    ] = None,
) -> None:
    """The option for the parameters of the migrations."""


def ahead_options(
    *,
    on_ahead: Annotated[
        str | None,
        typer.Option(
            metavar="error|warn",
            help="What to do if the database is newer than the code. Default: error.",
        ),
    ] = None,
) -> None:
    """The option for a database that is newer than the code."""


def destructive_options(
    *,
    on_destructive: Annotated[
        str | None,
        typer.Option(
            metavar="keep|allow|refuse",
            help="For steps that discard data: keep a savepoint, allow them without one, or refuse "
            "them. Default: keep.",
        ),
    ] = None,
    allow_destructive: Annotated[
        bool,
        typer.Option(
            "--allow-destructive",
            metavar="",
            help="The same as --on-destructive allow.",
            show_default=False,
        ),
    ] = False,
    keep_savepoints: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long savepoints are kept. Default: a week."),
    ] = None,
) -> None:
    """The options for destructive steps."""


def lease_options(
    *,
    lease_ttl: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Time without renewal after which another process may take over. Default: 30.",
        ),
    ] = None,
    lease_wait: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long to wait for another process. Default: 600."),
    ] = None,
    on_unsafe_store: Annotated[
        str | None,
        typer.Option(
            metavar="error|warn",
            help="What to do if the object store loses commits. Default: error.",
        ),
    ] = None,
) -> None:
    """The options of the lease."""


def running_options(
    *,
    concurrency: Annotated[
        int | None,
        typer.Option(metavar="N", help="Migrations that run at the same time. Default: 16."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Time limit of each migration. Default: none."),
    ] = None,
) -> None:
    """The options of a run."""


def output_options(
    *,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", metavar="", help="Print one JSON document on stdout.", show_default=False
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v",
            "--verbose",
            metavar="",
            help="Show debug logs and tracebacks.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """The options of the output."""


Tables = Annotated[
    list[str] | None,
    typer.Option("--table", metavar="LINE", help="Only this line (table); repeatable."),
]
To = Annotated[
    list[str] | None,
    typer.Option(
        "--to",
        metavar="VERSION",
        help="Target version, or LINE=VERSION (repeatable). Default: the newest.",
    ),
]
Check = Annotated[
    bool,
    typer.Option("--check", metavar="", help="Exit with 3 if not at target.", show_default=False),
]


# ---- calling a verb -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the command: its settings and its output.

    Attributes:
        settings: The settings, merged from all sources.
        output: Writes everything that is shown.
        tracker: Receives the progress of the run.
    """

    settings: Settings
    output: Output
    tracker: Tracker = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tracker", Tracker(self.output))

    def options(self) -> dict[str, Any]:
        """Returns the settings as options of a manager, without the database."""
        chosen = self.settings
        return {
            "migrations": chosen.migrations,
            "params": chosen.params,
            "ledger": chosen.ledger,
            "concurrency": chosen.concurrency,
            "lease_ttl": chosen.lease_ttl,
            "lease_wait": chosen.lease_wait,
            "timeout": chosen.timeout,
            "storage_options": chosen.storage_options or None,
            "on_ahead": chosen.on_ahead,
            "on_destructive": chosen.on_destructive,
            "keep_savepoints": chosen.keep_savepoints,
            "on_unsafe_store": chosen.on_unsafe_store,
        }

    def manager(self) -> MigrationManager:
        """Returns a manager for the settings. It is not yet connected.

        Raises:
            ConfigurationError: A setting is invalid.
        """
        from aiomigrate.manager import MigrationManager

        return MigrationManager(self.settings.uri, on_progress=self.tracker, **self.options())


def verb(*groups: Callable[..., None]) -> Callable[[Callable[..., Exit]], Callable[..., None]]:
    """Returns a decorator that turns a function of a `Call` into a command.

    Args:
        *groups: The groups of options that the command takes besides the function's own and those
            of `output_options`.
    """

    def decorate(body: Callable[..., Exit]) -> Callable[..., None]:
        own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
        shared = [
            parameter
            for group in (*groups, output_options)
            for parameter in inspect.signature(group, eval_str=True).parameters.values()
        ]

        def command(**values: Any) -> None:
            given = {parameter.name: values.pop(parameter.name) for parameter in shared}
            raise typer.Exit(run_verb(body, given, values))

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__name__, command.__doc__ = body.__name__, inspect.getdoc(body)
        return command

    return decorate


def run_verb(body: Callable[..., Exit], given: dict[str, Any], values: Mapping[str, Any]) -> Exit:
    """Runs a verb and returns its exit code. A failure prints two lines on stderr.

    Args:
        body: The function of the verb.
        given: The values of the shared options, by parameter name.
        values: The values of the verb's own options.
    """
    output = Output(as_json=given.pop("as_json"), verbose=given.pop("verbose"))
    call: Call | None = None
    try:
        settings = read_settings(given)
        output = Output(as_json=output.as_json, verbose=output.verbose, secrets=settings.secrets())
        configure_logs(output)
        call = Call(settings=settings, output=output)
        with output.reserve_stdout():
            return body(call, **values)
    except KeyboardInterrupt:
        started = call is not None and bool(call.tracker.seen)
        what = "Interrupted." if started else "Interrupted before any migration started."
        remedy = (
            "Run `aiomigrate status` to see the state of the database."
            if started
            else "Run the command again."
        )
        output.document(lambda: {"interrupted": "SIGINT", "what": what})
        output.error(what, remedy)
        return Exit.INTERRUPTED
    except AiomigrateError as exc:
        show_error(output, exc)
        return Exit.USAGE if isinstance(exc, ConfigurationError) else Exit.FAILED
    except Exception as exc:  # noqa: BLE001 - the command never ends with a traceback
        show_unexpected(output, exc)
        return Exit.FAILED


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Returns the settings of a call: options override the environment and pyproject.toml.

    Raises:
        ConfigurationError: A source has an unknown key or an invalid value.
    """
    layer = {key: value for key, value in given.items() if value not in (None, [])}
    if layer.pop("allow_destructive", False):
        layer["on_destructive"] = "allow"
    if "params" in layer:
        layer["params"] = settings.parse_params(layer["params"])
    if "storage_options" in layer:
        layer["storage_options"] = settings.parse_pairs(layer["storage_options"], "-o")
    return settings.load(layer, cwd=Path.cwd(), env=os.environ)


def show_unexpected(output: Output, exc: Exception) -> None:
    """Shows an exception that is not an `AiomigrateError`, as a bug of aiomigrate."""
    what = f"Unexpected {type(exc).__name__}: {exc}."
    remedy = "Run the command again with -v for the traceback, and report it as a bug."
    facts = {"type": type(exc).__name__, "what": what, "remedy": remedy}
    output.document(lambda: {"error": facts})
    output.error(what, remedy, trace=exc)


def show_error(output: Output, exc: AiomigrateError) -> None:
    """Shows an `AiomigrateError`: what happened, and what to do next."""

    def document() -> object:
        facts = {"type": type(exc).__name__, "what": exc.what, "remedy": exc.remedy}
        where = {"line": exc.line, "version": exc.version, "path": exc.path}
        report = exc.report.to_dict() if isinstance(exc, MigrationFailedError) else {}
        return {**report, "error": {**facts, **{k: v for k, v in where.items() if v is not None}}}

    output.document(document)
    # The traceback of a failed migration is read from the journal instead (`show_traces`).
    trace = None if isinstance(exc, MigrationFailedError) else exc
    output.error(exc.what, exc.remedy, trace=trace)
