"""What runs need: the database and its scripts, the options, the clocks, the context of a run.

The manager creates one `Database` and one `Environment`; the entry points of `runs` and
`inspection` take them. Nothing here reads tables or runs migrations.
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from aiomigrate.clock import Clock
from aiomigrate.errors import ConfigurationError, ScriptError
from aiomigrate.ledger.founding import OnUnsafeStore
from aiomigrate.ledger.lease import LeaseOptions
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.migration import loader
from aiomigrate.migration.model import Params, Scripts
from aiomigrate.planning.preflight import OnDestructive
from aiomigrate.planning.reconcile import OnAhead, at_target
from aiomigrate.runs.progress import Progress
from aiomigrate.store.calls import Connection
from aiomigrate.store.connection import Store
from aiomigrate.store.uri import is_local, locate, redact, secrets_of
from aiomigrate.telemetry import Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options of a manager, used by all of its runs.

    Attributes:
        params: Parameters of the migrations.
        concurrency: Maximum number of migrations that run at the same time.
        lease: How the lease is taken and kept.
        timeout_s: Seconds one migration may take, `None` for no limit.
        on_ahead: Whether a database that is newer than the scripts is an error.
        on_destructive: What to do about steps that discard data.
        keep_s: Seconds to keep savepoints of such steps.
        on_progress: Called with the progress of each migration.
        telemetry: Receives spans and step reports.
    """

    params: Params = field(default_factory=dict)
    concurrency: int = 16
    lease: LeaseOptions = field(default_factory=LeaseOptions)
    timeout_s: float | None = None
    on_ahead: OnAhead = OnAhead.ERROR
    on_destructive: OnDestructive = OnDestructive.KEEP
    keep_s: float = 7 * 86400.0
    on_progress: Callable[[Progress], None] | None = None
    telemetry: Telemetry = field(default_factory=Telemetry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The database, options, clocks and logger of one manager.

    Attributes:
        database: The database and its scripts.
        options: The options of its runs.
        clock: Clocks.
        log: Logger.
    """

    database: Database
    options: RunOptions
    clock: Clock
    log: Any

    def new_run(self, **keys: object) -> tuple[str, Any]:
        """Returns the identifier of a new run, and a logger bound to it and to further keys."""
        run_id = secrets.token_hex(4)
        return run_id, self.log.bind(run_id=run_id, **keys)

    def context(
        self, store: Store, ledger: Ledger, scripts: Scripts, *, run_id: str, log: Any
    ) -> Run:
        """Returns the context of one run.

        Args:
            store: The database.
            ledger: Its metadata tables.
            scripts: All migrations.
            run_id: The run's identifier.
            log: Logger, bound to the run.
        """
        return Run(
            store=store,
            ledger=ledger,
            scripts=scripts,
            options=self.options,
            run_id=run_id,
            clock=self.clock,
            log=log,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The context of one run; constant while the run lasts.

    Attributes:
        store: The database.
        ledger: Its metadata tables.
        scripts: All migrations.
        options: The options of the manager.
        run_id: Its identifier in journal and logs.
        clock: Clocks.
        log: Logger, bound to the run.
    """

    store: Store
    ledger: Ledger
    scripts: Scripts
    options: RunOptions
    run_id: str
    clock: Clock
    log: Any


class Database:
    """One LanceDB database with its migration scripts.

    Attributes:
        store: The connection, `None` before it is opened.
        targets: The newest version of each line; empty before the scripts are loaded.
        digests: The chain digest of each line at that version.
    """

    def __init__(
        self,
        database: str | Path | Connection,
        *,
        store_type: type[Store],
        storage_options: Mapping[str, str] | None,
        grace_s: float,
        source: loader.Source,
        params: Params,
        ledger_name: str,
        on_unsafe_store: OnUnsafeStore,
        clock: Clock,
    ) -> None:
        """Checks the database argument; does not connect.

        Args:
            database: A path, a URI, or an open connection.
            store_type: The class of the store.
            storage_options: As for `lancedb.connect_async`. Never logged or shown.
            grace_s: Seconds a cancelled mutation gets to finish.
            source: A folder, a package, or a sequence of migrations.
            params: Parameters of the migrations.
            ledger_name: Name of the head table.
            on_unsafe_store: What to do about an object store that loses commits.
            clock: Clocks.

        Raises:
            ConfigurationError: The database is of another type, or its connection is closed.
            UnsupportedDatabaseError: The URI names a kind of database that is not supported.
        """
        self._connection: Connection | None = None
        if isinstance(database, str | Path):
            self._uri = locate(database)
        elif hasattr(database, "is_open"):  # a synchronous connection does not have it
            if not database.is_open():  # type: ignore[no-untyped-call]
                raise ConfigurationError(
                    "The connection is closed.", "Pass an open connection, or a URI."
                )
            self._connection = database
            uri = str(database.uri)
            self._uri = locate(uri) if uri.startswith("file:") else uri
        else:
            raise ConfigurationError(
                f"{database!r} is not a database.",
                "Pass a path, a URI, or a connection from lancedb.connect_async.",
            )
        self._store_type = store_type
        self._storage_options = storage_options
        self._grace_s = grace_s
        self._source = source
        self._params = params
        self._ledger_name = ledger_name
        self._on_unsafe_store = on_unsafe_store
        self._clock = clock
        self.store: Store | None = None
        self._scripts: Scripts | None = None
        self._folder_exists = False
        self.targets: Mapping[str, int] = {}
        self.digests: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        """The URI without secrets."""
        return redact(self._uri)

    async def scripts(self) -> Scripts:
        """Returns all migrations. Loads them once, in a worker thread.

        Raises:
            ConfigurationError: The folder does not exist.
            ScriptError: A script is invalid.
        """
        if self._scripts is None:
            try:
                scripts, expected = await anyio.to_thread.run_sync(self._load)
            except ScriptError as exc:
                what = self._scrub(exc.what)  # a function of the parameters may quote secrets
                if what == exc.what:
                    raise
                exc.what, exc.args = what, (what, exc.remedy)
                raise exc from None
            self._scripts = scripts
            self.targets = {line: version for line, (version, _) in expected.items()}
            self.digests = {line: digest for line, (_, digest) in expected.items()}
        return self._scripts

    def _load(self) -> tuple[Scripts, Mapping[str, tuple[int, str]]]:
        """Does all file access of a start in one thread.

        Returns:
            The scripts, and by line the newest version and its chain digest.
        """
        self._folder_exists = is_local(self._uri) and Path(self._uri).exists()
        scripts = loader.load(self._source, self._params)
        loader.refuse_tables(scripts, (self._ledger_name, f"{self._ledger_name}_history"))
        return scripts, at_target(scripts)

    def _scrub(self, text: str) -> str:
        for secret in secrets_of(self._uri, self._storage_options):
            text = text.replace(secret, "***")
        return text

    def ledger(self, store: Store, log: Any) -> Ledger:
        """Returns the metadata tables. Reads nothing yet."""
        return Ledger(
            store,
            self._ledger_name,
            clock=self._clock,
            log=log,
            on_unsafe_store=self._on_unsafe_store,
        )

    async def open(self) -> Store | None:
        """Connects, unless the database is a local folder that does not exist.

        LanceDB would create the folder.

        Returns:
            The connection, `None` if the folder does not exist.

        Raises:
            ConfigurationError: The given connection cannot be used.
            StoreError: LanceDB could not connect.
        """
        if (
            self.store is None
            and self._connection is None
            and is_local(self._uri)
            and not self._folder_exists
            and not await anyio.to_thread.run_sync(os.path.exists, self._uri)
        ):
            return None
        return await self.connect()

    async def connect(self) -> Store:
        """Connects once. LanceDB creates a missing local folder.

        Raises:
            ConfigurationError: The given connection cannot be used.
            StoreError: LanceDB could not connect.
        """
        if self.store is not None:
            return self.store
        if self._connection is not None:
            interval = await self._interval_of(self._connection)
            if interval is None:
                self.store = self._store_type(
                    self._connection,
                    uri=self.name,
                    secrets=secrets_of(self._uri, self._storage_options),
                    grace_s=self._grace_s,
                )
                return self.store
            if not is_local(self._uri):
                in_memory = self._uri.startswith("memory:")
                raise ConfigurationError(
                    "The connection was opened with read_consistency_interval, so that "
                    "aiomigrate cannot distinguish its own commits from those of other writers.",
                    "Open it without read_consistency_interval."
                    if in_memory
                    else "Pass the URI and storage_options instead of the connection.",
                )
        self.store = await self._store_type.connect(
            self._uri, self._storage_options, grace_s=self._grace_s
        )
        return self.store

    async def _interval_of(self, connection: Connection) -> dt.timedelta | None:
        try:
            interval: dt.timedelta | None = await connection.get_read_consistency_interval()
        except RuntimeError as exc:
            raise ConfigurationError(
                f"The connection cannot be used: {exc}.", "Pass an open connection, or a URI."
            ) from exc
        return interval

    def close(self) -> None:
        """Closes the connection if it was opened here. Idempotent."""
        if self.store is not None and self.store.connection is not self._connection:
            self.store.close()
        self.store = None
