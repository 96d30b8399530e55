"""Checksums of migrations, equal on every supported Python.

A checksum covers what a migration does: the canonical form of its operations and the parsed source
of its own functions. It does not cover formatting, comments, docstrings, descriptions, or other
functions that its functions call. It uses neither `ast.dump` nor tokens, because both differ
between Python 3.11, 3.12 and 3.13. Checksums detect migrations that were edited after they were
applied; they are not for security.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime as dt
import enum
import functools
import hashlib
import inspect
import json
import linecache
import threading
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.migration.model import Migration
from aiomigrate.operations.base import TUNING, Operation
from aiomigrate.schema.state import spell

ALGORITHM = "aiomigrate-1"
"""Recorded with every checksum, so that a change of the algorithm is not mistaken for an edit."""

PARSE_LOCK = threading.Lock()
"""Early releases of Python 3.11 fail when two threads parse at once (seen with 3.11.7)."""

_IGNORED = frozenset({"ctx", "kind", "type_comment", "lineno", "end_lineno", "col_offset"})


def checksum(migration: Migration) -> str:
    """Returns a migration's checksum, 64 hexadecimal digits.

    Raises:
        InvalidMigrationError: The source of a function is not available, or an operation contains
            a value that has no canonical form.
    """
    try:
        content = canonical(
            {
                "operations": migration.operations,
                "up": migration.up,
                "down": migration.down,
                "table": migration.table,
                "touches": sorted(migration.touches or ()),
                "depends_on": migration.depends_on,
                **({"contracts": migration.contracts} if migration.contracts else {}),
            }
        )
    except InvalidMigrationError as exc:
        raise InvalidMigrationError(
            f"Migration {migration.version} of {migration.name!r}: {exc.what}",
            exc.remedy,
            line=migration.name,
            version=migration.version,
        ) from exc
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def operation_digest(operation: Operation) -> str:
    """Returns a digest of what one operation does, 64 hexadecimal digits.

    If the operation has no canonical form, as when a function created it, the digest is that of its
    description.
    """
    try:
        content = canonical(operation)
    except InvalidMigrationError:
        content = operation.describe()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def chain_digest(applied: Iterable[tuple[int, str]]) -> str:
    """Returns the digest of applied migrations, 32 hexadecimal digits, empty if there are none.

    Comparing two digests shows whether a migration was edited, removed or inserted.

    Args:
        applied: Versions with their checksums, in version order.
    """
    pairs = [f"{version}:{digest}" for version, digest in applied]
    return hashlib.sha256("\n".join(pairs).encode()).hexdigest()[:32] if pairs else ""


def canonical(value: Any) -> Any:  # noqa: C901 - a closed case list
    """Returns a JSON value that is equal for values with the same meaning.

    Raises:
        InvalidMigrationError: The value has no canonical form.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return {"float": repr(value)}
        case bytes():
            return {"bytes": value.hex()}
        case dt.datetime() | dt.date() | dt.time():
            return {type(value).__name__: value.isoformat()}
        case dt.timedelta():
            return {"timedelta": value.total_seconds()}
        case enum.Enum():
            return {"enum": f"{type(value).__name__}.{value.name}"}
        case pa.Field():
            return {"field": spell(value), "metadata": _hex(value.metadata)}
        case pa.DataType():
            return {"type": str(value)}
        case pa.Schema():
            return {"schema": {f.name: spell(f) for f in value}}
        case Operation():
            names = [
                field.name
                for field in dataclasses.fields(value)
                if _is_significant(field, getattr(value, field.name))
            ]
            return {type(value).__name__: {n: canonical(getattr(value, n)) for n in names}}
        case Mapping():
            return {str(key): canonical(item) for key, item in value.items()}
        case list() | tuple():
            return [canonical(item) for item in value]
        case set() | frozenset():
            return sorted((canonical(item) for item in value), key=json.dumps)
        case functools.partial():
            return {"partial": [canonical(value.func), canonical(value.args),
                                canonical(value.keywords)]}  # fmt: skip
        case FunctionType():
            return {"function": _dump(_function_node(inspect.unwrap(value)))}
        case _:
            raise InvalidMigrationError(
                f"{value!r} cannot be part of a migration's checksum.",
                "Use plain values, Arrow types, and functions that are defined with def.",
            )


def _hex(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    return {key.hex(): value.hex() for key, value in (metadata or {}).items()}


def _is_significant(field: dataclasses.Field[Any], value: object) -> bool:
    """Returns whether a field affects what an operation does, and not only how it does it.

    A field with its default value is left out: a release that adds an option does not change the
    checksums of existing migrations.
    """
    if field.metadata.get(TUNING):
        return False
    if field.default is not dataclasses.MISSING:
        return bool(value != field.default)
    if field.default_factory is not dataclasses.MISSING:
        return bool(value != field.default_factory())
    return True


def _function_node(function: Callable[..., Any]) -> ast.AST:
    code = function.__code__
    linecache.checkcache(code.co_filename)
    source = "".join(linecache.getlines(code.co_filename, function.__globals__))
    if not source:
        raise InvalidMigrationError(
            f"the source of function {function.__qualname__!r} is not available.",
            "Keep migrations in .py files that are deployed with the application.",
        )
    found = [
        node
        for node in ast.walk(_parsed(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        and _first_line(node) == code.co_firstlineno
        and getattr(node, "name", "<lambda>") == code.co_name
    ]
    if len(found) != 1:
        raise InvalidMigrationError(
            f"the source of function {function.__qualname__!r} cannot be identified.",
            "Define it with def, on separate lines.",
        )
    return found[0]


def _parsed(source: str) -> ast.AST:
    with PARSE_LOCK:
        return ast.parse(source)


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])


def _dump(node: object) -> Any:
    if isinstance(node, ast.AST):
        fields = {}
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                value = _without_docstring(value)  # noqa: PLW2901 - the filtered value
            if isinstance(node, ast.JoinedStr):
                value = [v for v in value if not _is_empty(v)]  # noqa: PLW2901 - the filtered value
            if name not in _IGNORED and value is not None and value != []:
                fields[name] = _dump(value)
        return [type(node).__name__, fields]
    if isinstance(node, list):
        return [_dump(item) for item in node]
    return node if isinstance(node, str) else {type(node).__name__: repr(node)}


def _is_empty(part: ast.expr) -> bool:
    # Only Python 3.12 ends a format specification such as f"{x:{width}}" with an empty string.
    return isinstance(part, ast.Constant) and part.value == ""


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    is_docstring = (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )
    return body[1:] if is_docstring else body
