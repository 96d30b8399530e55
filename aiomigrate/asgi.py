"""Migrations at the startup of an ASGI application, and probes that cost nothing.

`lifespan(...)` is what Starlette, FastAPI and Litestar take as a lifespan: it brings the database
to its target before the first request, runs what is marked for the background in a task of its
own, and drains that on shutdown. Its `around` does so for any other framework. Its `health` is an
ASGI application that answers from memory.

Not for looking at a database that others migrate: that is `MigrationManager.health`.
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
from aiomigrate.results import Outcome, Report
from aiomigrate.runs.progress import Progress

App = Any
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Inner = Callable[[App], AbstractAsyncContextManager[Any]]


class Lifespan:
    """A lifespan that migrates first. Made by `lifespan`; one instance serves one application.

    Attributes:
        manager: The manager.
        report: What the start did, `None` before it has ended.
    """

    def __init__(
        self,
        manager: MigrationManager,
        *,
        on_pending: OnPending,
        background: bool,
        then: Inner | None,
        log: Any,
    ) -> None:
        """Does nothing yet. See `lifespan`."""
        self.manager = manager
        self.report: Report | None = None
        self._on_pending = on_pending
        self._background = background
        self._then = then
        self._log = log
        self._state = "starting"
        self._error = ""
        self._left: set[tuple[str, int]] = set()
        self._going: dict[str, Progress] = {}
        self._handles: weakref.WeakSet[Any] = weakref.WeakSet()

    # ---- handles --------------------------------------------------------------------------------

    def keep_fresh(self, *tables: Any) -> None:
        """Remembers open `AsyncTable`s, to bring them to the latest version after migrations.

        A handle stays at the version it was opened at, or first read. Handles that are no longer
        used are forgotten.

        Args:
            *tables: Open `AsyncTable`s.
        """
        self._handles.update(tables)

    async def refresh(self) -> None:
        """Brings the handles given to `keep_fresh` to the latest version now.

        Raises:
            Exception: LanceDB's own, where a table is gone.
        """
        for table in list(self._handles):
            await table.checkout_latest()

    # ---- health ---------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Returns what is known without asking the store, as JSON values.

        `state` is `starting`, `ready`, `failed` (the start failed) or `stopping`. `background`
        tells, by table, what is left there and how far it is; `background_error` why it stopped.
        """
        background = {}
        for line, version in sorted(self._left):
            told = self._going.get(line)
            going = StepProgress(
                line=line,
                version=version,
                done=told.done if told else 0,
                total=told.total if told else None,
            )
            background[line] = {
                "version": version,
                "state": told.state if told else "pending",
                "percent": None if going.percent is None else round(going.percent, 1),
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
        """Answers probes from memory: an ASGI application to mount, say at `/health`.

        `GET .../live` is 200 while the process runs; any other path is 200 once the application
        may serve, and 503 before. The body is `snapshot()` as JSON.
        """
        if scope["type"] != "http":
            return
        told = self.snapshot()
        is_live = str(scope["path"]).rstrip("/").endswith("/live")
        body = json.dumps(told).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        status = 200 if is_live or told["ready"] else 503
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    # ---- at work --------------------------------------------------------------------------------

    def around(self, application: Application) -> Application:
        """Returns an ASGI application that migrates before another one starts.

        In place of the framework's own `lifespan=`: for frameworks that have none, and for a start
        that fails to be told in our two lines alone, without the framework's traceback.

        Args:
            application: Any ASGI application, of any framework; it need not know lifespans.
        """

        async def migrated(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "lifespan":
                await application(scope, receive, send)
                return
            startup = await receive()
            begun = False
            try:
                async with self(application) as state:
                    if isinstance(state, Mapping) and "state" in scope:
                        scope["state"].update(state)
                    begun = True
                    await _live(application, scope, startup, receive, send)
            except AiomigrateError as exc:
                if begun:
                    raise
                told = f"{exc.what}\n{exc.remedy}"
                await send({"type": "lifespan.startup.failed", "message": told})

        return migrated

    @asynccontextmanager
    async def __call__(self, app: App) -> AsyncIterator[Any]:
        """Is the context of an application, as frameworks ask for it.

        Args:
            app: The application, for `then`.

        Yields:
            What `then` yields, `None` without.

        Raises:
            AiomigrateError: The database could not be brought to its target; nothing is served.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.manager)
            await self._start()
            if self._left and self._background and self._on_pending is OnPending.MIGRATE:
                group = await stack.enter_async_context(anyio.create_task_group())
                group.start_soon(self._work)
                stack.callback(group.cancel_scope.cancel)
            inner = None
            if self._then is not None:
                inner = await stack.enter_async_context(self._then(app))
            yield inner
            self._state = "stopping"

    async def _start(self) -> None:
        try:
            self.report = await self.manager.initialize(on_pending=self._on_pending)
        except AiomigrateError as exc:
            self._state, self._error = "failed", exc.what
            raise
        self._left = set(self.report.deferred)
        self._state = "ready"
        await self.refresh()

    async def _work(self) -> None:
        """Does what is left for the background; after a failure the application serves on."""
        with self.manager.progress() as stream:
            async with anyio.create_task_group() as group:
                group.start_soon(self._listen, stream)
                try:
                    later = await self.manager.run_background()
                except AiomigrateError as exc:
                    self._error = exc.what
                    self._log.error(ev.BACKGROUND_FAILED, error=exc.what)
                else:
                    self._left.clear()
                    if self.report is not None:
                        self.report = self.report.followed_by(later)
                group.cancel_scope.cancel()
        await self.refresh()

    async def _listen(self, stream: AsyncIterable[Progress]) -> None:
        async for progress in stream:
            self._going[progress.line] = progress
            if progress.state == Outcome.APPLIED:
                self._left.discard((progress.line, progress.version))
                await self.refresh()


async def _live(
    application: Application,
    scope: Scope,
    startup: Mapping[str, Any],
    receive: Receive,
    send: Send,
) -> None:
    """Lets an application live from its startup, which was received already, to its shutdown."""
    waiting = [startup]
    spoke = False

    async def receiving() -> Mapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    async def sending(message: Mapping[str, Any]) -> None:
        nonlocal spoke
        spoke = True
        await send(message)

    try:
        await application(scope, receiving, sending)
    except Exception:
        if spoke:
            raise
    if not spoke:  # it knows no lifespan, which ASGI has it tell by returning or raising
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


def lifespan(
    database: str | Path | MigrationManager,
    *,
    on_pending: OnPending = OnPending.MIGRATE,
    background: bool = True,
    then: Inner | None = None,
    logger: Any = None,
    **options: Any,
) -> Lifespan:
    """Returns a lifespan that brings a database to its target before the first request is served.

    `FastAPI(lifespan=lifespan("./data/app.lancedb"))`, `Starlette(lifespan=...)`,
    `Litestar(lifespan=[...])`. Start as many workers as you like: one migrates, the others wait.
    Where it fails the server stops with the error; what a killed worker leaves, the next one
    recovers.

    Args:
        database: A path or URI, or a manager that was made already.
        on_pending: What a start does where migrations are pending.
        background: Whether to run, while serving, what is marked for the background. It stops
            when the application does: calls in flight have their `drain_s` to end, and the next
            start goes on.
        then: The application's own lifespan, entered at target and left first; what it yields
            is yielded.
        logger: A structlog logger; by default `structlog.get_logger("aiomigrate")`.
        **options: Of the `MigrationManager`, where a path or URI is given.

    Raises:
        ConfigurationError: An option cannot be.
    """
    log = logger or structlog.get_logger("aiomigrate")
    if isinstance(database, MigrationManager):
        if options:
            raise ConfigurationError(
                f"A manager was given, and options of one ({', '.join(sorted(options))}).",
                "Give the options to the manager.",
            )
        manager = database
    else:
        manager = MigrationManager(database, logger=log, **options)
    return Lifespan(manager, on_pending=on_pending, background=background, then=then, log=log)
