"""Operations on whole tables, but for rewriting them: that is `rewrite`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import Missing, Operation, Traits
from aiomigrate.operations.target import Target
from aiomigrate.schema.sql import checked_names, checked_new
from aiomigrate.schema.state import TableState, spell


class ArrowSchemaSource(Protocol):
    """Anything that can tell its Arrow schema, such as a `LanceModel` class."""

    def to_arrow_schema(self) -> pa.Schema: ...


@dataclass(frozen=True, slots=True)
class CreateTable(Operation):
    """Create a table, empty or with its first rows, in one commit.

    A table that exists with an equal schema (order of fields aside) is adopted as it is, whatever
    its rows.

    Attributes:
        schema: Its fields with Arrow types; freeze it in the script.
        rows: Its first rows by column name.
    """

    schema: pa.Schema | ArrowSchemaSource
    rows: Sequence[Mapping[str, Any]] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
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
                    f"CreateTable: a row has {min(unknown)!r}, which is no field.",
                    f"Its fields are {', '.join(schema.names)}.",
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
                f"CreateTable: the rows do not fit the schema: {exc}.", "Correct the rows."
            ) from exc
        for column in self.arrow:
            if not column.nullable and rows[column.name].null_count:
                raise InvalidMigrationError(
                    f"CreateTable: a row has no {column.name!r}, which is NOT NULL.",
                    "Give it a value.",
                )
        return rows

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
                "If that table is right, `aiomigrate stamp` this version; otherwise move it away.",
            )
        return state

    def undo(self, before: TableState | None) -> tuple[Operation, ...] | None:
        """Returns nothing for a table it adopted; one it made is taken away, not dropped."""
        return None if before is None else ()

    async def apply(self, target: Target) -> int:
        await target.create(self.arrow, self._arrow_rows())
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class DropTable(Operation):
    """Drop a table with all its history. It cannot be undone: it asks to be allowed.

    Last in its migration. Never make a table of the same name again: a process that holds an old
    handle would write into it.
    """

    @property
    def traits(self) -> Traits:
        return Traits(destructive=True)

    @property
    def shows(self) -> bool:
        """A drop that was killed midway leaves remains which must be dropped again."""
        return False

    def describe(self) -> str:
        return "drop the table"

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None:
            return ()
        return (f"{self.table}: its rows and its history are gone for good once it is dropped.",)

    def evolve(self, state: TableState | None) -> None:
        return None

    async def apply(self, target: Target) -> int:
        await target.drop()
        return 0


@dataclass(frozen=True, slots=True)
class RenameTable(Operation):
    """Give a table another name: copy it, compare rows, schema and indexes, drop the old one.

    LanceDB has no rename. Rows that others commit while it is copied are copied too; what an old
    handle writes into the old table after that is lost with it, so stop the writers first. The
    line keeps its name: later migrations say `table="new", line="old"`. History and savepoints are
    not copied: what was applied before can be undone by inverses only.

    Attributes:
        to: The new name.
    """

    to: str

    def __post_init__(self) -> None:
        checked_names("RenameTable", [self.to])

    @property
    def witnessed(self) -> bool:
        return True

    @property
    def traits(self) -> Traits:
        return Traits(rewriting=True, reversible="renaming back", commits="2, and 1 for each index")

    @property
    def shows(self) -> bool:
        """It is several commits on two tables."""
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
                f"{self.table}: code that opens the old name fails, and what an old handle "
                "writes while it is dropped is lost; stop its writers first."
            ),
            (
                f"{self.table}: its history and savepoints go with the old name; what was applied "
                "before can be rolled back by inverses only."
            ),
        )

    def evolve(self, state: TableState | None) -> None:
        """Returns `None`: under its old name it is gone."""
        return

    def fold(self, states: Mapping[str, TableState | None]) -> dict[str, TableState | None]:
        old, new = states[self.table or ""], states.get(self.to)
        if self.to == self.table:
            raise self.refuse("that is its name.", "Choose another name.")
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
    """Compact small files and bring indexes up to date; optionally remove old versions.

    Attributes:
        cleanup_older_than_s: Removes versions older than that, at least an hour: a shorter age
            beside writers corrupts (measured). By default nothing is removed.
    """

    cleanup_older_than_s: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        age = self.cleanup_older_than_s
        if age is not None and not age >= _MIN_AGE_S:
            raise InvalidMigrationError(
                f"Optimize: versions younger than an hour must stay, not {age} s.",
                f"Give {_MIN_AGE_S} or more: a shorter age beside writers corrupts the table.",
            )

    @property
    def traits(self) -> Traits:
        return Traits(rewriting=True, reversible="nothing: it changes no row", commits="0 to 3")

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
