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
from aiomigrate.commits.commit_identity import is_at_head
from aiomigrate.commits.commit_span import CommitSpan
from aiomigrate.commits.effects import AnnouncedCommits, Effect, create_effect
from aiomigrate.commits.readable_table import OnProgress, ReadableTable
from aiomigrate.commits.savepoints import Guard, unresolved_overwrite
from aiomigrate.errors import (
    OperationError,
    OverwriteLostError,
    StaleHandleError,
    TableVersionGoneError,
    UnresolvedError,
)
from aiomigrate.operations.target import Transform
from aiomigrate.schema.state import Index, TableState
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Opened, Table

Announce = Callable[[str, int, Sequence[Effect], Sequence[tuple[int, int]]], Awaitable[None]]
"""Announces commits durably: called with the table, the table_version that the first is based on,
the effects of that commit and of those predicted after it, and ranges of foreign table_versions."""


class TrackedTable(ReadableTable):
    """A table that is open for the duration of a migration.

    Attributes:
        name: Its name.
        before: Its table_version when the migration began, 0 if it did not exist.
        was: Its state when the migration began, `None` if it did not exist.
        version: The last table_version read or made.
        foreign: table_versions of other writers since `before`, as (first, last) ranges.
        commits: Number of commits that the migration made.
        rows: Number of rows that they changed.
        retries: Number of commits that were retried.
        witness: The witness column of the current operation, empty if it needs none.
        keeps_progress: Whether it holds results of a backfill, which a failure does not undo.
        facts: What operations report about their work, JSON values by topic.
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
        super().__init__(store, name)
        self.before = 0
        self.version = 0
        self.foreign: list[tuple[int, int]] = []
        self.commits = 0
        self.rows = 0
        self.retries = 0
        self.was: TableState | None = None
        self.witness = ""
        self._ended = False
        self._span = CommitSpan()
        self.keeps_progress = False
        self.facts: dict[str, Any] = {}
        self._protect: Callable[[], Awaitable[None]] | None = None
        self._predicted: Sequence[Effect] = ()
        self._protecting: anyio.Lock | None = None
        self._guard = guard
        self._announce = announce
        self._others = others
        self._announced = AnnouncedCommits()
        self._built_index: tuple[Index, int] | None = None  # and its table_version

    async def open(self, known: Opened | None = None, *, is_latest: bool = False) -> None:
        """Opens the table at its latest version and reads its state; it may not exist.

        Args:
            known: An open handle of the table with its last known version and state, if any.
            is_latest: Whether to use `known` without checking that it is still the latest
                version. The next commit detects foreign commits in between.

        Raises:
            StoreError: The table exists but cannot be read.
        """
        if known is None or not (is_latest or await is_at_head(known)):
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

    def begin_operation(self, witness: str, on_progress: OnProgress) -> None:
        """Sets what belongs to the operation that changes the table next.

        Args:
            witness: The name of its witness column.
            on_progress: Called with its progress: rows done, rows in all, and a note.
        """
        self.witness = witness
        self._on_progress = on_progress

    def protect_with(self, protect: Callable[[], Awaitable[None]]) -> None:
        """Sets what makes the savepoint, once, right before the first commit."""
        self._protect = protect

    def expect(self, effects: Sequence[Effect]) -> None:
        """Sets the predicted effects of the next commits, to be announced together."""
        self._predicted = effects

    def end(self) -> None:
        """Ends the migration: later writes, of tasks that it left behind, are refused."""
        self._ended = True

    def record_restore(self, version: int) -> None:
        """Notes the table_version of the restore that undid the migration."""
        self.version = version
        self._span.end()

    async def reopen_restored(self) -> None:
        """Moves to the latest version after a restore, whose commit is this migration's own.

        The foreign commits that the restore discards are named by the plan.
        """
        known = self.version
        await self.reopen()
        self.foreign = []
        self.commits += self.version != known

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
            self._span.follow()
            self.foreign.append((min(known, self.version) + 1, self.version))
            self._announced = self._announced.first()  # the rest: for another table_version

    @property
    def shape(self) -> Mapping[str, Any] | None:
        """The table's shape, `None` if it does not exist."""
        return None if self._state is None else self._state.shape()

    @property
    def committed(self) -> list[int]:
        """When `version` was committed, as `commits.commit_span` records it."""
        return self._span.recorded()

    @property
    def opened(self) -> Opened | None:
        """The open handle with its last read version and state, `None` if there is no table."""
        if self._table is None or self._state is None:
            return None
        return Opened(self._table, self.version, self._state)

    @property
    def is_announced(self) -> bool:
        """Whether an announced commit is not made yet."""
        return bool(self._announced.effects)

    async def _commit(
        self,
        effect: Effect,
        run: Callable[[Table], Awaitable[int]],
        *,
        read_indexes: bool = False,
    ) -> None:
        """Announces and makes one commit.

        Args:
            effect: The effect of the commit, for the journal.
            run: Makes the commit; returns its table_version.
            read_indexes: Whether to read the indexes even if there were none before.
        """
        table = self.table
        # Not announced again if a foreign commit came first: on this fresh handle the commit may
        # succeed, and after a foreign commit the base is no longer used.
        if not self._announced.begin_with(effect):
            await self._announce_commit(self.version, effect)
        await self._may_write()
        table.on_commit = self._record_version
        base = self.version
        await run(table)
        self._announced = self._announced.after_commit(base, self.version)
        indexed = bool(self._current().indexes) or read_indexes or self.version != base + 1
        self._state = await table.state(indexed=indexed)

    async def _announce_commit(self, base: int, effect: Effect) -> None:
        self._refuse_if_ended()
        predicted, self._predicted = self._predicted, ()
        announced = AnnouncedCommits.of(effect, predicted)
        await self._announce(self.name, base, announced.effects, self.foreign)
        self._announced = announced

    async def _may_write(self) -> None:
        """Creates the savepoint if that is still to be done, and checks the lease."""
        self._refuse_if_ended()
        if self._protect is not None:
            self._protecting = self._protecting or anyio.Lock()
            async with self._protecting:
                if self._protect is not None:
                    await self._protect()
                    self._protect = None
        await self._guard()
        self._refuse_if_ended()
        self._span.begin()

    def _refuse_if_ended(self) -> None:
        if self._ended:
            raise OperationError(
                f"The migration that writes to table {self.name!r} has ended.",
                "Await every task that the function starts before it returns.",
            )

    def _record_version(self, version: int) -> None:
        if version > self.version + 1:
            self.foreign.append((self.version + 1, version - 1))
        if version != self.version:  # an optimization may make no commit
            self.commits += 1
            self.version = version
            self._span.end()

    async def create(self, schema: pa.Schema, rows: pa.Table | None = None) -> None:
        """Creates the table in one commit, empty by default.

        Raises:
            LeaseLostError: Another process has taken over; nothing was written.
            StaleHandleError: Another process created the table at the same time; LanceDB
                overwrote it, and it was restored.
            UnresolvedError: Restoring it conflicted with another commit.
        """
        base = self.version
        await self._announce_commit(base, create_effect(schema, rows))
        await self._may_write()
        making = self._store.create(self.name, schema, rows, overwrite=self.version > 0)
        await self._store.settle(self.name, lambda: self._finish_create(making))
        self._announced = self._announced.after_commit(base, self.version)
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
        self._record_version(version)
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
            OverwriteLostError: Other writers committed during each of `OVERWRITE_ATTEMPTS`
                attempts.
            StaleHandleError: Another writer changed the schema, so `schema` no longer fits.
            UnresolvedError: Restoring a foreign commit conflicted with another commit.
        """
        shape = self._current().shape()
        for _ in range(OVERWRITE_ATTEMPTS):
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
            f"Other writers committed to table {self.name!r} during each of {OVERWRITE_ATTEMPTS} "
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
        self._span.end()
        self.retries += 1
        return False

    def sibling(self, name: str) -> Self:
        """Returns another table that the migration touches, given by name."""
        return self._others[name]

    def add_fact(self, topic: str, what: Any) -> None:
        """Adds a JSON value to the migration's report and history."""
        self.facts[topic] = what

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> None:
        """Builds an index in one commit."""
        _, effect = effects.create_index(self._current(), index)
        base = self.version
        await self._commit(effect, lambda t: t.create_index(index, options), read_indexes=True)
        self._built_index = (index, self.version) if self.version == base + 1 else None


OVERWRITE_ATTEMPTS = 3
