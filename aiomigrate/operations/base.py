"""What an operation is: a pure half that predicts, an effectful half that acts.

The vocabulary shared by the planner (which folds `evolve` over schemas), the executor (which runs
`apply` and compares) and the reports (which print `describe`). No operation lives here, and
nothing here knows LanceDB: `apply` acts through the `Target` protocol.
"""

from __future__ import annotations

import copy
import enum
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError, OperationError
from aiomigrate.operations import paths

WITNESS_PREFIX = "_aiomigrate_"
"""Start of the names of columns that are ours; none outlives its migration."""

LEFTOVER = f"{WITNESS_PREFIX}leftover"
"""The only column of what is left of a table whose creation was undone: it counts as no table."""

_MEMORY = b"aiomigrate:memory"

TUNING = "tuning"
"""In the metadata of an operation's field: it says how, not what, and is no part of a checksum."""

Literal = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Index:
    """An index as far as two tables can be compared by it: its kind and its columns.

    Attributes:
        kind: LanceDB's name of the kind, such as `BTree` or `Bitmap`.
        columns: The indexed columns by path, in order.
        name: LanceDB's name of this index; not compared.
        options: The parameters it was built with, as far as LanceDB tells, by the name that
            lancedb's configuration classes give them; not compared.
    """

    kind: str
    columns: tuple[str, ...]
    name: str = field(default="", compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.kind} {','.join(self.columns)}"

    def renamed(self, names: Mapping[str, str]) -> Index:
        """Returns it after columns were renamed, by path; it keeps its own name."""
        return replace(self, columns=tuple(paths.renamed(column, names) for column in self.columns))

    def is_on(self, columns: Iterable[str]) -> bool:
        """Returns whether it is on some columns, or on a field of theirs."""
        return any(
            own == path or own.startswith(f"{path}.") for path in columns for own in self.columns
        )


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
    _ours: list[list[str]] = field(default_factory=list, init=False, repr=False)
    _after: list[tuple[Operation, TableState | None]] = field(
        default_factory=list, init=False, repr=False
    )

    def shape(self) -> Mapping[str, Any]:
        """Returns a JSON value that is equal for equal shapes: order, names, metadata aside.

        Columns of ours (witnesses) are left out: they are never part of what a table is.
        """
        if not self._shape:  # asked for several times per operation
            fields = dict(sorted((f.name, spell(f)) for f in self.fields()))
            indexes = sorted({str(index) for index in self.indexes})
            self._shape.append({"fields": fields, "indexes": indexes})
        return self._shape[0]

    def after(self, operation: Operation) -> TableState | None:
        """Predicts this table after an operation, once however often it is asked.

        Raises:
            OperationError: The operation cannot be applied to such a table.
        """
        for known, after in self._after:
            if known is operation:
                return after
        after = operation.evolve(self)
        self._after.append((operation, after))
        return after

    def fields(self) -> list[pa.Field[Any]]:
        """Returns the table's fields without those of ours."""
        if not self.witnesses():
            return list(self.schema)
        return [f for f in self.schema if not f.name.startswith(WITNESS_PREFIX)]

    @property
    def is_leftover(self) -> bool:
        """Whether it is all that is left of a table whose creation was undone."""
        return self.schema.names == [LEFTOVER]

    def same(self, other: TableState) -> bool:
        """Returns whether both have one shape."""
        if len(self.schema) == len(other.schema):
            if self._is_like(other):
                return True
        elif not (self.witnesses() or other.witnesses()):
            return False
        return self.shape() == other.shape()

    def _is_like(self, other: TableState) -> bool:
        return self.indexes == other.indexes and self.schema.equals(other.schema)

    def foreseen_as(self, other: TableState) -> TableState:
        """Returns this state, which knows its shape already if it came as it was foreseen."""
        if self._is_like(other):
            object.__setattr__(self, "_shape", other._shape)
        return self

    def has(self, column: str) -> bool:
        """Returns whether the column exists, by path."""
        return paths.find(self.schema, column) is not None

    def column(self, path: str) -> pa.Field[Any]:
        """Returns a column that exists, by path."""
        found = paths.find(self.schema, path)
        assert found is not None, path  # noqa: S101 - callers have asked `has`
        return found

    def witnesses(self) -> list[str]:
        """Returns the names of the columns that are ours."""
        if not self._ours:
            names = self.schema.names
            self._ours.append([name for name in names if name.startswith(WITNESS_PREFIX)])
        return self._ours[0]

    def with_fields(self, fields: Iterable[pa.Field[Any]]) -> TableState:
        """Returns this state with other fields, and without indexes on columns that are gone."""
        return self.with_schema(pa.schema(list(fields)))

    def with_schema(self, schema: pa.Schema) -> TableState:
        """Returns this state with another schema, and without indexes on columns that are gone."""
        kept = tuple(
            index
            for index in self.indexes
            if all(paths.find(schema, column) is not None for column in index.columns)
        )
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
        commits: How many commits it makes, in words.
    """

    rewriting: bool = False
    destructive: bool = False
    reversible: str = ""
    commits: str = "1"

    def __str__(self) -> str:
        words = ["rewriting" if self.rewriting else "metadata-only", f"commits: {self.commits}"]
        if self.destructive:
            words.append("destructive")
        words.append(f"undone by {self.reversible}" if self.reversible else "not reversible")
        return ", ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What an operation leaves to LanceDB to understand.

    Attributes:
        table: The table whose columns it names.
        where: A condition.
        sets: An expression by column that it sets.
        values: A literal by column that it sets.
    """

    table: str
    where: str | None = None
    sets: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Literal] = field(default_factory=dict)


Transform = Callable[[pa.RecordBatch], Awaitable[pa.RecordBatch]]
"""What rows become, batch by batch."""


class Target(Protocol):
    """A table in the executor's hands: each change is one recorded, shielded commit."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> TableState | None:
        """The table as last read, `None` if it does not exist."""

    @property
    def witness(self) -> str:
        """A column name that belongs to this operation of this migration alone."""

    def sibling(self, name: str) -> Target:
        """Returns another table that the operation names."""

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        """Tells how far the operation is."""

    def tell(self, topic: str, what: Any) -> None:
        """Puts a JSON value into the migration's report and history."""

    async def create(self, schema: pa.Schema, rows: pa.Table | None = None) -> None: ...

    async def drop(self) -> None: ...

    async def overwrite(
        self, schema: pa.Schema, transform: Transform, *, batch_rows: int
    ) -> None: ...

    async def copy_to(self, name: str) -> None: ...

    async def add_columns(self, fields: Sequence[pa.Field[Any]]) -> None: ...

    async def drop_columns(self, names: Sequence[str]) -> None: ...

    async def alter_columns(self, alterations: Sequence[Mapping[str, Any]]) -> None: ...

    async def set_metadata(self, column: str, metadata: Mapping[str, str | None]) -> None: ...

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> None: ...

    async def cover(self, index: Index, timeout_s: float) -> None: ...

    async def drop_index(self, name: str) -> None: ...

    async def update(
        self,
        *,
        values: Mapping[str, Any],
        sql: Mapping[str, str],
        where: str | None,
        unless_live: bool = False,
    ) -> int | None: ...

    async def update_in_batches(
        self,
        *,
        values: Mapping[str, Any],
        sql: Mapping[str, str],
        where: str,
        batch_rows: int | None,
    ) -> int: ...

    async def delete(self, where: str) -> int: ...

    async def insert_missing(self, key: str, rows: pa.Table) -> int: ...

    async def optimize(self, cleanup_older_than_s: float | None) -> None: ...

    async def fill(self, filling: Any) -> int:
        """Fills a column by a function (see `operations.fill.Filling`); returns the rows filled."""

    async def compute(
        self,
        function: Any,
        source: str,
        fields: Sequence[pa.Field[Any]],
        *,
        batch_rows: int,
        workers: int,
    ) -> None: ...

    async def ask(
        self, function: Callable[..., Any], values: Sequence[Any], kind: pa.DataType, pace: Any
    ) -> list[Any]:
        """Calls a function with values as `fill` would; returns what it gave, as Python values."""

    async def uncovered(self, index: Index) -> int: ...

    async def sample(
        self, where: str, columns: Sequence[str], rows: int, *, seed: str
    ) -> pa.Table: ...

    async def nearest(
        self, column: str, vectors: Sequence[Sequence[float]], rows: int, key: str, where: str
    ) -> list[list[Any]]: ...

    async def set_schema_metadata(self, metadata: Mapping[str, str | None]) -> None: ...

    def free_bytes(self) -> int | None:
        """Returns how much the disk still takes, `None` where that is not known."""

    async def is_live(self) -> bool:
        """Returns whether others commit to it, so that long commits would hold them up."""

    async def count_rows(self, where: str | None = None) -> int: ...

    def batches(
        self, where: str | None, columns: Sequence[str] | None, rows: int
    ) -> AsyncIterator[pa.RecordBatch]: ...


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
    def repeats(self) -> bool:
        """Whether, if its effect does not show, making it again does the same to the same rows."""
        return False

    @property
    def witnessed(self) -> bool:
        """Whether it has a column of ours on the table while it runs, its witness."""
        return not self.shows

    @property
    def needs_savepoint(self) -> bool:
        """Whether the table_version before must be kept from cleanup while this runs."""
        return False

    @property
    def identity(self) -> str | None:
        """What makes it the same work when its script is corrected; by default all it is."""
        return None

    @property
    def surveyed(self) -> str | None:
        """The column that a plan reads to tell what the operation will cost, if one."""
        return None

    def estimate(self, survey: Any) -> tuple[str, ...]:
        """Returns what it will cost, one sentence each. Pure.

        Args:
            survey: What was found in the column `surveyed` (see `operations.fill.Survey`).
        """
        return ()

    def discards(self, before: TableState) -> bool:
        """Returns whether it discards something of such a table that `undo` cannot bring back."""
        return self.traits.destructive

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables it changes or reads."""
        return () if self.table is None else (self.table,)

    @property
    def statement(self) -> Statement | None:
        """The SQL in it, to be tried before anything is written."""
        return None

    def expand(self) -> tuple[Operation, ...]:
        """Returns the simple operations that it stands for, by default itself."""
        return (self,)

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        """Returns what it breaks for code and handles still running, one sentence each. Pure.

        Args:
            before: The table before it.
        """
        return ()

    def undo(self, before: TableState | None) -> tuple[Operation, ...] | None:
        """Returns the operations that undo it, `None` where none can. Pure.

        Args:
            before: The table before it.
        """
        return None

    def fold(self, states: Mapping[str, TableState | None]) -> dict[str, TableState | None]:
        """Predicts every table after this operation, given at least those it names. Pure.

        Raises:
            OperationError: The operation cannot be applied to such tables.
        """
        after = dict(states)
        name = self.table
        if name is None:  # code that belongs to no table
            return after
        if states[name] is not None or self.when_missing is not Missing.SKIP:
            after[name] = _evolved(self, states[name])
        return after

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
        after = _evolved(self, state)
        if state is None or after is None:
            return state is after
        return after.same(state)

    def predict(self, state: TableState | None, witness: str) -> TableState | None:
        """Predicts the table after `apply`, which may finish what an interrupted run began. Pure.

        Args:
            state: The table as it is, perhaps halfway.
            witness: The column that belongs to this operation.
        """
        return _evolved(self, state)

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
    """Checks names that a migration gives to columns, each its own without a path.

    Raises:
        InvalidMigrationError: LanceDB refuses one, or it is kept for our own columns.
    """
    for name in names:
        if name.startswith(WITNESS_PREFIX):
            raise InvalidMigrationError(
                f"{what}: {name!r} is reserved.", f"Avoid names in {WITNESS_PREFIX}*."
            )
        if not name or "." in name or "`" in name or name.lower() in _KEPT:
            raise InvalidMigrationError(
                f"{what}: LanceDB takes no column named {name!r}.",
                "Use a non-empty name without a dot or backtick, and none of LanceDB's own.",
            )


_KEPT = ("_rowid", "_rowaddr", "_row_created_at_version", "_row_last_updated_at_version")


def is_table_name(name: object) -> bool:
    """Returns whether LanceDB takes a table of that name (measured)."""
    return (
        isinstance(name, str)
        and name not in (".", "..")
        and re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name) is not None
    )


def quote(column: str) -> str:
    """Returns a column, by path, as LanceDB's SQL quotes it."""
    return ".".join("`" + name.replace("`", "``") + "`" for name in column.split("."))


EMBEDDING = b"embedding_functions"
"""Key of the schema metadata in which lancedb keeps a table's embedding functions."""


def embedding_columns(schema: pa.Schema) -> dict[str, str]:
    """Returns the columns that the table's embedding functions name, with the function's name.

    LanceDB keeps them in the schema's metadata and does not follow renames and drops: the next
    `add` then fails (facts: 36).
    """
    return {
        str(told[key]): str(told.get("name", "?"))
        for told in embeddings(schema.metadata)
        for key in ("source_column", "vector_column")
        if isinstance(told.get(key), str)
    }


def embeddings(metadata: Mapping[bytes, bytes] | None) -> list[Mapping[str, Any]]:
    """Returns what a schema's metadata says of its embedding functions, an entry for each."""
    try:
        found = json.loads((metadata or {}).get(EMBEDDING, b"[]"))
    except ValueError:
        return []
    return [told for told in found if isinstance(told, Mapping)] if isinstance(found, list) else []


def kept_metadata(before: pa.Schema, names: Iterable[str]) -> dict[bytes | str, bytes | str] | None:
    """Returns a schema's metadata as it is right for other columns.

    Args:
        before: The schema before.
        names: The columns after.
    """
    metadata: dict[bytes | str, bytes | str] = dict((before.metadata or {}).items())
    have = set(names)
    whole = [
        told
        for told in embeddings(before.metadata)
        if have.issuperset(
            str(told[key]) for key in ("source_column", "vector_column") if told.get(key)
        )
    ]
    if EMBEDDING in metadata:
        del metadata[EMBEDDING]
        if whole:
            metadata[EMBEDDING] = json.dumps(whole)
    return metadata or None


def refuse_embedding(operation: Operation, state: TableState, columns: Iterable[str]) -> None:
    """Refuses what would leave an embedding function with a column that is not there.

    Raises:
        OperationError: One of the columns is named by one.
    """
    named = embedding_columns(state.schema)
    for column in columns:
        if column in named:
            raise operation.refuse(
                f"the table's embedding function {named[column]!r} uses column {column!r}, and "
                "LanceDB would go on looking for it: the next add() would fail.",
                "Use op.Rebuild(function, schema=...) without or with the renamed column: it "
                "writes the table's metadata anew.",
            )


def remember(name: str, what: Mapping[str, Any], kind: pa.DataType | None = None) -> pa.Field[Any]:
    """Returns a column of ours that remembers something as long as its migration runs."""
    return pa.field(name, kind or pa.bool_(), metadata={_MEMORY: json.dumps(what)})


def remembered(state: TableState | None, name: str) -> Mapping[str, Any] | None:
    """Returns what a column of ours remembers, `None` where there is no such column."""
    if state is None or (position := state.schema.get_field_index(name)) < 0:
        return None
    text = (state.schema.field(position).metadata or {}).get(_MEMORY, b"{}")
    found = json.loads(text)
    return found if isinstance(found, dict) else {}


def _evolved(operation: Operation, state: TableState | None) -> TableState | None:
    return operation.evolve(None) if state is None else state.after(operation)
