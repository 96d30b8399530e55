"""Calls LanceDB: maps its errors, and awaits mutations to their end under cancellation.

LanceDB's untyped errors are mapped to `aiomigrate.errors` here and nowhere else. What to commit,
retry or restore is decided by the layers above.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TypeVar

import anyio
import lancedb

from aiomigrate.errors import (
    CastRefusedError,
    ColumnNotNullableError,
    CommitConflictError,
    StaleHandleError,
    StoreError,
    TableExistsError,
    TableNotFoundError,
    TableVersionGoneError,
    WriterCongestionError,
)
from aiomigrate.store.uri import is_local

Connection = lancedb.AsyncConnection
"""An open LanceDB connection, which an application may pass."""

T = TypeVar("T")

_is_settling: ContextVar[bool] = ContextVar("_is_settling", default=False)

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


class Calls:
    """A LanceDB connection, and the one path of all calls to it.

    Attributes:
        connection: LanceDB's connection.
        uri: The database's URI without secrets.
        storage_options: The options that the connection was opened with.
        abandoned: Tables with a mutation that was abandoned after a cancellation and may still
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
            connection: A connection with the default read consistency: a handle's `version()`
                right after a commit must be that commit.
            uri: The redacted URI, for logs.
            secrets: Texts to remove from every error.
            grace_s: Seconds that a cancelled mutation has to finish.
            storage_options: The options that the connection was opened with.
        """
        self.storage_options = dict(storage_options) if storage_options else None
        self.connection = connection
        self.uri = uri
        self.abandoned: set[str] = set()
        self._location = str(connection.uri)
        self._secrets = tuple(secrets)
        self._grace_s = grace_s

    def scrub(self, text: str) -> str:
        """Returns a text without the secrets of the URI and the storage options."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def location_of(self, table: str) -> str:
        """Returns the URI of a table."""
        return f"{self._location.rstrip('/')}/{table}.lance"

    def free_bytes(self) -> int | None:
        """Returns the free bytes on the disk of a local database, `None` for other databases."""
        return shutil.disk_usage(self._location).free if is_local(self._location) else None

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
    ) -> T:
        """Awaits one LanceDB call; all calls go through here.

        Args:
            verb: What the call does, for errors.
            table: Name of the table, for errors.
            run: Makes the call.
            mutates: Whether to await it to its end under cancellation, see `settle`.

        Raises:
            StoreError: LanceDB failed; a subclass names the failure if it is a known one.
        """
        try:
            return await (self.settle(table, run) if mutates else run())
        except (ValueError, RuntimeError, OSError, NotImplementedError, KeyError) as exc:
            error = mapped(exc, f"{verb} on table {table!r}", self._secrets)
            has_secret = any(secret in str(exc) for secret in self._secrets)
            raise error from (None if has_secret else exc)

    async def settle(self, table: str, run: Callable[[], Awaitable[T]]) -> T:
        """Awaits a mutation, and the bookkeeping that belongs to it, to its end.

        A cancellation is raised once the mutation has ended. If it does not end within the grace
        time it is abandoned: its table is added to `abandoned`, and it may still commit.
        """
        if _is_settling.get():  # part of a mutation that is already awaited in this way
            return await run()
        result: list[T] = []
        failure: list[BaseException] = []
        ended = anyio.Event()
        scope = anyio.CancelScope(shield=True)

        async def work() -> None:
            _is_settling.set(True)  # in this task only
            with scope:
                try:
                    result.append(await run())
                except Exception as exc:  # noqa: BLE001 - raised to the caller below
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

    async def open_handle(self, name: str) -> lancedb.AsyncTable:
        """Opens a LanceDB handle of a table at its latest version.

        Raises:
            TableNotFoundError: The table does not exist.
            StoreError: The table could not be opened.
        """
        return await self.call("open", name, lambda: self.connection.open_table(name))


def plain_message(text: str) -> str:
    """Returns LanceDB's message without positions in Rust source files and Python tracebacks."""
    text = re.sub(r",? /\S+\.rs:\d+:\d+", "", text).removeprefix("lance error: ")
    text = re.sub(r"\s*Detail: Python exception: Traceback.*", "", text, flags=re.DOTALL)
    return text.rstrip(" .\n")


def mapped(exc: Exception, doing: str, secrets: Sequence[str]) -> StoreError:
    """Returns the aiomigrate error for an exception of LanceDB, without secrets.

    Args:
        exc: LanceDB's exception.
        doing: What failed, for the message: "Could not {doing}: ...".
        secrets: Texts to replace by asterisks.
    """
    text = plain_message(str(exc))
    for secret in secrets:
        text = text.replace(secret, "***")
    for pattern, kind, remedy in _CONFLICTS:
        if re.search(pattern, text):
            return kind(f"Could not {doing}: {text}.", remedy)
    return StoreError(
        f"Could not {doing}: {text}.", "See LanceDB's message, correct the cause and run again."
    )
