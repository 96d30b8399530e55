"""The exceptions that aiomigrate raises, all subclasses of `AiomigrateError`.

Each error has the known facts as attributes, and a text of two sentences: what happened, and what
to do next. This module only defines the classes: `store.calls` maps LanceDB's untyped errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiomigrate.results import Report


class AiomigrateError(Exception):
    """The base class of all errors of this library; never raised itself.

    Attributes:
        what: What happened, one sentence.
        remedy: What to do next, one sentence.
        line: The version line that the error is about, or `None`.
        version: The migration version that the error is about, or `None`.
        path: The file that the error is about, or `None`.
    """

    def __init__(
        self,
        what: str,
        remedy: str,
        *,
        line: str | None = None,
        version: int | None = None,
        path: str | Path | None = None,
    ) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy
        self.line = line
        self.version = version
        self.path = None if path is None else str(path)

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}"


# ---- configuration and scripts ------------------------------------------------------------------


class ConfigurationError(AiomigrateError):
    """Raised when an option, URI or setting is invalid, or an optional dependency is missing."""


class UnsupportedDatabaseError(ConfigurationError):
    """Raised when the URI names an unsupported kind of database (LanceDB Cloud, namespaces)."""


class UnsafeStoreError(ConfigurationError):
    """Raised when the object store loses acknowledged commits, so that no lease is reliable."""


class ScriptError(AiomigrateError):
    """Raised when a migration script, or the set of all scripts, is invalid."""


class InvalidMigrationError(ScriptError):
    """Raised when a `Migration` or an operation is built from invalid values."""


class ScriptImportError(ScriptError):
    """Raised when a migration file or package cannot be imported."""


class DuplicateVersionError(ScriptError):
    """Raised when two migrations have the same version on one line."""


# ---- planning -----------------------------------------------------------------------------------


class PlanError(AiomigrateError):
    """Raised when the scripts do not fit the database. Nothing was written."""


class DependencyError(PlanError):
    """Raised when a migration depends on one that is missing or does not run, or on a cycle.

    Also raised when a rollback would undo a migration that others still depend on.
    """


class TargetError(PlanError):
    """Raised when the requested target of an upgrade, stamp or rollback is invalid."""


class DatabaseAheadError(PlanError):
    """Raised when a line's recorded version is above its newest script: the code is too old."""


class ChecksumMismatchError(PlanError):
    """Raised when a migration was edited after it was applied."""


class OutOfOrderError(PlanError):
    """Raised when a new migration has a version below the one its line has already reached."""


class MissingScriptError(PlanError):
    """Raised when the script of an applied migration is missing."""


class OperationError(PlanError):
    """Raised when an operation does not fit the table that it changes."""


# ---- the ledger ---------------------------------------------------------------------------------


class LedgerError(AiomigrateError):
    """Raised when the metadata tables cannot be read, trusted or written.

    Such tables are never read as "version 0".
    """


class LedgerUnreadableError(LedgerError):
    """Raised when a metadata table exists but cannot be read, or cannot be created."""


class LedgerCorruptError(LedgerError):
    """Raised when a metadata table lacks a column, or holds values that aiomigrate never writes."""


class LedgerConflictError(LedgerError):
    """Raised when the head, the journal and the data contradict each other."""


class LedgerFormatError(LedgerError):
    """Raised when a newer aiomigrate wrote the metadata tables, in a format unknown to this one."""


# ---- the lease ----------------------------------------------------------------------------------


class LeaseError(AiomigrateError):
    """Raised when the lease (the right to run migrations) cannot be acquired or kept."""


class LeaseTimeoutError(LeaseError):
    """Raised when another process holds the lease for the whole of `lease_wait`."""


class LeaseLostError(LeaseError):
    """Raised when this process no longer holds its lease, which another one may have taken.

    Nothing more is written.
    """


class BackgroundBusyError(LeaseError):
    """Raised when a rollback or stamp concerns a line or table that background work is changing."""


class LeaseHeldError(LeaseError):
    """Raised when `unlock` finds that the holder of the lease still renews it."""


# ---- running ------------------------------------------------------------------------------------


class MigrationFailedError(AiomigrateError):
    """Raised when at least one migration failed. Others may have been applied: see the report.

    Attributes:
        report: The report of the run: applied, failed (with the reason) and skipped migrations.
    """

    def __init__(self, what: str, remedy: str, *, report: Report, **where: object) -> None:
        super().__init__(what, remedy, **where)  # type: ignore[arg-type]
        self.report = report


class NotAtTargetError(AiomigrateError):
    """Raised when the database is not at its target and `on_pending` is not `MIGRATE`."""


class OverwriteLostError(AiomigrateError):
    """Raised when other writers commit during every attempt to overwrite or copy a table.

    Their commits are kept.
    """


class RollbackRefusedError(PlanError):
    """Raised when a migration cannot be undone, or only by discarding other writers' commits."""


class DestructiveError(PlanError):
    """Raised when a step discards data and `on_destructive` does not allow it.

    With `OnDestructive.KEEP`, only a step whose savepoint cannot be kept is refused.
    """


class KeepsProgressError(AiomigrateError):
    """Raised when a backfill or re-embedding stops but keeps its committed work.

    The next run continues where this one stopped.
    """


class PoisonRowsError(KeepsProgressError):
    """Raised when the function of a backfill fails for some rows. The other rows are filled.

    Attributes:
        rows: Key and error, as text, of the first failed rows.
        count: The number of failed rows.
    """

    def __init__(
        self, what: str, remedy: str, *, rows: Sequence[tuple[str, str]], count: int
    ) -> None:
        super().__init__(what, remedy)
        self.rows = tuple(rows)
        self.count = count


class BackfillBehindError(KeepsProgressError):
    """Raised when other writers add or change rows faster than a backfill fills them."""


class ModelChangedError(KeepsProgressError):
    """Raised when a model returns other vectors for the same texts than when the work began."""


class QualityGateError(KeepsProgressError):
    """Raised when the new vectors miss the thresholds of the gate. The old ones stay in use."""


class SchemaMismatchError(AiomigrateError):
    """Raised when a table differs, after an operation ran, from what the operation predicted."""


class MigrationTimeoutError(AiomigrateError):
    """Raised when a migration takes longer than `timeout`, or an index than its `timeout_s`."""


class UnresolvedError(AiomigrateError):
    """Raised when undoing would discard a foreign commit, or LanceDB failed while undoing.

    The table is left as it is; the remedy names the choices.
    """


class ValidationFailedError(AiomigrateError):
    """Raised when a run ends and a line is not at its target.

    Attributes:
        errors: One sentence for each such line.
    """

    def __init__(self, errors: tuple[str, ...], remedy: str) -> None:
        super().__init__("The database is not valid: " + "; ".join(errors) + ".", remedy)
        self.errors = errors


# ---- LanceDB, mapped ----------------------------------------------------------------------------


class StoreError(AiomigrateError):
    """Raised when a LanceDB call fails and no subclass describes the failure."""


class TableNotFoundError(StoreError):
    """Raised when a table does not exist, or only as the remains of a create that was killed."""


class TableExistsError(StoreError):
    """Raised when a table of the requested name already exists."""


class ColumnNotNullableError(StoreError):
    """Raised when a column contains NULL and cannot become NOT NULL."""


class CastRefusedError(StoreError):
    """Raised when LanceDB cannot cast a column to the requested type."""


class CommitConflictError(StoreError):
    """Raised when another commit came first. The same call may succeed on a new handle."""


class StaleHandleError(StoreError):
    """Raised when a handle is out of date: reopen the table, read it again and decide again."""


class WriterCongestionError(StoreError):
    """Raised when LanceDB's own retries are exhausted by other writers. Nothing was written."""


class TableVersionGoneError(StoreError):
    """Raised when a requested table_version no longer exists because a cleanup removed it."""
