"""The table through which operations and functions act: implements `operations.target.Target`.

Every commit goes through `commits.tracked_table`, which announces it, checks the lease and
attributes it. A crash or a cancellation between two commits leaves the earlier ones, which
`execution` undoes or continues from. Deciding that is not done here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import anyio
import pyarrow as pa

from aiomigrate.backfill import caller, engine
from aiomigrate.backfill.ray import Transform as ClusterTransform
from aiomigrate.backfill.ray import add_by_ray
from aiomigrate.commits import effects
from aiomigrate.commits.commit_identity import foreign_commits, same_content
from aiomigrate.commits.effects import (
    AnnouncedCommits,
    Effect,
    add_effect,
    insert_effect,
    merge_effect,
    shape_effect,
)
from aiomigrate.commits.tracked_table import OVERWRITE_ATTEMPTS, TrackedTable
from aiomigrate.errors import (
    CommitConflictError,
    KeepsProgressError,
    MigrationTimeoutError,
    OperationError,
    OverwriteLostError,
    StaleHandleError,
    StoreError,
)
from aiomigrate.operations.fill import Filling, Pace
from aiomigrate.schema import paths
from aiomigrate.schema.state import Index, remember
from aiomigrate.store.commit_log import commits_between, recent_commits
from aiomigrate.store.table import Table


class TableTarget(TrackedTable):
    """A table whose columns, indexes and rows a migration changes.

    Every writing method announces its commits and checks the lease before each of them. It raises
    `OperationError` if the table does not exist or the migration has ended, `LeaseLostError` if
    another process has taken over, and `StoreError` if LanceDB fails.
    """

    async def copy_to(self, name: str) -> None:
        """Copies rows, schema and indexes to a new table, and compares them afterwards.

        If another writer commits meanwhile, the table is copied again. The copy that an
        interrupted run left is recognised by its witness column and completed.

        Args:
            name: The new table.

        Raises:
            LeaseLostError: Another process has taken over; nothing more was written.
            OperationError: Another table of that name exists.
            OverwriteLostError: Other writers committed during each of `OVERWRITE_ATTEMPTS`
                attempts.
        """
        copy = self.sibling(name)
        copy.witness = self.witness
        if copy.state is not None and not copy.state.has(self.witness):
            raise OperationError(
                f"Table {name!r} already exists.", "Drop it first, or choose another name."
            )
        for _ in range(OVERWRITE_ATTEMPTS):
            state = self._current()
            is_copied = (
                copy.state is not None
                and copy.state.shape()["fields"] == state.shape()["fields"]
                and await same_content(self.table, copy.table)
            )
            if not is_copied:
                fields = [*state.fields(), remember(self.witness, {})]
                await copy.replace_by(
                    self, pa.schema(fields, metadata=dict((state.schema.metadata or {}).items()))
                )
            for index in state.indexes:
                if copy.state is None or index not in copy.state.indexes:
                    await copy.create_index(index, index.options)
            base = self.version
            await self.reopen()
            if self.version == base:
                return
        raise OverwriteLostError(
            f"Other writers committed to table {self.name!r} during each of {OVERWRITE_ATTEMPTS} "
            f"attempts to copy it to {name!r}.",
            "Stop its writers, then run again.",
        )

    async def replace_by(self, other: TableTarget, schema: pa.Schema) -> None:
        """Replaces the content of this table by the rows of another one, in one commit.

        Args:
            other: The table to copy; its progress callback is called.
            schema: The Arrow schema; columns that `other` does not have are NULL.
        """

        async def rows() -> AsyncIterator[pa.RecordBatch]:
            total, done = await other.count_rows(), 0
            async for batch in other.table.batches(None, None, _COPY_ROWS):
                have = dict(zip(batch.schema.names, batch.columns, strict=True))
                columns = [
                    have[f.name] if f.name in have else pa.nulls(len(batch), f.type) for f in schema
                ]
                done += len(batch)
                other.progress(done, total)
                yield pa.RecordBatch.from_arrays(columns, schema=schema)

        exists = self._state is not None
        await self._may_write()
        making = self._store.create_from(self.name, schema, rows(), overwrite=exists)
        if exists:
            self._table = await making
            self._record_version(await self._table.version())
            self._state = await self._table.state()
        else:
            await self._finish_create(making)

    async def add_columns(self, fields: Sequence[pa.Field[Any]]) -> None:
        """Adds nullable columns, or missing fields of a struct column, in one commit."""
        _, effect = effects.add_columns(self._current(), fields)
        await self._commit(effect, lambda t: t.add_columns(fields))

    async def drop_columns(self, names: Sequence[str]) -> None:
        """Drops columns in one commit."""
        _, effect = effects.drop_columns(self._current(), names)
        # LanceDB drops even the last column that holds data, and fails only at the next read.
        await self._commit(effect, lambda t: t.drop_columns(names), read_indexes=True)

    async def alter_columns(self, alterations: Sequence[Mapping[str, Any]]) -> None:
        """Renames columns, changes their nullability or their type, in one commit."""
        _, effect = effects.alter_columns(self._current(), alterations)
        await self._commit(effect, lambda t: t.alter_columns(alterations))

    async def set_metadata(self, column: str, metadata: Mapping[str, str | None]) -> None:
        """Sets entries of a column's metadata in one commit; `None` removes an entry."""
        await self._commit(
            shape_effect(self._current()), lambda t: t.set_metadata(column, metadata)
        )

    async def cover_key(self, key: str) -> None:
        """Rebuilds the B-tree index on a key column for all rows; does nothing if there is none."""
        for index in self._current().indexes:
            if index == Index("BTree", (key,)):
                await self.create_index(index, index.options)

    async def cover(self, index: Index, timeout_s: float) -> None:
        """Updates an index until it covers the existing rows.

        While other writers append rows, new rows are always uncovered, so at most `_INDEX_PASSES`
        passes are made; each covers the rows that existed when it began. An index that was just
        built covers all rows if no commit came between.

        Args:
            index: The index.
            timeout_s: Seconds to wait.

        Raises:
            MigrationTimeoutError: The index did not cover the rows within the timeout.
        """
        if self._built_index == (index, self.version):
            return
        with anyio.move_on_after(timeout_s):
            for passes in range(_INDEX_PASSES):
                if not await self.table.uncovered(index):
                    break
                self.progress(passes, None)
                await self.optimize(None)
            return
        raise MigrationTimeoutError(
            f"The index {index} of table {self.name!r} did not cover its rows in {timeout_s:g} s.",
            "Raise timeout_s of the operation, or build it when fewer rows are written.",
        )

    async def drop_index(self, name: str) -> None:
        """Drops an index.

        If another program's `optimize` has just renewed the index, LanceDB commits the drop but
        keeps the index (measured). The index is then dropped again.

        Raises:
            StaleHandleError: The index was renewed after each of `_DROP_ATTEMPTS` drops.
        """
        for _ in range(_DROP_ATTEMPTS):
            _, effect = effects.drop_index(self._current(), name)
            await self._commit(effect, lambda t: t.drop_index(name))
            if all(index.name != name for index in self._current().indexes):
                return
        raise StaleHandleError(
            f"The index {name!r} of table {self.name!r} was renewed by another program each time "
            "it was dropped.",
            "Run again when no other program optimizes the table.",
        )

    async def update(
        self,
        *,
        values: Mapping[str, Any],
        sql: Mapping[str, str],
        where: str | None,
        unless_live: bool = False,
    ) -> int | None:
        """Sets columns of the matching rows in one commit.

        If no row matches, no commit is made, unless it was announced with an earlier commit.

        Args:
            values: Literals by column.
            sql: Expressions by column.
            where: SQL condition on the rows, `None` for all rows.
            unless_live: Whether to do nothing and return `None` if the commit would block other
                writers.

        Returns:
            The number of changed rows, 0 if none matched.
        """
        effect = effects.update(values, sql, where)
        count = await self.count_rows()
        # An announced update is made: counting the matching rows takes as long.
        is_predicted = count < _LIVE_ROWS and self._announced.begin_with(effect)
        if count and where is not None and not is_predicted:
            count = await self.count_rows(where)
        if not count:
            self._announced = AnnouncedCommits()  # what was predicted after it is announced again
            return 0
        if unless_live and count >= _LIVE_ROWS and await self._is_committed_to():
            return None
        return await self._update_once(effect)

    async def _update_once(self, effect: Effect) -> int:
        changed = 0

        async def run(table: Table) -> int:
            nonlocal changed
            # The announced SQL, so that the update can be repeated to check the commit.
            changed, version = await table.update(sql=effect["sql"], where=effect["where"])
            return version

        await self._commit(effect, run)
        self.rows += changed
        return changed

    async def update_in_batches(
        self,
        *,
        values: Mapping[str, Any],
        sql: Mapping[str, str],
        where: str,
        batch_rows: int | None,
    ) -> int:
        """Sets columns of the matching rows so that they no longer match.

        Makes one commit, or batches of rows while other writers commit, until no row matches (at
        most `_PASSES` passes).

        Args:
            values: Literals by column.
            sql: Expressions by column.
            where: SQL condition on the rows that are still to be changed.
            batch_rows: Rows per commit; 0 for one commit, `None` to choose batches only if
                `is_live`.

        Returns:
            The number of changed rows, 0 if none matched.
        """
        if batch_rows is None:
            batch_rows = _BATCH_ROWS if await self.is_live() else 0
        if not batch_rows:
            return await self.update(values=values, sql=sql, where=where) or 0
        changed = 0
        for _ in range(_PASSES):
            todo = await self.table.row_ids(where)
            if not todo:
                break
            for start in range(0, len(todo), batch_rows):
                chunk = todo[start : start + batch_rows]
                within = f"({where}) AND _rowid >= {chunk[0]} AND _rowid <= {chunk[-1]}"
                changed += await self._update_once(effects.update(values, sql, within))
                self.progress(start + len(chunk), len(todo))
            await self.reopen()
        return changed

    async def fill(self, filling: Filling) -> int:
        """Fills a column by calling a function, in commits of many rows (`backfill.engine`).

        Returns:
            The number of filled rows.

        Raises:
            KeepsProgressError: It stopped. The filled rows are kept; the next run continues.
        """
        return await engine.fill(self, filling)

    async def ask(
        self, function: Callable[..., Any], values: Sequence[Any], kind: pa.DataType, pace: Pace
    ) -> list[Any]:
        """Calls a function with values as `fill` does; returns its results as Python values.

        Raises:
            KeepsProgressError: Every attempt failed.
        """
        return await caller.call_with_retries(function, values, kind, pace)

    async def compute(
        self,
        function: Any,
        source: str,
        fields: Sequence[pa.Field[Any]],
        *,
        batch_rows: int,
        workers: int,
    ) -> None:
        """Adds columns that a Ray cluster computes, in one commit.

        Args:
            function: Computes the columns from a batch.
            source: The column that the function reads.
            fields: Name and Arrow type of each new column.
            batch_rows: Rows per batch.
            workers: Number of Ray workers.

        Raises:
            KeepsProgressError: Other writers committed during every attempt; nothing was changed.
        """
        transform = ClusterTransform(function, source, fields)
        after = self._current().with_schema(paths.merged(self._current().schema, fields))

        async def run(table: Table) -> int:
            version = await table.compute(
                partial(
                    add_by_ray,
                    transform=transform,
                    source=source,
                    batch_rows=batch_rows,
                    workers=workers,
                )
            )
            self.keeps_progress = True
            return version

        for attempt in range(1, _COMPUTE_ATTEMPTS + 1):
            self.progress(0, None, f"on the cluster, attempt {attempt}")
            try:
                await self._commit(shape_effect(after), run)
            except _COMMITTED_FIRST:
                self.retries += 1
                await self.reopen()
            else:
                return
        raise KeepsProgressError(
            f"Other writers committed to table {self.name!r} during each of {_COMPUTE_ATTEMPTS} "
            "attempts to compute its columns on the cluster; the columns were not added.",
            "Run again when no other process writes, or use engine=op.Engine.LOCAL, which works "
            "while other processes write.",
        )

    async def set_schema_metadata(self, metadata: Mapping[str, str | None]) -> None:
        """Sets entries of the schema's metadata in one commit; `None` removes an entry."""
        effect = shape_effect(self._current())
        await self._commit(effect, lambda table: table.set_schema_metadata(metadata))

    async def merge_columns(self, key: str, data: pa.Table, *, crowded: bool) -> int:
        """Sets columns of the rows whose keys are given, in one commit.

        It is idempotent and therefore retried after any store error (up to `_MERGE_ATTEMPTS`
        attempts).

        Args:
            key: The key column.
            data: The key column and the columns to set.
            crowded: Whether other writers commit to the table. Then the index is
                not used, because with it each of their commits makes LanceDB begin again.

        Returns:
            The number of changed rows.
        """
        changed = 0

        async def run(table: Table) -> int:
            nonlocal changed
            changed, version = await table.merge_columns(key, data, by_index=not crowded)
            self.keeps_progress = True
            return version

        effect = {"do": "fill", "key": key, "columns": [n for n in data.schema.names if n != key]}
        for attempt in range(_MERGE_ATTEMPTS):
            try:
                await self._commit(effect, run)
                break
            except StoreError:
                if attempt == _MERGE_ATTEMPTS - 1:
                    raise
                self.retries += 1
                crowded = True
                await anyio.sleep(min(0.05 * 2**attempt, 2.0))
                await self.reopen()
        self.rows += changed
        return changed

    async def is_live(self) -> bool:
        """Returns whether the table is large and under concurrent writes.

        That is: at least `_LIVE_ROWS` rows, and at least `_LIVE_COMMITS` foreign commits within
        the last `_LIVE_S` seconds.
        """
        return await self.count_rows() >= _LIVE_ROWS and await self._is_committed_to()

    async def _is_committed_to(self) -> bool:
        recent = await recent_commits(self.table, _LIVE_S)
        spans = [(0, self.before), *self.foreign]
        foreign = [v for v in recent if any(first <= v <= last for first, last in spans)]
        return len(foreign) >= _LIVE_COMMITS

    async def insert_missing(self, key: str, rows: pa.Table) -> int:
        """Inserts the rows whose keys do not exist, in one commit; returns their number."""
        inserted = 0

        async def run(table: Table) -> int:
            nonlocal inserted
            inserted, version = await table.insert_new(key, rows)
            return version

        await self._commit(insert_effect(rows), run)
        self.rows += inserted
        return inserted

    async def optimize(self, cleanup_older_than_s: float | None) -> None:
        """Compacts the table and updates its indexes; no commit changes a row.

        Args:
            cleanup_older_than_s: Also removes table_versions that are older than this many
                seconds; `None` removes none.
        """
        before, known = self.version, list(self.foreign)
        compacted = False

        async def run(table: Table) -> int:
            nonlocal compacted
            version, compacted = await table.optimize(cleanup_older_than_s)
            return version

        await self._commit({"do": "optimize"}, run)
        # It makes up to three commits, and the last is its own: only those between can be foreign.
        if self.version > before + 1:
            made = await commits_between(self.table, before, self.version)
            others = foreign_commits(made, before=before, after=self.version, compacted=compacted)
            self.foreign = [*known, *((version, version) for version in others)]

    async def add(self, data: pa.Table) -> None:
        """Appends rows in one commit."""
        await self._commit(add_effect(data), lambda t: t.add(data))
        self.rows += len(data)

    async def delete(self, where: str) -> int:
        """Deletes the matching rows in one commit; returns their number."""
        count = await self.count_rows(where)
        await self._commit({"do": "delete", "where": where}, lambda t: t.delete(where))
        self.rows += count
        return count

    async def merge(self, key: str, data: pa.Table) -> int:
        """Updates the rows whose keys exist and inserts the other rows, in one commit.

        Returns:
            The number of updated and inserted rows.
        """
        changed = 0

        async def run(table: Table) -> int:
            nonlocal changed
            changed, version = await table.merge(key, data)
            return version

        await self._commit(merge_effect(key, data), run)
        self.rows += changed
        return changed


_COMPUTE_ATTEMPTS = 3
_COMMITTED_FIRST = (CommitConflictError, StaleHandleError)
_MERGE_ATTEMPTS = 8
_DROP_ATTEMPTS = 5
_INDEX_PASSES = 3
_BATCH_ROWS = 20_000
_PASSES = 20
_LIVE_ROWS = 20_000
_LIVE_S = 60.0
_LIVE_COMMITS = 3
_COPY_ROWS = 4096
