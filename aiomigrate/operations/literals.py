"""Python values as LanceDB's SQL spells them. Pure."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping

from aiomigrate.errors import ConfigurationError


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
