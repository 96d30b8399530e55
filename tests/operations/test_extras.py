"""An operation that needs an extra says so in the plan, not by a failure in the run."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from aiomigrate import op
from aiomigrate.errors import OperationError
from aiomigrate.schema.state import EMBEDDING, TableState

VECTORS = pa.schema([
    pa.field("id", pa.string(), nullable=False),
    pa.field("text", pa.string()),
    pa.field("vector", pa.list_(pa.float32(), 2)),
])  # fmt: skip
FUNCTION = {"name": "old", "source_column": "text", "vector_column": "vector"}
EMBEDDED = VECTORS.with_metadata({EMBEDDING: json.dumps([FUNCTION])})


async def embed(texts: list[str]) -> list[list[float]]:
    """Stands for a model; is never called here."""
    raise AssertionError(texts)


def reembed(**more: Any) -> op.Reembed:
    """Builds a re-embedding of `vector`."""
    return op.Reembed(
        column="vector", source="text", function=embed, dimension=3, model="new", key="id",
        table="things", **more,
    )  # fmt: skip


NEEDING = {
    "backfill": op.Backfill("text", embed, key="id", table="things"),
    "re-embedding": reembed(),
    "re-embedding on Ray": reembed(engine=op.Engine.RAY),
    "table metadata": op.SetTableMetadata({"owner": "search"}, table="things"),
}


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [
        ("backfill", "tenacity", "backfill"),
        ("backfill", "aiolimiter", "backfill"),
        ("re-embedding", "tenacity", "backfill"),
        ("re-embedding on Ray", "lance_ray", "ray"),
        ("table metadata", "lance", "lance"),
    ],
)
def test_an_operation_names_the_extra_that_it_needs(
    name: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicting the operation, as every plan does, fails with the command that installs it."""
    monkeypatch.setattr(
        "aiomigrate.operations.base.find_spec", lambda module: None if module == missing else module
    )

    with pytest.raises(OperationError, match=missing) as refused:
        NEEDING[name].evolve(TableState(VECTORS))

    assert refused.value.remedy == f"pip install 'aiomigrate[{extra}]'"


def test_undoing_a_re_embedding_needs_what_it_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """To put the table's old embedding function back takes pylance: a rollback's plan says so."""
    assert reembed().undo(TableState(EMBEDDED))
    monkeypatch.setattr("aiomigrate.operations.base.find_spec", lambda module: None)

    assert reembed().undo(TableState(VECTORS))
    with pytest.raises(OperationError, match="lance"):
        reembed().undo(TableState(EMBEDDED))
