"""What is in a database, read by LanceDB alone: no release has a say in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lancedb

HEAD = "table_migrations"
JOURNAL = "table_migrations_history"
LEASE = ":lease:"
OURS = "_aiomigrate_"


async def content(database: Path) -> dict[str, Any]:
    """Returns all that is to be equal after a disturbed and an undisturbed run."""
    connection = await lancedb.connect_async(database)
    tables = {}
    for name in (await connection.list_tables()).tables:
        if name in (HEAD, JOURNAL):
            continue
        table = await connection.open_table(name)
        rows = (await table.query().to_arrow()).to_pylist()
        tables[name] = {
            "fields": sorted(
                (f.name, str(f.type), f.nullable, sorted((f.metadata or {}).items()))
                for f in await table.schema()
            ),
            "indexes": sorted(
                (i.name, str(i.index_type), i.columns) for i in await table.list_indices()
            ),
            "rows": sorted(json.dumps(row, sort_keys=True, default=str) for row in rows),
            "branches": len(await table.branches.list()),
            "tags": sorted(await table.tags.list()),
        }
    connection.close()
    head = await _rows(database, HEAD)
    return {
        "tables": tables,
        "head": sorted(
            (row["tableName"], row["currentVersion"], row["digest"])
            for row in head
            if not row["tableName"].startswith(LEASE)
        ),
        "held": sorted(
            row["tableName"].removeprefix(LEASE)
            for row in head
            if row["tableName"].startswith(LEASE) and row["owner"]
        ),
    }


async def journal(database: Path) -> list[dict[str, Any]]:
    """Returns the entries of the journal in the order in which they were written."""
    rows = await _rows(database, JOURNAL)
    return sorted(rows, key=lambda row: (row["epoch"], row["seq"]))


async def _rows(database: Path, name: str) -> list[dict[str, Any]]:
    connection = await lancedb.connect_async(database)
    table = await connection.open_table(name)
    found: list[dict[str, Any]] = (await table.query().to_arrow()).to_pylist()
    connection.close()
    return found
