"""The tree finishes what a process of release 0.1.0 was killed in, without a human.

The databases are those that such processes left (see `tests/data/make_killed.py`), not imitations:
their journals, leases, witness columns and savepoints are that release's own.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import structlog

from aiomigrate import MigrationManager
from tests.guarantees.databases import OURS, content, journal
from tests.guarantees.killed_scripts import BEFORE, KILLED, TABLE, Killed
from tests.guarantees.releases import DATA

LAST = (TABLE, BEFORE + 1)
UNDOING = [name for name, killed in KILLED.items() if killed.is_undoing]


def manager(database: Path, killed: Killed) -> MigrationManager:
    """Returns a manager of the tree: it waits for the dead process's lease as long as for its own.

    The dead process promised a TTL of 0.5 s.
    """
    return MigrationManager(
        database,
        migrations=killed.migrations(),
        logger=structlog.wrap_logger(structlog.ReturnLogger()),
        lease_ttl=1.0,
        concurrency=1,
    )


def unpack(name: str, folder: Path) -> Path:
    """Returns the database that was killed in such a run."""
    with tarfile.open(DATA / "killed" / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "database"


async def undisturbed(folder: Path, killed: Killed) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what is in a database before the last migration and after it, without a kill.

    For an undoing: after the last migration and after it was undone.
    """
    async with manager(folder, killed) as migrating:
        await migrating.upgrade(to=None if killed.is_undoing else BEFORE)
        before = await content(folder)
        if killed.is_undoing:
            await migrating.rollback(TABLE, to=BEFORE)
        else:
            await migrating.upgrade()
        return before, await content(folder)


async def assert_in_flight(database: Path, killed: Killed, *others: dict[str, Any]) -> None:
    """Asserts that a run is under way: its lease is held, it has begun, and a part is there."""
    found, entries = await content(database), await journal(database)
    of_last = [row["kind"] for row in entries if (row["line"], row["version"]) == LAST]
    since = of_last[of_last.index("rolling_back" if killed.is_undoing else "started") :]
    async with manager(database, killed) as migrating:
        status = await migrating.get_status()

    assert found["held"] == [killed.lease]
    assert (status.background if killed.lease == "background" else status.holder) is not None
    assert "intended" in since
    assert not {"applied", "rolled_back", "failed", "restored"} & set(since)
    assert {row["tool"] for row in entries if row["kind"] != "founded"} == {"0.1.0"}
    assert [version for _, version, _ in found["head"]] == [BEFORE]
    for other in others:
        assert found["tables"] != other["tables"]


async def assert_done(database: Path, killed: Killed, expected: dict[str, Any]) -> None:
    """Asserts that a database is as if nobody had been killed, and that nothing is left."""
    found = await content(database)
    async with manager(database, killed) as migrating:
        status = await migrating.get_status()
    columns = [name for table in found["tables"].values() for name, *_ in table["fields"]]

    assert found == expected
    assert found["held"] == []
    assert status.holder is status.background is None
    assert [name for name in columns if name.startswith(OURS)] == []


async def counted(database: Path, killed: Killed) -> Counter[tuple[str, int | None]]:
    """Returns how often each migration was applied and undone, as the tree reads the journal."""
    async with manager(database, killed) as migrating:
        events = await migrating.history(TABLE)
    return Counter((e.kind, e.version) for e in events if e.kind in ("applied", "rolled_back"))


def test_each_run_that_was_killed_has_its_archive() -> None:
    """No archive is left out, and none is missing."""
    assert {path.name.removesuffix(".tar.gz") for path in (DATA / "killed").iterdir()} == {*KILLED}


@pytest.mark.parametrize("name", KILLED)
async def test_the_next_start_finishes_what_the_older_release_was_killed_in(
    name: str, tmp_path: Path
) -> None:
    """One start reaches the target; rows, schema, indexes and head equal those of a quiet run.

    Each migration is recorded as applied once; after an interrupted rollback, the last one twice
    and as undone once. No column, branch, tag or lease of the dead process is left.
    """
    killed = KILLED[name]
    before, after = await undisturbed(tmp_path / "undisturbed", killed)
    database = unpack(name, tmp_path)
    await assert_in_flight(database, killed, before, after)

    async with manager(database, killed) as migrating:
        report = await migrating.initialize()
        if killed.background:
            assert report.deferred == (LAST,)
            report = await migrating.run_background()
        validation = await migrating.validate()
        again = await migrating.initialize()

    assert validation.valid, validation.errors
    assert [(step.line, step.version) for step in report.applied] == [LAST]
    assert again.steps == ()
    await assert_done(database, killed, before if killed.is_undoing else after)
    undone = {("rolled_back", 3): 1, ("applied", 3): 2} if killed.is_undoing else {}
    assert await counted(database, killed) == {
        ("applied", 1): 1, ("applied", 2): 1, ("applied", 3): 1, **undone,
    }  # fmt: skip


@pytest.mark.parametrize("name", UNDOING)
async def test_the_next_rollback_finishes_what_the_older_release_was_killed_in(
    name: str, tmp_path: Path
) -> None:
    """The same rollback again ends at its target, as one that was not killed, and undoes once."""
    killed = KILLED[name]
    before, after = await undisturbed(tmp_path / "undisturbed", killed)
    database = unpack(name, tmp_path)
    await assert_in_flight(database, killed, before)

    async with manager(database, killed) as migrating:
        await migrating.rollback(TABLE, to=BEFORE)
        validation = await migrating.validate()

    assert validation.errors == validation.not_at_target
    await assert_done(database, killed, after)
    assert (await counted(database, killed))["rolled_back", 3] == 1
