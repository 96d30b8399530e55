"""A table in the hands of one migration: every commit checked, announced, counted, attributed.

Implements the `Target` that operations act through. It knows which table_versions are ours and
which are foreign; what to do about foreign ones is for `executor`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
import pyarrow as pa

from aiomigrate import calling, effects
from aiomigrate import filling as filling_of
from aiomigrate.effects import CREATE, Effect, add_effect, insert_effect, merge_effect, shape_effect
from aiomigrate.errors import (
    CommitConflictError,
    KeepsProgressError,
    MigrationTimeoutError,
    OperationError,
    OverwriteLostError,
    StaleHandleError,
    StoreError,
    TableVersionGoneError,
    UnresolvedError,
)
from aiomigrate.lance import Commit, Opened, Store, Table
from aiomigrate.operations import paths
from aiomigrate.operations.base import Index, TableState, Transform, remember
from aiomigrate.operations.fill import Filling, Pace
from aiomigrate.savepoint import Guard, crossed, same_content
from aiomigrate.scale import Transform as ClusterTransform

Announce = Callable[[str, int, Sequence[Effect], Sequence[tuple[int, int]]], Awaitable[None]]
"""Makes durable what is about to be committed: table, table_version it is based on, effects of
that commit and of those foreseen after it, and the ranges of table_versions that others committed
before it."""


class Touched:
    """One table, open for the duration of a migration.

    Attributes:
        name: Its name.
        before: Its table_version when the migration began, 0 if it did not exist.
        was: Its state when the migration began, `None` if it did not exist.
        version: The last table_version seen or made.
        foreign: Ranges of table_versions since `before` that others committed.
        commits: How many commits we made.
        rows: How many rows they changed.
        retries: How many commits were tried again.
        witness: The column name that belongs to the operation in hand.
        ended: Whether the migration has ended, so that nothing may be written any more.
        keeps_progress: Whether it holds work that was paid for and must not be undone.
        told: What operations tell of their work, JSON values by topic.
        on_progress: Told how far the operation in hand is: done, total, and a few words.
        protect: Makes its savepoint, once its first commit is announced.
        ahead: What the next commits will do, as far as that can be foreseen: announced at once.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        guard: Guard,
        announce: Announce,
        others: Mapping[str, Touched],
    ) -> None:
        """Prepares; `open` reads.

        Args:
            store: Where.
            name: The table.
            guard: Asked before every commit.
            announce: Makes durable what is about to be committed.
            others: Every table the migration touches, by name.
        """
        self.name = name
        self.before = 0
        self.version = 0
        self.foreign: list[tuple[int, int]] = []
        self.commits = 0
        self.rows = 0
        self.retries = 0
        self.was: TableState | None = None
        self.witness = ""
        self.ended = False
        self.keeps_progress = False
        self.told: dict[str, Any] = {}
        self.on_progress: Callable[[int, int | None, str], None] = lambda done, total, note: None
        self.protect: Callable[[], Awaitable[None]] | None = None
        self.ahead: Sequence[Effect] = ()
        self._protecting: anyio.Lock | None = None
        self._store = store
        self._guard = guard
        self._announce = announce
        self._others = others
        self._announced: list[Effect] = []
        self._covered: tuple[Index, int] | None = None  # and since which table_version
        self._table: Table | None = None
        self._state: TableState | None = None

    async def open(self, known: Opened | None = None, *, is_latest: bool = False) -> None:
        """Opens the table at its latest version and reads its state; it may not exist.

        Args:
            known: The same table as it was a moment ago, whose handle is taken over.
            is_latest: Whether that is good enough as it is: a commit that others made since is
                found by the next one of ours.
        """
        if known is None or not (is_latest or await _is_latest(known)):
            await self._look()
        else:
            self._table, self.version, self._state = known.table, known.version, known.state
        self.before = 0 if self._state is None else self.version
        self.was = self._state

    async def resume_from(self, version: int) -> None:
        """Takes the table as a migration found it which a dead process began."""
        self.before = version
        self.was = None
        if version and self._table is not None:
            with contextlib.suppress(TableVersionGoneError):
                self.was = await (await self._table.at(version)).state()

    async def _look(self) -> None:
        self._table = await self._store.find(self.name)
        self.version = 0 if self._table is None else await self._table.version()
        self._state = None if self._table is None else await self._table.state()
        if self._state is not None and self._state.is_leftover:
            self._table = self._state = None  # the version stays: creating it is an overwrite

    async def reopen(self) -> None:
        """Moves to the latest version; what was committed since is not ours."""
        known = self.version
        await self._look()
        if self.version != known:  # lower: someone dropped it and made it again
            self.foreign.append((min(known, self.version) + 1, self.version))
            del self._announced[1:]  # foreseen for another table_version

    @property
    def state(self) -> TableState | None:
        """Schema and indexes as last read, `None` if the table does not exist."""
        return self._state

    @property
    def table(self) -> Table:
        """The open handle.

        Raises:
            OperationError: The table does not exist.
        """
        if self._table is None:
            raise OperationError(
                f"Table {self.name!r} does not exist.", "Create it in an earlier migration."
            )
        return self._table

    @property
    def shape(self) -> Mapping[str, Any] | None:
        """The table's shape, `None` if it does not exist."""
        return None if self._state is None else self._state.shape()

    @property
    def opened(self) -> Opened | None:
        """The open handle and what was last read through it, `None` if there is no table."""
        if self._table is None or self._state is None:
            return None
        return Opened(self._table, self.version, self._state)

    @property
    def is_announced(self) -> bool:
        """Whether the next commit may be announced already."""
        return bool(self._announced)

    async def _commit(
        self,
        effect: Effect,
        run: Callable[[Table], Awaitable[int]],
        *,
        after: TableState | None = None,
        look: bool = False,
    ) -> None:
        """Makes one commit.

        Args:
            effect: What it does, for the journal.
            run: Makes it.
            after: What the table should be afterwards; by default what it was before.
            look: Whether to ask for indexes even where there were none before.
        """
        table = self.table
        # Not again when another commit came first: with a handle this fresh it may succeed, and
        # since that commit is foreign, the base matters no more.
        if self._announced[:1] != [effect]:
            await self._tell(self.version, effect)
        await self._may_write()
        table.on_commit = self._note
        base = self.version
        await run(table)
        self._made(base)
        indexed = bool(self._known().indexes) or look or self.version != base + 1
        state = await table.state(indexed=indexed)
        self._state = state.foreseen_as(self._known() if after is None else after)

    async def _tell(self, base: int, effect: Effect) -> None:
        self._refuse_if_ended()
        ahead, self.ahead = self.ahead, ()
        told = list(ahead) if ahead and ahead[0] == effect else [effect]
        await self._announce(self.name, base, told, self.foreign)
        self._announced = told

    def _made(self, base: int) -> None:
        """Notes that the commit announced first was made."""
        del self._announced[: 1 if self.version == base + 1 else None]

    async def _may_write(self) -> None:
        self._refuse_if_ended()
        if self.protect is not None:
            self._protecting = self._protecting or anyio.Lock()
            async with self._protecting:
                if self.protect is not None:
                    await self.protect()
                    self.protect = None
        await self._guard()
        self._refuse_if_ended()

    def _refuse_if_ended(self) -> None:
        if self.ended:
            raise OperationError(
                f"Table {self.name!r} is written to by a migration that has ended.",
                "Await every task that the function starts before it returns.",
            )

    def _note(self, version: int) -> None:
        if version > self.version + 1:
            self.foreign.append((self.version + 1, version - 1))
        self.commits += version != self.version  # there may have been nothing to optimize
        self.version = version

    def _known(self) -> TableState:
        assert self._state is not None  # noqa: S101 - every caller holds an open table
        return self._state

    # ---- what operations do ---------------------------------------------------------------------

    def sibling(self, name: str) -> Touched:
        """Returns another table that the migration touches."""
        return self._others[name]

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        """Tells how far the operation in hand is."""
        self.on_progress(done, total, note)

    def tell(self, topic: str, what: Any) -> None:
        """Puts a JSON value into the migration's report and history."""
        self.told[topic] = what

    async def create(self, schema: pa.Schema, rows: pa.Table | None = None) -> None:
        """Creates the table; one that another process created meanwhile is brought back."""
        base = self.version
        await self._tell(base, CREATE)
        await self._may_write()
        making = self._store.create(self.name, schema, rows, overwrite=self.version > 0)
        await self._store.settle(self.name, lambda: self._created(making))
        self._made(base)
        self.rows += 0 if rows is None else len(rows)

    async def _created(self, making: Awaitable[Table]) -> None:
        table = await making
        version = await table.version()
        if version > self.version + 1:
            # LanceDB overwrote a table that appeared meanwhile: its content is one version below.
            mine = await table.restore(version - 1)
            if mine != version + 1:
                raise UnresolvedError(
                    f"Creating table {self.name!r} crossed others who created it: look at its "
                    f"table_versions {version - 1} to {mine}.",
                    f"Restore the right one with `await table.restore({version - 1})`, run again.",
                )
            raise StaleHandleError(
                f"Table {self.name!r} was created by someone else at the same moment.",
                "Look again.",
            )
        self._table = table
        self.version = version
        self.commits += 1
        self._state = await table.state(indexed=False)

    async def drop(self) -> None:
        """Drops the table, or what a drop that was killed has left of it."""
        await self._tell(self.version, {"do": "drop"})
        await self._may_write()
        await self._store.drop(self.name)
        self._table = self._state = None
        self.version = 0
        self.commits += 1

    async def overwrite(self, schema: pa.Schema, transform: Transform, *, batch_rows: int) -> None:
        """Replaces all rows by what becomes of them, in one commit that discards nothing.

        What others committed meanwhile is brought back, and the table overwritten again.

        Raises:
            OverwriteLostError: Others came first every time.
            StaleHandleError: Others changed the schema meanwhile, for which this one is not made.
            UnresolvedError: Bringing it back crossed yet another commit.
        """
        shape = self._known().shape()
        for _ in range(_OVERWRITES):
            base, source = self.version, self.table
            effect = {"do": "overwrite", "witness": self.witness}
            await self._tell(base, effect)
            await self._may_write()
            if await self._overwritten(base, source, schema, transform, batch_rows):
                return
            await self.reopen()
            if self._known().shape() != shape:
                raise StaleHandleError(
                    f"Others changed the schema of table {self.name!r} while it was rebuilt.",
                    "Look again.",
                )
        raise OverwriteLostError(
            f"Table {self.name!r} was committed to by others during each of {_OVERWRITES} "
            "attempts to rebuild it. Nothing of theirs was lost, and nothing of it was changed.",
            "Run it again when fewer processes write, or stop them while it runs.",
        )

    async def _overwritten(
        self,
        base: int,
        source: Table,
        schema: pa.Schema,
        transform: Transform,
        batch_rows: int,
    ) -> bool:
        async def rows() -> AsyncIterator[pa.RecordBatch]:
            async for batch in source.batches(None, None, batch_rows):
                yield await transform(batch)
            # The last moment at which nothing is committed yet, and so nothing to be undone.
            if await (await self._store.open(self.name)).version() != base:
                raise StaleHandleError(
                    f"Table {self.name!r} was committed to while it was read.", "Read it again."
                )

        try:
            table = await self._store.create_from(self.name, schema, rows(), overwrite=True)
        except StaleHandleError:
            self.retries += 1
            return False
        self._note(await table.version())
        if self.version == base + 1:
            self._table = table
            self._state = await table.state()
            self.rows += await table.count_rows()
            return True
        covered = (base + 1, self.version - 1)
        back = await table.restore(self.version - 1)
        if back != self.version + 1:
            raise crossed(self.name, covered, (self.version + 1, back - 1), back)
        self.version = back
        self.retries += 1
        return False

    async def copy_to(self, name: str) -> None:
        """Copies the table to a new one: rows, schema and indexes, compared afterwards.

        What others commit meanwhile is copied too. A copy that an interrupted run left is known
        by its witness, and made good.

        Raises:
            OperationError: There is a table of that name already.
            OverwriteLostError: Others committed during every attempt.
        """
        copy = self.sibling(name)
        copy.witness = self.witness
        if copy.state is not None and not copy.state.has(self.witness):
            raise OperationError(
                f"There is a table {name!r} already.", "Drop it first, or choose another name."
            )
        for _ in range(_OVERWRITES):
            state = self._known()
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
            f"Table {self.name!r} was committed to by others during each of {_OVERWRITES} "
            f"attempts to copy it to {name!r}.",
            "Stop its writers, then run it again.",
        )

    async def replace_by(self, other: Touched, schema: pa.Schema) -> None:
        """Makes this table the rows of another, in one commit."""

        async def rows() -> AsyncIterator[pa.RecordBatch]:
            total, done = await other.count_rows(), 0
            async for batch in other.table.batches(None, None, _COPY_ROWS):
                columns = [
                    batch.column(field.name)
                    if field.name in batch.schema.names
                    else pa.nulls(len(batch), field.type)
                    for field in schema
                ]
                done += len(batch)
                other.progress(done, total)
                yield pa.RecordBatch.from_arrays(columns, schema=schema)

        exists = self._state is not None
        await self._may_write()
        making = self._store.create_from(self.name, schema, rows(), overwrite=exists)
        if exists:
            self._table = await making
            self._note(await self._table.version())
            self._state = await self._table.state()
        else:
            await self._created(making)

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

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> None:
        """Builds an index."""
        after, effect = effects.indexing(self._known(), index)
        base = self.version
        await self._commit(effect, lambda t: t.create_index(index, options), look=True, after=after)
        self._covered = (index, self.version) if self.version == base + 1 else None

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
        return await calling.ask(function, values, kind, pace)

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
                transform, source=source, batch_rows=batch_rows, workers=workers
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

    async def count_rows(self, where: str | None = None) -> int:
        """Returns how many rows match."""
        return await self.table.count_rows(where)


async def _is_latest(known: Opened) -> bool:
    """Returns whether nobody has committed since; the handle moves on to what was."""
    try:
        await known.table.refresh()
        return await known.table.version() == known.version
    except StoreError:
        return False


_OVERWRITES = 3
_COMPUTATIONS = 3
_COMMITTED_FIRST = (CommitConflictError, StaleHandleError)
_MERGES = 8
_DROPS = 5
_COPY_ROWS = 4096
_SCAN_ROWS = 1024
_COVERING = 3
_BATCH_ROWS = 20_000
_PASSES = 20
_LIVE_ROWS = 20_000
_LIVE_S = 60.0
_LIVE_COMMITS = 3


def foreign_among(made: Sequence[Commit], *, before: int, after: int, compacted: bool) -> list[int]:
    """Returns which commits beside an optimization are not known to be its own. Pure.

    Its own change neither rows nor schema nor the list of indexes. One of them rewrites files, if
    it compacted; where several did, an update of all rows may be among them.

    Args:
        made: The commits that are still there, that before it included.
        before: The table_version before it.
        after: The table_version it ended with, which is its own.
        compacted: Whether it rewrote files.
    """
    by_version = {commit.version: commit for commit in made}
    foreign, rewrites = [], []
    for version in range(before + 1, after + 1):
        old, new = by_version.get(version - 1), by_version.get(version)
        if old is None or new is None or old.rows != new.rows or _differ(old.state, new.state):
            foreign.append(version)
        elif old.files != new.files:
            rewrites.append(version)
    if not (compacted and len(rewrites) == 1):
        foreign += rewrites
    return sorted(version for version in foreign if version != after)


def _differ(one: TableState, other: TableState) -> bool:
    names = [sorted(index.name for index in state.indexes) for state in (one, other)]
    return names[0] != names[1] or not one.schema.equals(other.schema, check_metadata=True)
