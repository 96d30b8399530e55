"""What needs the lease and runs no migration: pruning savepoints, stamping lines."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping
from typing import Any

from aiomigrate import events as ev
from aiomigrate.errors import TargetError
from aiomigrate.execution.workspace import Workspace
from aiomigrate.ledger.lease import Lease
from aiomigrate.ledger.records import Kind, new_event
from aiomigrate.ledger.writer import Writer
from aiomigrate.migration.checksum import ALGORITHM
from aiomigrate.migration.model import Scripts, Target
from aiomigrate.planning.destructive import Kept, contracted, kept_savepoints
from aiomigrate.runs.environment import Environment, Run
from aiomigrate.runs.session import Job, Session
from aiomigrate.runs.settlement import head_row, shapes_of
from aiomigrate.runs.snapshot import LedgerView, Snapshot, SnapshotReader, UncheckedView, View
from aiomigrate.text import nearest


async def prune(environment: Environment, *, older_than_s: float) -> tuple[Kept, ...]:
    """Deletes savepoints that were kept of destructive migrations. Takes the lease.

    Args:
        environment: What the manager works with.
        older_than_s: Only those of migrations applied that many seconds ago, or more.

    Returns:
        What was deleted.

    Raises:
        AiomigrateError: The run could not begin or go on.
    """
    database = environment.database
    scripts = await database.scripts()
    store = await database.open()
    if store is None:
        return ()
    run_id, log = environment.named_run()
    ledger = database.ledger(store, log)
    reader = SnapshotReader(store, ledger, scripts, on_ahead=environment.options.on_ahead, log=log)
    if not kept_savepoints((await reader.read()).journal):
        return ()
    session = Session(environment.run(store, ledger, scripts, run_id=run_id, log=log))
    job = PruneJob(session, LedgerView(reader), older_than_s)
    await session.hold(job)
    return job.pruned


class PruneJob(Job):
    """Deletes savepoints that were kept long enough.

    Attributes:
        pruned: What was deleted.
    """

    doing = "pruning"

    def __init__(self, session: Session, view: View, older_than_s: float) -> None:
        """Reads nothing.

        Args:
            session: Takes the lease.
            view: Reads and decides.
            older_than_s: Seconds since the migration was applied, at least.
        """
        self._session = session
        self._view = view
        self._older_than_s = older_than_s
        self.pruned: tuple[Kept, ...] = ()

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Deletes them, and records that."""
        snapshot = await self._session.take_over(writer, lease, self._view)
        workspace = self._session.workspace(writer)
        self.pruned = await prune_savepoints(
            self._session.run, snapshot, workspace, older_than_s=self._older_than_s
        )


async def prune_savepoints(
    run: Run, snapshot: Snapshot, workspace: Workspace, *, older_than_s: float
) -> tuple[Kept, ...]:
    """Deletes savepoints that are older, or whose migration was contracted. Needs the lease.

    Args:
        run: The context of the run.
        snapshot: What was read under the lease.
        workspace: Deletes branches, and records that.
        older_than_s: Seconds since the migration was applied, at least.

    Returns:
        What was deleted.
    """
    oldest = run.clock.wall() - dt.timedelta(seconds=older_than_s)
    current = {line: state.current for line, state in snapshot.decided.lines.items()}
    found = kept_savepoints(snapshot.journal)
    ended = contracted(found, run.scripts, current)
    old = tuple(kept for kept in found if kept.at <= oldest or kept in ended)
    for kept in old:
        await workspace.applier.clean([], {kept.table: kept.branch})
    if old:
        events = [
            new_event(
                Kind.PRUNED,
                at=run.clock.wall(),
                line=kept.key[0],
                version=kept.key[1],
                detail={"pruned": {kept.table: kept.branch}},
            )
            for kept in old
        ]
        await workspace.writer.record(*events)
        run.log.info(ev.SAVEPOINTS_PRUNED, savepoints=len(old))
    return old


async def stamp(
    environment: Environment, *, tables: Collection[str] | None, to: Target
) -> Mapping[str, int]:
    """Records lines at versions without running anything. Takes the lease.

    Args:
        environment: What the manager works with.
        tables: Lines to stamp; all by default.
        to: The newest scripts (`None`), at most a version, or line by line (0 forgets).

    Returns:
        The version recorded, by line; empty when there are no scripts.

    Raises:
        TargetError: A line has no scripts, or the version is above them.
        AiomigrateError: The run could not begin or go on.
    """
    database = environment.database
    scripts = await database.scripts()
    versions = versions_to_stamp(scripts, tables, to)
    if not versions:
        return versions
    run_id, log = environment.named_run()
    store = await database.connect()
    ledger = database.ledger(store, log)
    session = Session(environment.run(store, ledger, scripts, run_id=run_id, log=log))
    await session.hold(StampJob(session, UncheckedView(ledger, scripts), versions))
    return versions


class StampJob(Job):
    """Records lines at versions, and ends what was interrupted there."""

    doing = "stamping"

    def __init__(self, session: Session, view: View, versions: Mapping[str, int]) -> None:
        """Reads nothing.

        Args:
            session: Takes the lease.
            view: Reads.
            versions: The version to record, by line.
        """
        self._session = session
        self._view = view
        self._versions = versions

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Records the versions in the journal, then in the head."""
        session, run, versions = self._session, self._session.run, self._versions
        snapshot = await session.take_over(writer, lease, self._view)
        for line in versions:
            snapshot.busy.refuse_line(line, run.scripts)
        workspace = session.workspace(writer)
        events, rows = [], []
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
                    tables=await shapes_of(tables, workspace.tables),
                    detail={"checksums": checksums},
                )
            )
            rows.append(head_row(run, lease, line, version))
            run.log.info(ev.LINE_STAMPED, table=line, version=version)
        await writer.record(*events)
        await run.ledger.own_rows(rows)
        for line, version in versions.items():
            left = snapshot.journal.of(line).unfinished
            if left is not None:
                # Going on below it, its witnesses tell the next run which updates are done.
                is_below = version < (left.started.version or 0)
                branches = left.started.detail.get("branches", {})
                names = [] if is_below else list(left.savepoints)
                await workspace.cleanup.clean(line, version, names, branches)
            workspace.cleanup.lift(line, version)


def versions_to_stamp(
    scripts: Scripts, tables: Collection[str] | None, to: Target
) -> dict[str, int]:
    """Returns the version to record, by line. Pure.

    Args:
        scripts: All migrations.
        tables: Lines to stamp; all by default.
        to: As for `stamp`.

    Raises:
        TargetError: A line has no scripts, or the version is above them.
    """
    for wanted in to.values() if isinstance(to, Mapping) else () if to is None else (to,):
        if type(wanted) is not int or wanted < 0:
            raise TargetError(f"{wanted!r} is no version to stamp.", "Use 0 or more.")
    known = scripts.line_names()
    asked = tables if tables is not None else (to.keys() if isinstance(to, Mapping) else known)
    result = {}
    for line in asked:
        if line not in known:
            raise TargetError(
                f"There is no migration of {line!r}.",
                f"Lines with migrations: {', '.join(known) or 'none'}.{nearest(line, known)}",
                line=line,
            )
        exact = to[line] if isinstance(to, Mapping) and line in to else None
        if exact is None and isinstance(to, int) and tables is not None:
            exact = to  # a line was named: exactly there
        version = scripts.target(line, to) if exact is None else exact
        if not isinstance(version, int) or not 0 <= version <= scripts.latest(line):
            raise TargetError(
                f"{line!r} cannot be stamped at {version!r}: its newest script is "
                f"{scripts.latest(line)}.",
                "Choose 0 to that.",
                line=line,
            )
        result[line] = version
    return result
