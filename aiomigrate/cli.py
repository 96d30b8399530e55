"""The `aiomigrate` command: verbs, options, exit codes.

A face over `MigrationManager`: it reads settings (`config`), runs one verb, and shows what came of
it (`console`). Nothing here knows how migrations work. The library is imported only when a verb
needs it, so that `--help` and `version` answer at once.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import inspect
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from aiomigrate import config
from aiomigrate.config import Settings
from aiomigrate.console import (
    HISTORY_HEADER,
    HISTORY_RIGHT,
    Output,
    Tracker,
    configure_logs,
    history_rows,
    json_text,
    show_report,
    silence,
)
from aiomigrate.errors import AiomigrateError, ConfigurationError, MigrationFailedError

if TYPE_CHECKING:
    from aiomigrate.manager import MigrationManager
    from aiomigrate.model import Event, Target
    from aiomigrate.plan import Plan
    from aiomigrate.report import Status
    from aiomigrate.timing import RunTiming

T = TypeVar("T")


class Exit(enum.IntEnum):
    """What the command's exit codes mean."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_AT_TARGET = 3
    INTERRUPTED = 130
    TERMINATED = 143


_EPILOG = """\
Exit codes: 0 at target (or done); 1 failed; 2 usage or configuration; 3 not at target (health;
status, validate and plan with --check); 130 and 143 interrupted by Ctrl-C or SIGTERM.

Settings come from the command line, else from AIOMIGRATE_URI, AIOMIGRATE_MIGRATIONS, ..., else
from tool.aiomigrate in the nearest pyproject.toml, else the database is ./data/app.lancedb and
its migrations are in ./migrations.
"""

app = typer.Typer(
    name="aiomigrate",
    help="Crash-safe, exactly-once migrations for LanceDB.",
    epilog=_EPILOG.replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n\n"),
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich for it takes longer than all else of `--help`
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def run(argv: list[str]) -> int:
    """Runs the command.

    Args:
        argv: Its arguments, without the program's name.

    Returns:
        The exit code.
    """
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    if not sys.stdout.isatty():
        # Else typer colours its help in CI, into files and pipes too.
        os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    try:
        return int(app(argv or ["--help"], prog_name="aiomigrate", standalone_mode=False) or 0)
    except usage_error as exc:
        context = getattr(exc, "ctx", None)
        path = context.command_path if context is not None else "aiomigrate"
        output = Output(as_json="--json" in argv, verbose=False)
        what = exc.format_message()  # type: ignore[attr-defined] # of click's UsageError
        remedy = f"`{path} --help` lists what it takes, with an example."
        output.document(lambda: {"error": {"type": "UsageError", "what": what, "remedy": remedy}})
        output.error(what, remedy)
        return Exit.USAGE
    except BrokenPipeError:  # of `--help`: what verbs say goes through `Output`
        silence(sys.stdout)
        return Exit.OK


# ---- options, in groups that verbs share --------------------------------------------------------


def _database_options(
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


def _folder_options(
    *,
    migrations: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder of the migrations. Default: ./migrations."),
    ] = None,
) -> None:
    """Which migrations."""


def _param_options(
    *,
    params: Annotated[
        list[str] | None,
        typer.Option(
            "-x", "--param", metavar="KEY=VALUE", help="Parameter of the migrations; repeatable."
        ),
    ] = None,
) -> None:
    """What the migrations are given."""


def _ahead_options(
    *,
    on_ahead: Annotated[
        str | None,
        typer.Option(
            metavar="error|warn", help="When the database is newer than the code. Default: error."
        ),
    ] = None,
) -> None:
    """What to make of a newer database."""


def _destructive_options(
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


def _lease_options(
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


def _running_options(
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


def _output_options(
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


_Tables = Annotated[
    list[str] | None,
    typer.Option("--table", metavar="LINE", help="Only this line (table); repeatable."),
]
_To = Annotated[
    list[str] | None,
    typer.Option(
        "--to",
        metavar="VERSION",
        help="To a version, or LINE=VERSION (repeatable). Default: the newest.",
    ),
]
_Check = Annotated[
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
        from aiomigrate.ledger import OnUnsafeStore
        from aiomigrate.plan import OnDestructive
        from aiomigrate.reconcile import OnAhead

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


def _verb(*groups: Callable[..., None]) -> Callable[[Callable[..., Exit]], Callable[..., Exit]]:
    """Makes a function of a `Call` a verb that also takes the options of some groups."""

    def decorate(body: Callable[..., Exit]) -> Callable[..., Exit]:
        own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
        shared = [
            parameter
            for group in (*groups, _output_options)
            for parameter in inspect.signature(group, eval_str=True).parameters.values()
        ]

        def command(**values: Any) -> None:
            given = {parameter.name: values.pop(parameter.name) for parameter in shared}
            raise typer.Exit(_guarded(body, given, values))

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name=body.__name__, help=inspect.getdoc(body))(command)
        return body

    return decorate


def _guarded(body: Callable[..., Exit], given: dict[str, Any], values: Mapping[str, Any]) -> Exit:
    """Runs a verb; every failure becomes two lines on stderr and an exit code."""
    output = Output(as_json=given.pop("as_json"), verbose=given.pop("verbose"))
    call: Call | None = None
    try:
        settings = _settings(given)
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
        _show_error(output, exc)
        return Exit.USAGE if isinstance(exc, ConfigurationError) else Exit.FAILED
    except Exception as exc:  # noqa: BLE001 - the edge of the program: never a traceback
        _show_defect(output, exc)
        return Exit.FAILED


def _settings(given: Mapping[str, Any]) -> Settings:
    layer = {key: value for key, value in given.items() if value not in (None, [])}
    if layer.pop("allow_destructive", False):
        layer["on_destructive"] = "allow"
    if "params" in layer:
        layer["params"] = config.parse_params(layer["params"])
    if "storage_options" in layer:
        layer["storage_options"] = config.parse_pairs(layer["storage_options"], "-o")
    return config.load(layer, cwd=Path.cwd(), env=os.environ)


def _show_defect(output: Output, exc: Exception) -> None:
    what = f"Unexpected {type(exc).__name__}: {exc}."
    remedy = "Run it again with -v for the traceback, and report it as a defect."
    facts = {"type": type(exc).__name__, "what": what, "remedy": remedy}
    output.document(lambda: {"error": facts})
    output.error(what, remedy, trace=exc)


def _show_error(output: Output, exc: AiomigrateError) -> None:
    def document() -> object:
        facts = {"type": type(exc).__name__, "what": exc.what, "remedy": exc.remedy}
        where = {"line": exc.line, "version": exc.version, "path": exc.path}
        report = exc.report.to_dict() if isinstance(exc, MigrationFailedError) else {}
        return {**report, "error": {**facts, **{k: v for k, v in where.items() if v is not None}}}

    output.document(document)
    # Where a migration failed is in the journal, and shown from there.
    trace = None if isinstance(exc, MigrationFailedError) else exc
    output.error(exc.what, exc.remedy, trace=trace)


# ---- running it, and being interrupted ----------------------------------------------------------


def _run(call: Call, work: Callable[[MigrationManager], Awaitable[Exit]]) -> Exit:
    """Runs a verb's coroutine until it ends or a signal does, which is then explained."""
    import anyio

    async def main() -> Exit:
        async with call.manager() as manager:
            caught: list[signal.Signals] = []
            result = await _until_signal(lambda: work(manager), caught, call.output)
            if result is not None:
                return result
            _deafen()
            await _explain(call, manager, caught[0])
            return Exit.INTERRUPTED if caught[0] is signal.SIGINT else Exit.TERMINATED

    return anyio.run(main)


def _deafen() -> None:
    """Lets further signals pass: the process only explains the first one, and ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


_PATIENCE_S = 2.0
"""After an interruption, silence that looks like a command that hangs."""


async def _until_signal(
    work: Callable[[], Awaitable[T]], caught: list[signal.Signals], output: Output
) -> T | None:
    """Returns what `work` returns, or `None` when a signal cancelled it first.

    Raises:
        Exception: What `work` raises.
    """
    import anyio

    error: Exception | None = None
    result: T | None = None

    async def reassure() -> None:
        await anyio.sleep(_PATIENCE_S)
        output.note("Stopping: what is in hand is being ended or undone.")

    async def watch(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        try:
            receiver = anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM)
            with receiver as signals:
                task_status.started()
                async for number in signals:
                    again = bool(caught)
                    caught.append(number)
                    scope.cancel()
                    if again:
                        output.note("Still undoing what was in hand; nothing is lost by waiting.")
                    else:
                        group.start_soon(reassure)
        except NotImplementedError:  # Windows: Ctrl-C cancels everything, as asyncio does it
            task_status.started()

    async with anyio.create_task_group() as group:
        scope = anyio.CancelScope()
        await group.start(watch)
        with scope:
            try:
                result = await work()
            except Exception as exc:  # noqa: BLE001 - carried out of the group as it is
                error = exc
        group.cancel_scope.cancel()
    if error is not None:
        raise error
    return result


async def _explain(call: Call, manager: MigrationManager, number: signal.Signals) -> None:
    """Says what an interruption left, read from the database rather than remembered."""
    import anyio

    from aiomigrate.lease import HOST

    status: Status | None = None
    events: tuple[Event, ...] = ()
    with anyio.move_on_after(10):
        try:
            events = await manager.history()
            status = await manager.get_status()
        except AiomigrateError as exc:
            if call.tracker.seen:
                call.output.note(f"The state could not be read: {exc.what}")
    what = interruption(call.tracker, events, status, process=(HOST, os.getpid()))
    call.output.document(lambda: {"interrupted": number.name, "what": what})
    remedy = "Run `aiomigrate upgrade` to go on." if call.tracker.seen else "Run it again to go on."
    call.output.note(f"Interrupted. {what}\n{remedy}")


def interruption(
    tracker: Tracker, events: Collection[Event], status: Status | None, *, process: tuple[str, int]
) -> str:
    """Returns in words what state an interrupted run left things in. Pure.

    Args:
        tracker: What the run told while it ran.
        events: The journal afterwards.
        status: Lines and lease afterwards, `None` if they could not be read.
        process: Host and id of this process.
    """
    ours = [event for event in events if (event.host, event.pid) == process]
    epoch = max((event.epoch for event in ours), default=0)
    mine = [event for event in ours if event.epoch == epoch]
    holder = status.holder if status is not None else None
    held = holder is not None and (holder.host, holder.pid) == process
    parts = [] if tracker.seen else ["No migration was begun."]
    parts += [
        f"{word.capitalize()}: {_list_of(keys)}."
        for word in ("applied", "rolled back", "failed", "skipped")
        if (keys := tracker.in_state(word))
    ]
    parts += [
        f"{key[0]} {key[1]} was in hand: {_fate(key, mine, unresolved=held)}."
        for key in tracker.in_state("running")
    ]
    if waiting := tracker.in_state("waiting"):
        parts.append(f"Not begun: {_list_of(waiting)}.")
    if status is None:
        parts.append("Who holds the lease could not be read.")
    elif holder is None:
        parts.append("Nothing is locked.")
    elif held:
        parts.append("A commit did not end: the lease is left to expire by itself.")
    else:
        parts.append(f"The lease is held by {holder}.")
    return " ".join(parts)


def _list_of(keys: Collection[tuple[str, int]], most: int = 6) -> str:
    named = [f"{line} {version}" for line, version in keys]
    more = f" and {len(named) - most} more" if len(named) > most else ""
    return ", ".join(named[:most]) + more


def _fate(key: tuple[str, int], events: Collection[Event], *, unresolved: bool) -> str:
    mine = [event for event in events if (event.line, event.version) == key]
    if unresolved:
        return "the next run looks how far it came, and goes on from there"
    if not mine:
        return "it had changed nothing"
    last = mine[-1]
    if last.kind == "applied":
        return "it was applied"
    if last.kind == "failed":
        if foreign := last.detail.get("unresolved"):
            return f"it could not be undone ({foreign})"
        if any(e.kind == "restored" and e.epoch == last.epoch for e in mine):
            return "it was undone"
        changed = any(t.get("before") != t.get("after") for t in last.tables.values())
        return "the next run goes on with it" if changed else "it had changed nothing"
    return "the next run recovers it"


# ---- verbs that change the database -------------------------------------------------------------


@_verb(
    _database_options,
    _folder_options,
    _param_options,
    _ahead_options,
    _destructive_options,
    _lease_options,
    _running_options,
)
def upgrade(
    call: Call,
    *,
    table: _Tables = None,
    to: _To = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Show the plan only.", show_default=False)
    ] = False,
    skip_background: Annotated[
        bool,
        typer.Option(
            "--skip-background",
            metavar="",
            help="Leave out what is marked to run in the background, and what comes after it.",
            show_default=False,
        ),
    ] = False,
    background_only: Annotated[
        bool,
        typer.Option(
            "--background-only",
            metavar="",
            help="Do only what --skip-background leaves out.",
            show_default=False,
        ),
    ] = False,
    uris_from: Annotated[
        Path | None,
        typer.Option(
            "--uris-from",
            metavar="FILE",
            help="Many databases: one path or URI on each line ('-' for stdin).",
            show_default=False,
        ),
    ] = None,
    glob: Annotated[
        str | None,
        typer.Option(
            "--glob",
            metavar="PATTERN",
            help="Many databases: the folders that it names, such as 'tenants/*/app.lancedb'.",
            show_default=False,
        ),
    ] = None,
    at_once: Annotated[
        int,
        typer.Option("--at-once", metavar="N", min=1, help="How many of many databases at once."),
    ] = 8,
) -> Exit:
    """Bring the database to its target, each migration once.

    With --uris-from or --glob many databases, of which one that fails holds up no other; run it
    again to go on.

    Example: aiomigrate upgrade --uri ./data/app.lancedb -x dimension=1536
    """
    target = config.parse_target(to or ())
    if uris_from is not None or glob is not None:
        if dry_run or table or to or background_only:
            raise ConfigurationError(
                "Many databases go to their target, without --dry-run, --table, --to or "
                "--background-only.",
                "Leave those out, or name one database with --uri.",
            )
        uris = _uris(uris_from, glob)
        return _run_many(call, uris, at_once, background=not skip_background)
    if dry_run:
        return _run(call, lambda manager: _show_plan(call, manager, table, target))
    if skip_background and background_only:
        raise ConfigurationError(
            "--skip-background and --background-only leave nothing to do.", "Pass one of them."
        )
    part = "fast" if skip_background else "background" if background_only else "all"
    return _run(call, lambda manager: _upgrade(call, manager, table, target, part))


async def _upgrade(
    call: Call, manager: MigrationManager, tables: Collection[str] | None, to: Target, chosen: str
) -> Exit:
    from aiomigrate.plan import Part

    output, part = call.output, Part(chosen)
    if not output.as_json:
        whole = await manager.plan(tables=tables or None, to=to)
        planned = whole.part(part)
        if not (planned.needs_background if part is Part.BACKGROUND else planned.needs_lease):
            output.say(_at_target(manager, whole))
            return Exit.OK
        output.say(manager.database)
        output.say(f"{planned}\n")
    try:
        with call.tracker.showing():
            if part is Part.BACKGROUND:
                report = await manager.run_background(tables=tables or None, to=to)
            else:
                report = await manager.upgrade(
                    tables=tables or None, to=to, background=part is Part.ALL
                )
    except MigrationFailedError as exc:
        show_report(output, exc.report)
        await _show_traces(call, manager, exc)
        raise
    show_report(output, report)
    output.document(report.to_dict)
    return Exit.OK


def _uris(file: Path | None, pattern: str | None) -> list[str]:
    """Returns the databases that a file and a pattern name.

    Raises:
        ConfigurationError: The file cannot be read, or they name none.
    """
    from aiomigrate.many import expand_glob

    found: list[str] = []
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigurationError(
                f"{file} cannot be read.", "Pass a text file with one path or URI on each line."
            ) from exc
        lines = (line.strip() for line in text.splitlines())
        found += [line for line in lines if line and not line.startswith("#")]
    if pattern is not None:
        found += expand_glob(pattern)
    if not found:
        raise ConfigurationError(f"{file} names no database.", "Write one path or URI on a line.")
    return found


def _run_many(call: Call, uris: list[str], at_once: int, *, background: bool) -> Exit:
    """Upgrades many databases until all have ended or a signal comes."""
    import anyio

    from aiomigrate.many import DatabaseReport, ManyReport, migrate_all

    output, done = call.output, 0

    def told(one: DatabaseReport) -> None:
        nonlocal done
        done += 1
        applied = len(one.report.applied) if one.report else 0
        came = f"{applied} applied" if one.error is None else f"failed: {one.error.what}"
        if applied or not one.is_ok:
            output.say(f"[{done}/{len(uris)}] {one.database}: {came}")

    async def work() -> ManyReport:
        return await migrate_all(
            uris, at_once=at_once, background=background, on_done=told, **call.options()
        )

    async def main() -> Exit:
        caught: list[signal.Signals] = []
        report = await _until_signal(work, caught, output)
        if report is None:
            _deafen()
            what = f"Interrupted: {done} of {len(uris)} databases had ended."
            output.document(lambda: {"interrupted": caught[0].name, "what": what})
            output.note(f"{what}\nRun it again to go on: those at target cost next to nothing.")
            return Exit.INTERRUPTED if caught[0] is signal.SIGINT else Exit.TERMINATED
        output.say(str(report))
        output.document(report.to_dict)
        return Exit.FAILED if report.failed else Exit.OK

    return anyio.run(main)


def _at_target(manager: MigrationManager, planned: Plan) -> str:
    left = ", ".join(f"{line} {version}" for line, version in planned.deferred)
    but = f" but for work in the background ({left})" if left else ""
    lines = [f"Everything is at target{but}: nothing to do. ({manager.database})"]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in planned.warnings)])


async def _show_traces(call: Call, manager: MigrationManager, exc: MigrationFailedError) -> None:
    """Shows, with `-v`, the tracebacks of the migrations that failed, from the journal."""
    if not call.output.verbose:
        return
    last = {(e.line, e.version): e for e in await manager.history() if e.kind == "failed"}
    for step in exc.report.failed:
        event = last.get((step.line, step.version))
        if event is not None and event.error:
            call.output.note(f"{step.line} {step.version}:\n{event.error.rstrip()}")


@_verb(_database_options, _folder_options, _param_options, _ahead_options, _lease_options)
def rollback(
    call: Call,
    *,
    line: Annotated[
        str | None, typer.Argument(metavar="LINE", help="The line (table).", show_default=False)
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="VERSION",
            help="Back to a version of LINE, or LINE=VERSION (repeatable). Default: one step back.",
        ),
    ] = None,
    give_up: Annotated[
        bool,
        typer.Option(
            "--allow-destructive",
            metavar="",
            help="Give up what others committed since, where nothing else undoes a migration.",
            show_default=False,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Show the plan only.", show_default=False)
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.", show_default=False)
    ] = False,
) -> Exit:
    """Undo applied migrations, the newest first.

    By their inverses, or by returning tables to where they were. Shows the plan, and asks. Refuses
    what would discard commits of others.

    Example: aiomigrate rollback memos --to 3
    """
    targets = _going_back(line, to or ())
    return _run(
        call,
        lambda manager: _rollback(
            call, manager, targets, give_up=give_up, dry_run=dry_run, ask=not yes
        ),
    )


def _going_back(line: str | None, to: Collection[str]) -> str | dict[str, int]:
    # What is no LINE=VERSION is the version of LINE, also beside those of others.
    target = config.parse_target([t if "=" in t or line is None else f"{line}={t}" for t in to])
    if isinstance(target, dict):
        if line is not None and line not in target:
            raise ConfigurationError(
                f"--to names other lines than {line}.", "Leave the line out, or name it in --to."
            )
        return target
    if line is None:
        raise ConfigurationError(
            "rollback was not told which line.", "Pass LINE, or --to LINE=VERSION."
        )
    return line


async def _rollback(
    call: Call,
    manager: MigrationManager,
    targets: str | dict[str, int],
    *,
    give_up: bool,
    dry_run: bool,
    ask: bool,
) -> Exit:
    output = call.output
    planned = await manager.plan_rollback(targets, allow_destructive=give_up)
    output.say(manager.database)
    output.say(str(planned))
    if dry_run or planned.is_empty:
        output.document(planned.to_dict)
        return Exit.OK
    output.say("")
    if ask and (output.as_json or not sys.stdin.isatty()):
        raise ConfigurationError(
            "rollback asks before it undoes anything, and there is no terminal to ask on.",
            "Pass --yes once the plan is what you want (--dry-run shows it).",
        )
    if ask and not typer.confirm("Undo this?"):
        output.say("Nothing was changed.")
        return Exit.OK
    try:
        with call.tracker.showing():
            report = await manager.rollback(targets, allow_destructive=give_up)
    except MigrationFailedError as exc:
        show_report(output, exc.report)
        await _show_traces(call, manager, exc)
        raise
    show_report(output, report)
    output.document(report.to_dict)
    return Exit.OK


@_verb(_database_options, _folder_options, _param_options, _lease_options)
def prune(
    call: Call,
    *,
    older_than: Annotated[
        float, typer.Option(metavar="SECONDS", help="Only of migrations applied so long ago.")
    ] = 0.0,
) -> Exit:
    """Delete the savepoints kept of destructive migrations.

    They hold disk space. Each run does so with those that are a week old.

    Example: aiomigrate prune --older-than 86400
    """

    async def work(manager: MigrationManager) -> Exit:
        pruned = await manager.prune(older_than=older_than)
        for kept in pruned:
            call.output.say(f"{kept.key[0]} {kept.key[1]}: savepoint of {kept.table} deleted.")
        if not pruned:
            call.output.say("No savepoint to delete.")
        call.output.document(
            lambda: {
                "pruned": [
                    {"line": k.key[0], "version": k.key[1], "table": k.table, "branch": k.branch}
                    for k in pruned
                ]
            }
        )
        return Exit.OK

    return _run(call, work)


@_verb(_database_options, _folder_options, _param_options, _lease_options)
def stamp(call: Call, *, table: _Tables = None, to: _To = None) -> Exit:
    """Record lines at versions without running anything.

    The baseline of a database. Say which: --table, --to, or `--to latest` for everything.

    Example: aiomigrate stamp --table memos --to 3
    """
    if not table and not to:
        raise ConfigurationError(
            "stamp records migrations as applied without running them; it was not told which.",
            "Pass --table LINE, --to VERSION, or --to latest for all lines.",
        )
    target = config.parse_target(to or ())

    async def work(manager: MigrationManager) -> Exit:
        versions = await manager.stamp(tables=table or None, to=target)
        for line, version in sorted(versions.items()):
            call.output.say(f"{line} is recorded at version {version}.")
        if not versions:
            call.output.say("There are no migrations: nothing to record.")
        call.output.document(lambda: {"stamped": dict(versions)})
        return Exit.OK

    return _run(call, work)


@_verb(_database_options, _folder_options, _lease_options)
def unlock(
    call: Call,
    *,
    background: Annotated[
        bool,
        typer.Option(
            "--background",
            metavar="",
            help="The lease of work in the background.",
            show_default=False,
        ),
    ] = False,
) -> Exit:
    """Free the lease of a process that is dead. It is watched first: a live one is left alone.

    Rarely needed: the next run does the same by itself.

    Example: aiomigrate unlock
    """

    async def work(manager: MigrationManager) -> Exit:
        if not call.output.as_json:
            call.output.note("Looking; a lease that is held is watched for its time to live.")
        holder = await manager.unlock(background=background)
        if holder is None:
            call.output.say(f"The lease of {manager.database} is free.")
        else:
            call.output.say(f"The lease of {holder} was dead and has been removed.")
        call.output.document(lambda: {"removed": str(holder) if holder else None})
        return Exit.OK

    return _run(call, work)


# ---- verbs that only look -----------------------------------------------------------------------


@_verb(_database_options, _folder_options, _param_options, _ahead_options, _destructive_options)
def plan(call: Call, *, table: _Tables = None, to: _To = None, check: _Check = False) -> Exit:
    """Show what upgrade would do. Writes nothing.

    Example: aiomigrate plan --table memos --to 3
    """
    target = config.parse_target(to or ())
    return _run(call, lambda manager: _show_plan(call, manager, table, target, check=check))


async def _show_plan(
    call: Call,
    manager: MigrationManager,
    tables: Collection[str] | None,
    to: Target,
    *,
    check: bool = False,
) -> Exit:
    planned = await manager.plan(tables=tables or None, to=to)
    call.output.say(manager.database)
    call.output.say(str(planned))
    call.output.document(planned.to_dict)
    return Exit.NOT_AT_TARGET if check and not planned.is_empty else Exit.OK


@_verb(_database_options, _folder_options, _param_options)
def status(call: Call, *, check: _Check = False) -> Exit:
    """Show where every line is, and who holds the lease. Writes nothing.

    Example: aiomigrate status --check
    """

    async def work(manager: MigrationManager) -> Exit:
        found = await manager.get_status()
        call.output.say(str(found))
        call.output.document(found.to_dict)
        return Exit.NOT_AT_TARGET if check and not found.is_at_target else Exit.OK

    return _run(call, work)


@_verb(_database_options, _folder_options, _param_options)
def health(call: Call) -> Exit:
    """Say whether the database may be used, and if not, why. For containers and jobs.

    Exits with 0 when it is at target (work in the background aside), 3 when it is not, 1 when the
    last attempt failed.

    Example: aiomigrate health --json
    """

    async def work(manager: MigrationManager) -> Exit:
        found = await manager.health()
        call.output.say(str(found))
        call.output.document(found.to_dict)
        if found.is_ready:
            return Exit.OK
        return Exit.FAILED if found.failed else Exit.NOT_AT_TARGET

    return _run(call, work)


@_verb(_database_options, _folder_options, _param_options, _ahead_options)
def validate(call: Call, *, check: _Check = False) -> Exit:
    """Compare scripts, ledger and live tables. Writes nothing.

    Exits with 1 when something is wrong; lines that are merely behind count with --check.

    Example: aiomigrate validate --check
    """

    async def work(manager: MigrationManager) -> Exit:
        found = await manager.validate()
        behind = set(found.not_at_target)
        wrong = [error for error in found.errors if error not in behind]
        for word, texts in (
            ("error", wrong),
            ("pending", found.not_at_target),
            ("warning", found.warnings),
        ):
            for text in texts:
                call.output.say(f"{word}: {text}")
        if found.valid:
            call.output.say("Valid: scripts, ledger and tables agree.")
        call.output.document(
            lambda: {**found.to_dict(), "not_at_target": list(found.not_at_target)}
        )
        if wrong:
            return Exit.FAILED
        return Exit.NOT_AT_TARGET if check and behind else Exit.OK

    return _run(call, work)


@_verb(_database_options, _folder_options)
def history(
    call: Call,
    *,
    line: Annotated[
        str | None, typer.Argument(metavar="LINE", help="Only this line.", show_default=False)
    ] = None,
) -> Exit:
    """Show what was done to the database, from its journal. Writes nothing.

    With -v every event is shown, and errors with their tracebacks.

    Example: aiomigrate history memos
    """

    async def work(manager: MigrationManager) -> Exit:
        events = await manager.history(line)
        call.output.document(lambda: [event.to_dict() for event in events])
        call.output.say(_history_text(call, manager, events, line))
        return Exit.OK

    return _run(call, work)


def _history_text(
    call: Call, manager: MigrationManager, events: Collection[Event], line: str | None
) -> str:
    from aiomigrate.render import table

    inner = ("advanced", "intended")  # how a migration got on; for whoever asks with -v
    shown = [e for e in events if call.output.verbose or (e.line and e.kind not in inner)]
    if not shown:
        what = f"Nothing is recorded of {line!r}" if line else "Nothing is recorded yet"
        return f"{what} in {manager.database}."
    text = table(HISTORY_HEADER, history_rows(shown), HISTORY_RIGHT)
    if call.output.verbose:
        for event in shown:
            if event.error:
                text += f"\n\n{event.line} {event.version}:\n{event.error.rstrip()}"
    return text


class _Format(enum.StrEnum):
    """How a timing report is shown."""

    TABLE = "table"
    JSON = "json"
    HTML = "html"
    TRACE = "trace"


@_verb(_database_options, _folder_options, _param_options)
def report(
    call: Call,
    *,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="The run, by (the beginning of) its id. Default: the last.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        _Format,
        typer.Option(
            "--format",
            help="A table; JSON; one HTML page with a timeline; or a trace for Perfetto.",
        ),
    ] = _Format.TABLE,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE", help="File to write; default: stdout.", show_default=False
        ),
    ] = None,
) -> Exit:
    """Show where the time of a run went.

    What waited for what, what was slow. Writes nothing.

    Example: aiomigrate report --format html --output report.html
    """

    async def work(manager: MigrationManager) -> Exit:
        if call.output.as_json and form not in (_Format.TABLE, _Format.JSON):
            raise ConfigurationError(
                f"--json is --format json; --format {form} is something else.", "Pass one of them."
            )
        runs = await manager.timings()
        chosen = _chosen_run(runs, run)
        if call.output.as_json or form is _Format.JSON:
            text = json_text(chosen.to_dict())
        elif form is _Format.TRACE:
            text = json_text(chosen.to_trace())
        elif form is _Format.HTML:
            from aiomigrate.charts import report_html

            others = [other for other in runs if other is not chosen]
            text = report_html(chosen, others, database=manager.database)
        else:
            text = str(chosen)
        call.output.deliver(text, output)
        return Exit.OK

    return _run(call, work)


def _chosen_run(runs: Collection[RunTiming], wanted: str | None) -> RunTiming:
    """Returns the run of an id's beginning, the last one for none.

    Raises:
        ConfigurationError: There is none, or several begin so.
    """
    if not runs:
        raise ConfigurationError(
            "The history tells of no run in which a migration ended.",
            "Run `aiomigrate upgrade` first, or check --uri.",
        )
    fitting = [run for run in runs if run.run_id.startswith(wanted or "")]
    if wanted is None or len(fitting) == 1:
        return fitting[-1]
    named = ", ".join(f"{run.run_id} ({run.started_at:%Y-%m-%d %H:%M})" for run in list(runs)[-5:])
    raise ConfigurationError(
        f"{'No run begins' if not fitting else 'Several runs begin'} with {wanted!r}.",
        f"The last ones are {named}.",
    )


# ---- verbs without a database -------------------------------------------------------------------


@_verb(_folder_options)
def new(
    call: Call,
    *,
    description: Annotated[
        str, typer.Argument(help='A few words, such as "add tags".', show_default=False)
    ],
    table: Annotated[
        str | None,
        typer.Option(metavar="TABLE", help="The table it is for.", show_default=False),
    ] = None,
) -> Exit:
    """Write the next migration file, which runs as it is.

    Example: aiomigrate new "add tags" --table memos
    """
    from aiomigrate import scaffold

    path, draft = scaffold.write(Path(call.settings.migrations), description, table=table)
    call.output.say(f"Wrote {path}: version {draft.version} of {draft.table!r}.")
    call.output.say("Edit it, look with `aiomigrate plan`, run it with `aiomigrate upgrade`.")
    call.output.document(
        lambda: {"path": str(path), "version": draft.version, "table": draft.table}
    )
    return Exit.OK


@_verb()
def version(call: Call) -> Exit:
    """Show the versions of aiomigrate, LanceDB and Python.

    Example: aiomigrate version --json
    """
    import platform
    from importlib import metadata

    from aiomigrate.version import __version__

    try:
        lancedb = metadata.version("lancedb")
    except metadata.PackageNotFoundError:
        lancedb = "not installed"
    python = platform.python_version()
    call.output.say(f"aiomigrate {__version__} (lancedb {lancedb}, Python {python})")
    call.output.document(lambda: {"aiomigrate": __version__, "lancedb": lancedb, "python": python})
    return Exit.OK
