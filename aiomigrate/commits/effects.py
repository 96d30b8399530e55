"""What one commit does to a table: its state afterwards, and how the journal tells it. Pure.

Both who makes a commit and who foresees it ask here, so that they tell the same. Whether a commit
that is there does what was told is for `savepoint`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aiomigrate.schema import paths
from aiomigrate.schema.index import with_index
from aiomigrate.schema.sql import as_sql
from aiomigrate.schema.state import Index, TableState, spell

Effect = Mapping[str, Any]
"""What a commit does, as the journal tells it: a JSON value."""

Change = tuple[TableState, Effect]
"""The table after a commit, and what the commit does."""

CREATE: Effect = {"do": "create"}


def adding(state: TableState, fields: Sequence[pa.Field[Any]]) -> Change:
    """Tells of nullable columns added; a struct that is there gets the fields it lacks."""
    after = state.with_schema(paths.merged(state.schema, fields))
    return after, shape_effect(after)


def dropping(state: TableState, names: Sequence[str]) -> Change:
    """Tells of columns dropped."""
    gone: dict[str, paths.Change] = {name: lambda _: None for name in names}
    after = state.with_schema(paths.changed(state.schema, gone))
    return after, shape_effect(after)


def altering(state: TableState, alterations: Sequence[Mapping[str, Any]]) -> Change:
    """Tells of columns renamed, or of another nullability or type."""
    schema = paths.changed(state.schema, {str(a["path"]): _altering(a) for a in alterations})
    names = {str(a["path"]): str(a["rename"]) for a in alterations if "rename" in a}
    after = TableState(schema, tuple(index.renamed(names) for index in state.indexes))
    # What the content can be compared by, should we die right after it.
    loose = {paths.root(str(a["path"])) for a in alterations if "data_type" in a}
    loose |= {paths.root(path) for path in names if "." in path}
    renames = {p: n for p, n in names.items() if "." not in p}
    return after, shape_effect(after, renames=renames, loose=loose)


def indexing(state: TableState, index: Index) -> Change:
    """Tells of an index built."""
    after = with_index(state, index)
    return after, shape_effect(after)


def unindexing(state: TableState, name: str) -> Change:
    """Tells of an index dropped."""
    after = TableState(state.schema, tuple(i for i in state.indexes if i.name != name))
    return after, shape_effect(after)


def updating(values: Mapping[str, Any], sql: Mapping[str, str], where: str | None) -> Effect:
    """Tells of columns set in the rows that match: as SQL alone, which JSON can hold.

    Args:
        values: Literals by column.
        sql: Expressions by column.
        where: The rows, `None` for all.
    """
    return {"do": "update", "sql": as_sql(values, sql), "where": where}


def shape_effect(
    state: TableState, *, renames: Mapping[str, str] | None = None, loose: Iterable[str] = ()
) -> dict[str, Any]:
    """Describes a commit that changes schema or indexes.

    Args:
        state: What is there after it.
        renames: New name by old name: such columns hold what the old ones held.
        loose: Columns (by their old names) whose values change their form.
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
    """Describes an append."""
    return {"do": "add", "rows": len(data), "columns": data.schema.names, "digest": digest(data)}


def insert_effect(data: pa.Table) -> dict[str, Any]:
    """Describes an insert of those rows that are missing: a short digest of each."""
    return {"do": "insert", "columns": data.schema.names, "rows": row_digests(data)}


def row_digests(data: pa.Table) -> list[str]:
    """Returns a short digest of each row."""
    rows = zip(*(column.to_pylist() for column in data.columns), strict=True)
    return [hashlib.blake2b(repr(row).encode(), digest_size=6).hexdigest() for row in rows]


def merge_effect(key: str, data: pa.Table) -> dict[str, Any]:
    """Describes a merge, with its rows, so that it can be replayed."""
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


def _altering(alteration: Mapping[str, Any]) -> paths.Change:
    def change(field: pa.Field[Any]) -> pa.Field[Any]:
        altered = field.with_name(str(alteration.get("rename", field.name)))
        altered = altered.with_type(alteration.get("data_type", field.type))
        return altered.with_nullable(bool(alteration.get("nullable", field.nullable)))

    return change
