"""Migrations that a process of release 0.1.0 was killed in. Never edit them: archives hold them.

`tests/data/make_killed.py` has run them up to their kill, and the databases it left are in
`tests/data/killed/`. The next run, of any later release, needs the same migrations. Imported by
processes of that release too: only what it has may be imported here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lancedb
import pyarrow as pa

from aiomigrate import Context, Migration, op

TABLE = "things"
ROWS = 300
DIMENSION = 4

THINGS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("n", pa.int64()),
        pa.field("a", pa.string()),
        pa.field("b", pa.string()),
        pa.field("text", pa.string()),
        pa.field("vector", pa.list_(pa.float32(), DIMENSION)),
    ]
)
FIRST_ROWS = [
    {
        "id": f"r{n:03}",
        "n": n,
        "a": f"a{n}",
        "b": f"b{n}",
        "text": f"text {n % 40} 三" if n % 50 else None,
        "vector": [float(n % 7), float(n % 11), float(n % 13), 1.0],
    }
    for n in range(ROWS)
]


class Deadly:
    """Kills this process in a function of a migration, once the database is as it is to be.

    Attributes:
        database: The database, empty while nobody is to be killed.
        where: SQL condition on the rows of the table: one of them is enough.
    """

    database = ""
    where = ""


async def reached() -> None:
    """Kills this process where it is to be killed, and a row is committed that is waited for."""
    if not Deadly.database:
        return
    connection = await lancedb.connect_async(Deadly.database)
    table = await connection.open_table(TABLE)
    if await table.count_rows(Deadly.where):
        os.kill(os.getpid(), signal.SIGKILL)


async def doubled(batch: pa.RecordBatch) -> list[int | None]:
    """Returns twice the number of each row."""
    await reached()
    return [2 * n for n in batch["n"].to_pylist()]


async def renumbered(context: Context) -> None:
    """Sets the numbers of the rows anew, in three commits; idempotent only from where it began."""
    table = context.table()
    await table.update(sql={"n": "n + 1"}, where="id < 'r100'")
    await table.update(sql={"n": "n + 1"}, where="id < 'r200'")
    await table.add([{"id": "more", "n": 1}])


def joined(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Makes one column of two, and doubles the rows of a number."""
    rows = [
        {"id": f"{row['id']}-{turn}", "n": row["n"], "ab": f"{row['a']}/{row['b']}"}
        for row in batch.to_pylist()
        for turn in range(2 if row["n"] % 100 == 7 else 1)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=JOINED)


JOINED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("n", pa.int64()),
        pa.field("ab", pa.string()),
    ]
)


def embed(texts: Sequence[str]) -> list[list[float]]:
    """Returns a vector for each text."""
    return [[float(len(text)), float(sum(map(ord, text)) % 97), *[0.5] * 6] for text in texts]


PACE = op.Pace(batch_rows=10, concurrency=1, chunk_rows=50)


@dataclass(frozen=True, kw_only=True)
class Killed:
    """A run that was killed.

    Attributes:
        last: The operations of the last migration; it is version 3 of the line `things`.
        second: More operations of the migration before it.
        does: The method of the manager that was killed.
        verb: A method of `lancedb.AsyncTable`: killed at its call on `things`.
        at: At the n-th such call, from 1.
        when: `before` or `after` the call took effect.
        where: Killed in a function instead, once a row of `things` is like that.
        background: Whether the last migration runs in the background.
        up: The function of the last migration, instead of operations.
        lease: The lease that the killed process held.
    """

    last: Sequence[op.Operation] = ()
    second: Sequence[op.Operation] = ()
    does: str = "upgrade"
    verb: str = ""
    at: int = 1
    when: str = "after"
    where: str = ""
    background: bool = False
    up: Any = None
    lease: str = field(default="run")

    @property
    def is_undoing(self) -> bool:
        """Whether it was killed in a rollback."""
        return self.does == "rollback"

    def migrations(self) -> list[Migration]:
        """Returns the migrations of the line `things`."""
        return [
            Migration(table=TABLE, version=1, operations=[op.CreateTable(THINGS, rows=FIRST_ROWS)]),
            Migration(
                table=TABLE,
                version=2,
                operations=[
                    op.CreateIndex("n"),
                    op.CreateIndex("vector", kind="IvfFlat"),
                    *self.second,
                ],
            ),
            Migration(
                table=TABLE,
                version=3,
                description="Killed",
                operations=self.last,
                up=self.up,
                background=self.background,
            ),
        ]


BEFORE = 2
"""The version before the last migration."""

_FILL = (op.AddColumns({"m": pa.int64()}), op.Backfill("m", doubled, key="id", pace=PACE))
_SWAP = op.RenameColumns({"a": "b", "b": "a"})

KILLED = {
    "update": Killed(
        last=[
            op.AddColumns({"score": pa.int64()}),
            op.Update(sql={"n": "n + 1"}, where="n >= 20", batch_rows=60),
            op.CreateIndex("score"),
        ],
        verb="update",
        at=2,
    ),
    "rebuild": Killed(last=[op.Rebuild(joined, schema=JOINED)], verb="create_index", when="before"),
    "backfill": Killed(last=_FILL, where="m IS NOT NULL"),
    "reembed": Killed(
        last=[
            op.Reembed(
                source="text",
                function=embed,
                dimension=8,
                model="tiny@2",
                key="id",
                gate=op.Gate(min_overlap=0, max_duplicates=1, max_zero=1),
                pace=PACE,
            )
        ],
        verb="create_index",
        at=2,
    ),
    "alter_type": Killed(
        last=[op.AlterType({"n": pa.string(), "a": pa.large_string()})], verb="alter_columns", at=2
    ),
    "rename_table": Killed(
        last=[op.AddColumns({"x": pa.int64()}), op.RenameTable("items")], verb="add_columns"
    ),
    "function": Killed(up=renumbered, verb="update", at=2),
    "rollback_by_inverses": Killed(
        last=[_SWAP, op.AddColumns({"x": pa.int64()}), op.CreateIndex("id")],
        does="rollback",
        verb="alter_columns",
    ),
    "rollback_by_savepoint": Killed(
        second=[op.CreateTable(JOINED, rows=[{"id": "a", "n": 1}], table="archive")],
        last=[
            op.Update(sql={"n": "n * 2"}, where="n > 10"),
            op.Update(sql={"n": "n * 2"}, table="archive"),
        ],
        does="rollback",
        verb="restore",
        when="before",
    ),
    "background": Killed(
        last=_FILL, does="run_background", where="m IS NOT NULL", background=True,
        lease="background",
    ),
}  # fmt: skip
"""By the name of the archive."""
