"""Checks whether a commit is the one that a migration announced.

Compares the content of a table_version with what the announced commit writes. Used by
`execution.recovery` after a crash, when the last announced commit may or may not have been made.
Restoring a table is not done here (`commits.savepoints`).
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import anyio
import pyarrow as pa

from aiomigrate.commits.effects import digest, row_digests, shape_effect
from aiomigrate.commits.savepoints import drop_branch
from aiomigrate.errors import StoreError
from aiomigrate.schema.digests import digests
from aiomigrate.schema.state import WITNESS_PREFIX, TableState
from aiomigrate.store.commit_log import Commit
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Opened, Table


def foreign_commits(
    made: Sequence[Commit], *, before: int, after: int, compacted: bool
) -> list[int]:
    """Returns the table_versions that an optimization is not known to have committed. Pure.

    The commits of an optimization change neither rows nor schema nor the list of indexes. At most
    one of them rewrites files, and only if it compacted. If several commits rewrote files, one of
    them may be an update of all rows by another writer, so all of them count as foreign.

    Args:
        made: The commits that still exist, including the one before the optimization.
        before: The table_version before the optimization.
        after: The table_version of its last commit, which is its own.
        compacted: Whether it rewrote files.

    Returns:
        The foreign table_versions in ascending order, empty if there are none.
    """
    by_version = {commit.version: commit for commit in made}
    foreign, rewrites = [], []
    for version in range(before + 1, after + 1):
        old, new = by_version.get(version - 1), by_version.get(version)
        if old is None or new is None or old.rows != new.rows or _differ(old.state, new.state):
            foreign.append(version)
        elif old.files != new.files:
            rewrites.append(version)
    if not (compacted and len(rewrites) == 1):
        foreign += rewrites
    return sorted(version for version in foreign if version != after)


def _differ(one: TableState, other: TableState) -> bool:
    names = [sorted(index.name for index in state.indexes) for state in (one, other)]
    return names[0] != names[1] or not one.schema.equals(other.schema, check_metadata=True)


_WINDOW_ROWS = 20_000
_REPLAY = "aiomigrate-replay-"


# ---- is that commit the announced one? ----------------------------------------------------------


async def matches_announcement(  # noqa: C901 - one case for each kind of effect
    store: Store, name: str, base: int, effect: Mapping[str, Any]
) -> bool:
    """Returns whether the commit after `base` has the effect that was announced.

    Used after a crash, for a commit that was announced but not confirmed. A commit of another
    writer with exactly the same effect also matches: undoing and redoing it loses nothing.

    An update, a delete or a merge is repeated on a temporary branch of `base`, which is deleted
    afterwards. A crash leaves that branch behind; the next call deletes it.

    Args:
        store: The database.
        name: The table.
        base: The table_version that the announced commit is based on, 0 if there was no table.
        effect: What the announced commit does (see `commits.effects`).

    Returns:
        `False` also if the table or the table_version cannot be read.
    """
    try:
        after = await (await store.open(name)).at(base + 1)
        if effect["do"] == "create":
            fresh = base == 0 or await _is_leftover(store, name, base)
            return fresh and await _was_created(after, effect)
        if effect["do"] == "vacate":
            return await _is_leftover(store, name, base + 1)
        if effect["do"] == "restore":
            return await _same(await (await store.open(name)).at(int(effect["to"])), after)
        before = await (await store.open(name)).at(base)
        match effect["do"]:
            case "shape":
                found = shape_effect(await after.state())
                announced = {key: effect[key] for key in ("fields", "indexes")}
                return announced == {key: found[key] for key in announced} and await same_content(
                    before, after, renames=effect["renames"], loose=effect["loose"]
                )
            case "add":
                return await _was_appended(before, after, effect)
            case "insert":
                return await _was_inserted(before, after, effect)
            case "overwrite":
                return (await after.state()).has(str(effect["witness"]))
            case "optimize":
                return await _same(before, after)
            case "fill":
                same = (await before.state()).shape() == (await after.state()).shape()
                return same and await _was_filled(before, after, effect["columns"])
            case _:
                # Without this, another writer's schema change could pass as this change of rows.
                same = (await before.state()).shape() == (await after.state()).shape()
                return same and await _replays(store, name, base, effect, after)
    except StoreError:
        return False


async def _is_leftover(store: Store, name: str, version: int) -> bool:
    return (await (await (await store.open(name)).at(version)).state()).is_leftover


async def _was_appended(before: Table, after: Table, effect: Mapping[str, Any]) -> bool:
    old = await before.count_rows()
    if await after.count_rows() - old != effect["rows"]:
        return False
    tail = [rows async for rows in _windows(after, effect["columns"], start=old)]
    return bool(tail) and digest(pa.concat_tables(tail)) == effect["digest"]


async def _was_inserted(before: Table, after: Table, effect: Mapping[str, Any]) -> bool:
    old = await before.count_rows()
    announced = set(effect["rows"])
    async for rows in _windows(after, effect["columns"], start=old):
        if not announced.issuperset(row_digests(rows)):
            return False
    return await _begins_like(before, after)


async def _begins_like(before: Table, after: Table) -> bool:
    """Returns whether the rows of a table_version are the first ones of a later one, unchanged."""
    state = await before.state()
    if state.shape() != (await after.state()).shape():
        return False
    names, start = state.schema.names, 0
    async for rows in _windows(before, names):
        if digest(rows) != digest(await after.window(names, start, len(rows))):
            return False
        start += len(rows)
    return True


async def _was_created(after: Table, effect: Mapping[str, Any]) -> bool:
    state = await after.state()
    if state.is_leftover:
        return False
    if "fields" not in effect:  # announced by release 0.1.0
        return True
    if state.shape()["fields"] != effect["fields"]:
        return False
    return await after.count_rows() == int(effect["rows"])


async def _was_filled(before: Table, after: Table, columns: Collection[str]) -> bool:
    """Returns whether only the given columns changed, the witness columns among them.

    A fill marks each row that it fills in a witness column; an update by another writer does not.
    A commit that changed nothing also matches: undoing it loses nothing.
    """
    if not await _same_rows(before, after, columns):
        return False
    marks = [name for name in columns if name.startswith(WITNESS_PREFIX)]
    names = (await before.state()).schema.names
    if marks and await _same_rows(before, after, [n for n in names if n not in marks]):
        return await _same_rows(before, after, ())
    return True


async def _replays(
    store: Store, name: str, base: int, effect: Mapping[str, Any], after: Table
) -> bool:
    main = await store.open(name)
    for left in await main.branches():  # by a process that crashed during this check
        if left.startswith(_REPLAY):
            await main.delete_branch(left)
    branch = _REPLAY + secrets.token_hex(6)  # a crash in creation makes a name unusable
    try:
        copy = await main.create_branch(branch, base)
        match effect["do"]:
            case "update":
                await copy.update(sql=effect["sql"], where=effect["where"])
            case "delete":
                await copy.delete(effect["where"])
            case "merge":
                payload = base64.b64decode(effect["data"])
                await copy.merge(effect["key"], pa.ipc.open_stream(payload).read_all())
            case _:
                return False
        return await same_content(copy, after)
    finally:
        with anyio.CancelScope(shield=True):
            await drop_branch(store, name, branch)


async def _same(one: Table, other: Table) -> bool:
    """Returns whether two table_versions have the same shape and the same rows."""
    alike = (await one.state()).shape() == (await other.state()).shape()
    return alike and await same_content(one, other)


async def same_content(
    one: Table,
    other: Table,
    *,
    renames: Mapping[str, str] | None = None,
    loose: Collection[str] = (),
) -> bool:
    """Returns whether two table_versions hold the same rows in the columns that both have.

    Args:
        one: The first, as a table at that version.
        other: The second.
        renames: Names in the second by name in the first, for columns whose names differ.
        loose: Columns of the first that are not compared.

    Raises:
        StoreError: One of them cannot be read.
    """
    if await one.count_rows() != await other.count_rows():
        return False
    names = set((await other.state()).schema.names)
    have = [n for n in (await one.state()).schema.names if n not in loose]
    common = [n for n in have if (renames or {}).get(n, n) in names]
    counterparts = _windows(other, [(renames or {}).get(name, name) for name in common])
    async for rows in _windows(one, common):
        if digest(rows) != digest((await anext(counterparts)).rename_columns(common)):
            return False
    return True


async def _same_rows(one: Table, other: Table, loose: Collection[str]) -> bool:
    """Returns whether two table_versions hold the same rows in any order, without some columns."""
    names = [n for n in (await one.state()).schema.names if n not in loose]

    async def total(table: Table) -> tuple[int, int]:
        rows = found = 0
        async for batch in table.batches(None, names, _WINDOW_ROWS):
            rows += len(batch)
            found += sum(digests(batch))
        return rows, found

    return await total(one) == await total(other)


async def _windows(table: Table, columns: Sequence[str], start: int = 0) -> Any:
    total = await table.count_rows()
    while start < total:
        rows = await table.window(columns, start, _WINDOW_ROWS)
        yield rows
        start += max(len(rows), 1)


async def is_at_head(known: Opened) -> bool:
    """Returns whether a handle is still at the latest version; moves it there."""
    try:
        await known.table.refresh()
        return await known.table.version() == known.version
    except StoreError:
        return False
