"""Going back: fenced restores, savepoint branches, and telling our own commits from others'.

LanceDB's `restore` never fails and silently discards what was committed meanwhile; version
arithmetic on a pinned handle tells (facts: restore, measured 84 of 84). Everything here refuses to
discard a commit that is not known to be ours. When to go back is for `executor`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

import anyio
import pyarrow as pa

from aiomigrate.effects import digest, row_digests, shape_effect
from aiomigrate.errors import StoreError, TableVersionGoneError, UnresolvedError
from aiomigrate.lance import Store, Table
from aiomigrate.model import Script
from aiomigrate.operations.base import LEFTOVER
from aiomigrate.operations.digests import digests
from aiomigrate.undo import spell_spans

Guard = Callable[[], Awaitable[None]]
"""Raises unless the lease is safely ours."""

_WINDOW_ROWS = 20_000
_REPLAY = "aiomigrate-replay-"


async def restore_fenced(
    store: Store,
    name: str,
    *,
    to: int,
    head: int,
    guard: Guard,
    script: Script,
    protected: bool = False,
) -> int:
    """Returns a table to an older table_version, if its head is still the one we know.

    Args:
        store: Where.
        name: The table.
        to: The table_version to return to.
        head: The latest table_version known to be ours (or the savepoint itself).
        guard: Asked immediately before the restore.
        script: The migration being undone, for the error.
        protected: Whether it has a savepoint branch: a table without one is another table.

    Returns:
        The table_version of the restore.

    Raises:
        UnresolvedError: Someone else has committed; nothing of theirs is discarded, or, where two
            commits crossed ours, what was covered is named.
    """
    table = await store.open(name)
    found = await table.version()
    if found != head:
        raise unresolved(script, name, to, [(head + 1, found)])
    if protected and not any(is_branch_of(b, script) for b in await table.branches()):
        raise UnresolvedError(
            f"{script}: table {name!r} has lost its savepoint: it was dropped and made again by "
            "someone else while the migration ran. It was left as it is.",
            "Find out why, then correct the migration and run again.",
            line=script.line,
            version=script.version,
        )
    await guard()
    return await _covering(table, await table.restore(to), name, to=to, head=head, script=script)


async def vacate(store: Store, name: str, *, head: int, guard: Guard, script: Script) -> int:
    """Empties a table that a failed migration made, if its head is still the one we know.

    A name is never dropped and used again (facts: 11): what is left is a mark, which counts as no
    table and which `CreateTable` overwrites.

    Returns:
        The table_version of the mark.

    Raises:
        UnresolvedError: Someone else has committed; nothing of theirs is discarded.
    """
    table = await store.open(name)
    found = await table.version()
    if found != head:
        raise unresolved(script, name, 0, [(head + 1, found)])
    await guard()
    left = pa.schema([pa.field(LEFTOVER, pa.bool_())])
    mark = await store.create(name, left, overwrite=True)
    return await _covering(mark, await mark.version(), name, to=0, head=head, script=script)


async def _covering(
    table: Table, mine: int, name: str, *, to: int, head: int, script: Script
) -> int:
    """Returns our commit if it followed the head we knew; else brings back what it covered."""
    if mine == head + 1:
        return mine
    back = await table.restore(mine - 1)
    covered = [(head + 1, mine - 1)]
    if back != mine + 1:
        raise UnresolvedError(
            f"{script}: restoring table {name!r} crossed other writers twice: its head {back} "
            f"holds their table_versions {head + 1} to {mine - 1} on top of this migration, but "
            f"not {mine + 1} to {back - 1}.",
            f"Inspect them with `table.checkout({mine + 1})`, merge by hand, then "
            f"{_accept(script)}",
            line=script.line,
            version=script.version,
        )
    raise unresolved(script, name, to, covered)


def unresolved(
    script: Script, table: str, savepoint: int, foreign: Sequence[tuple[int, int]]
) -> UnresolvedError:
    """Builds the error that names the commits which undoing would discard."""
    spans = spell_spans(foreign)
    again = (
        ""
        if script.runs_code
        else "Correct what made it fail, and run again: unchanged, it goes on where it was. Or, "
        "to change the migration: "
    )
    return UnresolvedError(
        f"{script}: others committed to table {table!r} (table_version {spans}) since savepoint "
        f"{savepoint}, so it was not undone and holds part of this migration.",
        f"{again}To keep the data as it is, {_accept(script)} To go back instead, which discards "
        f"those commits, `await table.restore({savepoint})` first, then the same.",
        line=script.line,
        version=script.version,
    )


def crossed(
    table: str, covered: tuple[int, int], lost: tuple[int, int], head: int
) -> UnresolvedError:
    """Builds the error of an overwrite that was undone while yet others committed."""
    return UnresolvedError(
        f"Rebuilding table {table!r} crossed other writers twice: its head {head} holds their "
        f"table_versions {covered[0]} to {covered[1]}, but not {lost[0]} to {lost[1]}.",
        f"Inspect those with `await table.checkout({lost[0]})`, write them again, then run again.",
    )


async def uncover(
    store: Store, name: str, *, base: int, witness: str, guard: Guard, script: Script
) -> None:
    """Brings back what an overwrite discarded whose process died before it could look.

    Args:
        store: Where.
        name: The table.
        base: The table_version that the overwrite was computed from.
        witness: The column by which its commit is known.
        guard: Asked immediately before the restore.
        script: The migration, for the error.

    Raises:
        UnresolvedError: Others have committed on top of it; everything is still there.
    """
    table = await store.find(name)
    if table is None:
        return
    head = await table.version()
    made = 0
    for version in range(base + 1, head + 1):
        try:
            state = await (await table.at(version)).state()
        except TableVersionGoneError:
            continue
        if state.has(witness):
            made = version
            break
    if made in (0, base + 1) or not (await table.state()).has(witness):
        return  # it was never made, it discarded nothing, or that was undone
    if made != head:
        raise unresolved(script, name, base, [(base + 1, made - 1), (made + 1, head)])
    await guard()
    back = await table.restore(made - 1)
    if back != head + 1:
        raise crossed(name, (base + 1, made - 1), (head + 1, back - 1), back)


def _accept(script: Script) -> str:
    return (
        f"run `aiomigrate stamp --table {script.line} --to {script.version - 1}` and then "
        f"`aiomigrate upgrade` (or stamp --to {script.version} if the migration is complete)."
    )


def branch_name(epoch: int, owner: str, script: Script) -> str:
    """Returns a name no branch ever had: one whose creation crashed can never be used again."""
    return f"aiomigrate-{epoch}-{owner}-{_branch_end(script)}"


def is_branch_of(name: str, script: Script) -> bool:
    """Returns whether a branch is the savepoint of some attempt at a migration."""
    return name.startswith("aiomigrate-") and name.endswith(f"-{_branch_end(script)}")


def _branch_end(script: Script) -> str:
    return f"{hashlib.sha256(script.line.encode()).hexdigest()[:8]}-{script.version}"


async def drop_branch(store: Store, table: str, name: str, known: Table | None = None) -> None:
    """Deletes a savepoint branch if it is there.

    Args:
        store: The database.
        table: The table that it is a branch of.
        name: The branch.
        known: A handle of the table, if one is open: then it is opened anew only on failure.
    """
    if known is not None:
        with contextlib.suppress(StoreError):
            await known.delete_branch(name)
            return
    handle = await store.find(table)
    if handle is None:
        return
    try:
        await handle.delete_branch(name)
    except StoreError:
        if name in await handle.branches():  # else there was none, or another holder was faster
            raise


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
