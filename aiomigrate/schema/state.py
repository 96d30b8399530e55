"""The shape of a table as a value: columns, indexes, embedding functions. Pure.

Migrations predict it, validation compares it, the journal stores it. It knows no operation and no
database; columns are addressed by path (`schema.paths`).
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from aiomigrate.schema import paths

WITNESS_PREFIX = "_aiomigrate_"
"""Prefix of the columns that aiomigrate adds while a migration runs (witness columns)."""

LEFTOVER = f"{WITNESS_PREFIX}leftover"
"""The only column left of a table whose creation was undone. Such a table counts as missing."""

EMBEDDING = b"embedding_functions"
"""Key of the schema metadata in which lancedb keeps a table's embedding functions."""

_MEMORY = b"aiomigrate:memory"
"""Key of a column's metadata under which `remember` stores its value."""

_UNCOMPRESSED = 1000
"""Bytes up to which a state is stored uncompressed: compressing takes longer than writing them."""


@dataclass(frozen=True, slots=True)
class Index:
    """An index. Two indexes are equal if they have the same kind and the same columns.

    Attributes:
        kind: LanceDB's name of the kind, such as `BTree` or `Bitmap`.
        columns: The paths of the indexed columns, in order.
        name: LanceDB's name of this index; not compared.
        options: The parameters it was built with, as far as LanceDB reports them, under the names
            that lancedb's configuration classes use; not compared.
    """

    kind: str
    columns: tuple[str, ...]
    name: str = field(default="", compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.kind} {','.join(self.columns)}"

    def renamed(self, names: Mapping[str, str]) -> Index:
        """Returns the index after columns were renamed; its own name does not change.

        Args:
            names: New column names by old path.
        """
        return replace(self, columns=tuple(paths.renamed(column, names) for column in self.columns))

    def is_on(self, columns: Iterable[str]) -> bool:
        """Returns whether the index covers one of the columns, or a field of one of them."""
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

    def shape(self) -> Mapping[str, Any]:
        """Returns a JSON value that is equal for equal shapes.

        It ignores the order of columns, the names of indexes, metadata, and witness columns.
        """
        fields = dict(sorted((f.name, spell(f)) for f in self.fields()))
        return {"fields": fields, "indexes": sorted({str(index) for index in self.indexes})}

    def fields(self) -> list[pa.Field[Any]]:
        """Returns the table's fields without witness columns."""
        if not self.witnesses():
            return list(self.schema)
        return [f for f in self.schema if not f.name.startswith(WITNESS_PREFIX)]

    @property
    def is_leftover(self) -> bool:
        """Whether this is the remainder of a table whose creation was undone."""
        return self.schema.names == [LEFTOVER]

    def same(self, other: TableState) -> bool:
        """Returns whether both states have the same shape."""
        if len(self.schema) == len(other.schema):
            if self.indexes == other.indexes and self.schema.equals(other.schema):
                return True
        elif not (self.witnesses() or other.witnesses()):
            return False
        return self.shape() == other.shape()

    def has(self, column: str) -> bool:
        """Returns whether the column at a path exists."""
        return paths.find(self.schema, column) is not None

    def column(self, path: str) -> pa.Field[Any]:
        """Returns the column at a path; the column must exist."""
        found = paths.find(self.schema, path)
        assert found is not None, path  # noqa: S101 - callers check `has`
        return found

    def witnesses(self) -> list[str]:
        """Returns the names of the witness columns."""
        return [name for name in self.schema.names if name.startswith(WITNESS_PREFIX)]

    def with_fields(self, fields: Iterable[pa.Field[Any]]) -> TableState:
        """Returns this state with other fields; drops indexes on columns that no longer exist."""
        return self.with_schema(pa.schema(list(fields)))

    def with_schema(self, schema: pa.Schema) -> TableState:
        """Returns this state with another schema; drops indexes on columns that no longer exist."""
        kept = tuple(
            index
            for index in self.indexes
            if all(paths.find(schema, column) is not None for column in index.columns)
        )
        return TableState(schema, kept)


def spell(field: pa.Field[Any]) -> str:
    """Returns a field's type and nullability as text, `int64!` for NOT NULL."""
    return f"{field.type}{'' if field.nullable else '!'}"


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns one phrase for each difference between two shapes, empty for equal shapes.

    Args:
        expected: The result of `TableState.shape()`.
        found: The result of `TableState.shape()`.
    """
    result = []
    want, have = expected["fields"], found["fields"]
    for name in sorted(want.keys() | have.keys()):
        if name not in have:
            result.append(f"column {name} ({want[name]}) is missing")
        elif name not in want:
            result.append(f"column {name} ({have[name]}) was not expected")
        elif want[name] != have[name]:
            result.append(
                f"column {name} is {_sql_type(have[name])}, expected {_sql_type(want[name])}"
            )
    want_indexes, have_indexes = set(expected["indexes"]), set(found["indexes"])
    result += [f"index {index} is missing" for index in sorted(want_indexes - have_indexes)]
    result += [f"index {index} was not expected" for index in sorted(have_indexes - want_indexes)]
    return tuple(result)


def _sql_type(spelled: str) -> str:
    """Returns the text of `spell` with `NOT NULL` in place of the exclamation mark."""
    kind = spelled.removesuffix("!")
    return kind if kind == spelled else f"{kind} NOT NULL"


def encode(state: TableState | None) -> str | None:
    """Returns a state as text of some hundred characters, `None` for a missing table.

    Witness columns are left out.
    """
    if state is None:
        return None
    kept = state.schema
    if state.witnesses():
        kept = pa.schema(state.fields(), metadata=dict((kept.metadata or {}).items()))
    schema = kept.serialize().to_pybytes()
    indexes = json.dumps([{**index_to_json(i), "name": i.name} for i in state.indexes])
    whole = len(schema).to_bytes(4, "big") + schema + indexes.encode()
    if len(whole) > _UNCOMPRESSED:
        whole = zlib.compress(whole)
    return base64.b64encode(whole).decode()


def decode(text: str | None) -> TableState | None:
    """Returns the state that `encode` stored, `None` for a missing table.

    Raises:
        ValueError: `encode` did not produce the text.
    """
    if text is None:
        return None
    try:
        whole = base64.b64decode(text)
        if not whole.startswith(b"\0"):  # compressed text never starts with a zero byte
            whole = zlib.decompress(whole)
        length = int.from_bytes(whole[:4], "big")
        schema = pa.ipc.read_schema(pa.py_buffer(whole[4 : 4 + length]))
        indexes: list[Any] = json.loads(whole[4 + length :])
        return TableState(schema, tuple(index_from_json(index) for index in indexes))
    except (zlib.error, pa.ArrowException, OSError, TypeError, KeyError) as exc:
        raise ValueError("not a stored table state") from exc


def index_to_json(index: Index) -> dict[str, Any]:
    """Returns an index as JSON, with everything needed to build it again."""
    return {"kind": index.kind, "columns": list(index.columns), "options": dict(index.options)}


def index_from_json(text: Mapping[str, Any]) -> Index:
    """Returns the index that `index_to_json` stored."""
    return Index(text["kind"], tuple(text["columns"]), options=text["options"])


def remember(name: str, what: Mapping[str, Any], kind: pa.DataType | None = None) -> pa.Field[Any]:
    """Returns a witness column that stores a value in its metadata while its migration runs.

    Args:
        name: Its name, which starts with `WITNESS_PREFIX`.
        what: The value, JSON-ready.
        kind: Its Arrow type; bool by default.
    """
    return pa.field(name, kind or pa.bool_(), metadata={_MEMORY: json.dumps(what)})


def remembered(state: TableState | None, name: str) -> Mapping[str, Any] | None:
    """Returns the value that a witness column stores, `None` if there is no such column."""
    if state is None or (position := state.schema.get_field_index(name)) < 0:
        return None
    text = (state.schema.field(position).metadata or {}).get(_MEMORY, b"{}")
    found = json.loads(text)
    return found if isinstance(found, dict) else {}


def metadata_text(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    """Returns Arrow metadata as text."""
    return {k.decode(): v.decode() for k, v in (metadata or {}).items()}


def embedding_columns(schema: pa.Schema) -> dict[str, str]:
    """Returns the names of embedding functions by the columns that they refer to.

    LanceDB keeps them in the schema's metadata and does not update them when a column is renamed
    or dropped: the next `add` then fails.
    """
    return {
        str(entry[key]): str(entry.get("name", "?"))
        for entry in embeddings(schema.metadata)
        for key in ("source_column", "vector_column")
        if isinstance(entry.get(key), str)
    }


def embeddings(metadata: Mapping[bytes, bytes] | None) -> list[Mapping[str, Any]]:
    """Returns the embedding functions in a schema's metadata, one entry each; empty if invalid."""
    try:
        found = json.loads((metadata or {}).get(EMBEDDING, b"[]"))
    except ValueError:
        return []
    return [e for e in found if isinstance(e, Mapping)] if isinstance(found, list) else []


def kept_metadata(before: pa.Schema, names: Iterable[str]) -> dict[bytes | str, bytes | str] | None:
    """Returns a schema's metadata without embedding functions whose columns no longer exist.

    Args:
        before: The schema before the change.
        names: The columns after the change.

    Returns:
        The metadata, `None` if nothing is left.
    """
    metadata: dict[bytes | str, bytes | str] = dict((before.metadata or {}).items())
    have = set(names)
    whole = [
        entry
        for entry in embeddings(before.metadata)
        if have.issuperset(
            str(entry[key]) for key in ("source_column", "vector_column") if entry.get(key)
        )
    ]
    if EMBEDDING in metadata:
        del metadata[EMBEDDING]
        if whole:
            metadata[EMBEDDING] = json.dumps(whole)
    return metadata or None
