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
"""Start of the names of columns that are ours; none outlives its migration."""

LEFTOVER = f"{WITNESS_PREFIX}leftover"
"""The only column of what is left of a table whose creation was undone: it counts as no table."""

_MEMORY = b"aiomigrate:memory"


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
        predicted: What operations make of it, as far as it was asked (see `Operation.after`).
    """

    schema: pa.Schema
    indexes: tuple[Index, ...] = ()
    _shape: list[Mapping[str, Any]] = field(default_factory=list, init=False, repr=False)
    _ours: list[list[str]] = field(default_factory=list, init=False, repr=False)
    predicted: list[tuple[object, TableState | None]] = field(
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

    def with_known_shape(self, other: TableState) -> TableState:
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


def metadata_text(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    """Returns Arrow metadata as text."""
    return {k.decode(): v.decode() for k, v in (metadata or {}).items()}


def encode(state: TableState | None) -> str | None:
    """Returns a state as text of some hundred characters, `None` for a table that is not there."""
    if state is None:
        return None
    told = (state.schema.metadata or {}).get(EMBEDDING)
    kept = state.schema if not state.witnesses() else pa.schema(state.fields())
    schema = kept.with_metadata({EMBEDDING: told} if told else {}).serialize().to_pybytes()
    indexes = json.dumps([{**index_to_json(i), "name": i.name} for i in state.indexes])
    whole = len(schema).to_bytes(4, "big") + schema + indexes.encode()
    if len(whole) > _SHORT:
        # With a small window: zlib's usual one is 256 KB of memory, fetched and given back each
        # time.
        packer = zlib.compressobj(wbits=12, memLevel=5)
        whole = packer.compress(whole) + packer.flush()
    return base64.b64encode(whole).decode()


_SHORT = 1000
"""Bytes that take longer to compress than to write."""


def decode(text: str | None) -> TableState | None:
    """Returns the state of `encode`.

    Raises:
        ValueError: The text is none that `encode` made.
    """
    if text is None:
        return None
    try:
        whole = base64.b64decode(text)
        if not whole.startswith(b"\0"):  # which no compressed text does
            whole = zlib.decompress(whole)
        length = int.from_bytes(whole[:4], "big")
        schema = pa.ipc.read_schema(pa.py_buffer(whole[4 : 4 + length]))
        indexes: list[Any] = json.loads(whole[4 + length :])
        return TableState(schema, tuple(index_from_json(index) for index in indexes))
    except (zlib.error, pa.ArrowException, OSError, TypeError, KeyError) as exc:
        raise ValueError("no stored state") from exc


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns one phrase for each difference; none for equal shapes.

    Args:
        expected: As `TableState.shape()`.
        found: As `TableState.shape()`.
    """
    result = []
    want, have = expected["fields"], found["fields"]
    for name in sorted(want.keys() | have.keys()):
        if name not in have:
            result.append(f"column {name} ({want[name]}) is missing")
        elif name not in want:
            result.append(f"column {name} ({have[name]}) was not expected")
        elif want[name] != have[name]:
            result.append(f"column {name} is {_said(have[name])}, expected {_said(want[name])}")
    want_indexes, have_indexes = set(expected["indexes"]), set(found["indexes"])
    result += [f"index {index} is missing" for index in sorted(want_indexes - have_indexes)]
    result += [f"index {index} was not expected" for index in sorted(have_indexes - want_indexes)]
    return tuple(result)


def _said(spelled: str) -> str:
    kind = spelled.removesuffix("!")
    return kind if kind == spelled else f"{kind} NOT NULL"


def index_to_json(index: Index) -> dict[str, Any]:
    """Returns an index as JSON, to be made again as it is."""
    return {"kind": index.kind, "columns": list(index.columns), "options": dict(index.options)}


def index_from_json(text: Mapping[str, Any]) -> Index:
    """Returns the index of `index_to`."""
    return Index(text["kind"], tuple(text["columns"]), options=text["options"])


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
