"""The verbs that write to no database: those that read it, and `new` and `version`.

The verbs that change a database are in `migrate`.
"""

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


# ---- verbs that read a database -----------------------------------------------------------------


@verb(database_options, folder_options, param_options, ahead_options, destructive_options)
def plan(call: Call, *, table: Tables = None, to: To = None, check: Check = False) -> Exit:
    """Show what `upgrade` would do. Writes nothing.

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
    """Shows what an upgrade would do. Takes no lease and writes nothing.

    Args:
        call: The call of the command.
        manager: The manager of the database.
        tables: The lines to plan; `None` for all.
        to: The target.
        check: Whether to return `Exit.NOT_AT_TARGET` unless there is nothing to do.

    Raises:
        PlanError: The scripts do not fit the database.
        ScriptError: A script is invalid.
        LedgerError: The metadata tables cannot be trusted.
        StoreError: A LanceDB call failed.
    """
    planned = await manager.plan(tables=tables or None, to=to)
    call.output.say(manager.database)
    call.output.say(str(planned))
    call.output.document(planned.to_dict)
    return Exit.NOT_AT_TARGET if check and (planned.missing or not planned.is_empty) else Exit.OK


@verb(database_options, folder_options, param_options)
def status(call: Call, *, check: Check = False) -> Exit:
    """Show the version of every line and the holder of the lease. Writes nothing.

    Example: aiomigrate status --check
    """

    async def work(manager: MigrationManager) -> Exit:
        found = await manager.get_status()
        call.output.say(str(found))
        call.output.document(found.to_dict)
        return (
            Exit.NOT_AT_TARGET if check and (found.missing or not found.is_at_target) else Exit.OK
        )

    return run_async(call, work)


@verb(database_options, folder_options, param_options)
def health(call: Call) -> Exit:
    """Report whether the database is ready for use and, if not, why. For containers and jobs.

    Exits with 0 if the database is at target (background migrations excepted), 3 if it is not, 1
    if the last attempt failed.

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
    """Compare the scripts, the ledger and the tables. Writes nothing.

    Exits with 1 if they differ. Migrations that are merely pending do not count as a difference;
    with --check the command then exits with 3.

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
        if found.valid and not found.missing:
            call.output.say("Valid: scripts, ledger and tables agree.")
        call.output.document(
            lambda: {
                **found.to_dict(),
                "not_at_target": list(found.not_at_target),
                "missing": list(found.missing),
            }
        )
        if wrong:
            return Exit.FAILED
        return Exit.NOT_AT_TARGET if check and (behind or found.missing) else Exit.OK

    return run_async(call, work)


@verb(database_options, folder_options)
def history(
    call: Call,
    *,
    line: Annotated[
        str | None, typer.Argument(metavar="LINE", help="Only this line.", show_default=False)
    ] = None,
) -> Exit:
    """Show the journal: what was done to the database. Writes nothing.

    With -v every event is shown, and errors include their tracebacks.

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

    only_verbose = ("advanced", "intended")  # the progress of a migration, shown with -v
    shown = [e for e in events if call.output.verbose or (e.line and e.kind not in only_verbose)]
    if not shown:
        what = f"Nothing is recorded for {line!r}" if line else "Nothing is recorded yet"
        return f"{what} in {manager.database}."
    text = table(HISTORY_HEADER, history_rows(shown), HISTORY_RIGHT)
    if call.output.verbose:
        for event in shown:
            if event.error:
                text += f"\n\n{event.line} {event.version}:\n{event.error.rstrip()}"
    return text


class _Format(enum.StrEnum):
    """The formats of `report`."""

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
            help="The run, by its id or the start of it. Default: the last run.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        _Format,
        typer.Option(
            "--format",
            help="A table, JSON, one HTML page with a timeline, or a trace for Perfetto.",
        ),
    ] = _Format.TABLE,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE", help="File to write. Default: stdout.", show_default=False
        ),
    ] = None,
) -> Exit:
    """Show how long the migrations of a run took, and what they waited for.

    Writes nothing to the database.

    Example: aiomigrate report --format html --output report.html
    """

    async def work(manager: MigrationManager) -> Exit:
        if call.output.as_json and form not in (_Format.TABLE, _Format.JSON):
            raise ConfigurationError(
                f"--json and --format {form} contradict each other.", "Pass one of them."
            )
        runs = await manager.timings()
        chosen = _chosen_run(runs, run)
        if call.output.as_json or form is _Format.JSON:
            text = json_text(chosen.to_dict())
        elif form is _Format.TRACE:
            text = json_text(chosen.to_trace())
        elif form is _Format.HTML:
            from aiomigrate.reporting.html import report_html

            other_runs = [other for other in runs if other is not chosen]
            text = report_html(chosen, other_runs, database=manager.database)
        else:
            text = str(chosen)
        call.output.write_result(text, output)
        return Exit.OK

    return run_async(call, work)


def _chosen_run(runs: Collection[RunTiming], wanted: str | None) -> RunTiming:
    """Returns the run whose id starts with `wanted`; the last run if that is `None`.

    Raises:
        ConfigurationError: No run has such an id, or several have.
    """
    if not runs:
        raise ConfigurationError(
            "The journal contains no run that ended a migration.",
            "Run `aiomigrate upgrade` first, or check --uri.",
        )
    matching = [run for run in runs if run.run_id.startswith(wanted or "")]
    if wanted is None or len(matching) == 1:
        return matching[-1]
    named = ", ".join(f"{run.run_id} ({run.started_at:%Y-%m-%d %H:%M})" for run in list(runs)[-5:])
    raise ConfigurationError(
        f"{'No run id starts' if not matching else 'Several run ids start'} with {wanted!r}.",
        f"Pass the id of one run. The latest runs are {named}.",
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
        typer.Option(metavar="TABLE", help="The table of the migration.", show_default=False),
    ] = None,
) -> Exit:
    """Write the next migration file. The file can be run unchanged.

    Example: aiomigrate new "add tags" --table memos
    """
    from aiomigrate.authoring import scaffold

    path, draft = scaffold.write(Path(call.settings.migrations), description, table=table)
    call.output.say(f"Wrote {path}: version {draft.version} of {draft.table!r}.")
    call.output.say("Edit it, check it with `aiomigrate plan`, apply it with `aiomigrate upgrade`.")
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
