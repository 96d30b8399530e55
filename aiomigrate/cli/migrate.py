"""The verbs that change a database: `upgrade`, `rollback`, `prune`, `stamp`, `repair`, `unlock`.

The verbs that only read a database are in `inspect`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aiomigrate import settings
from aiomigrate.cli.command import (
    Call,
    Exit,
    Tables,
    To,
    ahead_options,
    database_options,
    destructive_options,
    folder_options,
    lease_options,
    param_options,
    running_options,
    verb,
)
from aiomigrate.cli.inspect import show_plan
from aiomigrate.cli.output import show_report
from aiomigrate.cli.signals import ignore_signals, run_async, until_signal
from aiomigrate.errors import ConfigurationError, MigrationFailedError

if TYPE_CHECKING:
    from aiomigrate.manager import MigrationManager
    from aiomigrate.migration.model import Target
    from aiomigrate.planning.plan import Plan


@verb(
    database_options,
    folder_options,
    param_options,
    ahead_options,
    destructive_options,
    lease_options,
    running_options,
)
def upgrade(  # long, since its signature declares the options
    call: Call,
    *,
    table: Tables = None,
    to: To = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Show the plan only.", show_default=False)
    ] = False,
    skip_background: Annotated[
        bool,
        typer.Option(
            "--skip-background",
            metavar="",
            help="Leave out background migrations and those that come after them.",
            show_default=False,
        ),
    ] = False,
    background_only: Annotated[
        bool,
        typer.Option(
            "--background-only",
            metavar="",
            help="Run only what --skip-background leaves out.",
            show_default=False,
        ),
    ] = False,
    uris_from: Annotated[
        Path | None,
        typer.Option(
            "--uris-from",
            metavar="FILE",
            help="Upgrade many databases: a file with one path or URI per line ('-' for stdin).",
            show_default=False,
        ),
    ] = None,
    glob: Annotated[
        str | None,
        typer.Option(
            "--glob",
            metavar="PATTERN",
            help="Upgrade many databases: the folders that match, as in 'tenants/*/app.lancedb'.",
            show_default=False,
        ),
    ] = None,
    at_once: Annotated[
        int,
        typer.Option(
            "--at-once",
            metavar="N",
            min=1,
            help="Maximum number of databases upgraded at the same time.",
        ),
    ] = 8,
) -> Exit:
    """Upgrade the database to its target. Each migration is applied once.

    With --uris-from or --glob, upgrade many databases. If one fails, the others are still
    upgraded; run the command again to continue.

    Example: aiomigrate upgrade --uri ./data/app.lancedb -x dimension=1536
    """
    target = settings.parse_target(to or ())
    if uris_from is not None or glob is not None:
        if dry_run or table or to or background_only:
            raise ConfigurationError(
                "--uris-from and --glob cannot be combined with --dry-run, --table, --to or "
                "--background-only.",
                "Remove those options, or name one database with --uri.",
            )
        uris = _uris(uris_from, glob)
        return _run_many(call, uris, at_once, background=not skip_background)
    if dry_run:
        return run_async(call, lambda manager: show_plan(call, manager, table, target))
    if skip_background and background_only:
        raise ConfigurationError(
            "--skip-background and --background-only leave nothing to do.", "Pass one of them."
        )
    part = "fast" if skip_background else "background" if background_only else "all"
    return run_async(call, lambda manager: _upgrade(call, manager, table, target, part))


async def _upgrade(
    call: Call, manager: MigrationManager, tables: Collection[str] | None, to: Target, chosen: str
) -> Exit:
    from aiomigrate.planning.plan import Part

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
        await show_traces(call, manager, exc)
        raise
    if not report.steps:
        await manager.plan(tables=tables or None, to=to)  # reads the journal too, which may differ
    show_report(output, report)
    output.document(report.to_dict)
    return Exit.OK


def _uris(file: Path | None, pattern: str | None) -> list[str]:
    """Returns the databases listed in a file, then those that match a pattern.

    Args:
        file: A text file with one path or URI per line, or `-` for stdin. Blank lines and lines
            that start with `#` are ignored.
        pattern: A pattern for local folders.

    Raises:
        ConfigurationError: The file cannot be read, or no database is named.
    """
    from aiomigrate.fleet import expand_glob

    found: list[str] = []
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigurationError(
                f"{file} cannot be read.", "Pass a text file with one path or URI per line."
            ) from exc
        lines = (line.strip() for line in text.splitlines())
        found += [line for line in lines if line and not line.startswith("#")]
    if pattern is not None:
        found += expand_glob(pattern)
    if not found:
        raise ConfigurationError(f"{file} lists no database.", "Write one path or URI per line.")
    return found


def _run_many(call: Call, uris: list[str], at_once: int, *, background: bool) -> Exit:
    """Upgrades many databases until all are finished or a signal interrupts the run."""
    import anyio

    from aiomigrate.fleet import DatabaseReport, ManyReport, migrate_all

    output, done = call.output, 0

    def show_database(one: DatabaseReport) -> None:
        nonlocal done
        done += 1
        applied = len(one.report.applied) if one.report else 0
        result = f"{applied} applied" if one.error is None else f"failed: {one.error.what}"
        if applied or not one.is_ok:
            output.say(f"[{done}/{len(uris)}] {one.database}: {result}")

    async def work() -> ManyReport:
        return await migrate_all(
            uris, at_once=at_once, background=background, on_done=show_database, **call.options()
        )

    async def main() -> Exit:
        caught: list[signal.Signals] = []
        report = await until_signal(work, caught, output)
        if report is None:
            ignore_signals()
            what = f"Interrupted: {done} of {len(uris)} databases were finished."
            output.document(lambda: {"interrupted": caught[0].name, "what": what})
            output.note(f"{what}\nRun the command again to continue with the others.")
            return Exit.INTERRUPTED if caught[0] is signal.SIGINT else Exit.TERMINATED
        output.say(str(report))
        output.document(report.to_dict)
        return Exit.FAILED if report.failed else Exit.OK

    return anyio.run(main)


def _at_target(manager: MigrationManager, planned: Plan) -> str:
    deferred = ", ".join(f"{line} {version}" for line, version in planned.deferred)
    suffix = f" except for background migrations ({deferred})" if deferred else ""
    head = "Nothing to do" if planned.missing else f"Everything is at target{suffix}: nothing to do"
    warnings = [f"warning: {warning}" for warning in (*planned.warnings, *planned.missing)]
    return "\n".join([f"{head}. ({manager.database})", *warnings])


async def show_traces(call: Call, manager: MigrationManager, exc: MigrationFailedError) -> None:
    """Shows the tracebacks of failed migrations, read from the journal; does so only with `-v`."""
    if not call.output.verbose:
        return
    last = {(e.line, e.version): e for e in await manager.history() if e.kind == "failed"}
    for step in exc.report.failed:
        event = last.get((step.line, step.version))
        if event is not None and event.error:
            call.output.note(f"{step.line} {step.version}:\n{event.error.rstrip()}")


@verb(database_options, folder_options, param_options, ahead_options, lease_options)
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
            help="Version to return to, or LINE=VERSION (repeatable). Default: one step back.",
        ),
    ] = None,
    give_up: Annotated[
        bool,
        typer.Option(
            "--allow-destructive",
            metavar="",
            help="Discard other writers' later commits if a migration cannot be undone otherwise.",
            show_default=False,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Show the plan only.", show_default=False)
    ] = False,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", "-y", metavar="", help="Do not ask for confirmation.", show_default=False
        ),
    ] = False,
) -> Exit:
    """Undo applied migrations, the newest first.

    Runs the inverses of the migrations, or restores earlier versions of their tables. Shows the
    plan and asks for confirmation. Refuses to discard commits of other writers.

    Example: aiomigrate rollback memos --to 3
    """
    targets = _rollback_targets(line, to or ())
    return run_async(
        call,
        lambda manager: _rollback(
            call, manager, targets, give_up=give_up, dry_run=dry_run, ask=not yes
        ),
    )


def _rollback_targets(line: str | None, to: Collection[str]) -> str | dict[str, int]:
    # A bare VERSION belongs to LINE, also next to LINE=VERSION of other lines.
    target = settings.parse_target([t if "=" in t or line is None else f"{line}={t}" for t in to])
    if isinstance(target, dict):
        if line is not None and line not in target:
            raise ConfigurationError(
                f"--to does not include the line {line}.",
                f"Remove the argument {line}, or add --to {line}=VERSION.",
            )
        return target
    if line is None:
        raise ConfigurationError(
            "rollback needs the line to undo.", "Pass LINE, or --to LINE=VERSION."
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
            "rollback asks for confirmation, which needs a terminal and no --json.",
            "Check the plan with --dry-run, then pass --yes.",
        )
    if ask and not typer.confirm("Undo this?"):
        output.say("Nothing was changed.")
        return Exit.OK
    try:
        with call.tracker.showing():
            report = await manager.rollback(targets, allow_destructive=give_up)
    except MigrationFailedError as exc:
        show_report(output, exc.report)
        await show_traces(call, manager, exc)
        raise
    show_report(output, report)
    output.document(report.to_dict)
    return Exit.OK


@verb(database_options, folder_options, param_options, lease_options)
def prune(
    call: Call,
    *,
    older_than: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Only for migrations applied at least so long ago."),
    ] = 0.0,
) -> Exit:
    """Delete the savepoints of destructive migrations, to free their disk space.

    An upgrade with pending work also deletes savepoints, by default those older than a week.

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

    return run_async(call, work)


@verb(database_options, folder_options, param_options, lease_options)
def stamp(call: Call, *, table: Tables = None, to: To = None) -> Exit:
    """Record versions of lines without running any migration.

    Use it to set the baseline of an existing database. Pass --table, --to, or `--to latest` for
    every line.

    Example: aiomigrate stamp --table memos --to 3
    """
    if not table and not to:
        raise ConfigurationError(
            "stamp records migrations as applied without running them, and needs to know which.",
            "Pass --table LINE, --to VERSION, or --to latest for all lines.",
        )
    target = settings.parse_target(to or ())

    async def work(manager: MigrationManager) -> Exit:
        versions = await manager.stamp(tables=table or None, to=target)
        for line, version in sorted(versions.items()):
            call.output.say(f"{line} is recorded at version {version}.")
        if not versions:
            call.output.say("There are no migrations: nothing to record.")
        call.output.document(lambda: {"stamped": dict(versions)})
        return Exit.OK

    return run_async(call, work)


@verb(database_options, folder_options, lease_options)
def repair(call: Call) -> Exit:
    """Open a damaged journal again, at the last version that can be read.

    Needed after a failure of the disk. Says what was lost and what to check; exits 3 if something
    is to be checked. An upgrade repairs by itself if nothing is.

    Example: aiomigrate repair
    """

    async def work(manager: MigrationManager) -> Exit:
        done = await manager.repair()
        if done is None:
            call.output.say(f"The journal of {manager.database} can be read: nothing to repair.")
        else:
            call.output.say(str(done))
        call.output.document(lambda: {"repaired": None if done is None else done.to_dict()})
        return Exit.NOT_AT_TARGET if done is not None and done.unclear else Exit.OK

    return run_async(call, work)


@verb(database_options, folder_options, lease_options)
def unlock(
    call: Call,
    *,
    background: Annotated[
        bool,
        typer.Option(
            "--background",
            metavar="",
            help="Release the lease of background migrations instead.",
            show_default=False,
        ),
    ] = False,
) -> Exit:
    """Release the lease of a crashed process. A holder that still renews its lease keeps it.

    Rarely needed: the next run takes over an expired lease by itself.

    Example: aiomigrate unlock
    """

    async def work(manager: MigrationManager) -> Exit:
        if not call.output.as_json:
            call.output.note("Checking the lease. A held lease is watched for its time to live.")
        holder = await manager.unlock(background=background)
        if holder is None:
            call.output.say(f"The lease of {manager.database} is free.")
        else:
            call.output.say(f"Removed the lease of {holder}, which no longer renewed it.")
        call.output.document(lambda: {"removed": str(holder) if holder else None})
        return Exit.OK

    return run_async(call, work)
