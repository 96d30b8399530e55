"""Names, quoted columns, literals, and the statements that operations contain. Pure.

It spells SQL and never runs it: whether LanceDB accepts a statement is for `store.connection`.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from aiomigrate.errors import ConfigurationError, InvalidMigrationError
from aiomigrate.schema.state import WITNESS_PREFIX


def sql_literal(value: object) -> str:
    """Returns a Python value as SQL.

    Raises:
        ConfigurationError: SQL has no literal for it.
    """
    match value:
        case None:
            return "NULL"
        case bool():
            return "true" if value else "false"
        case float() if not math.isfinite(value):
            return f"CAST('{value}' AS DOUBLE)"
        case int() | float():
            return repr(value)
        case str():
            return "'" + value.replace("'", "''") + "'"
        case bytes():
            return f"X'{value.hex()}'"
        case dt.datetime() | dt.date():
            return f"'{value.isoformat()}'"
        case list() | tuple():
            return "[" + ", ".join(sql_literal(item) for item in value) + "]"
        case _:
            raise ConfigurationError(
                f"{type(value).__name__} is no SQL literal.",
                "Pass text, a number, a boolean, bytes, a date, a list of such, or None.",
            )


def as_sql(values: Mapping[str, object], sql: Mapping[str, str]) -> dict[str, str]:
    """Returns what an update sets as expressions alone, by column.

    Args:
        values: Literals by column.
        sql: Expressions by column.

    Raises:
        ConfigurationError: SQL has no literal for a value.
    """
    return {**sql, **{column: sql_literal(value) for column, value in values.items()}}


Literal = str | int | float | bool | None


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


def quote(column: str) -> str:
    """Returns a column, by path, as LanceDB's SQL quotes it."""
    return ".".join("`" + name.replace("`", "``") + "`" for name in column.split("."))


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
