"""Operations that add, drop, rename and describe columns; most of them change metadata only.

A column is given by path (`address.city`). Types and nullability are in `operations.column_types`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import Operation, Traits, refuse_embedding
from aiomigrate.operations.rows import Update
from aiomigrate.operations.target import Target
from aiomigrate.schema import paths
from aiomigrate.schema.sql import Literal, checked_names, checked_new, quote
from aiomigrate.schema.state import EMBEDDING, Index, TableState, metadata_text, spell


@dataclass(frozen=True, slots=True)
class SwapBack(Operation):
    """Put the old vector column back in its place and drop the new one. It undoes a `Reembed`.

    The new column becomes a witness, which is dropped when the migration has been recorded. The
    two columns are renamed in one commit; indexes on the new one are dropped first. It cannot be
    undone.

    Attributes:
        column: The vector column.
        keep: The present name of the old vector column.
        not_null: Whether the old column was NOT NULL. It becomes NOT NULL again if no row is NULL.
        embedding: The table's earlier embedding functions as JSON, `None` if none used the column.
    """

    column: str
    keep: str
    not_null: bool = False
    embedding: str | None = None

    @property
    def traits(self) -> Traits:
        return Traits(commits="2, and 1 for each index")

    @property
    def shows(self) -> bool:
        return False

    def describe(self) -> str:
        return f"put {self.keep} back as {self.column}"

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        for column in (self.column, self.keep):
            if column not in before.schema.names:
                raise self.refuse(
                    f"there is no column {column!r}, so the old vectors cannot be restored.",
                    "Re-embed with the old model instead (op.Reembed).",
                )
        fields = [f for f in before.schema if f.name not in (self.column, self.keep)]
        schema = pa.schema([*fields, before.column(self.keep).with_name(self.column)])
        kept = [
            i.renamed({self.keep: self.column}) for i in before.indexes if not self._is_dropped(i)
        ]
        return TableState(schema, tuple(kept))

    def _is_dropped(self, index: Index) -> bool:
        return index.columns == (self.column,)

    def done(self, state: TableState | None, witness: str) -> bool:
        return self.existing(state).has(f"{witness}_gone")

    def predict(self, state: TableState | None, witness: str) -> TableState | None:
        return None  # whether the column becomes NOT NULL depends on the rows

    async def apply(self, target: Target) -> int:
        for index in self.existing(target.state).indexes:
            if self._is_dropped(index):
                await target.drop_index(index.name)
        if self.embedding is not None:
            await target.set_schema_metadata({EMBEDDING.decode(): self.embedding})
        back: dict[str, Any] = {"path": self.keep, "rename": self.column}
        if self.not_null and not await target.count_rows(f"{quote(self.keep)} IS NULL"):
            back["nullable"] = False
        away = {"path": self.column, "rename": f"{target.witness}_gone"}
        await target.alter_columns([away, back])
        return 0


@dataclass(frozen=True, slots=True)
class AddColumns(Operation):
    """Add nullable columns, NULL in every row unless `values` or `sql` fill them.

    One metadata commit adds all columns; columns that exist with the same type are left as they
    are. Filling is an `Update` of the rows where the new columns are NULL, which does not block
    writers. Old writers do not know the columns and store NULL; to forbid NULL, follow with
    `SetNotNull`. It is undone by dropping the columns that it added.

    Attributes:
        columns: Arrow type by path of the new column; or a `pa.Field`, for its metadata.
        values: Literal by column, for the existing rows.
        sql: SQL expression over the row by column, for the existing rows; as in `Update`.
    """

    columns: Mapping[str, pa.DataType | pa.Field[Any]]
    values: Mapping[str, Literal] = field(default_factory=dict, kw_only=True)
    sql: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        checked_names("AddColumns", self.columns)
        for path, given in self.columns.items():
            kind = given.type if isinstance(given, pa.Field) else given
            if not isinstance(kind, pa.DataType) or pa.types.is_null(kind):
                raise InvalidMigrationError(
                    f"AddColumns: {kind!r} is not a valid type for column {path!r}.",
                    "Give an Arrow type such as pa.string().",
                )
            if isinstance(given, pa.Field) and not given.nullable:
                raise InvalidMigrationError(
                    f"AddColumns: {path!r} is NOT NULL, but existing rows have no value for it.",
                    "Add it nullable, fill it with values= or sql=, and follow with op.SetNotNull.",
                )
        checked_new("AddColumns", (name for path in self.columns for name in path.split(".")))
        for column in (*self.values, *self.sql):
            if column not in self.columns or "." in column:
                raise InvalidMigrationError(
                    f"AddColumns: values= or sql= fills {column!r}, which is not a column that is "
                    "added.",
                    "Fill only columns that `columns` names, and no field of a struct.",
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
        unusable = [
            f"{path}: LanceDB cannot filter by or index a field added to a struct until the rows "
            "are rewritten; follow with op.Rebuild()."
            for path in nested
        ]
        return (*unusable, *self._ambiguous_vectors(before))

    def _ambiguous_vectors(self, before: TableState) -> tuple[str, ...]:
        have = {f.type for f in before.fields() if pa.types.is_fixed_size_list(f.type)}
        ambiguous = [
            path
            for path in self.columns
            if pa.types.is_fixed_size_list(kind := self._field(path).type)
            and kind in have
            and not before.has(path)
        ]
        return tuple(
            f"{path}: with a second vector column of the same dimension, searches that name no "
            "vector column fail; first release code that passes vector_column_name."
            for path in ambiguous
        )

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        for path in self.columns:
            parent, _ = paths.split(path)
            if parent and not before.has(parent):
                raise self.refuse_missing_column(before, parent)
            if parent and not pa.types.is_struct(before.column(parent).type):
                raise self.refuse(
                    f"column {parent!r} is {spell(before.column(parent))}, not a struct.",
                    "Add the field to a column that is a struct.",
                )
            if not before.has(path):
                continue
            have = before.column(path)
            if have.type != self._field(path).type:
                raise self.refuse(
                    f"column {path!r} exists as {spell(have)}, not {self._field(path).type}.",
                    "Drop or rename the existing column in an earlier migration.",
                )
        return before.with_schema(paths.added(before.schema, self._missing(before)))

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        new = self._missing(self.existing(before))
        return (DropColumns(*new, table=self.table),) if new else ()

    def _field(self, path: str) -> pa.Field[Any]:
        given = self.columns[path]
        _, name = paths.split(path)
        if isinstance(given, pa.Field):
            return given.with_name(name)
        return pa.field(name, given)

    def _missing(self, state: TableState) -> dict[str, pa.Field[Any]]:
        return {path: self._field(path) for path in self.columns if not state.has(path)}

    async def apply(self, target: Target) -> int:
        fields = []
        for path, new in self._missing(self.existing(target.state)).items():
            *parents, _ = path.split(".")
            whole = new
            for name in reversed(parents):  # LanceDB takes a struct of the new fields only
                whole = pa.field(name, pa.struct([whole]))
            fields.append(whole)
        await target.add_columns(fields)
        return 0


@dataclass(frozen=True, slots=True, init=False)
class DropColumns(Operation):
    """Drop columns, and the indexes on them. Columns that do not exist are skipped.

    One metadata commit drops the columns, after one commit for each index. Open handles of other
    processes keep the old schema until they refresh, and code that uses a column fails: in a
    rolling deploy, first release code that does not use it. A column that an embedding function
    of the table uses is refused. It is undone by restoring the previous table version, which a
    savepoint keeps.

    Attributes:
        columns: The columns, by path.
    """

    columns: tuple[str, ...]

    def __init__(self, *columns: str, **common: Any) -> None:
        Operation.__init__(self, **common)
        object.__setattr__(self, "columns", checked_names("DropColumns", columns))

    @property
    def traits(self) -> Traits:
        return Traits(
            destructive=True,
            reversible="restoring the previous table version",
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
        have = ", ".join(f.name for f in before.fields())
        warnings = []
        if there:
            warnings.append(
                f"{', '.join(there)}: code that reads or writes it fails; first release code that "
                "does not use it, then drop it."
            )
        if gone:
            warnings.append(f"{', '.join(gone)}: there is nothing to drop; the columns are {have}.")
        return tuple(warnings)

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        refuse_embedding(self, before, self.columns)
        schema = paths.changed(before.schema, {column: lambda _: None for column in self.columns})
        if not len(schema):
            raise self.refuse(
                "no column would be left.", "Keep one column, or drop the table (op.DropTable)."
            )
        return before.with_schema(schema)

    async def apply(self, target: Target) -> int:
        state = self.existing(target.state)
        # LanceDB keeps the index of a dropped column, which breaks filtered reads: drop it first.
        for index in state.indexes:
            if index.is_on(self.columns):
                await target.drop_index(index.name)
        await target.drop_columns([c for c in self.columns if state.has(c)])
        return 0


@dataclass(frozen=True, slots=True)
class RenameColumns(Operation):
    """Rename columns in one commit; columns may exchange their names.

    Only metadata changes, and indexes follow their column. Readers see all new names at once;
    code that uses an old name fails. In a rolling deploy, add the new column instead, write both,
    and drop the old one a release later. A column that an embedding function of the table uses is
    refused. It is undone by renaming back.

    Attributes:
        names: New name by old path. The new name has no path: a field stays in its struct.
    """

    names: Mapping[str, str]

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        checked_names("RenameColumns", self.names.keys())
        checked_new("RenameColumns", self.names.values())
        new = self._new_paths
        checked_names("RenameColumns", new.values())
        if any(old == target for old, target in new.items()):
            raise InvalidMigrationError(
                "RenameColumns: a column is renamed to itself.", "Leave that column out."
            )
        object.__setattr__(self, "names", dict(self.names))

    @property
    def _new_paths(self) -> dict[str, str]:
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
        """Whether the names change; a permutation of the same names may leave the schema equal."""
        return set(self.names) != set(self._new_paths.values())

    def describe(self) -> str:
        return "rename " + ", ".join(f"{old} to {new}" for old, new in self.names.items())

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None or not all(before.has(column) for column in self.names):
            return ()
        return (
            (
                f"{', '.join(self.names)}: code that uses the old name fails afterwards; in a "
                "rolling deploy add the new column, write both, and drop the old one later."
            ),
        )

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        new = self._new_paths
        gone = set(new) - set(new.values())
        if (
            self.shows
            and all(before.has(path) for path in new.values())
            and not any(before.has(old) for old in gone)
        ):
            return before
        for old in new:
            if not before.has(old):
                raise self.refuse_missing_column(before, old)
        for path in set(new.values()) - set(new):
            if before.has(path):
                raise self.refuse(
                    f"column {path!r} exists already.", "Choose another name, or rename both."
                )
        refuse_embedding(self, before, self.names)
        changes = {old: _rename_to(name) for old, name in self.names.items()}
        schema = paths.changed(before.schema, changes)
        return TableState(schema, tuple(index.renamed(self.names) for index in before.indexes))

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        back = {new: paths.split(old)[1] for old, new in self._new_paths.items()}
        return (RenameColumns(back, table=self.table),)

    def done(self, state: TableState | None, witness: str) -> bool:
        if self.shows:
            return Operation.done(self, state, witness)
        return self.existing(state).has(f"{witness}_done")

    async def apply(self, target: Target) -> int:
        renames = [{"path": old, "rename": new} for old, new in self.names.items()]
        if not self.shows:
            # The same commit renames the witness, by which a second run sees that it was made.
            if not self.existing(target.state).has(target.witness):
                await target.add_columns([pa.field(target.witness, pa.bool_())])
            renames.append({"path": target.witness, "rename": f"{target.witness}_done"})
        await target.alter_columns(renames)
        return 0


def _rename_to(name: str) -> paths.Change:
    return lambda old: old.with_name(name)


@dataclass(frozen=True, slots=True)
class SetMetadata(Operation):
    """Set entries of a column's metadata, and leave the other entries as they are.

    It is one metadata commit, which changes no row. It is undone by setting the
    earlier values.

    Attributes:
        column: The column, by path.
        metadata: Text by key; `None` removes the entry.
    """

    column: str
    metadata: Mapping[str, str | None]

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        checked_names("SetMetadata", [self.column])
        checked_names("SetMetadata", self.metadata)
        for key, value in self.metadata.items():
            if value is not None and not isinstance(value, str):
                raise InvalidMigrationError(
                    f"SetMetadata: {value!r} for {key!r} is not text.",
                    "Give text, or None to remove the entry.",
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
            raise self.refuse_missing_column(before, self.column)

        def described(old: pa.Field[Any]) -> pa.Field[Any]:
            entries = {**metadata_text(old.metadata), **self.metadata}
            kept: dict[bytes | str, bytes | str] = {
                k: v for k, v in entries.items() if v is not None
            }
            return old.with_metadata(kept) if kept else old.remove_metadata()

        schema = paths.changed(before.schema, {self.column: described})
        return TableState(schema, before.indexes)

    def done(self, state: TableState | None, witness: str) -> bool:
        self.evolve(state)  # raises if there is no such column
        have = metadata_text(self.existing(state).column(self.column).metadata)
        return all(have.get(key) == value for key, value in self.metadata.items())

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = metadata_text(self.existing(before).column(self.column).metadata)
        back = {key: was.get(key) for key in self.metadata}
        return (SetMetadata(self.column, back, table=self.table),)

    async def apply(self, target: Target) -> int:
        await target.set_metadata(self.column, self.metadata)
        return 0
