"""Logs: stable names, bound facts, one line per finished migration, and never a secret."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pytest
import structlog
from structlog.testing import LogCapture

from aiomigrate import (
    Context,
    Migration,
    MigrationFailedError,
    MigrationManager,
    OnAhead,
    events,
    op,
)
from aiomigrate.errors import ConfigurationError, LedgerUnreadableError, StoreError
from aiomigrate.store.connection import Store
from aiomigrate.store.uri import redact, secrets_of
from tests import predecessor, scenario
from tests.faults import Fault
from tests.processes import initialize, start

NAMES = {v for k, v in vars(events).items() if k.isupper()}
SCHEMA = pa.schema([pa.field("id", pa.string())])


class Log:
    """Every event of managers that are given its logger."""

    def __init__(self) -> None:
        self._capture = LogCapture()
        self.logger = structlog.wrap_logger(
            structlog.PrintLogger(),
            processors=[structlog.contextvars.merge_contextvars, self._capture],
        )

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The events in order, each with its name as `event`."""
        return [dict(entry) for entry in self._capture.entries]

    def of(self, name: str) -> list[dict[str, Any]]:
        """The events of one name."""
        return [entry for entry in self.entries if entry["event"] == name]

    def names(self) -> list[str]:
        """The names in order."""
        return [entry["event"] for entry in self.entries]


@pytest.fixture
def log() -> Log:
    """A fresh one."""
    return Log()


def tables(*names: str) -> list[Migration]:
    """Returns a line of one migration for each name."""
    return [Migration(table=n, version=1, operations=[op.CreateTable(SCHEMA)]) for n in names]


async def fails(_: Context) -> None:
    """Fails."""
    raise ValueError("wrong on purpose")


async def test_names_are_stable() -> None:
    """Whoever filters logs by name may rely on these; a new name is added here on purpose."""
    assert sorted(NAMES) == [
        "background.failed", "background.started", "commit.retried", "commit.unresolved",
        "lease.acquired", "lease.left_to_expire", "lease.lost", "lease.released", "lease.stolen",
        "lease.waiting",
        "ledger.adopted", "ledger.compacted", "ledger.founded", "ledger.healed",
        "ledger.repaired", "ledger.retried",
        "line.ahead", "line.stamped", "line.unknown",
        "progress.failed",
        "run.at_target", "run.failed", "run.finished", "run.planned",
        "savepoints.pruned",
        "step.applied", "step.failed", "step.recovering", "step.restored", "step.rolled_back",
        "step.skipped", "step.started", "step.unresolved", "store.unsafe",
    ]  # fmt: skip


async def test_a_run_is_told_in_events_with_its_facts(database: Path, log: Log) -> None:
    """Every event has a stable name and the run's id; those of migrations also say which."""
    async with MigrationManager(
        database, migrations=scenario.migrations(), logger=log.logger
    ) as manager:
        report = await manager.initialize()

    assert set(log.names()) <= NAMES
    assert {entry.get("run_id") for entry in log.entries} == {report.run_id}
    for entry in log.entries:
        if entry["event"].startswith("step."):
            assert isinstance(entry["table"], str)
            assert isinstance(entry["version"], int)
    assert log.names()[0] == events.RUN_PLANNED
    assert log.of(events.RUN_PLANNED)[0]["migrations"] == 12
    finished = log.of(events.RUN_FINISHED)
    assert len(finished) == 1
    assert finished[0]["applied"] == 12
    assert finished[0]["total_s"] == pytest.approx(report.total_s, abs=1e-3)
    assert log.of(events.LEASE_ACQUIRED)[0]["epoch"] == 1
    assert not [entry for entry in log.entries if entry["log_level"] in ("error", "critical")]


async def test_one_line_for_each_finished_migration(database: Path, log: Log) -> None:
    """`step.applied` comes once per migration, with every duration and count of the report."""
    async with MigrationManager(
        database, migrations=scenario.migrations(), logger=log.logger
    ) as manager:
        report = await manager.initialize()
        await manager.initialize()

    lines = {(e["table"], e["version"]): e for e in log.of(events.STEP_APPLIED)}
    assert len(log.of(events.STEP_APPLIED)) == len(lines) == len(report.applied) == 12
    for step in report.applied:
        entry = lines[step.line, step.version]
        assert entry["log_level"] == "info"
        for name in ("waited_s", "ran_s", "ledger_s"):
            assert entry[name] == pytest.approx(getattr(step, name), abs=1e-3)
        for name in ("description", "rows", "commits", "retries"):
            assert entry[name] == getattr(step, name)
        assert entry["tables"] == {t: f"{b} -> {a}" for t, (b, a) in step.tables.items()}
        json.dumps(entry)


async def test_a_recovered_migration_has_one_line_too(database: Path, log: Log) -> None:
    """After a kill, the run that recovers tells `step.recovering` and `step.applied`, once.

    Those that had announced themselves, or whose success was not in the journal yet, recover too.
    """
    fault = Fault(action="kill", at=2, verb="add", table="people")
    options = {"concurrency": 1, "lease_ttl": 0.5}
    process = start(initialize, str(database), "migrations", fault, options)
    process.join(60)

    async with MigrationManager(
        database, migrations=scenario.migrations(), logger=log.logger, lease_ttl=0.5
    ) as manager:
        report = await manager.initialize()

    keys = [(e["table"], e["version"]) for e in log.of(events.STEP_APPLIED)]
    assert sorted(keys) == sorted((s.line, s.version) for s in report.applied)
    recovered = [(e["table"], e["version"]) for e in log.of(events.STEP_RECOVERING)]
    assert ("people", 2) in recovered
    assert len(set(recovered)) == len(recovered)
    assert set(recovered) <= set(keys)
    assert len(log.of(events.STEP_RESTORED)) == 1
    assert log.of(events.LEASE_STOLEN)[0]["log_level"] == "warning"
    assert str(process.pid) in log.of(events.LEASE_WAITING)[0]["holder"]
    assert set(log.names()) <= NAMES


async def test_a_failure_is_told_once_with_what_was_skipped(database: Path, log: Log) -> None:
    """`step.failed`, `step.skipped` and `run.failed`, no `step.applied` for what was not."""
    given = [
        *tables("t", "other"),
        Migration(table="t", version=2, up=fails),
        Migration(table="t", version=3, operations=[op.AddColumns({"n": pa.int64()})]),
    ]
    async with MigrationManager(database, migrations=given, logger=log.logger) as manager:
        with pytest.raises(MigrationFailedError):
            await manager.initialize()

    applied = [(e["table"], e["version"]) for e in log.of(events.STEP_APPLIED)]
    assert sorted(applied) == [("other", 1), ("t", 1)]
    (failed,) = log.of(events.STEP_FAILED)
    assert (failed["table"], failed["version"]) == ("t", 2)
    assert "ValueError: wrong on purpose" in failed["error"]
    assert failed["ran_s"] >= 0
    (skipped,) = log.of(events.STEP_SKIPPED)
    assert (skipped["table"], skipped["version"]) == ("t", 3)
    (run,) = log.of(events.RUN_FAILED)
    assert (run["applied"], run["failed"], run["skipped"]) == (2, 1, 1)
    assert run["log_level"] == "error"
    assert log.of(events.RUN_FINISHED) == []


async def test_adoption_stamps_and_lines_ahead_are_told(database: Path, log: Log) -> None:
    """What another system wrote, what a person records, and what is newer than the code."""
    await predecessor.build(database, predecessor.State.V1)
    users = [
        Migration(table="users", version=1, up=fails),
        Migration(table="users", version=2, up=fails),
    ]
    async with MigrationManager(database, migrations=users[:1], logger=log.logger) as manager:
        await manager.initialize()
        assert [e["table"] for e in log.of(events.LEDGER_ADOPTED) if "table" in e] == ["users"]
        assert "memos" in {e["table"] for e in log.of(events.LINE_UNKNOWN)}
        assert log.of(events.STEP_STARTED) == []
    async with MigrationManager(database, migrations=users, logger=log.logger) as manager:
        await manager.stamp()
        assert [(e["table"], e["version"]) for e in log.of(events.LINE_STAMPED)] == [("users", 2)]
    async with MigrationManager(
        database, migrations=users[:1], logger=log.logger, on_ahead=OnAhead.WARN
    ) as manager:
        await manager.initialize()
        (ahead,) = log.of(events.LINE_AHEAD)
        assert (ahead["table"], ahead["version"], ahead["target"]) == ("users", 2, 1)

    assert set(log.names()) <= NAMES
    assert all("run_id" in e for e in log.entries)


async def test_at_target_tells_nothing_above_debug(database: Path, log: Log) -> None:
    """A start with nothing to do is one debug event, so that logs of many pods stay quiet."""
    async with MigrationManager(database, migrations=tables("t"), logger=log.logger) as manager:
        await manager.initialize()
        before = len(log.entries)
        await manager.initialize()

    told = log.entries[before:]
    assert [(e["event"], e["log_level"]) for e in told] == [(events.RUN_AT_TARGET, "debug")]


async def test_a_migrations_own_logger_is_bound(database: Path, log: Log) -> None:
    """What a function logs carries the run, the table and the version by itself."""

    async def up(context: Context) -> None:
        """Logs."""
        context.log.info("mine", n=1)

    given = [*tables("t"), Migration(table="t", version=2, up=up)]
    async with MigrationManager(database, migrations=given, logger=log.logger) as manager:
        report = await manager.initialize()

    (mine,) = log.of("mine")
    assert (mine["run_id"], mine["table"], mine["version"], mine["n"]) == (
        report.run_id, "t", 2, 1,
    )  # fmt: skip


async def test_every_process_has_a_run_id_of_its_own(database: Path) -> None:
    """The journal and the logs of different runs can be told apart."""
    ids = []
    for names in (("a",), ("a", "b")):
        async with MigrationManager(
            database, migrations=tables(*names), logger=Log().logger
        ) as manager:
            ids.append((await manager.initialize()).run_id)
            applied = [e for e in await manager.history() if e.kind == "applied"]

    assert [e.run_id for e in applied] == ids
    assert len(set(ids)) == 2


UNCONFIGURED = """
import asyncio, logging, sys
import structlog
import aiomigrate
assert "lancedb" not in sys.modules and "structlog" in sys.modules
import pyarrow as pa
from aiomigrate import Migration, MigrationManager, op
handlers, level = list(logging.root.handlers), logging.root.level
async def main():
    given = [Migration(table="t", version=1,
                       operations=[op.CreateTable(pa.schema([("id", pa.string())]))])]
    async with MigrationManager(sys.argv[1], migrations=given, {logger}) as manager:
        await manager.initialize()
        await manager.validate()
asyncio.run(main())
assert not structlog.is_configured()
assert (handlers, level) == (logging.root.handlers, logging.root.level)
print("unconfigured", file=sys.stderr)
"""


def test_the_library_configures_nothing(database: Path) -> None:
    """Neither structlog nor logging is configured by a run: that is the application's."""
    code = UNCONFIGURED.replace("{logger}", "")
    done = subprocess.run(
        [sys.executable, "-c", code, str(database)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "unconfigured" in done.stderr
    assert "step.applied" in done.stdout  # structlog's own default prints


def test_the_library_prints_nothing_by_itself(database: Path) -> None:
    """With a logger that drops everything there is no output at all."""
    code = UNCONFIGURED.replace(
        "{logger}", "logger=structlog.wrap_logger(structlog.ReturnLogger())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(database)], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == "unconfigured\n"


# ---- secrets ------------------------------------------------------------------------------------

ACCESS, SECRET, TOKEN = "AKIAFAKEFAKEFAKE", "sEcReT/kEy+value", "q-session-token"
OPTIONS = {
    "aws_access_key_id": ACCESS,
    "aws_secret_access_key": SECRET,
    "aws_session_token": TOKEN,
    "aws_endpoint": "http://proxyuser:proxypass@127.0.0.1:1",
    "aws_region": "us-east-1",
    "allow_http": "true",
    "client_max_retries": "0",
    "connect_timeout": "1s",
}
URI = "s3://uriuser:uripass@bucket/database?sig=urisignature"
SECRETS = (ACCESS, SECRET, TOKEN, "proxypass", "uripass", "urisignature")


def shown(error: BaseException) -> str:
    """Returns all that a log or a bug tracker would show of an error, causes and all."""
    seen: list[str] = []
    current: BaseException | None = error
    while current is not None:
        seen += [str(current), repr(current), repr(current.args)]
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )
    return "\n".join([*seen, "".join(traceback.format_exception(error))])


def assert_no_secret(text: str) -> None:
    """None of the credentials is in a text."""
    assert [s for s in SECRETS if s in text] == []


@pytest.mark.parametrize("verb", ["initialize", "history"])
async def test_an_unreachable_store_is_an_error_without_secrets(verb: str, log: Log) -> None:
    """With credentials in the options, what fails shows neither, in text, cause or log."""
    manager = MigrationManager(
        "s3://bucket/database", migrations=tables("t"), storage_options=OPTIONS, logger=log.logger
    )
    async with manager:
        with anyio.fail_after(20), pytest.raises(StoreError) as caught:
            await getattr(manager, verb)()

    assert "127.0.0.1:1" in str(caught.value)  # it is the connection that failed
    assert_no_secret(shown(caught.value))
    assert_no_secret(repr(log.entries))
    assert_no_secret(repr(manager) + str(manager) + manager.database)
    assert "bucket/database" in repr(manager)


async def test_a_migration_that_tells_a_secret_is_scrubbed(database: Path, log: Log) -> None:
    """Credentials in the error of a function: log, error, report and journal hide them."""

    async def careless(_: Context) -> None:
        """Tells."""
        raise ValueError(f"cannot connect with {SECRET} and {TOKEN}")

    given = [*tables("t"), Migration(table="t", version=2, up=careless)]
    manager = MigrationManager(
        database, migrations=given, storage_options=OPTIONS, logger=log.logger
    )
    async with manager:
        with pytest.raises(MigrationFailedError) as caught:
            await manager.initialize()
        history = await manager.history()

    assert "cannot connect with ***" in str(caught.value)
    assert_no_secret(shown(caught.value))
    assert_no_secret(repr(log.entries))
    assert_no_secret(caught.value.report.to_json() + str(caught.value.report))
    assert_no_secret(repr(history))


async def test_an_open_connection_of_a_secret_uri_is_scrubbed_too() -> None:
    """A connection that the application opened is not asked to tell its own URI's secrets."""

    class Connection:
        """Enough of one."""

        uri = URI

        def is_open(self) -> bool:
            return True

        async def get_read_consistency_interval(self) -> None:
            return None

        async def open_table(self, name: str) -> None:
            raise RuntimeError(f"could not reach {URI}/{name}: uripass refused")

        def close(self) -> None:
            pass

    manager = MigrationManager(Connection(), migrations=tables("t"), logger=Log().logger)  # type: ignore[arg-type] - a stand-in
    with pytest.raises(LedgerUnreadableError) as caught:
        await manager.initialize()

    assert_no_secret(shown(caught.value))


@pytest.mark.parametrize("mutates", [True, False])
async def test_an_error_of_the_store_hides_secrets_and_their_cause(
    database: Path, mutates: bool
) -> None:
    """LanceDB's own error, which may hold them, is not shown as the cause then."""
    store = await Store.connect(str(database), OPTIONS)

    async def leak() -> None:
        raise RuntimeError(f"403 for {ACCESS} with {SECRET} at {OPTIONS['aws_endpoint']}")

    with pytest.raises(StoreError) as caught:
        await store.call("read", "t", leak, mutates=mutates)

    assert "***" in str(caught.value)
    assert_no_secret(shown(caught.value))
    store.close()


async def test_an_error_of_the_store_without_secrets_keeps_its_cause(database: Path) -> None:
    """What LanceDB said stays as the cause, for whoever must find out."""
    store = await Store.connect(str(database), OPTIONS)

    with pytest.raises(StoreError) as caught:
        await store.open("nothing")

    assert isinstance(caught.value.__cause__, ValueError)
    store.close()


def test_what_counts_as_a_secret() -> None:
    """Values of options, user information and query of URIs; not endpoints, flags or names."""
    found = secrets_of(URI, OPTIONS)

    assert set(SECRETS) <= set(found) | {"urisignature"}
    assert "sig=urisignature" in found
    assert "true" not in found
    assert not [text for text in found if text.startswith("http")]
    assert redact(URI) == "s3://bucket/database"
    assert redact("./data/app") == "./data/app"


@pytest.mark.parametrize(
    "uri",
    [
        URI,
        "db://user:uripass@name",
        "ftp://user:uripass@host/x?sig=urisignature",
        "s3://uriuser:uripass/urisignature@bucket/db",
        "s3://uriuser:uripass?urisignature@bucket/db",
    ],
)
def test_a_refused_uri_is_told_without_its_secrets(uri: str) -> None:
    """Even the error about the URI itself."""
    with pytest.raises(ConfigurationError) as caught:
        MigrationManager(uri, migrations=[])

    assert_no_secret(shown(caught.value))
