"""Checks that a journal event has the form that its readers rely on. Pure.

Anyone can edit the journal table, so `ledger.codec` checks each event when it reads it and raises
an error for a malformed one instead of guessing. Event kinds of newer releases pass unchecked, as
they change nothing. Whether events are consistent with each other, with the head and with the
scripts is for `ledger.history` and `planning.reconcile`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from aiomigrate.ledger.records import Event, Kind

Check = Callable[[Any], bool]

MAX_TABLE_VERSION = 2**63 - 1


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TABLE_VERSION


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def _dict_of(check: Check, key: Check = _is_text) -> Check:
    return lambda value: (
        isinstance(value, dict) and all(key(name) and check(item) for name, item in value.items())
    )


def _is_digits(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdigit()


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(item) for item in value)


def _is_shape(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and _dict_of(_is_text)(value.get("fields", {}))
        and _list_of(_is_text)(value.get("indexes", []))
    )


_EFFECTS: Mapping[str, Mapping[str, Check]] = {
    "restore": {"to": _is_number},
    "shape": {"fields": _dict_of(_is_text), "indexes": _list_of(_is_text),
              "renames": _dict_of(_is_text), "loose": _list_of(_is_text)},
    "add": {"rows": _is_number, "columns": _list_of(_is_text), "digest": _is_text},
    "insert": {"columns": _list_of(_is_text), "rows": _list_of(_is_text)},
    "overwrite": {"witness": _is_text},
    "fill": {"columns": _list_of(_is_text)},
    "update": {"sql": _dict_of(_is_text), "where": _is_text_or_none},
    "delete": {"where": _is_text},
    "merge": {"key": _is_text, "data": _is_text},
}  # fmt: skip
"""The fields of an announced commit, by its `do`; `commits.commit_identity` reads them.

A commit with another `do` is treated as another writer's, whatever its fields are.
"""


def _is_effect(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("do"), str):
        return False
    return all(check(value.get(name)) for name, check in _EFFECTS.get(value["do"], {}).items())


_DETAIL: Mapping[str, Check] = {
    "also": _list_of(_is_number),
    "base": _is_number,
    "branches": _dict_of(_is_text),
    "checksums": _dict_of(_is_text_or_none, _is_digits),
    "cleanup": _list_of(_is_text),
    "effect": _is_effect,
    "foreign": _list_of(_is_span),
    "kept": _dict_of(_is_text),
    "operations": _is_number,
    "pruned": _dict_of(_is_text),
    "restores": _dict_of(_is_span),
    "seen": _dict_of(lambda value: type(value) is int, _is_digits),
    "table": _is_text,
    "to": _is_number,
}
"""The checks of the entries of `detail` that decisions depend on."""

_FACTS: Mapping[str, Check] = {
    "before": _is_number,
    "after": _is_number,
    "committed": _is_span,
    "foreign": _list_of(_is_span),
    "shape": _is_shape,
    "was": _is_text_or_none,
}
"""The checks of the facts that an event records about each table."""

_NEEDED: Mapping[str, tuple[str, ...]] = {
    Kind.INTENDED: ("table", "base", "effect"),
    Kind.ROLLING_BACK: ("to",),
}
_NEEDED_FACTS: Mapping[str, tuple[str, ...]] = {
    Kind.STARTED: ("before",),
    Kind.ROLLING_BACK: ("before",),
    Kind.APPLIED: ("before",),
    Kind.CLEANED: ("before", "after"),
}
_WITHOUT_LINE = (Kind.FOUNDED, Kind.OPENED, Kind.CLOSED, Kind.PRUNED, Kind.REPAIRED)


def fault_of(event: Event) -> str:
    """Returns a description of what is malformed in an event, empty if nothing is."""
    if event.kind not in set(Kind):
        return ""
    if event.kind not in _WITHOUT_LINE:
        if not event.line:
            return "no line"
        if event.version is None or event.version < 0:
            return f"version {event.version}"
    if wrong := _fault_in(event.detail, _DETAIL, _NEEDED.get(event.kind, ())):
        return f"{wrong} in 'detail'"
    for table, facts in event.tables.items():
        if not isinstance(facts, dict):
            return f"invalid facts of table {table!r}"
        if wrong := _fault_in(facts, _FACTS, _NEEDED_FACTS.get(event.kind, ())):
            return f"{wrong} of table {table!r}"
    return ""


def _fault_in(
    values: Mapping[str, Any], checks: Mapping[str, Check], needed: tuple[str, ...]
) -> str:
    for name in needed:
        if name not in values:
            return f"no {name!r}"
    for name, check in checks.items():
        if name in values and not check(values[name]):
            return f"an invalid {name!r}"
    return ""
