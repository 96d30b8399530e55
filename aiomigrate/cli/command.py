"""What every verb of the command shares: options, settings, exit codes, and error output."""

from __future__ import annotations

import contextlib
import enum
import gc
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
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
    """What the command's exit codes mean."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_AT_TARGET = 3
    INTERRUPTED = 130
    TERMINATED = 143


# ---- options, in groups that verbs share --------------------------------------------------------


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
    """Which database."""


def folder_options(
    *,
    migrations: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder of the migrations. Default: ./migrations."),
    ] = None,
) -> None:
    """Which migrations."""


def param_options(
    *,
    params: Annotated[
        list[str] | None,
        typer.Option(
            "-x", "--param", metavar="KEY=VALUE", help="Parameter of the migrations; repeatable."
        ),
    ] = None,
) -> None:
    """What the migrations are given."""


def ahead_options(
    *,
    on_ahead: Annotated[
        str | None,
        typer.Option(
            metavar="error|warn", help="When the database is newer than the code. Default: error."
        ),
    ] = None,
) -> None:
    """What to make of a newer database."""


def destructive_options(
    *,
    on_destructive: Annotated[
        str | None,
        typer.Option(
            metavar="keep|allow|refuse",
            help="Steps that discard what is there: keep a savepoint, allow without, or refuse. "
            "Default: keep.",
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
    """What to make of destructive steps."""


def lease_options(
    *,
    lease_ttl: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Silence after which a process is succeeded. Default: 30."
        ),
    ] = None,
    lease_wait: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long to wait for another process. Default: 600."),
    ] = None,
    on_unsafe_store: Annotated[
        str | None,
        typer.Option(
            metavar="error|warn", help="When the object store loses commits. Default: error."
        ),
    ] = None,
) -> None:
    """How the lease is taken."""


def running_options(
    *,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Migrations at work at once. Default: 16.")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Limit for each migration. Default: none."),
    ] = None,
) -> None:
    """How migrations are run."""


def output_options(
    *,
    as_json: Annotated[
        bool,
        typer.Option("--json", metavar="", help="One JSON document on stdout.", show_default=False),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v", "--verbose", metavar="", help="Debug logs and tracebacks.", show_default=False
        ),
    ] = False,
) -> None:
    """What is shown."""


Tables = Annotated[
    list[str] | None,
    typer.Option("--table", metavar="LINE", help="Only this line (table); repeatable."),
]
To = Annotated[
    list[str] | None,
    typer.Option(
        "--to",
        metavar="VERSION",
        help="To a version, or LINE=VERSION (repeatable). Default: the newest.",
    ),
]
Check = Annotated[
    bool,
    typer.Option("--check", metavar="", help="Exit with 3 when not at target.", show_default=False),
]


# ---- calling a verb -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the command: its settings, and where its output goes.

    Attributes:
        settings: Merged from all sources.
        output: Where everything goes.
    """

    settings: Settings
    output: Output
    tracker: Tracker = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tracker", Tracker(self.output))

    def options(self) -> dict[str, Any]:
        """Returns the settings as options of a manager, all but the database."""
        from aiomigrate.ledger.founding import OnUnsafeStore
        from aiomigrate.planning.preflight import OnDestructive
        from aiomigrate.planning.reconcile import OnAhead

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
            "on_ahead": OnAhead(chosen.on_ahead),
            "on_destructive": OnDestructive(chosen.on_destructive),
            "keep_savepoints": chosen.keep_savepoints,
            "on_unsafe_store": OnUnsafeStore(chosen.on_unsafe_store),
        }

    def manager(self) -> MigrationManager:
        """Returns a manager for the settings.

        Raises:
            ConfigurationError: A setting cannot be.
        """
        with _uncollected():
            from aiomigrate.manager import MigrationManager

        return MigrationManager(self.settings.uri, on_progress=self.tracker, **self.options())


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Loads modules without looking for garbage: they stay, and the looks take an eighth of it."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_collecting:
            gc.enable()


def verb(*groups: Callable[..., None]) -> Callable[[Callable[..., Exit]], Callable[..., None]]:
    """Makes a function of a `Call` a command that also takes the options of some groups."""

    def decorate(body: Callable[..., Exit]) -> Callable[..., None]:
        own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
        shared = [
            parameter
            for group in (*groups, output_options)
            for parameter in inspect.signature(group, eval_str=True).parameters.values()
        ]

        def command(**values: Any) -> None:
            given = {parameter.name: values.pop(parameter.name) for parameter in shared}
            raise typer.Exit(guarded(body, given, values))

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__name__, command.__doc__ = body.__name__, inspect.getdoc(body)
        return command

    return decorate


def guarded(body: Callable[..., Exit], given: dict[str, Any], values: Mapping[str, Any]) -> Exit:
    """Runs a verb; every failure becomes two lines on stderr and an exit code."""
    output = Output(as_json=given.pop("as_json"), verbose=given.pop("verbose"))
    call: Call | None = None
    try:
        settings = read_settings(given)
        output = Output(as_json=output.as_json, verbose=output.verbose, secrets=settings.secrets())
        configure_logs(output)
        call = Call(settings=settings, output=output)
        with output.alone():
            return body(call, **values)
    except KeyboardInterrupt:
        begun = call is not None and bool(call.tracker.seen)
        what = "Interrupted." if begun else "Interrupted before anything was begun."
        output.document(lambda: {"interrupted": "SIGINT", "what": what})
        output.error(what, "`aiomigrate status` tells where it is." if begun else "Run it again.")
        return Exit.INTERRUPTED
    except AiomigrateError as exc:
        show_error(output, exc)
        return Exit.USAGE if isinstance(exc, ConfigurationError) else Exit.FAILED
    except Exception as exc:  # noqa: BLE001 - the edge of the program: never a traceback
        show_defect(output, exc)
        return Exit.FAILED


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Returns the settings of a call: its options, then the environment, then pyproject.toml."""
    layer = {key: value for key, value in given.items() if value not in (None, [])}
    if layer.pop("allow_destructive", False):
        layer["on_destructive"] = "allow"
    if "params" in layer:
        layer["params"] = settings.parse_params(layer["params"])
    if "storage_options" in layer:
        layer["storage_options"] = settings.parse_pairs(layer["storage_options"], "-o")
    return settings.load(layer, cwd=Path.cwd(), env=os.environ)


def show_defect(output: Output, exc: Exception) -> None:
    """Shows an exception that is a defect of aiomigrate."""
    what = f"Unexpected {type(exc).__name__}: {exc}."
    remedy = "Run it again with -v for the traceback, and report it as a defect."
    facts = {"type": type(exc).__name__, "what": what, "remedy": remedy}
    output.document(lambda: {"error": facts})
    output.error(what, remedy, trace=exc)


def show_error(output: Output, exc: AiomigrateError) -> None:
    """Shows an error of aiomigrate: what happened, and what to do next."""

    def document() -> object:
        facts = {"type": type(exc).__name__, "what": exc.what, "remedy": exc.remedy}
        where = {"line": exc.line, "version": exc.version, "path": exc.path}
        report = exc.report.to_dict() if isinstance(exc, MigrationFailedError) else {}
        return {**report, "error": {**facts, **{k: v for k, v in where.items() if v is not None}}}

    output.document(document)
    # Where a migration failed is in the journal, and shown from there.
    trace = None if isinstance(exc, MigrationFailedError) else exc
    output.error(exc.what, exc.remedy, trace=trace)
