"""Whether a commit that was found is one that a migration announced.

Compares what a table_version holds with what the announced commit writes. Used after a crash,
where the last commit may be ours and not recorded.
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
from aiomigrate.schema.state import TableState
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Commit, Table


def foreign_among(made: Sequence[Commit], *, before: int, after: int, compacted: bool) -> list[int]:
    """Returns which commits beside an optimization are not known to be its own. Pure.

    Its own change neither rows nor schema nor the list of indexes. One of them rewrites files, if
    it compacted; where several did, an update of all rows may be among them.

    Args:
        made: The commits that are still there, that before it included.
        before: The table_version before it.
        after: The table_version it ended with, which is its own.
        compacted: Whether it rewrote files.
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


# ---- was that commit ours? ----------------------------------------------------------------------


async def is_ours(store: Store, name: str, base: int, effect: Mapping[str, Any]) -> bool:
    """Returns whether the commit after `base` is what an announced one would have written.

    Used after a crash, for the one commit that was announced but not confirmed. A commit with the
    very same effect by someone else counts as ours: undoing and redoing it loses nothing.
    """
    try:
        after = await (await store.open(name)).at(base + 1)
        if effect["do"] == "create":
            fresh = base == 0 or await _is_leftover(store, name, base)
            return fresh and not (await after.state()).is_leftover
        if effect["do"] == "vacate":
            return await _is_leftover(store, name, base + 1)
        if effect["do"] == "restore":
            return await _same(await (await store.open(name)).at(int(effect["to"])), after)
        before = await (await store.open(name)).at(base)
        match effect["do"]:
            case "shape":
                found = shape_effect(await after.state())
                told = {key: effect[key] for key in ("fields", "indexes")}
                return told == {key: found[key] for key in told} and await same_content(
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
                return same and await _same_rows(before, after, effect["columns"])
            case _:
                # Else someone else's change of the schema would be taken for our change of rows.
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
    told = set(effect["rows"])
    async for rows in _windows(after, effect["columns"], start=old):
        if not told.issuperset(row_digests(rows)):
            return False
    return True


async def _replays(
    store: Store, name: str, base: int, effect: Mapping[str, Any], after: Table
) -> bool:
    main = await store.open(name)
    for left in await main.branches():  # by a process that died while it looked
        if left.startswith(_REPLAY):
            await main.delete_branch(left)
    branch = _REPLAY + secrets.token_hex(6)  # a name whose creation crashed is unusable for ever
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
    """Returns whether two versions have one shape and the same rows."""
    alike = (await one.state()).shape() == (await other.state()).shape()
    return alike and await same_content(one, other)


async def same_content(
    one: Table,
    other: Table,
    *,
    renames: Mapping[str, str] | None = None,
    loose: Collection[str] = (),
) -> bool:
    """Returns whether two versions hold the same rows, in the columns both have.

    Args:
        one: The first.
        other: The second.
        renames: What a column of the first is called in the second, where that differs.
        loose: Columns of the first that are not compared.
    """
    if await one.count_rows() != await other.count_rows():
        return False
    names = set((await other.state()).schema.names)
    have = [n for n in (await one.state()).schema.names if n not in loose]
    common = [n for n in have if (renames or {}).get(n, n) in names]
    theirs = _windows(other, [(renames or {}).get(name, name) for name in common])
    async for rows in _windows(one, common):
        if digest(rows) != digest((await anext(theirs)).rename_columns(common)):
            return False
    return True


async def _same_rows(one: Table, other: Table, loose: Collection[str]) -> bool:
    """Returns whether two versions hold the same rows in any order, but for some columns."""
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
