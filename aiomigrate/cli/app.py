"""The `aiomigrate` command: its verbs in the order of `--help`, and `run`."""

from __future__ import annotations

import os
import sys

import typer

from aiomigrate.cli import inspect, migrate
from aiomigrate.cli.command import Exit
from aiomigrate.cli.output import Output, silence

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

VERBS = (
    migrate.upgrade, migrate.rollback, migrate.prune, migrate.stamp, migrate.unlock,
    inspect.plan, inspect.status, inspect.health, inspect.validate, inspect.history,
    inspect.report, inspect.new, inspect.version,
)  # fmt: skip

for command in VERBS:
    app.command(name=command.__name__)(command)


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
