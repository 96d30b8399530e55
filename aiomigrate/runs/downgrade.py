"""Rolling back: which migrations are undone, how, and undoing them under the lease.

The manager calls `rollback` and `plan_rollback`. `planning.rollback` decides how a migration can be
undone, `execution.reverser` undoes one. Not for undoing a migration that failed during an upgrade:
that is for `execution.recovery`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from aiomigrate import events as ev
from aiomigrate.ledger.codec import Head
from aiomigrate.ledger.history import Journal
from aiomigrate.ledger.lease import Lease
from aiomigrate.ledger.records import Event
from aiomigrate.ledger.writer import Writer
from aiomigrate.migration.model import Key, Script
from aiomigrate.planning.plan import Plan, build_rollback
from aiomigrate.planning.reconcile import LineState
from aiomigrate.planning.rollback import Undo, decide, to_undo, unattributed_tables
from aiomigrate.planning.table_identity import Commits
from aiomigrate.results import Report, StepReport
from aiomigrate.runs.environment import Environment
from aiomigrate.runs.scheduler import Scheduler
from aiomigrate.runs.session import Job, RunStart, Session
from aiomigrate.runs.settlement import current_versions, settle
from aiomigrate.runs.snapshot import Snapshot, SnapshotReader, read_folded
from aiomigrate.store.commit_log import commit_times
from aiomigrate.store.connection import Store


async def plan_rollback(
    environment: Environment,
    line: str | Mapping[str, int],
    *,
    to: int | None,
    allow_destructive: bool,
) -> Plan:
    """Returns what `rollback` would do. Writes nothing and takes no lease.

    Args:
        environment: The manager's database, options, clocks and logger.
        line: The line (table), or the version to go back to by line.
        to: The version to go back to, 0 for none; `None` for the previous one.
        allow_destructive: Whether to discard later commits of other writers if necessary.

    Raises:
        RollbackRefusedError: A migration cannot be undone.
        DependencyError: A migration that stays depends on it.
        TargetError: A line or version is unknown, or above the current version.
        AiomigrateError: Scripts or ledger are invalid, or a LanceDB call failed.
    """
    database, log = environment.database, environment.log
    scripts = await database.scripts()
    store = await database.open()
    ledger = None if store is None else database.ledger(store, log)
    reader = SnapshotReader(store, ledger, scripts, on_ahead=environment.options.on_ahead, log=log)
    snapshot = await RollbackView(reader, line, to, allow_destructive).read()
    return snapshot.plan


async def rollback(
    environment: Environment,
    line: str | Mapping[str, int],
    *,
    to: int | None,
    allow_destructive: bool,
) -> Report:
    """Undoes applied migrations, latest first. Takes the lease if there is something to do.

    After a crash or a cancellation the next run continues an interrupted undo.

    Args:
        environment: The manager's database, options, clocks and logger.
        line: As for `plan_rollback`.
        to: As for `plan_rollback`.
        allow_destructive: As for `plan_rollback`.

    Returns:
        What was undone; without steps if there was nothing to undo.

    Raises:
        RollbackRefusedError: A migration cannot be undone; nothing was changed.
        DependencyError: A migration that stays depends on it; nothing was changed.
        TargetError: A line or version is unknown, or above the current version.
        MigrationFailedError: Undoing a migration failed; its report says what was undone.
        AiomigrateError: The run could not start or continue, e.g. because the lease was lost.
    """
    run = await RunStart.begin(environment)
    builder, database = run.builder, environment.database
    plan = await plan_rollback(environment, line, to=to, allow_destructive=allow_destructive)
    if not plan.needs_lease:
        return builder.build(lines=current_versions(plan))
    store = await database.connect()
    ledger = database.ledger(store, run.log)
    session = run.session(store, ledger)
    view = RollbackView(run.reader(store, ledger), line, to, allow_destructive)
    job = RollbackJob(session, view)
    if plan.steps:
        run.log.info(ev.RUN_PLANNED, migrations=len(plan.steps), database=database.name)
    await session.hold(job)
    executed = job.plan or plan
    lines = current_versions(executed)
    for step in executed.steps:
        undone = job.results.get(step.key)
        if undone is not None and undone.outcome.is_done and step.undo is not None:
            lines[step.script.line] = min(step.undo.to, lines[step.script.line])
    result = builder.build(
        lease_s=session.lease_s,
        steps=tuple(job.results.values()),
        lines=lines,
        ledger_commits=ledger.commits,
    )
    return run.finish(result, rolled_back=len(result.steps), total_s=round(result.total_s, 4))


@dataclass(frozen=True, slots=True)
class RollbackView:
    """The state of every line, and the plan of a rollback.

    Attributes:
        reader: Reads the database.
        line: The line, or the version to go back to by line.
        to: The version to go back to; `None` for the previous one.
        allow_destructive: Whether to discard later commits of other writers if necessary.
    """

    reader: SnapshotReader
    line: str | Mapping[str, int]
    to: int | None
    allow_destructive: bool

    async def read(
        self, head: Head | None = None, events: Sequence[Event] | None = None
    ) -> Snapshot:
        """Reads head and journal unless they are given, decides, and plans the rollback.

        Args:
            head: The head, if it has been read.
            events: All journal events, if they have been read.

        Raises:
            AiomigrateError: A migration cannot be undone, or scripts and ledger do not match.
        """
        reader = self.reader
        snapshot = await reader.read(head, events)
        targets = dict(self.line) if isinstance(self.line, Mapping) else {self.line: self.to}
        versions: dict[str, int] = {}
        for name, version in targets.items():
            state = snapshot.decided.lines.get(name)
            earlier = [v for v in (state.history.applied if state else ()) if v < state.current]  # type: ignore[union-attr]
            versions[name] = max(earlier, default=0) if version is None else version
        undos: dict[Key, Undo] = {}
        for key in to_undo(snapshot.decided, snapshot.journal, reader.scripts, versions):
            script = reader.scripts.get(*key)
            assert script is not None  # noqa: S101 - `to_undo` chose scripts
            assert reader.store is not None  # noqa: S101 - nothing is applied without a database
            table_versions, commits = await _look_at_tables(reader.store, script)
            state = snapshot.decided.lines[script.line]
            undos[key] = decide(
                script,
                state,
                snapshot.journal,
                table_versions,
                allow_destructive=self.allow_destructive,
                unattributed=unattributed_tables(snapshot.journal),
                commits=commits,
            )
        return replace(
            snapshot, plan=build_rollback(undos, snapshot.decided, reader.scripts, snapshot.busy)
        )

    async def decide_again(self, script: Script, state: LineState) -> Undo:
        """Decides again, under the lease, how one migration is undone.

        Uses the journal only, because the heads of other lines change while they are undone.

        Args:
            script: The migration.
            state: The state of its line when the plan was made.

        Raises:
            AiomigrateError: It cannot be undone.
        """
        assert self.reader.store is not None  # noqa: S101 - the lease is held
        assert self.reader.ledger is not None  # noqa: S101 - the lease is held
        journal: Journal = await read_folded(self.reader.ledger)
        state = replace(state, history=journal.of(script.line))
        table_versions, commits = await _look_at_tables(self.reader.store, script)
        return decide(
            script, state, journal, table_versions,
            allow_destructive=self.allow_destructive, unattributed=(), commits=commits,
        )  # fmt: skip


async def _look_at_tables(
    store: Store, script: Script
) -> tuple[dict[str, int], dict[str, Commits]]:
    """Returns the latest table_version of each table a migration touches, and its commits.

    A table that does not exist has table_version 0 and no commits.
    """
    versions: dict[str, int] = {}
    commits: dict[str, Commits] = {}
    for name in script.touches:
        table = await store.find(name)
        versions[name] = 0 if table is None else await table.version()
        if table is not None:
            commits[name] = await commit_times(table)
    return versions, commits


@dataclass(frozen=True, slots=True)
class SettlingView:
    """The state of every line, without migrations: for settling what a crash left.

    Attributes:
        reader: Reads the database.
    """

    reader: SnapshotReader

    async def read(
        self, head: Head | None = None, events: Sequence[Event] | None = None
    ) -> Snapshot:
        """Reads head and journal unless they are given. Plans no migrations."""
        snapshot = await self.reader.read(head, events)
        return replace(snapshot, plan=Plan(lines=snapshot.decided.lines))


class RollbackJob(Job):
    """Undoes the migrations of a plan.

    Attributes:
        plan: The plan made under the lease, `None` before.
        results: The report of each migration.
    """

    doing = "rolling back"

    def __init__(self, session: Session, view: RollbackView) -> None:
        """Reads nothing.

        Args:
            session: Takes the lease.
            view: Reads, decides and plans.
        """
        self._session = session
        self._view = view
        self.plan: Plan | None = None
        self.results: Mapping[Key, StepReport] = {}

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Settles the ledger, plans again, and undoes the migrations.

        Raises:
            AiomigrateError: A migration cannot be undone, or the run cannot continue.
        """
        session = self._session
        workspace = session.workspace(writer)
        snapshot = await session.take_over(writer, lease, SettlingView(self._view.reader))
        rows = await settle(session.run, snapshot, lease, workspace)
        await rows.own()
        await writer.sync()
        snapshot = await self._view.read()
        self.plan = snapshot.plan
        scheduler = Scheduler(session, snapshot, workspace, undo_decider=self._view)
        self.results = scheduler.results
        await scheduler.run_plan()
