"""Columns by path: `address.city` is the field `city` of the struct `address`. Pure.

LanceDB accepts no column whose own name contains a dot, so a dot always separates names. Paths do
not reach fields of structs inside lists, which LanceDB cannot change either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa

Change = Callable[["pa.Field[Any]"], "pa.Field[Any] | None"]
"""Returns the new field for an old one, `None` to remove it."""


def split(path: str) -> tuple[str, str]:
    """Returns the path of the struct that contains a column (empty for the table), and its name."""
    parent, _, name = path.rpartition(".")
    return parent, name


def root(path: str) -> str:
    """Returns the top-level column of a path."""
    return path.partition(".")[0]


def find(schema: pa.Schema, path: str) -> pa.Field[Any] | None:
    """Returns the column at a path, `None` if there is none."""
    name, *inner = path.split(".")
    position = schema.get_field_index(name)
    found = None if position < 0 else schema.field(position)
    for name in inner:
        if found is None:
            return None
        found = next((field for field in _inside(found) if field.name == name), None)
    return found


def _inside(field: pa.Field[Any]) -> list[pa.Field[Any]]:
    kind: Any = field.type
    if not pa.types.is_struct(kind):
        return []
    return [kind.field(position) for position in range(kind.num_fields)]


def changed(schema: pa.Schema, changes: Mapping[str, Change]) -> pa.Schema:
    """Returns a schema with all changes applied at once.

    A struct that loses all of its fields is removed too.

    Args:
        schema: The schema before.
        changes: Changes by path; a path that does not exist is ignored.
    """
    return pa.schema(_changed(list(schema), "", changes))


def _changed(
    fields: Iterable[pa.Field[Any]], prefix: str, changes: Mapping[str, Change]
) -> list[pa.Field[Any]]:
    result = []
    for field in fields:
        path = prefix + field.name
        inner = _inside(field)
        if inner and any(other.startswith(f"{path}.") for other in changes):
            left = _changed(inner, f"{path}.", changes)
            if not left:
                continue
            field = field.with_type(pa.struct(left))  # noqa: PLW2901 - the new field
        change = changes.get(path)
        after = field if change is None else change(field)
        if after is not None:
            result.append(after)
    return result


def added(schema: pa.Schema, columns: Mapping[str, pa.Field[Any]]) -> pa.Schema:
    """Returns a schema with columns added, by path, each at the end of its table or struct."""
    for path, new in columns.items():
        parent, _ = split(path)
        if not parent:
            schema = schema.append(new)
            continue

        def extended(struct: pa.Field[Any], new: pa.Field[Any] = new) -> pa.Field[Any]:
            return struct.with_type(pa.struct([*_inside(struct), new]))

        schema = changed(schema, {parent: extended})
    return schema


def merged(schema: pa.Schema, fields: Iterable[pa.Field[Any]]) -> pa.Schema:
    """Returns a schema with fields added at the end.

    Of a struct that exists already, only the missing fields are added.
    """
    result = list(schema)
    for new in fields:
        position = next((i for i, f in enumerate(result) if f.name == new.name), None)
        if position is None:
            result.append(new)
        else:
            inside = merged(pa.schema(_inside(result[position])), _inside(new))
            result[position] = result[position].with_type(pa.struct(list(inside)))
    return pa.schema(result)


def renamed(path: str, names: Mapping[str, str]) -> str:
    """Returns a path after columns were renamed.

    Args:
        path: The path before.
        names: New column names by old path.
    """
    parts = path.split(".")
    result = []
    for position, part in enumerate(parts):
        result.append(names.get(".".join(parts[: position + 1]), part))
    return ".".join(result)
