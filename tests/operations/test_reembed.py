"""Re-embedding: another model for a table in use, with real lexical embedders."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections import Counter
from collections.abc import Sequence
from functools import cache
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
from lancedb.embeddings import EmbeddingFunctionConfig, TextEmbeddingFunction, register
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer

from aiomigrate import Migration, MigrationFailedError, Report, op
from aiomigrate.errors import OperationError
from aiomigrate.operations.quality_gate import Gate, Sample, judge
from tests.tools import TABLE, found, manager, rows_of

PACE = op.Pace(batch_rows=25, concurrency=4, chunk_rows=100, attempts=1)
OLD, NEW = 64, 96


@cache
def texts() -> list[str]:
    """Returns paragraphs of the language's own documentation."""
    found: list[str] = []
    for topic in sorted(pydoc_data.topics.topics):
        parts = pydoc_data.topics.topics[topic].split("\n\n")
        found += [" ".join(part.split()) for part in parts if len(part) > 60]
    return list(dict.fromkeys(found))


@cache
def _tfidf() -> Any:
    words = TfidfVectorizer(sublinear_tf=True)
    svd = TruncatedSVD(NEW, random_state=0)
    svd.fit(words.fit_transform(texts()))
    return lambda given: svd.transform(words.transform(given)).astype(np.float32)


def old_vectors(given: Sequence[str]) -> np.ndarray[Any, Any]:
    """Embeds by hashing words: the old model."""
    return HashingVectorizer(n_features=OLD, alternate_sign=False).transform(given).toarray()


def new_vectors(given: Sequence[str]) -> np.ndarray[Any, Any]:
    """Embeds by TF-IDF and SVD: the new model."""
    made: np.ndarray[Any, Any] = _tfidf()(given)
    return made


class Model:
    """The new model as a service that counts what it is paid for."""

    def __init__(self, embed: Any = new_vectors) -> None:
        self.paid: Counter[str] = Counter()
        self.embed = embed

    async def __call__(self, given: list[str]) -> Any:
        await anyio.sleep(0.002)
        self.paid.update(given)
        return self.embed(given)


SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64()),
        pa.field("text", pa.string()),
        pa.field("vector", pa.list_(pa.float32(), OLD), nullable=False),
    ]
)


async def library(
    database: Path, count: int, *, index: bool = False, extra: Sequence[str | None] = ()
) -> lancedb.AsyncTable:
    """Makes a table of paragraphs with vectors of the old model."""
    given: list[str | None] = [*texts()[:count], *extra]
    vectors = old_vectors([text or "" for text in given])
    flat = pa.array(vectors.reshape(-1), pa.float32())
    rows = pa.Table.from_arrays(
        [
            pa.array(range(len(given))),
            pa.array(given),
            pa.FixedSizeListArray.from_arrays(flat, OLD),
        ],
        schema=SCHEMA,
    )
    table = await (await lancedb.connect_async(database)).create_table(TABLE, rows)
    if index:
        config = lancedb.index.IvfFlat(distance_type="cosine", num_partitions=2)
        await table.create_index("vector", config=config)
    return table


def change(function: Any, **options: Any) -> list[Migration]:
    """Returns a migration to the new model."""
    told: dict[str, Any] = {
        "source": "text", "function": function, "dimension": NEW, "model": "tfidf@1", "key": "id",
        "pace": PACE, "gate": op.Gate(max_zero=0.1), **options,
    }  # fmt: skip
    return [Migration(table=TABLE, version=1, operations=[op.Reembed(**told)])]


async def upgrade(database: Path, migrations: Sequence[Migration]) -> Report:
    """Upgrades."""
    async with manager(database, migrations) as migrating:
        return await migrating.upgrade()


def right(rows: Sequence[dict[str, Any]]) -> bool:
    """Returns whether all rows have the vector of their text by the new model."""
    have = np.array([row["vector"] for row in rows])
    return bool(np.allclose(have, new_vectors([row["text"] for row in rows]), atol=1e-4))


async def answers(table: lancedb.AsyncTable, vector: Any, column: str = "vector") -> list[int]:
    """Returns what a search finds."""
    await table.checkout_latest()
    query = table.query().nearest_to(vector).column(column).limit(5)
    return [row["id"] for row in await query.to_list()]


async def test_a_table_gets_another_model(database: Path) -> None:
    """Vectors, index, identity of the model; the old column is kept, and undone by a swap."""
    table = await library(database, 400, index=True)
    ask = old_vectors([texts()[7]])[0]
    before = await answers(table, ask)
    model = Model()
    async with manager(database, change(model)) as migrating:
        report = await migrating.upgrade()
        rows = await rows_of(database)
        state, _ = await found(database)
        after = await answers(table, new_vectors([texts()[7]])[0])
        begun = anyio.current_time()
        await migrating.rollback(TABLE)
        took = anyio.current_time() - begun
        back = await answers(table, ask)
        schema = await table.schema()
        indexes = [(i.index_type, i.columns) for i in await table.list_indices()]

    assert right(rows)
    assert state is not None
    assert state.witnesses() == []
    assert state.column("vector").metadata == {b"aiomigrate:model": b"tfidf@1"}
    assert sorted(map(str, state.indexes)) == ["IvfFlat vector", "IvfFlat vector_old"]
    made = next(i for i in state.indexes if i.columns == ("vector",))
    assert made.options["distance_type"] == "cosine"
    assert after[0] == 7
    assert report.steps[0].told[TABLE]["gate"]["failures"] == []
    assert back == before
    assert took < 2
    assert schema.equals(SCHEMA)
    assert indexes == [("IvfFlat", ["vector"])]


async def test_an_empty_table_changes_its_model_at_once(database: Path) -> None:
    """A fresh database goes through the same migrations; only known texts are embedded."""
    connection = await lancedb.connect_async(database)
    await connection.create_table(TABLE, schema=SCHEMA)
    model = Model()
    await upgrade(database, change(model))
    state, _ = await found(database)
    assert state is not None
    assert state.column("vector").type == pa.list_(pa.float32(), NEW)
    assert len(model.paid) == 3


async def test_equal_texts_are_paid_once(database: Path) -> None:
    """Each different text is embedded once, with a handful of known ones; NULL not at all."""
    await library(database, 50, extra=[*texts()[:50], None, *texts()[:50]])
    model = Model()
    await upgrade(database, change(model))
    rows = await rows_of(database)
    assert right([row for row in rows if row["text"] is not None])
    assert [row["vector"] for row in rows if row["text"] is None] == [None]
    assert {model.paid[text] for text in texts()[:50]} == {1}
    assert sum(model.paid.values()) <= 50 + 5


async def test_the_plan_says_what_it_costs(database: Path) -> None:
    """Texts, characters, bytes and disk are told before anything is paid for."""
    await library(database, 30, extra=texts()[:10])
    async with manager(database, change(Model())) as migrating:
        plan = str(await migrating.plan())
    characters = sum(map(len, texts()[:30]))
    assert f"40 rows; 30 distinct sources with {characters} characters to embed" in plan
    assert "15.4 kB of vectors to write, and an index" in plan
    assert "code that searches with vectors of the old model" in plan


async def test_a_full_disk_is_told_before(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is paid for, and nothing written, that the disk has no room for."""
    await library(database, 30)
    model = Model()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 1000}))
    with pytest.raises(
        MigrationFailedError, match=r"it needs up to .* of disk space; 1.0 kB are free"
    ):
        await upgrade(database, change(model))
    monkeypatch.undo()
    assert not set(model.paid) & set(texts())
    state, _ = await found(database)
    assert state is not None
    assert state.schema.names == SCHEMA.names


async def test_goes_on_after_cancellation(database: Path) -> None:
    """Nothing is embedded twice but the known texts."""
    await library(database, 600)
    model = Model()
    async with manager(database, change(model)) as migrating:
        async with anyio.create_task_group() as group:
            group.start_soon(migrating.upgrade)
            while sum(model.paid.values()) < 200:  # noqa: ASYNC110 - a model sets no events
                await anyio.sleep(0.001)
            group.cancel_scope.cancel()
        await migrating.upgrade()
    assert right(await rows_of(database))
    assert {model.paid[text] for text in texts()[:600]} == {1}


async def test_another_model_behind_the_name_is_caught(database: Path) -> None:
    """Two models never mix in one column: the first one must come back, or another name."""
    await library(database, 300)
    model = Model()
    calls = 0

    async def dies(given: list[str]) -> Any:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise RuntimeError("down")
        return await model(given)

    with pytest.raises(MigrationFailedError, match="fails for every row"):
        await upgrade(database, change(dies))
    paid = Counter(model.paid)

    def other(given: list[str]) -> Any:
        return new_vectors([text[::-1] for text in given])

    with pytest.raises(MigrationFailedError, match="another model has the same name"):
        await upgrade(database, change(other))
    await upgrade(database, change(model))
    assert right(await rows_of(database))
    assert sum(model.paid.values()) <= 300 + 3 * 3
    assert sum(paid.values()) > 50


async def test_a_corrected_model_name_starts_afresh(database: Path) -> None:
    """Under another name all rows are embedded anew, and nothing of the first attempt stays."""
    await library(database, 120)
    gate = op.Gate(min_overlap=1.0)
    with pytest.raises(MigrationFailedError, match="min_overlap=1"):
        await upgrade(database, change(Model(), gate=gate))
    model = Model(lambda given: new_vectors(given)[:, :32])
    await upgrade(database, change(model, dimension=32, model="tfidf@2"))
    state, _ = await found(database)
    assert state is not None
    assert sorted(state.schema.names) == ["id", "text", "vector", "vector_old"]
    assert set(texts()[:120]) <= set(model.paid)


BAD: dict[str, tuple[Any, str]] = {
    "one vector for all": (
        lambda given: np.ones((len(given), NEW)),
        "have the vector of another source",
    ),
    "noise": (
        lambda given: np.random.default_rng(len(given[0])).normal(size=(len(given), NEW)),
        "nearest rows are the same",
    ),
    "zeros": (lambda given: np.zeros((len(given), NEW)), "vectors are zero"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_model_is_stopped_by_the_gate(database: Path, case: str) -> None:
    """The old vectors stay in use; with other thresholds it goes on without paying again."""
    embed, message = BAD[case]
    table = await library(database, 400)
    before = await answers(table, old_vectors([texts()[7]])[0])
    model = Model(embed)
    probed = change(model, probes=()) if case != "noise" else change(model, probes=("x",))
    with pytest.raises(MigrationFailedError, match=message) as failed:
        await upgrade(database, probed)
    assert "The old vectors stay in use" in str(failed.value)
    assert await answers(table, old_vectors([texts()[7]])[0]) == before
    lax = op.Gate(min_overlap=0, max_zero=1, max_duplicates=1)
    relaxed = change(model, gate=lax, probes=("x",) if case == "noise" else ())
    await upgrade(database, relaxed)
    assert {model.paid[text] for text in texts()[:400]} == {1}


async def test_the_same_dimension_is_refused(database: Path) -> None:
    """Searches that name no column would fail; told with the way to do it."""
    await library(database, 50)
    model = Model(lambda given: new_vectors(given)[:, :OLD])
    with pytest.raises(OperationError, match=r"every search that does not name its column fails"):
        await upgrade(database, change(model, dimension=OLD))
    await upgrade(database, change(model, dimension=OLD, readers_name_column=True))
    assert set(texts()[:50]) <= set(model.paid)


@register("aiomigrate-test-old")
class OldFunction(TextEmbeddingFunction):
    """The old model as lancedb's own kind of function."""

    def ndims(self) -> int:
        return OLD

    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> Any:
        return [list(vector) for vector in old_vectors(list(texts))]


@register("aiomigrate-test-new")
class NewFunction(TextEmbeddingFunction):
    """The new model as lancedb's own kind of function."""

    def ndims(self) -> int:
        return NEW

    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> Any:
        return [list(vector) for vector in new_vectors(list(texts))]


@pytest.mark.parametrize("own", [True, False])
async def test_embedding_functions_of_the_table_follow(database: Path, own: bool) -> None:
    """After the swap `add` never uses the old model: the new one if it is lancedb's, else none."""
    config = EmbeddingFunctionConfig(
        source_column="text", vector_column="vector", function=OldFunction.create()
    )
    connection = await lancedb.connect_async(database)
    schema = pa.schema([*list(SCHEMA)[:2], pa.field("vector", pa.list_(pa.float32(), OLD))])
    table = await connection.create_table(TABLE, schema=schema, embedding_functions=[config])
    await table.add([{"id": n, "text": text} for n, text in enumerate(texts()[:60])])
    function = NewFunction.create() if own else Model()
    async with manager(database, change(function)) as migrating:
        await migrating.upgrade()
        table = await connection.open_table(TABLE)
        await table.add([{"id": 100, "text": texts()[100]}])
        rows = {row["id"]: row for row in await rows_of(database)}
        await migrating.rollback(TABLE)
        table = await connection.open_table(TABLE)
        await table.add([{"id": 101, "text": texts()[101]}])
        back = {row["id"]: row for row in await rows_of(database)}

    assert right([row for n, row in rows.items() if n < 100 or own])
    assert own or rows[100]["vector"] is None
    assert np.allclose(back[101]["vector"], old_vectors([texts()[101]])[0], atol=1e-4)
    told = json.loads((await table.schema()).metadata[b"embedding_functions"])
    assert [one["name"] for one in told] == ["aiomigrate-test-old"]


async def test_the_old_column_goes_with_a_contracting_migration(database: Path) -> None:
    """The usual end: a later release drops what was kept, savepoints too."""
    table = await library(database, 60)
    steps = [
        *change(Model()),
        Migration(
            table=TABLE, version=2, contracts={TABLE: 1},
            operations=[op.DropColumns("vector_old")],
        ),
    ]  # fmt: skip
    await upgrade(database, steps)
    await table.checkout_latest()
    assert (await table.schema()).names == ["id", "text", "vector"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no vector": ({"column": "text", "source": "id"}, "is string, not a vector"),
    "no such column": ({"source": "body"}, "no column 'body'"),
    "no such key": ({"key": "uid"}, "no column 'uid'"),
    "kept under a name that is taken": ({"keep": "text"}, "column 'text' exists already"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_is_told_before(database: Path, case: str) -> None:
    """Before a single text is paid for."""
    options, message = REFUSED[case]
    await library(database, 5)
    model = Model()
    with pytest.raises(OperationError, match=message):
        await upgrade(database, change(model, **options))
    assert not model.paid


vectors = st.lists(st.floats(-1, 1), min_size=2, max_size=2)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(vectors, st.integers(0, 3), st.lists(st.integers(0, 9), max_size=4)),
             max_size=12),
    st.integers(0, 20),
    st.floats(0, 1),
)  # fmt: skip
def test_the_gate_is_fair(drawn: list[Any], missing: int, overlap: float) -> None:
    """Shares are shares; it fails exactly where a measure is beyond its threshold."""
    samples = [
        Sample(key=n, source=source, vector=vector, old=sorted(set(near)), new=near)
        for n, (vector, source, near) in enumerate(drawn)
    ]
    gate = Gate(min_overlap=overlap)
    report = judge(gate, rows=20, missing=missing, samples=samples)
    shares = [report.missing, report.zero, report.duplicates, report.overlap or 0.0]
    assert all(0 <= share <= 1 for share in shares)
    assert report.overlap in (None, 1.0)
    beyond = [
        report.missing > gate.max_missing, report.zero > gate.max_zero,
        report.duplicates > gate.max_duplicates,
    ]  # fmt: skip
    assert len(report.failures) == sum(beyond)
    assert report.passed is not any(beyond)
    json.dumps(report.to_dict())
