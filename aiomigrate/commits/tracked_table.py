"""Tracks one table during a migration: announces, checks, counts and attributes every commit.

The base of `commits.table_target`: opening, announcing and committing, and whole-table changes. It
knows which table_versions the migration made and which are foreign; how to handle foreign ones is
decided in `execution.executor` and `execution.recovery`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Self

import anyio
import pyarrow as pa

from aiomigrate.commits import effects
from aiomigrate.commits.commit_identity import same_content
from aiomigrate.commits.effects import CREATE, Effect
from aiomigrate.commits.savepoints import Guard, unresolved_overwrite
from aiomigrate.errors import (
    OperationError,
    OverwriteLostError,
    StaleHandleError,
    StoreError,
    TableVersionGoneError,
    UnresolvedError,
)
from aiomigrate.operations.target import Transform
from aiomigrate.schema.state import Index, TableState, remember
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Opened, Table

Announce = Callable[[str, int, Sequence[Effect], Sequence[tuple[int, int]]], Awaitable[None]]
"""Announces commits durably: called with the table, the table_version that the first is based on,
the effects of that commit and of those predicted after it, and ranges of foreign table_versions."""


class TrackedTable:
    """A table that is open for the duration of a migration.

    Attributes:
        name: Its name.
        before: Its table_version when the migration began, 0 if it did not exist.
        was: Its state when the migration began, `None` if it did not exist.
        version: The last table_version read or made.
        foreign: Ranges of foreign table_versions since `before`, first and last.
        commits: Number of commits that the migration made.
        rows: Number of rows that they changed.
        retries: Number of commits that were retried.
        witness: The witness column of the current operation, empty if it needs none.
        ended: Whether the migration has ended; every later write is refused.
        keeps_progress: Whether it holds results of paid work, which are never undone.
        facts: What operations report about their work, JSON values by topic.
        on_progress: Called with the progress of the current operation: done, total, a note.
        protect: Creates the savepoint, once the first commit is announced; `None` if none is due.
        predicted: Effects of the next commits (`execution.lookahead`), announced together.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        guard: Guard,
        announce: Announce,
        others: Mapping[str, Self],
    ) -> None:
        """Initializes without I/O; `open` reads the table.

        Args:
            store: The database.
            name: The table.
            guard: Checks the lease before every commit.
            announce: Announces commits in the journal.
            others: Every table that the migration touches, by name.
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
        self.facts: dict[str, Any] = {}
        self.on_progress: Callable[[int, int | None, str], None] = lambda done, total, note: None
        self.protect: Callable[[], Awaitable[None]] | None = None
        self.predicted: Sequence[Effect] = ()
        self._protecting: anyio.Lock | None = None
        self._store = store
        self._guard = guard
        self._announce = announce
        self._others = others
        self._announced: list[Effect] = []
        self._built_index: tuple[Index, int] | None = None  # and its table_version
        self._table: Table | None = None
        self._state: TableState | None = None

    async def open(self, known: Opened | None = None, *, is_latest: bool = False) -> None:
        """Opens the table at its latest version and reads its state; it may not exist.

        Args:
            known: An open handle of the table with its last known version and state, if any.
            is_latest: Whether to use `known` without checking that it is still the latest
                version. The next commit detects foreign commits in between.

        Raises:
            StoreError: The table exists but cannot be read.
        """
        if known is None or not (is_latest or await _is_latest(known)):
            await self._read()
        else:
            self._table, self.version, self._state = known.table, known.version, known.state
        self.before = 0 if self._state is None else self.version
        self.was = self._state

    async def resume_from(self, version: int) -> None:
        """Sets `before` and `was` to the start of an attempt whose process crashed.

        Args:
            version: The table_version at the start of that attempt, 0 if there was no table.
        """
        self.before = version
        self.was = None
        if version and self._table is not None:
            with contextlib.suppress(TableVersionGoneError):
                self.was = await (await self._table.at(version)).state()

    async def _read(self) -> None:
        self._table = await self._store.find(self.name)
        self.version = 0 if self._table is None else await self._table.version()
        self._state = None if self._table is None else await self._table.state()
        if self._state is not None and self._state.is_leftover:
            self._table = self._state = None  # keep the version: creating the table is an overwrite

    async def reopen(self) -> None:
        """Moves to the latest version; all commits in between are recorded as foreign."""
        known = self.version
        await self._read()
        if self.version != known:  # lower: the table was dropped and created again
            self.foreign.append((min(known, self.version) + 1, self.version))
            del self._announced[1:]  # predicted for another table_version

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
        """The open handle with its last read version and state, `None` if there is no table."""
        if self._table is None or self._state is None:
            return None
        return Opened(self._table, self.version, self._state)

    @property
    def is_announced(self) -> bool:
        """Whether an announced commit is not made yet."""
        return bool(self._announced)

    async def _commit(
        self,
        effect: Effect,
        run: Callable[[Table], Awaitable[int]],
        *,
        after: TableState | None = None,
        read_indexes: bool = False,
    ) -> None:
        """Announces and makes one commit.

        Args:
            effect: The effect of the commit, for the journal.
            run: Makes the commit; returns its table_version.
            after: The expected state afterwards; by default the state before.
            read_indexes: Whether to read the indexes even if there were none before.
        """
        table = self.table
        # Not announced again if a foreign commit came first: on this fresh handle the commit may
        # succeed, and after a foreign commit the base is no longer used.
        if self._announced[:1] != [effect]:
            await self._announce_commit(self.version, effect)
        await self._may_write()
        table.on_commit = self._record_version
        base = self.version
        await run(table)
        self._mark_made(base)
        indexed = bool(self._current().indexes) or read_indexes or self.version != base + 1
        state = await table.state(indexed=indexed)
        self._state = state.with_known_shape(self._current() if after is None else after)

    async def _announce_commit(self, base: int, effect: Effect) -> None:
        self._refuse_if_ended()
        predicted, self.predicted = self.predicted, ()
        announced = list(predicted) if predicted and predicted[0] == effect else [effect]
        await self._announce(self.name, base, announced, self.foreign)
        self._announced = announced

    def _mark_made(self, base: int) -> None:
        """Removes the commit just made from those announced; all if a foreign one came between."""
        del self._announced[: 1 if self.version == base + 1 else None]

    async def _may_write(self) -> None:
        """Creates the savepoint if that is still to be done, and checks the lease."""
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
                f"The migration that writes to table {self.name!r} has ended.",
                "Await every task that the function starts before it returns.",
            )

    def _record_version(self, version: int) -> None:
        if version > self.version + 1:
            self.foreign.append((self.version + 1, version - 1))
        self.commits += version != self.version  # an optimization may make no commit
        self.version = version

    def _current(self) -> TableState:
        assert self._state is not None  # noqa: S101 - every caller holds an open table
        return self._state

    # ---- whole tables ---------------------------------------------------------------------------

    async def create(self, schema: pa.Schema, rows: pa.Table | None = None) -> None:
        """Creates the table in one commit, empty by default.

        Raises:
            LeaseLostError: Another process has taken over; nothing was written.
            StaleHandleError: Another process created the table at the same time; LanceDB
                overwrote it, and it was restored.
            UnresolvedError: Restoring it conflicted with another commit.
        """
        base = self.version
        await self._announce_commit(base, CREATE)
        await self._may_write()
        making = self._store.create(self.name, schema, rows, overwrite=self.version > 0)
        await self._store.settle(self.name, lambda: self._finish_create(making))
        self._mark_made(base)
        self.rows += 0 if rows is None else len(rows)

    async def _finish_create(self, making: Awaitable[Table]) -> None:
        table = await making
        version = await table.version()
        if version > self.version + 1:
            # LanceDB overwrote a table created concurrently: its content is one version below.
            restored = await table.restore(version - 1)
            if restored != version + 1:
                raise UnresolvedError(
                    f"Creating table {self.name!r} conflicted with other writers who created it: "
                    f"one of its table_versions {version - 1} to {restored} is the right one.",
                    f"Inspect them, restore the right one (for example with "
                    f"`await table.restore({version - 1})`), then run again.",
                )
            raise StaleHandleError(
                f"Table {self.name!r} was created by another process at the same time.",
                "Run again.",
            )
        self._table = table
        self.version = version
        self.commits += 1
        self._state = await table.state(indexed=False)

    async def drop(self) -> None:
        """Drops the table, or the rest of it if an earlier drop was interrupted."""
        await self._announce_commit(self.version, {"do": "drop"})
        await self._may_write()
        await self._store.drop(self.name)
        self._table = self._state = None
        self.version = 0
        self.commits += 1

    async def overwrite(self, schema: pa.Schema, transform: Transform, *, batch_rows: int) -> None:
        """Replaces all rows by transformed ones in one commit, without discarding foreign commits.

        If another writer commits meanwhile, its commit is restored and the overwrite is retried.
        A crash before that check is repaired by `commits.savepoints.restore_overwritten`.

        Args:
            schema: The new Arrow schema, including the witness column.
            transform: Returns the new rows of a batch.
            batch_rows: Rows per batch.

        Raises:
            LeaseLostError: Another process has taken over; nothing was written.
            OverwriteLostError: Other writers committed during each of `_OVERWRITE_ATTEMPTS`
                attempts.
            StaleHandleError: Another writer changed the schema, so `schema` no longer fits.
            UnresolvedError: Restoring a foreign commit conflicted with another commit.
        """
        shape = self._current().shape()
        for _ in range(_OVERWRITE_ATTEMPTS):
            base, source = self.version, self.table
            effect = {"do": "overwrite", "witness": self.witness}
            await self._announce_commit(base, effect)
            await self._may_write()
            if await self._try_overwrite(base, source, schema, transform, batch_rows):
                return
            await self.reopen()
            if self._current().shape() != shape:
                raise StaleHandleError(
                    f"Another writer changed the schema of table {self.name!r} during the rebuild.",
                    "Run again.",
                )
        raise OverwriteLostError(
            f"Other writers committed to table {self.name!r} during each of {_OVERWRITE_ATTEMPTS} "
            "attempts to rebuild it. Their commits were not lost, and the table was not rebuilt.",
            "Run again when fewer processes write, or stop them during the migration.",
        )

    async def _try_overwrite(
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
            # Checked last, while nothing is committed yet and nothing has to be undone.
            if await (await self._store.open(self.name)).version() != base:
                raise StaleHandleError(
                    f"Another writer committed to table {self.name!r} while it was read.",
                    "Run again.",
                )

        try:
            table = await self._store.create_from(self.name, schema, rows(), overwrite=True)
        except StaleHandleError:
            self.retries += 1
            return False
        self._record_version(await table.version())
        if self.version == base + 1:
            self._table = table
            self._state = await table.state()
            self.rows += await table.count_rows()
            return True
        covered = (base + 1, self.version - 1)
        back = await table.restore(self.version - 1)
        if back != self.version + 1:
            raise unresolved_overwrite(self.name, covered, (self.version + 1, back - 1), back)
        self.version = back
        self.retries += 1
        return False

    async def copy_to(self, name: str) -> None:
        """Copies rows, schema and indexes to a new table, and compares them afterwards.

        If another writer commits meanwhile, the table is copied again. The copy that an
        interrupted run left is recognised by its witness column and completed.

        Args:
            name: The new table.

        Raises:
            LeaseLostError: Another process has taken over; nothing more was written.
            OperationError: Another table of that name exists.
            OverwriteLostError: Other writers committed during each of `_OVERWRITE_ATTEMPTS`
                attempts.
        """
        copy = self.sibling(name)
        copy.witness = self.witness
        if copy.state is not None and not copy.state.has(self.witness):
            raise OperationError(
                f"Table {name!r} already exists.", "Drop it first, or choose another name."
            )
        for _ in range(_OVERWRITE_ATTEMPTS):
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
            f"Other writers committed to table {self.name!r} during each of {_OVERWRITE_ATTEMPTS} "
            f"attempts to copy it to {name!r}.",
            "Stop its writers, then run again.",
        )

    async def replace_by(self, other: TrackedTable, schema: pa.Schema) -> None:
        """Replaces the content of this table by the rows of another one, in one commit.

        Args:
            other: The table to copy; its progress callback is called.
            schema: The Arrow schema; columns that `other` does not have are NULL.
        """

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
            self._record_version(await self._table.version())
            self._state = await self._table.state()
        else:
            await self._finish_create(making)

    def sibling(self, name: str) -> Self:
        """Returns another table that the migration touches, given by name."""
        return self._others[name]

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        """Reports the progress of the current operation, `total` being `None` if unknown."""
        self.on_progress(done, total, note)

    def add_fact(self, topic: str, what: Any) -> None:
        """Adds a JSON value to the migration's report and history."""
        self.facts[topic] = what

    async def count_rows(self, where: str | None = None) -> int:
        """Returns the number of matching rows, of all rows by default."""
        return await self.table.count_rows(where)

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> None:
        """Builds an index in one commit."""
        after, effect = effects.create_index(self._current(), index)
        base = self.version
        await self._commit(
            effect, lambda t: t.create_index(index, options), read_indexes=True, after=after
        )
        self._built_index = (index, self.version) if self.version == base + 1 else None


async def _is_latest(known: Opened) -> bool:
    """Returns whether a handle is still at the latest version; moves it there."""
    try:
        await known.table.refresh()
        return await known.table.version() == known.version
    except StoreError:
        return False


_OVERWRITE_ATTEMPTS = 3
_COPY_ROWS = 4096
