"""Many databases of one application, as of many tenants: each brought to the target, some at once.

Each database has its own lease and ledger, so nothing here is atomic over several: a failure of
one holds up no other. Run it again to go on; what is at target costs one small read.
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
from aiomigrate.results import Report

_LASTING = (ConfigurationError, PlanError, ScriptError)
"""Errors that are the same when it is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseReport:
    """What came of one database.

    Attributes:
        database: Its URI, without secrets.
        report: What was done; `None` where it failed before a run.
        error: What stopped it, `None` when it is at target.
        attempts: How often it was tried.
        total_s: Seconds, all attempts together.
    """

    database: str
    report: Report | None = None
    error: AiomigrateError | None = None
    attempts: int = 1
    total_s: float = 0.0

    @property
    def is_ok(self) -> bool:
        """Whether it is at target."""
        return self.error is None

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
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
    """What came of all of them. `str()` is a summary, with a line for each that failed.

    Attributes:
        databases: One report for each, in the order given.
        total_s: Seconds from start to end.
    """

    databases: tuple[DatabaseReport, ...] = ()
    total_s: float = 0.0

    @property
    def failed(self) -> tuple[DatabaseReport, ...]:
        """Those that are not at target."""
        return tuple(one for one in self.databases if not one.is_ok)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
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
    """Brings many databases to their target, some at a time. Failures are collected, not raised.

    Scripts are loaded once. Those that failed are tried again after all others, but for errors
    that would be the same again. Cancelling it undoes or finishes what is in hand, everywhere;
    it may be run again at any time, also beside itself: each migration is applied once.

    Args:
        databases: Paths and URIs; of equal ones the first counts.
        migrations: As for `MigrationManager`.
        params: As for `MigrationManager`.
        at_once: How many databases are worked on at once; each also has its `concurrency`.
        attempts: How often a database is tried.
        background: Whether to do what is marked for the background, too.
        on_done: Called in the event loop with what came of each, when it has ended for good.
        **options: Of each `MigrationManager`.

    Returns:
        A report for each; none for no databases.

    Raises:
        ConfigurationError: An option cannot be, or there is no migrations folder.
        ScriptError: A script is wrong; nothing was written.
    """
    for name, value in (("at_once", at_once), ("attempts", attempts)):
        if value < 1:
            raise ConfigurationError(f"{name} is {value}.", "Pass a positive number.")
    begun = time.monotonic()
    scripts = await anyio.to_thread.run_sync(loader.load, migrations, dict(params or {}))
    managers = [
        MigrationManager(database, migrations=scripts, params=params, **options)
        for database in dict.fromkeys(str(database) for database in databases)
    ]
    results: dict[int, DatabaseReport] = {}
    places = anyio.CapacityLimiter(at_once)

    async def one(number: int, is_last: bool) -> None:  # noqa: FBT001 - the task group's
        async with places:
            result = await _migrate(managers[number], results.get(number), background=background)
        results[number] = result
        if on_done is not None and (is_last or not _may_be_tried_again(result)):
            on_done(result)

    for attempt in range(1, attempts + 1):
        left = [
            n for n in range(len(managers)) if n not in results or _may_be_tried_again(results[n])
        ]
        async with anyio.create_task_group() as group:
            for number in left:
                group.start_soon(one, number, attempt == attempts)
    return ManyReport(
        databases=tuple(results[number] for number in range(len(managers))),
        total_s=time.monotonic() - begun,
    )


def _may_be_tried_again(result: DatabaseReport) -> bool:
    return result.error is not None and not isinstance(result.error, _LASTING)


async def _migrate(
    manager: MigrationManager, before: DatabaseReport | None, *, background: bool
) -> DatabaseReport:
    begun = time.monotonic()
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
        attempts=1 if before is None else before.attempts + 1,
        total_s=time.monotonic() - begun + (0.0 if before is None else before.total_s),
    )


def expand_glob(pattern: str) -> Sequence[str]:
    """Returns the local folders that a pattern names, sorted.

    Args:
        pattern: Such as `tenants/*/app.lancedb`; `**` is any depth.

    Raises:
        ConfigurationError: It names none, or is no pattern for paths.
    """
    path = Path(pattern)
    if "://" in pattern:
        raise ConfigurationError(
            "--glob is for local paths.", "List URIs of object stores in a file for --uris-from."
        )
    root = Path(path.anchor or ".")
    found = sorted(
        str(one) for one in root.glob(str(path.relative_to(path.anchor))) if one.is_dir()
    )
    if not found:
        raise ConfigurationError(f"No folder is named by {pattern!r}.", "Check the pattern.")
    return found
