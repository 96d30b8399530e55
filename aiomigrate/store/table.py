"""One open table: reads, and methods that make single commits.

It decides nothing: what to commit, retry or restore is decided by the layers above.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import lancedb
import lancedb.index
import pyarrow as pa

from aiomigrate.errors import CommitConflictError, ConfigurationError
from aiomigrate.schema.index import config_name, reported_options
from aiomigrate.schema.sql import as_sql, whole
from aiomigrate.schema.state import Index, TableState
from aiomigrate.store import _native
from aiomigrate.store.calls import Calls

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Opened:
    """An opened table with its state.

    Attributes:
        table: Its handle.
        version: The handle's table_version.
        state: Schema and indexes at that version.
    """

    table: Table
    version: int
    state: TableState


class Table:
    """An open handle, pinned to the version that it was opened at or that it last committed.

    Unless stated otherwise, a mutating method makes one commit and returns its table_version. All
    methods raise a `StoreError`, or a subclass that names the failure, if LanceDB fails. A
    cancelled mutation is awaited to its end, see `store.calls.Calls.settle`. No method checks the
    lease.
    """

    def __init__(self, store: Calls, name: str, handle: lancedb.AsyncTable) -> None:
        self.store = store
        self.name = name
        self.handle = handle
        self.on_commit: Callable[[int], None] = lambda version: None
        """Called with the table_version of each commit, even if the caller is being cancelled."""

    async def _read(self, verb: str, run: Callable[[], Awaitable[T]]) -> T:
        return await self.store.call(verb, self.name, run)

    async def _write(self, verb: str, run: Callable[[], Awaitable[T]]) -> T:
        return await self.store.call(verb, self.name, run, mutates=True)

    async def _commit(self, verb: str, run: Callable[[], Awaitable[Any]]) -> Any:
        """Makes one commit; returns LanceDB's result, which has a `version`."""

        async def act() -> Any:
            result = await run()
            self.on_commit(int(result.version))
            return result

        return await self._write(verb, act)

    async def _commit_unnumbered(self, verb: str, run: Callable[[], Awaitable[Any]]) -> int:
        """Makes a commit whose result has no version; returns the handle's version after it."""

        async def act() -> int:
            await run()
            version = await self.handle.version()
            self.on_commit(version)
            return version

        return await self._write(verb, act)

    async def refresh(self) -> None:
        """Moves the handle to the latest version."""
        await self._read("refresh", self.handle.checkout_latest)

    async def version(self) -> int:
        """Returns the handle's table_version."""
        return await self._read("version", self.handle.version)

    async def at(self, table_version: int) -> Table:
        """Opens a second, read-only handle at an older table_version.

        Raises:
            TableVersionGoneError: The version was cleaned up.
        """
        handle = await self.store.open_handle(self.name)
        await self._read("checkout", lambda: handle.checkout(table_version))
        return Table(self.store, self.name, handle)

    async def state(self, *, indexed: bool = True) -> TableState:
        """Returns schema and indexes.

        Args:
            indexed: Whether the table may have indexes; otherwise they are not requested.
        """
        schema = await self._read("schema", self.handle.schema)
        if not indexed:
            return TableState(schema)
        configs = await self._read("list_indices", self.handle.list_indices)
        indexes = tuple(
            Index(
                str(c.index_type),
                tuple(map(_unquoted, c.columns)),
                c.name,
                reported_options(_native.index_details(c)),
            )
            for c in configs
        )
        return TableState(schema, indexes)

    async def uncovered(self, index: Index) -> int:
        """Returns the number of rows that an index does not cover."""
        configs = await self._read("list_indices", self.handle.list_indices)
        return sum(
            int(c.num_unindexed_rows or 0)
            for c in configs
            if str(c.index_type) == index.kind and tuple(map(_unquoted, c.columns)) == index.columns
        )

    async def row_ids(self, where: str | None) -> list[int]:
        """Returns the sorted row ids of the matching rows; compaction and updates change them."""
        query = self._query(where, []).with_row_id()
        found = await self._read("row_ids", query.to_arrow)
        return sorted(found["_rowid"].to_pylist())

    async def read(
        self, where: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Returns the matching rows, with all columns unless `columns` are given."""
        return await self._read("read", lambda: self._query(where, columns).to_arrow())

    async def batches(
        self, where: str | None, columns: Sequence[str] | None, max_rows: int
    ) -> AsyncIterator[pa.RecordBatch]:
        """Yields the matching rows in batches of at most `max_rows`."""
        reader = await self._read(
            "read",
            lambda: self._query(where, columns).to_batches(max_batch_length=max_rows),
        )
        while (batch := await self._read("read", lambda: anext(reader, None))) is not None:
            yield batch

    async def scan(
        self, where: str, columns: Sequence[str], max_rows: int
    ) -> AsyncIterator[pa.RecordBatch]:
        """Yields the matching rows in the order of the table, with the column `_rowid` (uint64).

        The upper 32 bits of `_rowid` are the number of the row's fragment.
        """
        query = self._query(where, columns).with_row_id()
        reader = await self._read("read", lambda: query.to_batches(max_batch_length=max_rows))
        while (batch := await self._read("read", lambda: anext(reader, None))) is not None:
            yield batch

    async def window(self, columns: Sequence[str], offset: int, rows: int) -> pa.Table:
        """Returns at most `rows` rows from a position in the order of the table."""
        query = self.handle.query().select(list(columns)).offset(offset).limit(rows)
        return await self._read("read", query.to_arrow)

    def _query(self, where: str | None, columns: Sequence[str] | None) -> Any:
        query = self.handle.query()
        if where is not None:
            query = query.where(whole(where))
        return query if columns is None else query.select(list(columns))

    async def count_rows(self, where: str | None = None) -> int:
        """Returns the number of matching rows."""
        condition = None if where is None else whole(where)
        return await self._read("count_rows", lambda: self.handle.count_rows(condition))

    async def fragments(self) -> int:
        """Returns the number of fragments."""
        stats: Any = await self._read("stats", self.handle.stats)
        return int(stats["fragment_stats"]["num_fragments"])

    async def size(self) -> int:
        """Returns the size of this version's data files in bytes."""
        stats: Any = await self._read("stats", self.handle.stats)
        return int(stats["total_bytes"])

    async def add(self, data: pa.Table) -> int:
        """Appends rows."""
        result = await self._commit("add", lambda: self.handle.add(data))
        return int(result.version)

    async def append(self, data: pa.Table) -> int:
        """Appends rows that have exactly the table's columns, see `_native.append`."""
        result = await self._commit("add", lambda: _native.append(self.handle, data))
        return int(result.version)

    async def insert_missing(self, key: str, data: pa.Table) -> int:
        """Inserts the rows whose key does not exist; returns the number of inserted rows.

        If `key` is the table's primary key and has no index, only one of several concurrent
        processes inserts a key.
        """
        merge = self.handle.merge_insert(key).when_not_matched_insert_all()
        result = await self._write(
            "insert_missing", lambda: _native.merge(self.handle, merge, data)
        )
        return int(result.num_inserted_rows)

    async def insert_new(self, key: str, data: pa.Table) -> tuple[int, int]:
        """Inserts the rows whose key does not exist; returns (rows, table_version)."""
        merge = self.handle.merge_insert(key).when_not_matched_insert_all()
        result = await self._commit("insert_new", lambda: _native.merge(self.handle, merge, data))
        return int(result.num_inserted_rows), int(result.version)

    async def replace_matching(self, key: str, data: pa.Table, condition: str) -> int:
        """Replaces rows of equal key that meet an SQL condition; returns the number replaced."""
        merge = self.handle.merge_insert(key).when_matched_update_all(where=condition)
        result = await self._write(
            "replace_matching", lambda: _native.merge(self.handle, merge, data)
        )
        return int(result.num_updated_rows)

    async def merge(self, key: str, data: pa.Table) -> tuple[int, int]:
        """Updates the rows of equal key and inserts the others; returns (rows, table_version)."""
        merge = self.handle.merge_insert(key).when_matched_update_all()
        merge = merge.when_not_matched_insert_all()
        result = await self._commit("merge", lambda: _native.merge(self.handle, merge, data))
        return int(result.num_updated_rows + result.num_inserted_rows), int(result.version)

    async def merge_columns(self, key: str, data: pa.Table, *, by_index: bool) -> tuple[int, int]:
        """Sets some columns of the rows of equal key; returns (rows, table_version).

        With an index on the key, a large merge rewrites the columns of whole fragments. It writes
        little, but LanceDB restarts it after each update or delete by another writer in these
        fragments, forever if they come faster than it merges. Without the index, a merge moves the
        rows and reads all keys, and such commits do not disturb it (measured: 0.6 s against 30 s
        without success).

        The merge has no condition: with a condition and an index on the key, LanceDB 0.40 panics
        ("Incorrect number of arrays for StructArray fields", measured).
        """
        merge = self.handle.merge_insert(key).when_matched_update_all()
        result = await self._commit(
            "merge", lambda: _native.merge(self.handle, merge, data, use_index=by_index)
        )
        return int(result.num_updated_rows), int(result.version)

    async def nearest(
        self, column: str, vector: Sequence[float], rows: int, key: str, where: str
    ) -> list[Any]:
        """Returns the keys of the matching rows nearest to a vector, nearest first."""
        query = self.handle.query().nearest_to(list(vector)).column(column).where(whole(where))
        found = await self._read("search", query.select([key, "_distance"]).limit(rows).to_arrow)
        return list(found[key].to_pylist())

    async def set_schema_metadata(self, metadata: Mapping[str, str | None]) -> int:
        """Sets entries of the schema's metadata, `None` removes one.

        This needs pylance, as lancedb alone cannot do it.

        Raises:
            StoreError: pylance failed.
            ImportError: pylance is not installed.
        """

        def act() -> None:
            import lance

            location = self.store.location_of(self.name)
            options = self.store.storage_options
            lance.dataset(location, storage_options=options).update_schema_metadata(dict(metadata))

        async def run() -> None:
            await anyio.to_thread.run_sync(act)
            await self.handle.checkout_latest()  # type: ignore[no-untyped-call]

        return await self._commit_unnumbered("set_schema_metadata", run)

    async def compute(
        self, work: Callable[[str, Mapping[str, str] | None], Awaitable[None]]
    ) -> int:
        """Adds columns by a function that commits to the table itself, for example on a cluster.

        Args:
            work: Called with the table's location and storage options; makes one commit.
        """

        async def run() -> None:
            await work(self.store.location_of(self.name), self.store.storage_options)
            await self.handle.checkout_latest()  # type: ignore[no-untyped-call]

        return await self._commit_unnumbered("compute", run)

    async def update(
        self,
        *,
        values: Mapping[str, Any] | None = None,
        sql: Mapping[str, str] | None = None,
        where: str | None = None,
    ) -> tuple[int, int]:
        """Sets columns of the matching rows to values or SQL; returns (rows, table_version)."""
        both = {column: whole(expression) for column, expression in (sql or {}).items()}
        literal = dict(values or {})
        condition = None if where is None else whole(where)
        if both and literal:
            both, literal = as_sql(literal, both), {}
        result = await self._commit(
            "update",
            lambda: self.handle.update(literal or None, where=condition, updates_sql=both or None),
        )
        return int(result.rows_updated), int(result.version)

    async def delete(self, where: str) -> int:
        """Deletes the matching rows."""
        result = await self._commit("delete", lambda: self.handle.delete(whole(where)))
        return int(result.version)

    async def add_columns(self, fields: Sequence[pa.Field[Any]]) -> int:
        """Adds nullable columns that are NULL in all rows; writes metadata only."""
        result = await self._commit("add_columns", lambda: self.handle.add_columns(list(fields)))
        return int(result.version)

    async def drop_columns(self, names: Sequence[str]) -> int:
        """Drops columns; writes metadata only."""
        result = await self._commit("drop_columns", lambda: self.handle.drop_columns(list(names)))
        return int(result.version)

    async def alter_columns(self, alterations: Sequence[Mapping[str, Any]]) -> int:
        """Renames columns, changes their types or their nullability, all in one commit."""
        changes = [dict(alteration) for alteration in alterations]
        # LanceDB's annotation is a list, but each argument is one alteration.
        alter: Any = self.handle.alter_columns
        result = await self._commit("alter_columns", lambda: alter(*changes))
        return int(result.version)

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> int:
        """Builds an index; see `schema.index.with_index` for the indexes that it replaces.

        Raises:
            ConfigurationError: lancedb's configuration class does not accept the options.
        """
        config = index_config(index.kind, options)
        return await self._commit_unnumbered(
            "create_index", lambda: self.handle.create_index(index.columns[0], config=config)
        )

    async def drop_index(self, name: str) -> int:
        """Drops an index."""
        return await self._commit_unnumbered("drop_index", lambda: self.handle.drop_index(name))

    async def set_metadata(self, column: str, metadata: Mapping[str, str | None]) -> int:
        """Sets entries of a column's metadata; `None` removes one."""
        change = {"path": column, "metadata": dict(metadata)}
        result = await self._commit(
            "set_metadata", lambda: self.handle.update_field_metadata(change)
        )
        return int(result.version)

    async def optimize(self, cleanup_older_than_s: float | None) -> tuple[int, bool]:
        """Compacts the table, updates its indexes, and optionally removes old versions.

        This makes several commits, or none if there is nothing to do.

        Args:
            cleanup_older_than_s: Minimum age in seconds of the versions to remove, `None` to keep
                all.

        Returns:
            The table_version afterwards, and whether data files were rewritten.
        """
        age = None if cleanup_older_than_s is None else dt.timedelta(seconds=cleanup_older_than_s)
        compacted = False

        async def run() -> None:
            nonlocal compacted
            done = await self.handle.optimize(cleanup_older_than=age)
            compacted = done.compaction.files_removed > 0

        version = await self._commit_unnumbered("optimize", run)
        return version, compacted

    async def set_primary_key(self, column: str) -> None:
        """Declares the (unenforced) primary key; it cannot be changed later."""
        await self._write("set_primary_key", lambda: self.handle.set_unenforced_primary_key(column))

    async def restore(self, table_version: int) -> int:
        """Commits a new version equal to an older one.

        It never fails because of other commits: it discards those made meanwhile from the head.
        To detect this, compare the result with the head before plus one (see `commits.savepoints`).
        """
        return await self._commit_unnumbered("restore", lambda: self.handle.restore(table_version))

    async def create_branch(self, name: str, table_version: int) -> Table:
        """Creates a branch at a table_version, which protects it from cleanup; returns a handle."""
        handle = await self._write(
            "create_branch", lambda: self.handle.branches.create(name, from_version=table_version)
        )
        return Table(self.store, self.name, handle)

    async def branches(self) -> list[str]:
        """Returns the names of all branches."""
        return list(await self._read("list_branches", self.handle.branches.list))

    async def delete_branch(self, name: str) -> None:
        """Deletes a branch."""
        await self._write("delete_branch", lambda: self.handle.branches.delete(name))

    async def compact(self) -> None:
        """Merges small fragments and removes versions older than two hours.

        Does nothing if another process commits at the same time: the next run compacts.
        """
        with contextlib.suppress(CommitConflictError):
            await self._write(
                "optimize",
                lambda: self.handle.optimize(cleanup_older_than=dt.timedelta(hours=2)),
            )


def _unquoted(path: str) -> str:
    """Returns the name of a column from LanceDB's path of it, which quotes unusual names."""
    return path[1:-1].replace("``", "`") if re.fullmatch(r"`(?:[^`]|``)*`", path) else path


def index_config(kind: str, options: Mapping[str, Any]) -> Any:
    """Returns lancedb's configuration of an index.

    Args:
        kind: The kind of index, such as `BTree`.
        options: Arguments of lancedb's configuration class.

    Raises:
        ConfigurationError: lancedb's configuration class does not accept the options.
    """
    name = config_name(kind)
    try:
        return _native.config_class(name)(**options)
    except TypeError as exc:
        raise ConfigurationError(
            f"{name} does not accept these options: {exc}.",
            f"See lancedb.index.{name} for its options.",
        ) from exc
