"""What differs between two shapes of one table, in words. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
