"""Processes of the release 0.1.0 and of the tree, which are asked to work on databases."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
RELEASED = DATA / "released" / "aiomigrate-0.1.0-py3-none-any.whl"
PATIENCE_S = 120.0
"""A process that says nothing for so long is killed."""


class Process:
    """A process of one release (see `program`).

    Attributes:
        package: The file from which it has imported the package.
        version: The version of the package.
    """

    def __init__(self, release: Path) -> None:
        """Starts it.

        Args:
            release: A wheel, or the folder that the package is in.
        """
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.guarantees.program"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(release), str(ROOT)])},
        )
        self.package = ""
        self.version = ""

    def greet(self) -> None:
        """Waits until it has imported the package."""
        told = self._read()
        assert told is not None
        self.package, self.version = told["package"], told["version"]

    def prepare(
        self,
        database: Path,
        scripts: str,
        does: str,
        *,
        kills: bool = False,
        options: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        """Has it load migrations, and wait right before it calls a method of the manager."""
        request = {
            "database": str(database), "scripts": scripts, "does": does, "kills": kills,
            "options": options or {}, "arguments": arguments,
        }  # fmt: skip
        self._write(json.dumps(request))
        assert self._read() == {"ready": True}

    def begin(self) -> None:
        """Has it make the call that is prepared."""
        self._write("")

    def end(self) -> dict[str, Any] | None:
        """Returns what came of the call, `None` if the process is dead."""
        return self._read()

    def call(self, database: Path, scripts: str, does: str, **more: Any) -> dict[str, Any]:
        """Prepares a call, makes it, and returns what came of it."""
        self.prepare(database, scripts, does, **more)
        self.begin()
        told = self.end()
        assert told is not None
        return told

    def stop(self) -> int:
        """Lets it end; returns its exit code."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            return self._child.wait(30)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()
        finally:
            self._child.stdout.close()

    def _write(self, line: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()

    def _read(self) -> dict[str, Any] | None:
        assert self._child.stdout is not None
        watchdog = threading.Timer(PATIENCE_S, self._child.kill)
        watchdog.start()
        line = self._child.stdout.readline()
        watchdog.cancel()
        found: dict[str, Any] | None = json.loads(line) if line else None
        return found


@contextlib.contextmanager
def processes(*releases: Path) -> Iterator[Sequence[Process]]:
    """Starts processes together, and ends them."""
    started = [Process(release) for release in releases]
    try:
        for process in started:
            process.greet()
        yield started
    finally:
        for process in started:
            process.stop()
