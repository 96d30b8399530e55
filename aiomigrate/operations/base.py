"""What an operation is: a pure half that predicts, an effectful half that acts.

The vocabulary shared by the planner (which folds `evolve` over schemas), the executor (which runs
`apply` and compares) and the reports (which print `describe`). No operation lives here, and
nothing here knows LanceDB: `apply` acts through the `Target` protocol.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError, OperationError

WITNESS_PREFIX = "_aiomigrate_"
"""Start of the names of columns that are ours; none outlives its migration."""

Literal = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Index:
    """An index as far as two tables can be compared by it: its kind and its columns.

    Attributes:
        kind: LanceDB's name of the kind, such as `BTree` or `Bitmap`.
        columns: The indexed columns, in order.
        name: LanceDB's name of this index; not compared.
    """

    kind: str
    columns: tuple[str, ...]
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.kind} {','.join(self.columns)}"

    @property
    def roots(self) -> tuple[str, ...]:
        """The columns of the table it is on: for a field of a struct, the struct."""
        return tuple(_split(column)[0] for column in self.columns)

    def renamed(self, names: Mapping[str, str]) -> Index:
        """Returns it after columns of the table were renamed; it keeps its own name."""
        parts = [_split(column) for column in self.columns]
        columns = tuple(names.get(root, root) + rest for root, rest in parts)
        return Index(self.kind, columns, self.name)


def _split(path: str) -> tuple[str, str]:
    root, dot, rest = path.partition(".")
    return root, dot + rest


@dataclass(frozen=True, slots=True, eq=False)
class TableState:
    """The shape of one table: what migrations predict and validation compares.

    Attributes:
        schema: Fields with Arrow types and nullability; metadata is not compared.
        indexes: Its indexes, in any order.
    """

    schema: pa.Schema
    indexes: tuple[Index, ...] = ()
    _shape: list[Mapping[str, Any]] = field(default_factory=list, init=False, repr=False)

    def shape(self) -> Mapping[str, Any]:
        """Returns a JSON value that is equal for equal shapes: order, names, metadata aside.

        Columns of ours (witnesses) are left out: they are never part of what a table is.
        """
        if not self._shape:  # asked for several times per operation
            fields = {f.name: spell(f) for f in sorted(self.fields(), key=lambda f: f.name)}
            indexes = sorted({str(index) for index in self.indexes})
            self._shape.append({"fields": fields, "indexes": indexes})
        return self._shape[0]

    def fields(self) -> list[pa.Field[Any]]:
        """Returns the table's fields without those of ours."""
        return [f for f in self.schema if not f.name.startswith(WITNESS_PREFIX)]

    def same(self, other: TableState) -> bool:
        """Returns whether both have one shape."""
        return self.shape() == other.shape()

    def has(self, column: str) -> bool:
        """Returns whether the column exists."""
        return self.schema.get_field_index(column) >= 0

    def witnesses(self) -> list[str]:
        """Returns the names of the columns that are ours."""
        return [name for name in self.schema.names if name.startswith(WITNESS_PREFIX)]

    def with_fields(self, fields: Iterable[pa.Field[Any]]) -> TableState:
        """Returns this state with other fields, and without indexes on columns that are gone."""
        schema = pa.schema(list(fields))
        names = set(schema.names)
        kept = tuple(i for i in self.indexes if names.issuperset(i.roots))
        return TableState(schema, kept)


def spell(field: pa.Field[Any]) -> str:
    """Returns a field's type and nullability as text, `int64!` for NOT NULL."""
    return f"{field.type}{'' if field.nullable else '!'}"


class Missing(enum.Enum):
    """What an operation does when its table does not exist."""

    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What kind of change an operation is, for plans and for people.

    Attributes:
        rewriting: Data files are written, so the cost grows with the table.
        destructive: Data or structure is discarded.
        reversible: By what it can be undone, or empty.
    """

    rewriting: bool = False
    destructive: bool = False
    reversible: str = ""

    def __str__(self) -> str:
        words = ["rewriting" if self.rewriting else "metadata-only"]
        if self.destructive:
            words.append("destructive")
        words.append(f"undone by {self.reversible}" if self.reversible else "not reversible")
        return ", ".join(words)


class Target(Protocol):
    """A table in the executor's hands: each method is one recorded, shielded commit."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> TableState | None:
        """The table as last read, `None` if it does not exist."""

    @property
    def witness(self) -> str:
        """A column name that belongs to this operation of this migration alone."""

    async def create(self, schema: pa.Schema) -> None: ...

    async def add_columns(self, fields: Sequence[pa.Field[Any]]) -> None: ...

    async def drop_columns(self, names: Sequence[str]) -> None: ...

    async def alter_columns(self, alterations: Sequence[Mapping[str, Any]]) -> None: ...

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> None: ...

    async def drop_index(self, name: str) -> None: ...

    async def update(
        self, *, values: Mapping[str, Any], sql: Mapping[str, str], where: str | None
    ) -> int: ...

    async def count_rows(self, where: str | None = None) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Base of all declarative operations: a frozen value.

    Attributes:
        table: The table to change; by default the table of the migration.
        when_missing: Whether a missing table is an error or passed over.
    """

    table: str | None = None
    when_missing: Missing = Missing.FAIL

    @property
    def traits(self) -> Traits:
        """What kind of change this is."""
        raise NotImplementedError

    @property
    def shows(self) -> bool:
        """Whether the effect can be seen in the table's schema or indexes."""
        return True

    @property
    def needs_savepoint(self) -> bool:
        """Whether the table_version before must be kept from cleanup while this runs."""
        return False

    def describe(self) -> str:
        """Returns one line for plans and logs, without the table's name."""
        raise NotImplementedError

    def evolve(self, state: TableState | None) -> TableState | None:
        """Predicts the table after this operation. Pure.

        Args:
            state: The table before, `None` if it does not exist.

        Returns:
            The table after; an equal state when the effect is already there.

        Raises:
            OperationError: The operation cannot be applied to such a table.
        """
        raise NotImplementedError

    def done(self, state: TableState | None, witness: str) -> bool:
        """Returns whether the effect is already there, so that nothing is to be done."""
        if not self.shows:
            return False
        after = self.evolve(state)
        if state is None or after is None:
            return state is after
        return after.same(state)

    async def apply(self, target: Target) -> int:
        """Makes the change; called only when not `done`. Returns the rows changed."""
        raise NotImplementedError

    def on(self, table: str | None) -> Operation:
        """Returns this operation bound to a table, its own if it names one."""
        if self.table is not None:
            return self
        bound = copy.copy(self)
        object.__setattr__(bound, "table", table)
        return bound

    def existing(self, state: TableState | None) -> TableState:
        """Returns the state.

        Raises:
            OperationError: The table does not exist.
        """
        if state is None:
            raise self.refuse(
                "the table does not exist.",
                "Create it in an earlier migration, or pass when_missing=op.Missing.SKIP.",
            )
        return state

    def refuse(self, why: str, remedy: str) -> OperationError:
        """Builds the error of an operation that does not fit its table."""
        return OperationError(f"{self.describe()} on table {self.table!r}: {why}", remedy)


def checked_names(what: str, names: Iterable[object]) -> tuple[str, ...]:
    """Returns column or table names as a tuple.

    Raises:
        InvalidMigrationError: One is not a non-empty string, is repeated, or none is given.
    """
    result = tuple(names)
    for name in result:
        if not isinstance(name, str) or not name:
            raise InvalidMigrationError(
                f"{what}: {name!r} is not a name.", "Use non-empty strings."
            )
    if not result:
        raise InvalidMigrationError(f"{what}: nothing is named.", "Name at least one.")
    if len(set(result)) != len(result):
        raise InvalidMigrationError(f"{what}: a name is repeated.", "Name each one once.")
    return result  # type: ignore[return-value]


def checked_new(what: str, names: Iterable[str]) -> None:
    """Checks names that a migration gives to columns.

    Raises:
        InvalidMigrationError: LanceDB refuses one, or it is kept for our own columns.
    """
    for name in names:
        if name.startswith(WITNESS_PREFIX):
            raise InvalidMigrationError(
                f"{what}: {name!r} is reserved.", f"Avoid names in {WITNESS_PREFIX}*."
            )
        if not name or "." in name:
            raise InvalidMigrationError(
                f"{what}: LanceDB takes no column named {name!r}.",
                "Use a non-empty name without a dot.",
            )


def quote(column: str) -> str:
    """Returns a column name as LanceDB's SQL quotes it."""
    return "`" + column.replace("`", "``") + "`"
