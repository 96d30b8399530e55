"""Describes the effect of one commit: the state afterwards and the journal entry. Pure.

`commits.table_target`, which makes commits, and `execution.lookahead`, which predicts them, both
use these functions, so their journal entries are equal. Checking whether an existing commit has an
announced effect is not done here (`commits.commit_identity`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aiomigrate.schema import paths
from aiomigrate.schema.index import with_index
from aiomigrate.schema.sql import as_sql
from aiomigrate.schema.state import Index, TableState, spell

Effect = Mapping[str, Any]
"""What a commit does, as the journal stores it: a JSON object."""

Change = tuple[TableState, Effect]
"""The state of the table after a commit, and the effect of the commit."""


@dataclass(frozen=True, slots=True)
class AnnouncedCommits:
    """The commits to one table that the journal announces and that are not made yet.

    Attributes:
        effects: Their effects, in order.
    """

    effects: tuple[Effect, ...] = ()

    @classmethod
    def of(cls, effect: Effect, predicted: Sequence[Effect]) -> AnnouncedCommits:
        """Returns what is announced before a commit: it, and what is predicted to follow it.

        Args:
            effect: Its effect.
            predicted: The effects of the next commits as predicted; ignored unless they begin
                with this one.
        """
        begins = bool(predicted) and predicted[0] == effect
        return cls(tuple(predicted) if begins else (effect,))

    def begin_with(self, effect: Effect) -> bool:
        """Returns whether the next announced commit has this effect."""
        return self.effects[:1] == (effect,)

    def first(self) -> AnnouncedCommits:
        """Returns the next announced commit alone: the others were predicted from it."""
        return AnnouncedCommits(self.effects[:1])

    def after_commit(self, base: int, version: int) -> AnnouncedCommits:
        """Returns those that remain after the next one was made.

        Args:
            base: The table_version it was announced for.
            version: The table_version it became. If a foreign commit came between, nothing that
                was predicted holds any more.
        """
        return AnnouncedCommits(self.effects[1:] if version == base + 1 else ())


def create_effect(schema: pa.Schema, rows: pa.Table | None = None) -> Effect:
    """Returns the journal entry for creating a table: its columns, and how many rows it has."""
    fields = TableState(schema).shape()["fields"]
    return {"do": "create", "fields": fields, "rows": 0 if rows is None else len(rows)}


def add_columns(state: TableState, fields: Sequence[pa.Field[Any]]) -> Change:
    """Returns the state and the effect of adding nullable columns, or fields to a struct column."""
    after = state.with_schema(paths.merged(state.schema, fields))
    return after, shape_effect(after)


def drop_columns(state: TableState, names: Sequence[str]) -> Change:
    """Returns the state and the effect of dropping columns."""
    gone: dict[str, paths.Change] = {name: lambda _: None for name in names}
    after = state.with_schema(paths.changed(state.schema, gone))
    return after, shape_effect(after)


def alter_columns(state: TableState, alterations: Sequence[Mapping[str, Any]]) -> Change:
    """Returns the state and the effect of altering columns: name, nullability or type.

    Args:
        state: The table before.
        alterations: One mapping per column: `path`, and the new `rename`, `nullable` or
            `data_type`.
    """
    schema = paths.changed(state.schema, {str(a["path"]): _alteration(a) for a in alterations})
    names = {str(a["path"]): str(a["rename"]) for a in alterations if "rename" in a}
    after = TableState(schema, tuple(index.renamed(names) for index in state.indexes))
    # After a crash, the content is compared by these names, without the loose columns.
    loose = {paths.root(str(a["path"])) for a in alterations if "data_type" in a}
    loose |= {paths.root(path) for path in names if "." in path}
    renames = {p: n for p, n in names.items() if "." not in p}
    return after, shape_effect(after, renames=renames, loose=loose)


def create_index(state: TableState, index: Index) -> Change:
    """Returns the state and the effect of building an index."""
    after = with_index(state, index)
    return after, shape_effect(after)


def drop_index(state: TableState, name: str) -> Change:
    """Returns the state and the effect of dropping an index."""
    after = TableState(state.schema, tuple(i for i in state.indexes if i.name != name))
    return after, shape_effect(after)


def update(values: Mapping[str, Any], sql: Mapping[str, str], where: str | None) -> Effect:
    """Returns the effect of setting columns of the matching rows, as SQL, which JSON can hold.

    Args:
        values: Literals by column.
        sql: Expressions by column.
        where: SQL condition on the rows, `None` for all rows.
    """
    return {"do": "update", "sql": as_sql(values, sql), "where": where}


def shape_effect(
    state: TableState, *, renames: Mapping[str, str] | None = None, loose: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns the effect of a commit that changes the schema or the indexes.

    Args:
        state: The table after the commit.
        renames: New name by old name, of columns that keep their values.
        loose: Old names of columns whose values change their representation.
    """
    return {
        "do": "shape",
        "fields": {f.name: spell(f) for f in state.schema}
        if state.witnesses()
        else state.shape()["fields"],
        "indexes": sorted(str(i) for i in state.indexes),
        "renames": dict(renames or {}),
        "loose": sorted(loose),
    }


def add_effect(data: pa.Table) -> dict[str, Any]:
    """Returns the effect of an append: row count, columns and a digest of the rows."""
    return {"do": "add", "rows": len(data), "columns": data.schema.names, "digest": digest(data)}


def insert_effect(data: pa.Table) -> dict[str, Any]:
    """Returns the effect of inserting the missing ones of some rows: a short digest of each row."""
    return {"do": "insert", "columns": data.schema.names, "rows": row_digests(data)}


def row_digests(data: pa.Table) -> list[str]:
    """Returns a short digest of each row, in the order of the rows."""
    rows = zip(*(column.to_pylist() for column in data.columns), strict=True)
    return [hashlib.blake2b(repr(row).encode(), digest_size=6).hexdigest() for row in rows]


def merge_effect(key: str, data: pa.Table) -> dict[str, Any]:
    """Returns the effect of a merge, including its rows, so that it can be repeated."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.schema) as stream:
        stream.write_table(data)
    payload = base64.b64encode(sink.getvalue().to_pybytes()).decode()
    return {"do": "merge", "key": key, "data": payload}


def digest(data: pa.Table) -> str:
    """Returns a digest of rows that does not depend on chunks, offsets or validity buffers."""
    hasher = hashlib.sha256(repr([data.schema.names, len(data)]).encode())
    for column in data.columns:
        values: Any = column
        if pa.types.is_fixed_size_list(column.type) and not column.null_count:
            values = pc.list_flatten(column)  # respects offsets: slices of one array hash alike
        if pa.types.is_floating(values.type) and not values.null_count:
            hasher.update(values.to_numpy().tobytes())
        else:
            hasher.update(repr(values.to_pylist()).encode())
    return hasher.hexdigest()


def _alteration(alteration: Mapping[str, Any]) -> paths.Change:
    def change(field: pa.Field[Any]) -> pa.Field[Any]:
        altered = field.with_name(str(alteration.get("rename", field.name)))
        altered = altered.with_type(alteration.get("data_type", field.type))
        return altered.with_nullable(bool(alteration.get("nullable", field.nullable)))

    return change
