"""Every use of what lancedb does not export: the one place a new release of it can break silently.

lancedb's Python half checks and converts what it is given before it calls its native half. In some
calls that is wrong for a migration (each function says why), so the native half is called here.
`tests/store/test_native.py` pins every name used here and names the one that a release took away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lancedb
import lancedb.index
import pyarrow as pa
from lancedb.scannable import to_scannable

MERGE_PARAMETERS = (
    "on", "when_matched_update_all", "when_matched_update_all_condition",
    "when_not_matched_insert_all", "when_not_matched_by_source_delete",
    "when_not_matched_by_source_condition", "when_not_matched_by_source_condition_expr",
    "timeout", "use_index", "use_lsm", "validate_single_shard",
)  # fmt: skip
"""What lancedb's merge builder hands on to the native half, from attributes of these names."""


async def create_table(
    connection: lancedb.AsyncConnection, name: str, mode: str, reader: pa.RecordBatchReader
) -> lancedb.AsyncTable:
    """Creates a table of rows exactly as they are given.

    lancedb's Python half takes NULL and NaN for bad vectors, and computes the vectors of a batch
    that has none where the table has embedding functions (both measured).

    Args:
        connection: The database.
        name: The table.
        mode: `create` or `overwrite`.
        reader: The rows.
    """
    inner: Any = connection._inner  # noqa: SLF001 - see above
    return lancedb.AsyncTable(await inner.create_table(name, mode, reader, namespace_path=[]))


async def append(handle: lancedb.AsyncTable, data: pa.Table) -> Any:
    """Appends rows that have the table's own columns; returns LanceDB's result.

    lancedb's Python half asks for the schema each time, and looks for what has to be converted.
    """
    inner: Any = handle._inner  # noqa: SLF001 - see above
    return await inner.add(to_scannable(data), "append")


async def merge(handle: lancedb.AsyncTable, builder: Any, data: pa.Table, **changed: Any) -> Any:
    """Executes a merge; returns LanceDB's result.

    lancedb's Python half takes NULL for a bad vector, and for a table with embedding functions
    computes their column from data that is not there (both measured).

    Args:
        handle: The table.
        builder: What `handle.merge_insert(...)` and the calls on it returned.
        data: The rows.
        changed: Parameters of the merge that lancedb's builder cannot set.
    """
    inner: Any = handle._inner  # noqa: SLF001 - see above
    set_by_builder = {name: getattr(builder, f"_{name}", None) for name in MERGE_PARAMETERS}
    return await inner.execute_merge_insert(data.to_reader(), set_by_builder | changed)


def index_details(config: Any) -> Mapping[str, Any]:
    """Returns the parameters that `list_indices()` reports of an index; empty if it has none."""
    return getattr(config, "index_details", None) or {}


def config_class(name: str) -> Any:
    """Returns lancedb's configuration class of a kind of index."""
    return getattr(lancedb.index, name)
