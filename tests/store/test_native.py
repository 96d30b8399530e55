"""Every name of lancedb that is not exported and yet used, by `store._native` alone."""

from __future__ import annotations

import re
from pathlib import Path

import lancedb
import lancedb.index
import pyarrow as pa
import pytest
from lancedb.embeddings import EmbeddingFunction, get_registry
from lancedb.merge import LanceMergeInsertBuilder

import aiomigrate
from aiomigrate.schema.index import KINDS, config_name
from aiomigrate.store import _native

PACKAGE = Path(aiomigrate.__file__).parent
SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("text", pa.string())])


async def made(folder: Path) -> tuple[lancedb.AsyncConnection, lancedb.AsyncTable]:
    """Returns a connection, and a table of two rows made past lancedb's Python half."""
    connection = await lancedb.connect_async(str(folder))
    rows = pa.table({"id": [1, 2], "text": ["a", "b"]}, SCHEMA)
    table = await _native.create_table(connection, "things", "create", rows.to_reader())
    return connection, table


async def test_the_native_calls_exist_and_do_what_they_say(tmp_path: Path) -> None:
    """A release of lancedb that renames or drops a native call fails here, by its name."""
    connection, table = await made(tmp_path / "db")

    for owner, names in (
        (connection._inner, ("create_table",)),
        (table._inner, ("add", "execute_merge_insert")),
    ):
        missing = [name for name in names if not hasattr(owner, name)]
        assert missing == [], f"lancedb {lancedb.__version__} has no {missing} on {type(owner)}"
    appended = await _native.append(table, pa.table({"id": [3], "text": [None]}, SCHEMA))
    builder = table.merge_insert("id").when_matched_update_all()
    merged = await _native.merge(table, builder, pa.table({"id": [3], "text": ["c"]}, SCHEMA))

    assert appended.version == 2
    assert (merged.version, merged.num_updated_rows) == (3, 1)
    assert sorted((await table.to_arrow()).column("text").to_pylist()) == ["a", "b", "c"]


async def test_a_merge_hands_on_all_that_its_builder_was_told(tmp_path: Path) -> None:
    """The builder keeps no parameter that is not handed on, and the parameters have their names."""
    _, table = await made(tmp_path / "db")
    builder = table.merge_insert("id").when_matched_update_all(where="target.id > 1")
    builder = builder.when_not_matched_insert_all().when_not_matched_by_source_delete("id = 1")

    kept = {name[1:] for name in vars(builder) if name.startswith("_")} - {"table"}

    assert isinstance(builder, LanceMergeInsertBuilder)
    assert kept <= set(_native.MERGE_PARAMETERS), kept - set(_native.MERGE_PARAMETERS)


async def test_an_index_reports_its_parameters(tmp_path: Path) -> None:
    """`list_indices()` gives the attributes by which an index is recognised."""
    _, table = await made(tmp_path / "db")
    await table.create_index("text", config=_native.config_class("FTS")())
    (config,) = await table.list_indices()

    assert {
        name for name in ("index_type", "columns", "name") if not hasattr(config, name)
    } == set()
    assert "base_tokenizer" in _native.index_details(config)


def test_embedding_functions_have_what_a_re_embedding_asks_of_them() -> None:
    """`operations.quality_gate` reads these of the user's object, which may be lancedb's."""
    registered = get_registry().get("openai")

    assert callable(EmbeddingFunction.compute_source_embeddings)
    assert callable(EmbeddingFunction.safe_model_dump)
    assert registered.__embedding_function_registry_alias__ == "openai"


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_class_is_there_for_each_kind_of_index(kind: str) -> None:
    """Kinds of index are named as lancedb's configuration classes are."""
    assert _native.config_class(config_name(kind)).__module__ == lancedb.index.__name__


def test_nothing_private_is_used_elsewhere() -> None:
    """`_inner`, attributes by name, and what lancedb does not export are used in one module."""
    private = re.compile(r"\._inner\b|from lancedb\.|\bgetattr\(")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in (PACKAGE / "store").glob("*.py")
        if path.name != "_native.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if private.search(line)
    ]

    assert found == []
