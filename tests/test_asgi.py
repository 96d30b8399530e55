"""At the startup of applications: real servers, several workers, signals, probes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import lancedb
import pyarrow as pa
import pytest
import structlog
from starlette.applications import Starlette

from aiomigrate import HealthState, Migration, MigrationManager, OnPending, op
from aiomigrate.asgi import Lifespan, lifespan
from aiomigrate.errors import (
    AiomigrateError,
    ConfigurationError,
    MigrationFailedError,
    NotAtTargetError,
)
from tests import scenario
from tests.processes import quiet_logger
from tests.tools import manager, tree

T = pa.schema([("id", pa.string()), ("n", pa.int64())])

APP = """
import asyncio, os, time
import lancedb, pyarrow as pa
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from contextlib import asynccontextmanager
from aiomigrate import Migration, op
from aiomigrate.asgi import lifespan

URI = os.environ["DATABASE"]
T = pa.schema([("id", pa.string()), ("n", pa.int64())])

async def seed(ctx):
    await ctx.table().add([{{"id": f"r{{i}}", "n": i}} for i in range(40)])

async def wrong(ctx):
    await ctx.table().add([{{"id": "half", "n": 1}}])
    raise ValueError("wrong on purpose")

def double(batch):
    time.sleep(0.1)
    with open(URI + ".calls", "a") as calls:
        calls.write("x" * len(batch) + "\\n")
    return [2 * n for n in batch["n"].to_pylist()]

migrations = [
    Migration(table="rows", version=1, operations=[op.CreateTable(T), op.Run(seed)]),
    Migration(table="rows", version=2, operations=[op.AddColumns({{"m": pa.int64()}}),
                                                   op.Update(sql={{"m": "n + 1"}})]),
    {more}
]

@asynccontextmanager
async def own(app):
    app.state.rows = await (await lancedb.connect_async(URI)).open_table("rows")
    start.keep_fresh(app.state.rows)
    yield

start = lifespan(URI, migrations=migrations, then=own, lease_ttl=2.0)

async def total(request):
    rows = await request.app.state.rows.query().to_list()
    return JSONResponse({{"pid": os.getpid(), "rows": rows}})

app = Starlette(lifespan=start, routes=[Route("/", total), Mount("/health", start.health)])
"""
BACKGROUND = """Migration(table="rows", version=3, background=True, operations=[
        op.AddColumns({"d": pa.int64()}),
        op.Backfill("d", double, source="n", key="id",
                    pace=op.Pace(batch_rows=2, concurrency=1, chunk_rows=8, drain_s=5.0))]),"""
BROKEN = """Migration(table="rows", version=3, up=wrong),"""


class Server:
    """A running uvicorn.

    Attributes:
        process: Its process; workers are its children.
    """

    def __init__(self, folder: Path, port: int, workers: int) -> None:
        command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)]
        if workers > 1:
            command += ["--workers", str(workers)]
        self._port = port
        self._said = folder / "said"
        with self._said.open("a") as said:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, "DATABASE": str(folder / "db")},
            )

    def get(self, path: str) -> tuple[int, Any]:
        """Returns status and JSON of an answer; 0 while nobody listens."""
        url = f"http://127.0.0.1:{self._port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as exc:
            return exc.code, json.loads(exc.read())
        except OSError:
            return 0, None

    async def answer(self, path: str, *, within_s: float = 30) -> Any:
        """Waits for the first answer; it must be 200."""
        with anyio.fail_after(within_s):
            while True:
                status, told = await anyio.to_thread.run_sync(self.get, path)
                if status:
                    assert status == 200, told
                    return told
                assert self.process.poll() is None, self.said()
                await anyio.sleep(0.02)

    async def ended(self, number: signal.Signals | None, *, within_s: float) -> int:
        """Sends a signal, if any, and waits for the end; returns the exit code."""
        if number is not None:
            self.process.send_signal(number)
        return await anyio.to_thread.run_sync(lambda: self.process.wait(within_s))

    def said(self) -> str:
        """Returns all output."""
        return self._said.read_text()

    def close(self) -> None:
        """Ends it, by force if need be."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def serving(folder: Path, workers: int = 1) -> Iterator[Server]:
    """Runs the application of a folder."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    server = Server(folder, port, workers)
    try:
        yield server
    finally:
        server.close()


async def until(condition: Callable[[], Any]) -> None:
    """Waits until something is so."""
    with anyio.fail_after(30):
        while not await anyio.to_thread.run_sync(condition):  # noqa: ASYNC110 - it is elsewhere
            await anyio.sleep(0.02)


def lines_of(path: Path) -> list[str]:
    """Returns the lines of a file, none where there is no file yet."""
    return path.read_text().split() if path.exists() else []


def write_app(folder: Path, more: str = "") -> Path:
    """Writes the application, with a third migration perhaps."""
    (folder / "app.py").write_text(APP.format(more=more))
    return folder


@pytest.mark.parametrize("database", ["fresh", "old"])
async def test_four_workers_serve_from_the_first_request(tmp_path: Path, database: str) -> None:
    """Started together: each migration is applied once, and no answer ever shows less than that."""
    folder = write_app(tmp_path)
    if database == "old":
        with serving(folder) as server:
            await server.answer("/")
        counts = await scenario.applied_counts(folder / "db")
        assert counts == {("rows", 1): 1, ("rows", 2): 1}
        write_app(folder, 'Migration(table="rows", version=3, operations=[op.DropColumns("n")]),')
    with serving(folder, workers=4) as server:
        answers = [await server.answer("/") for _ in range(30)]
        status, told = server.get("/health/ready")

    columns = {"id", "n", "m"} if database == "fresh" else {"id", "m"}
    for answer in answers:
        assert {frozenset(row) for row in answer["rows"]} == {frozenset(columns)}
        assert sorted(row["m"] for row in answer["rows"]) == list(range(1, 41))
    assert (status, told["state"], told["ready"]) == (200, "ready", True)
    assert set((await scenario.applied_counts(folder / "db")).values()) == {1}


async def test_a_broken_migration_stops_the_server(tmp_path: Path) -> None:
    """It exits with a code, and says which migration, why, and what to do; nothing is left half."""
    folder = write_app(tmp_path, BROKEN)
    with serving(folder) as server:
        code = await server.ended(None, within_s=30)
        said = server.said()

    assert code != 0
    assert "Migration rows 3 failed" in said
    assert "ValueError: wrong on purpose" in said
    assert "Correct the migration and run again." in said
    assert "Application startup failed" in said
    table = await (await lancedb.connect_async(folder / "db")).open_table("rows")
    assert await table.count_rows("id = 'half'") == 0


async def test_a_failure_is_told_in_two_lines(tmp_path: Path) -> None:
    """Around an application instead of in it: no frame of anybody, and nothing is served."""
    folder = write_app(tmp_path, BROKEN)
    with (folder / "app.py").open("a") as script:
        script.write("\napp = start.around(Starlette(routes=[Route('/', total)]))\n")
    with serving(folder) as server:
        code = await server.ended(None, within_s=30)
        said = server.said()
    told = said[said.index("ERROR") :].splitlines()

    assert code != 0
    assert "Traceback" not in said
    assert "Migration rows 3 failed" in told[0]
    assert "Correct the migration and run again." in told[1]
    assert "Application startup failed" in told[2]


@pytest.mark.parametrize("kind", ["starlette", "raises", "returns"])
async def test_any_application_is_migrated_first(database: Path, kind: str) -> None:
    """Whether it knows lifespans or not: at target before it starts, closed after it ended."""
    heard: list[str] = []

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        if kind == "raises":
            raise NotImplementedError(scope["type"])

    @contextlib.asynccontextmanager
    async def own(app: Any) -> AsyncIterator[dict[str, int]]:
        heard.append("own start" if start.report else "too early")
        yield {"answer": 42}
        heard.append("own end")

    inner = Starlette(lifespan=own) if kind == "starlette" else bare
    step = Migration(table="t", version=1, operations=[op.CreateTable(T)])
    start = lifespan(database, migrations=[step], logger=quiet_logger())
    to_send = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Any:
        return to_send.pop(0)

    async def send(message: Any) -> None:
        heard.append(message["type"])

    scope = {"type": "lifespan", "state": {}}
    await start.around(inner)(scope, receive, send)

    there = ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert [h for h in heard if h.startswith("lifespan")] == there
    if kind == "starlette":
        assert heard[0] == "own start"
        assert scope["state"] == {"answer": 42}
    assert start.report is not None
    assert len(start.report.applied) == 1


async def test_a_background_migration_is_drained_and_resumed(tmp_path: Path) -> None:
    """SIGTERM in its midst: the server ends in time, and the next start pays only for the rest."""
    folder = write_app(tmp_path)
    calls = Path(f"{folder / 'db'}.calls")
    with serving(folder) as server:  # of a fresh database nothing is left for the background
        await server.answer("/")
    write_app(folder, BACKGROUND)
    with serving(folder) as server:
        await server.answer("/")
        await until(lambda: len(lines_of(calls)) >= 5)
        told = server.get("/health/ready")[1]
        begun = time.monotonic()
        await server.ended(signal.SIGTERM, within_s=10)
        took_s = time.monotonic() - begun
    with serving(folder) as server:
        await server.answer("/")
        await until(lambda: server.get("/health")[1]["lines"]["rows"] == 3)
        rows = (await server.answer("/"))["rows"]

    assert told["background"]["rows"]["version"] == 3
    assert server.get("/health")[0] == 0
    assert told["ready"]
    assert took_s < 6
    assert sorted(row["d"] for row in rows) == [2 * n for n in range(40)]
    paid = sum(len(line) for line in lines_of(calls))
    assert 40 <= paid <= 44


# ---- without a server ---------------------------------------------------------------------------


async def asked(start: Lifespan, path: str) -> tuple[int, dict[str, Any]]:
    """Asks the health application."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    await start.health({"type": "http", "path": path}, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


async def test_probes_answer_from_memory(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alive and not ready before, ready after, at no call to the store; what failed is told."""
    start = lifespan(database, migrations=scenario.few_migrations(), logger=quiet_logger())
    assert await asked(start, "/health/live") == (200, start.snapshot())
    assert (await asked(start, "/health/ready"))[0] == 503
    async with start(None):
        calls: list[str] = []

        async def call(self: Any, verb: str, *args: Any, **options: Any) -> Any:
            calls.append(verb)

        monkeypatch.setattr("aiomigrate.store.connection.Store.call", call)
        begun = time.monotonic()
        for _ in range(100):
            status, told = await asked(start, "/health/ready")
        took_s = (time.monotonic() - begun) / 100
        assert (status, told["lines"]) == (200, {"notes": 1, "people": 3})
        assert calls == []
        assert took_s < 0.005
        monkeypatch.undo()
    assert (await asked(start, "/health/ready"))[0] == 503

    async def up(ctx: Any) -> None:
        raise ValueError("wrong on purpose")

    wrong = [Migration(table="people", version=9, up=up)]
    failing = lifespan(
        database, migrations=[*scenario.few_migrations(), *wrong], logger=quiet_logger()
    )
    with pytest.raises(MigrationFailedError):
        async with failing(None):
            pass
    assert failing.snapshot()["state"] == "failed"
    assert "wrong on purpose" in failing.snapshot()["background_error"]


async def started_and_stopped(app: Any) -> list[str]:
    """Takes an application through the lifespan of ASGI, as a server does; returns its answers."""
    asked = iter(["lifespan.startup", "lifespan.shutdown"])
    answers: list[str] = []

    async def receive() -> Any:
        return {"type": next(asked)}

    async def send(message: Any) -> None:
        answers.append(message["type"])

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    return answers


@pytest.mark.parametrize("framework", ["starlette", "fastapi", "litestar"])
async def test_frameworks_take_it_as_their_lifespan(database: Path, framework: str) -> None:
    """In one line; the database is at target once the application has started."""
    start = lifespan(database, migrations=scenario.few_migrations(), logger=quiet_logger())
    module = pytest.importorskip(framework)
    app: Any
    if framework == "starlette":
        app = Starlette(lifespan=start)
    elif framework == "fastapi":
        app = module.FastAPI(lifespan=start)
        app.mount("/health", start.health)
    else:
        app = module.Litestar(lifespan=[start])
    assert await started_and_stopped(app) == [
        "lifespan.startup.complete", "lifespan.shutdown.complete",
    ]  # fmt: skip
    async with manager(database, scenario.few_migrations()) as migrating:
        assert (await migrating.get_status()).is_at_target


def test_a_plain_script_awaits_it(tmp_path: Path) -> None:
    """Under `asyncio.run`, as the README has it."""
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "001_t.py").write_text(
        "import pyarrow as pa\nfrom aiomigrate import Migration, op\n"
        "m = Migration(table='t', version=1, operations=["
        "op.CreateTable(pa.schema([('a', pa.int8())]))])\n"
    )
    code = (
        "import asyncio\nfrom aiomigrate import MigrationManager\n"
        "async def main():\n"
        "    async with MigrationManager('data/db') as manager:\n"
        "        report = await manager.initialize()\n"
        "    print(report.lines)\nasyncio.run(main())"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "{'t': 1}" in ran.stdout


async def test_the_applications_own_lifespan_comes_after_and_goes_first(database: Path) -> None:
    """It sees the database at target; what it yields is yielded; handles it gives are fresh."""
    order: list[str] = []

    @contextlib.asynccontextmanager
    async def own(app: Any) -> AsyncIterator[dict[str, int]]:
        names = (await (await lancedb.connect_async(database)).list_tables()).tables
        order.append(f"{type(app).__name__} {sorted(n for n in names if 'migr' not in n)}")
        yield {"answer": 42}
        order.append(start.snapshot()["state"])

    start = lifespan(
        database, migrations=scenario.few_migrations(), then=own, logger=quiet_logger()
    )
    async with start(Starlette()) as state:
        assert state == {"answer": 42}
    assert order == ["Starlette ['notes', 'people']", "stopping"]


async def test_handles_are_brought_to_the_latest_version(database: Path) -> None:
    """One that was opened before sees a column that came while the application served."""
    gate = asyncio.Event()

    async def late(batch: pa.RecordBatch) -> list[int]:
        await gate.wait()
        return [1] * len(batch)

    first = Migration(table="t", version=1, operations=[op.CreateTable(T)])
    async with manager(database, [first]) as migrating:
        await migrating.initialize()
    connection = await lancedb.connect_async(database)
    table = await connection.open_table("t")
    await table.add([{"id": "a", "n": 1}])
    fill = [op.AddColumns({"d": pa.int64()}), op.Backfill("d", late, source="n", key="id")]
    steps = [first, Migration(table="t", version=2, background=True, operations=fill)]
    start = lifespan(database, migrations=steps, logger=quiet_logger())
    async with start(None):
        start.keep_fresh(table)
        gate.set()
        await until(lambda: not start.snapshot()["background"])
        await start.refresh()
        assert "d" in (await table.schema()).names
        assert (await table.query().to_list())[0]["d"] == 1


async def test_a_background_failure_is_told_and_the_application_serves_on(database: Path) -> None:
    """It is logged and shown; nothing is raised into the server."""

    def wrong(batch: pa.RecordBatch) -> list[int]:
        raise ValueError("wrong on purpose")

    async def seed(ctx: Any) -> None:
        await ctx.table().add([{"id": "a", "n": 1}])

    steps = [
        Migration(table="t", version=1, operations=[op.CreateTable(T), op.Run(seed)]),
        Migration(
            table="t",
            version=2,
            background=True,
            operations=[
                op.AddColumns({"d": pa.int64()}),
                op.Backfill("d", wrong, source="n", key="id"),
            ],
        ),
    ]
    async with manager(database, steps[:1]) as migrating:
        await migrating.initialize()
    said = structlog.testing.CapturingLogger()
    start = lifespan(database, migrations=steps, logger=structlog.wrap_logger(said, processors=[]))
    async with start(None):
        await until(lambda: start.snapshot()["background_error"])
        assert (await asked(start, "/"))[0] == 200
    assert "background.failed" in [call.kwargs["event"] for call in said.calls]


def test_a_manager_and_options_of_one_are_a_mistake(database: Path) -> None:
    """Which of both was meant would be a guess."""
    with pytest.raises(ConfigurationError, match="concurrency"):
        lifespan(manager(database, []), concurrency=3)


# ---- those that do not migrate ------------------------------------------------------------------


async def test_who_must_not_migrate_fails_or_waits_and_writes_nothing(database: Path) -> None:
    """At once, or after the wait; the error says what is pending."""
    steps = scenario.few_migrations()
    async with manager(database, steps[:1]) as migrating:
        await migrating.initialize()
    before = tree(database)
    async with manager(database, steps, lease_wait=0.3) as waiting:
        for mode, words in ((OnPending.FAIL, "people: 1 of 3"), (OnPending.WAIT, "after 0.3 s")):
            with pytest.raises(NotAtTargetError, match=words) as caught:
                await waiting.initialize(on_pending=mode)
            assert "aiomigrate upgrade" in caught.value.remedy
    assert tree(database) == before


async def test_who_waits_goes_on_when_another_has_migrated(database: Path) -> None:
    """Even where there was no database at all; work in the background is not waited for."""
    steps = scenario.few_migrations()
    async with (
        manager(database, steps, lease_wait=30) as waiting,
        anyio.create_task_group() as group,
    ):

        async def migrate() -> None:
            await anyio.sleep(0.3)
            async with manager(database, steps) as migrating:
                await migrating.initialize()

        group.start_soon(migrate)
        report = await waiting.initialize(on_pending=OnPending.WAIT)
    assert report.lines == {"notes": 1, "people": 3}
    assert not report.steps


async def test_health_says_why(database: Path) -> None:
    """Nobody at work, another at work, this one, failed, and ready."""
    states: dict[str, Any] = {}

    async def up(ctx: Any) -> None:
        states["own"] = await watching.health()
        if "failed" not in states:
            raise ValueError("wrong on purpose")

    steps = [
        Migration(table="t", version=1, operations=[op.CreateTable(T)]),
        Migration(table="t", version=2, up=up),
    ]
    async with manager(database, steps) as watching, manager(database, steps) as migrating:
        pending = await watching.health()
        with pytest.raises(MigrationFailedError):
            await migrating.initialize()
        states["failed"] = await watching.health()
        await migrating.initialize()
        ready = await watching.health()

    assert pending.state is HealthState.PENDING
    assert states["own"].state is HealthState.RUNNING
    assert states["failed"].state is HealthState.FAILED
    assert "wrong on purpose" in states["failed"].failed["t"]
    assert "t: 1 of 2: ValueError: wrong on purpose" in str(states["failed"])
    assert ready.is_ready
    assert ready.to_dict()["ready"] is True
    assert str(ready).startswith("ready: at target")


async def test_health_says_what_a_start_would_refuse(database: Path) -> None:
    """Scripts that were edited after they were applied, or are older than the database."""
    steps = [
        Migration(table="t", version=1, operations=[op.CreateTable(T)]),
        Migration(table="t", version=2, operations=[op.AddColumns({"x": pa.int8()})]),
    ]
    edited = [steps[0], Migration(table="t", version=2, operations=[op.DropColumns("n")])]
    async with manager(database, steps) as migrating:
        await migrating.initialize()
        before = tree(database)
    for others, why in ((edited, "was edited after"), (steps[:1], "version 2")):
        async with manager(database, others) as migrating:
            health = await migrating.health()
            with pytest.raises(AiomigrateError) as refused:
                await migrating.initialize()
        assert health.state is HealthState.FAILED
        assert why in health.failed["t"]
        assert health.failed["t"] == refused.value.what
        assert "an application would refuse to start" in str(health)
    assert tree(database) == before


async def test_listeners_are_told_and_never_waited_for(database: Path) -> None:
    """Who listens gets every state; who does not read holds nobody up; closing ends the stream."""
    migrating = MigrationManager(
        database, migrations=scenario.few_migrations(), logger=quiet_logger()
    )
    with migrating.progress() as stream, migrating.progress():
        await migrating.initialize()
        await migrating.aclose()
        told = [(p.line, p.version, p.state) async for p in stream]
    assert {key for key in told if key[2] == "applied"} == {
        (m.name, m.version, "applied") for m in scenario.few_migrations()
    }
