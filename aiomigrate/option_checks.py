"""Which values the numeric options may have, wherever they come from. Pure; imports only errors."""

from __future__ import annotations

import math

from aiomigrate.errors import ConfigurationError

NUMERIC_OPTIONS: dict[str, type[int | float]] = {
    "concurrency": int,
    "lease_ttl": float,
    "lease_wait": float,
    "timeout": float,
    "keep_savepoints": float,
}
"""The options that are numbers, and whether they are whole."""

_MAY_BE_0 = ("lease_wait", "keep_savepoints")


def check_number(option: str, value: object, where: str) -> float:
    """Returns the value of a numeric option: finite, and positive unless 0 has a meaning.

    Args:
        option: One of `NUMERIC_OPTIONS`.
        value: What was given.
        where: What its source calls it, for the error.

    Raises:
        ConfigurationError: It is not a number, or outside of its range.
    """
    whole = NUMERIC_OPTIONS[option] is int
    kind: type[int] | tuple[type, ...] = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
        noun = "a whole number" if whole else "a number of seconds"
        raise ConfigurationError(f"{where}: {value!r} is not {noun}.", "Give a number.")
    assert isinstance(value, int | float)  # noqa: S101 - `kind` says so
    least = "0 or more" if option in _MAY_BE_0 else "more than 0"
    if not math.isfinite(value) or value < 0 or (value == 0 and option not in _MAY_BE_0):
        raise ConfigurationError(f"{where}: {value!r} is out of range.", f"Give {least}.")
    return value
