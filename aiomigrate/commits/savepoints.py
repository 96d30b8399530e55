"""Going back: fenced restores, savepoint branches, and telling our own commits from others'.

LanceDB's `restore` never fails and silently discards what was committed meanwhile; version
arithmetic on a pinned handle tells (facts: restore, measured 84 of 84). Everything here refuses to
discard a commit that is not known to be ours. When to go back is for `executor`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Sequence

import pyarrow as pa

from aiomigrate.errors import StoreError, TableVersionGoneError, UnresolvedError
from aiomigrate.migration.model import Script
from aiomigrate.schema.state import LEFTOVER
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Table
from aiomigrate.text import spell_spans

Guard = Callable[[], Awaitable[None]]
"""Raises unless the lease is safely ours."""


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
