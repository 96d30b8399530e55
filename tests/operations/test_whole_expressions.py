"""SQL of which LanceDB would read only the beginning is refused, in the plan and in functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, MigrationFailedError, op
from aiomigrate.errors import OperationError
from tests.tools import TABLE, make, manager, rows_of

SCHEMA = pa.schema([pa.field("a", pa.int64()), pa.field("b", pa.int64())])
ROWS = [{"a": 1, "b": 1}, {"a": 2, "b": 2}]
CUT = ["a = 1; a = 2", "a = 1 LIMIT 1", "a = 1, b = 2", "a = 1 ORDER BY a", "a = 1) OR (b = 2"]
WHOLE = ["a = 1", "a = 1 -- the first", "(a = 1)", "a = 1 /* ; */", "a IN (1)", "a = 1\n"]


def refused(condition: str) -> list[op.Operation]:
    """Returns operations whose SQL has this condition, or an expression that ends like it."""
    rest = condition.removeprefix("a = 1")
    return [
        op.Delete(condition),
        op.Update({"b": 3}, where=condition),
        op.Update(sql={"b": f"a + 1{rest}"}),
        op.AddColumns({"c": pa.int64()}, sql={"c": f"a + 1{rest}"}),
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("condition", CUT)
async def test_a_plan_refuses_a_text_that_would_be_cut(
    tmp_path: Path, condition: str, number: int
) -> None:
    """Nothing is written: LanceDB would have changed other rows than the text says."""
    await make(tmp_path, SCHEMA, ROWS)
    step = Migration(table=TABLE, version=1, operations=[refused(condition)[number]])
    async with manager(tmp_path, [step]) as migrations:
        with pytest.raises(OperationError, match="LanceDB rejects its SQL"):
            await migrations.plan()

    assert await rows_of(tmp_path) == ROWS


@pytest.mark.parametrize("verb", ["update", "delete", "read"])
@pytest.mark.parametrize("condition", CUT)
async def test_a_function_is_refused_a_text_that_would_be_cut(
    tmp_path: Path, condition: str, verb: str
) -> None:
    """The migration fails, and its rows are as before."""

    async def run(context: Context) -> None:
        table: Any = context.table()
        arguments = {"update": ({"b": 3},), "delete": (), "read": ()}[verb]
        await getattr(table, verb)(*arguments, where=condition)

    await make(tmp_path, SCHEMA, ROWS)
    async with manager(tmp_path, [Migration(table=TABLE, version=1, up=run)]) as migrations:
        with pytest.raises(MigrationFailedError):
            await migrations.upgrade()

    assert await rows_of(tmp_path) == ROWS


@pytest.mark.parametrize("condition", WHOLE)
async def test_a_whole_condition_is_accepted(tmp_path: Path, condition: str) -> None:
    """Comments and parentheses belong to it."""
    await make(tmp_path, SCHEMA, ROWS)
    steps = [
        Migration(table=TABLE, version=1, operations=[op.Update({"b": 9}, where=condition)]),
        Migration(table=TABLE, version=2, operations=[op.Delete(condition)]),
    ]
    async with manager(tmp_path, steps) as migrations:
        await migrations.upgrade(to=1)
        assert await rows_of(tmp_path) == [{"a": 1, "b": 9}, {"a": 2, "b": 2}]
        await migrations.upgrade()

    assert await rows_of(tmp_path) == ROWS[1:]
