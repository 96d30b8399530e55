"""Backfill: every row right, nothing paid twice, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import lancedb
import lancedb.index
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiomigrate import Context, Migration, MigrationFailedError, Report, op
from aiomigrate.backfill.caller import as_array
from aiomigrate.backfill.rows import Chunks
from aiomigrate.errors import (
    BackfillBehindError,
    KeepsProgressError,
    ModelChangedError,
    PoisonRowsError,
    QualityGateError,
)
from aiomigrate.schema.digests import digest, digests
from tests.tools import SEED, TABLE, found, make, manager, rows_of

TEXTS = pa.schema([pa.field("id", pa.int64()), pa.field("text", pa.string())])
VECTOR = pa.list_(pa.float32(), 4)
PACE = op.Pace(batch_rows=10, concurrency=3, chunk_rows=50, attempts=1)


def vector(text: str | None) -> list[float]:
    """Returns the right vector of a text."""
    code = zlib.crc32((text or "").encode())
    return [float(code >> shift & 0xFF) for shift in (0, 8, 16, 24)]


class Model:
    """A model that counts what it is paid for."""

    def __init__(self) -> None:
        self.texts: Counter[str | None] = Counter()
        self.calls = 0
        self.flying = 0
        self.most = 0
        self.fails: set[str] = set()
        self.down = False

    async def embed(self, batch: pa.RecordBatch) -> Any:
        """Embeds a batch."""
        self.calls += 1
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            await anyio.sleep(0.002)
            texts = batch["text"].to_pylist()
            if self.down or self.fails & set(texts):
                raise RuntimeError("cannot embed")
            self.texts.update(texts)
            return [vector(text) for text in texts]
        finally:
            self.flying -= 1

    async def reached(self, paid: int) -> None:
        """Waits until so many texts were embedded."""
        while self.paid < paid:  # noqa: ASYNC110 - the function under test sets no events
            await anyio.sleep(0.001)

    @property
    def paid(self) -> int:
        """How many texts were embedded."""
        return sum(self.texts.values())


def texts(count: int) -> list[dict[str, Any]]:
    """Returns rows."""
    return [{"id": n, "text": f"text {n}"} for n in range(count)]


def filling(function: Any, **options: Any) -> list[Migration]:
    """Returns a migration that adds a vector and fills it."""
    given = {"key": "id", "source": "text", "pace": PACE, **options}
    fill = op.Backfill("vector", function, **given)
    return [
        Migration(
            table=TABLE,
            version=1,
            operations=lambda _: [op.AddColumns({"vector": VECTOR}), fill],
        )
    ]


async def upgrade(database: Path, migrations: Sequence[Migration], **options: Any) -> Report:
    """Upgrades."""
    async with manager(database, migrations, **options) as migrating:
        return await migrating.upgrade()


async def check(database: Path, count: int) -> None:
    """Checks that all rows are there, each with its right vector, and nothing of ours."""
    rows = await rows_of(database)
    assert len(rows) == count
    assert [row for row in rows if row["vector"] != vector(row["text"])] == []
    state, _ = await found(database)
    assert state is not None
    assert state.witnesses() == []


async def test_fills_every_row_with_calls_in_flight(database: Path) -> None:
    """Each text is paid for once, several calls at a time, in few commits; nothing stays."""
    await make(database, TEXTS, texts(500))
    model = Model()
    report = await upgrade(database, filling(model.embed))

    await check(database, 500)
    assert (model.paid, model.most) == (500, 3)
    assert report.steps[0].rows == 500
    assert report.steps[0].commits <= 4 + 10 + 10 // 5  # chunks, and the index anew
    state, _ = await found(database)
    assert state is not None
    assert state.indexes == ()


async def test_a_plain_function_runs_in_threads(database: Path) -> None:
    """A function that blocks does not block the event loop; numpy arrays are taken."""
    await make(database, TEXTS, texts(200))
    beats = 0

    def embed(batch: pa.RecordBatch) -> Any:
        anyio.from_thread.check_cancelled()
        return np.array([vector(t) for t in batch["text"].to_pylist()], np.float64)

    async def beat() -> None:
        nonlocal beats
        while True:
            await anyio.sleep(0.001)
            beats += 1

    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        await upgrade(database, filling(embed))
        group.cancel_scope.cancel()

    await check(database, 200)
    assert beats > 10


async def test_goes_on_after_cancellation(database: Path) -> None:
    """What was paid for is committed: the rest is at most what was not yet called for."""
    await make(database, TEXTS, texts(600))
    model = Model()
    async with manager(database, filling(model.embed)) as migrating:
        async with anyio.create_task_group() as group:
            group.start_soon(migrating.upgrade)
            await model.reached(150)
            group.cancel_scope.cancel()
        paid = model.paid
        assert 150 <= paid < 600
        status = await migrating.get_status()
        assert status.lines[TABLE].current == 0
        await migrating.upgrade()

    await check(database, 600)
    assert model.paid == 600  # not one text twice


async def test_goes_on_after_a_failure(database: Path) -> None:
    """A model that goes down fails the migration, with everything kept; unchanged it goes on."""
    await make(database, TEXTS, texts(600))
    model = Model()

    async def embed(batch: pa.RecordBatch) -> Any:
        model.down = model.paid >= 200
        return await model.embed(batch)

    migrations = filling(embed)
    with pytest.raises(MigrationFailedError, match=r"fails for every row.*cannot embed") as failed:
        await upgrade(database, migrations)
    assert "rows that are filled stay filled" in str(failed.value)
    assert model.calls < 150  # it did not try every row by itself
    paid = model.paid
    model.down = False
    with contextlib.suppress(MigrationFailedError):
        await upgrade(database, filling(model.embed))

    await check(database, 600)
    assert model.paid == 600
    assert paid >= 200


async def test_poison_rows_fail_it_at_the_end(database: Path) -> None:
    """The others are filled; a corrected script pays for the poison rows only."""
    await make(database, TEXTS, texts(300))
    model = Model()
    model.fails = {"text 7", "text 8", "text 250"}
    with pytest.raises(MigrationFailedError) as failed:
        await upgrade(database, filling(model.embed))

    assert "failed for 3 rows" in str(failed.value)
    assert "id=7: RuntimeError: cannot embed" in str(failed.value)
    assert model.paid == 297
    rows = {row["id"]: row["vector"] for row in await rows_of(database)}
    assert [key for key, value in rows.items() if value is None] == [7, 8, 250]
    model.fails.clear()
    corrected = [
        Migration(
            table=TABLE,
            version=1,
            description="corrected",
            operations=lambda _: [
                *filling(model.embed)[0].resolve({}),
                op.SetMetadata("vector", {"model": "m"}),
            ],
        )
    ]
    await upgrade(database, corrected)
    await check(database, 300)
    assert model.paid == 300


async def test_a_function_that_applies_it_learns_the_rows(database: Path) -> None:
    """Within `up` the error carries keys and messages, and is one of those that keep progress."""
    await make(database, TEXTS, texts(30))
    model = Model()
    model.fails = {"text 7"}
    caught: list[PoisonRowsError] = []

    async def up(ctx: Context) -> None:
        await ctx.apply(op.AddColumns({"vector": VECTOR}))
        try:
            await ctx.apply(op.Backfill("vector", model.embed, key="id", source="text", pace=PACE))
        except PoisonRowsError as exc:
            caught.append(exc)

    await upgrade(database, [Migration(table=TABLE, version=1, up=up)])
    (error,) = caught
    assert (error.count, error.rows) == (1, (("7", "RuntimeError: cannot embed"),))
    kinds = (BackfillBehindError, ModelChangedError, PoisonRowsError, QualityGateError)
    assert all(issubclass(kind, KeepsProgressError) for kind in kinds)


async def test_poison_rows_are_listed(database: Path) -> None:
    """By that policy it is applied, and report and history name the rows."""
    await make(database, TEXTS, texts(100))
    model = Model()
    model.fails = {"text 7"}
    migrations = filling(model.embed, on_poison=op.OnPoison.LIST)
    async with manager(database, migrations) as migrating:
        report = await migrating.upgrade()
        history = await migrating.history(TABLE)

    told = {"rows": 1, "listed": [["7", "RuntimeError: cannot embed"]]}
    assert report.steps[0].told[TABLE]["poison"] == told
    assert [e.detail["told"][TABLE]["poison"] for e in history if e.kind == "applied"] == [told]
    rows = {row["id"]: row["vector"] for row in await rows_of(database)}
    assert [key for key, value in rows.items() if value is None] == [7]


async def test_what_fails_now_and_then_is_tried_again(database: Path) -> None:
    """Transient failures cost retries, not rows."""
    await make(database, TEXTS, texts(200))
    model, chance = Model(), random.Random(SEED)

    async def embed(batch: pa.RecordBatch) -> Any:
        if chance.random() < 0.3:
            raise ConnectionError("reset")
        return await model.embed(batch)

    pace = op.Pace(batch_rows=10, concurrency=8, attempts=10)
    await upgrade(database, filling(embed, pace=pace))
    await check(database, 200)
    assert model.paid == 200


async def test_none_is_a_value(database: Path) -> None:
    """A row for which the function returns nothing is done, and not asked for again."""
    await make(database, TEXTS, texts(60))
    asked: Counter[int] = Counter()

    async def even(batch: pa.RecordBatch) -> Any:
        asked.update(batch["id"].to_pylist())
        return [None if n % 2 else vector(f"text {n}") for n in batch["id"].to_pylist()]

    await upgrade(database, filling(even, source=("id", "text")))
    rows = {row["id"]: row["vector"] for row in await rows_of(database)}
    assert [n for n, value in rows.items() if value is None] == [n for n in rows if n % 2]
    assert set(asked.values()) == {1}


async def test_calls_are_limited(database: Path) -> None:
    """No more calls begin per second than asked, after a first second's worth."""
    await make(database, TEXTS, texts(300))
    model = Model()
    begun = anyio.current_time()
    pace = op.Pace(batch_rows=10, concurrency=8, calls_per_s=20)
    await upgrade(database, filling(model.embed, pace=pace))
    assert model.calls == 30
    assert anyio.current_time() - begun >= 0.4


async def test_a_vector_with_nan_is_poison(database: Path) -> None:
    """LanceDB would refuse, or drop, what holds it; the rows around it are filled."""
    await make(database, TEXTS, texts(30))

    def embed(batch: pa.RecordBatch) -> Any:
        return [
            [float("nan")] * 4 if t == "text 3" else vector(t) for t in batch["text"].to_pylist()
        ]

    with pytest.raises(MigrationFailedError, match="id=3: ValueError: a vector with NaN"):
        await upgrade(database, filling(embed))
    rows = await rows_of(database)
    assert [row["id"] for row in rows if row["vector"] is None] == [3]


WRONG: dict[str, tuple[Any, str]] = {
    "too few": (lambda batch: [[0.0] * 4], "1 values for 10 rows"),
    "another dimension": (lambda batch: np.zeros((len(batch), 3)), "3 dimensions, not 4"),
    "another type": (lambda batch: ["x"] * len(batch), "did not return fixed_size_list"),
    "nothing": (lambda batch: None, "did not return fixed_size_list"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_is_no_result_is_told_at_once(database: Path, case: str) -> None:
    """A function that is wrong is not called again and again."""
    function, message = WRONG[case]
    calls = 0

    def counted(batch: pa.RecordBatch) -> Any:
        nonlocal calls
        calls += 1
        return function(batch)

    await make(database, TEXTS, texts(100))
    with pytest.raises(MigrationFailedError, match=message):
        await upgrade(database, filling(counted))
    assert calls <= 2 * PACE.concurrency


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "text": "a"}, {"id": 1, "text": "b"}], "1 rows share their 'id'"),
        ([{"id": None, "text": "a"}, {"id": 1, "text": "b"}], "1 rows have no 'id'"),
    ],
)
async def test_a_key_that_is_none_is_refused(
    database: Path, rows: list[dict[str, Any]], message: str
) -> None:
    """Rows that cannot be told apart would get each other's values."""
    await make(database, TEXTS, rows)
    model = Model()
    with pytest.raises(MigrationFailedError, match=message):
        await upgrade(database, filling(model.embed))
    assert model.calls == 0
    state, _ = await found(database)
    assert state is not None
    assert state.schema.names == TEXTS.names  # nothing was paid for, so it was undone


async def test_beside_a_writer(database: Path) -> None:
    """Rows added, changed and deleted meanwhile: all have the vector of what they now are."""
    await make(database, TEXTS, texts(2000))
    model, chance = Model(), random.Random(SEED)
    touched = 0
    running, stopped = True, anyio.Event()

    async def write() -> None:
        nonlocal touched
        table = await (await lancedb.connect_async(database)).open_table(TABLE)
        number = 10_000
        while running:
            await table.add([{"id": number, "text": f"new {number}"}])
            await table.update({"text": f"changed {number}"}, where=f"id = {chance.randrange(900)}")
            await table.delete(f"id = {1000 + chance.randrange(900)}")
            touched += 2
            number += 1
            await anyio.sleep(0.05)
        stopped.set()

    async def embed(batch: pa.RecordBatch) -> Any:
        nonlocal running
        if model.paid > 1500:
            running = False
            await stopped.wait()
        return await model.embed(batch)

    async with anyio.create_task_group() as group:
        group.start_soon(write)
        await upgrade(database, filling(embed))
    table = await (await lancedb.connect_async(database)).open_table(TABLE)
    await check(database, await table.count_rows())
    assert len({row["id"] for row in await rows_of(database)}) == await table.count_rows()
    assert touched >= 4
    assert model.paid <= 2000 + touched


async def test_an_empty_table_is_filled_at_once(database: Path) -> None:
    """A fresh database goes through the same migrations; nothing is called for nothing."""
    await make(database, TEXTS)
    model = Model()
    await upgrade(database, filling(model.embed))
    state, _ = await found(database)
    assert state is not None
    assert state.schema.names == ["id", "text", "vector"]
    assert model.calls == 0


async def test_rows_that_come_faster_than_they_are_filled_are_told(database: Path) -> None:
    """It says so instead of going on for ever, with what is filled kept."""
    await make(database, TEXTS, texts(40))
    model = Model()
    table = await (await lancedb.connect_async(database)).open_table(TABLE)
    number = 1000

    async def embed(batch: pa.RecordBatch) -> Any:
        nonlocal number
        rows = [{"id": number + n, "text": f"more {number + n}"} for n in range(len(batch))]
        number += len(rows)
        await table.add(rows)
        return await model.embed(batch)

    with pytest.raises(MigrationFailedError, match="other writers added or changed as many rows"):
        await upgrade(database, filling(embed))
    rows = await rows_of(database)
    assert sum(row["vector"] is not None for row in rows) >= 40


async def test_values_that_are_there_stay(database: Path) -> None:
    """Only what is NULL is filled, and only where `where` says."""
    schema = pa.schema([*TEXTS, pa.field("n", pa.int64())])
    rows = [{"id": n, "text": "x" * n, "n": 99 if n == 3 else None} for n in range(6)]
    await make(database, schema, rows)

    async def size(batch: pa.RecordBatch) -> Any:
        return [len(text) for text in batch["text"].to_pylist()]

    fill = op.Backfill("n", size, key="id", source="text", where="id > 1")
    await upgrade(database, [Migration(table=TABLE, version=1, operations=[fill])])
    have = {row["id"]: row["n"] for row in await rows_of(database)}
    assert have == {0: None, 1: None, 2: 2, 3: 99, 4: 4, 5: 5}


async def test_indexes_cover_afterwards(database: Path) -> None:
    """The key's own index, and others, cover every row again."""
    await make(database, TEXTS, texts(300), [("id", "BTree"), ("text", "FTS")])
    await upgrade(database, filling(Model().embed))
    table = await (await lancedb.connect_async(database)).open_table(TABLE)
    indexes = await table.list_indices()
    assert {(i.name, i.num_unindexed_rows) for i in indexes} == {("id_idx", 0), ("text_idx", 0)}


async def test_is_rolled_back_with_its_column(database: Path) -> None:
    """A column that the same migration added goes, in one commit, whatever was written since."""
    await make(database, TEXTS, texts(100))
    async with manager(database, filling(Model().embed)) as migrating:
        await migrating.upgrade()
        table = await (await lancedb.connect_async(database)).open_table(TABLE)
        await table.add([{"id": 1000, "text": "since"}])
        await migrating.rollback(TABLE)
    assert len(await rows_of(database)) == 101
    assert all(set(row) == {"id", "text"} for row in await rows_of(database))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), max_size=20), st.integers(1, 40))
def test_chunks_follow_fragments(fragments: list[tuple[int, int]], limit: int) -> None:
    """No chunk is over its limit, and a fragment within half of it is never cut."""
    chunks = Chunks(limit)
    rows: Counter[int] = Counter()
    of: dict[int, set[int]] = {}
    for fragment, (size, piece) in enumerate(fragments):
        left = size
        while left:
            taken = chunks.take(fragment, min(piece, left))
            if taken:
                rows[chunks.number] += taken
                of.setdefault(fragment, set()).add(chunks.number)
                left -= taken
    assert all(count <= limit for count in rows.values())
    for fragment, (size, _) in enumerate(fragments):
        if 2 * size <= limit:
            assert len(of[fragment]) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.none() | st.text(max_size=5), st.none() | st.integers(-5, 5))),
       st.integers(1, 5))  # fmt: skip
def test_digests_tell_rows_apart(rows: list[tuple[str | None, int | None]], cut: int) -> None:
    """Equal rows have equal digests, however they are cut; others have not."""
    batch = pa.record_batch(
        {"a": pa.array([a for a, _ in rows], pa.string()),
         "b": pa.array([b for _, b in rows], pa.int64())}
    )  # fmt: skip
    whole = digests(batch)
    pieces = [digests(batch.slice(n, cut)) for n in range(0, len(rows), cut)]
    assert [d for piece in pieces for d in piece] == whole
    assert len(set(whole)) == len(set(rows))
    assert digests(batch.select(["a"])) == [digest(a) for a, _ in rows]


def test_digests_of_vectors() -> None:
    """Vectors are told apart by their values, wherever their batch was cut."""
    values = [[1.0, 2.0], None, [1.0, None], [0.0, 0.0], [1.0, 0.0], [1.0, 3.0], [1.0, 2.0]]
    batch = pa.record_batch({"v": pa.array(values, pa.list_(pa.float32(), 2))})
    whole = digests(batch)
    assert whole[0] == whole[-1]
    assert len(set(whole)) == len(values) - 1
    assert [digests(batch.slice(n, 1))[0] for n in range(len(values))] == whole


def test_as_array_takes_what_functions_return() -> None:
    """Arrow and numpy arrays, lists, generators; cast to the column's type."""
    kind = pa.list_(pa.float32(), 2)
    want = pa.array([[1.0, 2.0]], kind)
    wide = pa.array([[1.0, 2.0]], pa.list_(pa.float64(), 2))
    returned: list[Any] = [
        [[1, 2]], np.array([[1, 2]]), iter([np.array([1.0, 2.0])]), want,
        pa.chunked_array([want]), wide,
    ]  # fmt: skip
    for result in returned:
        assert as_array(result, kind).equals(want)
    assert as_array([1, None], pa.int32()).to_pylist() == [1, None]
