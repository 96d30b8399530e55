"""Every exception aiomigrate raises, in one tree under `AiomigrateError`.

Each error carries the facts it knows as attributes and says two things: what happened, and what
to do next. This module is for naming failures; it is not for mapping LanceDB's untyped errors
(`aiomigrate.lance` does that, in one place).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiomigrate.results import Report


class AiomigrateError(Exception):
    """Base of all errors of this library.

    Attributes:
        what: What happened, one sentence.
        remedy: What to do next, one sentence.
        line: The version line concerned, if one is.
        version: The migration version concerned, if one is.
        path: The file concerned, if one is.
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
    """An option, URI or setting cannot be used."""


class UnsupportedDatabaseError(ConfigurationError):
    """The URI names a kind of database aiomigrate does not support (LanceDB Cloud, namespaces)."""


class UnsafeStoreError(ConfigurationError):
    """The store loses commits that it has acknowledged, so that no lease can be held on it."""


class ScriptError(AiomigrateError):
    """A migration script, or the set of all scripts, is wrong."""


class InvalidMigrationError(ScriptError):
    """A `Migration` was built from values that cannot be."""


class ScriptImportError(ScriptError):
    """A migration file could not be imported."""


class DuplicateVersionError(ScriptError):
    """Two migrations claim the same version of one line."""


# ---- planning -----------------------------------------------------------------------------------


class PlanError(AiomigrateError):
    """The scripts and the database do not fit together. Nothing was written."""


class DependencyError(PlanError):
    """A `depends_on` names a migration that does not exist or will not run, or forms a cycle."""


class TargetError(PlanError):
    """The requested target cannot be reached by upgrading."""


class DatabaseAheadError(PlanError):
    """A line is recorded at a version above its newest script: the code is older than the data."""


class ChecksumMismatchError(PlanError):
    """A migration that was applied has been edited since."""


class OutOfOrderError(PlanError):
    """A migration was added below the version its line has already reached."""


class MissingScriptError(PlanError):
    """A migration that was applied has no script any more."""


class OperationError(PlanError):
    """An operation does not fit the table it is for."""


# ---- the ledger ---------------------------------------------------------------------------------


class LedgerError(AiomigrateError):
    """The metadata tables cannot be trusted. Never read as "version 0"."""


class LedgerUnreadableError(LedgerError):
    """A metadata table exists but cannot be read."""


class LedgerCorruptError(LedgerError):
    """A metadata table holds what aiomigrate never writes: missing columns, bad values."""


class LedgerConflictError(LedgerError):
    """Head, journal and data contradict each other."""


class LedgerFormatError(LedgerError):
    """The metadata tables were written by a newer aiomigrate."""


# ---- the lease ----------------------------------------------------------------------------------


class LeaseError(AiomigrateError):
    """The right to run migrations could not be had or kept."""


class LeaseTimeoutError(LeaseError):
    """Another process held the lease for the whole time this one was willing to wait."""


class LeaseLostError(LeaseError):
    """This process held the lease and another one has taken it. Nothing more is written."""


class BackgroundBusyError(LeaseError):
    """Work in the background has a line or table in hand that was asked to be changed."""


class LeaseHeldError(LeaseError):
    """`unlock` was asked to break a lease whose holder is alive."""


# ---- running ------------------------------------------------------------------------------------


class MigrationFailedError(AiomigrateError):
    """At least one migration failed. Others may have been applied; the report says which.

    Attributes:
        report: The whole run: what was applied, what failed and why, what was skipped.
    """

    def __init__(self, what: str, remedy: str, *, report: Report, **where: object) -> None:
        super().__init__(what, remedy, **where)  # type: ignore[arg-type]
        self.report = report


class NotAtTargetError(AiomigrateError):
    """The database is not at its target, and this process was not to migrate it."""


class OverwriteLostError(AiomigrateError):
    """Others committed during every attempt to overwrite a table. Everything of theirs is kept."""


class RollbackRefusedError(PlanError):
    """A migration cannot be undone, or not without giving up what others committed since."""


class DestructiveError(PlanError):
    """A step discards what could not be brought back, and that was not allowed."""


class KeepsProgressError(AiomigrateError):
    """Work that was paid for is kept: the next run goes on where this one stopped."""


class PoisonRowsError(KeepsProgressError):
    """A backfill's function failed for some rows; the others are filled.

    Attributes:
        rows: Key and error of the first of them.
        count: How many they are.
    """

    def __init__(
        self, what: str, remedy: str, *, rows: Sequence[tuple[str, str]], count: int
    ) -> None:
        super().__init__(what, remedy)
        self.rows = tuple(rows)
        self.count = count


class BackfillBehindError(KeepsProgressError):
    """Others add or change rows faster than a backfill fills them."""


class ModelChangedError(KeepsProgressError):
    """A model does not give the vectors it gave when the re-embedding began."""


class QualityGateError(KeepsProgressError):
    """The new vectors are worse than the thresholds allow; the old ones stay in use."""


class SchemaMismatchError(AiomigrateError):
    """After its operations ran, a table is not what they predicted."""


class MigrationTimeoutError(AiomigrateError):
    """A migration took longer than the timeout per migration."""


class UnresolvedError(AiomigrateError):
    """Undoing would discard a commit that is not ours, so nothing was undone: a person decides."""


class ValidationFailedError(AiomigrateError):
    """The database is not what the ledger and the scripts say.

    Attributes:
        errors: One sentence for each difference.
    """

    def __init__(self, errors: tuple[str, ...], remedy: str) -> None:
        super().__init__("The database is not valid: " + "; ".join(errors) + ".", remedy)
        self.errors = errors


# ---- LanceDB, mapped ----------------------------------------------------------------------------


class StoreError(AiomigrateError):
    """LanceDB refused or failed a call, in a way no subclass names."""


class TableNotFoundError(StoreError):
    """The table does not exist (or is the ghost of a create that was killed)."""


class TableExistsError(StoreError):
    """A table of that name exists already."""


class ColumnNotNullableError(StoreError):
    """NULL values stand where NOT NULL was asked for."""


class CastRefusedError(StoreError):
    """LanceDB does not cast a column from its type to another."""


class CommitConflictError(StoreError):
    """Another commit came first; the same call may succeed on a fresh handle."""


class StaleHandleError(StoreError):
    """The handle, or the decision made on it, is out of date: reopen, look, and decide again."""


class WriterCongestionError(StoreError):
    """LanceDB gave up after its own retries: too many writers on one table. Nothing was written."""


class TableVersionGoneError(StoreError):
    """The table_version asked for was removed by a cleanup."""
