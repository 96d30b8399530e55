"""P4, P10: metadata or scripts that cannot be trusted are told, specifically, before any write."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest

from aiomigrate import Migration, MigrationManager, OnAhead, op
from aiomigrate.errors import (
    AiomigrateError,
    ChecksumMismatchError,
    ConfigurationError,
    DatabaseAheadError,
    DependencyError,
    DuplicateVersionError,
    InvalidMigrationError,
    LedgerConflictError,
    LedgerCorruptError,
    LedgerFormatError,
    LedgerUnreadableError,
    MissingScriptError,
    OperationError,
    OutOfOrderError,
    ScriptError,
    ScriptImportError,
    TargetError,
    UnsupportedDatabaseError,
)
from aiomigrate.ledger.codec import HEAD_SCHEMA, JOURNAL_SCHEMA
from tests.tools import manager, tree

HEAD = "table_migrations"
JOURNAL = "table_migrations_history"
MEMOS = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("text", pa.string())])
WHEN = dt.datetime(2026, 1, 2, 3, 4, 5)  # noqa: DTZ001 - the column knows no time zone
THEIRS: list[pa.Field[Any]] = [HEAD_SCHEMA.field(n) for n in range(3)]
PLAIN = pa.schema([f.remove_metadata() for f in THEIRS])
"""The head as the predecessor makes it."""
LOOSE = pa.schema([f.remove_metadata().with_nullable(True) for f in THEIRS])


def migrations(to: int = 2) -> list[Migration]:
    """Returns the memos line up to a version, of at most 3, and one of users."""
    memos = [
        Migration(table="memos", version=1, operations=[op.CreateTable(MEMOS)]),
        Migration(table="memos", version=2, operations=[op.AddColumns({"tag": pa.string()})]),
        Migration(table="memos", version=3, operations=[op.AddColumns({"more": pa.int64()})]),
    ]
    users = Migration(table="users", version=1, operations=[op.CreateTable(MEMOS)])
    return [*memos[:to], users]


def on_disk(folder: Path) -> tuple[bool, dict[str, str]]:
    """Returns whether a folder exists, and a digest of each file in it."""
    return folder.exists(), tree(folder)


async def initialized(database: Path, to: int = 2) -> None:
    """Makes a database at target."""
    async with manager(database, migrations(to)) as manager_:
        await manager_.initialize()


async def refused(
    database: Path,
    given: Sequence[Migration],
    kind: type[AiomigrateError],
    *words: str,
    line: str | None = None,
    version: int | None = None,
    **options: Any,
) -> AiomigrateError:
    """Asserts that initialize and plan raise one specific error and that nothing is written."""
    before = on_disk(database)
    errors = []
    for verb in ("initialize", "plan"):
        async with manager(database, given, **options) as manager_:
            with pytest.raises(kind) as caught:
                await getattr(manager_, verb)()
        errors.append(caught.value)

    assert on_disk(database) == before
    for error in errors:
        assert type(error) is kind
        assert error.remedy
        assert error.remedy in str(error)
        for word in words:
            assert word in str(error)
        assert (line, version) == (line and error.line, version and error.version)
    return errors[0]


async def rewrite(database: Path, name: str, schema: pa.Schema, rows: Sequence[Any]) -> None:
    """Replaces a table by one of another schema, as a careless person would."""
    db = await lancedb.connect_async(database)
    if name in (await db.list_tables()).tables:
        await db.drop_table(name)
    table = await db.create_table(name, schema=schema)
    if rows:
        await table.add(pa.Table.from_pylist([dict(row) for row in rows], schema=schema))
    db.close()


async def change(database: Path, name: str, verb: str, *args: Any, **named: Any) -> None:
    """Calls a method of a table with LanceDB alone."""
    db = await lancedb.connect_async(database)
    await getattr(await db.open_table(name), verb)(*args, **named)
    db.close()


async def read(database: Path, name: str) -> pa.Table:
    """Reads a table with LanceDB alone."""
    db = await lancedb.connect_async(database)
    rows = await (await db.open_table(name)).query().to_arrow()
    db.close()
    return rows


def row(name: Any, version: Any, **more: Any) -> dict[str, Any]:
    """Returns a head row as the predecessor writes it."""
    return {"tableName": name, "currentVersion": version, "lastMigratedAt": WHEN, **more}


async def predecessor(database: Path, *rows: dict[str, Any], schema: pa.Schema = PLAIN) -> None:
    """Makes a database with a memos table and a head of the predecessor's with some rows."""
    await rewrite(database, "memos", MEMOS, [{"id": "a", "text": "kept"}])
    await rewrite(database, HEAD, schema, rows)


# ---- unreadable ---------------------------------------------------------------------------------


def newest_manifest(table: Path) -> Path:
    """Returns the file that LanceDB reads first."""
    return min((table / "_versions").glob("*.manifest"))  # they are numbered downwards


def half(path: Path) -> None:
    """Cuts off the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def halve_data(table: Path) -> None:
    """Cuts every data file of a table."""
    for path in (table / "data").iterdir():
        half(path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "manifest truncated": lambda table: half(newest_manifest(table)),
    "manifest emptied": lambda table: newest_manifest(table).write_bytes(b""),
    "manifests removed": lambda table: shutil.rmtree(table / "_versions"),
    "data removed": lambda table: shutil.rmtree(table / "data"),
    "data truncated": halve_data,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [HEAD, JOURNAL])
async def test_a_damaged_metadata_table_is_an_error_and_never_version_0(
    database: Path, name: str, damage: str
) -> None:
    """Whatever file of head or journal is lost, pending work is refused and the table named."""
    await initialized(database)
    DAMAGES[damage](database / f"{name}.lance")

    await refused(database, migrations(3), LedgerUnreadableError, repr(name), "restore the")


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_head_of_the_predecessor_is_an_error(database: Path, damage: str) -> None:
    """With no journal to tell, a head whose files are lost is not taken for a fresh database."""
    await predecessor(database, row("memos", 1))
    DAMAGES[damage](database / f"{HEAD}.lance")

    await refused(database, migrations(), LedgerUnreadableError, repr(HEAD), "restore the")


async def test_stamp_and_status_refuse_a_head_that_lost_its_versions(database: Path) -> None:
    """Not even stamp founds a new head over the data files of an unreadable one."""
    await initialized(database)
    shutil.rmtree(database / f"{HEAD}.lance" / "_versions")
    before = tree(database)

    async with manager(database, migrations()) as manager_:
        for verb in ("stamp", "get_status", "upgrade"):
            with pytest.raises(LedgerUnreadableError, match=HEAD):
                await getattr(manager_, verb)()

    assert before == tree(database)


async def test_the_ghost_of_a_killed_create_is_no_damage(database: Path) -> None:
    """A head that was being made when its creator died, without a version, is made anew."""
    await initialized(database, 1)
    for name in (HEAD, JOURNAL):
        for part in ("_versions", "data"):
            shutil.rmtree(database / f"{name}.lance" / part)

    async with manager(database, migrations(1)) as manager_:
        report = await manager_.initialize()

    assert report.lines == {"memos": 1, "users": 1}  # the tables fit: they are taken as they are


# ---- columns and values -------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["tableName", "currentVersion", "lastMigratedAt"])
async def test_a_head_without_a_column_is_an_error(database: Path, column: str) -> None:
    """A table of the head's name that misses one of its columns is no ledger."""
    rest = pa.schema([f for f in PLAIN if f.name != column])
    values = {n: v for n, v in row("memos", 1).items() if n != column}
    await predecessor(database, values, schema=rest)

    await refused(database, migrations(), LedgerCorruptError, repr(HEAD), repr(column))


@pytest.mark.parametrize(
    ("column", "kind", "value"),
    [
        ("tableName", pa.int64(), 7),
        ("currentVersion", pa.int64(), 1),
        ("currentVersion", pa.string(), "1"),
        ("lastMigratedAt", pa.string(), "yesterday"),
        ("epoch", pa.string(), "3"),
    ],
)
async def test_a_head_with_a_column_of_another_type_is_an_error(
    database: Path, column: str, kind: pa.DataType, value: Any
) -> None:
    """A retyped column, ours or the predecessor's, is named with both types."""
    base = HEAD_SCHEMA if column == "epoch" else PLAIN
    schema = pa.schema([pa.field(f.name, kind) if f.name == column else f for f in base])
    await predecessor(database, row("memos", 1) | {column: value}, schema=schema)

    await refused(database, migrations(), LedgerCorruptError, repr(HEAD), repr(column), str(kind))


@pytest.mark.parametrize("column", ["tableName", "currentVersion", "lastMigratedAt"])
async def test_a_head_row_with_null_is_an_error(database: Path, column: str) -> None:
    """NULL where a name, a version or a time must be is not read as anything."""
    await predecessor(database, row("memos", 1) | {column: None}, schema=LOOSE)

    await refused(database, migrations(), LedgerCorruptError, repr(HEAD), "NULL")


async def test_a_negative_version_is_an_error(database: Path) -> None:
    """A recorded version below 0 names its line."""
    await predecessor(database, row("memos", -3))

    await refused(
        database, migrations(), LedgerCorruptError, repr(HEAD), "-3", line="memos", version=-3
    )


@pytest.mark.parametrize("column", ["seq", "kind", "detail"])
async def test_a_journal_without_a_column_is_an_error(database: Path, column: str) -> None:
    """A journal that lost a column is not taken for an empty one."""
    await initialized(database)
    rows = (await read(database, JOURNAL)).drop_columns([column])
    await rewrite(database, JOURNAL, rows.schema, rows.to_pylist())

    await refused(database, migrations(3), LedgerCorruptError, repr(JOURNAL), repr(column))


@pytest.mark.parametrize(
    ("column", "value", "word"),
    [("detail", "{broken", "JSON"), ("tables", "[]", "JSON"), ("kind", None, "NULL"),
     ("seq", None, "NULL")],
)  # fmt: skip
async def test_a_journal_event_that_cannot_be_read_is_an_error(
    database: Path, column: str, value: str | None, word: str
) -> None:
    """One event whose values cannot be stops the run; it is not left out."""
    await initialized(database)
    rows = (await read(database, JOURNAL)).to_pylist()
    rows[-1][column] = value
    loose = pa.schema([f.with_nullable(f.name != "id") for f in JOURNAL_SCHEMA])
    await rewrite(database, JOURNAL, loose, rows)

    await refused(database, migrations(3), LedgerCorruptError, repr(JOURNAL), word)


@pytest.mark.parametrize("name", [HEAD, JOURNAL])
async def test_metadata_of_a_newer_format_is_refused(database: Path, name: str) -> None:
    """Tables written by a newer release are not misread: upgrade the library."""
    await initialized(database)
    rows = await read(database, name)
    newer = pa.schema(
        [
            f.with_metadata({b"aiomigrate:format": b"2"}) if f.name == "epoch" else f
            for f in (HEAD_SCHEMA if name == HEAD else JOURNAL_SCHEMA)
        ]
    )
    await rewrite(database, name, newer, rows.to_pylist())

    if name == HEAD:  # of a head this shows even when nothing is pending
        await refused(database, migrations(2), LedgerFormatError, repr(name))
    await refused(
        database, migrations(3), LedgerFormatError, repr(name), "format 2", "Upgrade aiomigrate"
    )


# ---- rows that contradict each other ------------------------------------------------------------


async def test_identical_duplicate_rows_are_merged(database: Path) -> None:
    """Two equal rows of one line, as two racing predecessors leave them, become one."""
    await predecessor(database, row("memos", 1), row("memos", 1))

    async with manager(database, migrations()) as manager_:
        await manager_.initialize()

    found = [r for r in (await read(database, HEAD)).to_pylist() if r["tableName"] == "memos"]
    assert [r["currentVersion"] for r in found] == [2]


async def test_duplicate_rows_that_differ_are_an_error(database: Path) -> None:
    """Two rows of one line with different versions: neither is believed, stamp decides."""
    await predecessor(database, row("memos", 1), row("memos", 2))

    await refused(
        database, migrations(), LedgerConflictError, "'memos'", "1, 2", "stamp", line="memos"
    )
    async with manager(database, migrations()) as manager_:
        await manager_.stamp(tables=["memos"], to=1)
        report = await manager_.initialize()

    assert report.lines == {"memos": 2, "users": 1}


async def test_duplicate_rows_of_a_line_without_scripts_cost_nothing(database: Path) -> None:
    """What other systems keep in the head about lines unknown to us is theirs, twice or not."""
    await predecessor(database, row("ghosts", 3), row("ghosts", 4))
    async with manager(database, migrations(1)) as manager_:
        await manager_.initialize()
        before = tree(database)
        await manager_.initialize()

    assert before == tree(database)


@pytest.mark.parametrize("ours", [True, False])
async def test_a_line_above_its_newest_script_is_an_error(database: Path, ours: bool) -> None:
    """A database newer than the code is refused, whoever wrote its head."""
    if ours:
        await initialized(database, 3)
    else:
        await predecessor(database, row("memos", 3))

    await refused(
        database, migrations(2), DatabaseAheadError, "'memos'", "version 3", "OnAhead.WARN",
        line="memos", version=3,
    )  # fmt: skip


async def test_a_line_above_its_newest_script_may_be_allowed(database: Path) -> None:
    """With `OnAhead.WARN` older code starts on a newer database, and changes nothing in it."""
    await initialized(database, 3)
    before = tree(database)

    async with manager(database, migrations(2), on_ahead=OnAhead.WARN) as manager_:
        report = await manager_.initialize()
        plan = await manager_.plan()
        validation = await manager_.validate()

    assert before == tree(database)
    assert report.lines == {"memos": 3, "users": 1}
    assert plan.warnings == ("memos is at version 3, above its newest script 2",)
    assert validation.valid
    assert validation.warnings == ("memos: recorded at v3, above its newest script v2",)


async def test_other_lines_go_on_beside_one_that_is_ahead(database: Path) -> None:
    """With `OnAhead.WARN` what is pending on other lines still runs."""
    await initialized(database, 3)
    more = Migration(table="users", version=2, operations=[op.AddColumns({"n": pa.int64()})])

    async with manager(database, [*migrations(2), more], on_ahead=OnAhead.WARN) as manager_:
        report = await manager_.initialize()

    assert [(s.line, s.version) for s in report.applied] == [("users", 2)]
    assert report.lines == {"memos": 3, "users": 2}


async def test_a_head_above_the_journal_is_an_error(database: Path) -> None:
    """A head of ours that claims more than the journal was edited: nothing is run."""
    await initialized(database)
    await change(database, HEAD, "update", {"currentVersion": 3}, where="tableName = 'memos'")

    await refused(
        database, migrations(3), LedgerConflictError, "'memos'", "version 3", "says 2", "stamp",
        line="memos", version=3,
    )  # fmt: skip


async def test_a_lost_journal_is_an_error(database: Path) -> None:
    """A head of ours without any journal is not believed."""
    await initialized(database)
    shutil.rmtree(database / f"{JOURNAL}.lance")

    await refused(database, migrations(3), LedgerConflictError, "says 0", "stamp", line="memos")


async def test_a_head_below_the_journal_follows_it(database: Path) -> None:
    """A head that lags behind, as a crash leaves it, is lifted; nothing runs twice."""
    await initialized(database)
    await change(database, HEAD, "update", {"currentVersion": 1}, where="tableName = 'memos'")

    async with manager(database, migrations()) as manager_:
        report = await manager_.initialize()
        status = await manager_.get_status()

    assert report.steps == ()
    assert status.lines["memos"].current == 2


async def lose(database: Path, how: str) -> None:
    """Takes the memos row out of the head, or puts a lower one there, or removes the head."""
    if how == "row":
        await change(database, HEAD, "delete", "tableName = 'memos'")
    elif how == "foreign row below":
        await change(database, HEAD, "delete", "tableName = 'memos'")
        lower = pa.Table.from_pylist([row("memos", 1)], schema=HEAD_SCHEMA)
        await change(database, HEAD, "add", lower)
    else:
        shutil.rmtree(database / f"{HEAD}.lance")


@pytest.mark.parametrize("how", ["row", "foreign row below", "table"])
async def test_what_the_head_lost_is_put_back_when_the_data_is_as_the_journal_says(
    database: Path, how: str
) -> None:
    """The journal wins over a head that was lost or lowered; nothing runs, one run mends it."""
    await initialized(database)
    await lose(database, how)

    async with manager(database, migrations()) as manager_:
        report = await manager_.initialize()
        mended = tree(database)
        again = await manager_.initialize()
        validation = await manager_.validate()

    assert () == report.steps == again.steps
    assert mended == tree(database)
    found = {r["tableName"]: r["currentVersion"] for r in (await read(database, HEAD)).to_pylist()}
    assert {n: v for n, v in found.items() if n[0] != ":"} == {"memos": 2, "users": 1}
    assert validation.valid, validation


@pytest.mark.parametrize("how", ["row", "foreign row below", "table"])
@pytest.mark.parametrize("changed", ["column", "table"])
async def test_what_the_head_lost_is_an_error_when_a_table_was_changed(
    database: Path, how: str, changed: str
) -> None:
    """When neither head nor data is what the journal left, nobody guesses."""
    await initialized(database)
    await lose(database, how)
    if changed == "column":
        await change(database, "memos", "drop_columns", ["tag"])
    else:
        shutil.rmtree(database / "memos.lance")

    await refused(
        database, migrations(3), LedgerConflictError, "'memos'", "table memos", "version 2",
        "stamp", line="memos", version=2,
    )  # fmt: skip


# ---- scripts against what was applied -----------------------------------------------------------


async def test_an_edited_migration_is_an_error_even_at_target(database: Path) -> None:
    """The digest in the head shows an edit in the one read of a start with nothing to do."""
    await initialized(database)
    edited = [m for m in migrations() if (m.name, m.version) != ("memos", 2)] + [
        Migration(table="memos", version=2, operations=[op.AddColumns({"tags": pa.string()})])
    ]

    await refused(
        database, edited, ChecksumMismatchError, "version 2 of 'memos'", "stamp",
        line="memos", version=2,
    )  # fmt: skip


async def test_a_migration_inserted_below_is_an_error(database: Path) -> None:
    """A new script below the version that is applied would never run: it is refused."""
    given = migrations(3)
    skipped = [m for m in given if (m.name, m.version) != ("memos", 2)]
    async with manager(database, skipped) as manager_:
        await manager_.initialize()

    await refused(
        database, given, OutOfOrderError, "version 2 of 'memos'", "number above 3",
        line="memos", version=2,
    )  # fmt: skip


async def test_an_applied_script_that_is_gone_is_an_error(database: Path) -> None:
    """A deleted script is named by its version, also when later ones are still there."""
    await initialized(database, 3)
    rest = [m for m in migrations(3) if (m.name, m.version) != ("memos", 2)]

    await refused(
        database, rest, MissingScriptError, "Version 2 of 'memos'", "Restore the file",
        line="memos", version=2,
    )  # fmt: skip


async def test_a_dependency_cycle_is_an_error(database: Path) -> None:
    """The cycle is spelled out."""
    ring = [
        Migration(table=a, version=1, operations=[op.CreateTable(MEMOS)], depends_on={b: 1})
        for a, b in (("a", "b"), ("b", "c"), ("c", "a"))
    ]

    await refused(database, ring, DependencyError, "a 1 -> b 1 -> c 1 -> a 1", "depends_on")


async def test_a_dependency_that_does_not_exist_is_an_error(database: Path) -> None:
    """A typing mistake in `depends_on` is told with the name that was meant."""
    given = [
        *migrations(),
        Migration(table="x", version=1, operations=[op.CreateTable(MEMOS)], depends_on={"memo": 1}),
    ]

    await refused(
        database, given, DependencyError, "'memo' version 1", "Did you mean 'memos'?",
        line="x", version=1,
    )  # fmt: skip


async def test_an_operation_that_does_not_fit_its_table_is_an_error(database: Path) -> None:
    """A table of another schema in the way is found while planning, with both types."""
    await rewrite(database, "memos", pa.schema([pa.field("id", pa.int64())]), [])

    await refused(
        database, migrations(), OperationError, "'memos'", "is int64, not string!",
        line="memos", version=1,
    )  # fmt: skip


async def test_two_scripts_with_one_version_are_an_error(database: Path) -> None:
    """Given as objects, line and version are named."""
    await refused(
        database, [*migrations(), migrations(1)[0]], DuplicateVersionError, "version 1 of 'memos'",
        line="memos", version=1,
    )  # fmt: skip


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", 2**31, None])
def test_a_version_that_is_no_positive_integer_is_an_error(version: Any) -> None:
    """A migration cannot even be built with it."""
    expected = r"'memos'.*not a positive integer.*Use the number"
    with pytest.raises(InvalidMigrationError, match=expected):
        Migration(table="memos", version=version, operations=[op.CreateTable(MEMOS)])


@pytest.mark.parametrize("to", [-1, True, 1.5, {"memos": -1}, {"memos": True}, {"memos": 7}])
async def test_a_target_that_is_no_version_is_an_error(database: Path, to: Any) -> None:
    """Neither upgrade, nor plan, nor stamp takes a target that cannot be; nothing is written."""
    await initialized(database)
    before = tree(database)

    async with manager(database, migrations()) as manager_:
        for verb in ("upgrade", "plan", "stamp"):
            with pytest.raises(TargetError):
                await getattr(manager_, verb)(to=to)

    assert before == tree(database)


# ---- files --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """Migration files that cannot be loaded, and how that is told."""

    files: dict[str, str]
    kind: type[AiomigrateError]
    words: tuple[str, ...]
    path: str


GOOD = """
import pyarrow as pa
from aiomigrate import Migration, op
users = Migration(table="users", version={version},
                  operations=[op.CreateTable(pa.schema([("id", pa.string())]))])
"""
FILES = {
    "does not import": Wrong(
        files={"001_users.py": "import nothing_of_that_name"},
        kind=ScriptImportError,
        words=("001_users.py", "nothing_of_that_name"),
        path="001_users.py",
    ),
    "is no Python": Wrong(
        files={"001_users.py": "def ("},
        kind=ScriptImportError,
        words=("001_users.py", "SyntaxError"),
        path="001_users.py",
    ),
    "exits": Wrong(
        files={"001_users.py": "raise SystemExit(0)"},
        kind=ScriptImportError,
        words=("001_users.py", "SystemExit"),
        path="001_users.py",
    ),
    "holds version 0": Wrong(
        files={"000_users.py": GOOD.format(version=0)},
        kind=InvalidMigrationError,
        words=("000_users.py", "'users'", "version 0"),
        path="000_users.py",
    ),
    "holds a boolean version": Wrong(
        files={"001_users.py": GOOD.format(version=True)},
        kind=InvalidMigrationError,
        words=("001_users.py", "'users'", "version True"),
        path="001_users.py",
    ),
    "holds another version": Wrong(
        files={"002_users.py": GOOD.format(version=1)},
        kind=ScriptError,
        words=("002_users.py", "version 1", "version=2"),
        path="002_users.py",
    ),
    "holds none": Wrong(
        files={"001_users.py": "users = 1"},
        kind=ScriptError,
        words=("001_users.py", "no Migration"),
        path="001_users.py",
    ),
    "two of one number": Wrong(
        files={"001_users.py": GOOD.format(version=1), "1_more.py": GOOD.format(version=1)},
        kind=DuplicateVersionError,
        words=("001_users.py", "1_more.py"),
        path="1_more.py",
    ),
    "one version twice": Wrong(
        files={"001_users.py": GOOD.format(version=1) + GOOD.format(version=1).replace(
            "users =", "again =")},
        kind=DuplicateVersionError,
        words=("001_users.py", "version 1 of 'users'"),
        path="001_users.py",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", FILES)
async def test_a_migration_file_that_cannot_be_loaded_is_an_error(
    database: Path, tmp_path: Path, wrong: str
) -> None:
    """The file is named, in the text and as `path`; the database is not even made."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    for name, text in FILES[wrong].files.items():
        (folder / name).write_text(text, encoding="utf-8")

    error = await refused(
        database,
        folder,  # type: ignore[arg-type] - a folder is as good as a sequence
        FILES[wrong].kind,
        *FILES[wrong].words,
    )

    assert FILES[wrong].path == Path(error.path or "").name
    assert on_disk(database) == (False, {})


async def test_a_missing_migrations_folder_is_an_error(database: Path, tmp_path: Path) -> None:
    """An empty set of migrations is never assumed."""
    missing = tmp_path / "nowhere"

    await refused(
        database,
        missing,  # type: ignore[arg-type] - a folder is as good as a sequence
        ConfigurationError,
        str(missing),
        "aiomigrate new",
    )


# ---- databases ----------------------------------------------------------------------------------


def test_a_cloud_database_is_not_supported() -> None:
    """A `db://` URI is refused by name, without its credentials."""
    with pytest.raises(UnsupportedDatabaseError) as caught:
        MigrationManager("db://someone:sk-secret@my-database", migrations=[])

    assert "db://my-database" in str(caught.value)
    assert "does not support" in str(caught.value)
    assert "s3://" in caught.value.remedy
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "word"),
    [("app", "./app"), ("app.lancedb", "./app.lancedb"), ("", "Pass a path"),
     ("   ", "Pass a path"), ("ftp://host/x", "s3")],
)  # fmt: skip
def test_a_uri_that_lancedb_might_take_for_something_else_is_an_error(
    uri: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare word could be the name of a cloud database: it is refused with how to write it."""
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigurationError) as caught:
        MigrationManager(uri, migrations=[])

    assert type(caught.value) is ConfigurationError
    assert word in caught.value.remedy
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "options",
    [{"lease_ttl": 0}, {"concurrency": 0}, {"ledger": "a/b"}, {"ledger": ""}],
)
def test_options_that_cannot_be_are_an_error(database: Path, options: dict[str, Any]) -> None:
    """The option is named."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        MigrationManager(database, migrations=[], **options)
