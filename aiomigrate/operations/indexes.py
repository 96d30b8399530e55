"""Operations that create and drop indexes. Which type takes which kind is in `schema.index`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import TUNING, Operation, Traits
from aiomigrate.operations.target import Target
from aiomigrate.schema.index import KINDS, REPORTED, as_reported, can_index, config_name, with_index
from aiomigrate.schema.state import Index, TableState, spell


@dataclass(frozen=True, slots=True)
class CreateIndex(Operation):
    """Index a column, and wait until the index covers the rows that are there.

    An index of the same kind on the column is left as it is, unless it was built with other
    `options`: then it is built again. LanceDB does not report every option (the number of
    partitions is one); an option that it does not report counts as equal. Indexes of other kinds
    stay, except that a vector index replaces a vector index (measured). Readers and writers go on
    while it is built. It is undone by dropping the index and creating the one it replaced.

    Attributes:
        column: The column to index, by path.
        kind: One of `schema.index.KINDS`, by default `BTree`.
        options: Keyword arguments of lancedb's configuration class of that kind.
        timeout_s: Seconds to wait until it covers rows that were written while it was built.
    """

    column: str
    kind: str = field(default="BTree", kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    timeout_s: float = field(default=600.0, kw_only=True, metadata={TUNING: True})

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        if not isinstance(self.column, str) or not self.column:
            raise InvalidMigrationError(
                f"CreateIndex: {self.column!r} is not a column.",
                "Give the name of one column, as text.",
            )
        if self.kind not in KINDS:
            raise InvalidMigrationError(
                f"CreateIndex: there is no kind {self.kind!r} of index.",
                f"Use one of {', '.join(KINDS)}.",
            )
        object.__setattr__(self, "options", dict(self.options))

    @property
    def index(self) -> Index:
        """The index as LanceDB will report it."""
        return as_reported(Index(self.kind, (self.column,), options=self.options))

    @property
    def index_config(self) -> tuple[str, Mapping[str, Any]]:
        return (self.kind, self.options)

    @property
    def traits(self) -> Traits:
        return Traits(rewriting=True, reversible="dropping the index", commits="1 or 2")

    def describe(self) -> str:
        given = ", ".join([self.kind, *(f"{k}={v}" for k, v in self.options.items())])
        return f"index {self.column} ({given})"

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        if not before.has(self.column):
            raise self.refuse_missing_column(before, self.column)
        if self._is_built(before):
            return before
        have = before.column(self.column)
        if not can_index(self.kind, have.type):
            fitting = [kind for kind in KINDS if can_index(kind, have.type)]
            raise self.refuse(
                f"LanceDB builds no {self.kind} index on {spell(have)}.",
                f"Use one of {', '.join(fitting)}, which it builds on that type."
                if fitting
                else "Index another column: it builds no index on that type.",
            )
        return with_index(before, self.index)

    def _is_built(self, state: TableState) -> bool:
        wanted = self.index
        return any(
            index == wanted and all(index.options.get(k, v) == v for k, v in self.options.items())
            for index in state.indexes
        )

    def done(self, state: TableState | None, witness: str) -> bool:
        self.evolve(state)
        return self._is_built(self.existing(state))

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = self.existing(before)
        if self._is_built(was):
            return ()
        made = with_index(was, self.index)
        replaced = [i for i in was.indexes if i not in made.indexes or i == self.index]
        back = [_create_again(index, self.table) for index in replaced]
        return (DropIndex(self.column, kind=self.kind, table=self.table), *back)

    async def apply(self, target: Target) -> int:
        await target.create_index(self.index, self.options)
        await target.cover(self.index, self.timeout_s)
        return 0


def _create_again(index: Index, table: str | None) -> CreateIndex:
    return CreateIndex(
        index.columns[0], kind=config_name(index.kind), options=index.options, table=table
    )


@dataclass(frozen=True, slots=True)
class DropIndex(Operation):
    """Drop every index on a column. If there is none, the plan warns and nothing happens.

    Each index is one metadata commit. Queries that used it still work, but read all rows. It is
    undone by creating the indexes again.

    Attributes:
        column: The indexed column, by path.
        kind: Drops only indexes of this kind, one of `schema.index.KINDS`; by default all.
    """

    column: str
    kind: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        if not isinstance(self.column, str) or not self.column:
            raise InvalidMigrationError(
                f"DropIndex: {self.column!r} is not a column.",
                "Give the name of one column, as text.",
            )
        if self.kind is not None and self.kind not in KINDS:
            raise InvalidMigrationError(
                f"DropIndex: there is no kind {self.kind!r} of index.",
                f"Use one of {', '.join(KINDS)}.",
            )

    @property
    def traits(self) -> Traits:
        return Traits(reversible="creating the index again", commits="1 for each index")

    def describe(self) -> str:
        return f"drop index of {self.column}"

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None or any(self._matches(index) for index in before.indexes):
            return ()
        have = ", ".join(str(index) for index in before.indexes) or "none"
        return (f"{self.column}: there is no index to drop; the indexes are {have}.",)

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        return TableState(before.schema, tuple(i for i in before.indexes if not self._matches(i)))

    def _matches(self, index: Index) -> bool:
        kind = None if self.kind is None else REPORTED.get(self.kind, self.kind)
        return index.columns == (self.column,) and kind in (None, index.kind)

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = self.existing(before).indexes
        return tuple(_create_again(index, self.table) for index in was if self._matches(index))

    async def apply(self, target: Target) -> int:
        for index in self.existing(target.state).indexes:
            if self._matches(index):
                await target.drop_index(index.name)
        return 0
