"""Migrates many databases of one application, such as one per tenant, several at a time.

Each database has its own lease and ledger. Nothing here is atomic over several databases: if one
fails, the others still run. Run it again to continue; a database at target costs one small read.
`manager` migrates a single database.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from aiomigrate.errors import AiomigrateError, ConfigurationError, PlanError, ScriptError
from aiomigrate.manager import MigrationManager
from aiomigrate.migration import loader
from aiomigrate.option_checks import check_flag
from aiomigrate.results import Report

_PERMANENT_ERRORS = (ConfigurationError, PlanError, ScriptError)
"""Errors that another attempt cannot fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseReport:
    """The result of migrating one database.

    Attributes:
        database: The URI of the database, without secrets.
        report: The report of the last run; `None` if the last attempt failed without one.
        error: The error of the last attempt; `None` if the database is at target.
        attempts: The number of attempts.
        total_s: Seconds spent in all attempts.
    """

    database: str
    report: Report | None = None
    error: AiomigrateError | None = None
    attempts: int = 1
    total_s: float = 0.0

    @property
    def is_ok(self) -> bool:
        """Whether the database is at target."""
        return self.error is None

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a dictionary of JSON values."""
        error = self.error
        return {
            "database": self.database,
            "ok": self.is_ok,
            "attempts": self.attempts,
            "total_s": self.total_s,
            "applied": len(self.report.applied) if self.report else 0,
            "error": None if error is None else {
                "type": type(error).__name__, "what": error.what, "remedy": error.remedy,
            },
            "report": self.report.to_dict() if self.report else None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyReport:
    """The result of migrating many databases. `str()` lists the failures and a summary.

    Attributes:
        databases: One report for each database, in the given order.
        total_s: Seconds from start to end.
    """

    databases: tuple[DatabaseReport, ...] = ()
    total_s: float = 0.0

    @property
    def failed(self) -> tuple[DatabaseReport, ...]:
        """The databases that are not at target."""
        return tuple(one for one in self.databases if not one.is_ok)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a dictionary of JSON values."""
        return {
            "databases": [one.to_dict() for one in self.databases],
            "ok": len(self.databases) - len(self.failed),
            "failed": len(self.failed),
            "total_s": self.total_s,
        }

    def __str__(self) -> str:
        from aiomigrate.text import duration

        applied = sum(len(one.report.applied) for one in self.databases if one.report)
        lines = [f"failed   {one.database}: {one.error}" for one in self.failed]
        ok, total = len(self.databases) - len(self.failed), len(self.databases)
        summary = (
            f"{ok} of {total} databases at target, {applied} migrations applied in "
            f"{duration(self.total_s)}."
        )
        return "\n".join([*lines, summary])


async def migrate_all(
    databases: Iterable[str | Path],
    *,
    migrations: loader.Source = "migrations",
    params: Mapping[str, Any] | None = None,
    at_once: int = 8,
    attempts: int = 2,
    background: bool = False,
    on_done: Callable[[DatabaseReport], None] | None = None,
    **options: Any,
) -> ManyReport:
    """Upgrades many databases to their target. Collects failures of databases, raises none.

    The scripts are loaded once. Failed databases are tried again after all others, except after
    errors that another attempt cannot fix. Each database is migrated under its own lease.

    A cancellation undoes or finishes the running migrations of every database. After a crash, the
    next call recovers each database. Several calls may run at the same time, in one process or
    many: each migration is applied once.

    Args:
        databases: Paths and URIs. Duplicates are ignored.
        migrations: As for `MigrationManager`.
        params: As for `MigrationManager`.
        at_once: The maximum number of databases migrated at the same time; `concurrency` applies
            to each of them.
        attempts: The maximum number of attempts for each database.
        background: Whether to also run migrations marked for the background.
        on_done: Called in the event loop with the report of each database after its last attempt.
        **options: Options of each `MigrationManager`.

    Returns:
        A report for each database; empty without databases.

    Raises:
        ConfigurationError: An option is invalid, or there is no migrations folder.
        ScriptError: A script is invalid; nothing was written.
    """
    for name, value in (("at_once", at_once), ("attempts", attempts)):
        if value < 1:
            raise ConfigurationError(f"{name} is {value}.", "Pass a number of 1 or more.")
    check_flag(background, "background")
    started = time.monotonic()
    scripts = await anyio.to_thread.run_sync(loader.load, migrations, dict(params or {}))
    managers = [
        MigrationManager(database, migrations=scripts, params=params, **options)
        for database in dict.fromkeys(str(database) for database in databases)
    ]
    results: dict[int, DatabaseReport] = {}
    limiter = anyio.CapacityLimiter(at_once)

    async def migrate(number: int, is_last: bool) -> None:  # noqa: FBT001 - start_soon's arguments
        async with limiter:
            result = await _migrate(managers[number], results.get(number), background=background)
        results[number] = result
        if on_done is not None and (is_last or not _is_retryable(result)):
            on_done(result)

    for attempt in range(1, attempts + 1):
        remaining = [
            n for n in range(len(managers)) if n not in results or _is_retryable(results[n])
        ]
        async with anyio.create_task_group() as group:
            for number in remaining:
                group.start_soon(migrate, number, attempt == attempts)
    return ManyReport(
        databases=tuple(results[number] for number in range(len(managers))),
        total_s=time.monotonic() - started,
    )


def _is_retryable(result: DatabaseReport) -> bool:
    return result.error is not None and not isinstance(result.error, _PERMANENT_ERRORS)


async def _migrate(
    manager: MigrationManager, previous: DatabaseReport | None, *, background: bool
) -> DatabaseReport:
    started = time.monotonic()
    report: Report | None = None
    error: AiomigrateError | None = None
    try:
        async with manager:
            report = await manager.upgrade(background=background)
    except AiomigrateError as exc:
        error, report = exc, getattr(exc, "report", None)
    return DatabaseReport(
        database=manager.database,
        report=report,
        error=error,
        attempts=1 if previous is None else previous.attempts + 1,
        total_s=time.monotonic() - started + (0.0 if previous is None else previous.total_s),
    )


def expand_glob(pattern: str) -> Sequence[str]:
    """Returns the local folders that match a pattern, sorted.

    Args:
        pattern: A pattern such as `tenants/*/app.lancedb`; `**` matches any depth.

    Raises:
        ConfigurationError: No folder matches, or the pattern is a URI.
    """
    path = Path(pattern)
    if "://" in pattern:
        raise ConfigurationError(
            "--glob matches local paths only.",
            "List URIs of object stores in a file, and pass it with --uris-from.",
        )
    root = Path(path.anchor or ".")
    found = sorted(
        str(one) for one in root.glob(str(path.relative_to(path.anchor))) if one.is_dir()
    )
    if not found:
        raise ConfigurationError(f"No folder matches {pattern!r}.", "Check the pattern.")
    return found
