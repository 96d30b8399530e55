"""A table in the hands of one migration: every commit checked, announced, counted, attributed.

Implements the `Target` that operations act through. It knows which table_versions are ours and
which are foreign; what to do about foreign ones is for `executor`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from aiomigrate.errors import OperationError, StaleHandleError, UnresolvedError
from aiomigrate.lance import Store, Table
from aiomigrate.operations.base import Index, TableState
from aiomigrate.operations.indexes import with_index
from aiomigrate.savepoint import Guard, add_effect, merge_effect, shape_effect

Announce = Callable[[str, int, Mapping[str, Any], Sequence[tuple[int, int]]], Awaitable[None]]
"""Makes durable what is about to be committed: table, table_version it is based on, effect, and
the ranges of table_versions that others committed before it."""


class Touched:
    """One table, open for the duration of a migration.

    Attributes:
        name: Its name.
        before: Its table_version when the migration began, 0 if it did not exist.
        version: The last table_version seen or made.
        foreign: Ranges of table_versions since `before` that others committed.
        commits: How many commits we made.
        rows: How many rows they changed.
        retries: How many commits were tried again.
        witness: The column name that belongs to the operation in hand.
    """

    def __init__(self, store: Store, name: str, *, guard: Guard, announce: Announce | None) -> None:
        """Prepares; `open` reads. With `announce`, every commit is announced first."""
        self.name = name
        self.before = 0
        self.version = 0
        self.foreign: list[tuple[int, int]] = []
        self.commits = 0
        self.rows = 0
        self.retries = 0
        self.witness = ""
        self._store = store
        self._guard = guard
        self._announce = announce
        self._table: Table | None = None
        self._state: TableState | None = None

    async def open(self) -> None:
        """Opens the table at its latest version and reads its state; it may not exist."""
        self._table = await self._store.find(self.name)
        if self._table is not None:
            self.version = self.before = await self._table.version()
            self._state = await self._table.state()

    async def reopen(self) -> None:
        """Moves to the latest version; what was committed since is not ours."""
        self._table = await self._store.find(self.name)
        latest = 0 if self._table is None else await self._table.version()
        if latest > self.version:
            self.foreign.append((self.version + 1, latest))
        self.version = latest
        self._state = None if self._table is None else await self._table.state()

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

    async def _commit(
        self, effect: Mapping[str, Any] | None, run: Callable[[Table], Awaitable[int]]
    ) -> None:
        table = self.table
        if self._announce is not None and effect is not None:
            await self._announce(self.name, self.version, effect, self.foreign)
        await self._guard()
        table.on_commit = self._note
        await run(table)
        self._state = await table.state()

    def _note(self, version: int) -> None:
        if version > self.version + 1:
            self.foreign.append((self.version + 1, version - 1))
        self.version = version
        self.commits += 1

    def _known(self) -> TableState:
        assert self._state is not None  # noqa: S101 - every caller holds an open table
        return self._state

    # ---- what operations do ---------------------------------------------------------------------

    async def create(self, schema: pa.Schema) -> None:
        """Creates the table; one that another process created meanwhile is brought back."""
        if self._announce is not None:
            await self._announce(self.name, 0, {"do": "create"}, self.foreign)
        await self._guard()
        await self._store.settle(lambda: self._create(schema))

    async def _create(self, schema: pa.Schema) -> None:
        table = await self._store.create(self.name, schema)
        version = await table.version()
        if version > 1:
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
        self._state = await table.state()

    async def add_columns(self, fields: Sequence[pa.Field[Any]]) -> None:
        """Adds nullable columns."""
        state = self._known()
        after = state.with_fields([*state.schema, *fields])
        await self._commit(shape_effect(after), lambda t: t.add_columns(fields))

    async def drop_columns(self, names: Sequence[str]) -> None:
        """Drops columns."""
        state = self._known()
        after = state.with_fields(f for f in state.schema if f.name not in names)
        await self._commit(shape_effect(after), lambda t: t.drop_columns(names))

    async def alter_columns(self, alterations: Sequence[Mapping[str, Any]]) -> None:
        """Renames columns or changes their nullability, in one commit."""
        state = self._known()
        changes = {str(a["path"]): a for a in alterations}
        fields = []
        for field in state.schema:
            change = changes.get(field.name, {})
            altered = field.with_name(str(change.get("rename", field.name)))
            fields.append(altered.with_nullable(bool(change.get("nullable", field.nullable))))
        renames = {old: str(change.get("rename", old)) for old, change in changes.items()}
        indexes = tuple(index.renamed(renames) for index in state.indexes)
        after = TableState(pa.schema(fields), indexes)
        await self._commit(shape_effect(after), lambda t: t.alter_columns(alterations))

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> None:
        """Builds an index."""
        after = with_index(self._known(), index)
        await self._commit(shape_effect(after), lambda t: t.create_index(index, options))

    async def drop_index(self, name: str) -> None:
        """Drops an index."""
        state = self._known()
        after = TableState(state.schema, tuple(i for i in state.indexes if i.name != name))
        await self._commit(shape_effect(after), lambda t: t.drop_index(name))

    async def update(
        self, *, values: Mapping[str, Any], sql: Mapping[str, str], where: str | None
    ) -> int:
        """Sets columns of the matching rows; returns how many."""
        changed = 0

        async def run(table: Table) -> int:
            nonlocal changed
            changed, version = await table.update(values=values, sql=sql, where=where)
            return version

        effect = {"do": "update", "values": dict(values), "sql": dict(sql), "where": where}
        await self._commit(effect, run)
        self.rows += changed
        return changed

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
