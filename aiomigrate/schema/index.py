"""Kinds of index, their options, and the state of a table after one is built. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from aiomigrate.schema.state import Index, TableState, index_from_json

KINDS = (
    "BTree", "Bitmap", "LabelList", "FTS", "Fm",
    "IvfFlat", "IvfPq", "IvfSq", "IvfRq", "HnswPq", "HnswSq", "HnswFlat",
)  # fmt: skip
"""The kinds of index, as lancedb's configuration classes are named."""

_VECTOR_KINDS = frozenset(kind for kind in KINDS if kind.startswith(("Ivf", "Hnsw")))

REPORTED = {"HnswPq": "IvfHnswPq", "HnswSq": "IvfHnswSq", "HnswFlat": "IvfHnswFlat"}
"""The kinds that `list_indices()` reports under another name than that of their class."""

_FTS_OPTIONS = {
    "min_ngram_length": "ngram_min_length",
    "max_ngram_length": "ngram_max_length",
    **{name: name for name in (
        "base_tokenizer", "language", "with_position", "max_token_length", "lower_case", "stem",
        "remove_stop_words", "ascii_folding", "prefix_only", "custom_stop_words",
    )},
}  # fmt: skip
"""Options of an FTS index by the name under which LanceDB reports them."""


def config_name(kind: str) -> str:
    """Returns the name of lancedb's configuration class for a reported kind."""
    return next((name for name, reported in REPORTED.items() if reported == kind), kind)


def reported_options(details: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of an index, named as in lancedb's configuration classes.

    Args:
        details: The details that `list_indices()` reports: none for scalar indexes, and never the
            number of partitions (measured).
    """
    found = {
        _FTS_OPTIONS[name]: value
        for name, value in details.items()
        if name in _FTS_OPTIONS and value is not None
    }
    if "metric_type" in details:
        found["distance_type"] = str(details["metric_type"]).lower()
    packed = details.get("compression") or {}
    if packed.get("type") in ("pq", "rq"):
        found["num_bits"] = packed["num_bits"]
    if "num_sub_vectors" in packed:
        found["num_sub_vectors"] = packed["num_sub_vectors"]
    graph = details.get("hnsw") or {}
    for name, reported in (("m", "max_connections"), ("ef_construction", "construction_ef")):
        if reported in graph:
            found[name] = graph[reported]
    hints = details.get("runtime_hints") or {}
    for name, reported in (("max_iterations", "max_iters"), ("sample_rate", "sample_rate")):
        if f"lance.ivf.{reported}" in hints:
            found[name] = int(hints[f"lance.ivf.{reported}"])
    return found


def missing_indexes(state: TableState, memory: Mapping[str, Any]) -> list[Index]:
    """Returns the indexes that an operation stored and that the table does not have.

    Args:
        state: The table.
        memory: The value that the operation stored in its witness column (`schema.state.remember`).
    """
    wanted = [index_from_json(text) for text in memory.get("indexes", ())]
    return [index for index in wanted if index not in state.indexes]


def as_reported(index: Index) -> Index:
    """Returns an index with its kind as `list_indices()` names it."""
    named = REPORTED.get(index.kind)
    return index if named is None else replace(index, kind=named)


def with_index(state: TableState, index: Index) -> TableState:
    """Returns a table's state after LanceDB has built an index, with the name that LanceDB chooses.

    The name is that of the first column with `_idx` appended, and with a number if another index
    has that name. The new index replaces an index with that name on the same columns if both are of
    the same kind or both are vector indexes.

    Args:
        state: The state before.
        index: The index; its kind is one of `KINDS`.
    """
    made = as_reported(index)
    taken = {i.name: i for i in state.indexes}
    base = f"{index.columns[0]}_idx"
    for name in (base, *(f"{base}_{n}" for n in range(2, len(taken) + 3))):
        old = taken.get(name)
        is_replaced = (
            old is not None
            and old.columns == made.columns
            and (old.kind == made.kind or (_is_vector(old) and _is_vector(made)))
        )
        if old is None or is_replaced:
            kept = tuple(i for i in state.indexes if i is not old)
            return TableState(state.schema, (*kept, replace(made, name=name)))
    raise AssertionError(index)


def _is_vector(index: Index) -> bool:
    return index.kind.startswith("Ivf")


def can_index(kind: str, column: Any) -> bool:
    """Returns whether LanceDB builds an index of a kind on a column (measured).

    Args:
        kind: One of `KINDS`.
        column: The Arrow type of the column.
    """
    is_list = pa.types.is_list(column) or pa.types.is_large_list(column)
    is_plain = (
        pa.types.is_integer(column) or pa.types.is_boolean(column) or pa.types.is_string(column)
    )
    if kind in _VECTOR_KINDS:
        if pa.types.is_list(column):  # several vectors in a row
            column = column.value_type
        return pa.types.is_fixed_size_list(column) and (
            pa.types.is_floating(column.value_type) or pa.types.is_uint8(column.value_type)
        )
    if kind == "BTree":
        is_moment = pa.types.is_temporal(column) and not pa.types.is_duration(column)
        is_sized = pa.types.is_fixed_size_binary(column) and not pa.types.is_decimal(column)
        return is_plain or pa.types.is_floating(column) or is_moment or is_sized
    is_large = pa.types.is_large_string(column)
    is_bytes = pa.types.is_binary(column) or pa.types.is_large_binary(column)
    if kind == "Fm":
        return pa.types.is_string(column) or is_large or is_bytes
    if kind == "FTS":
        inside = is_list and can_index("FTS", column.value_type)
        return inside or pa.types.is_string(column) or is_large
    if kind == "LabelList":
        return is_list and can_index("Bitmap", column.value_type)
    return is_plain or is_large or is_bytes
