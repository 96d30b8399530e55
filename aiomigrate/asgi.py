"""Runs migrations at the startup of an ASGI application, and answers health probes.

`lifespan(...)` returns a lifespan for Starlette, FastAPI and Litestar. It brings the database to
its target before the first request, runs background migrations in a separate task, and drains that
task on shutdown. Its `around` does the same for any other framework. Its `health` is an ASGI
application that answers from memory.

To inspect a database that another process migrates, use `MigrationManager.health`.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import structlog

from aiomigrate import events as ev
from aiomigrate.errors import AiomigrateError, ConfigurationError
from aiomigrate.inspection import OnPending
from aiomigrate.ledger.records import StepProgress
from aiomigrate.manager import MigrationManager
from aiomigrate.option_checks import check_flag, check_policy
from aiomigrate.results import Outcome, Report
from aiomigrate.runs.progress import Progress

App = Any
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Inner = Callable[[App], AbstractAsyncContextManager[Any]]


class Lifespan:
    """A lifespan that migrates before it starts an application. Created by `lifespan`.

    One instance serves one application.

    Attributes:
        manager: The manager of the database.
        report: The report of the start, extended by that of background work when it has ended;
            `None` until the start has ended.
    """

    def __init__(
        self,
        manager: MigrationManager,
        *,
        on_pending: OnPending | str,
        background: bool,
        then: Inner | None,
        log: Any,
    ) -> None:
        """Stores the options; connects to nothing. See `lifespan` for the arguments."""
        self.manager = manager
        self.report: Report | None = None
        self._on_pending = check_policy(OnPending, on_pending, "on_pending")
        self._background = check_flag(background, "background")
        self._then = then
        self._log = log
        self._state = "starting"
        self._error = ""
        self._deferred: set[tuple[str, int]] = set()
        self._progress: dict[str, Progress] = {}
        self._handles: weakref.WeakSet[Any] = weakref.WeakSet()

    # ---- handles --------------------------------------------------------------------------------

    def keep_fresh(self, *tables: Any) -> None:
        """Registers open `AsyncTable`s, to update them to the latest version after migrations.

        A handle stays at the version at which it was opened or first read. Only weak references
        are kept.

        Args:
            *tables: Open `AsyncTable`s.
        """
        self._handles.update(tables)

    async def refresh(self) -> None:
        """Updates the handles registered with `keep_fresh` to the latest version now.

        Raises:
            Exception: LanceDB's own exception, if a table no longer exists.
        """
        for table in list(self._handles):
            await table.checkout_latest()

    # ---- health ---------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Returns the known state as JSON values, without a call to the store.

        `state` is `starting`, `ready`, `failed` (the start failed) or `stopping`. `background`
        contains, by line, the migrations left for the background with their progress;
        `background_error` is the error that stopped them, or empty.
        """
        background = {}
        for line, version in sorted(self._deferred):
            last = self._progress.get(line)
            step = StepProgress(
                line=line,
                version=version,
                done=last.done if last else 0,
                total=last.total if last else None,
            )
            background[line] = {
                "version": version,
                "state": last.state if last else "pending",
                "percent": None if step.percent is None else round(step.percent, 1),
            }
        return {
            "state": self._state,
            "ready": self._state == "ready",
            "database": self.manager.database,
            "lines": dict(self.report.lines) if self.report else {},
            "background": background,
            "background_error": self._error,
        }

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers health probes from memory: an ASGI application to mount, such as at `/health`.

        `GET .../live` returns 200 while the process runs. Any other path returns 200 while the
        application is ready to serve, else 503. The body is `snapshot()` as JSON. Connections
        other than HTTP are ignored.
        """
        if scope["type"] != "http":
            return
        state = self.snapshot()
        is_live = str(scope["path"]).rstrip("/").endswith("/live")
        body = json.dumps(state).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        status = 200 if is_live or state["ready"] else 503
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    # ---- startup and background work ------------------------------------------------------------

    def around(self, application: Application) -> Application:
        """Returns an ASGI application that migrates before it starts another one.

        Use it instead of the framework's `lifespan=` if the framework has none, or if a failed
        start should be reported in two lines, without the framework's traceback.

        Args:
            application: Any ASGI application; it need not support lifespans.
        """

        async def wrapper(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "lifespan":
                await application(scope, receive, send)
                return
            startup = await receive()
            started = False
            try:
                async with self(application) as state:
                    if isinstance(state, Mapping) and "state" in scope:
                        scope["state"].update(state)
                    started = True
                    await _run_application(application, scope, startup, receive, send)
            except AiomigrateError as exc:
                if started:
                    raise
                message = f"{exc.what}\n{exc.remedy}"
                await send({"type": "lifespan.startup.failed", "message": message})

        return wrapper

    @asynccontextmanager
    async def __call__(self, app: App) -> AsyncIterator[Any]:
        """Migrates, then keeps the application's context open. Called by the framework.

        The lease is held only while migrations run. Leaving the context, also by a cancellation,
        cancels the background work: calls in flight have their `drain_s` to end, and the next
        start continues the work.

        Args:
            app: The application, passed to `then`.

        Yields:
            The value that `then` yields; `None` without `then`.

        Raises:
            AiomigrateError: The database could not be brought to its target. The application does
                not start.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.manager)
            await self._initialize()
            if self._deferred and self._background and self._on_pending is OnPending.MIGRATE:
                group = await stack.enter_async_context(anyio.create_task_group())
                group.start_soon(self._run_background)
                stack.callback(group.cancel_scope.cancel)
            inner = None
            if self._then is not None:
                inner = await stack.enter_async_context(self._then(app))
            yield inner
            self._state = "stopping"

    async def _initialize(self) -> None:
        try:
            self.report = await self.manager.initialize(on_pending=self._on_pending)
        except AiomigrateError as exc:
            self._state, self._error = "failed", exc.what
            raise
        self._deferred = set(self.report.deferred)
        self._state = "ready"
        await self.refresh()

    async def _run_background(self) -> None:
        """Runs the background migrations. After a failure the application continues to serve."""
        with self.manager.progress() as stream:
            async with anyio.create_task_group() as group:
                group.start_soon(self._follow_progress, stream)
                try:
                    later = await self.manager.run_background()
                except AiomigrateError as exc:
                    self._error = exc.what
                    self._log.error(ev.BACKGROUND_FAILED, error=exc.what)
                else:
                    self._deferred.clear()
                    if self.report is not None:
                        self.report = self.report.followed_by(later)
                group.cancel_scope.cancel()
        await self.refresh()

    async def _follow_progress(self, stream: AsyncIterable[Progress]) -> None:
        async for progress in stream:
            self._progress[progress.line] = progress
            if progress.state == Outcome.APPLIED:
                self._deferred.discard((progress.line, progress.version))
                await self.refresh()


async def _run_application(
    application: Application,
    scope: Scope,
    startup: Mapping[str, Any],
    receive: Receive,
    send: Send,
) -> None:
    """Runs an application's lifespan. Its startup message was already received."""
    unread = [startup]
    has_sent = False

    async def receive_next() -> Mapping[str, Any]:
        return unread.pop() if unread else await receive()

    async def send_tracked(message: Mapping[str, Any]) -> None:
        nonlocal has_sent
        has_sent = True
        await send(message)

    try:
        await application(scope, receive_next, send_tracked)
    except Exception:
        if has_sent:
            raise
    if not has_sent:  # in ASGI, an application without lifespan support returns or raises
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


def lifespan(
    database: str | Path | MigrationManager,
    *,
    on_pending: OnPending | str = OnPending.MIGRATE,
    background: bool = True,
    then: Inner | None = None,
    logger: Any = None,
    **options: Any,
) -> Lifespan:
    """Returns a lifespan that brings a database to its target before the first request is served.

    Use it as `FastAPI(lifespan=lifespan("./data/app.lancedb"))`, `Starlette(lifespan=...)` or
    `Litestar(lifespan=[...])`. Any number of workers may start: one takes the lease and migrates,
    the others wait. If the migration fails, the server stops with the error. If a worker is killed,
    the next one recovers its migrations.

    Args:
        database: A path or URI, or an existing manager.
        on_pending: What to do at the start if migrations are pending.
        background: Whether to run background migrations while the application serves. They stop
            with the application: calls in flight have their `drain_s` to end, and the next start
            continues the work.
        then: The application's own lifespan. It is entered when the database is at target, and
            left first; the value it yields is yielded.
        logger: A structlog logger; by default `structlog.get_logger("aiomigrate")`.
        **options: Options of the `MigrationManager`, if `database` is a path or URI.

    Raises:
        ConfigurationError: An option is invalid, or options are given besides a manager.
    """
    log = logger or structlog.get_logger("aiomigrate")
    if isinstance(database, MigrationManager):
        if options:
            raise ConfigurationError(
                f"lifespan() got a manager and manager options ({', '.join(sorted(options))}).",
                "Pass the options to the manager.",
            )
        manager = database
    else:
        manager = MigrationManager(database, logger=log, **options)
    return Lifespan(manager, on_pending=on_pending, background=background, then=then, log=log)
