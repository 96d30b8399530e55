"""Fenced restores and savepoint branches.

LanceDB's `restore` never fails and silently discards concurrent commits; version arithmetic on a
pinned handle detects that (measured: 84 of 84). Every function here refuses to
discard a commit that the migration is not known to have made. When to restore is decided in
`execution.executor` and `execution.recovery`; which commits a migration made is checked in
`commits.commit_identity`.
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
"""Raises `LeaseLostError` unless this process safely holds the lease."""


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
    """Restores an older table_version of a table if its latest version is the expected one.

    Args:
        store: The database.
        name: The table.
        to: The table_version to restore.
        head: The latest table_version that the migration made, or the savepoint itself.
        guard: Checks the lease immediately before the restore.
        script: The migration being undone, for the error.
        protected: Whether the table has a savepoint branch. If the branch is missing, the table
            was dropped and created again.

    Returns:
        The table_version of the restore.

    Raises:
        LeaseLostError: Another process has taken over; nothing was written.
        StoreError: LanceDB failed.
        UnresolvedError: Another writer has committed. Its commits are not discarded; if two of
            them conflicted with the restore, the error names the commits that are covered.
    """
    table = await store.open(name)
    found = await table.version()
    if found != head:
        raise unresolved(script, name, to, [(head + 1, found)])
    if protected and not any(is_branch_of(b, script) for b in await table.branches()):
        raise UnresolvedError(
            f"{script}: table {name!r} has lost its savepoint: another writer dropped and created "
            "the table again while the migration ran. It was left as it is.",
            "Find out why, then correct the migration and run again.",
            line=script.line,
            version=script.version,
        )
    await guard()
    return await _confirm_commit(
        table, await table.restore(to), name, to=to, head=head, script=script
    )


async def vacate(store: Store, name: str, *, head: int, guard: Guard, script: Script) -> int:
    """Empties a table that a failed migration created, if its version is the expected one.

    A table name is never dropped and used again. The table is overwritten by an empty
    one with a marker column, which counts as no table and which `CreateTable` overwrites.

    Args:
        store: The database.
        name: The table.
        head: The latest table_version that the migration made.
        guard: Checks the lease immediately before the commit.
        script: The migration being undone, for the error.

    Returns:
        The table_version of the marker.

    Raises:
        LeaseLostError: Another process has taken over; nothing was written.
        StoreError: LanceDB failed.
        UnresolvedError: Another writer has committed. Its commits are not discarded.
    """
    table = await store.open(name)
    found = await table.version()
    if found != head:
        raise unresolved(script, name, 0, [(head + 1, found)])
    await guard()
    left = pa.schema([pa.field(LEFTOVER, pa.bool_())])
    mark = await store.create(name, left, overwrite=True)
    return await _confirm_commit(mark, await mark.version(), name, to=0, head=head, script=script)


async def _confirm_commit(
    table: Table, made: int, name: str, *, to: int, head: int, script: Script
) -> int:
    """Returns the version of a commit that directly follows `head`.

    Otherwise restores the foreign commits that it covered, and raises.
    """
    if made == head + 1:
        return made
    back = await table.restore(made - 1)
    covered = [(head + 1, made - 1)]
    if back != made + 1:
        raise UnresolvedError(
            f"{script}: restoring table {name!r} conflicted with other writers twice: its head "
            f"{back} holds their table_versions {head + 1} to {made - 1} on top of this migration, "
            f"but not {made + 1} to {back - 1}.",
            f"Inspect them with `table.checkout({made + 1})`, merge by hand, then "
            f"{_accept(script)}",
            line=script.line,
            version=script.version,
        )
    raise unresolved(script, name, to, covered)


def unresolved(
    script: Script, table: str, savepoint: int, foreign: Sequence[tuple[int, int]]
) -> UnresolvedError:
    """Returns the error that names the foreign commits that undoing would discard.

    Args:
        script: The migration.
        table: The table.
        savepoint: The table_version that undoing would restore.
        foreign: Ranges of foreign table_versions, first and last.
    """
    spans = spell_spans(foreign)
    again = (
        ""
        if script.runs_code
        else "Correct the cause of the failure and run again: an unchanged migration continues "
        "where it stopped. Or, to change the migration: "
    )
    return UnresolvedError(
        f"{script}: other writers committed to table {table!r} (table_version {spans}) since "
        f"savepoint {savepoint}, so it was not undone and holds part of this migration.",
        f"{again}To keep the data as it is, {_accept(script)} To return to the savepoint, which "
        f"discards those commits, run `await table.restore({savepoint})` first, then the same.",
        line=script.line,
        version=script.version,
    )


def unresolved_overwrite(
    table: str, covered: tuple[int, int], lost: tuple[int, int], head: int
) -> UnresolvedError:
    """Returns the error for an overwrite that was undone while more foreign commits were made.

    Args:
        table: The table.
        covered: First and last foreign table_version that the overwrite covered; restored.
        lost: First and last foreign table_version that the restore covered.
        head: The latest table_version.
    """
    return UnresolvedError(
        f"Rebuilding table {table!r} conflicted with other writers twice: its head {head} holds "
        f"their table_versions {covered[0]} to {covered[1]}, but not {lost[0]} to {lost[1]}.",
        f"Inspect those with `await table.checkout({lost[0]})`, write them again, then run again.",
    )


async def restore_overwritten(
    store: Store, name: str, *, base: int, witness: str, guard: Guard, script: Script
) -> None:
    """Restores what an overwrite covered if its process crashed before it checked.

    Does nothing if the table does not exist, or if the overwrite was not made, covered nothing or
    was undone already.

    Args:
        store: The database.
        name: The table.
        base: The table_version that the overwrite was computed from.
        witness: The witness column that identifies its commit.
        guard: Checks the lease immediately before the restore.
        script: The migration, for the error.

    Raises:
        LeaseLostError: Another process has taken over; nothing was written.
        StoreError: LanceDB failed.
        UnresolvedError: Other writers have committed on top of it; no commit is lost.
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
        return  # it was not made, covered nothing, or was undone
    if made != head:
        raise unresolved(script, name, base, [(base + 1, made - 1), (made + 1, head)])
    await guard()
    back = await table.restore(made - 1)
    if back != head + 1:
        raise unresolved_overwrite(name, (base + 1, made - 1), (head + 1, back - 1), back)


def _accept(script: Script) -> str:
    return (
        f"run `aiomigrate stamp --table {script.line} --to {script.version - 1}` and then "
        f"`aiomigrate upgrade` (or stamp --to {script.version} if the migration is complete)."
    )


def branch_name(epoch: int, owner: str, script: Script) -> str:
    """Returns the name of a migration's savepoint branch, unique per lease and migration.

    It is unique because a crash during creation makes a name unusable for ever.

    Args:
        epoch: The epoch of the lease.
        owner: The owner of the lease.
        script: The migration.
    """
    return f"aiomigrate-{epoch}-{owner}-{_branch_end(script)}"


def is_branch_of(name: str, script: Script) -> bool:
    """Returns whether a branch is the savepoint of any attempt of a migration."""
    return name.startswith("aiomigrate-") and name.endswith(f"-{_branch_end(script)}")


def _branch_end(script: Script) -> str:
    return f"{hashlib.sha256(script.line.encode()).hexdigest()[:8]}-{script.version}"


async def drop_branch(store: Store, table: str, name: str, known: Table | None = None) -> None:
    """Deletes a savepoint branch; does nothing if the table or the branch does not exist.

    Args:
        store: The database.
        table: The table of the branch.
        name: The branch.
        known: An open handle of the table, if there is one. The table is opened again only if
            deleting through it fails.

    Raises:
        StoreError: The branch exists and could not be deleted.
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
        if name in await handle.branches():  # else there was none, or another holder deleted it
            raise
