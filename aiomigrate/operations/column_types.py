"""Operations on the type and the nullability of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from aiomigrate.errors import CastRefusedError, ColumnNotNullableError, InvalidMigrationError
from aiomigrate.operations.base import Operation, Traits
from aiomigrate.operations.rows import Update
from aiomigrate.operations.target import Target
from aiomigrate.schema import paths
from aiomigrate.schema.index import missing_indexes
from aiomigrate.schema.sql import Literal, checked_names, quote
from aiomigrate.schema.state import TableState, index_to_json, metadata_text, remember, remembered


@dataclass(frozen=True, slots=True, init=False)
class SetNullable(Operation):
    """Allow NULL in columns.

    It is one metadata commit. Readers that cannot handle NULL fail once a writer stores it. It is
    undone by `SetNotNull` of the columns that were NOT NULL, which fails if a row is NULL by then.

    Attributes:
        columns: The columns, by path.
    """

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

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = [c for c in self.columns if not self.existing(before).column(c).nullable]
        return (SetNotNull(*was, table=self.table),) if was else ()

    async def apply(self, target: Target) -> int:
        await target.alter_columns([{"path": c, "nullable": True} for c in self.columns])
        return 0


@dataclass(frozen=True, slots=True, init=False)
class SetNotNull(Operation):
    """Forbid NULL in columns. It fails if a row is NULL, unless `fill` gives a value for it.

    `fill` is an `Update` of the rows that are NULL; then LanceDB checks all rows and one metadata
    commit follows. Writers that leave the column out, or store NULL, fail afterwards: first
    release code that always writes it. It is undone by allowing NULL.

    Attributes:
        columns: The columns, by path.
        fill: Literal by column, for the rows that are NULL.
    """

    columns: tuple[str, ...]
    fill: Mapping[str, Literal]

    def __init__(
        self, *columns: str, fill: Mapping[str, Literal] | None = None, **common: Any
    ) -> None:
        Operation.__init__(self, **common)
        object.__setattr__(self, "columns", checked_names("SetNotNull", columns))
        object.__setattr__(self, "fill", dict(fill or {}))
        for column, value in self.fill.items():
            if column not in self.columns or value is None:
                raise InvalidMigrationError(
                    f"SetNotNull: fill of {column!r} by {value!r}.",
                    "Fill only columns that become NOT NULL, with a value that is not None.",
                )

    @property
    def traits(self) -> Traits:
        return Traits(reversible="allowing NULL")

    def describe(self) -> str:
        return "forbid NULL in " + ", ".join(self.columns)

    def expand(self) -> tuple[Operation, ...]:
        common: dict[str, Any] = {"table": self.table, "when_missing": self.when_missing}
        fills = [
            Update({column: value}, where=f"{quote(column)} IS NULL", **common)
            for column, value in self.fill.items()
        ]
        return (*fills, SetNotNull(*self.columns, **common))

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        changed = [
            c for c in self.columns if before and before.has(c) and before.column(c).nullable
        ]
        if not changed:
            return ()
        return (
            (
                f"{', '.join(changed)}: writers that leave it out, or store NULL, fail afterwards; "
                "first release code that always writes it."
            ),
        )

    def evolve(self, state: TableState | None) -> TableState:
        return _with_nullable(self, state, self.columns, nullable=False)

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = [c for c in self.columns if self.existing(before).column(c).nullable]
        return (SetNullable(*was, table=self.table),) if was else ()

    async def apply(self, target: Target) -> int:
        try:
            await target.alter_columns([{"path": c, "nullable": False} for c in self.columns])
        except ColumnNotNullableError:
            for column in self.columns:
                if nulls := await target.count_rows(f"{quote(column)} IS NULL"):
                    raise self.refuse(
                        f"{nulls} rows have NULL in {column!r}.",
                        f'Fill them with op.SetNotNull("{column}", fill={{"{column}": ...}}), or '
                        "with op.Update before it.",
                    ) from None
            raise
        return 0


def _with_nullable(
    operation: Operation, state: TableState | None, columns: Sequence[str], *, nullable: bool
) -> TableState:
    before = operation.existing(state)
    for column in columns:
        if not before.has(column):
            raise operation.refuse_missing_column(before, column)
    changes: dict[str, paths.Change] = {
        column: lambda old: old.with_nullable(nullable=nullable) for column in columns
    }
    return TableState(paths.changed(before.schema, changes), before.indexes)


@dataclass(frozen=True, slots=True)
class AlterType(Operation):
    """Change the type of columns.

    LanceDB casts where it can: between numbers, string to large_string, inside lists. Otherwise a
    column of the new type is added and filled, replaces the old one in one commit, and rows that
    were written meanwhile are filled too. Indexes on the columns are dropped before and created
    again after; field metadata is kept. An interrupted run resumes.

    Values that do not fit (300 as int8, "x" as a number) fail the migration, which is then undone.
    A type of lower precision changes values (1.7 becomes 1 as an integer, 0.1 the nearest
    float32): the plan warns of it and a savepoint keeps the earlier values. For conversions that
    SQL cannot do, use `Rebuild`.

    Handles opened before it store NULL in the column when they append: restart writers, or add a
    new column and release twice. It is undone by casting back; by the savepoint, if the new type
    has lower precision.

    Attributes:
        columns: New Arrow type by column. For fields of structs, use `Rebuild`.
    """

    columns: Mapping[str, pa.DataType]

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        checked_names("AlterType", self.columns)
        for path, kind in self.columns.items():
            if not isinstance(kind, pa.DataType) or pa.types.is_null(kind):
                raise InvalidMigrationError(
                    f"AlterType: {kind!r} is not a valid type for column {path!r}.",
                    "Give an Arrow type such as pa.int64().",
                )
        object.__setattr__(self, "columns", dict(self.columns))

    @property
    def witnessed(self) -> bool:
        return True

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            reversible="changing the type back, or the savepoint if values lose precision",
            commits="1 to 5 for each column, and 2 for each index",
        )

    @property
    def needs_savepoint(self) -> bool:
        return True

    def describe(self) -> str:
        return "change type of " + ", ".join(f"{c} to {kind}" for c, kind in self.columns.items())

    @property
    def shows(self) -> bool:
        """Always false: the type shows, but not which indexes must be created again."""
        return False

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None or not self._pending(before):
            return ()
        stale = (
            f"{', '.join(self._pending(before))}: handles opened before it store NULL when they "
            "append; restart writers, or add a new column and release twice."
        )
        lossy = [
            f"{path}: values lose precision from {before.column(path).type} to "
            f"{self.columns[path]}; the earlier values stay in the savepoint until it is pruned."
            for path in self._lossy(before)
        ]
        return (stale, *lossy)

    def discards(self, before: TableState) -> bool:
        return bool(self._lossy(before))

    def _lossy(self, state: TableState) -> list[str]:
        return [
            path
            for path in self._pending(state)
            if not casts_back(state.column(path).type, self.columns[path])
        ]

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        for path in self.columns:
            if not before.has(path):
                raise self.refuse_missing_column(before, path)
            if "." in path and path in self._pending(before):  # measured
                raise self.refuse(
                    f"filters on the struct of {path!r} fail after LanceDB has cast the field.",
                    "Use op.Rebuild(schema=...) with the new type of the struct.",
                )
        changes = {path: _with_type(kind) for path, kind in self.columns.items()}
        return TableState(paths.changed(before.schema, changes), before.indexes)

    def undo(self, before: TableState | None) -> tuple[Operation, ...] | None:
        was = self.existing(before)
        if self._lossy(was):
            return None
        back = {path: was.column(path).type for path in self._pending(was)}
        return (AlterType(back, table=self.table),) if back else ()

    def _pending(self, state: TableState) -> list[str]:
        return [p for p, k in self.columns.items() if state.has(p) and state.column(p).type != k]

    def done(self, state: TableState | None, witness: str) -> bool:
        have = self.existing(state)
        if self._pending(have):
            return False
        return remembered(have, f"{witness}_all") is None  # else `apply` checks every step again

    def predict(self, state: TableState | None, witness: str) -> TableState:
        have = self.existing(state)
        after = self.evolve(have)
        memory = remembered(have, f"{witness}_all")
        if memory is None:
            return after
        strict = dict.fromkeys(memory["not_null"], _not_null)
        indexes = (*after.indexes, *missing_indexes(after, memory))
        return TableState(paths.changed(after.schema, strict), indexes)

    async def apply(self, target: Target) -> int:
        state = self.existing(target.state)
        memory = remembered(state, f"{target.witness}_all")
        if memory is None:
            lost = [index_to_json(i) for i in state.indexes if i.is_on(self._pending(state))]
            kept = {p: metadata_text(state.column(p).metadata) for p in self._pending(state)}
            strict = [p for p in self._pending(state) if not state.column(p).nullable]
            memory = {"indexes": lost, "metadata": kept, "not_null": strict}
            await target.add_columns([remember(f"{target.witness}_all", memory)])
        for index in self.existing(target.state).indexes:
            if index.is_on(self._pending(self.existing(target.state))):
                await target.drop_index(index.name)
        for number, path in enumerate(self.columns):
            await self._retype(target, path, f"{target.witness}_{number}")
            have = self.existing(target.state).column(path)
            if memory["metadata"].get(path) and not have.metadata:
                await target.set_metadata(path, memory["metadata"][path])
            if path in memory["not_null"] and have.nullable:
                await self._forbid_null(target, path, f"{target.witness}_{number}_old")
        for index in missing_indexes(self.existing(target.state), memory):
            await target.create_index(index, index.options)
        return 0

    async def _retype(self, target: Target, path: str, witness: str) -> None:
        state = self.existing(target.state)
        kind = self.columns[path]
        if state.column(path).type != kind and not state.has(witness):
            try:
                return await target.alter_columns([{"path": path, "data_type": kind}])
            except CastRefusedError:
                pass
        await self._replace(target, path, witness)
        return None

    async def _replace(self, target: Target, path: str, witness: str) -> None:
        """Replaces a column by one of the new type, which it adds and fills."""
        state = self.existing(target.state)
        old = f"{witness}_old"
        if not state.has(old) and not state.has(witness):
            if state.column(path).type == self.columns[path]:
                return
            new = state.column(path).with_name(witness).with_type(self.columns[path])
            await target.add_columns([new.with_nullable(nullable=True)])
        if not self.existing(target.state).has(old):
            await self._fill(target, witness, path)
            renames: list[dict[str, Any]] = [
                {"path": path, "rename": old, "nullable": True},  # new writers leave it out
                {"path": witness, "rename": path},
            ]
            await target.alter_columns(renames)
        await self._fill(target, path, old)  # rows written between the fill and the rename

    async def _forbid_null(self, target: Target, path: str, old: str) -> None:
        for attempt in range(_NOT_NULL_ATTEMPTS):
            try:
                return await target.alter_columns([{"path": path, "nullable": False}])
            except ColumnNotNullableError:  # an old handle has written into the old column
                if attempt == _NOT_NULL_ATTEMPTS - 1:
                    raise
                await self._fill(target, path, old)
        return None

    async def _fill(self, target: Target, column: str, source: str) -> None:
        await target.update_in_batches(
            values={},
            sql={column: quote(source)},
            where=f"{quote(column)} IS NULL AND {quote(source)} IS NOT NULL",
            batch_rows=None,
        )


_NOT_NULL_ATTEMPTS = 5

_SIGNIFICAND_BITS = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}

_UNITS = ("s", "ms", "us", "ns")


def casts_back(old: Any, new: Any) -> bool:
    """Returns whether every value that fits the new type is equal after a cast back. Pure."""
    if old == new:
        return True
    if pa.types.is_boolean(old):
        return bool(pa.types.is_integer(new))
    if pa.types.is_integer(old):
        if pa.types.is_floating(new):
            return int(old.bit_width) <= _SIGNIFICAND_BITS[new]
        return bool(pa.types.is_integer(new) or _is_text(new))  # LanceDB refuses what does not fit
    if pa.types.is_floating(old):
        return pa.types.is_floating(new) and old.bit_width <= new.bit_width
    if pa.types.is_timestamp(old):
        same_zone = pa.types.is_timestamp(new) and old.tz == new.tz
        return same_zone and _UNITS.index(old.unit) <= _UNITS.index(new.unit)
    if _is_text(old):
        return _is_text(new)
    if _is_bytes(old):
        return _is_bytes(new)
    if pa.types.is_fixed_size_list(old):
        same_size = pa.types.is_fixed_size_list(new) and old.list_size == new.list_size
        return same_size and casts_back(old.value_type, new.value_type)
    return _is_list(old) and _is_list(new) and casts_back(old.value_type, new.value_type)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _with_type(kind: pa.DataType) -> paths.Change:
    return lambda old: old.with_type(kind)


def _not_null(old: pa.Field[Any]) -> pa.Field[Any]:
    return old.with_nullable(nullable=False)
