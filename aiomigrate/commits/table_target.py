"""A table as operations and functions change it: implements the `Target` protocol of `operations`.

Every method is made of commits that `tracked_table` announces, guards and attributes.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import anyio
import pyarrow as pa

from aiomigrate.backfill import caller
from aiomigrate.backfill import engine as filling_of
from aiomigrate.backfill.ray import Transform as ClusterTransform
from aiomigrate.backfill.ray import add_by_ray
from aiomigrate.commits import effects
from aiomigrate.commits.commit_identity import foreign_among
from aiomigrate.commits.effects import (
    Effect,
    add_effect,
    insert_effect,
    merge_effect,
    shape_effect,
)
from aiomigrate.commits.tracked_table import TrackedTable
from aiomigrate.errors import (
    CommitConflictError,
    KeepsProgressError,
    MigrationTimeoutError,
    StaleHandleError,
    StoreError,
)
from aiomigrate.operations.fill import Filling, Pace
from aiomigrate.schema import paths
from aiomigrate.schema.state import Index
from aiomigrate.store.table import Table


class TableTarget(TrackedTable):
    """One table whose columns, indexes and rows a migration changes."""

    async def add_columns(self, fields: Sequence[pa.Field[Any]]) -> None:
        """Adds nullable columns; a struct that is there gets the fields it lacks."""
        after, effect = effects.adding(self._known(), fields)
        await self._commit(effect, lambda t: t.add_columns(fields), after=after)

    async def drop_columns(self, names: Sequence[str]) -> None:
        """Drops columns."""
        after, effect = effects.dropping(self._known(), names)
        # LanceDB drops the last column that holds data, and fails at the next look only.
        await self._commit(effect, lambda t: t.drop_columns(names), look=True, after=after)

    async def alter_columns(self, alterations: Sequence[Mapping[str, Any]]) -> None:
        """Renames columns, changes their nullability or their type, in one commit."""
        after, effect = effects.altering(self._known(), alterations)
        await self._commit(effect, lambda t: t.alter_columns(alterations), after=after)

    async def set_metadata(self, column: str, metadata: Mapping[str, str | None]) -> None:
        """Sets entries of a column's metadata."""
        await self._commit(shape_effect(self._known()), lambda t: t.set_metadata(column, metadata))

    async def cover_key(self, key: str) -> None:
        """Builds the index on a key anew, for all rows that are there."""
        for index in self._known().indexes:
            if index == Index("BTree", (key,)):
                await self.create_index(index, index.options)

    async def cover(self, index: Index, timeout_s: float) -> None:
        """Waits until an index covers the rows that are there, bringing it up to date.

        Under a writer new rows are uncovered again at once: what counts is that a pass covered
        all that was there when it began. One just built does, if no other commit came between.

        Raises:
            MigrationTimeoutError: It did not within the time.
        """
        if self._covered == (index, self.version):
            return
        with anyio.move_on_after(timeout_s):
            passes = 0
            while await self.table.uncovered(index) and passes < _COVERING:
                self.progress(passes, None)
                await self.optimize(None)
                passes += 1
            return
        raise MigrationTimeoutError(
            f"The index {index} of table {self.name!r} did not cover its rows in {timeout_s:g} s.",
            "Raise timeout_s of the operation, or build it when fewer rows are written.",
        )

    async def drop_index(self, name: str) -> None:
        """Drops an index.

        LanceDB commits the drop of one that another program's `optimize` has just renewed, and
        keeps it (measured): then it is dropped again.
        """
        for _ in range(_DROPS):
            after, effect = effects.unindexing(self._known(), name)
            await self._commit(effect, lambda t: t.drop_index(name), after=after)
            if all(index.name != name for index in self._known().indexes):
                return
        raise StaleHandleError(
            f"The index {name!r} of table {self.name!r} was renewed by others each time it was "
            "dropped.",
            "Run it again when nobody optimizes the table.",
        )

    async def update(
        self,
        *,
        values: Mapping[str, Any],
        sql: Mapping[str, str],
        where: str | None,
        unless_live: bool = False,
    ) -> int | None:
        """Sets columns of the matching rows; returns how many.

        Where none matches there is no commit, unless it was announced with an earlier one.

        Args:
            values: Literals by column.
            sql: Expressions by column.
            where: The rows, `None` for all.
            unless_live: Do nothing, and return `None`, where that would hold up others.
        """
        effect = effects.updating(values, sql, where)
        count = await self.count_rows()
        # One that is announced is made: to find out which rows match takes as long.
        is_told = count < _LIVE_ROWS and self._announced[:1] == [effect]
        if count and where is not None and not is_told:
            count = await self.count_rows(where)
        if not count:
            self._announced.clear()  # what was foreseen after it is told anew, together
            return 0
        if unless_live and count >= _LIVE_ROWS and await self._is_committed_to():
            return None
        return await self._updated(effect)

    async def _updated(self, effect: Effect) -> int:
        changed = 0

        async def run(table: Table) -> int:
            nonlocal changed
            # What is announced, so that it can be done again to tell it.
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
        """Sets columns of the matching rows so that they match no more; returns how many.

        In one commit, or in batches beside other writers; passes go on until no row matches.

        Args:
            values: Literals by column.
            sql: Expressions by column.
            where: The rows that are to do.
            batch_rows: Rows of a commit; 0 for all, `None` to choose.
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
                changed += await self._updated(effects.updating(values, sql, within))
                self.progress(start + len(chunk), len(todo))
            await self.reopen()
        return changed

    async def fill(self, filling: Filling) -> int:
        """Fills a column by a function, in commits of many rows; returns how many it filled.

        Raises:
            KeepsProgressError: It stopped, and goes on when it is run again.
        """
        return await filling_of.fill(self, filling)

    async def ask(
        self, function: Callable[..., Any], values: Sequence[Any], kind: pa.DataType, pace: Pace
    ) -> list[Any]:
        """Calls a function with values as `fill` would; returns what it gave, as Python values.

        Raises:
            KeepsProgressError: It failed every time.
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

        Raises:
            KeepsProgressError: Others committed during every attempt.
        """
        transform = ClusterTransform(function, source, fields)
        after = self._known().with_schema(paths.merged(self._known().schema, fields))

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

        for attempt in range(1, _COMPUTATIONS + 1):
            self.progress(0, None, f"on the cluster, attempt {attempt}")
            try:
                await self._commit(shape_effect(after), run, after=after)
            except _COMMITTED_FIRST:
                self.retries += 1
                await self.reopen()
            else:
                return
        raise KeepsProgressError(
            f"Table {self.name!r} was committed to by others during each of {_COMPUTATIONS} "
            "attempts to compute its columns on the cluster; nothing of it was committed.",
            "Run it again when nobody writes, or with engine=op.Engine.LOCAL, which works beside "
            "writers.",
        )

    async def sample(self, where: str, columns: Sequence[str], rows: int, *, seed: str) -> pa.Table:
        """Returns some of the matching rows, the same for the same seed and rows."""
        ids = await self.table.row_ids(where)
        chosen = sorted(random.Random(seed).sample(ids, min(rows, len(ids))))  # noqa: S311
        if not chosen:
            return (await self.table.read("false", columns)).slice(0, 0)
        listed = ", ".join(map(str, chosen))
        return await self.table.read(f"_rowid IN ({listed})", columns)

    async def nearest(
        self, column: str, vectors: Sequence[Sequence[float]], rows: int, key: str, where: str
    ) -> list[list[Any]]:
        """Returns, for each vector, the keys of the rows nearest to it."""
        found: list[list[Any]] = []
        for done, vector in enumerate(vectors):
            self.progress(done, len(vectors), "comparing neighbours")
            found.append(await self.table.nearest(column, vector, rows, key, where))
        return found

    async def set_schema_metadata(self, metadata: Mapping[str, str | None]) -> None:
        """Sets entries of the schema's metadata."""
        effect = shape_effect(self._known())
        await self._commit(effect, lambda table: table.set_schema_metadata(metadata))

    def free_bytes(self) -> int | None:
        """Returns how much the disk still takes, `None` where that is not known."""
        return self._store.free_bytes()

    @property
    def schema(self) -> pa.Schema:
        """The table's Arrow schema as last read."""
        return self._known().schema

    async def scan(self, where: str, columns: Sequence[str]) -> AsyncIterator[pa.RecordBatch]:
        """Yields the matching rows of the latest table_version, with `_rowid`, in its order."""
        other = await self._store.open(self.name)  # ours moves on with each commit
        async for batch in other.scan(where, columns, _SCAN_ROWS):
            yield batch

    async def merge_columns(self, key: str, data: pa.Table, *, crowded: bool) -> int:
        """Sets some columns of the rows of equal key; returns how many rows.

        Doing it twice is doing it once: it is tried again whatever the store says.

        Args:
            key: The key.
            data: The key and the columns.
            crowded: Whether others write, so that it should not be in their way.
        """
        changed = 0

        async def run(table: Table) -> int:
            nonlocal changed
            changed, version = await table.merge_columns(key, data, by_index=not crowded)
            self.keeps_progress = True
            return version

        effect = {"do": "fill", "key": key, "columns": [n for n in data.schema.names if n != key]}
        for attempt in range(_MERGES):
            try:
                await self._commit(effect, run)
                break
            except StoreError:
                if attempt == _MERGES - 1:
                    raise
                self.retries += 1
                crowded = True
                await anyio.sleep(min(0.05 * 2**attempt, 2.0))
                await self.reopen()
        self.rows += changed
        return changed

    async def uncovered(self, index: Index) -> int:
        """Returns how many rows an index does not cover."""
        return await self.table.uncovered(index)

    async def is_live(self) -> bool:
        """Returns whether others committed to a large table within the last minute."""
        return await self.count_rows() >= _LIVE_ROWS and await self._is_committed_to()

    async def _is_committed_to(self) -> bool:
        recent = await self.table.recent_commits(_LIVE_S)
        foreign = [v for v in recent if v <= self.before or self._is_foreign(v)]
        return len(foreign) >= _LIVE_COMMITS

    def _is_foreign(self, version: int) -> bool:
        return any(first <= version <= last for first, last in self.foreign)

    async def insert_missing(self, key: str, rows: pa.Table) -> int:
        """Inserts the rows whose key is not there; returns how many."""
        inserted = 0

        async def run(table: Table) -> int:
            nonlocal inserted
            inserted, version = await table.insert_new(key, rows)
            return version

        await self._commit(insert_effect(rows), run)
        self.rows += inserted
        return inserted

    async def optimize(self, cleanup_older_than_s: float | None) -> None:
        """Compacts and brings indexes up to date: commits that change no row."""
        before, known = self.version, list(self.foreign)
        compacted = False

        async def run(table: Table) -> int:
            nonlocal compacted
            version, compacted = await table.optimize(cleanup_older_than_s)
            return version

        await self._commit({"do": "optimize"}, run)
        # It makes up to three commits, and the last is ours: only those between are in question.
        if self.version > before + 1:
            made = await self.table.commits(before, self.version)
            others = foreign_among(made, before=before, after=self.version, compacted=compacted)
            self.foreign = [*known, *((version, version) for version in others)]

    async def batches(
        self, where: str | None, columns: Sequence[str] | None, rows: int
    ) -> AsyncIterator[pa.RecordBatch]:
        """Yields the matching rows, as they were when it was opened."""
        async for batch in self.table.batches(where, columns, rows):
            yield batch

    # ---- what functions do ----------------------------------------------------------------------

    async def add(self, data: pa.Table) -> None:
        """Appends rows."""
        await self._commit(add_effect(data), lambda t: t.add(data))
        self.rows += len(data)

    async def delete(self, where: str) -> int:
        """Deletes the matching rows; returns how many there were."""
        count = await self.count_rows(where)
        await self._commit({"do": "delete", "where": where}, lambda t: t.delete(where))
        self.rows += count
        return count

    async def merge(self, key: str, data: pa.Table) -> int:
        """Updates rows of equal key and inserts the others; returns how many."""
        changed = 0

        async def run(table: Table) -> int:
            nonlocal changed
            changed, version = await table.merge(key, data)
            return version

        await self._commit(merge_effect(key, data), run)
        self.rows += changed
        return changed


_COMPUTATIONS = 3
_COMMITTED_FIRST = (CommitConflictError, StaleHandleError)
_MERGES = 8
_DROPS = 5
_SCAN_ROWS = 1024
_COVERING = 3
_BATCH_ROWS = 20_000
_PASSES = 20
_LIVE_ROWS = 20_000
_LIVE_S = 60.0
_LIVE_COMMITS = 3
