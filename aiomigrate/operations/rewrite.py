"""Operations that stream all rows of a table: into itself, or into another one."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import (
    TUNING,
    WITNESS_PREFIX,
    Index,
    Missing,
    Operation,
    TableState,
    Target,
    Traits,
    checked_names,
    checked_new,
    kept_metadata,
    remember,
    remembered,
    spell,
)
from aiomigrate.operations.indexes import forgotten, index_to

BatchFunction = Callable[[pa.RecordBatch], pa.RecordBatch | Awaitable[pa.RecordBatch]]
"""From a batch of rows to a batch of rows; it may drop rows, or make more of one."""


def _checked_function(what: str, function: object) -> None:
    if not callable(function):
        raise InvalidMigrationError(
            f"{what}: {function!r} is not a function.",
            "Pass a function of a pyarrow.RecordBatch that returns one.",
        )


async def _call(what: str, function: BatchFunction, batch: pa.RecordBatch) -> pa.RecordBatch:
    result: Any = function(batch)
    if inspect.isawaitable(result):
        result = await result
    if not isinstance(result, pa.RecordBatch):
        raise TypeError(f"{what}: the function returned {type(result).__name__}, no RecordBatch")
    return result


def fitted(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Returns a batch in a schema: columns by name, cast where that loses nothing.

    Columns that are missing are NULL.

    Raises:
        pyarrow.ArrowException: A value does not fit.
    """
    columns = []
    for wanted in schema:
        position = batch.schema.get_field_index(wanted.name)
        if position < 0:
            columns.append(pa.nulls(len(batch), wanted.type))
        else:
            columns.append(_cast(batch.column(position), wanted.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _cast(array: Any, kind: pa.DataType) -> Any:
    """Returns an array as another type; fields of structs are taken by name, like columns."""
    if array.type == kind:
        return array  # a cast would copy
    if not (pa.types.is_struct(kind) and pa.types.is_struct(array.type)):
        return array.cast(kind)
    wanted: Any = kind
    fields = [wanted.field(position) for position in range(wanted.num_fields)]
    parts = [
        _cast(pc.struct_field(array, [field.name]), field.type)
        if array.type.get_field_index(field.name) >= 0
        else pa.nulls(len(array), field.type)
        for field in fields
    ]
    return pa.StructArray.from_arrays(parts, fields=fields, mask=array.is_null())


@dataclass(frozen=True, slots=True)
class Rebuild(Operation):
    """Rewrite a table, batch by batch, in one commit; indexes are made again.

    Memory is bounded by the batch, whatever the size of the table. The commit would discard what
    others commit meanwhile: that is detected, undone, and the table rebuilt again from what it
    then is; after three such losses it stops with everything kept.

    Attributes:
        function: From a `pyarrow.RecordBatch` to one, async or plain; by default rows stay as
            they are. Columns are taken by name and cast; those that are missing are NULL. It may
            be called again for rows it has seen.
        schema: The new fields; by default the present ones.
        batch_rows: Rows given to the function at once.
    """

    function: BatchFunction | None = None
    schema: pa.Schema | None = field(default=None, kw_only=True)
    batch_rows: int = field(default=4096, kw_only=True, metadata={TUNING: True})

    def __post_init__(self) -> None:
        if self.function is not None:
            _checked_function("Rebuild", self.function)
        if self.schema is not None:
            if not isinstance(self.schema, pa.Schema) or not len(self.schema):
                raise InvalidMigrationError(
                    f"Rebuild: {self.schema!r} is not a schema.",
                    "Pass a pyarrow.Schema with at least one field.",
                )
            checked_new("Rebuild", checked_names("Rebuild", self.schema.names))
        if not 1 <= self.batch_rows <= _MOST_ROWS:
            raise InvalidMigrationError(
                f"Rebuild: batch_rows={self.batch_rows!r}.", f"Give 1 to {_MOST_ROWS}."
            )

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            destructive=True,
            reversible="restoring the table_version before",
            commits="1, and 1 for each index",
        )

    @property
    def shows(self) -> bool:
        return False

    @property
    def needs_savepoint(self) -> bool:
        return True

    @property
    def overwrites(self) -> bool:
        return True

    def describe(self) -> str:
        how = "" if self.function is None else f" by {_name(self.function)}"
        return f"rebuild the table{how}"

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None:
            return ()
        return (
            (
                f"{self.table}: handles opened before are refused when they write, until they are "
                "refreshed."
            ),
        )

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        schema = pa.schema(before.fields()) if self.schema is None else self.schema
        if self.function is None:
            for new in schema:
                if not before.has(new.name) and not new.nullable:
                    raise self.refuse(
                        f"column {new.name!r} is new and NOT NULL.",
                        "Give a function that fills it.",
                    )
        kept = [i for i in before.indexes if self._keeps(i, before, schema)]
        return TableState(schema, tuple(kept))

    def _keeps(self, index: Index, before: TableState, schema: pa.Schema) -> bool:
        after = TableState(schema)
        return all(
            after.has(c) and before.has(c) and after.column(c).type == before.column(c).type
            for c in index.columns
        )

    def done(self, state: TableState | None, witness: str) -> bool:
        have = self.existing(state)
        memory = remembered(have, witness)
        return memory is not None and not forgotten(have, memory)

    def predict(self, state: TableState | None, witness: str) -> TableState:
        have = self.existing(state)
        memory = remembered(have, witness)
        if memory is None:
            return self.evolve(have)
        return TableState(have.schema, (*have.indexes, *forgotten(have, memory)))

    async def apply(self, target: Target) -> int:
        before = self.existing(target.state)
        rows = 0
        if remembered(before, target.witness) is None:
            schema = self.evolve(before).schema
            kept = [index_to(i) for i in before.indexes if self._keeps(i, before, schema)]
            whole = schema.append(remember(target.witness, {"indexes": kept}))
            whole = whole.with_metadata(
                {**(schema.metadata or {}), **(kept_metadata(before.schema, schema.names) or {})}
            )
            total = await target.count_rows()

            async def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
                nonlocal rows
                given = batch.select(
                    [n for n in batch.schema.names if not n.startswith(WITNESS_PREFIX)]
                )
                made = (
                    given
                    if self.function is None
                    else await _call(self.describe(), self.function, given)
                )
                rows += len(batch)
                target.progress(min(rows, total), total)
                return fitted(made, whole)

            await target.overwrite(whole, transform, batch_rows=self.batch_rows)
        memory = remembered(target.state, target.witness) or {}
        for index in forgotten(self.existing(target.state), memory):
            await target.create_index(index, index.options)
        return rows


def _name(function: object) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


@dataclass(frozen=True, slots=True)
class CopyInto(Operation):
    """Copy rows of another table into this one, those whose key is not there yet.

    To split a table: create the new ones, copy into each with `where`, then `Delete`. To merge
    tables: copy each into one. After a crash it goes on: rows that are there are passed over, so
    each is copied once.

    Attributes:
        source: The table to copy from.
        key: The column that identifies a row in both.
        where: SQL condition on the source's rows; by default all.
        function: From a `pyarrow.RecordBatch` of the source to one of this table, async or plain;
            by default columns are taken by name.
        batch_rows: Rows of one commit.
    """

    source: str
    key: str = field(kw_only=True)
    where: str | None = field(default=None, kw_only=True)
    function: BatchFunction | None = field(default=None, kw_only=True)
    batch_rows: int = field(default=8192, kw_only=True, metadata={TUNING: True})

    def __post_init__(self) -> None:
        checked_names("CopyInto", [self.source])
        checked_names("CopyInto", [self.key])
        if self.function is not None:
            _checked_function("CopyInto", self.function)
        if not 1 <= self.batch_rows <= _MOST_ROWS:
            raise InvalidMigrationError(
                f"CopyInto: batch_rows={self.batch_rows!r}.", f"Give 1 to {_MOST_ROWS}."
            )

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            reversible="restoring the table_version before",
            commits="1 for each batch",
        )

    @property
    def shows(self) -> bool:
        return False

    @property
    def needs_savepoint(self) -> bool:
        return True

    @property
    def tables(self) -> tuple[str, ...]:
        return (self.source,) if self.table is None else (self.table, self.source)

    def describe(self) -> str:
        return f"copy rows of {self.source}" + (f" where {self.where}" if self.where else "")

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        if not before.has(self.key):
            raise self.refuse(
                f"there is no column {self.key!r}.",
                f"Its columns are {', '.join(f.name for f in before.fields())}.",
            )
        return before

    def fold(self, states: Mapping[str, TableState | None]) -> dict[str, TableState | None]:
        source = states.get(self.source)
        if source is None:
            if self.when_missing is Missing.SKIP:
                return dict(states)
            raise self.refuse(
                f"there is no table {self.source!r}.", "Name a table that exists by then."
            )
        after = Operation.fold(self, states)
        into = after[self.table or ""]
        if self.function is None and into is not None:
            for new in into.fields():
                if not new.nullable and not source.has(new.name):
                    raise self.refuse(
                        f"{self.source!r} has no column {new.name!r}, which is {spell(new)}.",
                        "Give a function that fills it.",
                    )
        return after

    async def apply(self, target: Target) -> int:
        schema = pa.schema(self.existing(target.state).fields())
        source = target.sibling(self.source)
        if source.state is None:
            return 0
        total = await source.count_rows(self.where)
        read = copied = 0
        async for batch in source.batches(self.where, None, self.batch_rows):
            given = batch.select([f.name for f in self.existing(source.state).fields()])
            made = (
                given
                if self.function is None
                else await _call(self.describe(), self.function, given)
            )
            rows = pa.Table.from_batches([fitted(made, schema)])
            copied += await target.insert_missing(self.key, rows)
            read += len(batch)
            target.progress(read, total)
        return copied


_MOST_ROWS = 100_000
