"""A set of migrations that uses every kind of step, and what a database is after them.

Every proof runs the same upgrade; `snapshot` is the oracle: whatever was done to a run, the
database must end as the undisturbed one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa

from aiomigrate import Context, Migration, op
from aiomigrate.clock import Clock
from aiomigrate.ledger.codec import LEASE_PREFIX
from aiomigrate.ledger.history import fold
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.store.connection import Store

PEOPLE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("name", pa.string()),
        pa.field("age", pa.int64()),
        pa.field("old", pa.string()),
    ]
)
NOTES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("person", pa.string()),
        pa.field("a", pa.string()),
        pa.field("b", pa.string()),
    ]
)


async def seed_people(context: Context) -> None:
    """Adds people, in two commits, unless they are there."""
    table = context.table()
    for start in (0, 5):
        have = {row["id"] for row in (await table.read(columns=["id"])).to_pylist()}
        rows = [
            {"id": f"p{n}", "name": f"名 {n} 'x'", "age": 20 + n}
            for n in range(start, start + 5)
            if f"p{n}" not in have
        ]
        await table.add(rows)


async def seed_notes(context: Context) -> None:
    """Adds two notes for each person, then changes and deletes some."""
    people = [r["id"] for r in (await context.table("people").read(columns=["id"])).to_pylist()]
    notes = context.table("notes")
    await notes.add(
        [
            {"id": f"{p}-{n}", "person": p, "a": f"a{n}", "b": f"b{p}"}
            for p in sorted(people)
            for n in range(2)
        ]
    )
    await notes.update({"a": "changed"}, where="person = 'p1'")
    await notes.delete("person = 'p2'")
    await notes.merge([{"id": "p3-0", "person": "p3", "a": "m", "b": "m"},
                       {"id": "new", "person": "p3", "a": "n", "b": "n"}], on="id")  # fmt: skip
    await context.apply(op.AddColumns({"extra": pa.int32()}))


def migrations() -> list[Migration]:
    """Returns the set: 12 migrations on 5 lines."""
    return [
        Migration(table="people", version=1, operations=[op.CreateTable(PEOPLE)]),
        Migration(table="people", version=2, description="Seed", up=seed_people),
        Migration(
            table="people",
            version=3,
            operations=[
                op.AddColumns({"score": pa.int64(), "tag": pa.string()}),
                op.Update(sql={"score": "age * 2"}, where="age > 21"),
                op.Update(sql={"age": "age + 1"}),
                op.Update({"tag": "new"}, where="tag IS NULL"),
                op.SetNotNull("tag"),
                op.CreateIndex("id"),
            ],
        ),
        Migration(table="people", version=5, operations=[op.DropColumns("old")]),
        Migration(table="people", version=6, operations=[op.RenameColumns({"name": "title"})]),
        Migration(table="notes", version=1, operations=[op.CreateTable(NOTES)]),
        Migration(
            table="notes",
            version=3,
            up=seed_notes,
            touches=("notes", "people"),
            depends_on={"people": 2},
        ),
        Migration(table="notes", version=4, operations=[op.RenameColumns({"a": "b", "b": "a"})]),
        Migration(
            table="notes",
            version=5,
            operations=[
                op.DropColumns("extra"),
                op.AddColumns({"extra": pa.string()}),
                op.CreateIndex("person"),
                op.SetNullable("id"),
            ],
        ),
        Migration(
            line="indexes",
            version=6,
            touches=("people", "notes"),
            operations=[
                op.CreateIndex("age", table="people"),
                op.CreateIndex("tag", table="people", kind="Bitmap"),
                op.DropIndex("person", table="notes"),
            ],
        ),
        Migration(
            table="log",
            version=1,
            operations=[op.CreateTable(pa.schema([pa.field("x", pa.int64())]))],
        ),
        Migration(table="log", version=2, operations=[op.AddColumns({"y": pa.list_(pa.int32())})]),
    ]


def few_migrations() -> list[Migration]:
    """Returns a smaller set, for where each request takes long: 4 migrations on 2 lines."""
    first = {("people", 1), ("people", 2), ("notes", 1)}
    return [
        *(m for m in migrations() if (m.name, m.version) in first),
        Migration(
            table="people",
            version=3,
            operations=[op.AddColumns({"n": pa.int64()}), op.Update(sql={"age": "age + 1"})],
        ),
    ]


async def snapshot(
    uri: str | Path,
    ledger: str = "table_migrations",
    storage_options: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Returns everything that must be equal after a disturbed and an undisturbed run."""
    db = await lancedb.connect_async(uri, storage_options=storage_options)
    store = Store(db, uri=str(uri))
    result: dict[str, Any] = {}
    tables = {}
    for name in await store.table_names():
        if name.startswith(ledger):
            continue
        table = await store.find(name)
        if table is None:
            tables[name] = "ghost"
            continue
        state = await table.state()
        rows = [
            json.dumps(r, default=str, sort_keys=True) for r in (await table.read()).to_pylist()
        ]
        tables[name] = {
            "shape": state.shape(),
            "witnesses": state.witnesses(),
            "rows": sorted(rows),
            "branches": len(await table.branches()),
        }
    result["tables"] = tables
    book = Ledger(store, ledger, clock=Clock(), log=None)
    head = await book.read_head()
    result["head"] = sorted((r.name, r.version, r.digest) for r in head.rows)
    result["leases"] = sorted(head.leases)
    result["held"] = [row.owner for row in head.leases.values() if row.owner]
    journal = fold(await book.read_journal())
    result["journal"] = {
        name: (line.current, sorted((v, a.checksum) for v, a in line.applied.items()),
               line.unfinished is not None)
        for name, line in journal.lines.items()
    }  # fmt: skip
    assert LEASE_PREFIX + "run" not in [r.name for r in head.rows]
    return result


async def applied_counts(uri: str | Path) -> dict[tuple[str, int], int]:
    """Returns how often the valid journal says each migration was applied."""
    store = Store(await lancedb.connect_async(uri), uri=str(uri))
    events = fold(await Ledger(store, "table_migrations", clock=Clock(), log=None).read_journal())
    counts: dict[tuple[str, int], int] = {}
    for event in events.events:
        if event.kind == "applied":
            key = (event.line or "", event.version or 0)
            counts[key] = counts.get(key, 0) + 1
    return counts
