"""What a migration destroys, and which savepoints are kept of it. Pure."""

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
from aiomigrate.operations.fill import Backfill
from aiomigrate.operations.rows import Update
from aiomigrate.operations.tables import DropTable, RenameTable
from aiomigrate.schema.state import TableState

_WAS_THERE = b"aiomigrate:was_there"


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
    """Returns those savepoints whose migration was completed by one that is applied.

    Args:
        kept: Savepoints that are kept.
        scripts: All scripts.
        applied: The version each line is at.
    """
    ends: dict[str, int] = {}
    for line, version in applied.items():
        for script in scripts.up_to(line, version):
            for other, upto in script.contracts.items():
                ends[other] = max(upto, ends.get(other, 0))
    return tuple(k for k in kept if k.key[1] <= ends.get(k.key[0], 0))


def destroys(script: Script, was: Mapping[str, TableState | None]) -> tuple[str, ...]:
    """Returns the tables of which a migration discards something that was there, sorted.

    What a function does is not known; it counts as discarding nothing.

    Args:
        script: The migration.
        was: The state of each table before it.
    """
    return tuple(sorted({o.table or "" for o in destroying(script, was)}))


def destroying(script: Script, was: Mapping[str, TableState | None]) -> tuple[Operation, ...]:
    """Returns the operations of a migration that discard something that was there, in order.

    Args:
        script: The migration.
        was: The state of each table before it.
    """
    concerned = {table for operation in script.operations for table in operation.tables}
    found = {table: was[table] for table in concerned if table in was}
    if not any(before is not None and o.discards(before) for o, before in _before(script, found)):
        return ()
    marked = {table: _marked(state) for table, state in found.items()}
    return tuple(
        operation
        for operation, before in _before(script, marked)
        if before is not None
        and operation.discards(before)
        and _has_any(before)
        and not _is_subsumed(operation, before)
    )


def keeps_savepoint(
    script: Script, operation: Operation, was: Mapping[str, TableState | None]
) -> bool:
    """Returns whether what an operation discards can be kept by a savepoint of its table.

    Args:
        script: Its migration.
        operation: The operation.
        was: The state of each table before the migration.
    """
    table = operation.table or ""
    goes = any(isinstance(o, DropTable | RenameTable) and o.table == table
               for o in script.operations)  # fmt: skip
    return operation.needs_savepoint and was.get(table) is not None and not goes


def _is_subsumed(operation: Operation, before: TableState | None) -> bool:
    """Returns whether an operation fills only columns that the migration itself added.

    Args:
        operation: The operation.
        before: The table before it, with the columns marked that the migration found.
    """
    filled: Iterable[str]
    if isinstance(operation, Backfill):
        filled = (operation.column,)
    elif isinstance(operation, Update):
        filled = (*operation.values, *operation.sql)
    else:
        return False
    return before is not None and not any(_was_there(before, column) for column in filled)


def _marked(state: TableState | None) -> TableState | None:
    """Returns a table with its columns marked, so that they are known under any later name."""
    if state is None:
        return None
    fields = [f.with_metadata(dict([*(f.metadata or {}).items(), (_WAS_THERE, b"1")]))
              for f in state.schema]  # fmt: skip
    return state.with_schema(pa.schema(fields).with_metadata(state.schema.metadata))


def _before(
    script: Script, states: Mapping[str, TableState | None]
) -> Iterator[tuple[Operation, TableState | None]]:
    """Yields each operation with its table before it, as far as that can be predicted."""
    for operation in script.operations:
        yield operation, states.get(operation.table or "")
        if any(table not in states for table in operation.tables):
            continue
        try:
            states = operation.fold(states)
        except OperationError:
            continue  # after a function or a crash, what is there is not what was predicted


def _has_any(state: TableState) -> bool:
    return any(_was_there(state, name) for name in state.schema.names)


def _was_there(state: TableState, column: str) -> bool:
    name = column.split(".", maxsplit=1)[0]
    return state.has(name) and _WAS_THERE in (state.column(name).metadata or {})
