"""The migrations whose checksums are pinned. Never edit a case, nor a function: add new ones.

Databases in the field hold the checksums of such migrations, and names of columns made of the
operations' descriptions and identities. Only comments, docstrings and formatting may change.

This module needs nothing but pyarrow, so that any Python can print what it computes:

    python -m tests.guarantees.checksum_cases
"""

from __future__ import annotations

import datetime as dt
import enum
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from aiomigrate import Migration, load, op

TABLE = "things"


# ---- functions, whose source is part of the checksum ---------------------------------------------


async def seed(context: Any) -> None:
    """Adds two rows."""
    table = context.table("things")
    await table.add([{"id": "a", "n": 1}, {"id": "b", "n": 0x2}])  # a comment


async def clear(context: Any) -> None:
    """Deletes what `seed` adds."""
    await context.table("things").delete("id IN ('a', 'b')")


async def seed_with(context: Any, *, rows: int = 3, prefix: str = "r", **more: Any) -> None:
    """Adds rows as its arguments say."""
    names = [f"{prefix}{n:>{rows}}" for n in range(rows)]
    await context.table().add([{"id": name, **more} for name in names if (size := len(name)) < 9])
    del size


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function."""

    @functools.wraps(function)
    async def wrapper(context: Any) -> None:
        await function(context)

    return wrapper


@decorated
async def wrapped(context: Any) -> None:
    """Updates under a decorator that wraps."""
    await context.table().update({"n": -1.5}, where="n IS NULL")


def closure(limit: int) -> Callable[..., Any]:
    """Returns a function with a value from outside, which does not count."""

    async def limited(context: Any) -> None:
        await context.table().delete(f"n > {limit}")

    return limited


async def syntax(context: Any, *more: Any, limit: int = 3, **rest: Any) -> Any:
    """Uses syntax whose parsed form differs between Python releases."""
    table = context.table("things")
    x, y = 1.5, None
    text = f"{x!r:>{limit}} {y=} a" "b" rf"\d{x:%Y}"  # fmt: skip
    match x:
        case 1 | 2 if y is None:
            pass
        case {"a": [*_, 3], **others}:
            del others
        case None | True | "" | b"z" | -1j:
            ...
    async with table as t, table:
        rows = [r async for r in t if (n := r["n"]) and not 0x1F < n <= 10_000]
    try:
        await table.update({"a": lambda q, /, *, w=2: (yield)}, where=f"id = '{x}' {text}")
    except* ValueError as exc:
        raise RuntimeError from exc

    class Inner(dict, other=type):  # type: ignore[type-arg]
        slot: int

    return [*rows, *(), Inner, *more], {**rest}, {1, 2}, rows[1:-1, ...], n


def upper(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Puts text in capitals."""
    rows = [{**row, "text": (row["text"] or "").upper()} for row in batch.to_pylist()]
    return pa.RecordBatch.from_pylist(rows, schema=batch.schema)


async def upper_async(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Puts text in capitals, as an async function."""
    return upper(batch)


def lengths(batch: pa.RecordBatch, *, plus: int = 0) -> list[int]:
    """Returns the length of each text."""
    return [len(text or "") + plus for text in batch["text"].to_pylist()]


async def embed(texts: Sequence[str]) -> list[list[float]]:
    """Returns a vector for each text."""
    return [[float(len(text)), 1.0] for text in texts]


class Service:
    """A function that is an object, as `Reembed` takes one."""

    async def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        return await embed(texts)


def of_params(params: Mapping[str, Any]) -> list[op.Operation]:
    """Returns operations for a run's parameters."""
    return [op.AddColumns({"v": pa.list_(pa.float32(), params["dimension"])})]


def of_params_with(name: str, params: Mapping[str, Any]) -> list[op.Operation]:
    """Returns operations for a run's parameters and one argument more."""
    return [op.AddColumns({name: pa.list_(pa.float16(), params["dimension"])})]


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Shade(enum.StrEnum):
    DARK = "dark"


class Level(enum.IntEnum):
    HIGH = 3


# ---- types ---------------------------------------------------------------------------------------

TYPES: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint8": pa.uint8(),
    "uint16": pa.uint16(),
    "uint32": pa.uint32(),
    "uint64": pa.uint64(),
    "float16": pa.float16(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "large_string": pa.large_string(),
    "binary": pa.binary(),
    "binary16": pa.binary(16),
    "large_binary": pa.large_binary(),
    "date32": pa.date32(),
    "date64": pa.date64(),
    "time32_s": pa.time32("s"),
    "time64_ns": pa.time64("ns"),
    "timestamp_s": pa.timestamp("s"),
    "timestamp_ms": pa.timestamp("ms", "UTC"),
    "timestamp_us": pa.timestamp("us", "Europe/Zurich"),
    "timestamp_ns": pa.timestamp("ns"),
    "duration": pa.duration("us"),
    "decimal128": pa.decimal128(20, 3),
    "decimal256": pa.decimal256(50, -2),
    "list": pa.list_(pa.string()),
    "list_not_null": pa.list_(pa.field("item", pa.int64(), nullable=False)),
    "large_list": pa.large_list(pa.int32()),
    "vector": pa.list_(pa.float32(), 1536),
    "vectors": pa.list_(pa.list_(pa.float16(), 8)),
    "struct": pa.struct([("city", pa.string()), pa.field("zip", pa.int32(), nullable=False)]),
    "nested": pa.struct(
        [
            pa.field("lines", pa.list_(pa.struct([("a", pa.bool_()), ("b", pa.date32())]))),
            pa.field("inner", pa.struct([pa.field("deep", pa.struct([("er", pa.binary())]))])),
        ]
    ),
    "dictionary": pa.dictionary(pa.int16(), pa.string()),
    "map": pa.map_(pa.string(), pa.int64()),
}

THINGS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("n", pa.int64()),
        pa.field("text", pa.string(), metadata={"unit": "words"}),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("vector", pa.list_(pa.float32(), 4)),
    ],
    metadata={"owner": "tests"},
)

SKIP: dict[str, Any] = {"table": "others", "when_missing": op.Missing.SKIP}


def _state(schema: pa.Schema = THINGS, *indexes: op.Index) -> op.TableState:
    return op.TableState(schema, indexes)


def _undo(operation: op.Operation, *indexes: op.Index, position: int = 0) -> op.Operation:
    """Returns what undoes an operation on such a table: it has a stored name of its own."""
    undoing = operation.on(TABLE).undo(_state(THINGS, *indexes))
    assert undoing is not None
    return undoing[position]


REEMBED: dict[str, Any] = {
    "source": "text", "function": embed, "dimension": 2, "model": "tiny@1", "key": "id",
}  # fmt: skip

OPERATIONS: dict[str, op.Operation] = {
    # tables
    "CreateTable": op.CreateTable(THINGS),
    "CreateTable of one field": op.CreateTable(pa.schema([("id", pa.int64())])),
    "CreateTable of every type": op.CreateTable(pa.schema(list(TYPES.items()))),
    "CreateTable of every type, NOT NULL": op.CreateTable(
        pa.schema([pa.field(name, kind, nullable=False) for name, kind in TYPES.items()])
    ),
    "CreateTable with rows": op.CreateTable(
        pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("f", pa.float64()),
                pa.field("b", pa.binary()),
                pa.field("day", pa.date32()),
                pa.field("at", pa.timestamp("us", "UTC")),
                pa.field("t", pa.time64("us")),
                pa.field("d", pa.duration("us")),
                pa.field("tags", pa.list_(pa.string())),
                pa.field("s", pa.struct([("x", pa.int64())])),
                pa.field("yes", pa.bool_()),
            ]
        ),
        rows=[
            {
                "id": "ü 'x'",
                "f": 0.1,
                "b": b"\x00\xff",
                "day": dt.date(2026, 2, 3),
                "at": dt.datetime(2026, 2, 3, 4, 5, 6, 7, tzinfo=dt.UTC),
                "t": dt.time(1, 2, 3, 4),
                "d": dt.timedelta(days=1, microseconds=5),
                "tags": ["a", None],
                "s": {"x": 1},
                "yes": True,
            },
            {"id": "b", "f": None, "tags": [], "yes": False},
        ],
    ),
    "CreateTable, all": op.CreateTable(THINGS, rows=[{"id": "a"}], **SKIP),
    "DropTable": op.DropTable(),
    "DropTable, all": op.DropTable(**SKIP),
    "RenameTable": op.RenameTable("items"),
    "RenameTable, all": op.RenameTable("items", **SKIP),
    "Optimize": op.Optimize(),
    "Optimize, all": op.Optimize(cleanup_older_than_s=7200, **SKIP),
    "Optimize, a fraction": op.Optimize(cleanup_older_than_s=86400.5),
    # columns
    "AddColumns": op.AddColumns({"x": pa.int64()}),
    "AddColumns of every type": op.AddColumns(TYPES),
    "AddColumns of fields": op.AddColumns(
        {
            "x": pa.field("x", pa.int64(), metadata={"unit": "m", "more": "ü"}),
            "y": pa.field("y", pa.list_(pa.float32(), 3)),
        }
    ),
    "AddColumns to a struct": op.AddColumns({"address.city": pa.string(), "a.b.c": pa.int8()}),
    "AddColumns with values": op.AddColumns(
        {"t": pa.string(), "i": pa.int64(), "f": pa.float64(), "b": pa.bool_(), "z": pa.int8()},
        values={"t": "it's", "i": 7, "f": 1e-3, "b": True, "z": None},
    ),
    "AddColumns with SQL": op.AddColumns({"x": pa.int64()}, sql={"x": "n * 2"}),
    "AddColumns, all": op.AddColumns(
        {"x": pa.int64(), "y": pa.string()}, values={"y": ""}, sql={"x": "n + 1"}, **SKIP
    ),
    "DropColumns": op.DropColumns("n"),
    "DropColumns, all": op.DropColumns("n", "address.city", "my col", **SKIP),
    "RenameColumns": op.RenameColumns({"n": "m"}),
    "RenameColumns, a swap": op.RenameColumns({"a": "b", "b": "a"}),
    "RenameColumns, all": op.RenameColumns({"address.city": "town", "n": "ü"}, **SKIP),
    "SetNullable": op.SetNullable("n"),
    "SetNullable, all": op.SetNullable("n", "text", **SKIP),
    "SetNotNull": op.SetNotNull("n"),
    "SetNotNull, all": op.SetNotNull("n", "text", fill={"n": 0, "text": "none"}, **SKIP),
    "AlterType": op.AlterType({"n": pa.int32()}),
    "AlterType to every type": op.AlterType(TYPES),
    "AlterType, all": op.AlterType({"n": pa.float64(), "text": pa.large_string()}, **SKIP),
    "SetMetadata": op.SetMetadata("n", {"unit": "m"}),
    "SetMetadata, all": op.SetMetadata("address.city", {"a": None, "b": "ü"}, **SKIP),
    "SetTableMetadata": op.SetTableMetadata({"owner": "search"}),
    "SetTableMetadata, all": op.SetTableMetadata({"a": None, "b": "ü"}, **SKIP),
    # rows
    "Update": op.Update({"n": 1}),
    "Update of every literal": op.Update(
        {"t": "it's 三", "i": -7, "f": 0.1, "b": False, "z": None}
    ),
    "Update by SQL": op.Update(sql={"n": "n + 1", "text": "lower(text)"}),
    "Update where": op.Update({"n": 1}, where="n IS NULL OR text = 'it''s'"),
    "Update, all": op.Update({"t": "x"}, sql={"n": "n * 2"}, where="n > 1", batch_rows=10, **SKIP),
    "Delete": op.Delete("n > 3"),
    "Delete, all": op.Delete("true", **SKIP),
    "CopyInto": op.CopyInto("others", key="id"),
    "CopyInto by a function": op.CopyInto("others", key="id", function=upper),
    "CopyInto, all": op.CopyInto(
        "archive", key="uid", where="n > 1", function=upper_async, batch_rows=5, **SKIP
    ),
    # functions
    "Run": op.Run(seed),
    "Run with an inverse": op.Run(seed, clear),
    "Run of a partial": op.Run(functools.partial(seed_with, rows=5, prefix="ü")),
    "Run of a partial of a partial": op.Run(
        functools.partial(functools.partial(seed_with, rows=5), more=dt.date(2026, 1, 2))
    ),
    "Run of a decorated function": op.Run(wrapped),
    "Run of a closure": op.Run(closure(3)),
    "Run of a closure with another value": op.Run(closure(4)),
    "Run of new syntax": op.Run(syntax),
    "Run, all": op.Run(seed, inverse=clear, **SKIP),
    "Rebuild": op.Rebuild(),
    "Rebuild by a function": op.Rebuild(upper),
    "Rebuild by a lambda": op.Rebuild(lambda batch: batch.slice(1)),
    "Rebuild to a schema": op.Rebuild(schema=THINGS),
    "Rebuild to every type": op.Rebuild(schema=pa.schema(list(TYPES.items()))),
    "Rebuild, all": op.Rebuild(upper_async, schema=THINGS, batch_rows=7, **SKIP),
    "Backfill": op.Backfill("n", lengths, key="id"),
    "Backfill from one column": op.Backfill("n", lengths, key="id", source="text"),
    "Backfill from columns": op.Backfill("n", lengths, key="id", source=["text", "tags"]),
    "Backfill by a partial": op.Backfill("n", functools.partial(lengths, plus=2), key="id"),
    "Backfill, all": op.Backfill(
        "n",
        lengths,
        key="uid",
        source=("text",),
        where="n > 'x'",
        revision="2",
        on_poison=op.OnPoison.LIST,
        max_poison=3,
        pace=op.Pace(
            batch_rows=5,
            concurrency=1,
            calls_per_s=2.5,
            attempts=2,
            chunk_rows=10,
            checkpoint_s=1.0,
            drain_s=2.0,
        ),
        **SKIP,
    ),
    "Reembed": op.Reembed(**REEMBED),
    "Reembed by an object": op.Reembed(**{**REEMBED, "function": Service()}),
    "Reembed without an index": op.Reembed(**REEMBED, index=False),
    "Reembed with an index": op.Reembed(
        **REEMBED, index=op.CreateIndex("vector", kind="HnswSq", options={"m": 8})
    ),
    "Reembed, all": op.Reembed(
        **REEMBED,
        column="embedding",
        keep="embedding_before",
        index=op.CreateIndex("embedding", kind="IvfFlat", timeout_s=5, **SKIP),
        gate=op.Gate(
            sample=5, neighbours=2, min_overlap=0.0, max_missing=0.5, max_zero=1, max_duplicates=1
        ),
        readers_name_column=True,
        probes=["a", 1, 2.5],
        on_poison=op.OnPoison.LIST,
        max_poison=1,
        pace=op.Pace(batch_rows=1),
        engine=op.Engine.RAY,
        **SKIP,
    ),
    # indexes
    "CreateIndex": op.CreateIndex("n"),
    **{
        f"CreateIndex {kind}": op.CreateIndex("n", kind=kind)
        for kind in (
            "Bitmap",
            "LabelList",
            "FTS",
            "Fm",
            "IvfFlat",
            "IvfPq",
            "IvfSq",
            "IvfRq",
            "HnswPq",
            "HnswSq",
            "HnswFlat",
        )
    },
    "CreateIndex with odd options": op.CreateIndex(
        "n",
        options={
            "none": None,
            "list": [1, "a", None],
            "set": {3, 1, 2},
            "frozen": frozenset({"b"}),
            "bytes": b"\x00",
            "day": dt.date(2026, 1, 2),
            "s": dt.timedelta(seconds=1.5),
            "enum": Colour.BLUE,
            "map": {"z": 1, "a": {2: 3}},
            "type": pa.int8(),
            "tuple": (1.0,),
        },
    ),
    "CreateIndex with enums": op.CreateIndex(
        "n", options={"str": Shade.DARK, "int": Level.HIGH, "keys": {Shade.DARK: [Level.HIGH]}}
    ),
    "Update with enums": op.Update({"text": Shade.DARK, "n": Level.HIGH}),
    "CreateIndex, all": op.CreateIndex(
        "meta.lang", kind="FTS", options={"stem": True, "language": "German"}, timeout_s=1, **SKIP
    ),
    "DropIndex": op.DropIndex("n"),
    "DropIndex, all": op.DropIndex("meta.lang", kind="HnswPq", **SKIP),
    # what undoes them
    "undo of AddColumns": _undo(op.AddColumns({"x": pa.int64(), "n": pa.int64()})),
    "undo of RenameColumns": _undo(op.RenameColumns({"n": "text", "text": "n"})),
    "undo of SetNullable": _undo(op.SetNullable("id", "n")),
    "undo of SetNotNull": _undo(op.SetNotNull("id", "n")),
    "undo of AlterType": _undo(op.AlterType({"text": pa.large_string()})),
    "undo of SetMetadata": _undo(op.SetMetadata("text", {"unit": "x", "more": "y"})),
    "undo of SetTableMetadata": _undo(op.SetTableMetadata({"owner": "x", "more": "y"})),
    "undo of CreateIndex": _undo(op.CreateIndex("n")),
    "undo of CreateIndex, what it replaced": _undo(
        op.CreateIndex("vector", kind="IvfPq"),
        op.Index("IvfFlat", ("vector",), "vector_idx", {"distance_type": "cosine"}),
        position=1,
    ),
    "undo of DropIndex": _undo(op.DropIndex("n"), op.Index("Bitmap", ("n",), "n_idx")),
    "undo of RenameTable": _undo(op.RenameTable("items")),
    "undo of Run": _undo(op.Run(seed, clear)),
    "undo of Reembed": _undo(op.Reembed(**REEMBED)),
}
"""An operation each, of a migration to version 1 of the line `things`."""

MIGRATIONS: dict[str, Migration] = {
    "up": Migration(table=TABLE, version=1, up=seed),
    "up and down": Migration(table=TABLE, version=2, up=seed, down=clear, description="Seed"),
    "up, a partial": Migration(table=TABLE, version=3, up=functools.partial(seed_with, rows=1)),
    "up, a closure": Migration(table=TABLE, version=4, up=closure(1)),
    "up, decorated": Migration(table=TABLE, version=5, up=wrapped),
    "operations of the parameters": Migration(table=TABLE, version=6, operations=of_params),
    "operations of the parameters by a lambda": Migration(
        table=TABLE, version=7, operations=lambda params: [op.DropColumns(params["column"])]
    ),
    "operations of the parameters by a partial": Migration(
        table=TABLE, version=8, operations=functools.partial(of_params_with, "w")
    ),
    "several operations": Migration(
        table=TABLE,
        version=9,
        operations=[
            op.AddColumns({"x": pa.int64()}),
            op.Backfill("x", lengths, key="id"),
            op.SetNotNull("x", fill={"x": 0}),
            op.Run(seed, table="others"),
            op.CreateIndex("x"),
        ],
    ),
    "touches, given in another order": Migration(
        table=TABLE, version=10, touches=("z", TABLE, "a"), operations=[op.DropIndex("n")]
    ),
    "dependencies": Migration(
        table=TABLE, version=11, depends_on={"z": 2, "a": 1}, operations=[op.DropIndex("n")]
    ),
    "a contraction": Migration(
        table=TABLE, version=12, contracts={TABLE: 3, "a": 1}, operations=[op.DropColumns("n")]
    ),
    "in the background": Migration(
        table=TABLE, version=13, background=True, operations=[op.DropIndex("n")]
    ),
    "a line of its own": Migration(
        line="indexes", version=14, touches=("a", "b"), operations=[op.CreateIndex("n", table="a")]
    ),
    "a line with a table": Migration(
        line="line", table=TABLE, version=15, operations=[op.DropIndex("n")]
    ),
    "everything": Migration(
        line="line",
        table=TABLE,
        version=16,
        description="Everything",
        up=seed,
        down=clear,
        touches=(TABLE, "a"),
        depends_on={"a": 2},
        contracts={"b": 1},
        background=True,
    ),
}
"""Migrations, for what else is part of a checksum."""

PARAMS = {"dimension": 3, "column": "n"}


def computed() -> dict[str, dict[str, Any]]:
    """Returns, by the name of the case, what this release computes."""
    cases = {f"operation: {name}": _migration(value) for name, value in OPERATIONS.items()}
    cases |= {f"migration: {name}": value for name, value in MIGRATIONS.items()}
    found = {}
    for name, migration in cases.items():
        (script,) = load([migration], PARAMS).all
        given = OPERATIONS.get(name.removeprefix("operation: "))
        operations = script.operations if given is None else (given.on(TABLE),)
        found[name] = {
            "checksum": script.checksum,
            "describe": [operation.describe() for operation in operations],
            "identity": [operation.identity for operation in operations],
        }
    return found


def _migration(operation: op.Operation) -> Migration:
    return Migration(table=TABLE, version=1, operations=[operation])


if __name__ == "__main__":
    json.dump(computed(), sys.stdout)
