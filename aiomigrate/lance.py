"""The port to LanceDB: the only module that imports it.

Opens tables, makes single commits and says which table_version each became, maps LanceDB's
untyped errors to `aiomigrate.errors` (here and nowhere else), and resolves mutations under
cancellation. It decides nothing: what to commit, to retry or to restore is for the layers above.
Tests inject faults by subclassing `Store` and overriding `call`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
import anyio.from_thread
import lancedb
import lancedb.index
import pyarrow as pa
from lancedb.scannable import to_scannable

from aiomigrate.errors import (
    CastRefusedError,
    ColumnNotNullableError,
    CommitConflictError,
    ConfigurationError,
    StaleHandleError,
    StoreError,
    TableExistsError,
    TableNotFoundError,
    TableVersionGoneError,
    UnsupportedDatabaseError,
    WriterCongestionError,
)
from aiomigrate.operations.base import Index, Statement, TableState
from aiomigrate.operations.indexes import config_name, told_options
from aiomigrate.operations.literals import as_sql
from aiomigrate.scale import Transform, add_by_ray
from aiomigrate.together import each

T = TypeVar("T")

_is_settling: ContextVar[bool] = ContextVar("_is_settling", default=False)
SCHEMES = ("s3", "s3+ddb", "gs", "az", "abfs", "abfss", "hf", "oss", "cos", "memory", "file")

_CONFLICTS: tuple[tuple[str, type[StoreError], str], ...] = (
    (r"Retryable commit conflict|Commit conflict for version", CommitConflictError,
     "Run it again."),
    (r"Incompatible transaction", StaleHandleError, "Reopen the table and run it again."),
    (r"Too many concurrent writers", WriterCongestionError,
     "Let fewer processes write to the table, then run it again."),
    (r"Table '.*' was not found|Table not found", TableNotFoundError, "Create the table first."),
    (r"Table '.*' already exists", TableExistsError, "Open the table, or choose another name."),
    (r"no longer exists\. Was it cleaned up|_versions/\d+\.manifest was not found",
     TableVersionGoneError, "Restore it from a backup, or run the migrations forward."),
    (r"Cannot cast column", CastRefusedError, "Use op.Rebuild with a function."),
    (r"contain(s|ed) (null|NULL) values (and cannot|even though)|non-nullable but contains null",
     ColumnNotNullableError, "Fill the column first with op.Update."),
)  # fmt: skip


def locate(uri: str | Path) -> str:
    """Returns a database's URI as LanceDB is to be given it: local paths absolute.

    Raises:
        UnsupportedDatabaseError: It names a LanceDB Cloud database.
        ConfigurationError: It is empty, of an unknown scheme, a table's folder, or a bare word
            that LanceDB could take for the name of a cloud database.
    """
    if isinstance(uri, Path):
        return _folder(uri)
    if not uri.strip():
        raise ConfigurationError("The database's URI is empty.", "Pass a path or a URI.")
    scheme, colon, _ = uri.partition(":")
    if scheme == "db" and colon:
        raise UnsupportedDatabaseError(
            f"{redact(uri)} is a LanceDB Cloud or Enterprise database, which aiomigrate does not "
            "support yet.",
            "Use a local path or an object-store URI such as s3://bucket/database.",
        )
    if "://" in uri:
        try:
            urlsplit(uri)
        except ValueError as exc:
            raise ConfigurationError(
                f"{redact(uri)} is no URI: {exc}.", "Correct it, such as s3://bucket/database."
            ) from None
        if scheme not in SCHEMES:
            raise ConfigurationError(
                f"{redact(uri)}: LanceDB knows no scheme {scheme!r}.",
                f"Use a local path or one of {', '.join(SCHEMES)}.",
            )
        return _folder(Path(uri.removeprefix("file://"))) if scheme == "file" else uri
    if not re.search(r"[/\\]", uri) and uri not in (".", ".."):
        raise ConfigurationError(
            f"{uri!r} has no slash: LanceDB may take it for the name of a cloud database.",
            f"Write ./{uri} for a folder here.",
        )
    return _folder(Path(uri))


def _folder(path: Path) -> str:
    path = path.expanduser().absolute()
    if path.suffix == ".lance" and (path / "_versions").is_dir():
        raise ConfigurationError(
            f"{path} is a table, not a database.", f"Use the folder that holds it: {path.parent}."
        )
    return str(path)


def is_local(uri: str) -> bool:
    """Returns whether a located URI is a path."""
    return "://" not in uri


def redact(uri: str) -> str:
    """Returns a URI, however malformed, without user information, query and fragment."""
    scheme, colon, rest = uri.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme):
        return uri
    slashes = rest[: len(rest) - len(rest.lstrip("/"))]
    authority, slash, path = re.split(r"[?#]", rest[len(slashes) :])[0].partition("/")
    return f"{scheme}:{slashes}{authority.rpartition('@')[2]}{slash}{path}"


def secrets_of(uri: str, storage_options: Mapping[str, str] | None) -> tuple[str, ...]:
    """Returns the texts that must never be shown, longest first."""
    found = {str(v) for v in (storage_options or {}).values() if len(str(v)) > 3}
    found -= {"true", "false", "auto"}
    endpoints = {text for text in found if text.startswith(("http://", "https://"))}
    found -= endpoints
    for text in (uri, *endpoints):
        if "://" in text:
            parts = urlsplit(text)
            found |= {t for t in (parts.username, parts.password, parts.query) if t}
    return tuple(sorted(found, key=len, reverse=True))


class Store:
    """One connection, with errors mapped and mutations resolved.

    Attributes:
        uri: Where, without secrets.
        abandoned: Tables with a mutation that was abandoned under cancellation: it may still
            commit.
    """

    def __init__(
        self,
        connection: lancedb.AsyncConnection,
        *,
        uri: str,
        secrets: Sequence[str] = (),
        grace_s: float = 10.0,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        """Wraps an open connection.

        Args:
            connection: With the default read consistency: a handle's `version()` right after a
                commit must be that commit (facts: restore).
            uri: Shown in logs, already redacted.
            secrets: Texts to remove from every error.
            grace_s: Seconds a cancelled mutation is given to finish.
            storage_options: As the connection was given them.
        """
        self.storage_options = dict(storage_options) if storage_options else None
        self.connection = connection
        self.uri = uri
        self.abandoned: set[str] = set()
        self._location = str(connection.uri)
        self._secrets = tuple(secrets)
        self._grace_s = grace_s

    @classmethod
    async def connect(
        cls,
        uri: str,
        storage_options: Mapping[str, str] | None = None,
        *,
        grace_s: float = 10.0,
    ) -> Store:
        """Connects to a located URI. On a missing local path LanceDB makes the folder.

        Raises:
            StoreError: LanceDB could not connect.
        """
        secrets = secrets_of(uri, storage_options)
        options = dict(storage_options) if storage_options else None
        try:
            connection = await lancedb.connect_async(uri, storage_options=options)
        except (ValueError, RuntimeError, OSError) as exc:
            raise _mapped(exc, f"connect to {redact(uri)}", secrets) from None
        return cls(
            connection,
            uri=redact(uri),
            secrets=secrets,
            grace_s=grace_s,
            storage_options=storage_options,
        )

    def scrub(self, text: str) -> str:
        """Returns a text without the secrets of the URI and the storage options."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def location_of(self, table: str) -> str:
        """Returns where a table is."""
        return f"{self._location.rstrip('/')}/{table}.lance"

    def free_bytes(self) -> int | None:
        """Returns how much a local database's disk still takes, `None` for others."""
        return shutil.disk_usage(self._location).free if is_local(self._location) else None

    def close(self) -> None:
        """Closes the connection."""
        self.connection.close()  # type: ignore[no-untyped-call]

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
    ) -> T:
        """Awaits one LanceDB call; every call goes through here. A mutation is settled.

        Raises:
            StoreError: Or a subclass that names the failure.
        """
        try:
            return await (self.settle(table, run) if mutates else run())
        except (ValueError, RuntimeError, OSError, NotImplementedError, KeyError) as exc:
            error = _mapped(exc, f"{verb} on table {table!r}", self._secrets)
            told = any(secret in str(exc) for secret in self._secrets)
            raise error from (None if told else exc)

    async def settle(self, table: str, run: Callable[[], Awaitable[T]]) -> T:
        """Awaits a mutation, and what must be noted of it, to its end.

        Cancellation is raised only once it has ended, at most after the grace time. Then it is
        abandoned, which `abandoned` tells, and it may still commit.
        """
        if _is_settling.get():  # part of what somebody awaits so already
            return await run()
        result: list[T] = []
        failure: list[BaseException] = []
        ended = anyio.Event()
        scope = anyio.CancelScope(shield=True)

        async def work() -> None:
            _is_settling.set(True)  # here, in a task of its own
            with scope:
                try:
                    result.append(await run())
                except Exception as exc:  # noqa: BLE001 - carried to the caller as it is
                    failure.append(exc)
            ended.set()

        async with anyio.create_task_group() as group:
            group.start_soon(work)
            try:
                await ended.wait()
            except anyio.get_cancelled_exc_class():
                with anyio.move_on_after(self._grace_s, shield=True):
                    await ended.wait()
                if not ended.is_set():
                    self.abandoned.add(table)
                    scope.cancel()
                raise
        if failure:
            raise failure[0]
        return result[0]

    async def table_names(self) -> list[str]:
        """Returns the names of all tables; a killed create may have left one that cannot be opened.

        Raises:
            StoreError: LanceDB could not list them.
        """
        names: list[str] = []
        token: str | None = None
        while True:
            page = await self.call(
                "list",
                "*",
                lambda t=token: self.connection.list_tables(page_token=t),  # type: ignore[misc]
            )
            names += page.tables
            token = page.page_token
            if not token:
                return names

    async def open(self, name: str) -> Table:
        """Opens a table at its latest version.

        Raises:
            TableNotFoundError: There is none.
            StoreError: It could not be opened.
        """
        handle = await self.call("open", name, lambda: self.connection.open_table(name))
        return Table(self, name, handle)

    async def find(self, name: str) -> Table | None:
        """Opens a table, `None` if there is none.

        Raises:
            StoreError: It exists but could not be opened.
        """
        try:
            return await self.open(name)
        except TableNotFoundError:
            return None

    async def state_of(self, name: str) -> tuple[int, TableState | None]:
        """Returns a table's table_version and state, `(0, None)` if there is none.

        What is left of one whose creation was undone counts as none.

        Raises:
            StoreError: It exists but could not be read.
        """
        opened = await self.look(name)
        return (0, None) if opened is None else (opened.version, opened.state)

    async def look(self, name: str) -> Opened | None:
        """Opens a table and reads its state; `None` as for `state_of`.

        Raises:
            StoreError: It exists but could not be read.
        """
        table = await self.find(name)
        state = None if table is None else await table.state()
        if table is None or state is None or state.is_leftover:
            return None
        return Opened(table, await table.version(), state)

    async def look_at(self, names: Sequence[str]) -> dict[str, Opened]:
        """Opens tables, a few at once, and reads their states; leaves out what does not exist.

        Raises:
            StoreError: One exists but could not be read.
        """
        found: dict[str, Opened] = {}

        async def one(name: str) -> None:
            if (opened := await self.look(name)) is not None:
                found[name] = opened

        await each(names, one)
        return found

    async def has_remains(self, name: str) -> bool:
        """Returns whether a table that cannot be found left data files behind.

        A killed create of an empty table leaves none. Told of local databases only.
        """
        if not is_local(self._location):
            return False
        folder = anyio.Path(self._location, f"{name}.lance", "data")
        return await folder.is_dir() and [_ async for _ in folder.iterdir()] != []

    async def create(
        self,
        name: str,
        schema: pa.Schema,
        rows: pa.Table | None = None,
        *,
        overwrite: bool = False,
    ) -> Table:
        """Creates a table, empty unless rows are given.

        This is not exclusive: a table that another process creates at the same moment is
        overwritten. A `version()` above 1 on the result tells; its content is one version below.

        Raises:
            TableExistsError: There is one already.
            StoreError: LanceDB failed.
        """
        none = pa.RecordBatchReader.from_batches(schema, [])
        reader = none if rows is None else rows.to_reader()
        return await self._create(name, reader, overwrite=overwrite)

    async def _create(self, name: str, reader: pa.RecordBatchReader, *, overwrite: bool) -> Table:
        """Creates a table past lancedb's Python half.

        That one takes NULL and NaN for bad vectors, and computes the vectors of a batch that has
        none where the table has embedding functions (both measured).
        """
        mode = "overwrite" if overwrite else "create"
        inner: Any = self.connection._inner  # noqa: SLF001 - there is no other way in 0.40

        async def run() -> Any:
            return await inner.create_table(name, mode, reader, namespace_path=[])

        made = await self.call(mode, name, run, mutates=True)
        return Table(self, name, lancedb.AsyncTable(made))

    async def create_from(
        self,
        name: str,
        schema: pa.Schema,
        batches: AsyncIterator[pa.RecordBatch],
        *,
        overwrite: bool = False,
    ) -> Table:
        """Creates a table from a stream, in one commit; memory is bounded by the batches.

        An overwrite never fails because of other commits: those made since the stream was begun
        are discarded from the head. Compare its version with the one before plus one.

        Raises:
            StoreError: LanceDB failed; nothing was committed.
            Exception: What the stream raised; nothing was committed.
        """
        failures: list[BaseException] = []

        async def following() -> pa.RecordBatch | None:
            try:
                return await anext(batches, None)
            except BaseException as exc:
                failures.append(exc)
                raise

        refused: StoreError | None = None
        async with anyio.from_thread.BlockingPortal() as portal:

            def pull() -> Iterator[pa.RecordBatch]:  # in a thread of LanceDB's
                while (batch := portal.call(following)) is not None:
                    yield batch

            reader = pa.RecordBatchReader.from_batches(schema, pull())
            try:
                table = await self._create(name, reader, overwrite=overwrite)
            except StoreError as exc:
                refused = exc  # raised outside: a portal wraps what leaves it
        if refused is not None:
            raise (failures[0] if failures else refused) from (refused if failures else None)
        return table

    async def drop(self, name: str) -> None:
        """Drops a table, or the remains of one; nothing happens when there is none."""
        await self.call(
            "drop",
            name,
            lambda: self.connection.drop_table(name, ignore_missing=True),
            mutates=True,
        )


_FILES = (
    "total_data_files", "total_files_size", "total_data_file_rows", "total_deletion_file_rows",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Opened:
    """A table that was opened, and what was read of it.

    Attributes:
        table: Its handle.
        version: The handle's table_version.
        state: Schema and indexes at that version.
    """

    table: Table
    version: int
    state: TableState


@dataclass(frozen=True, slots=True)
class Commit:
    """What one table_version is, as far as its manifest tells.

    Attributes:
        version: The table_version.
        rows: How many rows there are.
        files: Numbers of its data files that are equal where these are the same files.
        state: Schema and indexes.
    """

    version: int
    rows: int
    files: tuple[str, ...]
    state: TableState


class Table:
    """One open handle, pinned to the version it was opened at or last committed.

    Each mutating method is one commit and returns the table_version it became.
    """

    def __init__(self, store: Store, name: str, handle: lancedb.AsyncTable) -> None:
        self.store = store
        self.name = name
        self.handle = handle
        self.on_commit: Callable[[int], None] = lambda version: None
        """Told of each commit's table_version, even when its caller is being cancelled."""

    async def _read(self, verb: str, run: Callable[[], Awaitable[T]]) -> T:
        return await self.store.call(verb, self.name, run)

    async def _write(self, verb: str, run: Callable[[], Awaitable[T]]) -> T:
        return await self.store.call(verb, self.name, run, mutates=True)

    async def _commit(self, verb: str, run: Callable[[], Awaitable[Any]]) -> Any:
        """Makes one commit; returns LanceDB's result, which has its `version`."""

        async def act() -> Any:
            result = await run()
            self.on_commit(int(result.version))
            return result

        return await self._write(verb, act)

    async def _commit_unnumbered(self, verb: str, run: Callable[[], Awaitable[Any]]) -> int:
        """Makes one commit of a kind whose result has no version, and returns it."""

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
        """Opens a second handle, read-only, at an older table_version.

        Raises:
            TableVersionGoneError: It was cleaned up.
        """
        other = await self.store.open(self.name)
        await other._read("checkout", lambda: other.handle.checkout(table_version))  # noqa: SLF001 - same class
        return other

    async def state(self, *, indexed: bool = True) -> TableState:
        """Returns schema and indexes.

        Args:
            indexed: Whether there may be indexes: else nothing is asked for them.
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
                told_options(getattr(c, "index_details", None) or {}),
            )
            for c in configs
        )
        return TableState(schema, indexes)

    async def uncovered(self, index: Index) -> int:
        """Returns how many rows an index does not cover."""
        configs = await self._read("list_indices", self.handle.list_indices)
        return sum(
            int(c.num_unindexed_rows or 0)
            for c in configs
            if str(c.index_type) == index.kind and tuple(map(_unquoted, c.columns)) == index.columns
        )

    async def recent_commits(self, within_s: float) -> list[int]:
        """Returns the table_versions made in the last seconds, by the wall clock of their makers.

        One request for each version on an object store: not for anything done often.
        """
        versions = await self._read("list_versions", self.handle.list_versions)
        newest = dt.datetime.now(tz=None) - dt.timedelta(seconds=within_s)  # noqa: DTZ005 - as given
        return [int(v["version"]) for v in versions if v["timestamp"] >= newest]

    async def row_ids(self, where: str | None) -> list[int]:
        """Returns the row ids of the matching rows, sorted; compaction and updates change them."""
        query = self._query(where, []).with_row_id()
        found = await self._read("row_ids", query.to_arrow)
        return sorted(found["_rowid"].to_pylist())

    async def read(
        self, where: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Returns the matching rows, all columns unless some are named."""
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
        """Yields the matching rows in the table's own order, with `_rowid`.

        Its upper 32 bits are the row's fragment.
        """
        query = self._query(where, columns).with_row_id()
        reader = await self._read("read", lambda: query.to_batches(max_batch_length=max_rows))
        while (batch := await self._read("read", lambda: anext(reader, None))) is not None:
            yield batch

    async def window(self, columns: Sequence[str], offset: int, rows: int) -> pa.Table:
        """Returns at most `rows` rows from a position in the table's own order."""
        query = self.handle.query().select(list(columns)).offset(offset).limit(rows)
        return await self._read("read", query.to_arrow)

    def _query(self, where: str | None, columns: Sequence[str] | None) -> Any:
        query = self.handle.query()
        if where is not None:
            query = query.where(where)
        return query if columns is None else query.select(list(columns))

    async def count_rows(self, where: str | None = None) -> int:
        """Returns how many rows match."""
        return await self._read("count_rows", lambda: self.handle.count_rows(where))

    async def fragments(self) -> int:
        """Returns of how many fragments the table consists."""
        stats: Any = await self._read("stats", self.handle.stats)
        return int(stats["fragment_stats"]["num_fragments"])

    async def size(self) -> int:
        """Returns of how many bytes the data files of this version consist."""
        stats: Any = await self._read("stats", self.handle.stats)
        return int(stats["total_bytes"])

    async def add(self, data: pa.Table) -> int:
        """Appends rows."""
        result = await self._commit("add", lambda: self.handle.add(data))
        return int(result.version)

    async def append(self, data: pa.Table) -> int:
        """Appends rows that have the table's own columns, past lancedb's Python half.

        That one asks for the schema each time, and looks for what has to be converted.
        """
        inner: Any = self.handle._inner  # noqa: SLF001 - there is no other way in 0.40
        result = await self._commit("add", lambda: inner.add(to_scannable(data), "append"))
        return int(result.version)

    async def insert_missing(self, key: str, data: pa.Table) -> int:
        """Inserts the rows whose key is not there; returns how many.

        Exclusive among processes where `key` is the table's primary key and has no index.
        """
        merge = self.handle.merge_insert(key).when_not_matched_insert_all()
        result = await self._write("insert_missing", lambda: self._merged(merge, data))
        return int(result.num_inserted_rows)

    async def insert_new(self, key: str, data: pa.Table) -> tuple[int, int]:
        """Inserts the rows whose key is not there; returns (rows, table_version)."""
        merge = self.handle.merge_insert(key).when_not_matched_insert_all()
        result = await self._commit("insert_new", lambda: self._merged(merge, data))
        return int(result.num_inserted_rows), int(result.version)

    async def replace_matching(self, key: str, data: pa.Table, condition: str) -> int:
        """Replaces the rows of equal key that satisfy the condition; returns how many."""
        merge = self.handle.merge_insert(key).when_matched_update_all(where=condition)
        result = await self._write("replace_matching", lambda: self._merged(merge, data))
        return int(result.num_updated_rows)

    async def merge(self, key: str, data: pa.Table) -> tuple[int, int]:
        """Updates the rows of equal key and inserts the others; returns (rows, table_version)."""
        merge = self.handle.merge_insert(key).when_matched_update_all()
        merge = merge.when_not_matched_insert_all()
        result = await self._commit("merge", lambda: self._merged(merge, data))
        return int(result.num_updated_rows + result.num_inserted_rows), int(result.version)

    async def merge_columns(self, key: str, data: pa.Table, *, by_index: bool) -> tuple[int, int]:
        """Sets some columns of the rows of equal key; returns (rows, table_version).

        By an index on the key, large merges rewrite the columns of whole fragments: little is
        written, but each update or delete of others in them makes LanceDB begin again, for ever
        where they come faster than it merges. Without, rows are moved, and such commits do not
        disturb it; each merge reads all keys (measured: 30 s without success against 0.6 s).

        Without a condition on them: with one, and an index on the key, LanceDB 0.40 panics
        ("Incorrect number of arrays for StructArray fields", measured).
        """
        merge = self.handle.merge_insert(key).when_matched_update_all()
        result = await self._commit("merge", lambda: self._merged(merge, data, use_index=by_index))
        return int(result.num_updated_rows), int(result.version)

    async def _merged(self, merge: Any, data: pa.Table, **changed: Any) -> Any:
        """Executes a merge past lancedb's Python half.

        That one takes NULL for a bad vector, and for a table with embedding functions computes
        their column from data that is not there (measured).
        """
        inner: Any = self.handle._inner  # noqa: SLF001 - there is no other way in 0.40
        told = {name: getattr(merge, f"_{name}", None) for name in _MERGE} | changed
        return await inner.execute_merge_insert(data.to_reader(), told)

    async def nearest(
        self, column: str, vector: Sequence[float], rows: int, key: str, where: str
    ) -> list[Any]:
        """Returns the keys of the rows nearest to a vector, nearest first."""
        query = self.handle.query().nearest_to(list(vector)).column(column).where(where)
        found = await self._read("search", query.select([key, "_distance"]).limit(rows).to_arrow)
        return list(found[key].to_pylist())

    async def set_schema_metadata(self, metadata: Mapping[str, str | None]) -> int:
        """Sets entries of the schema's metadata, `None` removes one; lancedb alone cannot.

        Raises:
            StoreError: pylance failed, or is not installed.
        """

        def act() -> None:
            import lance

            place = self.store.location_of(self.name)
            options = self.store.storage_options
            lance.dataset(place, storage_options=options).update_schema_metadata(dict(metadata))

        async def run() -> None:
            await anyio.to_thread.run_sync(act)
            await self.handle.checkout_latest()  # type: ignore[no-untyped-call]

        return await self._commit_unnumbered("set_schema_metadata", run)

    async def compute(
        self, transform: Transform, *, source: str, batch_rows: int, workers: int
    ) -> int:
        """Adds columns that a Ray cluster computes; see `scale`."""

        async def run() -> None:
            await add_by_ray(
                self.store.location_of(self.name),
                self.store.storage_options,
                transform,
                source=source,
                batch_rows=batch_rows,
                workers=workers,
            )
            await self.handle.checkout_latest()  # type: ignore[no-untyped-call]

        return await self._commit_unnumbered("compute", run)

    async def update(
        self,
        *,
        values: Mapping[str, Any] | None = None,
        sql: Mapping[str, str] | None = None,
        where: str | None = None,
    ) -> tuple[int, int]:
        """Sets columns of the matching rows; returns (rows, table_version)."""
        both = dict(sql or {})
        literal = dict(values or {})
        if both and literal:
            both, literal = as_sql(literal, both), {}
        result = await self._commit(
            "update",
            lambda: self.handle.update(literal or None, where=where, updates_sql=both or None),
        )
        return int(result.rows_updated), int(result.version)

    async def delete(self, where: str) -> int:
        """Deletes the matching rows."""
        result = await self._commit("delete", lambda: self.handle.delete(where))
        return int(result.version)

    async def add_columns(self, fields: Sequence[pa.Field[Any]]) -> int:
        """Adds nullable columns, NULL everywhere; metadata only."""
        result = await self._commit("add_columns", lambda: self.handle.add_columns(list(fields)))
        return int(result.version)

    async def drop_columns(self, names: Sequence[str]) -> int:
        """Drops columns; metadata only."""
        result = await self._commit("drop_columns", lambda: self.handle.drop_columns(list(names)))
        return int(result.version)

    async def alter_columns(self, alterations: Sequence[Mapping[str, Any]]) -> int:
        """Renames, retypes or changes nullability, all in one commit."""
        changes = [dict(alteration) for alteration in alterations]
        # LanceDB's annotation says a list where each argument is one alteration.
        alter: Any = self.handle.alter_columns
        result = await self._commit("alter_columns", lambda: alter(*changes))
        return int(result.version)

    async def create_index(self, index: Index, options: Mapping[str, Any]) -> int:
        """Builds an index; see `operations.indexes.with_index` for what it replaces.

        Raises:
            ConfigurationError: lancedb's configuration class does not take such options.
        """
        config = index_config(index.kind, options)
        return await self._commit_unnumbered(
            "create_index", lambda: self.handle.create_index(index.columns[0], config=config)
        )

    async def drop_index(self, name: str) -> int:
        """Drops an index."""
        return await self._commit_unnumbered("drop_index", lambda: self.handle.drop_index(name))

    async def set_metadata(self, column: str, metadata: Mapping[str, str | None]) -> int:
        """Sets entries of a column's metadata, `None` removes one."""
        change = {"path": column, "metadata": dict(metadata)}
        result = await self._commit(
            "set_metadata", lambda: self.handle.update_field_metadata(change)
        )
        return int(result.version)

    async def optimize(self, cleanup_older_than_s: float | None) -> tuple[int, bool]:
        """Compacts, brings indexes up to date, and removes old versions if told to.

        Several commits, or none; returns the table_version afterwards, and whether files were
        rewritten.
        """
        age = None if cleanup_older_than_s is None else dt.timedelta(seconds=cleanup_older_than_s)
        compacted = False

        async def run() -> None:
            nonlocal compacted
            done = await self.handle.optimize(cleanup_older_than=age)
            compacted = done.compaction.files_removed > 0

        version = await self._commit_unnumbered("optimize", run)
        return version, compacted

    async def commits(self, first: int, last: int) -> list[Commit]:
        """Returns what can be told cheaply of a range of table_versions that are still there.

        One request for each version of the table on an object store: not for anything done often.
        """
        listed = await self._read("list_versions", self.handle.list_versions)
        found = []
        for version, told in sorted((int(v["version"]), v["metadata"]) for v in listed):
            if first <= version <= last:
                state = await (await self.at(version)).state()
                files = tuple(str(told[name]) for name in _FILES)
                found.append(Commit(version, int(told["total_rows"]), files, state))
        return found

    async def set_primary_key(self, column: str) -> None:
        """Declares the (unenforced) primary key; it cannot be changed later."""
        await self._write("set_primary_key", lambda: self.handle.set_unenforced_primary_key(column))

    async def restore(self, table_version: int) -> int:
        """Makes a new version equal to an older one, and returns it.

        Never fails because of other commits: those made since are discarded from the head.
        Compare the result with the head before plus one (see `savepoint`).
        """
        return await self._commit_unnumbered("restore", lambda: self.handle.restore(table_version))

    async def create_branch(self, name: str, table_version: int) -> Table:
        """Makes a branch of a table_version: it keeps it from cleanup. Returns its handle."""
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
        """Merges small fragments and removes versions older than two hours (facts: cleanup)."""
        with contextlib.suppress(CommitConflictError):  # someone wrote: the next run compacts
            await self._write(
                "optimize",
                lambda: self.handle.optimize(cleanup_older_than=dt.timedelta(hours=2)),
            )


_MERGE = (
    "on", "when_matched_update_all", "when_matched_update_all_condition",
    "when_not_matched_insert_all", "when_not_matched_by_source_delete",
    "when_not_matched_by_source_condition", "when_not_matched_by_source_condition_expr",
    "timeout", "use_index", "use_lsm", "validate_single_shard",
)  # fmt: skip
"""What lancedb's Python half hands on to its other half."""


def _unquoted(path: str) -> str:
    """Returns a column's name from the path LanceDB reports, which quotes unusual names."""
    return path[1:-1].replace("``", "`") if re.fullmatch(r"`(?:[^`]|``)*`", path) else path


def index_config(kind: str, options: Mapping[str, Any]) -> Any:
    """Returns lancedb's configuration of an index.

    Raises:
        ConfigurationError: lancedb's configuration class does not take such options.
    """
    name = config_name(kind)
    try:
        return getattr(lancedb.index, name)(**options)
    except TypeError as exc:
        raise ConfigurationError(
            f"{name} does not take these options: {exc}.",
            f"See lancedb.index.{name} for its options.",
        ) from exc


_PREFIXES = (
    r"^(Invalid (user )?input, |Invalid (user )?input: |LanceError\(\w+\): |Schema error: )+"
)


class Sketch:
    """An empty table in memory for each statement, to find out whether LanceDB takes it."""

    def __init__(self) -> None:
        """Prepares; the first question connects."""
        self._tables = itertools.count()
        self._connection: Any = None
        self._taken: set[tuple[object, ...]] = set()

    async def refusal(self, statement: Statement, schema: pa.Schema) -> str | None:
        """Returns why a statement cannot be run on a table of such a schema, `None` if it can.

        One that concerns equal columns of several tables is asked about once.
        """
        sets = as_sql(statement.values, statement.sets)
        narrow = _concerned(statement.where or "", sets, schema)
        key = (statement.where, tuple(sets.items()), narrow)
        if key in self._taken:
            return None
        why = await self._asked(statement.where, sets, narrow)
        if why is None:
            self._taken.add(key)
        elif narrow != schema:  # as LanceDB says it of the table itself
            why = await self._asked(statement.where, sets, schema)
        return why

    async def _asked(
        self, where: str | None, sets: dict[str, str], schema: pa.Schema
    ) -> str | None:
        if self._connection is None:
            self._connection = await lancedb.connect_async("memory://")
        table = await self._connection.create_table(f"t{next(self._tables)}", schema=schema)
        try:
            if sets:
                await table.update(updates_sql=sets, where=where)
            elif where is not None:
                await table.count_rows(where)
        except (ValueError, RuntimeError, OSError, NotImplementedError) as exc:
            return re.sub(_PREFIXES, "", _plain(str(exc)))
        return None


def _concerned(where: str, sets: Mapping[str, str], schema: pa.Schema) -> pa.Schema:
    """Returns the columns that SQL may name; all of them where it names none.

    What it names is in its text, in whichever case.
    """
    text = " ".join((where, *sets, *sets.values())).casefold()
    named = [field for field in schema if field.name.casefold() in text]
    return pa.schema(named or list(schema))


def _plain(text: str) -> str:
    """Returns LanceDB's message without what says nothing to the reader: Rust's positions."""
    text = re.sub(r",? /\S+\.rs:\d+:\d+", "", text).removeprefix("lance error: ")
    text = re.sub(r"\s*Detail: Python exception: Traceback.*", "", text, flags=re.DOTALL)
    return text.rstrip(" .\n")


def _mapped(exc: Exception, doing: str, secrets: Sequence[str]) -> StoreError:
    text = _plain(str(exc))
    for secret in secrets:
        text = text.replace(secret, "***")
    for pattern, kind, remedy in _CONFLICTS:
        if re.search(pattern, text):
            return kind(f"Could not {doing}: {text}.", remedy)
    return StoreError(
        f"Could not {doing}: {text}.", "See LanceDB's message, correct the cause and run again."
    )
