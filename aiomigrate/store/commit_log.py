"""Lists the commits of a table: when they were made, and what their manifests say.

On an object store each function costs a request per table_version that exists: not for frequent
calls. Making commits is for `store.table`.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

from aiomigrate.schema.state import TableState
from aiomigrate.store.table import Table


@dataclass(frozen=True, slots=True)
class Commit:
    """A table_version as its manifest describes it.

    Attributes:
        version: The table_version.
        rows: Number of rows.
        files: Statistics of its data files; two versions with the same files have equal ones.
        state: Schema and indexes.
    """

    version: int
    rows: int
    files: tuple[str, ...]
    state: TableState


async def recent_commits(table: Table, within_s: float) -> list[int]:
    """Returns the table_versions committed within the last `within_s` seconds.

    Commit times come from the wall clocks of the committing processes.

    Raises:
        StoreError: LanceDB failed.
    """
    newest = dt.datetime.now(tz=None) - dt.timedelta(seconds=within_s)  # noqa: DTZ005 - as given
    return [int(v["version"]) for v in await _listed(table) if v["timestamp"] >= newest]


async def commit_times(table: Table) -> dict[int, tuple[int, int]]:
    """Returns when each table_version that still exists was committed.

    Returns:
        By table_version the earliest and the latest possible time, in microseconds since 1970
        (UTC). They differ in the hour that daylight saving repeats, since lancedb returns local
        time.

    Raises:
        StoreError: LanceDB failed.
    """
    times = {}
    for version in await _listed(table):
        local = version["timestamp"]
        both = sorted(round(local.replace(fold=fold).timestamp() * 1e6) for fold in (0, 1))
        times[int(version["version"])] = (both[0], both[1])
    return times


async def commits_between(table: Table, first: int, last: int) -> list[Commit]:
    """Returns the table_versions from `first` to `last` that still exist, in order.

    Raises:
        StoreError: LanceDB failed.
    """
    found = []
    listed = ((int(v["version"]), v["metadata"]) for v in await _listed(table))
    for version, metadata in sorted(listed):
        if first <= version <= last:
            state = await (await table.at(version)).state()
            files = tuple(str(metadata[name]) for name in _FILES)
            found.append(Commit(version, int(metadata["total_rows"]), files, state))
    return found


async def _listed(table: Table) -> list[Any]:
    return list(await table.store.call("list_versions", table.name, table.handle.list_versions))


_FILES = (
    "total_data_files", "total_files_size", "total_data_file_rows", "total_deletion_file_rows",
)  # fmt: skip
