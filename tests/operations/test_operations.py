"""Every operation goes through one harness, on real tables: predicted, applied, applied again."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import lancedb
import lancedb.index
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lancedb.embeddings import TextEmbeddingFunction, register

from aiomigrate import Context, Migration, MigrationFailedError, OnDestructive, op
from aiomigrate.errors import (
    AiomigrateError,
    InvalidMigrationError,
    OperationError,
)
from aiomigrate.execution.applier import witness_name
from aiomigrate.migration.model import Script
from aiomigrate.schema.index import KINDS
from aiomigrate.schema.state import WITNESS_PREFIX, Index, spell
from tests.tools import TABLE, found, make, manager, rows_of, tree

THINGS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("n", pa.int64()),
        pa.field("text", pa.string()),
        pa.field("tags", pa.list_(pa.string())),
    ]
)
ROWS = [
    {"id": "a", "n": 1, "text": "one", "tags": ["x"]},
    {"id": "b", "n": 2, "text": None, "tags": []},
    {"id": "c", "n": None, "text": "it's `3` 三", "tags": None},
]
FIELDS = {"id": "string!", "n": "int64", "text": "string", "tags": "list<item: string>"}
PLAIN = pa.schema(
    [pa.field("a", pa.string()), pa.field("b", pa.string()), pa.field("c", pa.string())]
)
PLAIN_ROWS = [{"a": "1", "b": "2", "c": "3"}]


def having(**columns: Any) -> list[dict[str, Any]]:
    """Returns the rows with columns set, each by a function of the row or one value."""
    return [
        {**row, **{c: v(row) if callable(v) else v for c, v in columns.items()}} for row in ROWS
    ]


def without(*columns: str) -> list[dict[str, Any]]:
    """Returns the rows without some columns."""
    return [{c: v for c, v in row.items() if c not in columns} for row in ROWS]


def upper_id(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Capitals in `id`."""
    return batch.set_column(0, "id", pc.utf8_upper(batch["id"]))


def upper(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Puts text in capitals."""
    position = batch.schema.get_field_index("text")
    return batch.set_column(position, "text", pc.utf8_upper(batch["text"]))


async def counted(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Returns how many tags each row has."""
    sizes = pc.fill_null(pc.list_value_length(batch["tags"]), 0)
    return pa.RecordBatch.from_arrays([batch["id"], sizes], names=["id", "size"])


def twice_but_b(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Doubles every row but b, which it drops."""
    rows = [row for row in batch.to_pylist() if row["id"] != "b" for _ in range(2)]
    return pa.RecordBatch.from_pylist(rows, schema=batch.schema)


async def lengths(batch: pa.RecordBatch) -> pa.Array:
    """Returns how long each text is, nothing for none."""
    return pc.utf8_length(batch["text"]).cast(pa.int64())


def embedded(texts: list[str]) -> list[list[float]]:
    """Returns a vector for each text, different ones for different texts."""
    return [[float(len(t)), float(sum(map(ord, t))), 1.0] for t in texts]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Operations, the table they are applied to, and what it must be afterwards."""

    name: str
    operations: Sequence[op.Operation]
    schema: pa.Schema | None = THINGS
    rows: Sequence[dict[str, Any]] = field(default_factory=lambda: ROWS)
    indexes: Sequence[tuple[str, str]] = ()
    fields: dict[str, str] | None = field(default_factory=lambda: FIELDS)
    expected: Sequence[dict[str, Any]] = field(default_factory=lambda: ROWS)
    indexed: Sequence[str] = ()
    commits: int | None = None


CASES = [
    Case(
        name="create table",
        operations=[op.CreateTable(THINGS)],
        schema=None,
        rows=(),
        expected=(),
        commits=1,
    ),
    Case(
        name="create table adopts an equal one, whatever the order of its fields",
        operations=[op.CreateTable(pa.schema(list(reversed(list(THINGS)))))],
        indexes=[("id", "BTree")],
        indexed=["BTree id"],
        commits=0,
    ),
    Case(
        name="add columns",
        operations=[op.AddColumns({"score": pa.float64(), "vector": pa.list_(pa.float32(), 2)})],
        fields={**FIELDS, "score": "double", "vector": "fixed_size_list<item: float>[2]"},
        expected=having(score=None, vector=None),
        commits=1,
    ),
    Case(
        name="add columns of which one is there",
        operations=[op.AddColumns({"n": pa.int64(), "score": pa.float64()})],
        fields={**FIELDS, "score": "double"},
        expected=having(score=None),
        commits=1,
    ),
    Case(
        name="add columns, fill them, forbid NULL",
        operations=[
            op.AddColumns({"kind": pa.string()}),
            op.Update({"kind": "note"}),
            op.SetNotNull("kind"),
        ],
        fields={**FIELDS, "kind": "string!"},
        expected=having(kind="note"),
        commits=3,
    ),
    Case(
        name="drop columns",
        operations=[op.DropColumns("n", "tags")],
        fields={"id": "string!", "text": "string"},
        expected=without("n", "tags"),
        commits=1,
    ),
    Case(
        name="drop columns that are gone",
        operations=[op.DropColumns("gone")],
        commits=0,
    ),
    Case(
        name="drop columns drops their index first",
        operations=[op.DropColumns("n")],
        indexes=[("n", "BTree"), ("id", "BTree")],
        indexed=["BTree id"],
        fields={k: v for k, v in FIELDS.items() if k != "n"},
        expected=without("n"),
        commits=2,
    ),
    Case(
        name="rename columns",
        operations=[op.RenameColumns({"text": "title", "n": "count"})],
        fields={"id": "string!", "count": "int64", "title": "string", "tags": FIELDS["tags"]},
        expected=[
            {"id": r["id"], "count": r["n"], "title": r["text"], "tags": r["tags"]} for r in ROWS
        ],
        indexes=[("n", "BTree")],
        indexed=["BTree count"],
        commits=1,
    ),
    Case(
        name="rename columns in a chain",
        operations=[op.RenameColumns({"b": "c", "c": "d"})],
        schema=PLAIN,
        rows=PLAIN_ROWS,
        fields={"a": "string", "c": "string", "d": "string"},
        expected=[{"a": "1", "c": "2", "d": "3"}],
        commits=1,
    ),
    Case(
        name="swap columns of one type",
        operations=[op.RenameColumns({"a": "b", "b": "a"})],
        schema=PLAIN,
        rows=PLAIN_ROWS,
        indexes=[("a", "BTree")],
        indexed=["BTree b"],
        fields={"a": "string", "b": "string", "c": "string"},
        expected=[{"a": "2", "b": "1", "c": "3"}],
        commits=2,
    ),
    Case(
        name="rotate columns twice in one migration",
        operations=[op.RenameColumns({"a": "b", "b": "c", "c": "a"})] * 2,
        schema=PLAIN,
        rows=PLAIN_ROWS,
        fields={"a": "string", "b": "string", "c": "string"},
        expected=[{"a": "2", "b": "3", "c": "1"}],
    ),
    Case(
        name="swap columns of two types",
        operations=[op.RenameColumns({"n": "text", "text": "n"})],
        fields={**FIELDS, "n": "string", "text": "int64"},
        expected=having(n=lambda r: r["text"], text=lambda r: r["n"]),
    ),
    Case(
        name="allow NULL",
        operations=[op.SetNullable("id")],
        fields={**FIELDS, "id": "string"},
        commits=1,
    ),
    Case(name="allow NULL where it is allowed", operations=[op.SetNullable("n")], commits=0),
    Case(
        name="forbid NULL",
        operations=[op.SetNotNull("id", "n")],
        rows=ROWS[:2],
        expected=ROWS[:2],
        fields={**FIELDS, "n": "int64!"},
        commits=1,
    ),
    Case(
        name="update with literals",
        operations=[op.Update({"n": 7, "text": "it's `3` 三", "id": "z"}, where="n = 2")],
        expected=[ROWS[0], {**ROWS[1], "n": 7, "text": "it's `3` 三", "id": "z"}, ROWS[2]],
        commits=1,
    ),
    Case(
        name="update with literals that no row takes",
        operations=[op.Update({"n": 7}, where="n = 99"), op.Update({"n": 7}, where="n < -9")],
        commits=0,
    ),
    Case(
        name="update with NULL, a boolean and a fraction",
        operations=[op.Update({"yes": True, "part": -0.5, "text": None})],
        schema=pa.schema([*THINGS, pa.field("yes", pa.bool_()), pa.field("part", pa.float64())]),
        rows=having(yes=False, part=1.0),
        fields={**FIELDS, "yes": "bool", "part": "double"},
        expected=having(yes=True, part=-0.5, text=None),
        commits=1,
    ),
    Case(
        name="update with SQL takes effect once, beside a literal",
        operations=[op.Update({"text": "it's"}, sql={"n": "n + 1"}, where="n > 1 OR n = 1")],
        expected=[
            {**ROWS[0], "n": 2, "text": "it's"},
            {**ROWS[1], "n": 3, "text": "it's"},
            ROWS[2],
        ],
        commits=2,
    ),
    Case(
        name="update with SQL twice in one migration",
        operations=[op.Update(sql={"n": "n * 10"}), op.Update(sql={"n": "n + 1"})],
        expected=having(n=lambda r: None if r["n"] is None else r["n"] * 10 + 1),
    ),
    Case(
        name="update that matches nothing",
        operations=[op.Update(sql={"n": "n + 1"}, where="n > 100")],
    ),
    Case(
        name="index",
        operations=[
            op.CreateIndex("id"),
            op.CreateIndex("n", kind="Bitmap"),
            op.CreateIndex("tags", kind="LabelList"),
            op.CreateIndex("text", kind="FTS", options={"with_position": True}),
        ],
        indexed=["BTree id", "Bitmap n", "FTS text", "LabelList tags"],
        commits=4,
    ),
    Case(
        name="index that is there",
        operations=[op.CreateIndex("id")],
        indexes=[("id", "BTree")],
        indexed=["BTree id"],
        commits=0,
    ),
    Case(
        name="an index of another kind stays beside the one that is there",
        operations=[op.CreateIndex("n", kind="Bitmap")],
        indexes=[("n", "BTree")],
        indexed=["BTree n", "Bitmap n"],
        commits=1,
    ),
    Case(
        name="replace an index by one of another kind",
        operations=[op.DropIndex("n"), op.CreateIndex("n", kind="Bitmap")],
        indexes=[("n", "BTree")],
        indexed=["Bitmap n"],
        commits=2,
    ),
    Case(
        name="drop every index of a column",
        operations=[op.DropIndex("text")],
        indexes=[("text", "FTS"), ("text", "Bitmap"), ("text", "BTree"), ("id", "BTree")],
        indexed=["BTree id"],
        commits=3,
    ),
    Case(
        name="index vectors",
        operations=[
            op.CreateIndex("v", kind="IvfFlat"),
            op.CreateIndex("v", kind="HnswSq", options={"distance_type": "cosine"}),
        ],
        schema=pa.schema([pa.field("v", pa.list_(pa.float32(), 4))]),
        rows=[{"v": [float(n), 1.0, 2.0, 3.0]} for n in range(300)],
        fields={"v": "fixed_size_list<item: float>[4]"},
        expected=[{"v": [float(n), 1.0, 2.0, 3.0]} for n in range(300)],
        indexed=["IvfHnswSq v"],
        commits=2,
    ),
    Case(
        name="index a vector whose name an index of another column has",
        operations=[
            op.RenameColumns({"v": "w"}),
            op.AddColumns({"v": pa.list_(pa.float32(), 4)}),
            op.CreateIndex("v", kind="IvfFlat"),
            op.CreateIndex("v", kind="HnswFlat"),
        ],
        schema=pa.schema([pa.field("v", pa.list_(pa.float32(), 4))]),
        rows=(),
        indexes=[("v", "IvfFlat")],
        fields=dict.fromkeys("vw", "fixed_size_list<item: float>[4]"),
        expected=(),
        indexed=["IvfFlat w", "IvfHnswFlat v"],
    ),
    Case(
        name="index a renamed column, which keeps the one it has",
        operations=[op.RenameColumns({"n": "m"}), op.CreateIndex("m", kind="Bitmap")],
        indexes=[("n", "BTree")],
        indexed=["BTree m", "Bitmap m"],
        fields={"id": "string!", "m": "int64", "text": "string", "tags": FIELDS["tags"]},
        expected=[
            {"id": r["id"], "m": r["n"], "text": r["text"], "tags": r["tags"]} for r in ROWS
        ],
    ),
    Case(
        name="drop index",
        operations=[op.DropIndex("id")],
        indexes=[("id", "BTree"), ("n", "Bitmap")],
        indexed=["Bitmap n"],
        commits=1,
    ),
    Case(name="drop index that is gone", operations=[op.DropIndex("n")], commits=0),
    Case(
        name="columns with odd names",
        operations=[
            op.AddColumns({"my col": pa.int64(), "ü": pa.int64(), "select": pa.int64()}),
            op.Update({"my col": 1, "ü": 2, "select": 3}),
            op.SetNotNull("my col", "ü", "select"),
            op.RenameColumns({"my col": "ü", "ü": "isOK"}),
            op.DropColumns("select"),
        ],
        fields={**FIELDS, "ü": "int64!", "isOK": "int64!"},
        expected=having(ü=1, isOK=2),
    ),
    Case(
        name="index columns with odd names",
        operations=[
            op.CreateIndex("my col"),
            op.RenameColumns({"my col": "a-b"}),
            op.CreateIndex("a-b", kind="Bitmap"),
            op.CreateIndex("ü"),
            op.DropIndex("ü"),
            op.AddColumns({"x": pa.int8()}),
        ],
        schema=pa.schema([("my col", pa.int64()), ("ü", pa.string())]),
        rows=(),
        fields={"a-b": "int64", "ü": "string", "x": "int8"},
        expected=(),
        indexed=["BTree a-b", "Bitmap a-b"],
    ),
    Case(
        name="an index on a field of a struct follows the struct",
        operations=[op.AddColumns({"x": pa.int8()}), op.RenameColumns({"meta": "facts"})],
        schema=pa.schema([("id", pa.string()), ("meta", pa.struct([("lang", pa.string())]))]),
        rows=[{"id": "a", "meta": {"lang": "de"}}],
        indexes=[("meta.lang", "BTree")],
        fields={"id": "string", "facts": "struct<lang: string>", "x": "int8"},
        expected=[{"id": "a", "facts": {"lang": "de"}, "x": None}],
        indexed=["BTree facts.lang"],
        commits=2,
    ),
    Case(
        name="drop a struct drops the index on its field first",
        operations=[op.DropColumns("meta")],
        schema=pa.schema([("id", pa.string()), ("meta", pa.struct([("lang", pa.string())]))]),
        rows=[{"id": "a", "meta": {"lang": "de"}}],
        indexes=[("meta.lang", "BTree")],
        fields={"id": "string"},
        expected=[{"id": "a"}],
        commits=2,
    ),
    *(
        Case(name=f"{type(each).__name__} skips a missing table", operations=[each],
             schema=None, rows=(), fields=None, expected=(), commits=0)
        for each in (
            op.AddColumns({"a": pa.int64()}, when_missing=op.Missing.SKIP),
            op.DropColumns("a", when_missing=op.Missing.SKIP),
            op.RenameColumns({"a": "b"}, when_missing=op.Missing.SKIP),
            op.RenameColumns({"a": "b", "b": "a"}, when_missing=op.Missing.SKIP),
            op.SetNullable("a", when_missing=op.Missing.SKIP),
            op.SetNotNull("a", when_missing=op.Missing.SKIP),
            op.Update({"a": 1}, when_missing=op.Missing.SKIP),
            op.Update(sql={"a": "a + 1"}, when_missing=op.Missing.SKIP),
            op.CreateIndex("a", when_missing=op.Missing.SKIP),
            op.DropIndex("a", when_missing=op.Missing.SKIP),
        )
    ),
    Case(
        name="create table with rows",
        operations=[op.CreateTable(THINGS, rows=ROWS)],
        schema=None,
        rows=[],
        commits=1,
    ),
    Case(
        name="create table with rows adopts an equal one as it is",
        operations=[op.CreateTable(THINGS, rows=[{"id": "new"}])],
        commits=0,
    ),
    Case(
        name="add columns filled by literals and SQL",
        operations=[
            op.AddColumns(
                {"state": pa.string(), "twice": pa.int64(), "bare": pa.bool_()},
                values={"state": "open"},
                sql={"twice": "n * 2"},
            )
        ],
        fields={**FIELDS, "state": "string", "twice": "int64", "bare": "bool"},
        expected=having(state="open", twice=lambda r: r["n"] and r["n"] * 2, bare=None),
    ),
    Case(
        name="add a column with metadata",
        operations=[op.AddColumns({"v": pa.field("v", pa.int8(), metadata={"unit": "cm"})})],
        fields={**FIELDS, "v": "int8"},
        expected=having(v=None),
        commits=1,
    ),
    Case(
        name="forbid NULL and fill",
        operations=[op.SetNotNull("n", "text", fill={"n": 0, "text": "-"})],
        fields={**FIELDS, "n": "int64!", "text": "string!"},
        expected=having(n=lambda r: r["n"] or 0, text=lambda r: r["text"] or "-"),
    ),
    Case(
        name="delete",
        operations=[op.Delete("n >= 2")],
        expected=[ROWS[0], ROWS[2]],
        commits=1,
    ),
    Case(name="delete that matches nothing", operations=[op.Delete("n > 99")], commits=0),
    Case(
        name="change a type as LanceDB casts it, under an index",
        operations=[op.AlterType({"n": pa.int32()})],
        indexes=[("n", "BTree"), ("id", "BTree")],
        fields={**FIELDS, "n": "int32"},
        indexed=["BTree id", "BTree n"],
    ),
    Case(
        name="change a type that LanceDB does not cast, under an index",
        operations=[op.AlterType({"n": pa.string()})],
        indexes=[("n", "Bitmap")],
        fields={**FIELDS, "n": "string"},
        expected=having(n=lambda r: None if r["n"] is None else str(r["n"])),
        indexed=["Bitmap n"],
    ),
    Case(
        name="change two types, one NOT NULL",
        operations=[
            op.SetNotNull("n", fill={"n": 3}),
            op.AlterType({"n": pa.float64(), "tags": pa.large_list(pa.string())}),
        ],
        fields={**FIELDS, "n": "double!", "tags": "large_list<item: string>"},
        expected=having(n=lambda r: float(r["n"] or 3)),
    ),
    Case(
        name="change a type to what it is",
        operations=[op.AlterType({"n": pa.int64()})],
        commits=0,
    ),
    Case(
        name="rebuild by a function, with indexes kept where the type is",
        operations=[op.Rebuild(upper)],
        indexes=[("id", "BTree"), ("n", "BTree")],
        expected=having(text=lambda r: r["text"] and r["text"].upper()),
        indexed=["BTree id", "BTree n"],
    ),
    Case(
        name="rebuild to another schema",
        operations=[
            op.Rebuild(
                counted, schema=pa.schema([pa.field("id", pa.string()), ("size", pa.int32())])
            )
        ],
        indexes=[("id", "BTree"), ("n", "BTree")],
        fields={"id": "string", "size": "int32"},
        expected=[{"id": r["id"], "size": len(r["tags"] or [])} for r in ROWS],
        indexed=["BTree id"],
    ),
    Case(
        name="rebuild in small batches that drop and multiply rows",
        operations=[op.Rebuild(twice_but_b, batch_rows=1)],
        expected=[r for r in ROWS if r["id"] != "b" for _ in range(2)],
    ),
    Case(
        name="add a column and backfill it",
        operations=[
            op.AddColumns({"size": pa.int64()}),
            op.Backfill(
                "size", lengths, key="id", source="text", pace=op.Pace(batch_rows=1, chunk_rows=2)
            ),
        ],
        fields={**FIELDS, "size": "int64"},
        expected=having(size=lambda r: None if r["text"] is None else len(r["text"])),
    ),
    Case(
        name="backfill what is NULL, by a key with an index",
        operations=[op.Backfill("n", lengths, key="id", source=["text"])],
        indexes=[("id", "BTree")],
        expected=having(n=lambda r: r["n"] or len(r["text"])),
        indexed=["BTree id"],
    ),
    Case(
        name="re-embed",
        operations=[
            op.Reembed(
                source="text", function=embedded, dimension=3, model="m@1", key="id",
                gate=op.Gate(neighbours=1, min_overlap=0, max_duplicates=1),
                pace=op.Pace(batch_rows=1, chunk_rows=1),
            ),
        ],
        schema=pa.schema([THINGS.field("id"), THINGS.field("text"),
                          pa.field("vector", pa.list_(pa.float32(), 2))]),
        rows=[{"id": r["id"], "text": r["text"], "vector": [1.0, n]} for n, r in enumerate(ROWS)],
        fields={
            "id": "string!", "text": "string",
            "vector": "fixed_size_list<item: float>[3]",
            "vector_old": "fixed_size_list<item: float>[2]",
        },
        expected=[
            {"id": r["id"], "text": r["text"], "vector_old": [1.0, n],
             "vector": r["text"] and embedded([r["text"]])[0]} for n, r in enumerate(ROWS)
        ],
    ),
    Case(
        name="fields of a struct by path",
        operations=[
            op.AddColumns({"st.new": pa.int64()}),
            op.RenameColumns({"st.a": "aa"}),
            op.DropColumns("st.b"),
            op.Rebuild(),
            op.CreateIndex("st.new"),
            op.Delete("st.new = 1"),
        ],
        schema=pa.schema([pa.field("st", pa.struct([("a", pa.int32()), ("b", pa.string())]))]),
        rows=[{"st": {"a": 1, "b": "x"}}, {"st": None}],
        fields={"st": "struct<aa: int32, new: int64>"},
        expected=[{"st": {"aa": 1, "new": None}}, {"st": None}],
        indexed=["BTree st.new"],
    ),
    Case(
        name="a field of a struct that has an index",
        operations=[op.CreateIndex("st.a"),
            op.RenameColumns({"st.a": "aa"}),
            op.Rebuild(
                schema=pa.schema(
                    [("st", pa.struct([("b", pa.string()), ("aa", pa.int32()), ("c", pa.int64())]))]
                )
            ),
        ],
        schema=pa.schema([pa.field("st", pa.struct([("a", pa.int32()), ("b", pa.string())]))]),
        rows=[{"st": {"a": 1, "b": "x"}}],
        fields={"st": "struct<b: string, aa: int32, c: int64>"},
        expected=[{"st": {"b": "x", "aa": 1, "c": None}}],
        indexed=["BTree st.aa"],
    ),
    Case(
        name="metadata of a column",
        operations=[op.SetMetadata("n", {"unit": "cm"})],
        commits=1,
    ),
    Case(
        name="metadata of a table",
        operations=[
            op.SetTableMetadata({"owner": "search", "kept": "yes"}),
            op.SetTableMetadata({"owner": None, "team": "ranking"}),
        ],
        commits=2,
    ),
    Case(
        name="build an index anew with other options",
        operations=[
            op.CreateIndex("text", kind="FTS", options={"stem": False}),
            op.CreateIndex("text", kind="FTS", options={"stem": True}),
            op.CreateIndex("text", kind="FTS", options={"language": "English"}),
        ],
        indexed=["FTS text"],
        commits=2,
    ),
    Case(
        name="drop one of two indexes of a column",
        operations=[op.DropIndex("id", kind="Bitmap")],
        indexes=[("id", "BTree")],
        indexed=["BTree id"],
        commits=0,
    ),
    Case(name="optimize", operations=[op.Optimize(cleanup_older_than_s=7200)]),
    Case(
        name="update in batches",
        operations=[op.Update(sql={"n": "n + 1"}, batch_rows=2)],
        expected=having(n=lambda r: r["n"] and r["n"] + 1),
    ),
    Case(
        name="drop the table",
        operations=[op.DropTable()],
        fields=None,
    ),
    Case(name="drop a table that is gone", operations=[op.DropTable()], schema=None, fields=None),
]  # fmt: skip


def ordered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows in the order of `rows_of`."""
    return sorted(rows, key=lambda row: sorted((name, repr(value)) for name, value in row.items()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_an_operation_does_once_what_it_predicts(case: Case, database: Path) -> None:
    """The table is as the case says and as `evolve` predicted, and a second run writes nothing.

    No column of ours remains, and an effect that shows is seen as done by a later migration.
    """
    if case.schema is not None:
        await make(database, case.schema, case.rows, case.indexes)
    predicted, _ = await found(database)
    for operation in case.operations:
        if predicted is not None or operation.when_missing is op.Missing.FAIL:
            predicted = operation.on(TABLE).evolve(predicted)

    async with manager(
        database,
        [Migration(table=TABLE, version=1, operations=case.operations)],
        on_destructive=OnDestructive.ALLOW,
    ) as migrations:
        first = await migrations.upgrade()
        after = tree(database)
        second = await migrations.upgrade()

    (step,) = first.applied
    assert second.steps == ()
    assert after == tree(database)
    if case.commits is not None:
        assert case.commits == step.commits
    state, table_version = await found(database)
    if case.fields is None:
        assert state is None
        assert predicted is None
        return
    assert state is not None
    assert predicted is not None
    shape = {"fields": dict(sorted(case.fields.items())), "indexes": sorted(case.indexed)}
    assert shape == state.shape()
    assert shape == predicted.shape()
    assert state.witnesses() == []
    assert ordered(case.expected) == await rows_of(database)

    if len(case.operations) == 1 and all(o.shows for o in case.operations[0].expand()):
        # The same again in a later migration: looked at, found done, not committed.
        assert case.operations[0].on(TABLE).done(state, "unused")
        again = [Migration(table=TABLE, version=v, operations=case.operations) for v in (1, 2)]
        async with manager(database, again) as migrations:
            (step,) = (await migrations.upgrade()).applied
        assert (step.commits, step.version) == (0, 2)
        assert table_version == (await found(database))[1]


NULLED = pa.schema([pa.field("a", pa.int64(), nullable=False), pa.field("b", pa.string())])

REFUSALS: dict[str, tuple[op.Operation, pa.Schema | None, str]] = {
    "create: another type": (
        op.CreateTable(pa.schema([pa.field("a", pa.int64(), nullable=False),
                                  pa.field("b", pa.int32()), pa.field("c", pa.int8())])),
        NULLED,
        r"b: is string, not int32; c: is absent, not int8.*stamp",
    ),
    "create: another nullability": (
        op.CreateTable(pa.schema([("a", pa.int64()), ("b", pa.string())])),
        NULLED,
        r"a: is int64!, not int64",
    ),
    "create: a field too many": (
        op.CreateTable(pa.schema([pa.field("a", pa.int64(), nullable=False)])),
        NULLED,
        r"b: is string, not absent",
    ),
    "add: another type": (
        op.AddColumns({"b": pa.int64()}), NULLED, r"'b' exists as string, not int64",
    ),
    "drop: all": (op.DropColumns("a", "b"), NULLED, r"no column would be left"),
    "rename: no such column": (op.RenameColumns({"x": "y"}), NULLED, r"no column 'x'.*a, b"),
    "rename: taken": (op.RenameColumns({"a": "b"}), NULLED, r"'b' exists already"),
    "swap: no such column": (op.RenameColumns({"a": "x", "x": "a"}), NULLED, r"no column 'x'"),
    "nullable: no such column": (op.SetNullable("x"), NULLED, r"no column 'x'"),
    "not null: no such column": (op.SetNotNull("a", "x"), NULLED, r"no column 'x'"),
    "update: no such column": (op.Update({"x": 1}), NULLED, r"no column 'x'"),
    "update: no such column in SQL": (op.Update(sql={"x": "1"}), NULLED, r"no column 'x'"),
    "update: NULL into NOT NULL": (op.Update({"a": None}), NULLED, r"'a' is NOT NULL"),
    "alter: no such column": (op.AlterType({"x": pa.int8()}), NULLED, r"no column 'x'"),
    "add: into what is no struct": (
        op.AddColumns({"a.x": pa.int8()}), NULLED, r"'a' is int64!, not a struct",
    ),
    "add: into nothing": (
        op.AddColumns({"x.y": pa.int8()}), NULLED, r"no column 'x'.*columns: a, b",
    ),
    "metadata: no such column": (op.SetMetadata("x", {"a": "b"}), NULLED, r"no column 'x'"),
    "rebuild: a new column NOT NULL": (
        op.Rebuild(schema=pa.schema([pa.field("z", pa.int8(), nullable=False)])),
        NULLED,
        r"'z' is new and NOT NULL",
    ),
    "backfill: no such column": (
        op.Backfill("x", lengths, key="a"), NULLED, r"no column 'x'",
    ),
    "backfill: no such source": (
        op.Backfill("b", lengths, key="a", source="x"), NULLED, r"no column 'x'",
    ),
    "backfill: no such key": (op.Backfill("b", lengths, key="x"), NULLED, r"no column 'x'"),
    "backfill: a NOT NULL column": (op.Backfill("a", lengths, key="b"), NULLED, r"'a' is NOT NULL"),
    "copy: no such table": (op.CopyInto("gone", key="a"), NULLED, r"no table 'gone'"),
    "copy: no such key": (op.CopyInto("other", key="x"), NULLED, r"no column 'x'"),
    "copy: no such key there": (
        op.CopyInto("other", key="a"),
        NULLED,
        r"no column 'a' in table 'other'.*columns: x",
    ),
    "copy: by no column": (
        op.CopyInto("other", key="x", where="gone = 1"),
        pa.schema([pa.field("x", pa.int64()), ("a", pa.int64()), ("b", pa.string())]),
        r"No field named gone.*columns of 'other'",
    ),
    "delete: by no column": (
        op.Delete("gone = 1"), NULLED, r"No field named gone.*At that point, .* are a",
    ),
    "delete: no SQL": (op.Delete("a >>> 1"), NULLED, r"parser error: Expected"),
    "delete: no condition": (op.Delete("a"), NULLED, r"does not return a boolean"),
    "delete: another type": (op.Delete("a = 'x'"), NULLED, r"could not convert"),
    "update: no column in SQL": (op.Update(sql={"b": "gone"}), NULLED, r"No field named gone"),
    "update: a name as text": (
        op.Update(sql={"a": 'CAST("a" AS BIGINT)'}),
        NULLED,
        r"Write `a` for a column, or 'a' for a text",
    ),
    "update: no function": (op.Update(sql={"b": "shout(b)"}), NULLED, r"Invalid function 'shout'"),
    "update: what LanceDB has not": (
        op.Update(sql={"b": "CASE WHEN a = 1 THEN 'x' ELSE 'y' END"}),
        NULLED,
        r"not supported SQL",
    ),
    "update: another type": (op.Update({"a": "x"}), NULLED, r"Cannot cast string 'x'"),
    "update: a fraction": (op.Update({"a": 1.5}), NULLED, r"1.5 does not fit column 'a', int64"),
    "update: where by no column": (
        op.Update({"b": "x"}, where="gone = 1"), NULLED, r"No field named gone"
    ),
    "add: filled by no column": (
        op.AddColumns({"z": pa.int64()}, sql={"z": "gone"}), NULLED, r"No field named gone"
    ),
    "add: filled by another type": (
        op.AddColumns({"z": pa.int64()}, values={"z": "x"}), NULLED, r"Cannot cast string 'x'"
    ),
    "copy: itself": (op.CopyInto(TABLE, key="a"), NULLED, r"the table itself"),
    "rename a table: to its name": (op.RenameTable(TABLE), NULLED, r"has that name already"),
    "rename table: no table": (op.RenameTable("z"), None, r"does not exist"),
    "index: no such column": (op.CreateIndex("x"), NULLED, r"no column 'x'.*a, b"),
    "index: no such kind on the type": (
        op.CreateIndex("b", kind="LabelList"), NULLED, r"no LabelList index on string.*FTS",
    ),
    **{
        f"{type(each).__name__}: no table": (each, None, r"table does not exist.*when_missing")
        for each in (
            op.AddColumns({"a": pa.int64()}), op.DropColumns("a"), op.RenameColumns({"a": "b"}),
            op.SetNullable("a"), op.SetNotNull("a"), op.Update({"a": 1}), op.CreateIndex("a"),
            op.DropIndex("a"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
async def test_an_operation_that_does_not_fit_is_refused_before_anything_is_written(
    case: tuple[op.Operation, pa.Schema | None, str], database: Path
) -> None:
    """The error names the operation, the table, the version and what is wrong; no byte changed."""
    operation, schema, message = case
    other = pa.schema([pa.field("x", pa.int64())])
    await make(database, other, table="other")
    if schema is not None:
        await make(database, schema, [{"a": 1, "b": "x"}])
    before = tree(database)
    wrong = [
        Migration(table="fine", version=1, operations=[op.CreateTable(other)]),
        Migration(table=TABLE, version=3, operations=[operation]),
    ]

    async with manager(database, wrong) as migrations:
        for run in (migrations.plan, migrations.upgrade):
            with pytest.raises(OperationError, match=message) as caught:
                await run()
            assert (caught.value.line, caught.value.version) == (TABLE, 3)
            assert repr(TABLE) in caught.value.what

    assert before == tree(database)


async def test_a_later_operation_is_checked_against_what_earlier_ones_predict(
    database: Path,
) -> None:
    """A mistake in the last migration of many is told before the first one has run."""
    await make(database, NULLED)
    before = tree(database)
    steps = [
        Migration(table=TABLE, version=1, operations=[op.DropColumns("b")]),
        Migration(table=TABLE, version=2, operations=[op.CreateIndex("b")]),
    ]

    async with manager(database, steps) as migrations:
        with pytest.raises(OperationError, match="no column 'b'"):
            await migrations.upgrade()

    assert before == tree(database)


def with_another(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Adds a column without saying so in the schema."""
    return batch.append_column("other", pa.nulls(len(batch), pa.string()))


def only_ids(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Forgets the other columns."""
    return batch.select(["id"])


def a_column_twice(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Names two columns alike."""
    return pa.RecordBatch.from_arrays([batch["id"], batch["n"], batch["n"]], ["id", "n", "n"])


def as_table(batch: pa.RecordBatch) -> pa.Table:
    """Returns something else."""
    return pa.Table.from_batches([batch])


def in_lists(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Puts values of a wrong type."""
    return batch.set_column(0, "id", pa.array([[text] for text in batch["id"].to_pylist()]))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (with_another, "with_another returned a column 'other' that the new table does not have"),
        (only_ids, "only_ids left out column 'n', which would lose its values"),
        (a_column_twice, "a_column_twice returned two columns 'n'"),
        (as_table, "as_table returned Table, not a RecordBatch"),
        (in_lists, "column 'id', list<item: string>, does not fit string"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("how", ["rebuild", "copy"])
async def test_a_function_that_would_lose_values_by_mistake_fails(
    database: Path, function: Any, message: str, how: str
) -> None:
    """What it returned wrongly is named, with its operation, and the tables are as before."""
    if (function, how) == (only_ids, "copy"):
        return  # into another table, where what is missing is NULL
    schema = pa.schema([pa.field("id", pa.string()), pa.field("n", pa.int64())])
    rows = [{"id": "a", "n": 1}, {"id": "b", "n": 2}]
    await make(database, schema, rows)
    await make(database, schema, table="other")
    change = {
        "rebuild": op.Rebuild(function),
        "copy": op.CopyInto(TABLE, key="id", function=function, table="other"),
    }[how]
    step = Migration(table=TABLE, version=1, operations=[change], touches=(TABLE, "other"))
    async with manager(database, [step]) as migrations:
        with pytest.raises(MigrationFailedError, match=re.escape(message)) as caught:
            await migrations.upgrade()

    assert change.describe() in str(caught.value)
    assert await rows_of(database) == rows
    assert await rows_of(database, "other") == []


@pytest.mark.parametrize("function", [None, upper_id], ids=["plain", "function"])
@pytest.mark.parametrize("batch_rows", [1, 100])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a"], "0 rows have no 'id', 1 have that of another row"),
        (["a", None, None], "2 rows have no 'id', 0 have that of another row"),
    ],
    ids=["double", "missing"],
)
async def test_rows_that_a_key_does_not_tell_apart_are_not_copied(
    database: Path, ids: list[str | None], message: str, batch_rows: int, function: Any
) -> None:
    """Some would be passed over, and a `Delete` after it would lose them: it is refused."""
    schema = pa.schema([pa.field("id", pa.string()), pa.field("n", pa.int64())])
    await make(database, schema, [{"id": key, "n": n} for n, key in enumerate(ids)], table="other")
    await make(database, schema, [{"id": "z", "n": 9}])
    copy = op.CopyInto("other", key="id", batch_rows=batch_rows, function=function)
    steps = [Migration(table=TABLE, version=1, operations=[copy], touches=(TABLE, "other"))]
    async with manager(database, steps) as migrations:
        with pytest.raises(MigrationFailedError, match="identifies a row") as caught:
            await migrations.upgrade()

    if function is None or batch_rows > 1:
        assert message in str(caught.value)
    assert await rows_of(database) == [{"id": "z", "n": 9}]


async def test_forbidding_null_where_there_is_one_fails_and_leaves_the_table(
    database: Path,
) -> None:
    """The error counts the rows and says how to fill them; operations before it are undone."""
    await make(database, THINGS, ROWS)
    state, _ = await found(database)
    assert state is not None
    steps = [
        Migration(
            table=TABLE,
            version=1,
            operations=[op.AddColumns({"x": pa.int8()}), op.SetNotNull("id", "n")],
        )
    ]

    async with manager(database, steps) as migrations:
        with pytest.raises(MigrationFailedError, match=r"1 rows have NULL in 'n'") as caught:
            await migrations.upgrade()

    assert "op.Update" in caught.value.remedy
    after, _ = await found(database)
    assert after is not None
    assert state.shape() == after.shape()
    assert ordered(ROWS) == await rows_of(database)


async def test_an_update_interrupted_before_it_was_recorded_takes_effect_once(
    database: Path,
) -> None:
    """What a crash leaves after the commit of an SQL update is recognised by the witness."""
    await make(database, THINGS, ROWS)
    update = op.Update(sql={"n": "n + 1"})
    steps = [
        Migration(table=TABLE, version=1, operations=[update, op.AddColumns({"x": pa.int8()})])
    ]
    async with manager(database, steps) as migrations:
        (script,) = (await migrations.scripts()).all
        connection = await lancedb.connect_async(database)
        table = await connection.open_table(TABLE)
        # As the operation leaves it, had it committed and the process died.
        witness = witness_name(script, script.operations[0], ())
        await table.add_columns([pa.field(witness, pa.bool_())])
        await table.update(updates_sql={"n": "n + 1", witness: "true"})

        await migrations.upgrade()

    expected = having(n=lambda r: None if r["n"] is None else r["n"] + 1, x=None)
    assert ordered(expected) == await rows_of(database)


async def test_a_create_that_finds_the_remains_of_a_killed_one_succeeds(database: Path) -> None:
    """A table that is listed but cannot be opened is no table."""
    (database / f"{TABLE}.lance").mkdir(parents=True)
    steps = [Migration(table=TABLE, version=1, operations=[op.CreateTable(THINGS)])]

    async with manager(database, steps) as migrations:
        await migrations.upgrade()

    state, _ = await found(database)
    assert state is not None
    assert state.same(op.TableState(THINGS))


async def test_dropping_all_columns_that_hold_data_is_undone(database: Path) -> None:
    """LanceDB commits it and cannot read the table afterwards; nothing is lost."""
    await make(database, PLAIN, PLAIN_ROWS)
    steps = [
        Migration(table=TABLE, version=1, operations=[op.AddColumns({"x": pa.int8()})]),
        Migration(table=TABLE, version=2, operations=[op.DropColumns("a", "b", "c")]),
    ]

    async with manager(database, steps) as migrations:
        with pytest.raises(MigrationFailedError, match=f"{TABLE} 2 failed") as caught:
            await migrations.upgrade()

    assert [step.version for step in caught.value.report.applied] == [1]
    assert await rows_of(database) == [{**PLAIN_ROWS[0], "x": None}]


async def test_an_option_that_an_index_does_not_take_names_the_option(database: Path) -> None:
    """The TypeError of lancedb becomes an error that says which options are meant."""
    await make(database, THINGS, ROWS)
    steps = [
        Migration(table=TABLE, version=1, operations=[op.CreateIndex("n", options={"speed": 9})])
    ]

    before = tree(database)
    async with manager(database, steps) as migrations:
        with pytest.raises(OperationError, match="speed") as caught:
            await migrations.upgrade()

    assert "lancedb.index.BTree" in caught.value.remedy
    assert tree(database) == before


async def test_a_plan_warns_of_what_there_is_not_to_drop(database: Path) -> None:
    """A name that is misspelt is passed over, so that scripts run again; but not silently."""
    await make(database, THINGS, ROWS, [("n", "BTree")])
    operations = [op.DropColumns("txet", "text"), op.DropIndex("id"), op.DropIndex("n")]
    async with manager(
        database, [Migration(table=TABLE, version=1, operations=operations)]
    ) as migrations:
        plan = await migrations.plan()

    told = [warning.split(": ", 1)[1] for warning in plan.warnings]
    assert told[0].startswith("text: code that reads or writes it fails")
    assert told[1:] == [
        "txet: there is nothing to drop; the columns are id, n, text, tags.",
        "id: there is no index to drop; the indexes are BTree n.",
    ]


TYPES = [
    pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(), pa.string(),
    pa.large_string(), pa.binary(), pa.large_binary(), pa.binary(4), pa.date32(),
    pa.timestamp("ms"), pa.timestamp("us", "UTC"), pa.time64("us"), pa.duration("ms"),
    pa.decimal128(10, 2), pa.list_(pa.string()), pa.list_(pa.int64()), pa.list_(pa.float32()),
    pa.large_list(pa.string()), pa.list_(pa.binary()), pa.list_(pa.float32(), 8),
    pa.list_(pa.float16(), 8), pa.list_(pa.uint8(), 8), pa.list_(pa.int8(), 8),
    pa.list_(pa.list_(pa.float32(), 8)), pa.struct([("x", pa.int64())]),
    pa.dictionary(pa.int32(), pa.string()),
]  # fmt: skip


async def test_which_index_fits_which_type_is_what_lancedb_says(database: Path) -> None:
    """For every kind and type, `evolve` accepts exactly what LanceDB builds, as it reports it.

    A contract with LanceDB: it fails when LanceDB learns or forgets one.
    """
    connection = await lancedb.connect_async(database)
    wrong = []
    for number, column in enumerate(TYPES):
        schema = pa.schema([pa.field("c", column)])
        table = await connection.create_table(f"t{number}", schema=schema)
        for kind in KINDS:
            operation = op.CreateIndex("c", kind=kind)
            expected: list[str] = []
            with contextlib.suppress(OperationError):
                expected = [index.kind for index in operation.evolve(op.TableState(schema)).indexes]
            built: list[str] = []
            with contextlib.suppress(ValueError, RuntimeError):
                await table.create_index("c", config=getattr(lancedb.index, kind)())
                for index in await table.list_indices():
                    built.append(str(index.index_type))
                    await table.drop_index(index.name)
            if expected != built:
                wrong.append(f"{kind} on {column}: expected {expected}, built {built}")

    assert wrong == []


INVALID: dict[str, tuple[Callable[[], object], str]] = {
    "add nothing": (lambda: op.AddColumns({}), "nothing is named"),
    "add no type": (lambda: op.AddColumns({"a": "int64"}), "not a valid type"),  # type: ignore[dict-item]
    "add Null type": (lambda: op.AddColumns({"a": pa.null()}), "not a valid type"),
    "add no name": (lambda: op.AddColumns({"": pa.int8()}), "is not a name"),
    "add a reserved name": (lambda: op.AddColumns({"_aiomigrate_x": pa.int8()}), "reserved"),
    "add an unfinished path": (
        lambda: op.AddColumns({"a.": pa.int8()}), "does not accept a column named",
    ),
    "add a field NOT NULL": (
        lambda: op.AddColumns({"a": pa.field("a", pa.int8(), nullable=False)}), "NOT NULL",
    ),
    "fill what is not added": (
        lambda: op.AddColumns({"a": pa.int8()}, values={"b": 1}), "not a column that is added",
    ),
    "fill by NULL": (lambda: op.SetNotNull("a", fill={"a": None}), "fill of 'a' by None"),
    "fill another column": (lambda: op.SetNotNull("a", fill={"b": 1}), "fill of 'b'"),
    "alter to no type": (lambda: op.AlterType({"a": "int"}), "not a valid type"),  # type: ignore[dict-item]
    "delete without a condition": (lambda: op.Delete(" "), "not a condition"),
    "rebuild by no function": (lambda: op.Rebuild(3), "not a function"),  # type: ignore[arg-type]
    "backfill by no function": (lambda: op.Backfill("a", 3, key="b"), "not a function"),  # type: ignore[arg-type]
    "backfill from itself": (
        lambda: op.Backfill("a", lengths, key="b", source="a"), "filled from itself",
    ),
    "backfill in no batches": (lambda: op.Pace(batch_rows=0), "batch_rows=0"),
    "backfill at no pace": (lambda: op.Pace(calls_per_s=0), "calls_per_s=0"),
    "rebuild in no batches": (lambda: op.Rebuild(upper, batch_rows=0), "batch_rows=0"),
    "rebuild to no schema": (lambda: op.Rebuild(schema=pa.schema([])), "not a schema"),
    "copy in no batches": (lambda: op.CopyInto("a", key="id", batch_rows=0), "batch_rows=0"),
    "optimize away what is young": (
        lambda: op.Optimize(cleanup_older_than_s=60), "younger than an hour",
    ),
    "table metadata that is no text": (
        lambda: op.SetTableMetadata({"a": 1}),  # type: ignore[dict-item]
        "not text",
    ),
    "table metadata of LanceDB": (
        lambda: op.SetTableMetadata({"embedding_functions": "[]"}), "LanceDB's own",
    ),
    "no table metadata": (lambda: op.SetTableMetadata({}), "nothing"),
    "metadata that is no text": (lambda: op.SetMetadata("a", {"b": 1}), "not text"),  # type: ignore[dict-item]
    "rows that do not fit": (
        lambda: op.CreateTable(THINGS, rows=[{"id": "a", "n": "x"}]), "do not fit",
    ),
    "rows with an unknown field": (
        lambda: op.CreateTable(THINGS, rows=[{"id": "a", "x": 1}]), "'x', which is not a field",
    ),
    "rows without what is NOT NULL": (
        lambda: op.CreateTable(THINGS, rows=[{"n": 1}]), "no 'id'",
    ),
    "drop an index of no kind": (lambda: op.DropIndex("a", kind="X"), "no kind 'X'"),
    "drop nothing": (op.DropColumns, "nothing is named"),
    "drop twice": (lambda: op.DropColumns("a", "a"), "repeated"),
    "rename to itself": (lambda: op.RenameColumns({"a": "a"}), "itself"),
    "rename two to one": (lambda: op.RenameColumns({"a": "c", "b": "c"}), "repeated"),
    "rename to a reserved name": (lambda: op.RenameColumns({"a": "_aiomigrate_b"}), "reserved"),
    "rename to a dotted name": (lambda: op.RenameColumns({"a": "a.b"}), "a.b"),
    "create without a schema": (lambda: op.CreateTable({"a": 1}), "not a schema"),  # type: ignore[arg-type]
    "create without fields": (lambda: op.CreateTable(pa.schema([])), "not a schema"),
    "create with a field twice": (
        lambda: op.CreateTable(pa.schema([("a", pa.int8()), ("a", pa.int8())])), "repeated",
    ),
    "create with a reserved name": (
        lambda: op.CreateTable(pa.schema([("_aiomigrate_x", pa.int8())])), "reserved",
    ),
    "index of no kind": (lambda: op.CreateIndex("a", kind="Btree"), "no kind 'Btree'"),
    "index of no column": (lambda: op.CreateIndex(""), "not a column"),
    "drop index of no column": (lambda: op.DropIndex(""), "not a column"),
    "update nothing": (op.Update, "nothing is named"),
    "update with no literal": (lambda: op.Update({"a": [1]}), "not a literal"),  # type: ignore[dict-item]
    "update with empty SQL": (lambda: op.Update(sql={"a": " "}), "not SQL"),
    "update one column twice": (lambda: op.Update({"a": 1}, sql={"a": "a + 1"}), "repeated"),
    "update with SQL over another column it sets": (
        lambda: op.Update(sql={"a": "b + 1", "b": "1"}), "no fixed order",
    ),
    "run what is not async": (lambda: op.Run(lambda context: None), "not an async function"),  # type: ignore[arg-type, return-value]
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID.values(), ids=INVALID.keys())
def test_an_operation_that_cannot_be_is_refused_where_it_is_written(
    case: tuple[Callable[[], object], str],
) -> None:
    """Building it raises, so that importing the script tells, with a remedy."""
    build, message = case

    with pytest.raises(InvalidMigrationError, match=message) as caught:
        build()

    assert caught.value.remedy


EVERY = [*(case.operations[0] for case in CASES), op.Run(make)]


@pytest.mark.parametrize("operation", EVERY, ids=lambda o: o.describe()[:40])
def test_every_operation_describes_itself_in_one_line(operation: op.Operation) -> None:
    """A plan can show what it does and whether it can be undone."""
    assert operation.describe()
    assert "\n" not in operation.describe()
    assert str(operation.traits)
    assert operation.on("x").table == "x"
    assert operation.on("x").on("y").table == "x"


# ---- any sequence -------------------------------------------------------------------------------

NAMES = ["a", "b", "c", "Aa", "my col", "ü"]
COLUMN_TYPES = [pa.int64(), pa.string(), pa.float64(), pa.list_(pa.string()), pa.bool_()]
LITERALS: dict[pa.DataType, Any] = {
    pa.int64(): 7, pa.string(): "it's", pa.float64(): 0.5, pa.bool_(): True,
}  # fmt: skip
VALUES: dict[pa.DataType, Any] = {**LITERALS, pa.list_(pa.string()): ["x"]}
SQL = {pa.int64(): "`{}` + 1", pa.string(): "concat(`{}`, '!')"}

VERBS = (
    "create", "add", "drop", "rename", "permute", "null", "notnull", "index", "retype", "metadata",
    "delete", "rebuild", "unindex",
)  # fmt: skip
RETYPES = {
    (pa.int64(), pa.float64()), (pa.int64(), pa.string()), (pa.float64(), pa.string()),
    (pa.string(), pa.large_string()),
}  # fmt: skip
"""Changes of type that every value of the sequences survives."""

names = st.sampled_from(NAMES)
types = st.sampled_from(COLUMN_TYPES)


@st.composite
def schemas(draw: st.DrawFn) -> pa.Schema:
    """Draws a schema."""
    chosen = draw(st.lists(names, min_size=2, max_size=4, unique=True))
    # A column that stays: LanceDB cannot read rows of which no column left was ever written.
    kept = pa.field("id", pa.string())
    drawn = [pa.field(n, draw(types), nullable=draw(st.booleans())) for n in chosen]
    return pa.schema([kept, *drawn])


@st.composite
def operations(draw: st.DrawFn) -> op.Operation:  # noqa: C901 - a closed case list
    """Draws an operation, which may not fit."""
    some = draw(st.lists(names, min_size=1, max_size=2, unique=True))
    one = some[0]
    match draw(st.sampled_from(VERBS)):
        case "create":
            return op.CreateTable(draw(schemas()))
        case "add":
            return op.AddColumns({name: draw(types) for name in some})
        case "drop":
            return op.DropColumns(*some)
        case "rename":
            new = draw(st.lists(names, min_size=len(some), max_size=len(some), unique=True))
            pairs = {old: n for old, n in zip(some, new, strict=True) if old != n}
            return op.RenameColumns(pairs or {one: "z"})
        case "permute":
            three = draw(st.permutations(NAMES))[: draw(st.integers(2, 3))]
            return op.RenameColumns(dict(zip(three, three[1:] + three[:1], strict=True)))
        case "null":
            return op.SetNullable(*some)
        case "notnull":
            return op.SetNotNull(*some)
        case "index":
            kinds = ("BTree", "Bitmap", "LabelList", "FTS")
            return op.CreateIndex(one, kind=draw(st.sampled_from(kinds)))
        case "retype":
            return op.AlterType({one: draw(st.sampled_from([new for _, new in RETYPES]))})
        case "metadata":
            return op.SetMetadata(one, {"unit": draw(st.sampled_from(["cm", "kg"]))})
        case "delete":
            return op.Delete("id = 'nobody'")
        case "rebuild":
            return op.Rebuild()
        case _:
            return op.DropIndex(one)


@st.composite
def accepted(draw: st.DrawFn) -> tuple[pa.Schema, list[op.Operation], op.TableState]:
    """Draws a schema, a sequence of operations that `evolve` accepts, and what it predicts."""
    schema = draw(schemas())
    state = op.TableState(schema)
    sequence: list[op.Operation] = []
    for operation in draw(st.lists(operations(), min_size=6, max_size=14)):
        batch: list[op.Operation] = [operation]
        try:
            after = operation.on(TABLE).evolve(state)
            if isinstance(operation, op.AlterType):
                ((column, new),) = operation.columns.items()
                if (state.schema.field(column).type, new) not in RETYPES:
                    continue
            if isinstance(operation, op.SetNotNull):
                kinds = {c: state.schema.field(c).type for c in operation.columns}
                if not all(kind in LITERALS for kind in kinds.values()):
                    continue
                batch.insert(0, op.Update({c: LITERALS[k] for c, k in kinds.items()}))
        except OperationError:
            continue
        assert after is not None
        state = after
        sequence += batch
        for name in state.schema.names:
            if (kind := state.schema.field(name).type) in SQL and draw(st.integers(0, 9)) == 0:
                sequence.append(op.Update(sql={name: SQL[kind].format(name)}))
    return schema, sequence, state


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(accepted(), st.booleans(), st.integers(1, 5))
def test_any_sequence_that_is_predicted_gives_what_was_predicted(
    drawn: tuple[pa.Schema, list[op.Operation], op.TableState], filled: bool, chunk: int
) -> None:
    """`evolve` is an oracle: what it accepts LanceDB does, and the table is exactly as it says."""
    schema, sequence, predicted = drawn
    rows = [{f.name: VALUES[f.type] for f in schema}] * 3 if filled else []
    steps = [
        Migration(table=TABLE, version=number, operations=sequence[start : start + chunk])
        for number, start in enumerate(range(0, len(sequence), chunk), 1)
    ]

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            database = Path(folder)
            await make(database, schema, rows)
            async with manager(database, steps) as migrations:
                try:
                    await migrations.upgrade()
                except AiomigrateError as exc:
                    raise AssertionError(str(exc)) from exc
                assert (await migrations.validate()).valid
            state, _ = await found(database)
            assert state is not None
            assert predicted.shape() == state.shape()
            assert len(rows) == len(await rows_of(database))

    anyio.run(run)


def test_a_field_is_spelled_with_its_nullability() -> None:
    """`!` stands for NOT NULL, as in every message and in the journal."""
    assert spell(pa.field("a", pa.int64())) == "int64"
    assert spell(pa.field("a", pa.int64(), nullable=False)) == "int64!"


# ---- what LanceDB leaves stale ------------------------------------------------------------------


@register("aiomigrate-tests")
class Counting(TextEmbeddingFunction):
    """Embeds a text by its length."""

    def ndims(self) -> int:
        """Returns the dimension."""
        return 2

    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns a vector for each text."""
        return [[float(len(str(text))), 0.0] for text in texts]


EMBEDDED = pa.schema(
    [pa.field("text", pa.string()), pa.field("vector", pa.list_(pa.float32(), 2))],
    metadata={
        "embedding_functions": '[{"name": "aiomigrate-tests", "model": {}, '
        '"source_column": "text", "vector_column": "vector"}]',
        "owner": "search",
    },
)


@pytest.mark.parametrize(
    "operation", [op.DropColumns("vector"), op.RenameColumns({"text": "body"})]
)
async def test_a_column_of_an_embedding_function_is_not_left_dangling(
    database: Path, operation: op.Operation
) -> None:
    """Refused beforehand with the way that works: else the application's next add() would fail."""
    await make(database, EMBEDDED)
    async with manager(
        database, [Migration(table=TABLE, version=1, operations=[operation])]
    ) as migrations:
        with pytest.raises(OperationError, match="embedding function 'aiomigrate-tests'") as caught:
            await migrations.upgrade()

    assert "op.Rebuild" in caught.value.remedy


async def test_a_rebuild_writes_the_metadata_that_is_right(database: Path) -> None:
    """It stays where the columns do, and goes with the column that an embedding function names."""
    await make(database, EMBEDDED, [{"text": "a", "vector": [1, 2]}])
    steps = [
        Migration(table=TABLE, version=1, operations=[op.Rebuild()]),
        Migration(
            table=TABLE, version=2,
            operations=[op.Rebuild(schema=pa.schema([pa.field("text", pa.string())]))],
        ),
        Migration(table=TABLE, version=3, operations=[op.RenameTable("renamed")]),
    ]  # fmt: skip
    told = []
    async with manager(database, steps) as migrations:
        for version, table in ((1, TABLE), (2, TABLE), (3, "renamed")):
            await migrations.upgrade(to=version)
            state, _ = await found(database, table)
            assert state is not None
            told.append(state.schema.metadata or {})
    table = await (await lancedb.connect_async(database)).open_table("renamed")
    await table.add([{"text": "as the application does"}])

    assert await table.count_rows() == 2
    assert [sorted(metadata) for metadata in told] == [
        [b"embedding_functions", b"owner"], [b"owner"], [b"owner"],
    ]  # fmt: skip


async def test_rows_without_a_vector_are_kept_as_they_are(database: Path) -> None:
    """NULL and NaN in vector columns pass through every operation that writes rows anew.

    lancedb's Python half refuses such vectors when it creates tables and merges, and computes
    those of tables with embedding functions itself: we go past it.
    """
    schema = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), 2)),
            pa.field("long", pa.list_(pa.float32(), 12)),
        ]
    )
    rows = [{"id": "a", "vector": None, "long": None},
            {"id": "b", "vector": [float("nan"), 1.0], "long": [0.5] * 12}]  # fmt: skip

    async def as_it_is(batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch

    async def more(ctx: Context) -> None:
        table = ctx.table("renamed")
        await table.add([{"id": "c", "vector": None, "long": None}])
        await table.merge([{"id": "c", "vector": None}, {"id": "d", "vector": None}], on="id")

    steps = [
        Migration(table="t", version=1, operations=[op.CreateTable(schema, rows=rows)]),
        Migration(table="t", version=2, operations=[op.Rebuild(as_it_is)]),
        Migration(table="t", version=3, operations=[op.RenameTable(to="renamed")]),
        Migration(line="t", version=4, up=more, touches=("renamed",)),
        Migration(table="copy", version=1, depends_on={"t": 4},
                  operations=[op.CreateTable(schema), op.CopyInto("renamed", key="id")]),
    ]  # fmt: skip
    async with manager(database, steps) as migrating:
        await migrating.initialize()

    connection = await lancedb.connect_async(database)
    for name in ("renamed", "copy"):
        found = (await (await connection.open_table(name)).query().to_arrow()).sort_by("id")
        assert found["id"].to_pylist() == ["a", "b", "c", "d"]
        vectors = found["vector"].to_pylist()
        assert [v is None for v in vectors] == [True, False, True, True]
        assert str(vectors[1]) == "[nan, 1.0]"
        assert found["long"].to_pylist() == [None, [0.5] * 12, None, None]
    connection.close()


# ---- tables that do not fit ----------------------------------------------------------------------

UNFIT = [
    op.AddColumns({"a": pa.int64()}, values={"a": 1}), op.DropColumns("a"),
    op.RenameColumns({"a": "b"}), op.RenameColumns({"a": "b", "b": "a"}),
    op.AlterType({"a": pa.int64()}), op.SetNullable("a"), op.SetNotNull("a"),
    op.SetMetadata("a", {"unit": "cm"}), op.SetMetadata("s.a", {"unit": "cm"}),
    op.Update({"a": 1}), op.Delete("a = 1"), op.CreateIndex("a"), op.DropIndex("a"),
    op.Backfill("a", str, key="id"), op.CopyInto("other", key="id"), op.Optimize(),
]  # fmt: skip
TABLES = [
    None,
    op.TableState(pa.schema([])),
    op.TableState(pa.schema([pa.field("id", pa.string())])),
    op.TableState(pa.schema([pa.field("s", pa.struct([pa.field("b", pa.string())]))])),
]


@pytest.mark.parametrize("state", TABLES)
@pytest.mark.parametrize("operation", UNFIT, ids=str)
def test_an_operation_is_done_on_any_table_or_not_or_says_why_it_does_not_fit(
    operation: op.Operation, state: op.TableState | None
) -> None:
    """It is asked of tables as they may become, too; never an error of ours that says nothing."""
    for simple in operation.on("t").expand():
        for ask in (simple.done, simple.predict):
            with contextlib.suppress(AiomigrateError):
                ask(state, "w")


async def test_what_is_described_may_be_dropped_right_after(database: Path) -> None:
    """Both are looked at beforehand, the first also on the table as the second leaves it."""
    await make(database, THINGS, ROWS)
    steps = [
        Migration(
            table=TABLE,
            version=1,
            operations=[op.SetMetadata("n", {"unit": "cm"}), op.DropColumns("n")],
        )
    ]
    async with manager(database, steps) as migrations:
        report = await migrations.upgrade()

    assert len(report.applied) == 1


# ---- shapes, quickly told ------------------------------------------------------------------------

FIELDS = st.builds(
    pa.field,
    st.sampled_from(["a", "b", "c", "d", f"{WITNESS_PREFIX}1_x"]),
    st.sampled_from([pa.int64(), pa.string()]),
    nullable=st.booleans(),
    metadata=st.sampled_from([None, {"k": "v"}]),
)
INDEXES = st.builds(Index, st.sampled_from(["BTree", "Bitmap"]), st.tuples(st.sampled_from("ab")))
STATES = st.builds(
    op.TableState,
    st.lists(FIELDS, min_size=1, max_size=4, unique_by=lambda f: f.name).map(pa.schema),
    st.lists(INDEXES, max_size=2).map(tuple),
)


def moved(state: op.TableState) -> st.SearchStrategy[op.TableState]:
    """Returns the state with its columns in any order."""
    return st.permutations(list(state.schema)).map(
        lambda fields: op.TableState(pa.schema(fields), state.indexes)
    )


@given(STATES.flatmap(lambda state: st.tuples(st.just(state), st.one_of(STATES, moved(state)))))
def test_two_states_are_the_same_if_their_shapes_are(
    states: tuple[op.TableState, op.TableState],
) -> None:
    """However that is found out: by their schemas or by their shapes."""
    one, other = states
    equal = one.shape() == other.shape()

    assert one.same(other) is equal
    assert other.same(one) is equal


def shout(batch: pa.RecordBatch) -> list[str]:
    """Computes something."""
    return [str(value).upper() for value in batch["b"].to_pylist()]


SCRIPT = Script(
    line="t", version=3, description="", operations=(), touches=("t", "u"), depends_on={},
    checksum="", table="t",
)  # fmt: skip
SAME = st.sampled_from([
    op.Update({"a": 1}, table="t"), op.Update({"a": 2}, table="t"), op.Update({"a": 1}, table="u"),
    op.Backfill("a", shout, key="id", source="b", table="t"),
    op.Backfill("c", shout, key="id", source="b", table="t"),
    op.Delete("a = 1", table="t"),
])  # fmt: skip


@given(st.lists(SAME, min_size=1, max_size=6))
def test_each_operation_of_a_migration_has_a_witness_of_its_own(
    operations: Sequence[op.Operation],
) -> None:
    """Also where it does what an earlier one did; those that need none have none."""
    names = [
        witness_name(SCRIPT, operation, operations[:position])
        for position, operation in enumerate(operations)
    ]

    named = [(o.table, name) for o, name in zip(operations, names, strict=True) if name]
    assert len(named) == len(set(named))
    assert all(name for o, name in zip(operations, names, strict=True) if o.witnessed)
