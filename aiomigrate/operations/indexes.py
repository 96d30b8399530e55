"""Operations on indexes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import TUNING, Index, Operation, TableState, Target, Traits, spell

KINDS = (
    "BTree", "Bitmap", "LabelList", "FTS", "Fm",
    "IvfFlat", "IvfPq", "IvfSq", "IvfRq", "HnswPq", "HnswSq", "HnswFlat",
)  # fmt: skip
"""The kinds of index, as lancedb's configuration classes are named."""

_VECTOR_KINDS = frozenset(kind for kind in KINDS if kind.startswith(("Ivf", "Hnsw")))

_REPORTED = {"HnswPq": "IvfHnswPq", "HnswSq": "IvfHnswSq", "HnswFlat": "IvfHnswFlat"}
"""Kinds that `list_indices()` names otherwise than their configuration class."""


@dataclass(frozen=True, slots=True)
class CreateIndex(Operation):
    """Index a column, and wait until the index covers the rows that are there.

    An index of the same kind on the column is left as it is, unless it was built with other
    `options`: then it is built anew. LanceDB does not tell every option (the number of partitions
    is one); what it does not tell is taken as equal. An index of another kind stays beside it,
    except that a vector index replaces a vector index (measured).

    Attributes:
        column: The column to index, by path.
        kind: One of `KINDS`, by default `BTree`.
        options: Keyword arguments of lancedb's configuration class of that kind.
        timeout_s: Seconds to wait for coverage when rows were written while it was built.
    """

    column: str
    kind: str = field(default="BTree", kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    timeout_s: float = field(default=600.0, kw_only=True, metadata={TUNING: True})

    def __post_init__(self) -> None:
        if not isinstance(self.column, str) or not self.column:
            raise InvalidMigrationError(
                f"CreateIndex: {self.column!r} is not a column.", "Name one column."
            )
        if self.kind not in KINDS:
            raise InvalidMigrationError(
                f"CreateIndex: there is no kind {self.kind!r}.", f"Use one of {', '.join(KINDS)}."
            )
        object.__setattr__(self, "options", dict(self.options))

    @property
    def index(self) -> Index:
        """The index as LanceDB will report it."""
        return _reported(Index(self.kind, (self.column,), options=self.options))

    @property
    def traits(self) -> Traits:
        return Traits(rewriting=True, reversible="dropping the index", commits="1 or 2")

    def describe(self) -> str:
        given = ", ".join([self.kind, *(f"{k}={v}" for k, v in self.options.items())])
        return f"index {self.column} ({given})"

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        if not before.has(self.column):
            raise self.refuse(
                f"there is no column {self.column!r}.",
                f"Its columns are {', '.join(f.name for f in before.fields())}.",
            )
        if self._fits(before):
            return before
        have = before.column(self.column)
        if not can_index(self.kind, have.type):
            fitting = [kind for kind in KINDS if can_index(kind, have.type)]
            raise self.refuse(
                f"LanceDB builds no {self.kind} index on {spell(have)}.",
                f"On that type it builds {', '.join(fitting)}."
                if fitting
                else "It builds none on that type.",
            )
        return with_index(before, self.index)

    def _fits(self, state: TableState) -> bool:
        wanted = self.index
        return any(
            index == wanted and all(index.options.get(k, v) == v for k, v in self.options.items())
            for index in state.indexes
        )

    def done(self, state: TableState | None, witness: str) -> bool:
        self.evolve(state)
        return self._fits(self.existing(state))

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = self.existing(before)
        if self._fits(was):
            return ()
        made = with_index(was, self.index)
        replaced = [i for i in was.indexes if i not in made.indexes or i == self.index]
        back = [_creating(index, self.table) for index in replaced]
        return (DropIndex(self.column, kind=self.kind, table=self.table), *back)

    async def apply(self, target: Target) -> int:
        await target.create_index(self.index, self.options)
        await target.cover(self.index, self.timeout_s)
        return 0


def _creating(index: Index, table: str | None) -> CreateIndex:
    return CreateIndex(
        index.columns[0], kind=config_name(index.kind), options=index.options, table=table
    )


def config_name(kind: str) -> str:
    """Returns how lancedb's configuration class of a reported kind is named."""
    return next((name for name, reported in _REPORTED.items() if reported == kind), kind)


_FTS = {
    "min_ngram_length": "ngram_min_length",
    "max_ngram_length": "ngram_max_length",
    **{name: name for name in (
        "base_tokenizer", "language", "with_position", "max_token_length", "lower_case", "stem",
        "remove_stop_words", "ascii_folding", "prefix_only", "custom_stop_words",
    )},
}  # fmt: skip
"""Options of FTS by the name under which LanceDB reports them."""


def told_options(details: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of an index, named as lancedb's classes name them.

    Args:
        details: What `list_indices()` tells of it: nothing for scalar indexes, and never the
            number of partitions (measured).
    """
    found = {_FTS[k]: v for k, v in details.items() if k in _FTS and v is not None}
    if "metric_type" in details:
        found["distance_type"] = str(details["metric_type"]).lower()
    packed = details.get("compression") or {}
    if packed.get("type") in ("pq", "rq"):
        found["num_bits"] = packed["num_bits"]
    if "num_sub_vectors" in packed:
        found["num_sub_vectors"] = packed["num_sub_vectors"]
    graph = details.get("hnsw") or {}
    for ours, theirs in (("m", "max_connections"), ("ef_construction", "construction_ef")):
        if theirs in graph:
            found[ours] = graph[theirs]
    hints = details.get("runtime_hints") or {}
    for ours, theirs in (("max_iterations", "max_iters"), ("sample_rate", "sample_rate")):
        if f"lance.ivf.{theirs}" in hints:
            found[ours] = int(hints[f"lance.ivf.{theirs}"])
    return found


def index_to(index: Index) -> dict[str, Any]:
    """Returns an index as JSON, to be made again as it is."""
    return {"kind": index.kind, "columns": list(index.columns), "options": dict(index.options)}


def index_from(text: Mapping[str, Any]) -> Index:
    """Returns the index of `index_to`."""
    return Index(text["kind"], tuple(text["columns"]), options=text["options"])


def forgotten(state: TableState, memory: Mapping[str, Any]) -> list[Index]:
    """Returns the indexes that an operation remembers and the table does not have."""
    wanted = [index_from(text) for text in memory.get("indexes", ())]
    return [index for index in wanted if index not in state.indexes]


def _reported(index: Index) -> Index:
    named = _REPORTED.get(index.kind)
    return index if named is None else replace(index, kind=named)


def with_index(state: TableState, index: Index) -> TableState:
    """Returns a table's state after LanceDB has built an index, named as LanceDB names it.

    The name is the column's with `_idx`, numbered on until it is free, or that of an index of its
    own column which it replaces: one of the same kind, or for a vector index any vector index.

    Args:
        state: Before.
        index: Its kind as in `KINDS`.
    """
    made = _reported(index)
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
    """Returns whether LanceDB builds such an index on such a column (measured)."""
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


@dataclass(frozen=True, slots=True)
class DropIndex(Operation):
    """Drop every index on a column. Nothing happens when there is none.

    Attributes:
        column: The indexed column, by path.
        kind: Only indexes of this kind, as in `CreateIndex`.
    """

    column: str
    kind: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.column, str) or not self.column:
            raise InvalidMigrationError(
                f"DropIndex: {self.column!r} is not a column.", "Name one column."
            )
        if self.kind is not None and self.kind not in KINDS:
            raise InvalidMigrationError(
                f"DropIndex: there is no kind {self.kind!r}.", f"Use one of {', '.join(KINDS)}."
            )

    @property
    def traits(self) -> Traits:
        return Traits(reversible="creating the index again", commits="1 for each index")

    def describe(self) -> str:
        return f"drop index of {self.column}"

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None or any(self._concerns(index) for index in before.indexes):
            return ()
        have = ", ".join(str(index) for index in before.indexes) or "none"
        return (f"{self.column}: there is no index to drop; the indexes are {have}.",)

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        return TableState(before.schema, tuple(i for i in before.indexes if not self._concerns(i)))

    def _concerns(self, index: Index) -> bool:
        kind = None if self.kind is None else _REPORTED.get(self.kind, self.kind)
        return index.columns == (self.column,) and kind in (None, index.kind)

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = self.existing(before).indexes
        return tuple(_creating(index, self.table) for index in was if self._concerns(index))

    async def apply(self, target: Target) -> int:
        for index in self.existing(target.state).indexes:
            if self._concerns(index):
                await target.drop_index(index.name)
        return 0
