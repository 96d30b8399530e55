"""The verbs that change no database: those that look at it, and `new` and `version`."""

from __future__ import annotations

import enum
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aiomigrate import settings
from aiomigrate.cli.command import (
    Call,
    Check,
    Exit,
    Tables,
    To,
    ahead_options,
    database_options,
    destructive_options,
    folder_options,
    param_options,
    verb,
)
from aiomigrate.cli.output import HISTORY_HEADER, HISTORY_RIGHT, history_rows, json_text
from aiomigrate.cli.signals import run_async
from aiomigrate.errors import ConfigurationError

if TYPE_CHECKING:
    from aiomigrate.ledger.records import Event
    from aiomigrate.manager import MigrationManager
    from aiomigrate.migration.model import Target
    from aiomigrate.reporting.timing import RunTiming


# ---- verbs that only look -----------------------------------------------------------------------


@verb(database_options, folder_options, param_options, ahead_options, destructive_options)
def plan(call: Call, *, table: Tables = None, to: To = None, check: Check = False) -> Exit:
    """Show what upgrade would do. Writes nothing.

    Example: aiomigrate plan --table memos --to 3
    """
    target = settings.parse_target(to or ())
    return run_async(call, lambda manager: show_plan(call, manager, table, target, check=check))


async def show_plan(
    call: Call,
    manager: MigrationManager,
    tables: Collection[str] | None,
    to: Target,
    *,
    check: bool = False,
) -> Exit:
    """Prints what an upgrade would do."""
    planned = await manager.plan(tables=tables or None, to=to)
    call.output.say(manager.database)
    call.output.say(str(planned))
    call.output.document(planned.to_dict)
    return Exit.NOT_AT_TARGET if check and not planned.is_empty else Exit.OK


@verb(database_options, folder_options, param_options)
def status(call: Call, *, check: Check = False) -> Exit:
    """Show where every line is, and who holds the lease. Writes nothing.

    Example: aiomigrate status --check
    """

    async def work(manager: MigrationManager) -> Exit:
        found = await manager.get_status()
        call.output.say(str(found))
        call.output.document(found.to_dict)
        return Exit.NOT_AT_TARGET if check and not found.is_at_target else Exit.OK

    return run_async(call, work)


@verb(database_options, folder_options, param_options)
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

    return run_async(call, work)


@verb(database_options, folder_options, param_options, ahead_options)
def validate(call: Call, *, check: Check = False) -> Exit:
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

    return run_async(call, work)


@verb(database_options, folder_options)
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

    return run_async(call, work)


def _history_text(
    call: Call, manager: MigrationManager, events: Collection[Event], line: str | None
) -> str:
    from aiomigrate.text import table

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


@verb(database_options, folder_options, param_options)
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
            from aiomigrate.reporting.html import report_html

            others = [other for other in runs if other is not chosen]
            text = report_html(chosen, others, database=manager.database)
        else:
            text = str(chosen)
        call.output.deliver(text, output)
        return Exit.OK

    return run_async(call, work)


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


@verb(folder_options)
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
    from aiomigrate.authoring import scaffold

    path, draft = scaffold.write(Path(call.settings.migrations), description, table=table)
    call.output.say(f"Wrote {path}: version {draft.version} of {draft.table!r}.")
    call.output.say("Edit it, look with `aiomigrate plan`, run it with `aiomigrate upgrade`.")
    call.output.document(
        lambda: {"path": str(path), "version": draft.version, "table": draft.table}
    )
    return Exit.OK


@verb()
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
