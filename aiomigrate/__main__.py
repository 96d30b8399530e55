"""The entry point of the `aiomigrate` command. Explains how to install the `cli` extra if needed.

The verbs are in `cli`.
"""

from __future__ import annotations

import sys

_REQUIRED = ("typer", "rich")


def main() -> int:
    """Runs the command with the arguments of the process.

    Returns:
        The exit code; 2 if `typer` or `rich` is not installed.
    """
    try:
        for name in _REQUIRED:
            __import__(name)
    except ImportError as exc:
        if exc.name not in _REQUIRED:
            raise
        sys.stderr.write(
            f"The aiomigrate command needs {exc.name}, which is not installed.\n"
            "Install it with: pip install 'aiomigrate[cli]'\n"
        )
        return 2
    from aiomigrate.cli.app import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
