"""Many databases of one application."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pyarrow as pa
import pytest

from aiomigrate import Context, DatabaseReport, ManyReport, Migration, migrate_all, op
from aiomigrate.errors import ConfigurationError
from aiomigrate.fleet import expand_glob
from tests import scenario
from tests.processes import quiet_logger

T = pa.schema([("id", pa.string())])
STEPS = [
    Migration(table="notes", version=1, operations=[op.CreateTable(T)]),
    Migration(table="notes", version=2, operations=[op.AddColumns({"n": pa.int64()})]),
]


def tenants(folder: Path, count: int) -> list[Path]:
    """Returns the databases of some tenants."""
    return [folder / f"tenant-{number:03}" for number in range(count)]


async def migrate(databases: list[Path], steps: list[Migration] = STEPS, **more: Any) -> ManyReport:
    """Migrates databases, quietly."""
    return await migrate_all(databases, migrations=steps, logger=quiet_logger(), **more)


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.campaign)])
async def test_many_databases(tmp_path: Path, count: int) -> None:
    """All arrive, few at a time; again there is nothing to do, and no commit is made."""
    databases = tenants(tmp_path, count)
    told: list[DatabaseReport] = []
    first = await migrate(databases, STEPS[:1], on_done=told.append)
    again = await migrate(databases, STEPS[:1])

    assert [len(one.report.applied) for one in first.databases if one.report] == [1] * count
    assert [one.database for one in first.databases] == [str(path) for path in databases]
    assert len(told) == count
    assert not first.failed
    assert [one.report.steps for one in again.databases if one.report] == [()] * count
    assert f"{count} of {count} databases at target, 0 migrations" in str(again)


async def test_one_that_fails_holds_up_no_other_and_is_tried_again(tmp_path: Path) -> None:
    """What fails once is at target in the end; what always fails is told, and what to do."""
    databases = tenants(tmp_path, 6)
    tries: dict[str, int] = {}

    async def up(ctx: Context) -> None:
        name = Path(str(ctx.connection.uri)).name
        tries[name] = tries.get(name, 0) + 1
        if name == "tenant-004" or (name == "tenant-002" and tries[name] == 1):
            raise ValueError("wrong on purpose")

    steps = [*STEPS, Migration(table="notes", version=3, up=up)]
    report = await migrate(databases, steps)

    assert [one.database for one in report.failed] == [str(databases[4])]
    assert "wrong on purpose" in str(report.failed[0].error)
    assert [one.attempts for one in report.databases] == [1, 1, 2, 1, 2, 1]
    told = report.to_dict()
    assert (told["ok"], told["failed"]) == (5, 1)
    assert told["databases"][4]["error"]["remedy"]
    assert json.loads(json.dumps(told)) == told


async def test_what_cannot_be_is_not_tried_again(tmp_path: Path) -> None:
    """A database ahead of the code is the same a second later; one that cannot be is refused."""
    databases = tenants(tmp_path, 2)
    await migrate(databases)
    report = await migrate(databases, STEPS[:1])

    assert [one.attempts for one in report.databases] == [1, 1]
    assert len(report.failed) == 2
    with pytest.raises(ConfigurationError, match="at_once"):
        await migrate(databases, at_once=0)
    assert (await migrate([])).databases == ()


async def test_two_processes_may_do_it_together(tmp_path: Path) -> None:
    """Each migration of each database is applied once."""
    databases = tenants(tmp_path, 12)
    async with anyio.create_task_group() as group:
        group.start_soon(migrate, databases)
        group.start_soon(migrate, databases)

    for database in databases:
        assert await scenario.applied_counts(database) == {("notes", 1): 1, ("notes", 2): 1}


# ---- the command --------------------------------------------------------------------------------

SCRIPT = """
import asyncio, pyarrow as pa
from aiomigrate import Migration, op
async def up(ctx):
    await asyncio.sleep({sleep})
m = Migration(table="notes", version=1, operations=[
    op.CreateTable(pa.schema([("id", pa.string())])), op.Run(up)])
"""


def command(folder: Path, sleep: float, *options: str) -> subprocess.Popen[str]:
    """Starts `aiomigrate upgrade` in a folder with one migration."""
    (folder / "migrations").mkdir(exist_ok=True)
    (folder / "migrations" / "001_notes.py").write_text(SCRIPT.format(sleep=sleep))
    return subprocess.Popen(
        [sys.executable, "-m", "aiomigrate", "upgrade", *options],
        cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip


async def test_databases_are_named_by_a_file_or_a_pattern(tmp_path: Path) -> None:
    """Comments and blank lines are passed over; stdin is a file; folders are found by pattern."""
    listed = tmp_path / "uris.txt"
    listed.write_text("# tenants\n./data/a/db\n\n./data/b/db\n")
    ran = command(tmp_path, 0, "--uris-from", "uris.txt")
    said, errors = ran.communicate(timeout=60)
    again = command(tmp_path, 0, "--glob", "data/*/db", "--json")
    told = json.loads(again.communicate(timeout=60)[0])
    piped = command(tmp_path, 0, "--uris-from", "-").communicate("./data/c/db\n", timeout=60)[0]

    assert (ran.returncode, again.returncode, errors) == (0, 0, "")
    assert "2 of 2 databases at target, 2 migrations applied" in said
    assert [one["applied"] for one in told["databases"]] == [0, 0]
    assert "1 of 1 databases" in piped
    assert len(expand_glob(str(tmp_path / "data" / "*" / "db"))) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--glob", "nothing/*"], "No folder"), (["--glob", "s3://bucket/*"], "local paths"),
     (["--uris-from", "gone.txt"], "cannot be read"), (["--uris-from", "empty.txt"], "no database"),
     (["--uris-from", "empty.txt", "--to", "3"], "--to")],
)  # fmt: skip
def test_mistakes_are_told(tmp_path: Path, options: list[str], words: str) -> None:
    """In two lines, with exit code 2."""
    (tmp_path / "empty.txt").write_text("# nothing\n")
    ran = command(tmp_path, 0, *options)
    errors = ran.communicate(timeout=60)[1]

    assert ran.returncode == 2
    assert words in errors
    assert len(errors.strip().splitlines()) == 2


async def test_ctrl_c_says_how_far_it_is(tmp_path: Path) -> None:
    """What was in hand is undone, and the next call does the rest."""
    names = "\n".join(f"./data/{number}/db" for number in range(6))
    (tmp_path / "uris.txt").write_text(names)
    ran = command(tmp_path, 1.0, "--uris-from", "uris.txt", "--at-once", "2")
    with anyio.fail_after(30):
        while len(list((tmp_path / "data").glob("*/db/notes.lance"))) < 3:  # noqa: ASYNC110
            await anyio.sleep(0.05)
    ran.send_signal(signal.SIGINT)
    _, errors = await anyio.to_thread.run_sync(lambda: ran.communicate(timeout=60))
    last = command(tmp_path, 1.0, "--uris-from", "uris.txt")
    said = await anyio.to_thread.run_sync(lambda: last.communicate(timeout=60)[0])

    assert ran.returncode == 130
    assert "Interrupted: 2 of 6 databases were finished." in errors
    assert "6 of 6 databases at target, 4 migrations applied" in said
