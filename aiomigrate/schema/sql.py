"""SQL literals, quoted columns, statements, and checks of column and table names. Pure.

This module writes SQL as text and never runs it: `store.connection` checks whether LanceDB accepts
a statement.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from aiomigrate.errors import ConfigurationError, InvalidMigrationError
from aiomigrate.schema.state import WITNESS_PREFIX

Literal = str | int | float | bool | None

_QUOTED = re.compile(
    r"""'(?:[^']|'')*' | `[^`]*` | --[^\n]* | /\*.*?\*/ | (?P<double>"(?:[^"]|"")*")""",
    re.DOTALL | re.VERBOSE,
)
"""The parts of an expression in which quotes have no meaning of their own, and double quotes.

As LanceDB reads expressions (measured): a doubled quote is a quote, a backslash is nothing special,
and comments do not nest.
"""

_RESERVED = ("_rowid", "_rowaddr", "_row_created_at_version", "_row_last_updated_at_version")
"""Columns that LanceDB itself provides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """The SQL of an operation, which LanceDB parses.

    Attributes:
        table: The table whose columns the SQL refers to.
        where: The condition on rows, `None` for all rows.
        sets: SQL expressions by the column that they set.
        values: Literals by the column that they set.
    """

    table: str
    where: str | None = None
    sets: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Literal] = field(default_factory=dict)


def sql_literal(value: object) -> str:
    """Returns a Python value as a SQL literal.

    Raises:
        ConfigurationError: SQL has no literal for a value of this type.
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
                f"SQL has no literal for a value of type {type(value).__name__}.",
                "Pass text, a number, a boolean, bytes, a date, a list of these, or None.",
            )


def as_sql(values: Mapping[str, object], sql: Mapping[str, str]) -> dict[str, str]:
    """Returns the values and expressions of an update as SQL expressions by column.

    Args:
        values: Literals by column.
        sql: Expressions by column.

    Raises:
        ConfigurationError: SQL has no literal for one of the values.
    """
    return {**sql, **{column: sql_literal(value) for column, value in values.items()}}


def whole(expression: str) -> str:
    """Returns an expression in parentheses, so that LanceDB reads the text to its end.

    Without them LanceDB ignores what follows a complete expression, such as `; b = 2`, `, b` or
    `LIMIT 1` (measured). A text that closes more parentheses than it opens stays invalid.
    """
    depth = 0
    for parenthesis in re.findall(r"[()]", _QUOTED.sub(" ", expression)):
        depth += 1 if parenthesis == "(" else -1
        if depth < 0:  # it would close the parenthesis that is added here
            return f"(({expression}\n)"
    return f"({expression}\n)"  # a comment ends with the line


def double_quotes(sets: Mapping[str, str]) -> tuple[str, str] | None:
    """Returns what is wrong with double quotes in expressions, and what to do; `None` if nothing.

    In the expressions that set a column, LanceDB reads `"name"` as a text, also if there is a
    column of that name, and would store it in every row. In conditions it is the column, as in
    standard SQL (both measured); conditions are therefore not checked.

    Args:
        sets: SQL expressions by the column that they set.
    """
    for column, expression in sets.items():
        for part in _QUOTED.finditer(expression):
            if (double := part["double"]) is not None:
                name = double[1:-1].replace('""', '"')
                what = f"in the SQL that sets {column!r}, LanceDB reads {double} as a text"
                return (
                    f"{what}, not as a column.",
                    f"Write {quote(name)} for a column, or {sql_literal(name)} for a text.",
                )
    return None


def quote(column: str) -> str:
    """Returns the path of a column, quoted for LanceDB's SQL."""
    return ".".join("`" + name.replace("`", "``") + "`" for name in column.split("."))


def checked_names(what: str, names: Iterable[object]) -> tuple[str, ...]:
    """Returns column or table names as a tuple.

    Args:
        what: The operation that takes them; error messages start with it.
        names: The names.

    Raises:
        InvalidMigrationError: A name is not a non-empty string, a name is repeated, or there are
            no names.
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
    """Checks the names, not paths, that a migration gives to new columns.

    Args:
        what: The operation that takes them; error messages start with it.
        names: The names.

    Raises:
        InvalidMigrationError: LanceDB does not accept a name, or aiomigrate reserves it for
            witness columns.
    """
    for name in names:
        if name.startswith(WITNESS_PREFIX):
            raise InvalidMigrationError(
                f"{what}: {name!r} is reserved.",
                f"Use a name that does not start with {WITNESS_PREFIX}.",
            )
        if not name or "." in name or "`" in name or name.lower() in _RESERVED:
            raise InvalidMigrationError(
                f"{what}: LanceDB does not accept a column named {name!r}.",
                "Use a non-empty name without a dot or a backtick that is not one of LanceDB's own "
                "columns.",
            )


def is_table_name(name: object) -> bool:
    """Returns whether LanceDB accepts a table with this name (measured)."""
    return (
        isinstance(name, str)
        and name not in (".", "..")
        and re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name) is not None
    )
