"""What `validate` finds, what `stamp` resolves, and what status and history tell."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest
from lancedb.index import BTree

from aiomigrate import Context, Migration, MigrationFailedError, OnAhead, op
from aiomigrate.errors import (
    ChecksumMismatchError,
    LedgerConflictError,
    MissingScriptError,
    OutOfOrderError,
    TargetError,
    ValidationFailedError,
)
from tests import scenario
from tests.faults import Fault
from tests.processes import initialize, start
from tests.tools import manager, tree

HEAD = "table_migrations"
JOURNAL = "table_migrations_history"
MEMOS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("size", pa.int32()),
    ]
)


def migrations() -> list[Migration]:
    """Returns a memos line at 3, with an index, and a users line at 1."""
    return [
        Migration(table="memos", version=1, operations=[op.CreateTable(MEMOS)]),
        Migration(table="memos", version=2, operations=[op.CreateIndex("id")]),
        Migration(
            table="memos",
            version=3,
            description="Tags",
            operations=[op.AddColumns({"tag": pa.string()})],
        ),
        Migration(table="users", version=1, operations=[op.CreateTable(MEMOS)]),
    ]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """As everywhere, but for the fixture of this module too."""
    return "asyncio"


@pytest.fixture(scope="module")
async def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database at target."""
    path = tmp_path_factory.mktemp("validate") / "template"
    async with manager(path, migrations()) as manager_:
        await manager_.initialize()
    return path


@pytest.fixture
def ready(template: Path, database: Path) -> Path:
    """A copy of it."""
    shutil.copytree(template, database)
    return database


async def errors_of(database: Path, given: Sequence[Migration] | None = None) -> tuple[str, ...]:
    """Returns what validate finds; asserts that it writes nothing."""
    before = tree(database)
    async with manager(database, migrations() if given is None else given) as manager_:
        validation = await manager_.validate()

    assert before == tree(database)
    assert validation.valid == (not validation.errors)
    assert validation.to_dict() == json.loads(json.dumps(validation.to_dict()))
    return validation.errors


@dataclass(frozen=True)
class Tampering:
    """A change made behind the library's back, and the one error that tells it."""

    do: Callable[[lancedb.AsyncConnection], Awaitable[Any]]
    error: str


async def with_table(
    db: lancedb.AsyncConnection, name: str, verb: str, *args: Any, **kw: Any
) -> None:
    """Calls a method of a table with LanceDB alone."""
    await getattr(await db.open_table(name), verb)(*args, **kw)


TAMPERINGS = {
    "dropped table": Tampering(lambda db: db.drop_table("memos"), "table memos is missing"),
    "dropped column": Tampering(
        lambda db: with_table(db, "memos", "drop_columns", ["tag"]),
        "table memos: column tag (string) is missing",
    ),
    "retyped column": Tampering(
        lambda db: with_table(
            db, "memos", "alter_columns", {"path": "size", "data_type": pa.int64()}
        ),
        "table memos: column size is int64, expected int32",
    ),
    "NOT NULL that should not be": Tampering(
        lambda db: with_table(db, "memos", "alter_columns", {"path": "text", "nullable": False}),
        "table memos: column text is string NOT NULL, expected string",
    ),
    "NOT NULL that is gone": Tampering(
        lambda db: with_table(db, "memos", "alter_columns", {"path": "id", "nullable": True}),
        "table memos: column id is string, expected string NOT NULL",
    ),
    "extra column": Tampering(
        lambda db: with_table(db, "users", "add_columns", pa.field("more", pa.float64())),
        "table users: column more (double) was not expected",
    ),
    "missing index": Tampering(
        lambda db: with_table(db, "memos", "drop_index", "id_idx"),
        "table memos: index BTree id is missing",
    ),
    "extra index": Tampering(
        lambda db: with_table(db, "users", "create_index", "id", config=BTree()),
        "table users: index BTree id was not expected",
    ),
    "head above the journal": Tampering(
        lambda db: with_table(
            db, HEAD, "update", {"currentVersion": 2}, where="tableName = 'users'"
        ),
        "The head says 'users' is at version 2, the journal says 1.",
    ),
    "head below the journal": Tampering(
        lambda db: with_table(
            db, HEAD, "update", {"currentVersion": 2}, where="tableName = 'memos'"
        ),
        "memos: the head says v2, the journal v3; the next upgrade repairs it",
    ),
    "lost head row": Tampering(
        lambda db: with_table(db, HEAD, "delete", "tableName = 'memos'"),
        "memos: the head has no row, the journal says v3; the next upgrade repairs it",
    ),
}


@pytest.mark.parametrize("kind", TAMPERINGS)
async def test_validate_finds_what_was_changed_behind_its_back(ready: Path, kind: str) -> None:
    """Each change of table, index or ledger is one error that names it; nothing else is told."""
    db = await lancedb.connect_async(ready)
    await TAMPERINGS[kind].do(db)
    db.close()

    errors = await errors_of(ready)

    assert (TAMPERINGS[kind].error,) == errors


async def test_a_database_at_target_is_valid(ready: Path) -> None:
    """Nothing is found where nothing is wrong; rows and their number are no matter."""
    db = await lancedb.connect_async(ready)
    table = await db.open_table("users")
    await table.add([{"id": "a", "text": None, "size": 1}])
    await table.optimize()
    await db.create_table("not_ours", schema=MEMOS)
    db.close()

    assert await errors_of(ready) == ()


async def test_validate_tells_everything_at_once(ready: Path) -> None:
    """Several differences are several errors, with those of versions first."""
    db = await lancedb.connect_async(ready)
    await db.drop_table("users")
    await with_table(db, "memos", "drop_columns", ["tag", "size"])
    db.close()
    more = Migration(table="users", version=2, operations=[op.CreateIndex("id")])

    errors = await errors_of(ready, [*migrations(), more])

    assert errors == (
        "users: current v1, target v2",
        "table memos: column size (int32) is missing",
        "table memos: column tag (string) is missing",
        "table users is missing",
    )


async def test_validate_tells_pending_apart_from_wrong(ready: Path, tmp_path: Path) -> None:
    """What is only not migrated yet can be told from what is broken, on a missing database too."""
    more = [*migrations(), Migration(table="users", version=2, operations=[op.CreateIndex("id")])]

    for path in (ready, tmp_path / "missing"):
        async with manager(path, more) as manager_:
            validation = await manager_.validate()

        assert not validation.valid
        assert "users" in validation.errors[-1]
        assert validation.errors == validation.not_at_target


def edited() -> list[Migration]:
    """Returns the migrations with memos 3 edited."""
    last = Migration(table="memos", version=3, operations=[op.AddColumns({"tags": pa.string()})])
    return [*migrations()[:2], last, migrations()[3]]


async def test_validate_finds_changed_scripts(ready: Path, tmp_path: Path) -> None:
    """An edited checksum, a script that is gone, and one inserted below are each told."""
    gone = [m for m in migrations() if m.version != 2]
    async with manager(tmp_path / "without", gone) as manager_:
        await manager_.initialize()

    assert ["edited" in e for e in await errors_of(ready, edited())] == [True]
    assert ["which no longer exists" in e for e in await errors_of(ready, gone)] == [True]
    assert ["added below" in e for e in await errors_of(tmp_path / "without")] == [True]


async def test_validate_tells_a_line_without_scripts_and_leaves_it(ready: Path) -> None:
    """A line that no script knows any more is a warning, not an error."""
    async with manager(ready, migrations()[:3]) as manager_:
        validation = await manager_.validate()
        status = await manager_.get_status()

    assert validation.valid
    assert validation.warnings == validation.missing == status.missing
    assert "users is recorded at version 1, but none of its scripts" in validation.missing[0]
    assert status.lines["users"].is_unknown
    assert status.is_at_target


async def test_validate_finds_a_line_ahead(ready: Path) -> None:
    """A database newer than the code is an error, or with `OnAhead.WARN` a warning."""
    older = migrations()[:2]

    errors = await errors_of(ready, older)
    async with manager(ready, older, on_ahead=OnAhead.WARN) as manager_:
        allowed = await manager_.validate()

    assert ["newer than this code" in error for error in errors] == [True]
    assert allowed.valid
    assert allowed.warnings[0] == "memos: recorded at v3, above its newest script v2"


async def test_validate_tells_a_ledger_it_cannot_read(ready: Path) -> None:
    """An unreadable journal is a finding, with its remedy, not a crash of validate."""
    shutil.rmtree(ready / f"{JOURNAL}.lance" / "data")

    errors = await errors_of(ready)

    assert len(errors) == 1
    assert repr(JOURNAL) in errors[0]
    assert "restore the table" in errors[0]


async def test_validate_finds_an_interrupted_migration(database: Path) -> None:
    """After a kill the migration in hand is named until the next run has recovered it."""
    fault = Fault(action="kill", at=1, verb="update", table="people")
    options = {"concurrency": 1, "lease_ttl": 0.5}
    process = start(initialize, str(database), "migrations", fault, options)
    process.join(60)
    assert process.exitcode == -9

    errors = await errors_of(database, scenario.migrations())
    async with manager(database, scenario.migrations(), lease_ttl=0.5) as manager_:
        status = await manager_.get_status()
        plan = await manager_.plan()
        await manager_.initialize()

    assert "people: version 3 was interrupted and not recovered yet" in errors
    assert status.holder is not None
    assert status.holder.pid == process.pid
    # Others may have announced themselves too, or their success was not in the journal yet.
    assert ("people", 3) in [step.key for step in plan.steps if step.resumes]
    assert "interrupted; will be recovered" in str(plan)
    assert await errors_of(database, scenario.migrations()) == ()


async def test_initialize_raises_where_a_line_stays_behind(ready: Path) -> None:
    """`initialize` never returns below the target, also when another process stopped short."""

    class Elsewhere(type(manager(ready, []))):  # type: ignore[misc] - whatever it is
        async def upgrade(self, **_: Any) -> Any:
            return await super().upgrade(to={"users": 1})

    given = [*migrations(), Migration(table="users", version=2, operations=[op.CreateIndex("id")])]
    async with Elsewhere(ready, migrations=given) as manager_:
        with pytest.raises(ValidationFailedError, match="users: current v1, target v2"):
            await manager_.initialize()


# ---- stamp --------------------------------------------------------------------------------------


async def stamped(database: Path, given: Sequence[Migration], line: str, to: int) -> None:
    """Does what an error message said, and asserts that all is well then."""
    async with manager(database, given) as manager_:
        assert await manager_.stamp(tables=[line], to=to) == {line: to}
        report = await manager_.initialize()
        assert all(line == step.line for step in report.steps)
        before = tree(database)
        assert (await manager_.initialize()).steps == ()

        assert before == tree(database)
        validation = await manager_.validate()
    assert validation.valid, validation


async def test_stamp_accepts_an_edited_script(ready: Path) -> None:
    """What the error says: the database is right as it is, the scripts are taken as they are."""
    given = edited()
    async with manager(ready, given) as manager_:
        with pytest.raises(ChecksumMismatchError, match="stamp --table memos --to 3"):
            await manager_.initialize()

    await stamped(ready, given, "memos", 3)


async def test_stamp_accepts_an_inserted_script(database: Path) -> None:
    """A script inserted below is recorded as applied, and never run."""
    without = [m for m in migrations() if m.version != 2]
    async with manager(database, without) as manager_:
        await manager_.initialize()
    async with manager(database, migrations()) as manager_:
        with pytest.raises(OutOfOrderError, match="stamp --table memos --to 3"):
            await manager_.initialize()

    await stamped(database, migrations(), "memos", 3)


async def test_stamp_accepts_a_script_that_is_gone(ready: Path) -> None:
    """A deleted script is forgotten."""
    without = [m for m in migrations() if m.version != 2]
    async with manager(ready, without) as manager_:
        with pytest.raises(MissingScriptError, match="stamp --table memos --to 3"):
            await manager_.initialize()

    await stamped(ready, without, "memos", 3)


@pytest.mark.parametrize("kind", ["head above the journal", "lost head row and changed table"])
async def test_stamp_resolves_a_conflict(ready: Path, kind: str) -> None:
    """Head, journal and data that contradict each other are set straight by a person's word."""
    db = await lancedb.connect_async(ready)
    if kind == "head above the journal":
        await with_table(db, HEAD, "update", {"currentVersion": 7}, where="tableName = 'memos'")
    else:
        await with_table(db, HEAD, "delete", "tableName = 'memos'")
        await with_table(db, "memos", "drop_columns", ["tag"])
    db.close()
    async with manager(ready, migrations()) as manager_:
        with pytest.raises(LedgerConflictError, match="stamp --table memos --to VERSION"):
            await manager_.upgrade(to=3 if kind[0] == "h" else None)

    await stamped(ready, migrations(), "memos", 3 if kind[0] == "h" else 2)


async def tangled(context: Context) -> None:
    """Commits, lets someone else commit, commits again, and fails."""
    await context.table().add([{"id": "ours-1"}])
    theirs = await context.connection.open_table("memos")
    await theirs.add([{"id": "theirs"}])
    await context.table().add([{"id": "ours-2"}])
    raise ValueError("wrong on purpose")


@pytest.mark.parametrize("complete", [True, False])
async def test_stamp_ends_a_migration_that_could_not_be_undone(ready: Path, complete: bool) -> None:
    """An unresolved migration stops every run until stamp says whether it counts as applied."""
    runs = []

    async def settled(context: Context) -> None:
        """Takes its place once corrected."""
        runs.append(context.table().name)

    def given(up: Any) -> list[Migration]:
        return [*migrations(), Migration(table="memos", version=4, up=up)]

    async with manager(ready, given(tangled)) as manager_:
        for _ in range(2):  # told again and again, never guessed
            with pytest.raises(MigrationFailedError) as caught:
                await manager_.initialize()
            step = caught.value.report.failed[0]
            assert "stamp --table memos --to 3" in step.remedy
            assert "stamp --to 4" in step.remedy
        errors = (await manager_.validate()).errors
    assert "memos: version 4 was interrupted and not recovered yet" in errors

    await stamped(ready, given(settled), "memos", 4 if complete else 3)

    assert runs == ([] if complete else ["memos"])
    db = await lancedb.connect_async(ready)
    rows = await (await db.open_table("memos")).query().to_arrow()
    assert set(rows["id"].to_pylist()) == {"ours-1", "theirs", "ours-2"}
    assert list(await (await db.open_table("memos")).branches.list()) == []
    db.close()


async def test_stamp_baselines_an_existing_database(database: Path) -> None:
    """A database made by hand is recorded at its versions without running anything."""
    db = await lancedb.connect_async(database)
    for name in ("memos", "users"):
        await db.create_table(name, schema=MEMOS)
    db.close()

    async with manager(database, migrations()) as manager_:
        assert await manager_.stamp(to=1) == {"memos": 1, "users": 1}
        plan = await manager_.plan()
        report = await manager_.initialize()

    assert [step.key for step in plan.steps] == [("memos", 2), ("memos", 3)]
    assert [(s.line, s.version) for s in report.applied] == [("memos", 2), ("memos", 3)]


async def test_stamp_to_0_forgets(ready: Path) -> None:
    """A line stamped at 0 starts again; the tables that fit are taken as they are."""
    async with manager(ready, migrations()[2:]) as manager_:
        await manager_.stamp(tables=["users"], to=0)
        status = await manager_.get_status()
    async with manager(ready, migrations()) as manager_:
        report = await manager_.initialize()

    assert (status.lines["users"].current, status.lines["users"].pending) == (0, (1,))
    assert [(s.line, s.version, s.commits) for s in report.steps] == [("users", 1, 0)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tables": ["memo"], "to": 1}, "Did you mean 'memos'?"),
        ({"to": {"memos": 4}}, "newest script is 3"),
        ({"tables": ["memos"], "to": 4}, "newest script is 3"),
        ({"to": -1}, "-1 is not a valid version"),
        ({"to": True}, "True is not a valid version"),
        ({"to": {"memos": "2"}}, "'2' is not a valid version"),
    ],
)
async def test_stamp_refuses_what_cannot_be(ready: Path, options: Any, words: str) -> None:
    """A wrong line or version is told before anything is written."""
    before = tree(ready)

    async with manager(ready, migrations()) as manager_:
        with pytest.raises(TargetError) as caught:
            await manager_.stamp(**options)

    assert words in str(caught.value)
    assert before == tree(ready)


# ---- status, history, report --------------------------------------------------------------------


async def test_status_tells_every_line(ready: Path) -> None:
    """Current, target and pending versions, for people and for programs."""
    more = Migration(table="users", version=4, operations=[op.CreateIndex("id")])
    new = Migration(table="new", version=2, operations=[op.CreateTable(MEMOS)])
    given = [*migrations(), more, new]

    async with manager(ready, given) as manager_:
        status = await manager_.get_status()

    said = status.to_dict()
    assert said == json.loads(json.dumps(said))
    at = {name: (s.current, s.target, s.pending) for name, s in status.lines.items()}
    assert at == {"memos": (3, 3, ()), "new": (0, 2, (2,)), "users": (1, 4, (4,))}
    assert (status.exists, status.is_at_target, status.holder) == (True, False, None)
    assert said["lines"]["users"]["pending"] == [4]
    migrated_at = status.lines["memos"].migrated_at
    assert migrated_at is not None
    assert abs(dt.datetime.now(dt.UTC) - migrated_at) < dt.timedelta(hours=1)
    assert "1 pending" in str(status)
    assert "at target" in str(status)


async def test_status_of_a_missing_database(database: Path) -> None:
    """Everything is pending, and the table of metadata does not exist."""
    async with manager(database, migrations()) as manager_:
        status = await manager_.get_status()
        history = await manager_.history()

    assert not status.exists
    assert "no metadata table yet" in str(status)
    assert {n: s.pending for n, s in status.lines.items()} == {"memos": (1, 2, 3), "users": (1,)}
    assert history == ()


async def test_status_of_a_lost_head_is_what_the_journal_says(ready: Path) -> None:
    """A head that is gone is not shown as a database at version 0."""
    shutil.rmtree(ready / f"{HEAD}.lance")

    async with manager(ready, migrations()) as manager_:
        status = await manager_.get_status()

    assert not status.exists
    assert {n: s.current for n, s in status.lines.items()} == {"memos": 3, "users": 1}


async def test_history_tells_what_was_done_when_and_by_whom(ready: Path) -> None:
    """The journal's events of a line, in order, with durations, tables and the run."""
    async with manager(ready, migrations()) as manager_:
        events = await manager_.history("memos")
        everything = await manager_.history()

    applied = [e for e in events if e.kind == "applied"]
    assert [e.version for e in applied] == [1, 2, 3]
    assert {e.line for e in events} == {"memos"}
    assert {e.line for e in everything} >= {"memos", "users", None}
    last = applied[-1]
    assert last.description == "Tags"
    assert (last.ran_s or 0) > 0
    assert last.waited_s is not None
    assert last.commits == 1
    assert last.tables["memos"]["after"] == last.tables["memos"]["before"] + 1
    assert last.tables["memos"]["shape"]["fields"]["tag"] == "string"
    assert last.run_id
    assert last.host
    assert last.pid
    assert last.tool
    assert len(last.checksum or "") == 64
    for event in everything:
        assert event.to_dict() == json.loads(json.dumps(event.to_dict()))


async def test_history_tells_failures_and_stamps(ready: Path) -> None:
    """A failure keeps its error and traceback; a stamp says what it took for applied."""

    async def fails(_: Context) -> None:
        """Fails."""
        raise ValueError("wrong on purpose")

    given = [*migrations(), Migration(table="memos", version=4, up=fails)]
    async with manager(ready, given) as manager_:
        with pytest.raises(MigrationFailedError):
            await manager_.initialize()
        await manager_.stamp(tables=["memos"], to=4)
        events = await manager_.history("memos")

    failed = next(e for e in events if e.kind == "failed")
    assert "ValueError: wrong on purpose" in (failed.error or "")
    assert "Traceback" in (failed.error or "")
    assert (events[-1].kind, events[-1].version) == ("stamped", 4)
    assert set(events[-1].detail["checksums"]) == {"1", "2", "3", "4"}


async def test_a_report_is_a_value_json_and_a_table(database: Path) -> None:
    """What a run did, for people and for programs, and one line when there was nothing to do."""
    async with manager(database, migrations()) as manager_:
        report = await manager_.initialize()
        nothing = await manager_.initialize()

    said = json.loads(report.to_json())
    assert said == json.loads(json.dumps(report.to_dict()))
    assert (said["applied"], said["failed"], said["skipped"]) == (4, 0, 0)
    assert said["lines"] == {"memos": 3, "users": 1}
    step = next(s for s in said["steps"] if (s["line"], s["version"]) == ("memos", 3))
    assert step["outcome"] == "applied"
    assert step["tables"]["memos"]["after"] == step["tables"]["memos"]["before"] + 1
    assert step["waited_s"] >= 0
    assert step["ran_s"] > 0
    assert step["ledger_s"] >= 0
    assert "memos" in str(report)
    assert "4 applied" in str(report)
    assert len(str(nothing).splitlines()) == 1
    assert "nothing to do" in str(nothing)
    assert json.loads(nothing.to_json())["steps"] == []


async def test_a_plan_is_a_value_json_and_text(ready: Path) -> None:
    """What a run would do: each migration with its operations and what they are like."""
    more = Migration(
        table="users",
        version=2,
        description="Drop size",
        operations=[op.DropColumns("size")],
        depends_on={"memos": 4},
    )
    text = Migration(table="memos", version=4, operations=[op.Update({"tag": "x"})])

    async with manager(ready, [*migrations(), more, text]) as manager_:
        plan = await manager_.plan()

    said = plan.to_dict()
    assert said == json.loads(json.dumps(said))
    assert [(s["line"], s["version"]) for s in said["steps"]] == [("memos", 4), ("users", 2)]
    assert said["steps"][1]["after"] == [{"line": "memos", "version": 4}]
    assert said["steps"][1]["operations"][0]["does"] == "drop size"
    assert said["steps"][1]["operations"][0]["destructive"]
    assert "2 migrations on 2 lines" in str(plan)
    assert "Drop size" in str(plan)
