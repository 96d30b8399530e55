"""The command: what it prints, how it exits, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from aiomigrate import settings
from aiomigrate.cli import app, signals
from aiomigrate.cli.command import Call as CommandCall
from aiomigrate.cli.command import Exit, run_verb
from aiomigrate.cli.output import Output
from aiomigrate.cli.progress import Tracker
from aiomigrate.cli.signals import interruption_text
from aiomigrate.ledger.records import Event, Holder, Kind
from aiomigrate.reporting.status import Status
from aiomigrate.runs.progress import Progress
from aiomigrate.text import error_line

VERBS = (
    "upgrade", "rollback", "plan", "status", "validate", "history", "stamp", "prune", "new",
    "unlock", "version", "health", "report",
)  # fmt: skip

CREATE = """\
import pyarrow as pa
from aiomigrate import Migration, op

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False)])
memos = Migration(table="memos", version=1, description="create memos",
                  operations=[op.CreateTable(SCHEMA)])
users = Migration(table="users", version=1, description="create users",
                  operations=[op.CreateTable(SCHEMA)])
"""

ADD = """\
import pyarrow as pa
from aiomigrate import Migration, op

memos = Migration(table="memos", version=2, description="add tags",
                  operations=[op.AddColumns({"tags": pa.string()})])
"""

VECTOR = """\
import pyarrow as pa
from aiomigrate import Migration, op

def create(params):
    size = params["dim"]
    return [op.CreateTable(pa.schema([pa.field(f"v{size:d}", pa.list_(pa.float32(), size))]))]

memos = Migration(table="memos", version=1, operations=create)
"""

SLOW = """\
import anyio
from aiomigrate import Migration

async def up(ctx):
    await ctx.table().add([{"id": "mine"}])
    ctx.progress(1, 2)
    await anyio.sleep(60)

memos = Migration(table="memos", version=2, description="slow", up=up)
users = Migration(table="users", version=2, description="after", up=up, depends_on={"memos": 2})
"""

STUBBORN = """\
import os, signal
import anyio
from aiomigrate import Migration

async def up(ctx):
    os.kill(os.getpid(), signal.SIGINT)
    with anyio.CancelScope(shield=True):
        await anyio.sleep(1)
    await anyio.sleep(60)

memos = Migration(table="memos", version=2, up=up)
"""

FAILS = """\
from aiomigrate import Migration

async def up(ctx):
    raise ValueError("boom\\nand what follows")

memos = Migration(table="memos", version=2, description="fails", up=up)
users = Migration(table="users", version=2, description="after", up=up, depends_on={"memos": 2})
"""


PRINTS = """\
from aiomigrate import Migration

print("imported")

async def up(ctx):
    print("running")

def operations(params):
    from aiomigrate import op
    print("resolving")
    return [op.Run(up)]

memos = Migration(table="memos", version=2, operations=operations)
"""


@dataclass(frozen=True)
class Result:
    """What came of one call."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


Call = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, without settings from outside."""
    for name in [name for name in os.environ if name.startswith("AIOMIGRATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    structlog.reset_defaults()


@pytest.fixture
def call(folder: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the command in this process, in the empty folder."""

    def call(*args: str) -> Result:
        code = app.run(list(args))
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture
def scripts(folder: Path) -> Callable[..., None]:
    """Writes migration files, numbered from 1."""

    def write(*texts: str) -> None:
        (folder / "migrations").mkdir(exist_ok=True)
        for number, text in enumerate(texts, 1):
            (folder / "migrations" / f"{number:03d}_step.py").write_text(text)

    return write


def command(*args: str) -> list[str]:
    """The real command, as a process."""
    return [sys.executable, "-m", "aiomigrate", *args]


def is_two_lines(result: Result) -> bool:
    """Whether stderr says what happened and what to do, and nothing else."""
    lines = result.err.splitlines()
    return len(lines) == 2 and lines[0].startswith("Error: ") and bool(lines[1].strip())


class TestHelp:
    def test_every_verb_has_an_example(self, call: Call) -> None:
        """`--help` of each verb shows how it is called."""
        for verb in VERBS:
            result = call(verb, "--help")

            assert result.code == 0
            assert f"Example: aiomigrate {verb}" in result.out
            # What typer makes of a type says nothing, and of a flag that it takes a value.
            assert re.findall(r"--(?!help)[\w-]+ .*<(?:bool|str|path)>", result.out) == []

    def test_exit_codes_are_documented(self, call: Call) -> None:
        """`--help` lists the verbs and says what the exit codes mean; so does no argument."""
        text = " ".join(call("--help").out.split())

        for verb in VERBS:
            assert f" {verb} " in text
        for said in ("0 at target", "1 failed", "2 usage", "3 not at target", "130"):
            assert said in text
        assert call().code == 0

    def test_does_not_load_lancedb(self) -> None:
        """Help and version answer without importing LanceDB or Arrow."""
        code = (
            "import sys; from aiomigrate.cli.app import run\n"
            "assert run(['upgrade', '--help']) == 0 and run(['version']) == 0\n"
            "assert not {'lancedb', 'pyarrow'} & set(sys.modules)"
        )

        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    @pytest.mark.parametrize("name", ["typer", "rich"])
    def test_without_the_extra(self, name: str) -> None:
        """Without typer or rich the command says in two lines how to install them."""
        code = (
            f"import sys; sys.modules[{name!r}] = None\n"
            "from aiomigrate.__main__ import main; sys.exit(main())"
        )

        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )

        assert result.returncode == 2
        assert f"needs {name}" in result.stderr
        assert "pip install 'aiomigrate[cli]'" in result.stderr
        assert len(result.stderr.splitlines()) == 2

    def test_version(self, call: Call) -> None:
        """`version` names the versions that matter in a report of a defect."""
        from aiomigrate import __version__

        assert f"aiomigrate {__version__} (lancedb " in call("version").out
        assert call("version", "--json").json["aiomigrate"] == __version__


class TestQuickStart:
    def test_new_then_upgrade(self, folder: Path) -> None:
        """In an empty folder, `new` and `upgrade` work as they are, as real commands."""
        for args in (["new", "add tags", "--table", "memos"], ["upgrade"]):
            done = subprocess.run(command(*args), capture_output=True, text=True, check=False)

            assert (done.returncode, done.stderr) == (0, "")

        assert "1 migration on 1 line" in done.stdout
        assert "applied  memos 1  add tags" in done.stdout
        assert "1 applied in" in done.stdout
        assert (folder / "data" / "app.lancedb").is_dir()

    def test_upgrade_shows_plan_progress_and_timings(
        self, call: Call, scripts: Callable[..., None]
    ) -> None:
        """The plan comes first, then each migration, then a row of timings for each."""
        scripts(CREATE, ADD)

        result = call("upgrade")

        assert (result.code, result.err) == (0, "")
        plan, progress, table, summary = re.split(r"\n\n", result.out.strip())
        assert "3 migrations on 2 lines:" in plan
        assert "- add tags string" in plan
        assert progress.index("running  memos 2") < progress.index("applied  memos 2")
        assert table.split("\n")[0].split() == [
            "line", "version", "outcome", "waited", "ran", "ledger", "rows", "commits",
            "table_version",
        ]  # fmt: skip
        assert re.search(r"^memos +2 +applied .* 1 -> 2$", table, re.MULTILINE)
        assert summary.startswith("3 applied in ")

    def test_at_target_is_one_line(self, call: Call, scripts: Callable[..., None]) -> None:
        """A second upgrade says in one line that everything is at target."""
        scripts(CREATE)
        call("upgrade")

        result = call("upgrade")

        assert (result.code, result.err) == (0, "")
        assert result.out.count("\n") == 1
        assert "at target" in result.out

    def test_new_names_the_file(self, call: Call, folder: Path) -> None:
        """`new` says which file it wrote and what to do with it."""
        result = call("new", "add tags to memos")

        assert "migrations/001_add_tags_to_memos.py: version 1 of 'memos'" in result.out
        assert call("new", "more", "--json").json == {
            "path": "migrations/002_more.py",
            "version": 2,
            "table": "app",
        }
        assert len(list((folder / "migrations").iterdir())) == 2


class TestExitCodes:
    def test_check(self, call: Call, scripts: Callable[..., None]) -> None:
        """With --check plan, status and validate exit with 3 until the database is at target."""
        scripts(CREATE)
        verbs = ("plan", "status", "validate")

        assert [call(verb).code for verb in verbs] == [0, 0, 0]
        assert [call(verb, "--check").code for verb in verbs] == [3, 3, 3]
        assert call("upgrade").code == 0
        assert [call(verb, "--check").code for verb in verbs] == [0, 0, 0]

    def test_looking_makes_no_database(
        self, call: Call, scripts: Callable[..., None], folder: Path
    ) -> None:
        """Looking at a missing database does not make one, nor does a dry run."""
        scripts(CREATE)

        for args in (["plan"], ["status"], ["validate"], ["history"], ["unlock"]):
            assert call(*args).code == 0
        dry = call("upgrade", "--dry-run")

        assert (dry.code, dry.out) == (0, call("plan").out)
        assert not (folder / "data").exists()

    def test_validate_fails_on_more_than_pending(
        self, call: Call, scripts: Callable[..., None], folder: Path
    ) -> None:
        """An edited script makes validate exit with 1, with or without --check."""
        scripts(CREATE)
        call("upgrade")
        scripts(CREATE.replace('"id"', '"key"'))

        result = call("validate")

        assert result.code == 1
        assert "error: " in result.out
        assert call("validate", "--check", "--json").json["valid"] is False

    def test_failure(self, call: Call, scripts: Callable[..., None]) -> None:
        """A failed migration exits with 1: what happened, what was done, where the traceback is."""
        scripts(CREATE, FAILS)

        result = call("upgrade")

        assert result.code == 1
        assert is_two_lines(result)
        assert "ValueError: boom" in result.err
        assert "2 applied, 1 failed, 1 skipped in" in result.out
        assert "skipped  users 2: memos 2 was not applied." in result.out
        assert "aiomigrate history memos -v" in result.out
        assert "Traceback" not in result.out + result.err
        assert 'raise ValueError("boom' in call("history", "memos", "-v").out

    def test_verbose_failure_has_the_traceback(
        self, call: Call, scripts: Callable[..., None]
    ) -> None:
        """With -v a failed migration shows its own traceback, and debug logs."""
        scripts(CREATE, FAILS)

        result = call("upgrade", "-v")

        assert result.code == 1
        assert 'raise ValueError("boom' in result.err
        assert "step.started" in result.err

    @pytest.mark.parametrize(
        "args",
        [
            ["nonsense"],
            ["upgrade", "--nonsense"],
            ["upgrade", "--to", "x"],
            ["upgrade", "--concurrency", "many"],
            ["upgrade", "--concurrency", "0"],
            ["upgrade", "--on-ahead", "ignore"],
            ["upgrade", "--uri", "db://cloud"],
            ["upgrade", "--uri", "word"],
            ["upgrade", "-x", "novalue"],
            ["upgrade"],  # there is no folder of migrations
            ["new"],
            ["new", "../escape"],
            ["stamp"],
        ],
    )
    def test_usage(self, call: Call, folder: Path, args: Sequence[str]) -> None:
        """Wrong usage and configuration exit with 2, in two lines, and write nothing."""
        result = call(*args)

        assert result.code == 2
        assert is_two_lines(result)
        assert result.out == ""
        assert list(folder.iterdir()) == []

    def test_plan_error(self, call: Call, scripts: Callable[..., None]) -> None:
        """What does not fit the database exits with 1, in two lines."""
        scripts(CREATE)

        result = call("upgrade", "--table", "memo")

        assert result.code == 1
        assert is_two_lines(result)
        assert "Did you mean 'memos'?" in result.err

    def test_defect_is_no_traceback(
        self, call: Call, scripts: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An unexpected error is told in two lines too; -v shows where it came from."""
        from aiomigrate import MigrationManager

        async def broken(self: object) -> None:
            raise RuntimeError("unheard of")

        monkeypatch.setattr(MigrationManager, "get_status", broken)
        scripts(CREATE)

        result, verbose = call("status"), call("status", "-v")

        assert (result.code, verbose.code) == (1, 1)
        assert is_two_lines(result)
        assert "RuntimeError: unheard of" in result.err
        assert "Traceback" in verbose.err


class TestVerbs:
    def test_targets(self, call: Call, scripts: Callable[..., None]) -> None:
        """--to and --table choose how far, and which lines."""
        scripts(CREATE, ADD)

        assert call("upgrade", "--table", "memos", "--to", "1").code == 0
        assert self._versions(call) == {"memos": 1, "users": 0}
        assert call("upgrade", "--to", "memos=2", "--to", "users=1").code == 0
        assert self._versions(call) == {"memos": 2, "users": 1}

    def _versions(self, call: Call) -> dict[str, int]:
        lines = call("status", "--json").json["lines"]
        return {line: status["current"] for line, status in lines.items()}

    def test_stamp(self, call: Call, scripts: Callable[..., None]) -> None:
        """`stamp` records versions without running anything."""
        scripts(CREATE, ADD)

        assert "memos is recorded at version 1." in call("stamp", "--table=memos", "--to=1").out
        assert call("stamp", "--to", "latest", "--json").json == {
            "stamped": {"memos": 2, "users": 1}
        }

    def test_at_target_but_for_the_background(
        self, call: Call, scripts: Callable[..., None]
    ) -> None:
        """What was left out is named where there is nothing else to do."""
        scripts(CREATE)
        call("upgrade")
        scripts(CREATE, ADD.replace("version=2,", "version=2, background=True,"))

        result = call("upgrade", "--skip-background")

        assert "at target except for background migrations (memos 2)" in result.out
        assert result.out.count("\n") == 1

    def test_history(self, call: Call, scripts: Callable[..., None]) -> None:
        """`history` is a table with times and versions, of one line if asked."""
        scripts(CREATE, ADD)
        call("upgrade")

        everything, users = call("history").out, call("history", "users").out

        assert re.search(
            r"Z  memos +2  applied +add tags .* memos 1 -> 2$", everything, re.MULTILINE
        )
        assert "memos" not in users
        nobody, elsewhere = call("history", "nobody").out, call("history", "--uri", "./typo").out
        assert "Nothing is recorded for 'nobody' in " in nobody
        assert "Nothing is recorded yet in " in elsewhere
        assert elsewhere.endswith("typo.\n")

    def test_unlock_when_free(self, call: Call, scripts: Callable[..., None]) -> None:
        """`unlock` on a free lease says so and succeeds; it needs no migrations."""
        assert call("unlock", "--uri", "./db").out.endswith("db is free.\n")

    def test_params(self, call: Call, scripts: Callable[..., None]) -> None:
        """-x reaches operations that are functions of the parameters, numbers as numbers."""
        scripts(VECTOR)

        missing, given = call("plan"), call("plan", "-x", "dim=7", "--json")

        assert missing.code == 1
        assert is_two_lines(missing)
        assert "(-x key=value)" in missing.err
        assert given.json["steps"][0]["operations"][0]["does"] == "create table (v7)"

    def test_settings_of_file_and_environment(
        self, call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """pyproject.toml is read from a parent folder; the environment and options win over it."""
        (folder / "pyproject.toml").write_text(
            "[tool.aiomigrate]\nuri = 'db'\nmigrations = 'steps'\nledger = 'ours'\n"
        )
        (folder / "steps").mkdir()
        (folder / "steps" / "001_create.py").write_text(CREATE)
        (folder / "below").mkdir()
        monkeypatch.chdir(folder / "below")
        monkeypatch.setenv("AIOMIGRATE_URI", "./env")

        assert call("upgrade").code == 0
        assert call("upgrade", "--uri", "./option").code == 0
        monkeypatch.delenv("AIOMIGRATE_URI")
        assert call("upgrade").code == 0

        for path in ("below/env", "below/option", "db"):
            assert (folder / path / "ours.lance").is_dir()

    def test_on_ahead(self, call: Call, scripts: Callable[..., None], folder: Path) -> None:
        """A newer database is an error, or with --on-ahead warn a warning."""
        scripts(CREATE, ADD)
        call("upgrade")
        (folder / "migrations" / "002_step.py").unlink()

        refused, warned = call("upgrade"), call("upgrade", "--on-ahead", "warn")

        assert refused.code == 1
        assert "newer than this code" in refused.err
        assert (warned.code, warned.err) == (0, "")
        assert "warning: memos is at version 2, above its newest script 1" in warned.out


class TestJson:
    def test_one_document_each(self, call: Call, scripts: Callable[..., None]) -> None:
        """With --json stdout is exactly one JSON document, for every verb."""
        scripts(CREATE)

        assert call("plan", "--json").json["at_target"] is False
        assert call("upgrade", "--json").json["applied"] == 2
        assert call("upgrade", "--json").json["steps"] == []
        assert call("status", "--json").json["at_target"] is True
        assert call("validate", "--json").json["valid"] is True
        events = call("history", "--json").json
        assert sorted(e["line"] for e in events if e["kind"] == "applied") == ["memos", "users"]
        assert call("unlock", "--json").json == {"removed": None}

    def test_what_scripts_print_goes_to_stderr(
        self, call: Call, scripts: Callable[..., None]
    ) -> None:
        """Imported, resolved or run: stdout stays one document; without --json it is theirs."""
        scripts(CREATE, PRINTS)
        uris = {"upgrade": "a", "stamp": "b"}

        for verb in ("plan", "status", "validate", "upgrade", "stamp"):
            extra = ("--to", "latest") if verb == "stamp" else ()
            result = call(verb, "--json", "--uri", f"./{uris.get(verb, 'c')}", *extra)

            assert result.json
            assert "imported\nresolving\n" in result.err
            assert ("running\n" in result.err) == (verb == "upgrade")
        assert "imported" in call("plan").out

    def test_failure(self, call: Call, scripts: Callable[..., None]) -> None:
        """A failure is a document too: the report, and the error with its type and place."""
        scripts(CREATE, FAILS)

        result = call("upgrade", "--json")

        assert result.code == 1
        assert (result.json["applied"], result.json["failed"]) == (2, 1)
        assert result.json["error"]["type"] == "MigrationFailedError"
        assert (result.json["error"]["line"], result.json["error"]["version"]) == ("memos", 2)
        assert result.err.splitlines()[-2].startswith("Error: ")

    def test_usage(self, call: Call) -> None:
        """A configuration that cannot be is a document too, and so is a mistyped option or verb."""
        result = call("status", "--json", "--uri", "db://cloud")

        assert result.json["error"]["type"] == "UnsupportedDatabaseError"
        for args in (["plan", "--json", "--too"], ["plam", "--json"], ["new", "--json"]):
            mistyped = call(*args)
            assert (mistyped.code, mistyped.json["error"]["type"]) == (2, "UsageError")
        both = call("report", "--json", "--format", "trace")
        assert (both.code, both.json["error"]["type"]) == (2, "ConfigurationError")

    def test_logs_are_lines_on_stderr(self, call: Call, scripts: Callable[..., None]) -> None:
        """Elsewhere than on a terminal each log is a JSON object; one tells of each migration."""
        scripts(CREATE)

        result = call("upgrade", "--json")

        logs = [json.loads(line) for line in result.err.splitlines()]
        assert sorted(e["table"] for e in logs if e["event"] == "step.applied") == [
            "memos",
            "users",
        ]
        assert len({e["run_id"] for e in logs}) == 1


class TestPipes:
    @pytest.mark.parametrize("options", [(), ("--json",)])
    def test_without_a_reader(
        self, folder: Path, scripts: Callable[..., None], options: Any
    ) -> None:
        """A reader that goes, such as `head -1`, is no reason to fail: what was asked is done."""
        scripts(CREATE)
        reader, writer = os.pipe()
        os.close(reader)

        done = subprocess.run(
            command("upgrade", *options), stdout=writer, stderr=writer, check=False
        )

        os.close(writer)
        assert done.returncode == 0
        again = subprocess.run(command("status", "--check"), stdout=subprocess.DEVNULL, check=False)
        assert again.returncode == 0

    def test_without_the_characters(self, folder: Path, scripts: Callable[..., None]) -> None:
        """Where stdout is ASCII, what it cannot hold is escaped, in JSON as JSON has it."""
        scripts(CREATE.replace("create memos", "naïve"))
        env = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}

        def shown(*args: str) -> str:
            done = subprocess.run(
                command(*args), env=env, capture_output=True, text=True, check=True
            )
            return done.stdout

        assert "na\\xefve" in shown("plan")
        steps = json.loads(shown("plan", "--json"))["steps"]
        assert [step["description"] for step in steps] == ["naïve", "create users"]

    def test_no_colours(self, folder: Path, scripts: Callable[..., None]) -> None:
        """What is written to a file has none, in CI's own environment neither."""
        scripts(CREATE)
        env = {**os.environ, "CI": "true", "GITHUB_ACTIONS": "true"}

        for args in (["--help"], ["upgrade", "--help"], ["plan"], ["upgrade"], ["report"]):
            done = subprocess.run(command(*args), env=env, capture_output=True, check=True)

            assert b"\x1b" not in done.stdout + done.stderr


class TestSecrets:
    def test_never_shown(self, call: Call, scripts: Callable[..., None]) -> None:
        """No storage option reaches any output."""
        scripts(CREATE)
        options = {
            "aws_access_key_id": "AKIAHUNTER",
            "aws_secret_access_key": "hunter2hunter2",
            "region": "hunter-region",
            "endpoint": "http://127.0.0.1:9",  # nothing listens there
            "allow_http": "true",
            "client_max_retries": "0",
            "connect_timeout": "1s",
            "timeout": "1s",
        }
        pairs = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]

        result = call("status", "-v", "--json", "--uri", "s3://bucket/db", *pairs)

        assert result.code == 1
        assert "bucket" in result.err
        assert "bucket" in result.json["error"]["what"]
        assert not re.search("hunter", result.out + result.err, re.IGNORECASE)

    @pytest.mark.parametrize("secret", ["hunter2", "hun/ter2", "hun?ter2", "hun#ter2"])
    def test_in_a_uri_are_refused(
        self, call: Call, scripts: Callable[..., None], folder: Path, secret: str
    ) -> None:
        """No folder is made of such a URI, and it is not repeated."""
        scripts(CREATE)
        before = sorted(folder.iterdir())

        result = call("upgrade", "-v", "--json", "--uri", f"s3://AKIA:{secret}@bucket/db")

        assert result.code == 2
        assert "storage_options" in result.json["error"]["remedy"]
        assert not re.search("hun|ter2|AKIA", result.out + result.err)
        assert sorted(folder.iterdir()) == before

    def test_scrubbed_from_everything(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Whatever is printed passes one place that takes secrets out, escaped ones too."""
        output = Output(as_json=False, verbose=True, secrets=('se"cret',))

        output.say('say se"cret')
        output.note('note se"cret')
        output.error('what se"cret', 'remedy se"cret', trace=ValueError('se"cret'))
        Output(as_json=True, verbose=True, secrets=('se"cret',)).document(lambda: ['se"cret'])

        out, err = capsys.readouterr()
        assert "cret" not in out + err
        assert out.count("***") == 2


class TestSignals:
    def test_says_what_state_things_are_in(self, call: Call, scripts: Callable[..., None]) -> None:
        """Ctrl-C and SIGTERM undo what was in hand, free the lease, and say so; one goes on."""
        scripts(CREATE, SLOW)
        expected = {signal.SIGINT: 130, signal.SIGTERM: 143}
        running = {number: self._start(number.name) for number in expected}

        for number, code in expected.items():
            result = self._interrupt(running[number], number)

            assert result.code == code
            what, remedy = result.err.splitlines()
            assert "memos 1" in what.partition("Applied: ")[2].partition(".")[0]
            assert "memos 2 was running: it was undone." in what
            assert "Not started: users 2." in what
            assert "The lease is free." in what
            assert "aiomigrate upgrade" in remedy
            status = call("status", "--json", "--uri", f"./{number.name}").json
            assert status["holder"] is None
            assert status["lines"]["memos"]["current"] == 1
        scripts(CREATE, SLOW.replace("60", "0"))
        assert call("upgrade", "--uri", "./SIGINT").code == 0
        assert self._rows("./SIGINT", "memos") == 1

    def test_an_impatient_user_gets_the_same(self, scripts: Callable[..., None]) -> None:
        """Ctrl-C again and again spoils neither the undoing nor the explanation of it."""
        scripts(CREATE, SLOW)
        args = command("upgrade", "--json", "--uri", "./db")
        with subprocess.Popen(
            args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if '"step.applied"' in line and '"memos"' in line:
                    break
            _wait_for(lambda: self._rows("./db", "memos") == 1)
            for _ in range(5):
                process.send_signal(signal.SIGINT)
                time.sleep(0.01)
            out, err = process.communicate(timeout=30)

        assert process.returncode == 130
        told = json.loads(out)
        assert told["interrupted"] == "SIGINT"
        assert "memos 2 was running: it was undone." in told["what"]
        assert "The lease is free." in told["what"]
        assert "Traceback" not in err
        assert self._rows("./db", "memos") == 0

    def test_says_that_it_is_stopping(
        self, call: Call, scripts: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where stopping takes a while, the first Ctrl-C is answered before it is over."""
        scripts(CREATE, STUBBORN)
        monkeypatch.setattr(signals, "_STOPPING_NOTE_AFTER_S", 0.1)

        result = call("upgrade")

        assert result.code == 130
        stopping, what, _ = result.err.splitlines()
        assert stopping == "Stopping: running migrations are being finished or undone."
        assert what.startswith("Interrupted. ")

    def _start(self, name: str) -> subprocess.Popen[str]:
        args = command("upgrade", "--uri", f"./{name}")
        return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _interrupt(self, process: subprocess.Popen[str], number: signal.Signals) -> Result:
        """Sends a signal once the row of the slow migration was committed."""
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("running  memos 2"):
                break
        _wait_for(lambda: self._rows(f"./{number.name}", "memos") == 1)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        return Result(process.returncode, out, err)

    def _rows(self, uri: str, table: str) -> int:
        import lancedb

        return int(lancedb.connect(uri).open_table(table).count_rows())


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


PROCESS = ("host", 7)


def progress(line: str, version: int, state: str) -> Progress:
    """How far one migration is."""
    return Progress(line=line, version=version, state=state)


def event(kind: Kind, epoch: int = 2, pid: int = 7, **facts: Any) -> Event:
    """A journal entry of memos 2."""
    import datetime as dt

    at = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
    return Event(
        lease="run", epoch=epoch, seq=1, at=at, kind=kind, line="memos", version=2, pid=pid,
        host="host", **facts,
    )  # fmt: skip


class TestInterruption:
    """What an interruption left, in words."""

    def _told(self, events: Sequence[Event], *, holder: Holder | None = None) -> str:
        tracker = Tracker(Output(as_json=True, verbose=False))
        tracker(progress("memos", 2, "running"))
        status = Status(database="x", exists=True, holder=holder)
        return interruption_text(tracker, events, status, process=PROCESS)

    def test_undone(self) -> None:
        """A migration whose tables were restored was undone."""
        told = self._told([event(Kind.STARTED), event(Kind.RESTORED), event(Kind.FAILED)])

        assert told == "memos 2 was running: it was undone. The lease is free."

    def test_nothing_had_happened(self) -> None:
        """A migration that had committed nothing had changed nothing."""
        told = self._told([event(Kind.FAILED, tables={"memos": {"before": 1, "after": 1}})])

        assert "it had changed nothing" in told
        assert "it had changed nothing" in self._told([])

    def test_resumed(self) -> None:
        """A recovery that was interrupted again is gone on with by the next run."""
        told = self._told([event(Kind.FAILED, tables={"memos": {"before": 1, "after": 2}})])

        assert "the next run continues it" in told

    def test_foreign_commit(self) -> None:
        """What could not be undone is told with the reason."""
        told = self._told([event(Kind.FAILED, detail={"unresolved": "see versions 3 to 4"})])

        assert "it could not be undone (see versions 3 to 4)" in told

    def test_unresolved_commit(self) -> None:
        """A lease left behind on purpose is said to expire by itself."""
        told = self._told([event(Kind.STARTED)], holder=Holder(host="host", pid=7))

        assert "the next run checks how far it got" in told
        assert "the lease was kept until it expires" in told

    def test_older_runs_do_not_count(self) -> None:
        """Events of an older run are not taken for this one's, even with the same process id."""
        old = event(Kind.RESTORED, epoch=1)
        told = self._told([old, event(Kind.APPLIED, pid=9), event(Kind.STARTED)])

        assert "the next run recovers it" in told

    def test_waiting_for_another(self) -> None:
        """Interrupted while waiting, it says that nothing was begun and who holds the lease."""
        tracker = Tracker(Output(as_json=True, verbose=False))
        status = Status(database="x", exists=True, holder=Holder(host="other", pid=7))

        told = interruption_text(tracker, [], status, process=PROCESS)

        assert told.startswith("No migration was started. The lease is held by process 7 on other")

    def test_unreadable(self) -> None:
        """When the database cannot be read afterwards, that is said."""
        tracker = Tracker(Output(as_json=True, verbose=False))

        assert "could not be read" in interruption_text(tracker, [], None, process=PROCESS)

    @pytest.mark.parametrize("begun", [False, True])
    def test_does_not_deny_what_was_begun(
        self, folder: Path, capsys: pytest.CaptureFixture[str], begun: bool
    ) -> None:
        """Where only Python's own Ctrl-C is left, it says so too, as a document with --json."""

        def body(call: CommandCall) -> Exit:
            if begun:
                call.tracker(progress("memos", 2, "running"))
            raise KeyboardInterrupt

        code = run_verb(body, {"as_json": True, "verbose": False}, {})

        out, err = capsys.readouterr()
        assert code == Exit.INTERRUPTED
        assert ("before any migration started" in json.loads(out)["what"]) is not begun
        assert ("aiomigrate status" in err) is begun


@dataclass(frozen=True)
class Terminal:
    """The command on a terminal of its own."""

    process: subprocess.Popen[bytes]
    leader: int

    @classmethod
    def start(cls, *args: str, **env: str) -> Terminal:
        """Starts it."""
        leader, follower = pty.openpty()
        clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "CI")}
        process = subprocess.Popen(
            command(*args),
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**clean, "TERM": "xterm", "COLUMNS": "120", "LINES": "40", **env},
        )
        os.close(follower)
        return cls(process, leader)

    def shown(self) -> str:
        """Returns everything it showed, when it has ended."""
        found = b""
        while True:
            try:
                chunk = os.read(self.leader, 65536)
            except OSError:  # on Linux: the other side has closed
                chunk = b""
            if not chunk:
                break
            found += chunk
        os.close(self.leader)
        self.process.wait()
        return found.decode()


class TestTerminal:
    def test_live_view(self, folder: Path, scripts: Callable[..., None]) -> None:
        """On a terminal: live progress, colour unless NO_COLOR, each failure told once."""
        scripts(CREATE, FAILS)
        plain_terminal = Terminal.start("upgrade", "--uri", "./plain", NO_COLOR="1")

        shown = Terminal.start("upgrade").shown()
        plain = plain_terminal.shown()

        for text in (shown, plain):
            assert "migrations" in text
            assert "step.failed" not in text
            assert text.count("Error: Migration memos 2 failed") == 1
        assert "\x1b[31mfailed" in shown
        assert "\x1b[32mapplied" in shown
        assert not re.search(r"\x1b\[(?:[\d;]*;)?[39]\d", plain)


def test_a_narrow_terminal(folder: Path, scripts: Callable[..., None]) -> None:
    """It is shown fewer columns of the timings, rather than nothing of the lines' names."""
    scripts(CREATE)

    shown = Terminal.start("upgrade", NO_COLOR="1", COLUMNS="44").shown()

    shown = re.sub(r"\x1b\[[\d;?]*\w", "", shown)
    assert re.search(r" line +version +outcome +ran\b", shown)
    assert re.search(r" memos +1 +applied ", shown)


TRACE = "Traceback (most recent call last):"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (None, ""),
        ("boom\nmore", "boom"),
        (f"{TRACE}\n  File x\nValueError: boom\n", "ValueError: boom"),
        (f"{TRACE}\n  File x\nValueError: boom\nmore", "ValueError: boom"),
        (
            f"{TRACE}\n  File x\nKeyError: 1\n\nThen:\n\n{TRACE}\n  File y\nOSError: a\nb",
            "OSError: a",
        ),
    ],
)
def test_error_line(error: str | None, line: str) -> None:
    """History shows the telling line of an error."""
    assert error_line(error) == line


DROP = """\
from aiomigrate import Migration, op

memos = Migration(table="memos", version=3, operations=[op.DropColumns("tags")])
"""


def test_the_folder_of_a_table_is_no_database(call: Call, scripts: Callable[..., None]) -> None:
    """A URI one folder too deep is told, with the right one, before anything is made in it."""
    scripts(CREATE)
    call("upgrade")
    deep = Path(call("status", "--json").json["database"]) / "memos.lance"
    inside = sorted(deep.iterdir())

    result = call("upgrade", "--uri", str(deep))

    assert result.code == 2
    assert f"is a table, not a database. Use the folder that holds it: {deep.parent}" in (
        " ".join(result.err.split())
    )
    assert sorted(deep.iterdir()) == inside


class TestRollback:
    def test_undoes_what_is_above(self, call: Call, scripts: Callable[..., None]) -> None:
        """It shows the plan and the timings; a later upgrade applies it again."""
        scripts(CREATE, ADD, DROP)
        assert call("upgrade").code == 0

        shown = call("rollback", "memos", "--dry-run")
        result = call("rollback", "memos", "--to", "1", "--yes")

        assert shown.code == 0
        assert "return memos to table_version" in shown.out
        assert call("status", "--check").code == 3
        assert result.code == 0
        assert "Undo 2 migrations on 1 line" in result.out
        assert "2 rolled back" in result.out
        assert "2 applied" in call("upgrade").out

    def test_json_is_one_document(self, call: Call, scripts: Callable[..., None]) -> None:
        """Plan and report are JSON for programs."""
        scripts(CREATE, ADD)
        call("upgrade")

        plan = call("rollback", "memos", "--dry-run", "--json").json
        report = call("rollback", "memos", "--yes", "--json").json

        assert plan["direction"] == "rollback"
        assert plan["steps"][0]["undo"]["does"] == ["memos: drop tags"]
        assert [step["outcome"] for step in report["steps"]] == ["rolled back"]

    def test_a_bare_version_beside_others_is_that_of_line(
        self, call: Call, scripts: Callable[..., None]
    ) -> None:
        """`rollback memos --to 1 --to users=0` reads as it is meant."""
        scripts(CREATE, ADD)
        call("upgrade")

        result = call("rollback", "memos", "--to", "1", "--to", "memos=1", "--yes")

        assert "1 rolled back" in result.out

    def test_asks_first(self, call: Call, scripts: Callable[..., None]) -> None:
        """Where there is nobody to ask, it says how to do without, and changes nothing."""
        scripts(CREATE)
        call("upgrade")

        result = call("rollback", "memos")

        assert result.code == 2
        assert "--yes" in result.err
        assert call("status", "--check").code == 0

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((), "rollback needs the line to undo"),
            (("memos", "--to", "users=1"), "--to does not include the line memos"),
            (("memo", "--to", "1"), "Did you mean 'memos'"),
            (("memos", "--to", "x"), "'x' is not a version"),
            (("memos", "--to", "1", "--to", "user=0"), "Did you mean"),
        ],
    )
    def test_mistakes(
        self, call: Call, scripts: Callable[..., None], arguments: Sequence[str], said: str
    ) -> None:
        """Each is told with what to do."""
        scripts(CREATE)
        call("upgrade")

        result = call("rollback", *arguments)

        assert result.code != 0
        assert said in result.err

    def test_prune(self, call: Call, scripts: Callable[..., None]) -> None:
        """What was kept of a destructive step is deleted, and said; then there is nothing."""
        scripts(CREATE, ADD, DROP)
        call("upgrade")

        first, second = call("prune"), call("prune", "--json")

        assert first.out == "memos 3: savepoint of memos deleted.\n"
        assert second.json == {"pruned": []}

    def test_destructive_steps_can_be_refused(
        self, call: Call, scripts: Callable[..., None]
    ) -> None:
        """The policy is an option like others; the error says how to allow it."""
        scripts(CREATE, ADD, DROP)

        refused = call("upgrade", "--on-destructive", "refuse")
        allowed = call("upgrade", "--allow-destructive")

        assert refused.code == 1
        assert "--allow-destructive" in refused.err
        assert allowed.code == 0
        assert call("prune").out == "No savepoint to delete.\n"


def test_health_by_exit_code(call: Call, scripts: Callable[..., None]) -> None:
    """3 before, 0 at target, 1 when the last attempt failed, and why; JSON tells the same."""
    scripts(CREATE)
    before = call("health")
    call("upgrade")
    ready, told = call("health"), call("health", "--json").json
    scripts(CREATE, FAILS)
    call("upgrade")
    failed = call("health")

    assert (before.code, ready.code, failed.code) == (3, 0, 1)
    assert "pending: not at target, and no process is migrating" in before.out
    assert ready.out.startswith("ready: at target")
    assert (told["state"], told["ready"]) == ("ready", True)
    assert "ValueError: boom" in failed.out
    assert before.out.endswith("\nRun `aiomigrate upgrade`.\n")
    assert "`aiomigrate history -v`" in failed.out.splitlines()[-1]


def test_shells_complete_verbs(folder: Path) -> None:
    """As a shell asks for it."""
    env = {**os.environ, "_AIOMIGRATE_COMPLETE": "complete_bash", "COMP_CWORD": "1",
           "COMP_WORDS": "aiomigrate he"}  # fmt: skip
    script = Path(sys.executable).with_name("aiomigrate")
    done = subprocess.run([script], env=env, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["health"]


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def documented_keys() -> dict[str, set[str]]:
    """The keys of each JSON document as README's table has them, less what is explained."""
    section = README.partition("### The JSON documents")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE)
    return {
        name.replace("`", ""): set(re.findall(r"`(\w+)`", re.sub(r"\([^()]*\)", "", keys)))
        for name, keys in rows
    }


class TestDocumentation:
    def test_json_documents(self, call: Call, scripts: Callable[..., None], folder: Path) -> None:
        """Every verb prints with --json exactly the keys that README has of it."""
        keys = documented_keys()
        scripts(CREATE, ADD, DROP)

        def shown(*args: str, code: int = 0) -> Any:
            result = call(*args, "--json")
            assert result.code == code, result
            return result.json

        plan = shown("plan")
        upgrade = shown("upgrade")
        undo = shown("rollback", "memos", "--dry-run")
        status, health = shown("status"), shown("health")
        many = shown("upgrade", "--glob", "data/*")
        events, report = shown("history"), shown("report")
        failed = shown("upgrade", "--table", "typo", code=1)["error"]
        found = {
            "upgrade, rollback": [upgrade, shown("rollback", "users", "--yes")],
            "each of their steps": upgrade["steps"],
            "upgrade of many": [many],
            "each of databases": many["databases"],
            "plan, --dry-run": [plan, undo, shown("upgrade", "--dry-run")],
            "each steps of a plan": [*plan["steps"], *undo["steps"]],
            "each of operations": [o for step in plan["steps"] for o in step["operations"]],
            "status": [status],
            "each of its lines": status["lines"].values(),
            "health": [{key: health[key] for key in health if key not in status} | {"status": 0}],
            "validate": [shown("validate")],
            "report": [report, shown("report", "--format", "json")],
            "each of migrations": report["migrations"],
            "stamp": [shown("stamp", "--to", "latest")],
            "prune": [shown("prune")],
            "repair": [shown("repair")],
            "unlock": [shown("unlock")],
            "new": [shown("new", "more")],
            "version": [shown("version")],
            "what failed": [shown("upgrade", "--uri", "db://cloud", code=2)],
        }

        assert set(found) | {"document", "interrupted", "each event of history"} == set(keys)
        for name, documents in found.items():
            assert documents, name
            for document in documents:
                assert (name, set(document)) == (name, keys[name])
        scripts(CREATE, FAILS)
        whole = shown("upgrade", "--uri", "./other", code=1)
        assert set(whole) == keys["upgrade, rollback"] | {"error"}
        assert {key for event in events for key in event} <= keys["each event of history"]
        assert keys["each event of history"] == set(Event.__slots__)
        assert {"type", "what", "remedy"} <= set(failed)
        assert set(failed) <= {"type", "what", "remedy", "line", "version", "path"}
        assert keys["interrupted"] == {"interrupted", "what"}

    def test_options(self, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every option that README shows of a verb is one that its `--help` lists."""
        monkeypatch.setenv("COLUMNS", "200")
        helps = {verb: call(verb, "--help").out for verb in VERBS}
        commands = re.findall(r"aiomigrate (\w+)([^`\n#]*)", README)
        shown = {
            (verb, option)
            for verb, rest in commands if verb in VERBS
            for option in re.findall(r"(?<!\S)(--?[a-z][\w-]*)", rest)
        }  # fmt: skip

        assert len(shown) > 10
        assert [pair for pair in sorted(shown) if f" {pair[1]} " not in helps[pair[0]]] == []

    def test_exit_codes(self, call: Call) -> None:
        """README and `--help` tell the same ones, of the same verbs, and they are all there are."""
        told = " ".join(README.partition("**Exit codes**:")[2].split()).partition(". ")[0]
        helped = " ".join(call("--help").out.split()).partition("Exit codes:")[2]
        helped = helped.partition(". ")[0]

        for text in (told, helped):
            assert sorted(map(int, re.findall(r"\b\d+\b", text))) == sorted(Exit)
            assert {verb for verb in VERBS if re.search(rf"\b{verb}\b", text)} == {
                "health", "status", "validate", "plan",
            }  # fmt: skip

    def test_defaults(self, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        """The defaults in `upgrade --help` are those of README's table of options, and the real."""
        monkeypatch.setenv("COLUMNS", "200")
        text = call("upgrade", "--help").out
        defaults = settings.Settings()

        for row in (
            "| `concurrency` | 16 |",
            "| `lease_ttl`, `lease_wait` | 30 s, 600 s |",
            "| `keep_savepoints` | 7 days |",
            '| `ledger` | `"table_migrations"` |',
        ):
            assert row in README
        options = [" ".join(part.split()) for part in re.split(r"\n  (?=-)", text)]
        found = [re.match(r"(?:-\w, )?--([a-z-]+) .*Default: (.+?)\.$", each) for each in options]
        told = dict(match.groups() for match in found if match)
        assert told["uri"].endswith(defaults.uri.removeprefix("./"))
        assert told["migrations"].endswith(str(defaults.migrations).removeprefix("./"))
        assert told["ledger"] == defaults.ledger
        assert told["on-destructive"] == defaults.on_destructive
        assert int(told["concurrency"]) == defaults.concurrency
        assert (int(told["lease-ttl"]), int(told["lease-wait"])) == (30, 600)
        assert (defaults.lease_ttl, defaults.lease_wait) == (30, 600)
        assert (told["keep-savepoints"], defaults.keep_savepoints) == ("a week", 7 * 86400)
        assert (told["timeout"], defaults.timeout) == ("none", None)
        assert (told["on-ahead"], told["on-unsafe-store"]) == ("error", "error")
        assert (defaults.on_ahead, defaults.on_unsafe_store) == ("error", "error")
