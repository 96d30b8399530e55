"""Processes of release 0.1.0 and of the tree share a database, as pods in a rolling deploy do."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.guarantees.databases import content
from tests.guarantees.killed_scripts import BEFORE, KILLED, TABLE
from tests.guarantees.raced_scripts import migrations
from tests.guarantees.releases import DATA, RELEASED, ROOT, Process, processes

NEWEST = 4
ALL = sorted((m.name, m.version) for m in migrations(NEWEST))
DEAD: dict[str, Any] = {"lease_ttl": 1.0, "concurrency": 1}
"""Options of processes of which one is killed: the other waits a second for its lease."""


def versions(to: int) -> dict[str, int]:
    """Returns where each line is at a version of the scripts."""
    return {m.name: m.version for m in sorted(migrations(to), key=lambda m: m.version)}


@pytest.fixture(scope="module")
def racing() -> Iterator[Sequence[Process]]:
    """Two processes of release 0.1.0 and two of the tree, in turn."""
    with processes(RELEASED, ROOT, RELEASED, ROOT) as started:
        yield started


@pytest.fixture
def older(racing: Sequence[Process]) -> Process:
    """A process of release 0.1.0."""
    return racing[0]


@pytest.fixture
def newer(racing: Sequence[Process]) -> Process:
    """A process of the tree."""
    return racing[1]


def by_name(racing: Sequence[Process], name: str) -> Process:
    """Returns a process of the older or the newer release."""
    return racing[{"older": 0, "newer": 1}[name]]


def race(racing: Sequence[Process], database: Path, to: int = NEWEST) -> list[dict[str, Any]]:
    """Has all processes initialize a database at the same instant; returns what each says."""
    for process in racing:
        process.prepare(database, str(to), "initialize")
    for process in racing:
        process.begin()
    told = [process.end() for process in racing]
    assert None not in told
    return [one for one in told if one is not None]


def applied_counts(process: Process, database: Path) -> Counter[tuple[str, int]]:
    """Returns how often the journal says each migration was applied, as a release reads it."""
    events = process.call(database, str(NEWEST), "history")["events"]
    return Counter((line, version) for kind, line, version, _ in events if kind == "applied")


def assert_agreed(racing: Sequence[Process], database: Path, to: int = NEWEST) -> None:
    """Asserts that both releases read one and the same valid database at its target."""
    found = [
        [
            process.call(database, str(to), "validate"),
            process.call(database, str(to), "plan"),
            process.call(database, str(to), "history"),
            process.call(database, str(to), "initialize"),
        ]
        for process in racing[:2]
    ]
    validation, plan, _, start = found[0]

    assert found[0] == found[1]
    assert validation == {"valid": True, "errors": []}
    assert plan == {"steps": []}
    assert start == {"applied": [], "steps": [], "lines": versions(to)}


@pytest.fixture(scope="module")
async def expected(
    racing: Sequence[Process], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What is in a database that one process of release 0.1.0 has made alone."""
    database = tmp_path_factory.mktemp("expected") / "database"
    racing[0].call(database, str(NEWEST), "initialize")
    return await content(database)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """LanceDB's bindings run on asyncio only."""
    return "asyncio"


def test_the_processes_are_of_the_releases_that_they_are_meant_to_be(
    racing: Sequence[Process],
) -> None:
    """One half imports the package from the wheel of 0.1.0, the other half from the tree."""
    packages = [Path(process.package) for process in racing]

    assert packages == [RELEASED / "aiomigrate/__init__.py", ROOT / "aiomigrate/__init__.py"] * 2
    assert [process.version for process in racing[::2]] == ["0.1.0", "0.1.0"]


@pytest.mark.parametrize("trial", range(3))
async def test_two_releases_race_on_a_fresh_database(
    racing: Sequence[Process], expected: dict[str, Any], tmp_path: Path, trial: int
) -> None:
    """All succeed, each migration is applied once, and both releases find the same valid end."""
    told = race(racing[:: 1 if trial % 2 else -1], tmp_path / "database")

    assert [one.get("error") for one in told] == [None] * len(racing)
    assert sorted(tuple(step) for one in told for step in one["applied"]) == ALL
    assert [one["lines"] for one in told] == [versions(NEWEST)] * len(racing)
    assert applied_counts(racing[1], tmp_path / "database") == dict.fromkeys(ALL, 1)
    assert await content(tmp_path / "database") == expected
    assert_agreed(racing, tmp_path / "database")


@pytest.mark.parametrize("maker", ["older", "newer"])
@pytest.mark.parametrize("made", [1, 2])
async def test_two_releases_race_on_a_database_that_one_of_them_has_begun(
    racing: Sequence[Process], expected: dict[str, Any], tmp_path: Path, maker: str, made: int
) -> None:
    """What one release has applied, neither applies again; the rest is applied once."""
    database = tmp_path / "database"
    begun = by_name(racing, maker).call(database, str(made), "initialize")
    told = race(racing, database)

    assert begun["lines"] == versions(made)
    assert [one.get("error") for one in told] == [None] * len(racing)
    steps = [tuple(step) for one in [begun, *told] for step in one["applied"]]
    assert sorted(steps) == ALL
    assert applied_counts(racing[1], database) == dict.fromkeys(ALL, 1)
    assert await content(database) == expected
    assert_agreed(racing, database)


@pytest.mark.parametrize(("first", "second"), [("older", "newer"), ("newer", "older")])
async def test_one_release_rolls_back_and_continues_what_the_other_wrote(
    racing: Sequence[Process], expected: dict[str, Any], tmp_path: Path, first: str, second: str
) -> None:
    """A database passes from release to release: up, down by inverses and savepoints, up again."""
    one, other = by_name(racing, first), by_name(racing, second)
    database = tmp_path / "database"
    scripts = str(NEWEST)

    one.call(database, "2", "initialize")
    begun = await content(database)
    continued = other.call(database, scripts, "upgrade")
    back = one.call(database, scripts, "rollback", line={**versions(2), "indexes": 0})
    undone = await content(database)
    again = other.call(database, scripts, "upgrade")
    nothing = one.call(database, scripts, "rollback", line=dict.fromkeys(versions(NEWEST), 0))
    anew = other.call(database, scripts, "upgrade")

    later = [step for step in ALL if step[1] > 2]
    assert sorted(map(tuple, continued["applied"])) == later
    assert sorted(map(tuple, back["steps"])) == later
    assert shapes(undone) == shapes(begun)
    assert sorted(map(tuple, again["applied"])) == later
    assert sorted(map(tuple, nothing["steps"])) == ALL
    assert sorted(map(tuple, anew["applied"])) == ALL
    assert shapes(await content(database)) == shapes(expected)
    assert_agreed(racing, database)


def shapes(found: dict[str, Any]) -> dict[str, Any]:
    """Returns fields, indexes and rows of each table, and the versions."""
    tables = {
        name: (table["fields"], table["indexes"], table["rows"])
        for name, table in found["tables"].items()
    }
    return {"tables": tables, "head": [row for row in found["head"] if row[1]]}


@pytest.mark.parametrize("name", ["update", "rebuild", "rollback_by_savepoint"])
async def test_the_older_release_finishes_what_the_tree_was_killed_in(
    older: Process, tmp_path: Path, name: str
) -> None:
    """A deploy that is taken back leaves no database that the older release cannot go on with."""
    killed, database = KILLED[name], tmp_path / "database"
    target = {} if killed.is_undoing else {"to": BEFORE}
    back = {"line": TABLE, "to": BEFORE} if killed.is_undoing else {}
    with processes(ROOT) as (victim,):
        assert victim.package == str(ROOT / "aiomigrate/__init__.py")
        victim.call(database, name, "upgrade", options=DEAD, **target)
        victim.prepare(database, name, killed.does, options=DEAD, kills=True, **back)
        victim.begin()
        assert victim.end() is None
    in_flight = await content(database)

    told = older.call(database, name, "initialize", options=DEAD)

    assert in_flight["held"] == [killed.lease]
    assert told.get("error") is None
    assert told["applied"] == [[TABLE, BEFORE + 1]]
    assert older.call(database, name, "validate") == {"valid": True, "errors": []}
    older.call(tmp_path / "undisturbed", name, "upgrade")
    assert await content(database) == await content(tmp_path / "undisturbed")


async def test_two_releases_race_for_what_a_killed_process_left(
    racing: Sequence[Process], tmp_path: Path
) -> None:
    """One of them takes the lease of the dead process, and finishes its migration once."""
    with tarfile.open(DATA / "killed" / "update.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    database = tmp_path / "database"
    for process in racing:
        process.prepare(database, "update", "initialize", options=DEAD)
    for process in racing:
        process.begin()
    told = [process.end() or {} for process in racing]

    assert [one.get("error") for one in told] == [None] * len(racing)
    assert [step for one in told for step in one["applied"]] == [[TABLE, BEFORE + 1]]
    for process in racing[:2]:
        assert process.call(database, "update", "validate") == {"valid": True, "errors": []}
    racing[0].call(tmp_path / "undisturbed", "update", "upgrade")
    assert await content(database) == await content(tmp_path / "undisturbed")
