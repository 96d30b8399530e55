"""Assembles the `aiomigrate` command: its verbs in the order of `--help`, and `run`.

The verbs are in `migrate` and `inspect`; their shared options in `command`.
"""

from __future__ import annotations

import os
import sys

import typer

from aiomigrate.cli import inspect, migrate
from aiomigrate.cli.command import Exit
from aiomigrate.cli.output import Output, discard_writes

_EPILOG = """\
Exit codes: 0 at target (or done); 1 failed; 2 usage or configuration; 3 not at target (health;
status, validate and plan with --check); 130 and 143 interrupted by Ctrl-C or SIGTERM.

Settings are read from the command line, else from AIOMIGRATE_URI, AIOMIGRATE_MIGRATIONS, ..., else
from [tool.aiomigrate] in the nearest pyproject.toml. By default the database is
./data/app.lancedb and its migrations are in ./migrations.
"""

app = typer.Typer(
    name="aiomigrate",
    help="Crash-safe, exactly-once migrations for LanceDB.",
    epilog=_EPILOG.replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n\n"),
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes longer than the rest of `--help`
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

VERBS = (
    migrate.upgrade, migrate.rollback, migrate.prune, migrate.stamp, migrate.repair, migrate.unlock,
    inspect.plan, inspect.status, inspect.health, inspect.validate, inspect.history,
    inspect.report, inspect.new, inspect.version,
)  # fmt: skip

for command in VERBS:
    app.command(name=command.__name__)(command)


def run(argv: list[str]) -> int:
    """Runs the command.

    Args:
        argv: The arguments, without the name of the program. Without any, `--help` is shown.

    Returns:
        The exit code.
    """
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    if not sys.stdout.isatty():
        # Otherwise typer colours its help in CI, also in files and pipes.
        os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    try:
        return int(app(argv or ["--help"], prog_name="aiomigrate", standalone_mode=False) or 0)
    except usage_error as exc:
        context = getattr(exc, "ctx", None)
        path = context.command_path if context is not None else "aiomigrate"
        output = Output(as_json="--json" in argv, verbose=False)
        what = exc.format_message()  # type: ignore[attr-defined] # of click's UsageError
        remedy = f"Run `{path} --help` for its options and an example."
        output.document(lambda: {"error": {"type": "UsageError", "what": what, "remedy": remedy}})
        output.error(what, remedy)
        return Exit.USAGE
    except BrokenPipeError:  # from `--help`; the output of verbs is written by `Output`
        discard_writes(sys.stdout)
        return Exit.OK
