"""`migrations/`, the history of a real application, on databases by every road it has come.

The databases are built here in the predecessor's format. With `AIOMIGRATE_FIXTURES` set to a
folder of archives that the predecessor itself has written, the same is shown over those.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from aiomigrate import MigrationFailedError, MigrationManager, Report, Validation, load
from tests import predecessor
from tests.predecessor import DIARY, KEYS, LEDGER, State
from tests.tools import FIXTURES

HERE = Path(__file__).parents[1]
MIGRATIONS = HERE.parent / "migrations"
ARCHIVES = {
    "memo_app_v1": 1536,
    "memo_app_v1_small": 8,
    "memo_app_upgraded_small": 8,
    "memo_app_nulltype_small": 8,
}
"""Archive by the dimension of its text vectors."""
FILLED = {"type": "text", "isPublic": False, "properties": "{}", "deletedAt": 0}
"""What the history writes into columns that it adds; the others stay NULL."""
UNKNOWN = {"memo_vectors": 18, "attachment_vectors": 17}
"""Lines of withdrawn versions, by what the predecessor's latest records."""

Shapes = Mapping[str, Mapping[str, list[str]]]


@dataclass(frozen=True)
class Content:
    """A whole database as read: shapes as in `target.json`, and rows."""

    shapes: Shapes
    rows: Mapping[str, pa.Table]

    @property
    def ledger(self) -> dict[str, int]:
        """Recorded versions without the leases."""
        rows = self.rows[LEDGER].to_pylist()
        return {r["tableName"]: r["currentVersion"] for r in rows if r["tableName"][0] != ":"}


@dataclass(frozen=True)
class Arrived:
    """A database that `initialize()` has adopted."""

    path: Path
    dimension: int
    before: Content
    after: Content
    report: Report


@dataclass(frozen=True)
class Fresh:
    """A database that `initialize()` has made from nothing."""

    content: Content
    report: Report
    validation: Validation


async def read(path: Path) -> Content:
    """Reads every table with a connection of its own."""
    db = await lancedb.connect_async(path)
    shapes, rows = {}, {}
    for name in sorted((await db.list_tables()).tables):
        table = await db.open_table(name)
        indexes = [f"{i.index_type} {','.join(i.columns)}" for i in await table.list_indices()]
        fields = [spelled(field) for field in await table.schema()]
        shapes[name] = {"fields": sorted(fields), "indexes": sorted(indexes)}
        rows[name] = await table.query().to_arrow()
    db.close()
    return Content(shapes, rows)


def spelled(field: pa.Field[Any]) -> str:
    """Returns `name:type`, with `!` for NOT NULL."""
    return f"{field.name}:{field.type}{'' if field.nullable else '!'}"


def target(dimension: int) -> Shapes:
    """Returns where every database must arrive, for a dimension of the text vectors."""
    text = (HERE / "target.json").read_text(encoding="utf-8")
    return json.loads(text.replace("[1536]", f"[{dimension}]"))  # type: ignore[no-any-return]


def application(content: Content) -> Shapes:
    """Returns the shapes without the metadata tables."""
    return {n: s for n, s in content.shapes.items() if not n.startswith(LEDGER)}


def manager(path: Path, **options: Any) -> MigrationManager:
    """Returns a manager of the application's migrations."""
    return MigrationManager(path, migrations=MIGRATIONS, **options)


def files(path: Path) -> dict[str, int]:
    """Returns every file below a folder with its time of change."""
    return {str(p): p.stat().st_mtime_ns for p in sorted(path.rglob("*"))}


def sorted_by_key(table: pa.Table, name: str) -> pa.Table:
    """Returns a table's rows in the order of its key."""
    return table.sort_by([(key, "ascending") for key in KEYS[name]]).combine_chunks()


def keys_of(table: pa.Table, name: str) -> list[tuple[str, ...]]:
    """Returns the key of each row, in the order of the rows."""
    return list(zip(*(table[key].to_pylist() for key in KEYS[name]), strict=True))


def original_rows(content: Content, old: Content, name: str) -> pa.Table:
    """Returns those rows of a table that the old database had."""
    known = set(keys_of(old.rows[name], name))
    rows = content.rows[name]
    return rows.filter(pa.array([key in known for key in keys_of(rows, name)], pa.bool_()))


def assert_rows_kept(before: Content, after: Content) -> None:
    """Every original row is there once, with every original value."""
    for name in KEYS:
        if name not in before.rows:
            continue
        want = sorted_by_key(before.rows[name], name)
        have = sorted_by_key(original_rows(after, before, name), name)

        assert keys_of(want, name) == keys_of(have, name)
        for column in want.column_names:
            if pa.types.is_null(want[column].type):
                continue  # it held nothing
            assert want[column].combine_chunks().equals(have[column].combine_chunks()), (
                name,
                column,
            )


def diaries(content: Content) -> list[tuple[str, str]]:
    """Returns owner and id of every diary category, sorted."""
    rows = content.rows["categories"]
    found = rows.filter(pc.equal(rows["name"], DIARY)).select(["uid", "categoryId"]).to_pylist()
    return sorted((row["uid"], row["categoryId"]) for row in found)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Fresh]:
    """A fresh database for each dimension; 1536 is the default."""
    folder = tmp_path_factory.mktemp("fresh")

    async def make(dimension: int, params: Mapping[str, Any]) -> Fresh:
        async with manager(folder / str(dimension), params=params) as migrations:
            report = await migrations.initialize()
            validation = await migrations.validate()
        return Fresh(await read(folder / str(dimension)), report, validation)

    return {
        1536: asyncio.run(make(1536, {})),
        8: asyncio.run(make(8, {"dimension": "8"})),
    }


# ---- old databases ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Mapping[State, Path]:
    """One database in each state; to be copied."""
    folder = tmp_path_factory.mktemp("built")

    async def build() -> None:
        for state in State:
            await predecessor.build(folder / str(state), state)

    asyncio.run(build())
    return {state: folder / str(state) for state in State}


@pytest.fixture(scope="module", params=[*State, *ARCHIVES], ids=str)
def arrived(
    request: pytest.FixtureRequest,
    built: Mapping[State, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Arrived:
    """An old database, read, then brought to the target with no parameters given."""
    path = tmp_path_factory.mktemp("arrived") / "database"
    if isinstance(request.param, State):
        shutil.copytree(built[request.param], path)
        dimension = predecessor.DIMENSION
    else:
        unpack(request.param, path)
        dimension = ARCHIVES[request.param]

    async def arrive() -> Arrived:
        before = await read(path)
        async with manager(path) as migrations:
            report = await migrations.initialize()
        return Arrived(path, dimension, before, await read(path), report)

    return asyncio.run(arrive())


def unpack(archive: str, path: Path) -> None:
    """Unpacks an archive; skips the test where there are to be none, fails where one is missing."""
    if not FIXTURES:
        pytest.skip("AIOMIGRATE_FIXTURES is not set")
    file = Path(FIXTURES) / f"{archive}.tar.gz"
    if not file.is_file():
        pytest.fail(f"{file} is missing")
    path.mkdir()
    with tarfile.open(file) as tar:
        tar.extractall(path, filter="data")


@pytest.fixture
def afterwards(arrived: Arrived, tmp_path: Path) -> Path:
    """A copy of a database that has arrived, to be changed."""
    return Path(shutil.copytree(arrived.path, tmp_path / "database"))


def test_old_database_equals_target(arrived: Arrived) -> None:
    """An old database arrives at the target, and its tables keep their vectors' dimension."""
    assert target(arrived.dimension) == application(arrived.after)


def test_old_database_equals_a_fresh_one(arrived: Arrived, fresh: Mapping[int, Fresh]) -> None:
    """An old database and a fresh one have the same fields, nullability and indexes."""
    assert application(fresh[arrived.dimension].content) == application(arrived.after)


def test_old_database_keeps_its_rows(arrived: Arrived) -> None:
    """Every original row is there once, value by value; only diary categories are new."""
    assert_rows_kept(arrived.before, arrived.after)
    for name in KEYS:
        before = arrived.before.rows[name].num_rows if name in arrived.before.rows else 0
        new = arrived.after.rows[name].num_rows - before
        assert new == 0 or name == "categories", name


def test_added_columns_hold_what_the_history_writes(arrived: Arrived) -> None:
    """A column that an old row lacked has the value of the history, or NULL."""
    for name in arrived.before.rows:
        if name == LEDGER:
            continue
        before = arrived.before.rows[name]
        after = original_rows(arrived.after, arrived.before, name)
        null_typed = [c for c in before.column_names if pa.types.is_null(before[c].type)]
        for column in after.column_names:
            if column not in before.column_names or column in null_typed:
                assert set(after[column].to_pylist()) <= {FILLED.get(column)}, (name, column)


def test_every_user_has_one_diary(arrived: Arrived) -> None:
    """Every user there was at version 4 has one diary category; the ones there were are kept."""
    users = arrived.after.rows["users"]["uid"].to_pylist()
    owners = [uid for uid, _ in diaries(arrived.after)]

    assert len(owners) == len(set(owners))
    if arrived.before.ledger["categories"] < 4:
        assert set(users) <= set(owners)
        assert set(diaries(arrived.before)) <= set(diaries(arrived.after))
    else:
        assert diaries(arrived.before) == diaries(arrived.after)


async def test_every_index_serves(arrived: Arrived) -> None:
    """Each index can be read through: none is left of a column that is gone."""
    db = await lancedb.connect_async(arrived.path)
    for name, shape in application(arrived.after).items():
        table = await db.open_table(name)
        rows = arrived.after.rows[name]
        for index in shape["indexes"]:
            column = index.split(" ")[1]
            present = rows.num_rows - rows[column].null_count
            assert await table.count_rows(f"`{column}` IS NOT NULL") == present
    db.close()


def test_ledger_is_adopted_in_place(arrived: Arrived) -> None:
    """The predecessor's three columns keep name, type and NOT NULL; its index is gone.

    Ours are nullable. With an index on its key a primary key does not protect.
    """
    shape = arrived.after.shapes[LEDGER]
    theirs = {spelled(field) for field in predecessor.LEDGER_SCHEMA}

    assert theirs <= set(shape["fields"])
    assert not [f for f in set(shape["fields"]) - theirs if f.endswith("!")]
    assert shape["indexes"] == []
    for line, version in arrived.before.ledger.items():
        assert arrived.after.ledger[line] >= version
    names = arrived.after.rows[LEDGER]["tableName"].to_pylist()
    assert len(names) == len(set(names))


async def test_nothing_is_left_to_do(arrived: Arrived) -> None:
    """A second `initialize()` runs no migration and changes no file, and all is valid."""
    before = files(arrived.path)
    async with manager(arrived.path) as migrations:
        report = await migrations.initialize()
        validation = await migrations.validate()

    assert report.steps == ()
    assert validation.valid, validation.errors
    assert before == files(arrived.path)


async def test_unknown_lines_are_shown_and_left_alone(arrived: Arrived) -> None:
    """Lines of withdrawn versions keep their row untouched, and are told as unknown."""
    unknown = {line for line in UNKNOWN if line in arrived.before.ledger}
    async with manager(arrived.path) as migrations:
        status = await migrations.get_status()
        validation = await migrations.validate()

    for line in unknown:
        assert status.lines[line].target is None
        assert status.lines[line].current == UNKNOWN[line]
    told = {w.split(":")[0] for w in validation.warnings}
    assert told == unknown
    assert rows_of(arrived.before, unknown) == rows_of(arrived.after, unknown)


def rows_of(content: Content, lines: set[str]) -> list[dict[str, Any]]:
    """Returns the predecessor's columns of some lines."""
    rows = content.rows[LEDGER].select(predecessor.LEDGER_SCHEMA.names).to_pylist()
    return sorted((r for r in rows if r["tableName"] in lines), key=lambda r: str(r["tableName"]))


async def test_predecessor_goes_on_with_an_adopted_ledger(
    arrived: Arrived, afterwards: Path
) -> None:
    """The predecessor still reads and writes the ledger, and what it wrote is adopted.

    It finds every version and calls the database valid; nothing is migrated twice.
    """
    db = await lancedb.connect_async(afterwards)
    for line, version in arrived.after.ledger.items():
        assert await predecessor.current_version(db, line) == version
    ran = await predecessor.migrate(db, predecessor.LATEST)
    for line in ("users", "memos"):
        await predecessor.record(db, line, await predecessor.current_version(db, line))
    assert await predecessor.validate(db, predecessor.LATEST) == []
    db.close()

    async with manager(afterwards) as migrations:
        report = await migrations.initialize()
        again = await migrations.initialize()
        validation = await migrations.validate()
    after = await read(afterwards)

    assert dict(ran) == {k: v for k, v in UNKNOWN.items() if k not in arrived.before.ledger}
    assert report.steps == again.steps == ()
    assert again.ledger_commits == 0
    assert validation.valid, validation.errors
    assert UNKNOWN.items() <= after.ledger.items()
    assert application(arrived.after) == application(after)
    assert_rows_kept(arrived.after, after)


@pytest.mark.parametrize("to", [1, 8, 15])
async def test_predecessor_overtakes(built: Mapping[State, Path], database: Path, to: int) -> None:
    """What the predecessor migrates after us is adopted, and the database arrives as any other.

    It was brought half way by us, then to its own latest by the predecessor.
    """
    shutil.copytree(built[State.V1], database)
    before = await read(database)
    async with manager(database) as migrations:
        await migrations.upgrade(to=to)
    db = await lancedb.connect_async(database)
    ran = await predecessor.migrate(db, predecessor.LATEST)
    db.close()
    async with manager(database) as migrations:
        report = await migrations.initialize()
        validation = await migrations.validate()
    after = await read(database)

    assert ("_all_tables", 19) in ran
    assert "_all_tables" in report.adopted
    assert {step.version for step in report.steps} <= {20, 21}
    assert validation.valid, validation.errors
    assert target(predecessor.DIMENSION) == application(after)
    assert_rows_kept(before, after)


# ---- fresh databases ----------------------------------------------------------------------------


def test_fresh_database_equals_target(fresh: Mapping[int, Fresh]) -> None:
    """A database made from nothing runs every migration, arrives at the target and is valid.

    Its text vectors have 1536 dimensions.
    """
    made = fresh[1536]

    assert target(1536) == application(made.content)
    assert len(made.report.applied) == len(load(MIGRATIONS, {}).all)
    assert made.validation.valid, made.validation.errors
    assert made.validation.warnings == ()


def test_dimension_is_a_parameter(fresh: Mapping[int, Fresh]) -> None:
    """`dimension` is that of the text vectors, given as the text of `-x` too; others stay."""
    assert target(8) == application(fresh[8].content)
    assert (
        "embedding:fixed_size_list<item: float>[8]!" in fresh[8].content.shapes["memos"]["fields"]
    )


def test_history_is_the_applications() -> None:
    """The versions are those of the application, and only three of them run code."""
    scripts = load(MIGRATIONS, {}).all

    versions = {script.version for script in scripts}
    assert versions == {1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 14, 15, 16, 19, 20, 21}
    assert {script.version for script in scripts if script.runs_code} == {4, 14, 21}
    assert {script.line for script in scripts} == {*KEYS, "indexes", "_all_tables"}


# ---- single versions ----------------------------------------------------------------------------


async def test_diary_categories_are_added_once(built: Mapping[State, Path], database: Path) -> None:
    """Run again over what it wrote, version 4 finds its categories: their ids are the users'."""
    shutil.copytree(built[State.V1], database)
    async with manager(database) as migrations:
        await migrations.initialize()
        first = diaries(await read(database))
        await migrations.stamp(to={"categories": 1})
        report = await migrations.initialize()
    again = diaries(await read(database))

    assert [(s.line, s.version) for s in report.applied] == [("categories", 4), ("categories", 21)]
    assert first == again


async def test_diary_ids_derive_from_users(built: Mapping[State, Path], tmp_path: Path) -> None:
    """Two copies of one database, migrated apart, have the same diary categories."""
    found = []
    for copy in ("one", "two"):
        shutil.copytree(built[State.V1], tmp_path / copy)
        async with manager(tmp_path / copy) as migrations:
            await migrations.upgrade(to=4)
        found.append(diaries(await read(tmp_path / copy)))

    assert found[0] == found[1]
    assert len(found[0]) == 6


async def damage(path: Path) -> None:
    """Does to tables what releases, people and crashes have done."""
    db = await lancedb.connect_async(path)
    await db.drop_table("tags")
    memos = await db.open_table("memos")
    await memos.drop_columns(["source", "tagIds"])
    await memos.add_columns({"tags": "NULL", "tagIds": "NULL"})
    await memos.add_columns(pa.field("draft", pa.string()))
    users = await db.open_table("users")
    await users.drop_columns(["deletedAt", "avatar"])
    await users.add_columns(pa.field("avatar", pa.int64()))
    await users.create_index("nickname", config=lancedb.index.BTree())
    await users.drop_index("email_idx")
    await users.create_index("phone", config=lancedb.index.Bitmap())
    categories = await db.open_table("categories")
    await categories.alter_columns({"path": "createdAt", "nullable": True})
    messages = await db.open_table("ai_messages")
    await messages.drop_columns(["sources"])
    attachments = await db.open_table("attachments")
    await attachments.drop_columns(["properties"])
    db.close()


async def test_version_21_makes_whole_what_it_finds(
    built: Mapping[State, Path], database: Path
) -> None:
    """Whatever a table lacks or has too much of, it ends as a fresh one, with its values.

    Missing tables; columns that are missing, superfluous, of Null or another type; nullability;
    indexes that are missing, superfluous or of another kind.
    """
    shutil.copytree(built[State.FRESH], database)
    await damage(database)
    before = await read(database)
    async with manager(database) as migrations:
        report = await migrations.initialize()
        validation = await migrations.validate()
    after = await read(database)

    assert {step.version for step in report.steps} == {21}
    assert target(predecessor.DIMENSION) == application(after)
    assert validation.valid, validation.errors
    kept = {
        name: rows.drop_columns(["avatar"]) if name == "users" else rows.drop_columns(["draft"])
        if name == "memos" else rows
        for name, rows in before.rows.items()
    }  # fmt: skip
    assert_rows_kept(Content(before.shapes, kept), after)
    assert set(after.rows["users"]["deletedAt"].to_pylist()) == {0}
    assert set(after.rows["attachments"]["properties"].to_pylist()) == {"{}"}


async def test_version_21_discards_no_value(built: Mapping[State, Path], database: Path) -> None:
    """A column that is not the application's but holds values stops its table, and is named.

    The table is left as it was, the others arrive, and it follows once the column is gone.
    """
    shutil.copytree(built[State.FRESH], database)
    db = await lancedb.connect_async(database)
    users = await db.open_table("users")
    await users.add_columns({"salary": "cast(7 as int)"})
    before = await read(database)

    async with manager(database) as migrations:
        with pytest.raises(MigrationFailedError, match="'salary'") as failure:
            await migrations.initialize()
        failed = await read(database)
        await users.checkout_latest()
        await users.drop_columns(["salary"])
        await migrations.initialize()
    db.close()

    report = failure.value.report
    assert [(s.line, s.version) for s in report.failed] == [("users", 21)]
    assert report.skipped == ()
    assert failed.shapes["users"] == before.shapes["users"]
    assert set(failed.rows["users"]["salary"].to_pylist()) == {7}
    assert target(predecessor.DIMENSION) == application(await read(database))


def test_each_shape_of_version_21_counts() -> None:
    """The shapes are part of the checksums, so that a later edit of one of them is noticed."""
    scripts = [s for s in load(MIGRATIONS, {}).all if s.version == 21]

    assert len({script.checksum for script in scripts}) == len(scripts) == len(KEYS)
    assert {op.describe() for s in scripts for op in s.operations} == {"run conform"}
