"""Policies are given as members or as text; no value means its opposite."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aiomigrate import (
    Migration,
    MigrationManager,
    OnAhead,
    OnDestructive,
    OnPending,
    OnUnsafeStore,
    asgi,
    op,
)
from aiomigrate.errors import (
    ConfigurationError,
    DatabaseAheadError,
    InvalidMigrationError,
    NotAtTargetError,
    ScriptImportError,
)
from aiomigrate.fleet import migrate_all
from aiomigrate.migration.checksum import checksum
from aiomigrate.option_checks import check_policy
from tests.guarantees.checksum_cases import OPERATIONS
from tests.tools import manager

SCHEMA = pa.schema([pa.field("id", pa.string())])
CREATE = Migration(table="t", version=1, operations=[op.CreateTable(SCHEMA)])
ADD = Migration(table="t", version=2, operations=[op.AddColumns({"n": pa.int64()})])
POLICIES: dict[str, type[enum.Enum]] = {
    "on_ahead": OnAhead, "on_destructive": OnDestructive, "on_unsafe_store": OnUnsafeStore,
}  # fmt: skip
WRONG = ["", "Error", "ERROR", "no", None, True, 1, b"error", ["error"], OnPending]
KINDS = sorted({type(case) for case in OPERATIONS.values()}, key=lambda kind: kind.__name__)


def policies(kind: type[op.Operation]) -> dict[str, enum.Enum]:
    """Returns the parameters of an operation that are policies, with their defaults."""
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if isinstance(f.default, enum.Enum)}


def flags(kind: type[op.Operation]) -> list[str]:
    """Returns the parameters of an operation that are flags."""
    return [f.name for f in dataclasses.fields(kind) if f.type == "bool"]


def like(case: op.Operation, **changes: Any) -> op.Operation:
    """Returns an operation constructed anew with some arguments changed."""
    given = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)} | changes
    parameters = inspect.signature(type(case)).parameters.values()
    several = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
    positional = [value for name in several for value in given.pop(name)]
    return type(case)(*positional, **given)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_operation_takes_each_policy_as_text(kind: type[op.Operation]) -> None:
    """The text of a member is the member, and the checksum that of the member."""
    case = next(case for case in OPERATIONS.values() if type(case) is kind)
    for name, default in policies(kind).items():
        for member in type(default):
            as_text, as_member = like(case, **{name: member.value}), like(case, **{name: member})
            assert getattr(as_text, name) is member
            one, other = (
                checksum(Migration(table="t", version=1, operations=[operation]))
                for operation in (as_text, as_member)
            )
            assert one == other
    assert "when_missing" in policies(kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_operation_refuses_what_is_no_choice(kind: type[op.Operation]) -> None:
    """Another text, a boolean, another enum's member: the error names argument and choices."""
    case = next(case for case in OPERATIONS.values() if type(case) is kind)
    for name, default in policies(kind).items():
        for wrong in ("Skip", "yes", True, None, 0, OnAhead.ERROR):
            with pytest.raises(ConfigurationError, match=name) as caught:
                like(case, **{name: wrong})
            assert all(repr(member.value) in str(caught.value) for member in type(default))
    for name in flags(kind):
        for wrong in ("false", "", 0, 1, None):
            with pytest.raises(ConfigurationError, match=f"{name}.*Pass True or False"):
                like(case, **{name: wrong})


@pytest.mark.parametrize("option", POLICIES)
def test_a_manager_takes_members_and_texts_and_nothing_else(option: str) -> None:
    """A typing mistake is an error when the manager is made, before anything is read."""
    for member in POLICIES[option]:
        MigrationManager("./db", migrations=[], **{option: member})
        MigrationManager("./db", migrations=[], **{option: member.value})
    for wrong in [*WRONG, OnPending.FAIL if option != "on_ahead" else OnDestructive.KEEP]:
        with pytest.raises(ConfigurationError, match=option) as caught:
            MigrationManager("./db", migrations=[], **{option: wrong})
        assert all(repr(member.value) in str(caught.value) for member in POLICIES[option])


async def test_the_text_error_refuses_a_newer_database(tmp_path: Path) -> None:
    """`on_ahead="error"` is an error, as the default is, and `"warn"` a warning."""
    async with manager(tmp_path, [CREATE, ADD]) as migrations:
        await migrations.upgrade()

    for policy in ("error", OnAhead.ERROR):
        async with manager(tmp_path, [CREATE], on_ahead=policy) as migrations:
            with pytest.raises(DatabaseAheadError):
                await migrations.upgrade()
    for policy in ("warn", OnAhead.WARN):
        async with manager(tmp_path, [CREATE], on_ahead=policy) as migrations:
            assert (await migrations.upgrade()).steps == ()


async def test_a_start_takes_its_policy_as_text(tmp_path: Path) -> None:
    """`on_pending="fail"` fails, `"migrate"` migrates; so do a lifespan's."""
    async with manager(tmp_path, [CREATE]) as migrations:
        with pytest.raises(ConfigurationError, match="on_pending: 'no' is not a valid choice"):
            await migrations.initialize(on_pending="no")
        with pytest.raises(ConfigurationError, match="on_pending"):
            asgi.lifespan(migrations, on_pending="Wait")
        with pytest.raises(NotAtTargetError):
            await migrations.initialize(on_pending="fail")
        with pytest.raises(NotAtTargetError):
            async with asgi.lifespan(migrations, on_pending="fail")(None):
                pass
        assert len((await migrations.initialize(on_pending="migrate")).steps) == 1


async def test_a_missing_table_is_skipped_by_text(tmp_path: Path) -> None:
    """`when_missing="skip"` does nothing where there is no table."""
    skip = Migration(table="t", version=1, operations=[op.Delete("id = 'x'", when_missing="skip")])
    async with manager(tmp_path, [skip]) as migrations:
        assert len((await migrations.upgrade()).steps) == 1


async def test_flags_of_calls_are_booleans(tmp_path: Path) -> None:
    """`"false"`, as read from the environment, does not count as true."""
    wrong: Any = "false"
    async with manager(tmp_path, [CREATE]) as migrations:
        calls: list[Callable[[], Any]] = [
            lambda: migrations.upgrade(background=wrong),
            lambda: migrations.rollback("t", allow_destructive=wrong),
            lambda: migrations.plan_rollback("t", allow_destructive=wrong),
            lambda: migrations.unlock(background=wrong),
            lambda: migrate_all([tmp_path], migrations=[CREATE], background=wrong),
        ]
        for call in calls:
            with pytest.raises(ConfigurationError, match="'false' is not a boolean"):
                await call()
        with pytest.raises(ConfigurationError, match="'false' is not a boolean"):
            asgi.lifespan(migrations, background=wrong)


async def test_a_script_with_a_wrong_policy_is_named(tmp_path: Path) -> None:
    """The error of a file names it, and the choices."""
    (tmp_path / "001_t.py").write_text(
        "from aiomigrate import Migration, op\n"
        "migration = Migration(table='t', version=1,\n"
        "                      operations=[op.Delete('a = 1', when_missing='ignore')])\n"
    )
    async with MigrationManager(tmp_path / "db", migrations=tmp_path) as migrations:
        with pytest.raises(ScriptImportError, match=r"001_t\.py.*'ignore'.*'fail', 'skip'"):
            await migrations.upgrade()


def test_an_enum_of_the_users_own_with_the_same_text_is_that_text() -> None:
    """A StrEnum is a text: its value counts."""

    class Mine(enum.StrEnum):
        WARN = "warn"

    assert check_policy(OnAhead, Mine.WARN, "on_ahead") is OnAhead.WARN


@pytest.mark.parametrize("index", ["false", 0, None, op.CreateIndex("other")])
def test_the_index_of_a_re_embedding_is_a_flag_or_an_index(index: Any) -> None:
    """No text counts as true."""
    case = next(case for case in OPERATIONS.values() if isinstance(case, op.Reembed))
    with pytest.raises(InvalidMigrationError, match="is no index on 'vector'"):
        like(case, index=index)
