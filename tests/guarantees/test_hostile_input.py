"""Nonsense and malice: names, ledgers edited by hand, folders of anything, settings of any kind.

What is refused is refused in words, before anything is written; nothing else gets through. Texts
in filters are in `store.test_store`, damaged metadata tables in `ledger.test_bad_metadata`.
"""

from __future__ import annotations

import ast
import base64
import copy
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import lancedb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import aiomigrate
from aiomigrate import Context, Migration, op
from aiomigrate.errors import AiomigrateError, ConfigurationError
from aiomigrate.ledger.codec import parse_journal
from aiomigrate.ledger.history import fold, pending_cleanup, seen_epochs
from aiomigrate.ledger.records import Event
from aiomigrate.migration.loader import load
from aiomigrate.planning.destructive import kept_savepoints
from aiomigrate.planning.rollback import unattributed_tables
from aiomigrate.schema.state import TableState, decode, encode
from aiomigrate.settings import from_env, from_table, merge
from tests import scenario
from tests.tools import manager, rows_of

HOSTILE = [
    "a'b", 'a"b', "a b", "ä日本", "select", "x'; DROP TABLE memos; --", "a/b", "a\\b", "--", "a\nb",
    "%s{}", "../../etc", "n" * 10_000, "CaseD", "a,b", "a=b", "NULL", "1a", "*", "' OR '1'='1",
]  # fmt: skip
T = pa.schema([pa.field("id", pa.string()), pa.field("n", pa.int64())])
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def refusal(run: Callable[[], object]) -> str | None:
    """Returns what an error of ours says and advises, `None` if there was none."""
    try:
        run()
    except AiomigrateError as exc:
        return f"{exc.what} {exc.remedy}" if exc.remedy else ""
    return None


async def test_a_line_may_have_any_name(tmp_path: Path) -> None:
    """It is text in every filter on the ledger: each selects its own rows, and no others."""
    migrations = [
        Migration(line=line, version=version, touches=(table,), operations=[operation])
        for table, line in ((f"t{number}", line) for number, line in enumerate(HOSTILE))
        for version, operation in enumerate(
            (op.CreateTable(T, table=table), op.AddColumns({"m": pa.int64()}, table=table)), 1
        )
    ]
    async with manager(tmp_path / "db", migrations) as migrating:
        await migrating.upgrade()
        assert (await migrating.validate()).valid
        for number, line in enumerate(HOSTILE):
            if number % 2:
                await migrating.rollback({line: 1})
        found = (await migrating.get_status()).lines
        assert [found[line].current for line in HOSTILE] == [
            1 if number % 2 else 2 for number in range(len(HOSTILE))
        ]
        await migrating.upgrade()
        assert (await migrating.validate()).valid


async def test_a_column_may_have_any_name_that_lancedb_takes(tmp_path: Path) -> None:
    """Every kind of operation and write goes with it, and text that looks like SQL stays text."""
    names = [name for name in HOSTILE if "." not in name and name != "*"]
    text = "x'; DROP TABLE things; --"

    async def up(ctx: Context) -> None:
        table = ctx.table()
        await table.add([{"id": "a", "n": 1, **dict.fromkeys(names, "v")}])
        await table.update(dict.fromkeys(names, text), where="n = 1")
        await table.merge([{"id": "b", "n": 2, **dict.fromkeys(names, "z")}], on="id")

    def same(batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch

    plain = {name: f"plain_{number}" for number, name in enumerate(names)}
    steps: list[list[Any]] = [
        [op.CreateTable(T), op.AddColumns(dict.fromkeys(names, pa.string()))],
        [op.Run(up)],
        [op.Update({name: text}) for name in names],
        [op.SetNotNull(name) for name in names],
        [op.SetNullable(name) for name in names],
        [op.CreateIndex(name) for name in names[:6]],
        [op.Rebuild(same)],
        [op.DropIndex(name) for name in names[:6]],
        [op.AlterType(dict.fromkeys(names, pa.large_string()))],
        [op.RenameColumns(plain)],
        [op.RenameColumns({new: old for old, new in plain.items()})],
    ]
    migrations = [
        Migration(table="things", version=version, operations=operations)
        for version, operations in enumerate(steps, 1)
    ]
    async with manager(tmp_path / "db", migrations) as migrating:
        await migrating.upgrade()
        assert (await migrating.validate()).valid
        await migrating.rollback({"things": 1})
        await migrating.upgrade()
        assert (await migrating.validate()).valid

    assert await rows_of(tmp_path / "db") == [
        {"id": row, "n": n, **dict.fromkeys(names, text)} for row, n in (("a", 1), ("b", 2))
    ]


# ---- ledgers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """A journal as we write it, of a run with every kind of step, one of them undone."""

    async def run() -> pa.Table:
        path = tmp_path_factory.mktemp("journal") / "db"
        async with manager(path, scenario.migrations()) as migrating:
            await migrating.upgrade()
            await migrating.rollback({"log": 1})
        connection = await lancedb.connect_async(path)
        table = await connection.open_table("table_migrations_history")
        return await table.query().to_arrow()

    return anyio.run(run)


anything: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(relaxed, max_examples=250)
@given(data=st.data())
def test_a_journal_edited_by_hand_is_read_or_refused(
    journal: pa.Table, data: st.DataObject
) -> None:
    """Any value, kind, order or number in any event: what is read of it never fails otherwise."""
    rows = journal.to_pylist()
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.sampled_from(rows))
        what = data.draw(st.sampled_from(["json", "kind", "row", "place"]))
        if what == "json":
            column = data.draw(st.sampled_from(["detail", "tables"]))
            row[column] = json.dumps(replaced(data, json.loads(row[column] or "{}")))
        elif what == "kind":
            row["kind"] = data.draw(st.sampled_from([r["kind"] for r in rows] + ["of the future"]))
        elif what == "row":
            row["line"] = data.draw(st.none() | st.text(max_size=5))
            row["version"] = data.draw(st.none() | st.integers(-(2**31), 2**31 - 1))
        else:
            row["epoch"], row["seq"] = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 99))
    edited = pa.Table.from_pylist(rows, journal.schema)

    events: list[Event] = []
    if refusal(lambda: events.extend(parse_journal(edited, "journal"))):
        return
    folded = fold(events)
    seen_epochs(events, "run")
    kept_savepoints(folded)
    unattributed_tables(folded)
    for history in folded.lines.values():
        pending_cleanup(history, folded)
        if history.unfinished is not None:
            assert all(version >= 0 for version in history.unfinished.savepoints.values())


def replaced(data: st.DataObject, value: Any) -> Any:
    """Returns a JSON value with one of the values in it replaced by anything."""
    value = copy.deepcopy(value)
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 3)) == 0:
        return data.draw(anything)
    key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else
                                    range(len(value))))  # fmt: skip
    value[key] = replaced(data, value[key])
    return value


@relaxed
@given(st.binary(max_size=200))
@example(b"\xff\xff\xff\xff")
@example(b"\x00\x00\x00\x00[{}]")
@example(b"\x00\x00\x00\x00[1]")
def test_a_stored_state_is_read_or_refused(whole: bytes) -> None:
    """What the journal says a table was before: any bytes are no state, and no crash."""
    for text in (base64.b64encode(zlib.compress(whole)).decode(), base64.b64encode(whole).decode()):
        with pytest.raises(ValueError, match=r".*"):
            decode(text)


@pytest.mark.parametrize("columns", [1, 4, 400])
def test_a_stored_state_comes_back_short_or_long(columns: int) -> None:
    """A few columns are written as they are, many are compressed; both are read again."""
    fields = [pa.field(f"column {n} 名", pa.list_(pa.float32(), n + 1)) for n in range(columns)]
    state = TableState(pa.schema(fields), (op.Index("BTree", (fields[0].name,), "an index"),))

    text = encode(state)
    back = decode(text)

    assert text is not None
    assert base64.b64decode(text).startswith(b"\0") is (columns < 400)
    assert back is not None
    assert back.shape() == state.shape()
    assert back.schema.equals(state.schema)


async def test_nothing_in_a_database_is_executed(tmp_path: Path) -> None:
    """What looks like code in a ledger is text; the library neither evaluates nor unpickles."""
    path = tmp_path / "db"
    trap = f"__import__('pathlib').Path({str(tmp_path / 'trap')!r}).touch()"
    async with manager(path, scenario.few_migrations()) as migrating:
        await migrating.upgrade()
    connection = await lancedb.connect_async(path)
    table = await connection.open_table("table_migrations_history")
    await table.update({"description": trap, "source": trap, "error": trap, "run_id": trap})
    connection.close()
    async with manager(path, scenario.few_migrations()) as migrating:
        await migrating.validate()
        assert trap in str(await migrating.history())
        await migrating.rollback({"people": 2}, allow_destructive=True)
        await migrating.upgrade()

    assert not (tmp_path / "trap").exists()
    for source in Path(aiomigrate.__file__).parent.rglob("*.py"):
        called = {node.func.id for node in ast.walk(ast.parse(source.read_text()))
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
        assert called.isdisjoint({"eval", "exec", "compile"}), source
        assert "pickle" not in source.read_text(), source


# ---- scripts ------------------------------------------------------------------------------------

GOOD = """
import pyarrow as pa
from aiomigrate import Migration, op
m = Migration(table="t", version=1, operations=[op.CreateTable(pa.schema([("a", pa.int8())]))])
"""


def test_a_folder_may_be_a_link(tmp_path: Path) -> None:
    """A folder elsewhere, as deployments link the current release's; a file may be one too."""
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "shared.py").write_text(GOOD)
    (tmp_path / "release" / "001_t.py").symlink_to("shared.py")
    (tmp_path / "current").symlink_to("release")

    assert [s.key for s in load(tmp_path / "current", {}).all] == [("t", 1)]

    (tmp_path / "round").symlink_to("round")
    with pytest.raises(ConfigurationError, match=r"cannot be read|no migrations folder"):
        load(tmp_path / "round", {})


def test_a_script_that_prints_and_is_slow_leaves_json_alone(tmp_path: Path) -> None:
    """What it prints goes to stderr, so that `--json` stays what a program can read."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    (folder / "001_t.py").write_text(f"import time; print('hello'); time.sleep(0.3)\n{GOOD}")
    command = [
        sys.executable,
        "-m",
        "aiomigrate",
        "upgrade",
        "--uri",
        str(tmp_path / "db"),
        "--json",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert [step["line"] for step in json.loads(done.stdout)["steps"]] == ["t"]
    assert "hello" in done.stderr


NAMES = st.from_regex(r"[0-9mv]{0,3}[_a-z0-9]{0,6}(\.py)?", fullmatch=True)
TEXTS = st.sampled_from(
    [GOOD, "", "1/0", "raise SystemExit", "m = 1", "def (", "\x00", "import os"]
)


@settings(max_examples=40, deadline=None)
@given(files=st.dictionaries(NAMES, TEXTS | st.binary(max_size=20), max_size=5))
def test_any_folder_is_loaded_or_refused(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, str | bytes]
) -> None:
    """Files of any name and content: either scripts, or an error that names the file."""
    folder = tmp_path_factory.mktemp("folder")
    for name, content in files.items():
        assume(name not in ("", ".py"))
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            (folder / name).write_bytes(content)
    told = refusal(lambda: load(folder, {}))
    assert told is None or any(name in told for name in files)


# ---- settings -----------------------------------------------------------------------------------

KEYS = st.sampled_from(
    ["uri", "migrations", "ledger", "concurrency", "lease_ttl", "lease-ttl", "timeout", "on_ahead",
     "params", "storage_options", "nonsense", "on_unsafe_store"]
) | st.text(max_size=6)  # fmt: skip


@relaxed
@given(table=st.dictionaries(KEYS, anything, max_size=4))
def test_any_table_of_settings_is_read_or_refused(tmp_path: Path, table: dict[str, Any]) -> None:
    """Any TOML value under any key: settings, or an error that names the place and no secret."""
    told = refusal(lambda: merge([from_table(table, tmp_path / "pyproject.toml", env={})]))
    assert told is None or "pyproject.toml" in told


@relaxed
@given(env=st.dictionaries(KEYS.map(lambda k: f"AIOMIGRATE_{k.upper()}"), st.text(max_size=9),
                           max_size=3))  # fmt: skip
def test_any_environment_is_read_or_refused(env: dict[str, str]) -> None:
    """Any text in any variable of ours: settings, or an error that names the variable."""
    told = refusal(lambda: merge([from_env(env)]))
    assert told is None or any(name in told for name in env)
