"""All uses of private parts of lancedb, which a new release of it can break silently.

lancedb's Python layer checks and converts data before it calls its native layer. For some calls
this is wrong in a migration (each function says why), so they call the native layer directly.
`tests/store/test_native.py` pins every private name used here and names the ones that a release
of lancedb has removed.
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
"""Attributes of lancedb's merge builder that it passes on to the native layer."""


async def create_table(
    connection: lancedb.AsyncConnection, name: str, mode: str, reader: pa.RecordBatchReader
) -> lancedb.AsyncTable:
    """Creates a table with exactly the given rows, and returns its handle.

    lancedb's Python layer treats NULL and NaN as bad vectors, and computes missing vectors of a
    batch if the table has embedding functions (both measured).

    Args:
        connection: The database.
        name: Name of the table.
        mode: `create` or `overwrite`.
        reader: The rows.
    """
    inner: Any = connection._inner  # noqa: SLF001 - see above
    return lancedb.AsyncTable(await inner.create_table(name, mode, reader, namespace_path=[]))


async def append(handle: lancedb.AsyncTable, data: pa.Table) -> Any:
    """Appends rows that have exactly the table's columns; returns LanceDB's result.

    lancedb's Python layer reads the schema for every append, to convert rows that differ from it.
    """
    inner: Any = handle._inner  # noqa: SLF001 - see above
    return await inner.add(to_scannable(data), "append")


async def merge(handle: lancedb.AsyncTable, builder: Any, data: pa.Table, **changed: Any) -> Any:
    """Executes a merge; returns LanceDB's result.

    lancedb's Python layer treats NULL as a bad vector, and for a table with embedding functions
    computes their column from source columns that the data does not have (both measured).

    Args:
        handle: The table.
        builder: The merge builder that `handle.merge_insert(...)` returned.
        data: The rows.
        changed: Parameters of the merge that lancedb's builder cannot set.
    """
    inner: Any = handle._inner  # noqa: SLF001 - see above
    set_by_builder = {name: getattr(builder, f"_{name}", None) for name in MERGE_PARAMETERS}
    return await inner.execute_merge_insert(data.to_reader(), set_by_builder | changed)


def index_details(config: Any) -> Mapping[str, Any]:
    """Returns the parameters that `list_indices()` reports for an index, empty if none."""
    return getattr(config, "index_details", None) or {}


def config_class(name: str) -> Any:
    """Returns the configuration class in `lancedb.index` of that name."""
    return getattr(lancedb.index, name)
