"""Runs without migrations: deleting savepoints, stamping lines, freeing a lease.

The manager calls `prune`, `stamp` and `unlock`; upgrades call `prune_savepoints` at their end.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from aiomigrate import events as ev
from aiomigrate.errors import TargetError
from aiomigrate.execution.open_tables import OpenTables
from aiomigrate.execution.workspace import Workspace
from aiomigrate.ledger.lease import Lease
from aiomigrate.ledger.lease import unlock as unlock_lease
from aiomigrate.ledger.records import BACKGROUND_LEASE, RUN_LEASE, Event, Holder, Kind, new_event
from aiomigrate.ledger.writer import Writer
from aiomigrate.migration.checksum import ALGORITHM
from aiomigrate.migration.model import Scripts, Target
from aiomigrate.planning.destructive import Kept, contracted, kept_savepoints
from aiomigrate.runs.environment import Environment, Run
from aiomigrate.runs.session import Job, RunStart, Session
from aiomigrate.runs.settlement import head_row, shapes_of
from aiomigrate.runs.snapshot import LedgerView, Snapshot, UncheckedView, View
from aiomigrate.text import nearest


async def prune(environment: Environment, *, older_than_s: float) -> tuple[Kept, ...]:
    """Deletes savepoints of destructive migrations. Takes the lease if there are any.

    A crash leaves the remaining savepoints for the next call.

    Args:
        environment: The manager's database, options, clocks and logger.
        older_than_s: Minimum number of seconds since the migration was applied.

    Returns:
        The deleted savepoints; empty if there were none.

    Raises:
        LedgerError: The metadata tables are unreadable or inconsistent.
        LeaseError: The lease could not be acquired, or was lost.
        StoreError: A LanceDB call failed.
    """
    database = environment.database
    await database.scripts()  # wrong scripts are refused even where there is no database
    store = await database.open()
    if store is None:
        return ()
    run = await RunStart.begin(environment)
    ledger = database.ledger(store, run.log)
    reader = run.reader(store, ledger)
    if not kept_savepoints((await reader.read()).journal):
        return ()
    session = run.session(store, ledger)
    job = PruneJob(session, LedgerView(reader), older_than_s)
    await session.hold(job)
    return job.pruned


class PruneJob(Job):
    """Deletes savepoints that were kept long enough.

    Attributes:
        pruned: The deleted savepoints; empty before.
    """

    doing = "pruning"

    def __init__(self, session: Session, view: View, older_than_s: float) -> None:
        """Reads nothing.

        Args:
            session: Takes the lease.
            view: Reads and decides.
            older_than_s: Minimum number of seconds since the migration was applied.
        """
        self._session = session
        self._view = view
        self._older_than_s = older_than_s
        self.pruned: tuple[Kept, ...] = ()

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Deletes the savepoints, and records that."""
        snapshot = await self._session.take_over(writer, lease, self._view)
        workspace = self._session.workspace(writer)
        self.pruned = await prune_savepoints(
            self._session.run, snapshot, workspace, older_than_s=self._older_than_s
        )


async def prune_savepoints(
    run: Run, snapshot: Snapshot, workspace: Workspace, *, older_than_s: float
) -> tuple[Kept, ...]:
    """Deletes savepoints that are old enough or no longer needed. Needs the lease.

    A savepoint is no longer needed once a migration with a matching `contracts` is applied. A crash
    between deleting and recording leaves entries that the next call deletes and records again.

    Args:
        run: The context of the run.
        snapshot: The snapshot taken under the lease.
        workspace: Deletes branches, and records that.
        older_than_s: Minimum number of seconds since the migration was applied.

    Returns:
        The deleted savepoints; empty if there were none.

    Raises:
        LeaseLostError: Another process has the lease.
        StoreError: A LanceDB call failed.
    """
    oldest = run.clock.wall() - dt.timedelta(seconds=older_than_s)
    current = {line: state.current for line, state in snapshot.decided.lines.items()}
    savepoints = kept_savepoints(snapshot.journal)
    unneeded = contracted(savepoints, run.scripts, current)
    pruned = tuple(kept for kept in savepoints if kept.at <= oldest or kept in unneeded)
    for kept in pruned:
        await workspace.applier.clean([], {kept.table: kept.branch})
    if pruned:
        events = [
            new_event(
                Kind.PRUNED,
                at=run.clock.wall(),
                line=kept.key[0],
                version=kept.key[1],
                detail={"pruned": {kept.table: kept.branch}},
            )
            for kept in pruned
        ]
        await workspace.writer.record(*events)
        run.log.info(ev.SAVEPOINTS_PRUNED, savepoints=len(pruned))
    return pruned


async def stamp(
    environment: Environment, *, tables: Collection[str] | None, to: Target
) -> Mapping[str, int]:
    """Records versions of lines without running migrations. Takes the lease.

    The journal is written first, then the head, so that the next run repairs the head after a
    crash.

    Args:
        environment: The manager's database, options, clocks and logger.
        tables: Lines to stamp; all if `None`.
        to: `None` for the newest scripts, a maximum version, or a version by line (0 for none).

    Returns:
        The recorded version by line; empty if there are no scripts.

    Raises:
        TargetError: A line has no scripts and is not recorded or not stamped at 0, or a version is
            above its newest script.
        BackgroundBusyError: Background work is using a line.
        LedgerError: The metadata tables are unreadable or inconsistent.
        LeaseError: The lease could not be acquired, or was lost.
        StoreError: A LanceDB call failed.
    """
    database = environment.database
    scripts = await database.scripts()
    versions = versions_to_stamp(scripts, tables, to)
    if not versions:
        return versions
    run = await RunStart.begin(environment)
    store = await database.connect()
    ledger = database.ledger(store, run.log)
    session = run.session(store, ledger)
    await session.hold(StampJob(session, UncheckedView(ledger, scripts), versions))
    return versions


class StampJob(Job):
    """Records versions of lines, and ends their interrupted migrations."""

    doing = "stamping"

    def __init__(self, session: Session, view: View, versions: Mapping[str, int]) -> None:
        """Reads nothing.

        Args:
            session: Takes the lease.
            view: Reads head and journal.
            versions: The version to record, by line.
        """
        self._session = session
        self._view = view
        self._versions = versions

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Records the versions in the journal, then in the head."""
        session, run, versions = self._session, self._session.run, self._versions
        snapshot = await session.take_over(writer, lease, self._view)
        recorded = {*snapshot.journal.lines, *(row.name for row in lease.head.rows)}
        for line in versions:
            if line not in recorded and not run.scripts.of(line):
                raise _no_migration(line, run.scripts.line_names())
            snapshot.busy.refuse_line(line, run.scripts)
        workspace = session.workspace(writer)
        await writer.record(*await stamp_events(run, versions, workspace.tables))
        rows = [head_row(run, lease, line, version) for line, version in versions.items()]
        await run.ledger.own_rows(rows)
        for line, version in versions.items():
            unfinished = snapshot.journal.of(line).unfinished
            if unfinished is not None:
                # If it will run again, its witness columns show which updates have been made.
                is_below = version < (unfinished.started.version or 0)
                branches = unfinished.started.detail.get("branches", {})
                names = [] if is_below else list(unfinished.savepoints)
                await workspace.cleanup.clean(line, version, names, branches)
            workspace.cleanup.set_head_later(line, version)


async def stamp_events(
    run: Run, versions: Mapping[str, int], opened: OpenTables
) -> tuple[Event, ...]:
    """Returns the events that record versions of lines without running migrations.

    Args:
        run: The context of the run.
        versions: The version to record, by line.
        opened: The open tables.

    Raises:
        StoreError: A table exists but cannot be read.
    """
    events = []
    for line, version in versions.items():
        covered = run.scripts.up_to(line, version)
        tables = sorted({t for script in covered for t in script.touches})
        checksums: dict[str, Any] = {str(s.version): s.checksum for s in covered}
        if version:
            checksums.setdefault(str(version), None)
        events.append(
            new_event(
                Kind.STAMPED,
                at=run.clock.wall(),
                line=line,
                version=version,
                algorithm=ALGORITHM,
                tables=await shapes_of(tables, opened),
                detail={"checksums": checksums},
            )
        )
        run.log.info(ev.LINE_STAMPED, table=line, version=version)
    return tuple(events)


def versions_to_stamp(
    scripts: Scripts, tables: Collection[str] | None, to: Target
) -> dict[str, int]:
    """Returns the version to record, by line. Pure.

    Args:
        scripts: All migrations.
        tables: Lines to stamp; all if `None`.
        to: As for `stamp`.

    Returns:
        The version by line; empty if there are no scripts.

    Raises:
        TargetError: A line has no scripts and is not stamped at 0, or a version is above its newest
            script.
    """
    for wanted in to.values() if isinstance(to, Mapping) else () if to is None else (to,):
        if type(wanted) is not int or wanted < 0:
            raise TargetError(
                f"{wanted!r} is not a valid version to stamp.", "Use an integer of 0 or more."
            )
    known = scripts.line_names()
    lines = tables if tables is not None else (to.keys() if isinstance(to, Mapping) else known)
    result = {}
    for line in lines:
        exact = to[line] if isinstance(to, Mapping) and line in to else None
        if exact is None and isinstance(to, int) and tables is not None:
            exact = to  # for lines given by name it is not a maximum
        if line not in known and exact != 0:  # at 0, the scripts of an ended line may be gone
            raise _no_migration(line, known)
        version = scripts.target(line, to) if exact is None else exact
        if not isinstance(version, int) or not 0 <= version <= scripts.latest(line):
            raise TargetError(
                f"{line!r} cannot be stamped at {version!r}: its newest script is "
                f"{scripts.latest(line)}.",
                f"Choose a version from 0 to {scripts.latest(line)}.",
                line=line,
            )
        result[line] = version
    return result


async def unlock(environment: Environment, *, background: bool) -> Holder | None:
    """Removes the holder of a lease after watching it for its TTL without a renewal.

    Args:
        environment: The manager's database, options, clocks and logger.
        background: Whether to free the background lease instead of the run lease.

    Returns:
        The removed holder; `None` if the lease was free or there is no database.

    Raises:
        LeaseHeldError: The holder renewed the lease: it is alive.
        LedgerError: The head is unreadable.
        StoreError: A LanceDB call failed.
    """
    database = environment.database
    store = await database.open()
    if store is None:
        return None
    ledger = database.ledger(store, environment.log)
    key = BACKGROUND_LEASE if background else RUN_LEASE
    return await unlock_lease(
        ledger, options=environment.options.lease, clock=environment.clock, key=key
    )


def _no_migration(line: str, known: Sequence[str]) -> TargetError:
    return TargetError(
        f"There is no migration of {line!r}.",
        f"Lines with migrations: {', '.join(known) or 'none'}.{nearest(line, known)}",
        line=line,
    )
