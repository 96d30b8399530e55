"""Migrations that processes of several releases race for. Only what release 0.1.0 has is used."""

from __future__ import annotations

import pyarrow as pa

from aiomigrate import Context, Migration, op

ROWS = 60

PEOPLE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("name", pa.string()),
        pa.field("age", pa.int64()),
    ]
)
NOTES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("a", pa.string()),
        pa.field("b", pa.string()),
    ]
)


async def seed(context: Context) -> None:
    """Adds people, but for those who are there."""
    table = context.table()
    have = set((await table.read(columns=["id"]))["id"].to_pylist())
    rows = [{"id": f"p{n:02}", "name": f"名 {n}", "age": 20 + n} for n in range(ROWS)]
    await table.add([row for row in rows if row["id"] not in have])


async def unseed(context: Context) -> None:
    """Deletes the people."""
    await context.table().delete("true")


async def lengths(batch: pa.RecordBatch) -> list[int]:
    """Returns the length of each name."""
    return [len(name) for name in batch["name"].to_pylist()]


def capitals(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Puts the notes in capitals."""
    rows = [{**row, "a": row["a"].upper()} for row in batch.to_pylist()]
    return pa.RecordBatch.from_pylist(rows, schema=batch.schema)


def migrations(to: int) -> list[Migration]:
    """Returns the migrations up to a version of each line; 4 is the newest."""
    notes = [{"id": f"n{n}", "a": f"a{n}", "b": f"b{n}"} for n in range(10)]
    known = [
        Migration(table="people", version=1, operations=[op.CreateTable(PEOPLE)]),
        Migration(table="people", version=2, description="Seed", up=seed, down=unseed),
        Migration(
            table="people",
            version=3,
            operations=[
                op.AddColumns({"score": pa.int64(), "length": pa.int64()}),
                op.Update(sql={"age": "age + 1"}, where="age >= 30"),
                op.Backfill(
                    "length", lengths, key="id", source="name",
                    pace=op.Pace(batch_rows=10, chunk_rows=20),
                ),
            ],
        ),
        Migration(
            table="people",
            version=4,
            operations=[op.CreateIndex("age"), op.RenameColumns({"name": "title"})],
        ),
        Migration(table="notes", version=1, operations=[op.CreateTable(NOTES, rows=notes)]),
        Migration(
            table="notes", version=2, operations=[op.RenameColumns({"a": "b", "b": "a"})]
        ),
        Migration(
            table="notes", version=3, depends_on={"people": 2}, operations=[op.Rebuild(capitals)]
        ),
        Migration(
            table="notes",
            version=4,
            operations=[op.Update({"b": "none"}, where="id = 'n3'"), op.SetNotNull("b")],
        ),
        Migration(
            line="indexes",
            version=4,
            touches=("people", "notes"),
            operations=[
                op.CreateIndex("id", table="people"), op.CreateIndex("a", table="notes"),
            ],
        ),
    ]  # fmt: skip
    return [migration for migration in known if migration.version <= to]
