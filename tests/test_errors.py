"""The tree of errors, and the one that only a defect brings about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aiomigrate import Migration, MigrationFailedError, op
from aiomigrate.errors import (
    AiomigrateError,
    CommitConflictError,
    LeaseError,
    LeaseTimeoutError,
    OutOfOrderError,
    PlanError,
    SchemaMismatchError,
    StoreError,
)
from aiomigrate.store.connection import Store
from tests.tools import manager

T = pa.schema([pa.field("id", pa.int64()), pa.field("n", pa.int64())])
ROWS = [{"id": 1, "n": 10}, {"id": 2, "n": None}]
HEAD = "table_migrations"


def first() -> Migration:
    """Returns the migration that creates the table."""
    return Migration(table="t", version=1, operations=[op.CreateTable(T)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Liar(op.Operation):
    """Adds another column than it predicts."""

    @property
    def traits(self) -> op.Traits:
        return op.Traits()

    def describe(self) -> str:
        return "lie"

    def evolve(self, state: op.TableState | None) -> op.TableState | None:
        return op.AddColumns({"told": pa.int64()}).evolve(state)

    async def apply(self, target: Any) -> int:
        await target.add_columns([pa.field("done", pa.int64())])
        return 0


async def test_an_operation_that_did_not_do_what_it_predicted(database: Path) -> None:
    """A table that is not as predicted fails the migration and is returned to where it was."""
    given = [first(), Migration(table="t", version=2, operations=[Liar()])]
    async with manager(database, given) as migrations:
        with pytest.raises(MigrationFailedError, match="not as predicted"):
            await migrations.initialize()
        (failed,) = [e for e in await migrations.history("t") if e.kind == "failed"]
        validation = await migrations.validate()
    table = await (await Store.connect(str(database))).open("t")

    assert SchemaMismatchError.__name__ in (failed.error or "")
    assert (await table.state()).schema.names == ["id", "n"]
    assert validation.not_at_target == validation.errors


def test_errors_form_one_tree_that_can_be_caught_by_kind() -> None:
    """Whoever catches a kind of error catches its cases, and all are AiomigrateErrors."""
    cases = {
        PlanError: OutOfOrderError,
        LeaseError: LeaseTimeoutError,
        StoreError: CommitConflictError,
    }

    for kind, case in cases.items():
        assert issubclass(case, kind)
        assert issubclass(kind, AiomigrateError)
