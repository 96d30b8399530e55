"""Operations on indexes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import Index, Operation, TableState, Target, Traits, spell

KINDS = (
    "BTree", "Bitmap", "LabelList", "FTS",
    "IvfFlat", "IvfPq", "IvfRq", "HnswPq", "HnswSq", "HnswFlat",
)  # fmt: skip
"""The kinds of index, as lancedb's configuration classes are named."""

_VECTOR_KINDS = frozenset(kind for kind in KINDS if kind.startswith(("Ivf", "Hnsw")))

_REPORTED = {"HnswPq": "IvfHnswPq", "HnswSq": "IvfHnswSq", "HnswFlat": "IvfHnswFlat"}
"""Kinds that `list_indices()` names otherwise than their configuration class."""


@dataclass(frozen=True, slots=True)
class CreateIndex(Operation):
    """Index a column. An index of the same kind on the column is left as it is.

    One of another kind stays beside it, except that a vector index replaces a vector index
    (measured): drop first what you mean to replace.

    Attributes:
        column: The column to index.
        kind: One of `KINDS`, by default `BTree`.
        options: Keyword arguments of lancedb's configuration class of that kind.
    """

    column: str
    kind: str = field(default="BTree", kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

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
        return _reported(Index(self.kind, (self.column,)))

    @property
    def traits(self) -> Traits:
        return Traits(rewriting=True, reversible="dropping the index")

    def describe(self) -> str:
        return f"index {self.column} ({self.kind})"

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        if not before.has(self.column):
            raise self.refuse(
                f"there is no column {self.column!r}.",
                f"Its columns are {', '.join(f.name for f in before.fields())}.",
            )
        if self.index in before.indexes:
            return before
        have = before.schema.field(self.column)
        if not _can_index(self.kind, have.type):
            fitting = [kind for kind in KINDS if _can_index(kind, have.type)]
            raise self.refuse(
                f"LanceDB builds no {self.kind} index on {spell(have)}.",
                f"On that type it builds {', '.join(fitting)}."
                if fitting
                else "It builds none on that type.",
            )
        return with_index(before, Index(self.kind, (self.column,)))

    async def apply(self, target: Target) -> int:
        await target.create_index(Index(self.kind, (self.column,)), self.options)
        return 0


def _reported(index: Index) -> Index:
    return Index(_REPORTED.get(index.kind, index.kind), index.columns, index.name)


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
            return TableState(state.schema, (*kept, Index(made.kind, made.columns, name)))
    raise AssertionError(index)


def _is_vector(index: Index) -> bool:
    return index.kind.startswith("Ivf")


def _can_index(kind: str, column: Any) -> bool:
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
    if kind == "FTS":
        inside = is_list and _can_index("FTS", column.value_type)
        return inside or pa.types.is_string(column) or is_large
    if kind == "LabelList":
        return is_list and _can_index("Bitmap", column.value_type)
    is_bytes = pa.types.is_binary(column) or pa.types.is_large_binary(column)
    return is_plain or is_large or is_bytes


@dataclass(frozen=True, slots=True)
class DropIndex(Operation):
    """Drop every index on a column. Nothing happens when there is none.

    Attributes:
        column: The indexed column.
    """

    column: str

    def __post_init__(self) -> None:
        if not isinstance(self.column, str) or not self.column:
            raise InvalidMigrationError(
                f"DropIndex: {self.column!r} is not a column.", "Name one column."
            )

    @property
    def traits(self) -> Traits:
        return Traits(reversible="creating the index again")

    def describe(self) -> str:
        return f"drop index of {self.column}"

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        return TableState(
            before.schema, tuple(i for i in before.indexes if i.columns != (self.column,))
        )

    async def apply(self, target: Target) -> int:
        for index in self.existing(target.state).indexes:
            if index.columns == (self.column,):
                await target.drop_index(index.name)
        return 0
