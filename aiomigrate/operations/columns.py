"""Operations on columns. Most change metadata only; a column is given by path (`address.city`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from aiomigrate.errors import CastRefusedError, ColumnNotNullableError, InvalidMigrationError
from aiomigrate.operations import paths
from aiomigrate.operations.base import (
    Literal,
    Operation,
    TableState,
    Target,
    Traits,
    checked_names,
    checked_new,
    quote,
    refuse_embedding,
    remember,
    remembered,
    spell,
)
from aiomigrate.operations.data import Update
from aiomigrate.operations.indexes import forgotten, index_to


@dataclass(frozen=True, slots=True)
class AddColumns(Operation):
    """Add nullable columns, NULL in every row unless `values` or `sql` fill them.

    Filling never holds writers up: the columns are added as metadata, then rows where they are
    NULL are updated. To forbid NULL, follow with `SetNotNull`. Columns that exist with the same
    type are left as they are.

    Attributes:
        columns: Arrow type of each new column by path; or a `pa.Field` with metadata.
        values: Literal by column, for the rows that are there.
        sql: SQL expression over the row by column, for the rows that are there.
    """

    columns: Mapping[str, pa.DataType | pa.Field[Any]]
    values: Mapping[str, Literal] = field(default_factory=dict, kw_only=True)
    sql: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        checked_names("AddColumns", self.columns)
        for path, given in self.columns.items():
            kind = given.type if isinstance(given, pa.Field) else given
            if not isinstance(kind, pa.DataType) or pa.types.is_null(kind):
                raise InvalidMigrationError(
                    f"AddColumns: {kind!r} is no type for column {path!r}.",
                    "Give an Arrow type such as pa.string(), and fill it with op.Update.",
                )
            if isinstance(given, pa.Field) and not given.nullable:
                raise InvalidMigrationError(
                    f"AddColumns: {path!r} is NOT NULL, but rows that are there have no value.",
                    "Fill it with values= or sql=, then op.SetNotNull.",
                )
        checked_new("AddColumns", (name for path in self.columns for name in path.split(".")))
        for column in (*self.values, *self.sql):
            if column not in self.columns or "." in column:
                raise InvalidMigrationError(
                    f"AddColumns: {column!r} is filled, but not a column that is added.",
                    "Fill columns of the table that `columns` names.",
                )
        object.__setattr__(self, "columns", dict(self.columns))
        object.__setattr__(self, "values", dict(self.values))
        object.__setattr__(self, "sql", dict(self.sql))

    @property
    def traits(self) -> Traits:
        return Traits(reversible="dropping the columns")

    def describe(self) -> str:
        kinds = {p: k.type if isinstance(k, pa.Field) else k for p, k in self.columns.items()}
        return "add " + ", ".join(f"{path} {kind}" for path, kind in kinds.items())

    def expand(self) -> tuple[Operation, ...]:
        filled = (*self.values, *self.sql)
        if not filled:
            return (self,)
        common: dict[str, Any] = {"table": self.table, "when_missing": self.when_missing}
        update = Update(
            self.values,
            sql=self.sql,
            where=" AND ".join(f"{quote(column)} IS NULL" for column in filled),
            **common,
        )
        return (AddColumns(self.columns, **common), update)

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None:
            return ()
        nested = [path for path in self.columns if "." in path and not before.has(path)]
        rewrite = [
            f"{path}: LanceDB can neither filter by nor index a field added to a struct until the "
            "rows are rewritten; follow with op.Rebuild()."
            for path in nested
        ]
        return (*rewrite, *self._twins(before))

    def _twins(self, before: TableState) -> tuple[str, ...]:
        have = {f.type for f in before.fields() if pa.types.is_fixed_size_list(f.type)}
        twins = [
            path
            for path in self.columns
            if pa.types.is_fixed_size_list(kind := self._field(path).type)
            and kind in have
            and not before.has(path)
        ]
        return tuple(
            f"{path}: a second vector column of the same dimension makes searches fail that name "
            "no column; deploy code that passes vector_column_name first."
            for path in twins
        )

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        for path in self.columns:
            parent, _ = paths.split(path)
            if parent and not before.has(parent):
                raise self.refuse(
                    f"there is no column {parent!r} to add to.",
                    f"Its columns are {', '.join(f.name for f in before.fields())}.",
                )
            if parent and not pa.types.is_struct(before.column(parent).type):
                raise self.refuse(
                    f"column {parent!r} is {spell(before.column(parent))}, not a struct.",
                    "Only a struct has fields.",
                )
            if not before.has(path):
                continue
            have = before.column(path)
            if have.type != self._field(path).type:
                raise self.refuse(
                    f"column {path!r} exists as {spell(have)}, not {self._field(path).type}.",
                    "Drop or rename the existing column in an earlier migration.",
                )
        return before.with_schema(paths.added(before.schema, self._new(before)))

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        new = self._new(self.existing(before))
        return (DropColumns(*new, table=self.table),) if new else ()

    def _field(self, path: str) -> pa.Field[Any]:
        given = self.columns[path]
        _, name = paths.split(path)
        if isinstance(given, pa.Field):
            return given.with_name(name)
        return pa.field(name, given)

    def _new(self, state: TableState) -> dict[str, pa.Field[Any]]:
        return {path: self._field(path) for path in self.columns if not state.has(path)}

    async def apply(self, target: Target) -> int:
        fields = []
        for path, new in self._new(self.existing(target.state)).items():
            *parents, _ = path.split(".")
            whole = new
            for name in reversed(parents):  # LanceDB takes a struct that holds only what is new
                whole = pa.field(name, pa.struct([whole]))
            fields.append(whole)
        await target.add_columns(fields)
        return 0


@dataclass(frozen=True, slots=True, init=False)
class DropColumns(Operation):
    """Drop columns, with the indexes on them. Columns that are gone already are passed over.

    Handles that other processes hold keep the old schema until they refresh. In a rolling deploy,
    first release code that does not use the column, then this.
    """

    columns: tuple[str, ...]

    def __init__(self, *columns: str, **common: Any) -> None:
        Operation.__init__(self, **common)
        object.__setattr__(self, "columns", checked_names("DropColumns", columns))

    @property
    def traits(self) -> Traits:
        return Traits(
            destructive=True,
            reversible="restoring the table_version before",
            commits="1, and 1 for each index",
        )

    @property
    def needs_savepoint(self) -> bool:
        return True

    def describe(self) -> str:
        return "drop " + ", ".join(self.columns)

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None:
            return ()
        there = [column for column in self.columns if before.has(column)]
        gone = [column for column in self.columns if column not in there]
        names = ", ".join(f.name for f in before.fields())
        told = []
        if there:
            told.append(
                f"{', '.join(there)}: code that reads or writes it fails; first release code that "
                "does not use it, then drop it."
            )
        if gone:
            told.append(f"{', '.join(gone)}: there is nothing to drop; the columns are {names}.")
        return tuple(told)

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        refuse_embedding(self, before, self.columns)
        schema = paths.changed(before.schema, {column: lambda _: None for column in self.columns})
        if not len(schema):
            raise self.refuse("no column would be left.", "Keep one column, or drop the table.")
        return before.with_schema(schema)

    async def apply(self, target: Target) -> int:
        state = self.existing(target.state)
        # An index outlives its column in LanceDB and then breaks filtered reads: it goes first.
        for index in state.indexes:
            if index.is_on(self.columns):
                await target.drop_index(index.name)
        await target.drop_columns([c for c in self.columns if state.has(c)])
        return 0


@dataclass(frozen=True, slots=True)
class RenameColumns(Operation):
    """Rename columns in one commit; two columns may swap their names.

    Indexes follow their column. Readers see all the new names at once. In a rolling deploy, add
    the new column, write both, and drop the old one a release later instead.

    Attributes:
        names: New name by old path; the new name has no path, it stays where it is.
    """

    names: Mapping[str, str]

    def __post_init__(self) -> None:
        checked_names("RenameColumns", self.names.keys())
        checked_new("RenameColumns", self.names.values())
        new = self._new
        checked_names("RenameColumns", new.values())
        if any(old == target for old, target in new.items()):
            raise InvalidMigrationError(
                "RenameColumns: a column is renamed to itself.", "Leave that column out."
            )
        object.__setattr__(self, "names", dict(self.names))

    @property
    def _new(self) -> dict[str, str]:
        """New path by old path."""
        result = {}
        for old, name in self.names.items():
            parent, _ = paths.split(old)
            result[old] = f"{parent}.{name}" if parent else name
        return result

    @property
    def traits(self) -> Traits:
        return Traits(reversible="renaming back")

    @property
    def shows(self) -> bool:
        """A permutation of the same names cannot be told from the schema alone."""
        return set(self.names) != set(self._new.values())

    def describe(self) -> str:
        return "rename " + ", ".join(f"{old} to {new}" for old, new in self.names.items())

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None or not all(before.has(column) for column in self.names):
            return ()
        return (
            (
                f"{', '.join(self.names)}: code that knows the old name fails from then on; in a "
                "rolling deploy add the new column, write both, and drop the old one later."
            ),
        )

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        new = self._new
        gone = set(new) - set(new.values())
        if (
            self.shows
            and all(before.has(path) for path in new.values())
            and not any(before.has(old) for old in gone)
        ):
            return before
        for old in new:
            if not before.has(old):
                raise self.refuse(
                    f"there is no column {old!r}.",
                    f"Its columns are {', '.join(f.name for f in before.fields())}.",
                )
        for path in set(new.values()) - set(new):
            if before.has(path):
                raise self.refuse(
                    f"column {path!r} exists already.", "Choose another name, or rename both."
                )
        refuse_embedding(self, before, self.names)
        changes = {old: _renaming(name) for old, name in self.names.items()}
        schema = paths.changed(before.schema, changes)
        return TableState(schema, tuple(index.renamed(self.names) for index in before.indexes))

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        back = {new: paths.split(old)[1] for old, new in self._new.items()}
        return (RenameColumns(back, table=self.table),)

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


def _renaming(name: str) -> paths.Change:
    return lambda old: old.with_name(name)


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

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = [c for c in self.columns if not self.existing(before).column(c).nullable]
        return (SetNotNull(*was, table=self.table),) if was else ()

    async def apply(self, target: Target) -> int:
        await target.alter_columns([{"path": c, "nullable": True} for c in self.columns])
        return 0


@dataclass(frozen=True, slots=True, init=False)
class SetNotNull(Operation):
    """Forbid NULL in columns; refused while a row has one, unless `fill` gives a value for it.

    Writers that leave the column out fail from then on: first release code that writes it.
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
                    "Fill columns that are forbidden NULL, by a value.",
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
                f"{', '.join(changed)}: writers that leave it out, or set NULL, fail from then on; "
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
                        f'Fill them: op.SetNotNull("{column}", fill={{"{column}": ...}}), or '
                        "before it with op.Update.",
                    ) from None
            raise
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
    changes: dict[str, paths.Change] = {
        column: lambda old: old.with_nullable(nullable=nullable) for column in columns
    }
    return TableState(paths.changed(before.schema, changes), before.indexes)


@dataclass(frozen=True, slots=True)
class AlterType(Operation):
    """Change the type of columns.

    Where LanceDB can cast (wider or narrower numbers, string to large_string, inside lists) it
    does; else a column of the new type is added, filled, and takes the old one's place in one
    commit, and rows that were written meanwhile are swept. Indexes on the columns are dropped
    first and made again; field metadata is kept. Values that do not fit (300 as int8, "x" as a
    number) fail the migration, which is then undone. A type that is coarser cuts values off (1.7
    becomes 1 as an integer, 0.1 the nearest float32): the plan warns of it, and like any step that
    discards something it keeps a savepoint. For what SQL cannot cast, use `Rebuild`.

    Old handles that append to a retyped column store NULL in it: restart writers, or use a new
    column and release twice.

    Attributes:
        columns: New Arrow type by column; for fields of structs, use `Rebuild`.
    """

    columns: Mapping[str, pa.DataType]

    def __post_init__(self) -> None:
        checked_names("AlterType", self.columns)
        for path, kind in self.columns.items():
            if not isinstance(kind, pa.DataType) or pa.types.is_null(kind):
                raise InvalidMigrationError(
                    f"AlterType: {kind!r} is no type for column {path!r}.",
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
            reversible="changing the type back, or the savepoint where values were cut off",
            commits="1 to 5 for each column, and 2 for each index",
        )

    @property
    def needs_savepoint(self) -> bool:
        return True

    def describe(self) -> str:
        return "change type of " + ", ".join(f"{c} to {kind}" for c, kind in self.columns.items())

    @property
    def shows(self) -> bool:
        """The type shows, but not which indexes must be made again."""
        return False

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None or not self._todo(before):
            return ()
        stale = (
            f"{', '.join(self._todo(before))}: handles opened before store NULL in it if they "
            "append; restart writers, or add a new column and release twice."
        )
        cut = [
            f"{path}: values are not kept exactly from {before.column(path).type} to "
            f"{self.columns[path]}; what is cut off stays in the savepoint, until it is pruned."
            for path in self._inexact(before)
        ]
        return (stale, *cut)

    def discards(self, before: TableState) -> bool:
        return bool(self._inexact(before))

    def _inexact(self, state: TableState) -> list[str]:
        return [
            path
            for path in self._todo(state)
            if not casts_back(state.column(path).type, self.columns[path])
        ]

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        for path in self.columns:
            if not before.has(path):
                raise self.refuse(
                    f"there is no column {path!r}.",
                    f"Its columns are {', '.join(f.name for f in before.fields())}.",
                )
            if "." in path and path in self._todo(before):
                raise self.refuse(
                    f"after LanceDB has cast {path!r}, no filter on its struct works (measured).",
                    "Use op.Rebuild(schema=...) with the struct as it is to be.",
                )
        changes = {path: _retyping(kind) for path, kind in self.columns.items()}
        return TableState(paths.changed(before.schema, changes), before.indexes)

    def undo(self, before: TableState | None) -> tuple[Operation, ...] | None:
        was = self.existing(before)
        if self._inexact(was):
            return None
        back = {path: was.column(path).type for path in self._todo(was)}
        return (AlterType(back, table=self.table),) if back else ()

    def _todo(self, state: TableState) -> list[str]:
        return [p for p, k in self.columns.items() if state.has(p) and state.column(p).type != k]

    def done(self, state: TableState | None, witness: str) -> bool:
        have = self.existing(state)
        if self._todo(have):
            return False
        return remembered(have, f"{witness}_all") is None  # else look at every part again

    def predict(self, state: TableState | None, witness: str) -> TableState:
        have = self.existing(state)
        after = self.evolve(have)
        memory = remembered(have, f"{witness}_all")
        if memory is None:
            return after
        strict = dict.fromkeys(memory["not_null"], _forbidding_null)
        indexes = (*after.indexes, *forgotten(after, memory))
        return TableState(paths.changed(after.schema, strict), indexes)

    async def apply(self, target: Target) -> int:
        state = self.existing(target.state)
        memory = remembered(state, f"{target.witness}_all")
        if memory is None:
            lost = [index_to(i) for i in state.indexes if i.is_on(self._todo(state))]
            kept = {p: _text(state.column(p).metadata) for p in self._todo(state)}
            strict = [p for p in self._todo(state) if not state.column(p).nullable]
            memory = {"indexes": lost, "metadata": kept, "not_null": strict}
            await target.add_columns([remember(f"{target.witness}_all", memory)])
        for index in self.existing(target.state).indexes:
            if index.is_on(self._todo(self.existing(target.state))):
                await target.drop_index(index.name)
        for number, path in enumerate(self.columns):
            await self._retype(target, path, f"{target.witness}_{number}")
            have = self.existing(target.state).column(path)
            if memory["metadata"].get(path) and not have.metadata:
                await target.set_metadata(path, memory["metadata"][path])
            if path in memory["not_null"] and have.nullable:
                await self._forbid_null(target, path, f"{target.witness}_{number}_old")
        for index in forgotten(self.existing(target.state), memory):
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
        """Adds a column of the new type, fills it, and puts it in the place of the old one."""
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
                {"path": path, "rename": old, "nullable": True},  # new writers do not know it
                {"path": witness, "rename": path},
            ]
            await target.alter_columns(renames)
        await self._fill(target, path, old)  # what was written between filling and swapping

    async def _forbid_null(self, target: Target, path: str, old: str) -> None:
        for attempt in range(_SWEEPS):
            try:
                return await target.alter_columns([{"path": path, "nullable": False}])
            except ColumnNotNullableError:  # written by an old handle, into the old column
                if attempt == _SWEEPS - 1:
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


_SWEEPS = 5

_DIGITS = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}
"""Binary digits that a type keeps of an integer."""

_UNITS = ("s", "ms", "us", "ns")


def casts_back(old: Any, new: Any) -> bool:
    """Returns whether every value that fits the new type is the same after a cast back. Pure."""
    if old == new:
        return True
    if pa.types.is_boolean(old):
        return bool(pa.types.is_integer(new))
    if pa.types.is_integer(old):
        if pa.types.is_floating(new):
            return int(old.bit_width) <= _DIGITS[new]
        return bool(pa.types.is_integer(new) or _is_text(new))  # what does not fit is refused
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


def _retyping(kind: pa.DataType) -> paths.Change:
    return lambda old: old.with_type(kind)


def _forbidding_null(old: pa.Field[Any]) -> pa.Field[Any]:
    return old.with_nullable(nullable=False)


def _text(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in (metadata or {}).items()}


@dataclass(frozen=True, slots=True)
class SetMetadata(Operation):
    """Set entries of a column's metadata; others stay. `None` removes one.

    Attributes:
        column: The column, by path.
        metadata: Text by key.
    """

    column: str
    metadata: Mapping[str, str | None]

    def __post_init__(self) -> None:
        checked_names("SetMetadata", [self.column])
        checked_names("SetMetadata", self.metadata)
        for key, value in self.metadata.items():
            if value is not None and not isinstance(value, str):
                raise InvalidMigrationError(
                    f"SetMetadata: {value!r} for {key!r} is not text.", "Give text, or None."
                )
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def traits(self) -> Traits:
        return Traits(reversible="setting it back")

    def describe(self) -> str:
        return f"set metadata {', '.join(self.metadata)} of {self.column}"

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        if not before.has(self.column):
            raise self.refuse(
                f"there is no column {self.column!r}.",
                f"Its columns are {', '.join(f.name for f in before.fields())}.",
            )

        def described(old: pa.Field[Any]) -> pa.Field[Any]:
            entries = {**_text(old.metadata), **self.metadata}
            kept: dict[bytes | str, bytes | str] = {
                k: v for k, v in entries.items() if v is not None
            }
            return old.with_metadata(kept) if kept else old.remove_metadata()

        schema = paths.changed(before.schema, {self.column: described})
        return TableState(schema, before.indexes)

    def done(self, state: TableState | None, witness: str) -> bool:
        self.evolve(state)  # refuses where there is no such column
        have = _text(self.existing(state).column(self.column).metadata)
        return all(have.get(key) == value for key, value in self.metadata.items())

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = _text(self.existing(before).column(self.column).metadata)
        back = {key: was.get(key) for key in self.metadata}
        return (SetMetadata(self.column, back, table=self.table),)

    async def apply(self, target: Target) -> int:
        await target.set_metadata(self.column, self.metadata)
        return 0
