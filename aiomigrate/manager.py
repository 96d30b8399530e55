"""The face of the library: `MigrationManager`.

Decides, from as few reads as possible, whether there is anything to do; hands what there is to a
`runner`. Looking (plan, status, validation, history) never writes, takes no lease, and makes no
database where there is none.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import enum
import functools
import math
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.to_thread
import pyarrow as pa
import structlog

from aiomigrate import discovery
from aiomigrate import events as ev
from aiomigrate.calling import survey
from aiomigrate.clock import Clock
from aiomigrate.deferral import busy_with, deferred_by_head, known_tables, ready
from aiomigrate.diff import differences
from aiomigrate.errors import (
    AiomigrateError,
    ConfigurationError,
    LedgerConflictError,
    LedgerError,
    MigrationFailedError,
    NotAtTargetError,
    ScriptError,
    TargetError,
    ValidationFailedError,
)
from aiomigrate.fold import Journal, fold
from aiomigrate.lance import (
    Opened,
    Sketch,
    Store,
    index_config,
    is_local,
    locate,
    redact,
    secrets_of,
)
from aiomigrate.lease import HOST, LeaseOptions, holder_of, unlock
from aiomigrate.ledger import (
    Head,
    Ledger,
    OnUnsafeStore,
    parse_head,
    versions_if_current,
)
from aiomigrate.model import (
    BACKGROUND_LEASE,
    RUN_LEASE,
    Event,
    HeadRow,
    Script,
    Scripts,
    Target,
)
from aiomigrate.operations.base import TableState, quote
from aiomigrate.operations.indexes import CreateIndex
from aiomigrate.plan import (
    OnDestructive,
    Part,
    Plan,
    build_plan,
    build_rollback,
    check_operations,
    in_script,
)
from aiomigrate.reconcile import (
    LineState,
    OnAhead,
    Reconciled,
    at_target,
    digest_at,
    disputed,
    nearest,
    pending,
    reconcile,
)
from aiomigrate.report import (
    Background,
    BackgroundState,
    Health,
    HealthState,
    Holder,
    LineStatus,
    Outcome,
    Report,
    Status,
    StepReport,
    Validation,
    error_line,
)
from aiomigrate.runner import FailedElsewhereError, Progress, Runner, RunOptions, Seen
from aiomigrate.telemetry import RUN, Telemetry
from aiomigrate.timing import RunTiming, concurrency_of, critical_path, runs_of, spans_of
from aiomigrate.undo import Kept, Undo, decide, kept_savepoints, to_undo, unsettled

if TYPE_CHECKING:
    import lancedb
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream


class OnPending(enum.StrEnum):
    """What a start does where migrations are pending.

    Attributes:
        MIGRATE: Runs them, or waits for the process that does.
        WAIT: Leaves them to others, and waits.
        FAIL: Fails at once.
    """

    MIGRATE = "migrate"
    WAIT = "wait"
    FAIL = "fail"


class MigrationManager:
    """Brings one LanceDB database to the state its migrations describe.

    An async context manager; each method may also be awaited on its own. Several managers may
    work on one database, in one process or many: each migration is applied once.
    """

    _store_type: type[Store] = Store  # tests subclass it to inject faults

    def __init__(
        self,
        database: str | Path | lancedb.AsyncConnection,
        *,
        migrations: discovery.Source = "migrations",
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
        self._connection: lancedb.AsyncConnection | None = None
        if isinstance(database, str | Path):
            self._uri = locate(database)
        elif hasattr(database, "is_open"):  # which a synchronous connection has not
            if not database.is_open():  # type: ignore[no-untyped-call]
                raise ConfigurationError("The connection is closed.", "Pass an open one, or a URI.")
            self._connection = database
            self._uri = str(database.uri)
        else:
            raise ConfigurationError(
                f"{database!r} is no database.",
                "Pass a path, a URI, or a connection from lancedb.connect_async.",
            )
        _check_numbers(
            lease_ttl=lease_ttl, concurrency=concurrency, lease_wait=lease_wait, timeout=timeout,
            keep_savepoints=keep_savepoints,
        )  # fmt: skip
        if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*", ledger):
            raise ConfigurationError(
                f"ledger={ledger!r} is no table name.", "Use letters, digits, and _ - . only."
            )
        self._source = migrations
        self._params = dict(params or {})
        self._ledger_name = ledger
        self._storage_options = storage_options
        self._on_ahead = on_ahead
        self._on_unsafe_store = on_unsafe_store
        self._options = RunOptions(
            params=self._params,
            concurrency=concurrency,
            lease=LeaseOptions(ttl_s=lease_ttl, beat_s=lease_ttl / 6, wait_s=lease_wait),
            timeout_s=timeout,
            on_destructive=on_destructive,
            keep_s=keep_savepoints,
            on_progress=self._tell,
            telemetry=telemetry or Telemetry(),
        )
        self._on_progress = on_progress
        self._listeners: set[MemoryObjectSendStream[Progress]] = set()
        self._clock = clock or Clock()
        self._log = logger or structlog.get_logger("aiomigrate")
        self._store: Store | None = None
        self._scripts: Scripts | None = None
        self._targets: Mapping[str, int] = {}
        self._digests: Mapping[str, str] = {}
        self._is_there = False

    def __repr__(self) -> str:
        return f"<MigrationManager of {self.database}>"

    @property
    def database(self) -> str:
        """The database's URI without secrets."""
        return redact(self._uri)

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
        if self._store is not None and self._store.connection is not self._connection:
            self._store.close()
        self._store = None
        for listener in self._listeners:
            listener.close()

    @contextlib.contextmanager
    def progress(self) -> Iterator[MemoryObjectReceiveStream[Progress]]:
        """Listens to this manager's runs: `with manager.progress() as stream`, then `async for`.

        Of a listener that does not keep up the newest values are dropped beyond a thousand; nobody
        waits for it. The stream ends when the manager is closed.

        Yields:
            A stream of `Progress`.
        """
        send, receive = anyio.create_memory_object_stream[Progress](_PROGRESS_KEPT)
        self._listeners.add(send)
        try:
            with receive:
                yield receive
        finally:
            self._listeners.discard(send)
            send.close()

    def _tell(self, progress: Progress) -> None:
        for listener in self._listeners:
            with contextlib.suppress(anyio.WouldBlock, anyio.BrokenResourceError):
                listener.send_nowait(progress)
        if self._on_progress is not None:
            self._on_progress(progress)

    def _scrub(self, text: str) -> str:
        for secret in secrets_of(self._uri, self._storage_options):
            text = text.replace(secret, "***")
        return text

    # ---- what is known without a database -------------------------------------------------------

    async def scripts(self) -> Scripts:
        """Returns all migrations, loaded once per manager, off the event loop.

        Raises:
            ConfigurationError: The folder does not exist.
            ScriptError: A script is wrong.
        """
        if self._scripts is None:
            try:
                scripts, expected = await anyio.to_thread.run_sync(self._load)
            except ScriptError as exc:
                told = self._scrub(exc.what)  # a function of the parameters may tell them
                if told == exc.what:
                    raise
                exc.what, exc.args = told, (told, exc.remedy)
                raise exc from None
            self._scripts = scripts
            self._targets = {line: version for line, (version, _) in expected.items()}
            self._digests = {line: digest for line, (_, digest) in expected.items()}
        return self._scripts

    def _load(self) -> tuple[Scripts, Mapping[str, tuple[int, str]]]:
        """Does, in one thread, all that a start does with files of its own."""
        self._is_there = is_local(self._uri) and Path(self._uri).exists()
        scripts = discovery.load(self._source, self._params)
        discovery.refuse_tables(scripts, (self._ledger_name, f"{self._ledger_name}_history"))
        return scripts, at_target(scripts)

    # ---- changing -------------------------------------------------------------------------------

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
            return await self._await_target(waits=on_pending is OnPending.WAIT)
        report = await self.upgrade(background=False)
        scripts = await self.scripts()
        targets = self._targets
        if report.lines == targets or targets.items() <= report.lines.items():
            return report
        deferred = set(report.deferred)
        behind = tuple(
            f"{line}: current v{current}, target v{latest}"
            for line, latest in targets.items()
            if (current := report.lines.get(line, 0)) < latest
            and any(s.key not in deferred for s in scripts.after(line, current))
        )
        if behind:
            raise ValidationFailedError(behind, "Run `aiomigrate plan` to see why.")
        return report

    async def _await_target(self, *, waits: bool) -> Report:
        scripts = await self.scripts()
        begun, started_at = self._clock.monotonic(), self._clock.wall()
        report = Report(run_id=secrets.token_hex(4), database=self.database, started_at=started_at)
        wait_s, delay_s = self._options.lease.wait_s, 0.05
        while True:
            # Without a script there is nothing to wait for, not even for a database.
            store = await self._open()
            ledger = None if store is None else self._ledger(store, self._log)
            _, current = await self._glimpse(ledger, scripts)
            if current is not None or not scripts.all:
                lines, deferred = current or ({}, ())
                return self._ended(report, begun, lines=lines, deferred=deferred)
            left_s = wait_s - (self._clock.monotonic() - begun)
            if not waits or left_s <= 0:
                health = await self.health()
                after = f" after {wait_s:g} s" if waits else ""
                raise NotAtTargetError(
                    f"The database is not at its target{after}, and this process is not to "
                    f"migrate it. It is {health}.".replace("\n", "; "),
                    "Run `aiomigrate upgrade`, or start what migrates it, then start this again.",
                )
            await anyio.sleep(min(delay_s, left_s))
            delay_s = min(2 * delay_s, _LOOK_EVERY_S)

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
            fast = await self._upgrade(tables=tables, to=to)
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

    async def _upgrade(self, *, tables: Collection[str] | None, to: Target) -> Report:
        """Runs what an application's start waits for."""
        run_id = secrets.token_hex(4)
        log = self._log.bind(run_id=run_id)
        begun, started_at = self._clock.monotonic(), self._clock.wall()
        scripts = await self.scripts()
        store = await self._open()
        report = Report(run_id=run_id, database=self.database, started_at=started_at)
        known = None if store is None else self._ledger(store, log)
        head, current = await self._glimpse(known, scripts)
        if current is not None and tables is None and to is None:
            log.debug(ev.RUN_AT_TARGET, lines=len(current[0]), deferred=len(current[1]))
            return self._ended(report, begun, lines=current[0], deferred=current[1])
        before = await self._look(
            store, scripts, log, tables=tables, to=to, head=head, ledger=known
        )
        deferred = before.plan.deferred or _unsettled(before.plan)
        plan = before.plan.part(Part.FAST)
        if not plan.needs_lease:
            log.debug(ev.RUN_AT_TARGET, lines=len(plan.lines), deferred=len(deferred))
            return self._ended(report, begun, lines=_currents(plan), deferred=deferred)
        opened_at = self._clock.monotonic()
        _, opened = await self._checked(store, before.plan)
        log.info(ev.RUN_PLANNED, migrations=len(plan.steps), database=self.database)
        store = store or await self._connect()
        ledger = known or self._ledger(store, log)
        runner = Runner(
            store, ledger, scripts, self._options, run_id=run_id, clock=self._clock, log=log
        )

        async def look(head: Head | None, events: Sequence[Event] | None) -> Seen:
            return await self._look(
                store, scripts, log, tables=tables, to=to, head=head, ledger=ledger, events=events
            )

        def ended(steps: tuple[StepReport, ...] | None = None) -> Report:
            results = runner.results
            plan = runner.plan or before.plan  # what was found under the lease, if it was had
            lines = _currents(plan)
            for step in results.values():
                if step.outcome is Outcome.APPLIED:
                    lines[step.line] = max(step.version, lines.get(step.line, 0))
            return self._ended(
                report,
                begun,
                lease_s=runner.lease_s,
                steps=tuple(results.values()) if steps is None else steps,
                lines=lines,
                adopted=plan.adopts,
                ledger_commits=ledger.commits,
                deferred=runner.deferred,
            )

        try:
            worked = await runner.upgrade(before, look, opened, opened_at)
        except FailedElsewhereError as exc:
            raise _failed(ended((exc.step,)), log, elsewhere=True) from None
        if not worked:  # another process did it while this one waited
            head = await ledger.read_head()
            lines = {row.name: row.version for row in head.rows}
            left = ready(head.rows, scripts, head.leases.get(BACKGROUND_LEASE)) or frozenset()
            return self._ended(
                report,
                begun,
                lease_s=runner.lease_s,
                lines=lines,
                deferred=tuple(sorted(left)),
            )
        result = ended()
        if any(step.outcome is not Outcome.APPLIED for step in result.steps):
            raise _failed(result, log)
        log.info(
            ev.RUN_FINISHED,
            applied=len(result.applied),
            total_s=round(result.total_s, 4),
            lease_s=round(result.lease_s, 4),
            ledger_commits=result.ledger_commits,
        )
        return result

    async def _glimpse(
        self, ledger: Ledger | None, scripts: Scripts
    ) -> tuple[Head, tuple[dict[str, int], tuple[tuple[str, int], ...]] | None]:
        """Reads the head, once.

        Returns:
            The head (empty where it was not parsed), and, if it alone proves that a start has
            nothing to do, the version of each line and what is left for the background.
        """
        if ledger is None:
            return Head(), None
        content = await ledger.read_head_content()
        if content is None:
            return Head(), None
        lines = versions_if_current(content, self._targets, self._digests)
        if lines is not None:
            return Head(), (lines, ())
        head = parse_head(content, ledger.head_name)
        left = ready(head.rows, scripts, head.leases.get(BACKGROUND_LEASE))
        if not left:
            return head, None
        return head, ({row.name: row.version for row in head.rows}, tuple(sorted(left)))

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
            return await self._run_background(tables=tables, to=to)

    async def _run_background(self, *, tables: Collection[str] | None, to: Target) -> Report:
        run_id = secrets.token_hex(4)
        log = self._log.bind(run_id=run_id, background=True)
        begun, started_at = self._clock.monotonic(), self._clock.wall()
        scripts = await self.scripts()
        report = Report(run_id=run_id, database=self.database, started_at=started_at)
        store = await self._open()
        if store is None:
            store = None if not scripts.has_background else await self._connect()
        if store is None:
            return self._ended(report, begun)
        ledger = self._ledger(store, log)
        before = await self._look(store, scripts, log, tables=tables, to=to)
        if not before.plan.needs_background:
            return self._ended(report, begun, lines=_currents(before.plan))
        await self._checked(store, before.plan)
        runner = Runner(
            store, ledger, scripts, self._options, run_id=run_id, clock=self._clock, log=log
        )

        async def look(head: Head | None, events: Sequence[Event] | None) -> Seen:
            return await self._look(
                store, scripts, log, tables=tables, to=to, head=head, ledger=ledger, events=events
            )

        await runner.background(look)
        lines = {row.name: row.version for row in (await ledger.read_head()).rows}
        result = self._ended(
            report,
            begun,
            lease_s=runner.lease_s,
            steps=tuple(runner.results.values()),
            lines=lines,
            ledger_commits=ledger.commits,
        )
        if any(step.outcome is not Outcome.APPLIED for step in result.steps):
            raise _failed(result, log)
        log.info(ev.RUN_FINISHED, applied=len(result.applied), total_s=round(result.total_s, 4))
        return result

    def _ended(self, report: Report, begun: float, **facts: Any) -> Report:
        if facts.get("steps") and self._scripts is not None:
            spans = spans_of(facts["steps"])
            facts["critical"] = critical_path(spans, _follows(self._scripts))
            facts["concurrency"] = concurrency_of(spans)
        return replace(report, total_s=self._clock.monotonic() - begun, **facts)

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
            return await self._rollback(line, to, allow_destructive=allow_destructive)

    async def _rollback(
        self, line: str | Mapping[str, int], to: int | None, *, allow_destructive: bool
    ) -> Report:
        run_id = secrets.token_hex(4)
        log = self._log.bind(run_id=run_id)
        begun = self._clock.monotonic()
        report = Report(run_id=run_id, database=self.database, started_at=self._clock.wall())
        scripts = await self.scripts()
        store = await self._connect() if await self._open() is not None else None
        plan = await self.plan_rollback(line, to=to, allow_destructive=allow_destructive)
        if not plan.needs_lease:
            return self._ended(report, begun, lines=_currents(plan))
        assert store is not None  # noqa: S101 - there is something to undo
        ledger = self._ledger(store, log)
        runner = Runner(
            store, ledger, scripts, self._options, run_id=run_id, clock=self._clock, log=log
        )

        async def read(head: Head | None, events: Sequence[Event] | None) -> Seen:
            seen = await self._read(store, scripts, log, head=head, events=events)
            return replace(seen, plan=Plan(lines=seen.decided.lines))

        async def look(*_: object) -> Seen:
            return await self._look_back(store, scripts, log, line, to, allow_destructive)

        async def decide_again(script: Script, state: LineState) -> Undo:
            # From the journal alone: the head of other lines moves while they are undone.
            journal = await _folded(ledger)
            state = replace(state, history=journal.of(script.line))
            return await self._decide_undo(
                store, journal, script, state,
                allow_destructive=allow_destructive, under_lease=True,
            )  # fmt: skip

        if plan.steps:
            log.info(ev.RUN_PLANNED, migrations=len(plan.steps), database=self.database)
        await runner.rollback(read, look, decide_again)
        lines = _currents(runner.plan or plan)
        for step in (runner.plan or plan).steps:
            result = runner.results.get(step.key)
            if result is not None and result.outcome.is_done and step.undo is not None:
                lines[step.script.line] = min(step.undo.to, lines[step.script.line])
        result_report = self._ended(
            report,
            begun,
            lease_s=runner.lease_s,
            steps=tuple(runner.results.values()),
            lines=lines,
            ledger_commits=ledger.commits,
        )
        if any(not step.outcome.is_done for step in result_report.steps):
            raise _failed(result_report, log)
        log.info(ev.RUN_FINISHED, rolled_back=len(result_report.steps),
                 total_s=round(result_report.total_s, 4))  # fmt: skip
        return result_report

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
        scripts = await self.scripts()
        store = await self._open()
        seen = await self._look_back(store, scripts, self._log, line, to, allow_destructive)
        return seen.plan

    async def _look_back(
        self,
        store: Store | None,
        scripts: Scripts,
        log: Any,
        line: str | Mapping[str, int],
        to: int | None,
        allow_destructive: bool,  # noqa: FBT001 - a public keyword, handed on
    ) -> Seen:
        seen = await self._read(store, scripts, log)
        targets = dict(line) if isinstance(line, Mapping) else {line: to}
        versions: dict[str, int] = {}
        for name, version in targets.items():
            state = seen.decided.lines.get(name)
            below = [v for v in (state.history.applied if state else ()) if v < state.current]  # type: ignore[union-attr]
            versions[name] = max(below, default=0) if version is None else version
        undos: dict[tuple[str, int], Undo] = {}
        for key in to_undo(seen.decided, seen.journal, scripts, versions):
            script = scripts.get(*key)
            assert script is not None  # noqa: S101 - `to_undo` chose scripts
            assert store is not None  # noqa: S101 - nothing is applied where there is no database
            state = seen.decided.lines[script.line]
            undos[key] = await self._decide_undo(
                store, seen.journal, script, state, allow_destructive=allow_destructive
            )
        return replace(seen, plan=build_rollback(undos, seen.decided, scripts, seen.busy))

    async def _decide_undo(
        self,
        store: Store,
        journal: Journal,
        script: Script,
        state: LineState,
        *,
        allow_destructive: bool,
        under_lease: bool = False,
    ) -> Undo:
        heads = {}
        for name in script.touches:
            table = await store.find(name)
            heads[name] = 0 if table is None else await table.version()
        return decide(
            script,
            state,
            journal,
            heads,
            allow_destructive=allow_destructive,
            unsettled=() if under_lease else unsettled(journal),
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
        scripts = await self.scripts()
        store = await self._open()
        if store is None:
            return ()
        log = self._log.bind(run_id=(run_id := secrets.token_hex(4)))
        if not kept_savepoints((await self._read(store, scripts, log)).journal):
            return ()
        runner = Runner(
            store, self._ledger(store, log), scripts, self._options,
            run_id=run_id, clock=self._clock, log=log,
        )  # fmt: skip

        async def look(head: Head | None, events: Sequence[Event] | None) -> Seen:
            return await self._read(store, scripts, log, head=head, events=events)

        return await runner.prune(look, older_than_s=older_than)

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
        scripts = await self.scripts()
        versions = _stamps(scripts, tables, to)
        if not versions:
            return versions
        run_id = secrets.token_hex(4)
        log = self._log.bind(run_id=run_id)
        store = await self._connect()
        ledger = self._ledger(store, log)
        runner = Runner(
            store, ledger, scripts, self._options, run_id=run_id, clock=self._clock, log=log
        )

        async def look(head: Head | None, events: Sequence[Event] | None) -> Seen:
            events = await ledger.read_journal() if events is None else events
            nothing = Reconciled(lines={}, problems=())
            head = head or await ledger.read_head()
            holder = holder_of(head, BACKGROUND_LEASE)
            busy = busy_with(
                head.rows, nothing, scripts, holder=None if holder is None else str(holder)
            )
            return Seen(
                head=head,
                events=events,
                journal=fold(events),
                decided=nothing,
                plan=Plan(),
                busy=busy,
            )

        await runner.stamp(versions, look)
        return versions

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
        store = await self._open()
        if store is None:
            return None
        ledger = self._ledger(store, self._log)
        key = BACKGROUND_LEASE if background else RUN_LEASE
        return await unlock(ledger, options=self._options.lease, clock=self._clock, key=key)

    # ---- looking --------------------------------------------------------------------------------

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
        scripts = await self.scripts()
        store = await self._open()
        seen = await self._look(store, scripts, self._log, tables=tables, to=to)
        plan, _ = await self._checked(store, seen.plan)
        return plan if store is None else await self._estimated(store, plan)

    async def get_status(self) -> Status:
        """Returns where every line is, and who holds the lease. One small read; writes nothing.

        Raises:
            ScriptError: A script is wrong.
            LedgerError: The head cannot be trusted.
        """
        scripts = await self.scripts()
        store = await self._open()
        head = Head() if store is None else await self._ledger(store, self._log).read_head()
        return await self._status(store, head, scripts)

    async def _status(self, store: Store | None, head: Head, scripts: Scripts) -> Status:
        rows: dict[str, HeadRow] = {row.name: row for row in head.rows}
        journal = Journal()
        if store is not None and not head.exists:  # lost, or never there: the journal knows
            journal = await _folded(self._ledger(store, self._log))
        at_work = holder_of(head, BACKGROUND_LEASE)
        deferred = deferred_by_head(head.rows, scripts, head.leases.get(BACKGROUND_LEASE))
        lines = {}
        for name in sorted({*rows, *journal.lines, *scripts.line_names()}):
            row = rows.get(name)
            current = row.version if row else journal.of(name).current
            known = bool(scripts.of(name))
            lines[name] = LineStatus(
                current=current,
                target=scripts.latest(name) if known else None,
                pending=tuple(s.version for s in scripts.after(name, current)),
                migrated_at=row.migrated_at if row else None,
                background=_background_of(name, row, deferred, at_work),
            )
        return Status(
            database=self.database,
            exists=head.exists,
            lines=lines,
            holder=holder_of(head),
            background=at_work,
        )

    async def health(self) -> Health:
        """Returns whether the database may be used, and if not, why. Reads little; writes nothing.

        For a probe that is asked every second use `aiomigrate.asgi`, which remembers.

        Raises:
            ScriptError: A script is wrong.
            LedgerError: The ledger cannot be trusted.
            StoreError: LanceDB failed.
        """
        scripts = await self.scripts()
        store = await self._open()
        head = Head() if store is None else await self._ledger(store, self._log).read_head()
        status = await self._status(store, head, scripts)
        behind = {
            name
            for name, line in status.lines.items()
            if line.target is not None and line.current < line.target
        }
        if all(status.lines[name].background is not None for name in behind):
            refused = await self._refused(store, head, scripts)
            state = HealthState.FAILED if refused else HealthState.READY
            return Health(state=state, status=status, failed=refused)
        if (holder := status.holder) is not None:
            is_own = (holder.host, holder.pid) == (HOST, os.getpid())
            state = HealthState.RUNNING if is_own else HealthState.WAITING
            return Health(state=state, status=status)
        failed = {}
        if store is not None:
            journal = await _folded(self._ledger(store, self._log))
            failed = {
                name: error_line(event.error)
                for name, line in journal.lines.items()
                if name in behind and (event := line.failed) is not None
            }
        state = HealthState.FAILED if failed else HealthState.PENDING
        return Health(state=state, status=status, failed=failed)

    async def _refused(self, store: Store | None, head: Head, scripts: Scripts) -> dict[str, str]:
        """Returns why a start would refuse the database, by line, though nothing is pending.

        The journal is read only where the head leaves a doubt.
        """
        doubtful = any(
            row.version > scripts.latest(row.name)
            or (row.digest or "") != digest_at(scripts, row.name, row.version)
            for row in head.rows
            if scripts.of(row.name)
        )
        if store is None or not doubtful:
            return {}
        journal = await _folded(self._ledger(store, self._log))
        decided = await self._decide(store, head, journal, scripts)
        return {problem.line or "": problem.what for problem in decided.problems}

    async def validate(self) -> Validation:
        """Compares scripts, ledger and live tables. Writes nothing, takes no lease.

        Finds lines that are not at target, edited, missing or inserted scripts, contradictions of
        the metadata, interrupted migrations, and tables whose columns, types, nullability or
        indexes are not what their last migration left.

        Raises:
            ScriptError: A script is wrong.
            StoreError: LanceDB failed.
        """
        scripts = await self.scripts()
        store = await self._open()
        if store is None:
            decided = reconcile((), Journal(), scripts)
            behind = _behind(decided, scripts)
            return Validation(errors=behind, not_at_target=behind)
        ledger = self._ledger(store, self._log)
        try:
            head = await ledger.read_head()
            journal = await _folded(ledger)
        except LedgerError as exc:
            return Validation(errors=(str(exc),))
        decided = await self._decide(store, head, journal, scripts)
        left = deferred_by_head(head.rows, scripts, head.leases.get(BACKGROUND_LEASE))
        behind = _behind(decided, scripts, left)
        errors = [*behind, *(problem.what for problem in decided.problems)]
        errors += _head_errors(head, decided, scripts)
        deferred = [f"{line}: version {version} is pending" for line, version in sorted(left)]
        for line, state in decided.lines.items():
            if state.unfinished is None:
                continue
            version = state.unfinished.started.version
            if state.unfinished.started.lease == BACKGROUND_LEASE:
                deferred.append(f"{line}: version {version} was begun and has not ended")
            else:
                errors.append(f"{line}: version {version} was interrupted and not recovered yet")
        errors += await self._drifted(store, journal, decided)
        unknown = [
            f"{n}: recorded at v{s.current}, no script knows it; left alone"
            for n, s in decided.lines.items()
            if not scripts.of(n)
        ]
        ahead = [
            f"{n}: recorded at v{s.current}, above its newest script v{s.latest}"
            for n, s in decided.lines.items()
            if s.is_ahead and self._on_ahead is OnAhead.WARN
        ]
        return Validation(
            errors=tuple(errors),
            warnings=(*ahead, *unknown),
            not_at_target=behind,
            deferred=tuple(deferred),
        )

    async def _drifted(self, store: Store, journal: Journal, decided: Reconciled) -> list[str]:
        busy = {
            table
            for state in decided.lines.values()
            if state.unfinished is not None
            for table in state.unfinished.savepoints
        }
        errors = []
        for name, shape in sorted(journal.shapes.items()):
            if shape is None or name in busy:
                continue
            _, state = await store.state_of(name)
            if state is None:
                errors.append(f"table {name} is missing")
                continue
            found = differences(shape, state.shape())
            errors += [f"table {name}: {difference}" for difference in found]
        return errors

    async def timings(self) -> tuple[RunTiming, ...]:
        """Returns where the time of every run in the journal went, oldest first. Writes nothing.

        Runs in which no migration ended are left out; none where there is no journal.

        Raises:
            ScriptError: A script is wrong.
            LedgerError: The journal cannot be read or trusted.
            StoreError: LanceDB failed.
        """
        return runs_of(await self.history(), _follows(await self.scripts()))

    async def history(self, line: str | None = None) -> tuple[Event, ...]:
        """Returns the journal's valid events in order, of one line or all. Writes nothing.

        Empty when there is no journal yet.

        Raises:
            LedgerError: The journal cannot be trusted.
        """
        store = await self._open()
        if store is None:
            return ()
        events = (await _folded(self._ledger(store, self._log))).events
        return tuple(e for e in events if line is None or e.line == line)

    # ---- within ---------------------------------------------------------------------------------

    def _ledger(self, store: Store, log: Any) -> Ledger:
        return Ledger(
            store,
            self._ledger_name,
            clock=self._clock,
            log=log,
            on_unsafe_store=self._on_unsafe_store,
        )

    async def _open(self) -> Store | None:
        """Connects, but not to a local path that does not exist: LanceDB would make the folder."""
        if (
            self._store is None
            and self._connection is None
            and is_local(self._uri)
            and not self._is_there
            and not await anyio.to_thread.run_sync(os.path.exists, self._uri)
        ):
            return None
        return await self._connect()

    async def _connect(self) -> Store:
        if self._store is not None:
            return self._store
        grace_s = min(10.0, self._options.lease.ttl_s / 2)
        if self._connection is not None:
            interval = await self._interval_of(self._connection)
            if interval is None:
                self._store = self._store_type(
                    self._connection,
                    uri=self.database,
                    secrets=secrets_of(self._uri, self._storage_options),
                    grace_s=grace_s,
                )
                return self._store
            if not is_local(self._uri):
                in_memory = self._uri.startswith("memory:")
                raise ConfigurationError(
                    "The connection was opened with read_consistency_interval, with which a "
                    "commit cannot be told from another's.",
                    "Open it without."
                    if in_memory
                    else "Pass the URI and storage_options instead of the connection.",
                )
        self._store = await self._store_type.connect(
            self._uri, self._storage_options, grace_s=grace_s
        )
        return self._store

    async def _interval_of(self, connection: lancedb.AsyncConnection) -> dt.timedelta | None:
        try:
            interval: dt.timedelta | None = await connection.get_read_consistency_interval()
        except RuntimeError as exc:
            raise ConfigurationError(
                f"The connection cannot be used: {exc}.", "Pass one that is open."
            ) from exc
        return interval

    async def _look(
        self,
        store: Store | None,
        scripts: Scripts,
        log: Any,
        *,
        tables: Collection[str] | None,
        to: Target,
        head: Head | None = None,
        ledger: Ledger | None = None,
        events: Sequence[Event] | None = None,
    ) -> Seen:
        """Reads head and journal, decides and plans.

        Raises:
            AiomigrateError: What forbids running.
        """
        seen = await self._read(store, scripts, log, head=head, ledger=ledger, events=events)
        existing: set[str] = set()
        if scripts.has_background and store is not None:
            current = {line: state.current for line, state in seen.decided.lines.items()}
            existing = known_tables(scripts, current) | set(await store.table_names())
        build = functools.partial(
            build_plan, seen.decided, scripts, tables=tables, to=to, existing=existing,
            busy=seen.busy,
        )  # fmt: skip
        # In a thread: for thousands of migrations it takes longer than a server may be silent.
        return replace(seen, plan=await anyio.to_thread.run_sync(build))

    async def _read(
        self,
        store: Store | None,
        scripts: Scripts,
        log: Any,
        *,
        head: Head | None = None,
        ledger: Ledger | None = None,
        events: Sequence[Event] | None = None,
    ) -> Seen:
        """Reads head and journal, where they are not given, and decides the state of every line.

        Raises:
            AiomigrateError: What forbids running.
        """
        for attempt in range(_LOOKS):
            if store is not None:
                ledger = ledger or self._ledger(store, log)
                head = head or await ledger.read_head()
                events = await ledger.read_journal() if events is None else events
            events = events or ()
            journal = await anyio.to_thread.run_sync(fold, events)
            decided = await self._decide(store, head or Head(), journal, scripts)
            crossed = any(isinstance(p, LedgerConflictError) for p in decided.problems)
            if not crossed or attempt == _LOOKS - 1:
                break
            # Read while another process went back from one to the other: look again.
            head = events = None
            await anyio.sleep(0.05)
        events = events or ()
        decided.raise_first()
        for name, state in decided.lines.items():
            if not scripts.of(name):
                log.debug(ev.LINE_UNKNOWN, table=name, version=state.current)
            if state.is_ahead:
                log.warning(ev.LINE_AHEAD, table=name, version=state.current, target=state.latest)
        head = head or Head()
        holder = holder_of(head, BACKGROUND_LEASE)
        busy = busy_with(
            head.rows, decided, scripts, holder=None if holder is None else str(holder)
        )
        return Seen(
            head=head, events=events, journal=journal, decided=decided, plan=Plan(), busy=busy
        )

    async def _decide(
        self, store: Store | None, head: Head, journal: Journal, scripts: Scripts
    ) -> Reconciled:
        mismatched = {}
        if store is not None:
            for line in disputed(head.rows, journal, scripts):
                last = journal.of(line).last
                for name in sorted(last.tables if last else ()):
                    shape = journal.shapes.get(name)
                    _, state = await store.state_of(name)
                    if shape is None:
                        continue
                    if state is None:
                        mismatched[line] = f"table {name} is missing"
                    elif found := differences(shape, state.shape()):
                        mismatched[line] = f"table {name}: {'; '.join(found)}"
        decide_lines = functools.partial(
            reconcile, head.rows, journal, scripts, on_ahead=self._on_ahead, mismatched=mismatched
        )
        return await anyio.to_thread.run_sync(decide_lines)

    async def _estimated(self, store: Store, plan: Plan) -> Plan:
        """Returns the plan with what its costly operations will cost, which takes reading rows."""
        told: list[str] = []
        for step in plan.steps:
            for operation in step.script.operations:
                column, table = operation.surveyed, operation.table
                if column is None or table is None or step.undo is not None:
                    continue
                state = (await store.state_of(table))[1]
                if state is None or not state.has(column):
                    continue  # an earlier step makes it: nobody knows yet
                opened = await store.open(table)
                rows = opened.scan(f"{quote(column)} IS NOT NULL", [column], _SURVEY_ROWS)
                told += operation.estimate(await survey(rows, store.free_bytes()))
        return replace(plan, warnings=(*plan.warnings, *told))

    async def _checked(
        self, store: Store | None, plan: Plan
    ) -> tuple[Plan, Mapping[str, Opened | None]]:
        """Returns a plan that fits the tables as they are, and the tables as they were seen.

        Raises:
            AiomigrateError: It does not fit.
        """
        states: dict[str, TableState | None] = dict.fromkeys(plan.touched())
        existing = set() if store is None else set(await store.table_names())
        seen: dict[str, Opened | None] = dict.fromkeys(states.keys() - existing)
        if store is not None:
            found = await store.look_at([name for name in states if name in existing])
            states |= {name: opened.state for name, opened in found.items()}
            seen |= found
        checked, trials = await anyio.to_thread.run_sync(
            check_operations, plan, states, self._options.on_destructive
        )
        for step in plan.steps:
            for operation in step.script.operations:
                if isinstance(operation, CreateIndex):
                    try:
                        index_config(operation.kind, operation.options)
                    except ConfigurationError as exc:
                        refused = operation.refuse(exc.what, exc.remedy)
                        raise in_script(refused, step.script) from exc
        sketch = Sketch()
        for trial in trials:
            schema = pa.schema(trial.state.fields())
            if (why := await sketch.refusal(trial.statement, schema)) is not None:
                raise trial.refused(why)
        return checked, seen


async def _folded(ledger: Ledger) -> Journal:
    """Reads the journal and folds it, in a thread: a long one would keep the event loop."""
    return await anyio.to_thread.run_sync(fold, await ledger.read_journal())


def _follows(scripts: Scripts) -> dict[tuple[str, int], tuple[tuple[str, int], ...]]:
    """Returns what each migration follows besides its own line."""
    return {script.key: tuple(script.depends_on.items()) for script in scripts.all}


_PROGRESS_KEPT = 1000
_LOOK_EVERY_S = 2.0
_LOOKS = 3
_SURVEY_ROWS = 1024

_MAY_BE_0 = ("lease_wait", "keep_savepoints")


def _check_numbers(**options: object) -> None:
    """Checks the options that are numbers: finite, and positive but for the patience.

    Raises:
        ConfigurationError: One is not.
    """
    for name, value in options.items():
        if value is None and name == "timeout":
            continue
        kind: type | tuple[type, ...] = int if name == "concurrency" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ConfigurationError(f"{name}={value!r} is not a number.", "Give a number.")
        assert isinstance(value, int | float)  # noqa: S101 - `kind` says so
        if not math.isfinite(value) or value < 0 or (value == 0 and name not in _MAY_BE_0):
            raise ConfigurationError(f"{name}={value!r} is too small or too large.", "Change it.")


def _unsettled(plan: Plan) -> tuple[tuple[str, int], ...]:
    """Returns what a dead holder of the background lease did and did not record in the head."""
    states = ((line, plan.lines[line]) for line in sorted(plan.busy) if line in plan.lines)
    return tuple((line, state.current) for line, state in states if state.needs_lease)


def _background_of(
    line: str,
    row: HeadRow | None,
    deferred: Collection[tuple[str, int]],
    holder: Holder | None,
) -> Background | None:
    """Returns how it stands with a line's work in the background, `None` if none is pending."""
    versions = [version for name, version in deferred if name == line]
    if not versions:
        return None
    going = next((one for one in holder.going if one.line == line), None) if holder else None
    is_lent = holder is not None and row is not None and row.lease == BACKGROUND_LEASE
    state = BackgroundState.RUNNING if is_lent else BackgroundState.PENDING
    return Background(state=state, version=min(versions), going=going)


def _currents(plan: Plan) -> dict[str, int]:
    return {name: state.current for name, state in plan.lines.items()}


def _head_errors(head: Head, decided: Reconciled, scripts: Scripts) -> list[str]:
    """Tells where the head lags behind the journal; the next upgrade mends it."""
    recorded = {row.name: row.version for row in head.rows}
    mend = "the next upgrade mends it"
    errors = []
    for line, state in decided.lines.items():
        if not scripts.of(line):
            continue
        if state.rows > 1:
            errors.append(f"{line}: the head has {state.rows} equal rows; {mend}")
        elif state.history.current and line not in recorded:
            errors.append(f"{line}: the head has no row, the journal says v{state.current}; {mend}")
        elif recorded.get(line, 0) < state.history.current:
            errors.append(
                f"{line}: the head says v{recorded[line]}, the journal v{state.current}; {mend}"
            )
    return errors


def _behind(
    decided: Reconciled, scripts: Scripts, deferred: Collection[tuple[str, int]] = ()
) -> tuple[str, ...]:
    return tuple(
        f"{line}: current v{state.current}, target v{state.latest}"
        for line, state in decided.lines.items()
        if any(script.key not in deferred for script in pending(state, scripts, None))
    )


def _stamps(scripts: Scripts, tables: Collection[str] | None, to: Target) -> dict[str, int]:
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


def _failed(report: Report, log: Any, *, elsewhere: bool = False) -> MigrationFailedError:
    bad = [step for step in report.steps if step.outcome is not Outcome.APPLIED]
    step = next(iter(report.failed), bad[0])
    others = len(report.failed) - 1
    more = f" ({others} more failed)" if others > 0 else ""
    where = " in another process" if elsewhere else ""
    log.error(
        ev.RUN_FAILED,
        applied=len(report.applied),
        failed=len(report.failed),
        skipped=len(report.skipped),
        total_s=round(report.total_s, 4),
    )
    return MigrationFailedError(
        f"Migration {step.line} {step.version} failed{where}: "
        f"{error_line(step.error).rstrip('.')}{more}. "
        f"{len(report.applied)} applied, {len(report.skipped)} skipped.",
        step.remedy or "Correct the migration and run again; what was applied stays.",
        report=report,
        line=step.line,
        version=step.version,
    )


__all__ = ["AiomigrateError", "MigrationManager"]
