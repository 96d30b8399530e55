"""A table in the hands of one migration: every commit checked, announced, counted, attributed.

Implements the `Target` that operations act through. It knows which table_versions are ours and
which are foreign; what to do about foreign ones is for `executor`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Self

import anyio
import pyarrow as pa

from aiomigrate.commits import effects
from aiomigrate.commits.commit_identity import same_content
from aiomigrate.commits.effects import (
    CREATE,
    Effect,
)
from aiomigrate.commits.savepoints import Guard, crossed
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
"""Makes durable what is about to be committed: table, table_version it is based on, effects of
that commit and of those foreseen after it, and the ranges of table_versions that others committed
before it."""


class TrackedTable:
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
        facts: What operations report of their work, JSON values by topic.
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
        others: Mapping[str, Self],
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
        self.facts: dict[str, Any] = {}
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
            await self._announce_commit(self.version, effect)
        await self._may_write()
        table.on_commit = self._note
        base = self.version
        await run(table)
        self._made(base)
        indexed = bool(self._known().indexes) or look or self.version != base + 1
        state = await table.state(indexed=indexed)
        self._state = state.with_known_shape(self._known() if after is None else after)

    async def _announce_commit(self, base: int, effect: Effect) -> None:
        self._refuse_if_ended()
        ahead, self.ahead = self.ahead, ()
        effects_ahead = list(ahead) if ahead and ahead[0] == effect else [effect]
        await self._announce(self.name, base, effects_ahead, self.foreign)
        self._announced = effects_ahead

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

    # ---- whole tables ---------------------------------------------------------------------------

    async def create(self, schema: pa.Schema, rows: pa.Table | None = None) -> None:
        """Creates the table; one that another process created meanwhile is brought back."""
        base = self.version
        await self._announce_commit(base, CREATE)
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
        await self._announce_commit(self.version, {"do": "drop"})
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
            await self._announce_commit(base, effect)
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

    async def replace_by(self, other: TrackedTable, schema: pa.Schema) -> None:
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

    def sibling(self, name: str) -> Self:
        """Returns another table that the migration touches."""
        return self._others[name]

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        """Tells how far the operation in hand is."""
        self.on_progress(done, total, note)

    def add_fact(self, topic: str, what: Any) -> None:
        """Adds a JSON value to the migration's report and history."""
        self.facts[topic] = what

    async def count_rows(self, where: str | None = None) -> int:
        """Returns how many rows match."""
        return await self.table.count_rows(where)

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> None:
        """Builds an index."""
        after, effect = effects.indexing(self._known(), index)
        base = self.version
        await self._commit(effect, lambda t: t.create_index(index, options), look=True, after=after)
        self._covered = (index, self.version) if self.version == base + 1 else None


async def _is_latest(known: Opened) -> bool:
    """Returns whether nobody has committed since; the handle moves on to what was."""
    try:
        await known.table.refresh()
        return await known.table.version() == known.version
    except StoreError:
        return False


_OVERWRITES = 3
_COPY_ROWS = 4096
