"""One process of one release, which does what it is asked for, line by line, until it is killed.

Which release it is decides `PYTHONPATH` (see `releases`): the tree, or a wheel that was released.
It uses only what every release since 0.1.0 offers.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import sys
from typing import Any

import lancedb
import structlog

import aiomigrate
from tests.guarantees import killed_scripts, raced_scripts


def scripts_of(name: str) -> Any:
    """Returns migrations by name: those of a killed run, or of the race."""
    if name in killed_scripts.KILLED:
        return killed_scripts.KILLED[name].migrations()
    return raced_scripts.migrations(int(name))


def arm(database: str, name: str) -> None:
    """Makes this process kill itself where the run of that name is to be killed."""
    killed = killed_scripts.KILLED[name]
    if killed.where:
        killed_scripts.Deadly.database = database
        killed_scripts.Deadly.where = killed.where
        return
    original = getattr(lancedb.AsyncTable, killed.verb)
    calls = 0

    async def deadly(table: lancedb.AsyncTable, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += table.name == killed_scripts.TABLE
        strikes = table.name == killed_scripts.TABLE and calls == killed.at
        if strikes and killed.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = await original(table, *args, **kwargs)
        if strikes:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(lancedb.AsyncTable, killed.verb, deadly)


def reply(**values: Any) -> None:
    """Writes one line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def act(request: dict[str, Any]) -> dict[str, Any]:
    """Does what a request says; returns what to reply.

    Args:
        request: `database`, `scripts` (a name), `does` (a method of the manager), `arguments` of
            that, `options` of the manager, `kills` (whether to be killed in it).
    """
    async with aiomigrate.MigrationManager(
        request["database"],
        migrations=scripts_of(request["scripts"]),
        logger=structlog.wrap_logger(structlog.ReturnLogger()),
        **request["options"],
    ) as manager:
        await manager.scripts()
        reply(ready=True)
        sys.stdin.readline()  # those that race begin together
        if request["kills"]:
            arm(request["database"], request["scripts"])
        try:
            result = await getattr(manager, request["does"])(**request["arguments"])
        except Exception as exc:  # noqa: BLE001 - an outcome like others
            return {"error": f"{type(exc).__name__}: {exc}"}
        if request["does"] == "validate":
            return {"valid": result.valid, "errors": [str(error) for error in result.errors]}
        if request["does"] == "history":
            return {"events": [[e.kind, e.line, e.version, e.checksum] for e in result]}
        if request["does"] == "plan":
            return {"steps": [[step.line, step.version] for step in result.steps]}
        return {
            "applied": [[step.line, step.version] for step in result.applied],
            "steps": [[step.line, step.version] for step in result.steps],
            "lines": dict(result.lines),
        }


def main() -> None:
    """Says where the package lies, then does one request after another."""
    platform.node = lambda: "tests"  # the journal is kept: it names no machine
    reply(package=aiomigrate.__file__, version=aiomigrate.__version__)
    while line := sys.stdin.readline():
        reply(**asyncio.run(act(json.loads(line))))


if __name__ == "__main__":
    main()
