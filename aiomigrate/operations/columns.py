"""Operations on columns. All of them change metadata only; no data file is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import (
    Operation,
    TableState,
    Target,
    Traits,
    checked_names,
    checked_new,
    quote,
    spell,
)


@dataclass(frozen=True, slots=True)
class AddColumns(Operation):
    """Add nullable columns, NULL in every row.

    To fill them, follow with `Update`; to forbid NULL, with `SetNotNull`. Columns that exist with
    the same type are left as they are.

    Attributes:
        columns: Arrow type of each new column by name.
    """

    columns: Mapping[str, pa.DataType]

    def __post_init__(self) -> None:
        checked_names("AddColumns", self.columns)
        for name, kind in self.columns.items():
            if not isinstance(kind, pa.DataType) or pa.types.is_null(kind):
                raise InvalidMigrationError(
                    f"AddColumns: {kind!r} is no type for column {name!r}.",
                    "Give an Arrow type such as pa.string(), and fill it with op.Update.",
                )
        checked_new("AddColumns", self.columns)
        object.__setattr__(self, "columns", dict(self.columns))

    @property
    def traits(self) -> Traits:
        return Traits(reversible="dropping the columns")

    def describe(self) -> str:
        return "add " + ", ".join(f"{name} {kind}" for name, kind in self.columns.items())

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        for name, kind in self.columns.items():
            if not before.has(name):
                continue
            have = before.schema.field(name)
            if have.type != kind:
                raise self.refuse(
                    f"column {name!r} exists as {spell(have)}, not {kind}.",
                    "Drop or rename the existing column in an earlier migration.",
                )
        return before.with_fields([*before.schema, *self._new(before)])

    def _new(self, state: TableState) -> list[pa.Field[Any]]:
        return [pa.field(n, kind) for n, kind in self.columns.items() if not state.has(n)]

    async def apply(self, target: Target) -> int:
        await target.add_columns(self._new(self.existing(target.state)))
        return 0


@dataclass(frozen=True, slots=True, init=False)
class DropColumns(Operation):
    """Drop columns, with the indexes on them. Columns that are gone already are passed over.

    Handles that other processes hold keep the old schema until they refresh.
    """

    columns: tuple[str, ...]

    def __init__(self, *columns: str, **common: Any) -> None:
        Operation.__init__(self, **common)
        object.__setattr__(self, "columns", checked_names("DropColumns", columns))

    @property
    def traits(self) -> Traits:
        return Traits(destructive=True, reversible="restoring the table_version before")

    @property
    def needs_savepoint(self) -> bool:
        return True

    def describe(self) -> str:
        return "drop " + ", ".join(self.columns)

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        kept = [f for f in before.schema if f.name not in self.columns]
        if not kept:
            raise self.refuse("no column would be left.", "Keep one column, or drop the table.")
        return before.with_fields(kept)

    async def apply(self, target: Target) -> int:
        state = self.existing(target.state)
        # An index outlives its column in LanceDB and then breaks filtered reads: it goes first.
        for index in state.indexes:
            if any(column in self.columns for column in index.roots):
                await target.drop_index(index.name)
        await target.drop_columns([c for c in self.columns if state.has(c)])
        return 0


@dataclass(frozen=True, slots=True)
class RenameColumns(Operation):
    """Rename columns in one commit; two columns may swap their names.

    Indexes follow their column. Readers see all the new names at once.

    Attributes:
        names: New name by old name.
    """

    names: Mapping[str, str]

    def __post_init__(self) -> None:
        checked_names("RenameColumns", self.names.keys())
        checked_new("RenameColumns", checked_names("RenameColumns", self.names.values()))
        if any(old == new for old, new in self.names.items()):
            raise InvalidMigrationError(
                "RenameColumns: a column is renamed to itself.", "Leave that column out."
            )
        object.__setattr__(self, "names", dict(self.names))

    @property
    def traits(self) -> Traits:
        return Traits(reversible="renaming back")

    @property
    def shows(self) -> bool:
        """A permutation of the same names cannot be told from the schema alone."""
        return set(self.names) != set(self.names.values())

    def describe(self) -> str:
        return "rename " + ", ".join(f"{old} to {new}" for old, new in self.names.items())

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        gone = set(self.names) - set(self.names.values())
        if (
            self.shows
            and all(before.has(new) for new in self.names.values())
            and not any(before.has(old) for old in gone)
        ):
            return before
        for old in self.names:
            if not before.has(old):
                raise self.refuse(
                    f"there is no column {old!r}.",
                    f"Its columns are {', '.join(f.name for f in before.fields())}.",
                )
        for new in set(self.names.values()) - set(self.names):
            if before.has(new):
                raise self.refuse(
                    f"column {new!r} exists already.", "Choose another name, or rename both."
                )
        renamed = [f.with_name(self.names.get(f.name, f.name)) for f in before.schema]
        indexes = tuple(index.renamed(self.names) for index in before.indexes)
        return TableState(before.with_fields(renamed).schema, indexes)

    def done(self, state: TableState | None, witness: str) -> bool:
        if self.shows:
            return Operation.done(self, state, witness)
        return self.existing(state).has(f"{witness}_done")

    async def apply(self, target: Target) -> int:
        renames = [{"path": old, "rename": new} for old, new in self.names.items()]
        if not self.shows:
            # The witness is renamed by the same commit, so that a second run can tell.
            if not self.existing(target.state).has(target.witness):
                await target.add_columns([pa.field(target.witness, pa.bool_())])
            renames.append({"path": target.witness, "rename": f"{target.witness}_done"})
        await target.alter_columns(renames)
        return 0


@dataclass(frozen=True, slots=True, init=False)
class SetNullable(Operation):
    """Allow NULL in columns."""

    columns: tuple[str, ...]

    def __init__(self, *columns: str, **common: Any) -> None:
        Operation.__init__(self, **common)
        object.__setattr__(self, "columns", checked_names("SetNullable", columns))

    @property
    def traits(self) -> Traits:
        return Traits(reversible="setting NOT NULL")

    def describe(self) -> str:
        return "allow NULL in " + ", ".join(self.columns)

    def evolve(self, state: TableState | None) -> TableState:
        return _with_nullable(self, state, self.columns, nullable=True)

    async def apply(self, target: Target) -> int:
        await target.alter_columns([{"path": c, "nullable": True} for c in self.columns])
        return 0


@dataclass(frozen=True, slots=True, init=False)
class SetNotNull(Operation):
    """Forbid NULL in columns; refused while a row has one.

    Writers that leave the column out fail from then on: first deploy code that writes it.
    """

    columns: tuple[str, ...]

    def __init__(self, *columns: str, **common: Any) -> None:
        Operation.__init__(self, **common)
        object.__setattr__(self, "columns", checked_names("SetNotNull", columns))

    @property
    def traits(self) -> Traits:
        return Traits(reversible="allowing NULL")

    def describe(self) -> str:
        return "forbid NULL in " + ", ".join(self.columns)

    def evolve(self, state: TableState | None) -> TableState:
        return _with_nullable(self, state, self.columns, nullable=False)

    async def apply(self, target: Target) -> int:
        for column in self.columns:
            if nulls := await target.count_rows(f"{quote(column)} IS NULL"):
                raise self.refuse(
                    f"{nulls} rows have NULL in {column!r}.",
                    f'Fill them first: op.Update({{"{column}": ...}}, where="{column} IS NULL").',
                )
        await target.alter_columns([{"path": c, "nullable": False} for c in self.columns])
        return 0


def _with_nullable(
    operation: Operation, state: TableState | None, columns: Sequence[str], *, nullable: bool
) -> TableState:
    before = operation.existing(state)
    for column in columns:
        if not before.has(column):
            raise operation.refuse(
                f"there is no column {column!r}.",
                f"Its columns are {', '.join(f.name for f in before.fields())}.",
            )
    return TableState(
        pa.schema(
            [f.with_nullable(nullable) if f.name in columns else f for f in before.schema],
        ),
        before.indexes,
    )
