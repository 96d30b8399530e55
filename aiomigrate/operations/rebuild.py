"""Operations that stream the rows of a table through a function: `Rebuild` and `CopyInto`.

`Rebuild` writes into the same table, `CopyInto` into another one.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import TUNING, Missing, Operation, Traits
from aiomigrate.operations.target import Target
from aiomigrate.schema.index import missing_indexes
from aiomigrate.schema.sql import Statement, checked_names, checked_new
from aiomigrate.schema.state import (
    WITNESS_PREFIX,
    Index,
    TableState,
    index_to_json,
    kept_metadata,
    remember,
    remembered,
)

BatchFunction = Callable[[pa.RecordBatch], pa.RecordBatch | Awaitable[pa.RecordBatch]]
"""From a batch of rows to a batch of rows; it may drop rows, and add rows."""


def _checked_function(what: str, function: object) -> None:
    if not callable(function):
        raise InvalidMigrationError(
            f"{what}: {function!r} is not a function.",
            "Pass a function of a pyarrow.RecordBatch that returns a pyarrow.RecordBatch.",
        )


async def _call_function(
    operation: Operation, function: BatchFunction | None, batch: pa.RecordBatch, wanted: pa.Schema
) -> pa.RecordBatch:
    """Returns the result of a function for a batch; the same batch without a function.

    Raises:
        OperationError: The result is not a batch, or its columns would silently lose values.
    """
    if function is None:
        return batch
    result: Any = function(batch)
    if inspect.isawaitable(result):
        result = await result
    name = _function_name(function)
    if not isinstance(result, pa.RecordBatch):
        raise operation.refuse(
            f"{name} returned {type(result).__name__}, not a RecordBatch.",
            "Return a pyarrow.RecordBatch; `pa.RecordBatch.from_pylist(rows)` converts rows.",
        )
    made, given, kept = result.schema.names, set(batch.schema.names), set(wanted.names)
    if len(set(made)) != len(made):
        twice = min(n for n in made if made.count(n) > 1)
        raise operation.refuse(
            f"{name} returned two columns {twice!r}.", "Return each column once."
        )
    if unknown := set(made) - kept - given:
        raise operation.refuse(
            f"{name} returned a column {min(unknown)!r} that the new table does not have.",
            "Add it to the schema (op.Rebuild(schema=...)), or do not return it.",
        )
    # A copy keeps the source table, and the other table may have other columns.
    if isinstance(operation, Rebuild) and (left_out := (kept & given) - set(made)):
        raise operation.refuse(
            f"{name} left out column {min(left_out)!r}, which would lose its values.",
            "Return it as well. To discard its values, return `pa.nulls(len(batch))`; to drop it, "
            "leave it out of the schema.",
        )
    return result


def cast_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Returns a batch in another schema: columns by name, cast without loss, missing ones NULL.

    Raises:
        pyarrow.ArrowException: A value does not fit.
    """
    columns = []
    for wanted in schema:
        position = batch.schema.get_field_index(wanted.name)
        if position < 0:
            columns.append(pa.nulls(len(batch), wanted.type))
            continue
        have = batch.column(position)
        try:
            columns.append(_cast_array(have, wanted.type))
        except pa.ArrowException as exc:
            raise type(exc)(
                f"column {wanted.name!r}, {have.type}, does not fit {wanted.type}: {exc}"
            ) from exc
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _cast_array(array: Any, kind: pa.DataType) -> Any:
    """Returns an array as another type; fields of structs are matched by name, like columns."""
    if array.type == kind:
        return array  # a cast would copy
    if not (pa.types.is_struct(kind) and pa.types.is_struct(array.type)):
        return array.cast(kind)
    wanted: Any = kind
    fields = [wanted.field(position) for position in range(wanted.num_fields)]
    parts = [
        _cast_array(pc.struct_field(array, [field.name]), field.type)
        if array.type.get_field_index(field.name) >= 0
        else pa.nulls(len(array), field.type)
        for field in fields
    ]
    return pa.StructArray.from_arrays(parts, fields=fields, mask=array.is_null())


@dataclass(frozen=True, slots=True)
class Rebuild(Operation):
    """Rewrite a table, batch by batch, in one commit, and create its indexes again.

    Memory is bounded by the batch, whatever the size of the table. The commit would discard the
    commits of other writers during the rewrite: these are detected, restored, and the rewrite
    starts again from the new rows; after three attempts it stops, and nothing is lost. Handles
    opened before it are refused when they write, until they refresh. After a crash, a rewrite
    that was not committed starts again. It is undone by restoring the previous table version,
    which a savepoint keeps.

    Attributes:
        function: From a `pyarrow.RecordBatch` to another one, async or plain; by default rows
            stay as they are. Columns are matched by name and cast; new columns that it does not
            return are NULL. It may be called again for the same rows.
        schema: The new fields; by default the present ones. Fields that it lacks are dropped.
        batch_rows: Rows per call, 1 to 100,000.
    """

    function: BatchFunction | None = None
    schema: pa.Schema | None = field(default=None, kw_only=True)
    batch_rows: int = field(default=4096, kw_only=True, metadata={TUNING: True})

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        if self.function is not None:
            _checked_function("Rebuild", self.function)
        if self.schema is not None:
            if not isinstance(self.schema, pa.Schema) or not len(self.schema):
                raise InvalidMigrationError(
                    f"Rebuild: {self.schema!r} is not a schema.",
                    "Pass a pyarrow.Schema with at least one field.",
                )
            checked_new("Rebuild", checked_names("Rebuild", self.schema.names))
        if not 1 <= self.batch_rows <= _MAX_BATCH_ROWS:
            raise InvalidMigrationError(
                f"Rebuild: batch_rows={self.batch_rows!r}.", f"Give 1 to {_MAX_BATCH_ROWS}."
            )

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            destructive=True,
            reversible="restoring the previous table version",
            commits="1, and 1 for each index",
        )

    @property
    def shows(self) -> bool:
        return False

    @property
    def needs_savepoint(self) -> bool:
        return True

    def describe(self) -> str:
        how = "" if self.function is None else f" by {_function_name(self.function)}"
        return f"rebuild the table{how}"

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None:
            return ()
        return (
            (
                f"{self.table}: writes through handles that were opened before it fail until the "
                "handles are refreshed."
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
                        "Give a function that returns its values, or make it nullable.",
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
        return memory is not None and not missing_indexes(have, memory)

    def predict(self, state: TableState | None, witness: str) -> TableState:
        have = self.existing(state)
        memory = remembered(have, witness)
        if memory is None:
            return self.evolve(have)
        return TableState(have.schema, (*have.indexes, *missing_indexes(have, memory)))

    async def apply(self, target: Target) -> int:
        before = self.existing(target.state)
        rows = 0
        if remembered(before, target.witness) is None:
            schema = self.evolve(before).schema
            kept = [index_to_json(i) for i in before.indexes if self._keeps(i, before, schema)]
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
                made = await _call_function(self, self.function, given, schema)
                rows += len(batch)
                target.progress(min(rows, total), total)
                return cast_batch(made, whole)

            await target.overwrite(whole, transform, batch_rows=self.batch_rows)
        memory = remembered(target.state, target.witness) or {}
        for index in missing_indexes(self.existing(target.state), memory):
            await target.create_index(index, index.options)
        return rows


def _function_name(function: object) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


@dataclass(frozen=True, slots=True)
class CopyInto(Operation):
    """Copy rows of another table into this one, unless it contains their key already.

    To split a table, create the new tables, copy into each with `where`, then `Delete`. To merge
    tables, copy each into one. Each batch is one commit, which readers see at once; the source is
    not changed. After a crash it resumes: rows that exist are skipped, so each is copied once. It
    is undone by restoring the previous table version, which a savepoint keeps.

    Attributes:
        source: The table to copy from.
        key: The column that identifies a row in both tables: unique and without NULL among the
            copied rows. All keys are held in memory at once.
        where: SQL condition on the source's rows; by default all rows.
        function: From a `pyarrow.RecordBatch` of the source to one of this table, async or plain;
            by default columns are matched by name. Missing columns are NULL.
        batch_rows: Rows per commit, 1 to 100,000.
    """

    source: str
    key: str = field(kw_only=True)
    where: str | None = field(default=None, kw_only=True)
    function: BatchFunction | None = field(default=None, kw_only=True)
    batch_rows: int = field(default=8192, kw_only=True, metadata={TUNING: True})

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        checked_names("CopyInto", [self.source])
        checked_new("CopyInto", checked_names("CopyInto", [self.key]))  # it has no path
        if self.function is not None:
            _checked_function("CopyInto", self.function)
        if not 1 <= self.batch_rows <= _MAX_BATCH_ROWS:
            raise InvalidMigrationError(
                f"CopyInto: batch_rows={self.batch_rows!r}.", f"Give 1 to {_MAX_BATCH_ROWS}."
            )

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            reversible="restoring the previous table version",
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

    @property
    def statement(self) -> Statement:
        return Statement(table=self.source, where=self.where)

    def describe(self) -> str:
        return f"copy rows of {self.source}" + (f" where {self.where}" if self.where else "")

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        if not before.has(self.key):
            raise self.refuse_missing_column(before, self.key)
        return before

    def fold(self, states: Mapping[str, TableState | None]) -> dict[str, TableState | None]:
        source = states.get(self.source)
        if source is None:
            if self.when_missing is Missing.SKIP:
                return dict(states)
            raise self.refuse(
                f"there is no table {self.source!r}.",
                "Name a table that exists, or that an earlier migration creates.",
            )
        after = Operation.fold(self, states)
        if self.source == self.table:
            raise self.refuse("the source is the table itself.", "Copy from another table.")
        if self.function is None and not source.has(self.key):
            raise self.refuse_missing_column(source, self.key, table=self.source)
        into = after[self.table or ""]
        if self.function is None and into is not None:
            for new in into.fields():
                if not new.nullable and not source.has(new.name):
                    raise self.refuse(
                        f"table {self.source!r} has no column {new.name!r}, which is NOT NULL "
                        f"({new.type}).",
                        "Give a function that returns its values.",
                    )
        return after

    async def apply(self, target: Target) -> int:
        schema = pa.schema(self.existing(target.state).fields())
        source = target.sibling(self.source)
        if source.state is None:
            return 0
        total = await source.count_rows(self.where)
        read = copied = 0
        keys: list[pa.Array[Any]] = []
        if self.function is None:
            found = source.batches(self.where, [self.key], self.batch_rows)
            keys = [batch.column(0) async for batch in found]
            self._check_keys(keys)
        async for batch in source.batches(self.where, None, self.batch_rows):
            given = batch.select([f.name for f in self.existing(source.state).fields()])
            made = await _call_function(self, self.function, given, schema)
            rows = pa.Table.from_batches([cast_batch(made, schema)])
            if self.function is not None:
                keys += rows[self.key].chunks
                self._check_keys(rows[self.key].chunks)
            copied += await target.insert_missing(self.key, rows)
            read += len(batch)
            target.progress(read, total)
        self._check_keys(keys)
        return copied

    def _check_keys(self, keys: list[pa.Array[Any]]) -> None:
        """Refuses rows without a key of their own: all except the first would be skipped."""
        missing = sum(part.null_count for part in keys)
        found = sum(len(part) for part in keys) - missing
        duplicates = found - pc.count_distinct(pa.chunked_array(keys)).as_py() if found else 0
        if missing or duplicates:
            raise self.refuse(
                f"{missing} rows have no {self.key!r}, {duplicates} have that of another row.",
                "Name a key that identifies a row, or correct the rows of table "
                f"{self.source!r} first (op.Update, op.Delete).",
            )


_MAX_BATCH_ROWS = 100_000
