"""The public class `MigrationManager`: what it promises, and which module keeps each promise.

Everything here is a contract and a delegation. Changing is for `runs`, looking for `inspection`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import structlog

from aiomigrate.clock import Clock
from aiomigrate.errors import (
    ConfigurationError,
    MigrationFailedError,
    ValidationFailedError,
)
from aiomigrate.inspection import Inspection, OnPending
from aiomigrate.ledger.founding import OnUnsafeStore
from aiomigrate.ledger.lease import LeaseOptions, unlock
from aiomigrate.ledger.records import BACKGROUND_LEASE, RUN_LEASE, Event, Holder
from aiomigrate.migration import loader
from aiomigrate.migration.model import Scripts, Target
from aiomigrate.option_checks import check_number
from aiomigrate.planning.destructive import Kept
from aiomigrate.planning.plan import Plan
from aiomigrate.planning.preflight import OnDestructive
from aiomigrate.planning.reconcile import OnAhead
from aiomigrate.reporting.status import Health, Status, Validation
from aiomigrate.reporting.timing import RunTiming
from aiomigrate.results import Report
from aiomigrate.runs import downgrade, maintenance, upgrade
from aiomigrate.runs.environment import Database, Environment, RunOptions
from aiomigrate.runs.progress import Progress, ProgressStreams
from aiomigrate.runs.settlement import behind_targets
from aiomigrate.store.calls import Connection
from aiomigrate.store.connection import Store
from aiomigrate.telemetry import RUN, Telemetry

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectReceiveStream


class MigrationManager:
    """Brings one LanceDB database to the state its migrations describe.

    An async context manager; each method may also be awaited on its own. Several managers may
    work on one database, in one process or many: each migration is applied once.
    """

    _store_type: type[Store] = Store  # tests subclass it to inject faults

    def __init__(
        self,
        database: str | Path | Connection,
        *,
        migrations: loader.Source = "migrations",
        params: Mapping[str, Any] | None = None,
        ledger: str = "table_migrations",
        concurrency: int = 16,
        lease_ttl: float = 30.0,
        lease_wait: float = 600.0,
        timeout: float | None = None,
        storage_options: Mapping[str, str] | None = None,
        on_ahead: OnAhead = OnAhead.ERROR,
        on_destructive: OnDestructive = OnDestructive.KEEP,
        keep_savepoints: float = 7 * 86400.0,
        on_unsafe_store: OnUnsafeStore = OnUnsafeStore.ERROR,
        on_progress: Callable[[Progress], None] | None = None,
        telemetry: Telemetry | None = None,
        logger: Any = None,
        clock: Clock | None = None,
    ) -> None:
        """Checks the options; reads nothing.

        Args:
            database: A local path, an object-store URI, or an open `AsyncConnection` (which is
                never closed here; handles opened from it before do not see the changes until they
                are refreshed).
            migrations: A folder, a package, or a sequence of `Migration`s.
            params: Given to operations that are functions of them, and to `Context.params`.
            ledger: Name of the head table; the journal is named after it.
            concurrency: How many migrations may run at once.
            lease_ttl: Seconds after which a silent process may be succeeded.
            lease_wait: Seconds to wait for another process that is migrating.
            timeout: Seconds one migration may take; by default no limit.
            storage_options: As for `lancedb.connect_async`; never shown anywhere.
            on_ahead: Whether a database newer than the code is an error.
            on_destructive: What to do about steps that discard what is there: keep a savepoint of
                it, so that they can be undone; allow them; or refuse them.
            keep_savepoints: Seconds for which such savepoints are kept; the first run after that
                deletes them.
            on_unsafe_store: What to do about an object store that loses commits (it ignores
                conditional writes), which is tried when the ledger is founded.
            on_progress: Called in the event loop with each `Progress`.
            telemetry: Told of everything that takes time, as `aiomigrate.otel.OpenTelemetry()`.
            logger: A structlog logger; by default `structlog.get_logger("aiomigrate")`.
            clock: Clocks, for tests.

        Raises:
            ConfigurationError: An option cannot be.
            UnsupportedDatabaseError: The URI names a kind of database that is not supported.
        """
        numbers = {
            "lease_ttl": lease_ttl,
            "concurrency": concurrency,
            "lease_wait": lease_wait,
            "keep_savepoints": keep_savepoints,
            **({} if timeout is None else {"timeout": timeout}),
        }
        for option, value in numbers.items():
            check_number(option, value, option)
        if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*", ledger):
            raise ConfigurationError(
                f"ledger={ledger!r} is no table name.", "Use letters, digits, and _ - . only."
            )
        clock = clock or Clock()
        self._streams = ProgressStreams(on_progress)
        self._options = RunOptions(
            params=dict(params or {}),
            concurrency=concurrency,
            lease=LeaseOptions(ttl_s=lease_ttl, beat_s=lease_ttl / 6, wait_s=lease_wait),
            timeout_s=timeout,
            on_ahead=on_ahead,
            on_destructive=on_destructive,
            keep_s=keep_savepoints,
            on_progress=self._streams.publish,
            telemetry=telemetry or Telemetry(),
        )
        self._database = Database(
            database,
            store_type=self._store_type,
            storage_options=storage_options,
            grace_s=min(10.0, lease_ttl / 2),
            source=migrations,
            params=self._options.params,
            ledger_name=ledger,
            on_unsafe_store=on_unsafe_store,
            clock=clock,
        )
        self._environment = Environment(
            database=self._database,
            options=self._options,
            clock=clock,
            log=logger or structlog.get_logger("aiomigrate"),
        )
        self._inspection = Inspection(self._environment)

    def __repr__(self) -> str:
        return f"<MigrationManager of {self.database}>"

    @property
    def database(self) -> str:
        """The database's URI without secrets."""
        return self._database.name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connection, if this manager opened it. May be called twice."""
        self._database.close()
        self._streams.close()

    @contextlib.contextmanager
    def progress(self) -> Iterator[MemoryObjectReceiveStream[Progress]]:
        """Listens to this manager's runs: `with manager.progress() as stream`, then `async for`.

        Of a listener that does not keep up the newest values are dropped beyond a thousand; nobody
        waits for it. The stream ends when the manager is closed.

        Yields:
            A stream of `Progress`.
        """
        with self._streams.open() as stream:
            yield stream

    async def scripts(self) -> Scripts:
        """Returns all migrations, loaded once per manager, off the event loop.

        Raises:
            ConfigurationError: The folder does not exist.
            ScriptError: A script is wrong.
        """
        return await self._database.scripts()

    async def initialize(self, *, on_pending: OnPending = OnPending.MIGRATE) -> Report:
        """Brings the database to its target, for application startup.

        At target it costs connecting, opening and reading one small table. Otherwise it takes the
        lease, or waits for the process that has it, and returns when the database is at target,
        whoever did the work. Every change was compared with what its operations predicted. A
        crash or a cancellation leaves what the next call recovers from.

        Args:
            on_pending: Whether to migrate, to leave that to others and wait for it (up to
                `lease_wait`, with one small read every few seconds), or to fail at once. Where it
                does not migrate, nothing is ever written.

        Returns:
            What this process did; without steps when there was nothing to do.

        Raises:
            NotAtTargetError: Something is pending (still, where it was waited for), and this
                process was not to migrate.
            MigrationFailedError: A migration failed, here or in the process waited for.
            ValidationFailedError: A line did not arrive at its target.
            PlanError: Scripts and database do not fit together; nothing was written.
            ScriptError: A script is wrong; nothing was written.
            LedgerError: The metadata tables cannot be trusted.
            LeaseError: The lease could not be had or kept.
            StoreError: LanceDB failed.
        """
        if on_pending is not OnPending.MIGRATE:
            return await self._inspection.await_target(waits=on_pending is OnPending.WAIT)
        report = await self.upgrade(background=False)
        behind = behind_targets(report, self._database.targets, await self.scripts())
        if behind:
            raise ValidationFailedError(behind, "Run `aiomigrate plan` to see why.")
        return report

    async def upgrade(
        self,
        *,
        tables: Collection[str] | None = None,
        to: Target = None,
        background: bool = True,
    ) -> Report:
        """Runs what is pending; lines run concurrently, each strictly in order.

        Takes the lease only if there is something to do.

        Args:
            tables: Lines to upgrade; all by default.
            to: To the newest scripts (`None`), to at most a version, or line by line.
            background: Whether to do, after the rest, what is marked to run in the background and
                what comes after that, as `run_background` does. Else `Report.deferred` names it.

        Returns:
            What this process did; without steps when there was nothing to do.

        Raises:
            MigrationFailedError: A migration failed; its report says what was done.
            PlanError: Scripts and database do not fit together; nothing was written.
            ScriptError: A script is wrong; nothing was written.
            LedgerError: The metadata tables cannot be trusted.
            LeaseError: The lease could not be had or kept.
            StoreError: LanceDB failed.
        """
        with self._run_span("upgrade"):
            fast = await upgrade.upgrade(self._environment, tables=tables, to=to)
        if not (background and fast.deferred):
            return fast
        try:
            later = await self.run_background(tables=tables, to=to)
        except MigrationFailedError as exc:
            exc.report = fast.followed_by(exc.report)
            raise
        return fast.followed_by(later)

    def _run_span(self, doing: str) -> contextlib.AbstractContextManager[object]:
        facts = {"db.namespace": self.database, "db.operation.name": doing}
        return self._options.telemetry.span(RUN, facts)

    async def run_background(
        self, *, tables: Collection[str] | None = None, to: Target = None
    ) -> Report:
        """Does what an application's start does not wait for; meant for a task of the caller's.

        Migrations marked `background`, and what comes after them, run under a lease of their own,
        so that later migrations of other tables are not held up. Where another process does them
        it is waited for, as long as it takes, with one small read every few seconds: it may die,
        and then this one goes on. Cancelling it is as safe as killing it, gives calls in flight
        `drain_s` to end, and gives the lease back; the next one goes on.

        Args:
            tables: Lines; all by default.
            to: As for `upgrade`.

        Returns:
            What this process did; without steps when there was nothing to do.

        Raises:
            MigrationFailedError: A migration failed; its report says what was done.
            DependencyError: What comes first is pending and not in the background.
            PlanError: Scripts and database do not fit together; nothing was written.
            LedgerError: The metadata tables cannot be trusted.
            LeaseError: The lease could not be had or kept.
            StoreError: LanceDB failed.
        """
        with self._run_span("background"):
            return await upgrade.run_background(self._environment, tables=tables, to=to)

    async def rollback(
        self,
        line: str | Mapping[str, int],
        *,
        to: int | None = None,
        allow_destructive: bool = False,
    ) -> Report:
        """Undoes applied migrations, what was applied later first. Takes the lease.

        Each by its own inverse, by those of its operations, or by returning its tables to where it
        found them: that takes milliseconds whatever their size, and is done only while every
        commit since is known to be ours. The head is lowered before data is touched. A crash
        leaves an undoing that the next run goes on with. A later upgrade applies them again.

        Args:
            line: The line (table), or the version to go back to by line.
            to: The version to go back to, 0 for none; by default the one before.
            allow_destructive: Whether commits that others made since may be given up, where
                nothing else undoes a migration. They stay in the table's history.

        Returns:
            What was undone; without steps when there was nothing to undo.

        Raises:
            RollbackRefusedError: A migration cannot be undone; nothing was changed.
            DependencyError: Another migration that stays needs it; nothing was changed.
            TargetError: A line or version is unknown, or above where the line is.
            MigrationFailedError: Undoing one failed; its report says what was undone.
            LedgerError: The metadata tables cannot be trusted.
            LeaseError: The lease could not be had or kept.
            StoreError: LanceDB failed.
        """
        with self._run_span("rollback"):
            return await downgrade.rollback(
                self._environment, line, to=to, allow_destructive=allow_destructive
            )

    async def plan_rollback(
        self,
        line: str | Mapping[str, int],
        *,
        to: int | None = None,
        allow_destructive: bool = False,
    ) -> Plan:
        """Returns what `rollback` would do. Writes nothing, takes no lease.

        Args:
            line: As for `rollback`.
            to: As for `rollback`.
            allow_destructive: As for `rollback`.

        Raises:
            RollbackRefusedError: A migration cannot be undone.
            DependencyError: Another migration that stays needs it.
            TargetError: A line or version is unknown, or above where the line is.
            LedgerError: The metadata tables cannot be trusted.
            StoreError: LanceDB failed.
        """
        return await downgrade.plan_rollback(
            self._environment, line, to=to, allow_destructive=allow_destructive
        )

    async def prune(self, *, older_than: float = 0.0) -> tuple[Kept, ...]:
        """Deletes savepoints that were kept of destructive migrations. Takes the lease.

        Args:
            older_than: Only those of migrations applied that many seconds ago, or more.

        Returns:
            What was deleted; then those migrations cannot be undone by returning to them once
            LanceDB has cleaned the versions up.

        Raises:
            LedgerError: The metadata tables cannot be trusted.
            LeaseError: The lease could not be had or kept.
            StoreError: LanceDB failed.
        """
        return await maintenance.prune(self._environment, older_than_s=older_than)

    async def stamp(
        self, *, tables: Collection[str] | None = None, to: Target = None
    ) -> Mapping[str, int]:
        """Records lines at versions without running anything: the baseline of a database.

        Accepts the scripts up to there as they are now, and the tables as they are now; ends what
        was interrupted. Takes the lease.

        Args:
            tables: Lines to stamp; all by default.
            to: The newest scripts (`None`), at most a version, or line by line (0 forgets).

        Returns:
            The version recorded, by line; empty when there are no scripts.

        Raises:
            TargetError: A line has no scripts, or the version is above them.
            LedgerError: The metadata tables cannot be read or written.
            LeaseError: The lease could not be had or kept.
        """
        return await maintenance.stamp(self._environment, tables=tables, to=to)

    async def unlock(self, *, background: bool = False) -> Holder | None:
        """Frees a lease whose holder is dead, after watching it for its TTL.

        Args:
            background: The lease of work in the background, instead of that of runs.

        Returns:
            The holder that was removed, `None` if the lease was free.

        Raises:
            LeaseHeldError: The holder is alive.
            LedgerError: The head cannot be read.
        """
        database, environment = self._database, self._environment
        store = await database.open()
        if store is None:
            return None
        ledger = database.ledger(store, environment.log)
        key = BACKGROUND_LEASE if background else RUN_LEASE
        return await unlock(ledger, options=self._options.lease, clock=environment.clock, key=key)

    async def plan(self, *, tables: Collection[str] | None = None, to: Target = None) -> Plan:
        """Returns what `upgrade` would do: a dry run. Writes nothing, takes no lease.

        Args:
            tables: Lines to upgrade; all by default.
            to: To the newest scripts (`None`), to at most a version, or line by line.

        Raises:
            PlanError: Scripts and database do not fit together.
            ScriptError: A script is wrong.
            LedgerError: The metadata tables cannot be trusted.
            StoreError: LanceDB failed.
        """
        return await self._inspection.plan(tables=tables, to=to)

    async def get_status(self) -> Status:
        """Returns where every line is, and who holds the lease. One small read; writes nothing.

        Raises:
            ScriptError: A script is wrong.
            LedgerError: The head cannot be trusted.
        """
        return await self._inspection.status()

    async def health(self) -> Health:
        """Returns whether the database may be used, and if not, why. Reads little; writes nothing.

        For a probe that is asked every second use `aiomigrate.asgi`, which remembers.

        Raises:
            ScriptError: A script is wrong.
            LedgerError: The ledger cannot be trusted.
            StoreError: LanceDB failed.
        """
        return await self._inspection.health()

    async def validate(self) -> Validation:
        """Compares scripts, ledger and live tables. Writes nothing, takes no lease.

        Finds lines that are not at target, edited, missing or inserted scripts, contradictions of
        the metadata, interrupted migrations, and tables whose columns, types, nullability or
        indexes are not what their last migration left.

        Raises:
            ScriptError: A script is wrong.
            StoreError: LanceDB failed.
        """
        return await self._inspection.validate()

    async def timings(self) -> tuple[RunTiming, ...]:
        """Returns where the time of every run in the journal went, oldest first. Writes nothing.

        Runs in which no migration ended are left out; none where there is no journal.

        Raises:
            ScriptError: A script is wrong.
            LedgerError: The journal cannot be read or trusted.
            StoreError: LanceDB failed.
        """
        return await self._inspection.timings()

    async def history(self, line: str | None = None) -> tuple[Event, ...]:
        """Returns the journal's valid events in order, of one line or all. Writes nothing.

        Empty when there is no journal yet.

        Raises:
            LedgerError: The journal cannot be trusted.
        """
        return await self._inspection.history(line)
