"""Checks options and arguments, from whichever source they come. Pure; imports only `errors`."""

from __future__ import annotations

import enum
import math
from typing import TypeVar

from aiomigrate.errors import ConfigurationError

NUMERIC_OPTIONS: dict[str, type[int | float]] = {
    "concurrency": int,
    "lease_ttl": float,
    "lease_wait": float,
    "timeout": float,
    "keep_savepoints": float,
}
"""The numeric options with their types. The `float` options are in seconds."""

_Policy = TypeVar("_Policy", bound=enum.Enum)

_ZERO_ALLOWED = ("lease_wait", "keep_savepoints")


def check_number(option: str, value: object, where: str) -> float:
    """Returns the value of a numeric option if it is valid.

    A valid value is finite and positive. `lease_wait` and `keep_savepoints` may also be 0.

    Args:
        option: One of `NUMERIC_OPTIONS`.
        value: The value to check.
        where: The name of the option in its source, for the error.

    Raises:
        ConfigurationError: The value is not a number of the option's type, or is out of range.
    """
    whole = NUMERIC_OPTIONS[option] is int
    kind: type[int] | tuple[type, ...] = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
        noun = "a whole number" if whole else "a number of seconds"
        raise ConfigurationError(f"{where}: {value!r} is not {noun}.", f"Pass {noun}.")
    assert isinstance(value, int | float)  # noqa: S101 - narrows the type, as checked by `kind`
    least = "0 or more" if option in _ZERO_ALLOWED else "more than 0"
    if not math.isfinite(value) or value < 0 or (value == 0 and option not in _ZERO_ALLOWED):
        raise ConfigurationError(f"{where}: {value!r} is out of range.", f"Pass {least}.")
    return value


def check_policy(kind: type[_Policy], value: object, where: str) -> _Policy:
    """Returns the member of an enum that a policy was given as: a member, or its value as text.

    Args:
        kind: The enum.
        value: The member or text.
        where: The name of the option or argument, for the error.

    Raises:
        ConfigurationError: It is anything else.
    """
    if isinstance(value, kind):
        return value
    found = next((m for m in kind if isinstance(value, str) and value == m.value), None)
    if found is None:
        choices = ", ".join(repr(member.value) for member in kind)
        raise ConfigurationError(
            f"{where}: {value!r} is not a valid choice.",
            f"Pass one of {choices}, or a member of {kind.__name__}.",
        )
    return found


def check_flag(value: object, where: str) -> bool:
    """Returns a flag, which must be a boolean: the text "false" would count as true.

    Args:
        value: The value to check.
        where: The name of the option or argument, for the error.

    Raises:
        ConfigurationError: It is not a boolean.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{where}: {value!r} is not a boolean.", "Pass True or False.")
    return value
