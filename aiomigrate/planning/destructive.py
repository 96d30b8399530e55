"""Decides what a migration discards, and which savepoints are kept for it. Pure.

`commits.savepoints` makes savepoints, and `runs.maintenance` deletes them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from aiomigrate.errors import OperationError
from aiomigrate.ledger.history import Journal
from aiomigrate.ledger.records import Kind
from aiomigrate.migration.model import Key, Script, Scripts
from aiomigrate.operations.base import Operation
from aiomigrate.schema.state import TableState

_EXISTED = b"aiomigrate:was_there"
"""Metadata key that marks the columns which existed before a migration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A savepoint branch that was kept after its migration.

    Attributes:
        key: The migration, line and version.
        table: The table.
        branch: The branch.
        at: When the migration was applied.
    """

    key: Key
    table: str
    branch: str
    at: dt.datetime


def kept_savepoints(journal: Journal) -> tuple[Kept, ...]:
    """Returns the savepoint branches that are kept, oldest first."""
    found: dict[tuple[str, str], Kept] = {}
    for event in journal.events:
        if event.kind == Kind.APPLIED:
            for table, branch in event.detail.get("kept", {}).items():
                key = (event.line or "", event.version or 0)
                found[table, branch] = Kept(key=key, table=table, branch=branch, at=event.at)
        elif event.kind in (Kind.PRUNED, Kind.ROLLED_BACK):
            for table, branch in event.detail.get("pruned", {}).items():
                found.pop((table, branch), None)
    return tuple(found.values())


def contracted(
    kept: Iterable[Kept], scripts: Scripts, applied: Mapping[str, int]
) -> tuple[Kept, ...]:
    """Returns the savepoints of migrations that an applied migration contracts.

    Args:
        kept: The savepoints that are kept.
        scripts: All scripts.
        applied: The current version of each line.
    """
    ends: dict[str, int] = {}
    for line, version in applied.items():
        for script in scripts.up_to(line, version):
            for other, upto in script.contracts.items():
                ends[other] = max(upto, ends.get(other, 0))
    return tuple(k for k in kept if k.key[1] <= ends.get(k.key[0], 0))


def destroys(script: Script, was: Mapping[str, TableState | None]) -> tuple[str, ...]:
    """Returns the tables from which a migration discards existing data or structure, sorted.

    The effect of a function is unknown; it is assumed to discard nothing.

    Args:
        script: The migration.
        was: The state of each table before it.
    """
    return tuple(sorted({o.table or "" for o in destroying(script, was)}))


def destroying(script: Script, was: Mapping[str, TableState | None]) -> tuple[Operation, ...]:
    """Returns the operations of a migration that discard existing data or structure, in order.

    Args:
        script: The migration.
        was: The state of each table before it.
    """
    concerned = {table for operation in script.operations for table in operation.tables}
    found = {table: was[table] for table in concerned if table in was}
    if not any(
        before is not None and o.discards(before) for o, before in _with_before(script, found)
    ):
        return ()
    marked = {table: mark_existing(state) for table, state in found.items()}
    return tuple(
        operation
        for operation, before in _with_before(script, marked)
        if before is not None
        and operation.discards(before)
        and _has_existing(before)
        and not fills_new_columns(operation, before)
    )


def keeps_savepoint(
    script: Script, operation: Operation, was: Mapping[str, TableState | None]
) -> bool:
    """Returns whether a savepoint of its table preserves what an operation discards.

    Args:
        script: Its migration.
        operation: The operation.
        was: The state of each table before the migration.
    """
    table = operation.table or ""
    removes_table = any(o.removes_table and o.table == table for o in script.operations)
    return operation.needs_savepoint and was.get(table) is not None and not removes_table


def fills_new_columns(operation: Operation, before: TableState | None) -> bool:
    """Returns whether an operation fills only columns that the migration itself added.

    Args:
        operation: The operation.
        before: The table before the operation, with the columns marked that existed before the
            migration (`mark_existing`).
    """
    if not operation.fills or before is None:
        return False
    return not any(_existed(before, column) for column in operation.fills)


def mark_existing(state: TableState | None) -> TableState | None:
    """Returns a table with its columns marked, so that they are recognised after a rename."""
    if state is None:
        return None
    fields = [f.with_metadata(dict([*(f.metadata or {}).items(), (_EXISTED, b"1")]))
              for f in state.schema]  # fmt: skip
    return state.with_schema(pa.schema(fields).with_metadata(state.schema.metadata))


def _with_before(
    script: Script, states: Mapping[str, TableState | None]
) -> Iterator[tuple[Operation, TableState | None]]:
    """Yields each operation with the predicted state of its table before it."""
    for operation in script.operations:
        yield operation, states.get(operation.table or "")
        if any(table not in states for table in operation.tables):
            continue
        try:
            states = operation.fold(states)
        except OperationError:
            continue  # after a function or a crash, the table may differ from the prediction


def _has_existing(state: TableState) -> bool:
    return any(_existed(state, name) for name in state.schema.names)


def _existed(state: TableState, column: str) -> bool:
    name = column.split(".", maxsplit=1)[0]
    return state.has(name) and _EXISTED in (state.column(name).metadata or {})
