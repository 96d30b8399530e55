"""The entry point of the `aiomigrate` command; it says how to get it when the extra is missing."""

from __future__ import annotations

import sys

_NEEDED = ("typer", "rich")


def main() -> int:
    """Runs the command with the process's arguments.

    Returns:
        The exit code.
    """
    try:
        for name in _NEEDED:
            __import__(name)
    except ImportError as exc:
        if exc.name not in _NEEDED:
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
