"""Recovery asks for the lease before it takes anything away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aiomigrate.commits.savepoints import branch_name
from aiomigrate.errors import LeaseLostError
from aiomigrate.execution.recovery import Recovery
from aiomigrate.migration.model import Script
from aiomigrate.store.connection import Store

SCRIPT = Script(
    line="t", version=2, description="", operations=(), touches=("t",), depends_on={},
    checksum="", table="t",
)  # fmt: skip
UNUSED: Any = None


async def test_a_holder_that_lost_the_lease_deletes_no_savepoint(tmp_path: Path) -> None:
    """What looks like a leftover to it is the savepoint by which its successor goes back."""
    store = await Store.connect(str(tmp_path / "db"))
    table = await store.create("t", pa.schema([pa.field("id", pa.int64())]))
    savepoint = branch_name(2, "successor", SCRIPT)
    await table.create_branch(savepoint, 1)

    async def lost() -> None:
        raise LeaseLostError("The lease was lost.", "Run again.")

    recovery = Recovery(store, UNUSED, UNUSED, check=lost, branch_of=lambda _: "unused", log=UNUSED)
    with pytest.raises(LeaseLostError):
        await recovery.drop_leftovers(SCRIPT, "t")

    assert await table.branches() == [savepoint]
