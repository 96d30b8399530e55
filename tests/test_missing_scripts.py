"""Scripts that are gone or misnamed, and databases that do not exist, are told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from aiomigrate import Migration, OnPending, asgi, op
from aiomigrate.cli.app import app
from aiomigrate.errors import AiomigrateError, MissingScriptError, ScriptError, TargetError
from aiomigrate.fleet import migrate_all
from aiomigrate.migration import loader
from tests import predecessor
from tests.tools import manager, tree

SCHEMA = pa.schema([pa.field("id", pa.string())])
MEMOS = Migration(table="memos", version=1, operations=[op.CreateTable(SCHEMA)])
USERS = Migration(table="users", version=1, operations=[op.CreateTable(SCHEMA)])
SCRIPT = (
    "import pyarrow as pa\n"
    "from aiomigrate import Migration, op\n"
    "step = Migration(table='{0}', version=1,\n"
    "                 operations=[op.CreateTable(pa.schema([('id', pa.string())]))])\n"
)


async def migrated(database: Path, *given: Migration) -> None:
    """Makes a database at target."""
    async with manager(database, given or (MEMOS, USERS)) as migrations:
        await migrations.upgrade()


def command(*args: str | Path, cwd: Path) -> tuple[int, str, dict[str, Any]]:
    """Calls the command twice, for its text and its document; returns both with the exit code."""
    paths = ("--uri", cwd / "db", "--migrations", cwd / "scripts")
    told = CliRunner().invoke(app, [str(arg) for arg in (*args, *paths)])
    document = CliRunner().invoke(app, [str(arg) for arg in (*args, *paths, "--json")])
    assert told.exit_code == document.exit_code
    return told.exit_code, told.output, json.loads(document.stdout)


# ---- no script at all ---------------------------------------------------------------------------


async def test_without_any_script_a_migrated_database_is_refused(database: Path) -> None:
    """Of a container image without its scripts, no verb and no start says that all is well."""
    await migrated(database)
    before = tree(database)

    async with manager(database, []) as migrations:
        for call in (
            migrations.initialize,
            migrations.upgrade,
            migrations.plan,
            migrations.run_background,
            lambda: migrations.initialize(on_pending=OnPending.WAIT),
            lambda: migrations.initialize(on_pending=OnPending.FAIL),
        ):
            with pytest.raises(MissingScriptError, match="memos 1, users 1"):
                await call()
        with pytest.raises(MissingScriptError):
            async with asgi.lifespan(migrations)(None):
                pass
        validation, health = await migrations.validate(), await migrations.health()
        status = await migrations.get_status()

    many = await migrate_all([database], migrations=[], attempts=1)
    assert isinstance(many.databases[0].error, MissingScriptError)
    assert any("There is no migration script" in error for error in validation.errors)
    assert not health.is_ready
    assert "There is no migration script" in str(health)
    assert "There is no migration script" in status.missing[0]
    assert tree(database) == before


async def test_after_a_rollback_to_nothing_no_script_is_needed(database: Path) -> None:
    """Nothing is applied any more."""
    await migrated(database, MEMOS)
    async with manager(database, [MEMOS]) as migrations:
        await migrations.rollback("memos", to=0)
    async with manager(database, []) as migrations:
        assert (await migrations.upgrade()).steps == ()
        assert (await migrations.validate()).valid


async def test_lines_of_another_system_need_no_script(database: Path) -> None:
    """A database that only the predecessor has migrated is left as it is."""
    await predecessor.build(database, predecessor.State.V1)
    async with manager(database, []) as migrations:
        assert (await migrations.upgrade()).steps == ()
        plan = await migrations.plan()
        validation = await migrations.validate()
    async with manager(database, [USERS]) as migrations:
        others = await migrations.plan()

    assert plan.unknown
    assert len(plan.missing) == 1
    assert validation.valid
    assert others.missing == ()


@pytest.mark.parametrize("verb", ["plan", "status", "validate"])
def test_a_fresh_database_without_scripts_is_a_warning(tmp_path: Path, verb: str) -> None:
    """With --check it is not at target: whoever asks meant some scripts."""
    (tmp_path / "scripts").mkdir()
    for exists in (False, True):
        if exists:
            (tmp_path / "db").mkdir()
        code, told, document = command(verb, "--check", cwd=tmp_path)
        assert code == 3
        assert "warning: There is no migration script" in told
        assert ("warning: The database does not exist" in told) is not exists
        assert len(document["missing"]) == 1 + (not exists)
        assert command(verb, cwd=tmp_path)[0] == 0
    code, told, _ = command("upgrade", cwd=tmp_path)
    assert code == 0
    assert "There is no migration script" in told


# ---- a line that lost all its scripts -----------------------------------------------------------


@pytest.mark.parametrize("verb", ["plan", "status", "validate"])
def test_a_line_that_lost_its_scripts_is_a_warning(tmp_path: Path, verb: str) -> None:
    """It is named with the way out; the other lines are migrated as ever."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "001_memos.py").write_text(SCRIPT.format("memos"))
    anyio.run(migrated, tmp_path / "db", USERS)
    assert command("upgrade", cwd=tmp_path)[0] == 0
    assert command(verb, cwd=tmp_path)[0] == 0

    code, told, document = command(verb, "--check", cwd=tmp_path)

    assert code == 3
    assert "warning: users is recorded at version 1, but none of its scripts exists" in told
    assert len(document["missing"]) == 1
    assert "users is recorded" in command("upgrade", cwd=tmp_path)[1]
    assert command("stamp", "--table", "users", "--to", "0", cwd=tmp_path)[0] == 0
    assert command(verb, "--check", cwd=tmp_path)[0] == 0


async def test_a_line_without_script_is_stamped_at_nothing_only(database: Path) -> None:
    """A name that is not recorded, or another version, is an error, and nothing is written."""
    await migrated(database, USERS)
    async with manager(database, [MEMOS]) as migrations:
        for line, version in (("users", 1), ("user", 0)):
            with pytest.raises(TargetError, match=f"no migration of {line!r}"):
                await migrations.stamp(tables=[line], to=version)
        assert await migrations.stamp(to={"users": 0}) == {"users": 0}
        assert (await migrations.plan()).missing == ()
        assert [e.line for e in await migrations.history() if e.kind == "stamped"] == ["users"]


async def test_a_lost_head_does_not_hide_a_line_that_lost_its_scripts(database: Path) -> None:
    """The journal knows it too."""
    await migrated(database)
    async with manager(database, [MEMOS]) as migrations:
        await migrations.upgrade()
        store = await migrations._database.connect()
        await store.drop("table_migrations")
        assert "users is recorded at version 1" in (await migrations.get_status()).missing[0]
        assert "users is recorded at version 1" in (await migrations.plan()).missing[0]


# ---- a database that does not exist -------------------------------------------------------------


@pytest.mark.parametrize("verb", ["plan", "status", "validate"])
def test_a_database_that_does_not_exist_is_told(tmp_path: Path, verb: str) -> None:
    """A typing mistake in the path is seen; nothing is created."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "001_memos.py").write_text(SCRIPT.format("memos"))

    code, told, document = command(verb, "--check", cwd=tmp_path)

    assert code == 3
    assert "warning: The database does not exist" in told
    assert len(document["missing"]) == 1
    assert not (tmp_path / "db").exists()


# ---- misnamed files -----------------------------------------------------------------------------


def refused(folder: Path, kind: type[AiomigrateError] = ScriptError) -> str:
    """Returns the error of loading a folder."""
    with pytest.raises(kind) as caught:
        loader.load(folder, {})
    return str(caught.value)


MISNAMED = ["add_memos.py", "001add.py", "v001_add.py", "001 add.py", "1.0_add.py", "__init__.py",
            "ADD.PY"]  # fmt: skip


@pytest.mark.parametrize("name", MISNAMED)
def test_a_migration_without_a_number_is_named(tmp_path: Path, name: str) -> None:
    """It would never be run, and nobody would be told."""
    (tmp_path / "001_users.py").write_text(SCRIPT.format("users"))
    (tmp_path / name).write_text(SCRIPT.format("memos"))

    assert f"{name} contains a migration, but its name does not begin with a number" in refused(
        tmp_path
    )


@pytest.mark.parametrize(
    "content",
    [
        "import aiomigrate\nsteps = [aiomigrate.Migration(table='t', version=1)]\n",
        "from aiomigrate import Migration\nif True:\n    m = Migration(table='t', version=1)\n",
        "from aiomigrate import Migration\nm = Migration(table='t', version=1\n",
    ],
)
def test_it_is_found_in_whatever_statement(tmp_path: Path, content: str) -> None:
    """Without being imported; also where it cannot be parsed."""
    (tmp_path / "add.py").write_text(content)

    assert "add.py contains a migration" in refused(tmp_path)


HELPERS: dict[str, str] = {
    "helpers.py": "def step(n):\n    from aiomigrate import Migration\n    return Migration(n)\n",
    "model.py": "from aiomigrate import Migration\nclass A:\n    b = lambda: Migration(1)\n",
    "broken.py": "def (:\n",
    "empty.py": "",
    ".#001_users.py": SCRIPT.format("memos"),
    "002_memos.py.bak": SCRIPT.format("memos"),
    "README.md": "Migration(",
}


@pytest.mark.parametrize("name", HELPERS)
def test_other_files_are_ignored(tmp_path: Path, name: str) -> None:
    """Helpers, models, editors' files."""
    (tmp_path / "001_users.py").write_text(SCRIPT.format("users"))
    (tmp_path / name).write_text(HELPERS[name])

    assert loader.load(tmp_path, {}).line_names() == ("users",)


def test_a_migration_that_a_numbered_file_imports_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded, under the number of that file."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shared_steps_of_test.py").write_text(SCRIPT.format("users"))
    (tmp_path / "001_users.py").write_text("from shared_steps_of_test import step\n")

    assert loader.load(tmp_path, {}).line_names() == ("users",)


LINKS: Sequence[str] = ("002_memos.py", "memos.py")


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, name: str) -> None:
    """As after a mount that is missing."""
    (tmp_path / "001_users.py").write_text(SCRIPT.format("users"))
    (tmp_path / name).symlink_to(tmp_path / "gone.py")

    assert f"{name} is a link to {tmp_path / 'gone.py'}, which does not exist" in refused(tmp_path)


def test_editors_links_that_lead_nowhere_are_ignored(tmp_path: Path) -> None:
    """Emacs marks a file that is being edited by such a one."""
    (tmp_path / "001_users.py").write_text(SCRIPT.format("users"))
    (tmp_path / ".#001_users.py").symlink_to("me@host.1234")

    assert loader.load(tmp_path, {}).line_names() == ("users",)


def test_a_folder_with_the_name_of_a_migration_is_named(tmp_path: Path) -> None:
    """It is not passed over."""
    (tmp_path / "001_users.py").mkdir()

    assert "001_users.py has the name of a migration, but is no file" in refused(tmp_path)
