"""Operations that create, drop, rename and optimize whole tables.

Operations that rewrite a table are in `operations.rebuild`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import Missing, Operation, Traits
from aiomigrate.operations.target import Target
from aiomigrate.schema.sql import checked_names, checked_new
from aiomigrate.schema.state import EMBEDDING, TableState, metadata_text, spell


class ArrowSchemaSource(Protocol):
    """An object with an Arrow schema, such as a `LanceModel` class."""

    def to_arrow_schema(self) -> pa.Schema: ...


@dataclass(frozen=True, slots=True)
class CreateTable(Operation):
    """Create a table, empty or with its first rows, in one commit.

    A table that exists with an equal schema (in any order of fields) is adopted as it is, whatever
    its rows. It is undone by removing the table if this created it.

    Attributes:
        schema: Fields with Arrow types, or a `LanceModel` class. Write it in the script: a class
            of the application changes later.
        rows: The first rows, each with its values by column name.
    """

    schema: pa.Schema | ArrowSchemaSource
    rows: Sequence[Mapping[str, Any]] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        schema: Any = self.schema
        if not isinstance(schema, pa.Schema) and hasattr(schema, "to_arrow_schema"):
            schema = schema.to_arrow_schema()
            object.__setattr__(self, "schema", schema)
        if not isinstance(schema, pa.Schema) or not len(schema):
            raise InvalidMigrationError(
                f"CreateTable: {schema!r} is not a schema.",
                "Pass a pyarrow.Schema with at least one field, or a LanceModel class.",
            )
        if len(set(schema.names)) != len(schema.names):
            raise InvalidMigrationError(
                "CreateTable: a field is repeated.", "Name each field once."
            )
        checked_new("CreateTable", schema.names)
        object.__setattr__(self, "rows", tuple(dict(row) for row in self.rows))
        for row in self.rows:
            if unknown := row.keys() - set(schema.names):
                raise InvalidMigrationError(
                    f"CreateTable: a row has {min(unknown)!r}, which is not a field.",
                    f"Give values only for its fields: {', '.join(schema.names)}.",
                )
        self._arrow_rows()

    @property
    def arrow(self) -> pa.Schema:
        """The schema as Arrow."""
        assert isinstance(self.schema, pa.Schema)  # noqa: S101 - __post_init__ converted it
        return self.schema

    def _arrow_rows(self) -> pa.Table | None:
        if not self.rows:
            return None
        try:
            rows = pa.Table.from_pylist([dict(row) for row in self.rows], schema=self.arrow)
            rows.validate(full=True)
        except pa.ArrowException as exc:
            raise InvalidMigrationError(
                f"CreateTable: the rows do not fit the schema: {exc}.",
                "Correct the rows, or the schema.",
            ) from exc
        for column in self.arrow:
            if not column.nullable and rows[column.name].null_count:
                raise InvalidMigrationError(
                    f"CreateTable: a row has no {column.name!r}, which is NOT NULL.",
                    "Give each row a value, or make the field nullable.",
                )
        return rows

    @property
    def creates_table(self) -> bool:
        return True

    @property
    def traits(self) -> Traits:
        return Traits(reversible="dropping the table")

    def describe(self) -> str:
        return f"create table ({', '.join(self.arrow.names)})"

    def evolve(self, state: TableState | None) -> TableState:
        wanted = TableState(self.arrow)
        if state is None:
            return wanted
        have = {f.name: spell(f) for f in state.fields()}
        want = {f.name: spell(f) for f in wanted.fields()}
        if have != want:
            parts = [
                f"{n}: is {have.get(n, 'absent')}, not {want.get(n, 'absent')}"
                for n in sorted(have.keys() | want.keys())
                if have.get(n) != want.get(n)
            ]
            raise self.refuse(
                f"the table exists with another schema ({'; '.join(parts)}).",
                "If that schema is right, record this version with `aiomigrate stamp`; otherwise "
                "rename or drop the table.",
            )
        return state

    def undo(self, before: TableState | None) -> tuple[Operation, ...] | None:
        """Returns no operation for a table it adopted; `None` for one that the rollback removes."""
        return None if before is None else ()

    async def apply(self, target: Target) -> int:
        await target.create(self.arrow, self._arrow_rows())
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class DropTable(Operation):
    """Drop a table with all its versions. It cannot be undone.

    It is refused unless destructive operations are allowed, and does nothing if the table does not
    exist. Write it last in its migration. Readers and writers of the table fail afterwards. Never
    create a table of the same name again: processes with an old handle would write into it.
    """

    @property
    def removes_table(self) -> bool:
        return True

    @property
    def traits(self) -> Traits:
        return Traits(destructive=True)

    @property
    def shows(self) -> bool:
        """Always false: a drop that was interrupted leaves files, and must be repeated."""
        return False

    def describe(self) -> str:
        return "drop the table"

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None:
            return ()
        return (f"{self.table}: dropping it deletes its rows and its history for good.",)

    def evolve(self, state: TableState | None) -> None:
        return None

    async def apply(self, target: Target) -> int:
        await target.drop()
        return 0


@dataclass(frozen=True, slots=True)
class RenameTable(Operation):
    """Rename a table: copy it, compare rows, schema and indexes, and drop the old one.

    LanceDB cannot rename a table. Rows that other writers commit during the copy are copied too;
    rows that they write into the old table after it are lost, so stop the writers first. Code that
    opens the old name fails afterwards. An interrupted run resumes.

    The line of migrations keeps its name: later migrations say `table="new", line="old"`. Versions
    and savepoints are not copied, so earlier migrations can only be undone by their inverses. It
    is undone by renaming back.

    Attributes:
        to: The new name.
    """

    to: str

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        checked_names("RenameTable", [self.to])

    @property
    def witnessed(self) -> bool:
        return True

    @property
    def removes_table(self) -> bool:
        return True

    @property
    def traits(self) -> Traits:
        return Traits(rewriting=True, reversible="renaming back", commits="2, and 1 for each index")

    @property
    def shows(self) -> bool:
        """Always false: it is several commits on two tables."""
        return False

    @property
    def tables(self) -> tuple[str, ...]:
        return (self.to,) if self.table is None else (self.table, self.to)

    def describe(self) -> str:
        return f"rename the table to {self.to}"

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None:
            return ()
        return (
            (
                f"{self.table}: code that opens the old name fails, and rows that are written "
                "to it while it is dropped are lost; stop its writers first."
            ),
            (
                f"{self.table}: its history and savepoints are dropped with the old name; earlier "
                "migrations can only be rolled back by their inverses."
            ),
        )

    def evolve(self, state: TableState | None) -> None:
        """Returns `None`: the table does not exist under its old name."""
        return

    def fold(self, states: Mapping[str, TableState | None]) -> dict[str, TableState | None]:
        old, new = states[self.table or ""], states.get(self.to)
        if self.to == self.table:
            raise self.refuse("the table has that name already.", "Choose another name.")
        if old is None and new is None and self.when_missing is Missing.FAIL:
            raise self.refuse("the table does not exist.", "Create it in an earlier migration.")
        if old is not None and new is not None and not new.witnesses() and not new.same(old):
            raise self.refuse(
                f"there is a table {self.to!r} already.", "Drop it first, or choose another name."
            )
        return {**states, self.table or "": None, self.to: old or new}

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        return (RenameTable(self.table or "", table=self.to),)

    def done(self, state: TableState | None, witness: str) -> bool:
        return state is None

    async def apply(self, target: Target) -> int:
        rows = await target.count_rows()
        await target.copy_to(self.to)
        await target.drop()
        return rows


@dataclass(frozen=True, slots=True)
class Optimize(Operation):
    """Compact small files and update indexes; optionally remove old versions.

    It changes no row, makes up to three commits, and makes none if there is nothing to do. Readers
    of a version that it removes fail. Undoing it does nothing.

    Attributes:
        cleanup_older_than_s: Age in seconds from which versions are removed, at least 3600: a
            shorter age corrupts tables that are written to meanwhile (measured). By default no
            version is removed.
    """

    cleanup_older_than_s: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        age = self.cleanup_older_than_s
        if age is not None and not age >= _MIN_AGE_S:
            raise InvalidMigrationError(
                f"Optimize: cleanup_older_than_s={age} would remove versions younger than an hour, "
                "which corrupts tables that are written to meanwhile.",
                f"Give {_MIN_AGE_S} or more.",
            )

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True, reversible="doing nothing: it changes no row", commits="0 to 3"
        )

    @property
    def shows(self) -> bool:
        return False

    def describe(self) -> str:
        age = self.cleanup_older_than_s
        return "optimize" + ("" if age is None else f", remove versions older than {age:g} s")

    def evolve(self, state: TableState | None) -> TableState:
        return self.existing(state)

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        return ()

    async def apply(self, target: Target) -> int:
        await target.optimize(self.cleanup_older_than_s)
        return 0


_MIN_AGE_S = 3600


@dataclass(frozen=True, slots=True)
class SetTableMetadata(Operation):
    """Set entries of a table's own metadata, and leave the other entries as they are.

    It is one metadata commit, which changes no row and which readers and writers need not know of.
    It needs pylance (the extra `lance`): lancedb alone cannot change a schema's metadata. It is
    undone by setting the earlier values.

    Attributes:
        metadata: Text by key; `None` removes the entry. Keys of LanceDB's own are refused.
    """

    metadata: Mapping[str, str | None]

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        checked_names("SetTableMetadata", self.metadata)
        for key, value in self.metadata.items():
            if value is not None and not isinstance(value, str):
                raise InvalidMigrationError(
                    f"SetTableMetadata: {value!r} for {key!r} is not text.",
                    "Give text, or None to remove the entry.",
                )
            if key == EMBEDDING.decode() or key.startswith(("lance", "ARROW:")):
                raise InvalidMigrationError(
                    f"SetTableMetadata: {key!r} is an entry of LanceDB's own.",
                    "Use op.Reembed or op.Rebuild to change a table's embedding functions; choose "
                    "another key for entries of yours.",
                )
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def traits(self) -> Traits:
        return Traits(reversible="setting it back")

    def describe(self) -> str:
        return f"set table metadata {', '.join(self.metadata)}"

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        self.require("lance", "lance")
        entries = {**metadata_text(before.schema.metadata), **self.metadata}
        kept: dict[bytes | str, bytes | str] = {k: v for k, v in entries.items() if v is not None}
        schema = before.schema.with_metadata(kept) if kept else before.schema.remove_metadata()
        return TableState(schema, before.indexes)

    def done(self, state: TableState | None, witness: str) -> bool:
        have = metadata_text(self.existing(state).schema.metadata)
        return all(have.get(key) == value for key, value in self.metadata.items())

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = metadata_text(self.existing(before).schema.metadata)
        back = {key: was.get(key) for key in self.metadata}
        return (SetTableMetadata(back, table=self.table),)

    async def apply(self, target: Target) -> int:
        await target.set_schema_metadata(self.metadata)
        return 0
