"""Small things several tests need: a database made by hand, and what is on disk afterwards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lancedb
import lancedb.index
import pyarrow as pa
import structlog

from aiomigrate import Migration, MigrationManager
from aiomigrate.schema.state import TableState
from aiomigrate.store.connection import Store


def _taken(name: str) -> str | None:
    """Takes a setting of the tests out of the environment, where the command would refuse it.

    Kept under another name for the processes that run a part of the tests.
    """
    value = os.environ.pop(f"AIOMIGRATE_{name}", None) or os.environ.get(f"TESTS_{name}")
    if value is not None:
        os.environ[f"TESTS_{name}"] = value
    return value


FIXTURES = _taken("FIXTURES")
"""Folder of the archives that the predecessor itself has written, if there are any."""

SEED = int(_taken("SEED") or "20261123")
"""Of whatever is sampled; CI and developers may choose another."""

TABLE = "things"


def tree(folder: Path) -> dict[str, str]:
    """Returns a digest of every file below a folder, by path; empty where there is no folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def manager(
    database: Path | lancedb.AsyncConnection, migrations: Sequence[Migration], **options: Any
) -> MigrationManager:
    """Returns a manager that logs nowhere."""
    logger = structlog.wrap_logger(structlog.ReturnLogger())
    return MigrationManager(database, migrations=migrations, logger=logger, **options)


async def make(
    database: Path,
    schema: pa.Schema,
    rows: Iterable[Mapping[str, Any]] = (),
    indexes: Iterable[tuple[str, str]] = (),
    table: str = TABLE,
) -> None:
    """Makes a table with LanceDB alone, as an application would."""
    connection = await lancedb.connect_async(database)
    made = await connection.create_table(table, schema=schema)
    if given := [dict(row) for row in rows]:
        await made.add(pa.Table.from_pylist(given, schema=schema))
    for column, kind in indexes:
        await made.create_index(column, config=getattr(lancedb.index, kind)())
    connection.close()


async def found(database: Path, table: str = TABLE) -> tuple[TableState | None, int]:
    """Returns a table's state and its table_version, `(None, 0)` if it does not exist."""
    store = await Store.connect(str(database))
    opened = await store.find(table)
    return (None, 0) if opened is None else (await opened.state(), await opened.version())


async def rows_of(database: Path, table: str = TABLE) -> list[dict[str, Any]]:
    """Returns a table's rows, in an order of their own."""
    store = await Store.connect(str(database))
    rows: list[dict[str, Any]] = (await (await store.open(table)).read()).to_pylist()
    return sorted(rows, key=lambda row: sorted((name, repr(value)) for name, value in row.items()))
