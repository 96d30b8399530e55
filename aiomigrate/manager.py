"""The public class `MigrationManager`: the contract of each method, and delegation.

Methods that write are implemented in `runs`, methods that only read in `inspection`.
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
from aiomigrate.errors import ConfigurationError, MigrationFailedError, ValidationFailedError
from aiomigrate.inspection import Inspection, OnPending
from aiomigrate.ledger.founding import OnUnsafeStore
from aiomigrate.ledger.lease import LeaseOptions
from aiomigrate.ledger.records import Event, Holder
from aiomigrate.migration import loader
from aiomigrate.migration.model import Scripts, Target
from aiomigrate.option_checks import check_flag, check_number, check_policy
from aiomigrate.planning.destructive import Kept
from aiomigrate.planning.plan import Plan
from aiomigrate.planning.preflight import OnDestructive
from aiomigrate.planning.reconcile import OnAhead
from aiomigrate.reporting.status import Health, Status, Validation
from aiomigrate.reporting.timing import RunTiming
from aiomigrate.results import Repair, Report
from aiomigrate.runs import downgrade, maintenance, repair, upgrade
from aiomigrate.runs.environment import Database, Environment, RunOptions
from aiomigrate.runs.progress import Progress, ProgressStreams
from aiomigrate.runs.settlement import behind_targets
from aiomigrate.store.calls import Connection
from aiomigrate.store.connection import Store
from aiomigrate.telemetry import RUN, Telemetry

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectReceiveStream


class MigrationManager:
    """Migrates and inspects one LanceDB database.

    Use it as an async context manager, or call `aclose` at the end. Several managers, in one
    process or many, may work on one database: each migration is applied once.
    """

    _store_type: type[Store] = Store  # tests subclass it to inject faults

    def __init__(  # long, since it declares and documents every option
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
        on_ahead: OnAhead | str = OnAhead.ERROR,
        on_destructive: OnDestructive | str = OnDestructive.KEEP,
        keep_savepoints: float = 7 * 86400.0,
        on_unsafe_store: OnUnsafeStore | str = OnUnsafeStore.ERROR,
        on_progress: Callable[[Progress], None] | None = None,
        telemetry: Telemetry | None = None,
        logger: Any = None,
        clock: Clock | None = None,
    ) -> None:
        """Checks the options. Does not connect and reads nothing.

        A policy is a member of its enum, or the value of one as text, such as "warn".

        Args:
            database: A local path, an object-store URI, or an open `AsyncConnection`. A connection
                is never closed here; table handles opened from it earlier do not see the changes
                until they are refreshed.
            migrations: A folder, a package, or a sequence of `Migration`s.
            params: Parameters for operations that are functions of them and for `Context.params`.
            ledger: Name of the head table. The journal is named `<ledger>_history`.
            concurrency: Maximum number of migrations that run at the same time.
            lease_ttl: Seconds without a renewal after which another process may take the lease.
            lease_wait: Seconds to wait for another process that is migrating.
            timeout: Seconds one migration may run; `None` for no limit. Rollbacks have none.
            storage_options: As for `lancedb.connect_async`. Never logged or shown.
            on_ahead: Whether a database that is newer than the scripts is an error.
            on_destructive: What to do about steps that discard data: keep a savepoint, so that
                they can be undone; allow them; or refuse them.
            keep_savepoints: Seconds to keep those; later upgrades with pending work delete them.
            on_unsafe_store: What to do about an object store that ignores conditional writes and
                therefore loses commits. The store is tested when the ledger is created.
            on_progress: Called in the event loop with each `Progress`. The first exception it
                raises in a run is logged; all are ignored.
            telemetry: Receives spans and step reports, e.g. `aiomigrate.otel.OpenTelemetry()`.
            logger: A structlog logger; by default `structlog.get_logger("aiomigrate")`.
            clock: Clocks, for tests.

        Raises:
            ConfigurationError: An option is invalid.
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
                f"ledger={ledger!r} is not a valid table name.",
                "Use only letters, digits, and the characters _ - .",
            )
        clock = clock or Clock()
        self._streams = ProgressStreams(on_progress)
        self._options = RunOptions(
            params=dict(params or {}),
            concurrency=concurrency,
            lease=LeaseOptions(ttl_s=lease_ttl, beat_s=lease_ttl / 6, wait_s=lease_wait),
            timeout_s=timeout,
            on_ahead=check_policy(OnAhead, on_ahead, "on_ahead"),
            on_destructive=check_policy(OnDestructive, on_destructive, "on_destructive"),
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
            on_unsafe_store=check_policy(OnUnsafeStore, on_unsafe_store, "on_unsafe_store"),
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
        """The URI of the database, without secrets."""
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
        """Ends progress streams and closes the connection if this manager opened it. Idempotent."""
        self._database.close()
        self._streams.close()

    @contextlib.contextmanager
    def progress(self) -> Iterator[MemoryObjectReceiveStream[Progress]]:
        """Opens a stream of the progress of this manager's runs.

        Use `with manager.progress() as stream`, then `async for`. A stream buffers 1000 values and
        drops newer ones while full; runs never wait for it. Closing the manager ends it.

        Yields:
            A stream of `Progress`.
        """
        with self._streams.open() as stream:
            yield stream

    async def scripts(self) -> Scripts:
        """Returns all migrations. Loads them once per manager, in a worker thread.

        Raises:
            ConfigurationError: The folder does not exist.
            ScriptError: A script is invalid.
        """
        return await self._database.scripts()

    async def initialize(self, *, on_pending: OnPending | str = OnPending.MIGRATE) -> Report:
        """Migrates the database to its target at application startup.

        If the database is at its target, connects and reads one small table. Otherwise takes the
        lease, or waits for the process that holds it, and returns when the database is at its
        target, whichever process ran the migrations. Leaves background migrations to
        `run_background`. Every change is compared with the prediction of its operations. The next
        call recovers from a crash or a cancellation.

        Args:
            on_pending: Whether to run pending migrations, to wait until another process has run
                them (up to `lease_wait`, with one small read every few seconds), or to fail at
                once. The last two write nothing.

        Returns:
            What this process did; without steps if there was nothing to do.

        Raises:
            ConfigurationError: `on_pending` is none of its choices.
            NotAtTargetError: Migrations are pending and `on_pending` is not `MIGRATE`; with
                `WAIT`, they are still pending after `lease_wait`.
            MigrationFailedError: A migration failed in this process or in the one waited for.
            ValidationFailedError: A line did not reach its target.
            PlanError: The scripts do not match the database; nothing was written.
            ScriptError: A script is invalid; nothing was written.
            LedgerError: The metadata tables are unreadable or inconsistent.
            LeaseError: The lease could not be acquired, or was lost.
            StoreError: A LanceDB call failed.
        """
        on_pending = check_policy(OnPending, on_pending, "on_pending")
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
        """Runs pending migrations. Lines run concurrently, each strictly in order.

        Takes the lease only if there is something to do. The next run recovers from a crash or a
        cancellation.

        Args:
            tables: Lines to upgrade; all by default.
            to: `None` for the newest scripts, a maximum version, or a version by line.
            background: Whether to call `run_background` afterwards. If not, `Report.deferred`
                lists what it would run.

        Returns:
            What this process did; without steps if there was nothing to do.

        Raises:
            MigrationFailedError: A migration failed; its report says what was done.
            PlanError: The scripts do not match the database; nothing was written.
            ScriptError: A script is invalid; nothing was written.
            LedgerError: The metadata tables are unreadable or inconsistent.
            LeaseError: The lease could not be acquired, or was lost.
            StoreError: A LanceDB call failed.
        """
        check_flag(background, "background")
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

    def _run_span(self, operation: str) -> contextlib.AbstractContextManager[object]:
        attributes = {"db.namespace": self.database, "db.operation.name": operation}
        return self._options.telemetry.span(RUN, attributes)

    async def run_background(
        self, *, tables: Collection[str] | None = None, to: Target = None
    ) -> Report:
        """Runs the migrations that application startup does not wait for.

        These are the migrations marked `background` and those that come after them. They run under
        a lease of their own, so that migrations of other tables are not blocked. If another process
        holds that lease, waits for it without a time limit, with one small read every few seconds,
        and takes over if it crashes. Cancelling is as safe as a crash: calls in flight get
        `drain_s` seconds to finish, the lease is given back, and the next run continues.

        Args:
            tables: Lines; all by default.
            to: As for `upgrade`.

        Returns:
            What this process did; without steps if there was nothing to do.

        Raises:
            MigrationFailedError: A migration failed; its report says what was done.
            DependencyError: A dependency is pending and is not a background migration.
            PlanError: The scripts do not match the database; nothing was written.
            ScriptError: A script is invalid; nothing was written.
            LedgerError: The metadata tables are unreadable or inconsistent.
            LeaseError: The lease could not be acquired, or was lost.
            StoreError: A LanceDB call failed.
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
        """Undoes applied migrations, latest first. Takes the lease if there is something to do.

        A migration is undone by its own inverse, by the inverses of its operations, or by
        restoring its tables to the versions before it. Restoring takes milliseconds regardless of
        table size; without `allow_destructive` every commit since must be known to be aiomigrate's.
        The head is lowered before data is changed. After a crash the next run continues the
        rollback. A later upgrade applies the migrations again.

        Args:
            line: The line (table), or the version to go back to by line.
            to: The version to go back to, 0 for none; by default the previous one.
            allow_destructive: Whether to discard later commits of other writers if a migration
                cannot be undone otherwise. They stay in the table's history.

        Returns:
            What was undone; without steps if there was nothing to undo.

        Raises:
            RollbackRefusedError: A migration cannot be undone; nothing was changed.
            DependencyError: A migration that stays depends on it; nothing was changed.
            TargetError: A line or version is unknown, or above the current version.
            MigrationFailedError: Undoing a migration failed; its report says what was undone.
            ScriptError: A script is invalid; nothing was changed.
            LedgerError: The metadata tables are unreadable or inconsistent.
            LeaseError: The lease could not be acquired, or was lost.
            StoreError: A LanceDB call failed.
        """
        check_flag(allow_destructive, "allow_destructive")
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
        """Returns what `rollback` would do. Writes nothing and takes no lease.

        Args:
            line: As for `rollback`.
            to: As for `rollback`.
            allow_destructive: As for `rollback`.

        Raises:
            RollbackRefusedError: A migration cannot be undone.
            DependencyError: A migration that stays depends on it.
            TargetError: A line or version is unknown, or above the current version.
            ScriptError: A script is invalid.
            LedgerError: The metadata tables are unreadable or inconsistent.
            StoreError: A LanceDB call failed.
        """
        check_flag(allow_destructive, "allow_destructive")
        return await downgrade.plan_rollback(
            self._environment, line, to=to, allow_destructive=allow_destructive
        )

    async def prune(self, *, older_than: float = 0.0) -> tuple[Kept, ...]:
        """Deletes savepoints of destructive migrations. Takes the lease if there are any.

        Args:
            older_than: Minimum number of seconds since the migration was applied.

        Returns:
            The deleted savepoints; empty if there were none. Once LanceDB has cleaned up those
            versions, the migrations cannot be undone by restoring them.

        Raises:
            LedgerError: The metadata tables are unreadable or inconsistent.
            LeaseError: The lease could not be acquired, or was lost.
            StoreError: A LanceDB call failed.
        """
        return await maintenance.prune(self._environment, older_than_s=older_than)

    async def stamp(
        self, *, tables: Collection[str] | None = None, to: Target = None
    ) -> Mapping[str, int]:
        """Records versions of lines without running migrations. Takes the lease.

        Accepts the scripts up to those versions and the tables as they are now, and ends
        interrupted migrations of the lines.

        Args:
            tables: Lines to stamp; all by default.
            to: `None` for the newest scripts, a maximum version, or a version by line (0 for none).

        Returns:
            The recorded version by line; empty if there are no scripts.

        Raises:
            TargetError: A line has no scripts, or a version is above its newest script.
            ScriptError: A script is invalid.
            LedgerError: The metadata tables are unreadable or inconsistent.
            LeaseError: The lease could not be acquired, or was lost.
            StoreError: A LanceDB call failed.
        """
        return await maintenance.stamp(self._environment, tables=tables, to=to)

    async def unlock(self, *, background: bool = False) -> Holder | None:
        """Removes the holder of a lease after watching it for its TTL without a renewal.

        Args:
            background: Whether to free the background lease instead of the run lease.

        Returns:
            The removed holder; `None` if the lease was free.

        Raises:
            LeaseHeldError: The holder renewed the lease: it is alive.
            LedgerError: The head is unreadable.
            StoreError: A LanceDB call failed.
        """
        check_flag(background, "background")
        return await maintenance.unlock(self._environment, background=background)

    async def repair(self) -> Repair | None:
        """Opens a journal again whose newest versions cannot be read. Takes the lease if so.

        Events that are lost are recorded again where the head and the tables show them. A crash
        leaves the journal as it was, or opened again. An upgrade repairs by itself if nothing is
        left to check.

        Returns:
            What was done and what a person has to check; `None` if the journal can be read.

        Raises:
            ScriptError: A script is invalid.
            LedgerUnreadableError: The head, or every version of the journal, cannot be read.
            LeaseError: The lease could not be acquired, or was lost.
            StoreError: A LanceDB call failed.
        """
        return await repair.repair(self._environment)

    async def plan(self, *, tables: Collection[str] | None = None, to: Target = None) -> Plan:
        """Returns what `upgrade` would do. Writes nothing and takes no lease.

        Args:
            tables: Lines to upgrade; all by default.
            to: As for `upgrade`.

        Raises:
            PlanError: The scripts do not match the database.
            ScriptError: A script is invalid.
            LedgerError: The metadata tables are unreadable or inconsistent.
            StoreError: A LanceDB call failed.
        """
        return await self._inspection.plan(tables=tables, to=to)

    async def get_status(self) -> Status:
        """Returns the version of every line and the lease holders. One small read, no writes.

        Raises:
            ScriptError: A script is invalid.
            LedgerError: The head is unreadable or inconsistent.
            StoreError: A LanceDB call failed.
        """
        return await self._inspection.status()

    async def health(self) -> Health:
        """Returns whether the application may use the database, and why not. Writes nothing.

        Reads little. For a probe that runs every second use `aiomigrate.asgi`, which caches.

        Raises:
            ScriptError: A script is invalid.
            LedgerError: The metadata tables are unreadable or inconsistent.
            StoreError: A LanceDB call failed.
        """
        return await self._inspection.health()

    async def validate(self) -> Validation:
        """Compares scripts, ledger and live tables. Writes nothing and takes no lease.

        Reports lines that are not at their target; edited, missing or inserted scripts;
        contradictions in the metadata; interrupted migrations; and tables whose columns, types,
        nullability or indexes differ from what their last migration left.

        Raises:
            ScriptError: A script is invalid.
            StoreError: A LanceDB call failed.
        """
        return await self._inspection.validate()

    async def timings(self) -> tuple[RunTiming, ...]:
        """Returns the timings of every run in the journal, oldest first. Writes nothing.

        Skips runs in which no migration ended; empty if there is no journal.

        Raises:
            ScriptError: A script is invalid.
            LedgerError: The journal is unreadable or inconsistent.
            StoreError: A LanceDB call failed.
        """
        return await self._inspection.timings()

    async def history(self, line: str | None = None) -> tuple[Event, ...]:
        """Returns the valid journal events in order, of one line or of all. Writes nothing.

        Empty if there is no journal.

        Raises:
            LedgerError: The journal is unreadable or inconsistent.
            StoreError: A LanceDB call failed.
        """
        return await self._inspection.history(line)
