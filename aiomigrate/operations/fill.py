"""`Backfill`: fills a column by a user's function; committed results are never computed again.

This module declares which rows to fill and how. `backfill.engine` makes the calls, retries them
and commits the results.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError, PoisonRowsError
from aiomigrate.operations.base import TUNING, Operation, Traits
from aiomigrate.operations.target import Target
from aiomigrate.schema.index import can_index
from aiomigrate.schema.sql import Statement, checked_names, quote
from aiomigrate.schema.state import WITNESS_PREFIX, Index, TableState, remember, remembered

FillFunction = Callable[[pa.RecordBatch], Any | Awaitable[Any]]
"""From a batch of rows to one value for each row: an Arrow or numpy array, or a sequence."""

MAX_LISTED = 100
"""Poison rows that are listed with key and error; further ones are only counted."""


class OnPoison(enum.Enum):
    """What a migration does with poison rows: rows for which the function fails."""

    FAIL = "fail"  # it fills the other rows, then fails; the next run retries the poison rows
    LIST = "list"  # it leaves them NULL, and lists them in report and history


class Engine(enum.Enum):
    """Where a function is called."""

    LOCAL = "local"  # in this process: it resumes after every commit, and does not block writers
    RAY = "ray"  # on a Ray cluster: the rows present at the start, in one commit


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a function is called, and how often its results are committed.

    Attributes:
        batch_rows: Rows per call.
        concurrency: Calls that run at the same time.
        calls_per_s: Most calls started per second, `None` for no limit.
        attempts: Most calls for one batch; the pause before each retry grows.
        chunk_rows: Rows per commit. `None` follows the table's fragments, up to some 100 MB per
            commit, so that each value is written once.
        checkpoint_s: Seconds after which results are committed even if their chunk is not full.
            A crash loses at most these results and the calls in flight.
        drain_s: Seconds that calls in flight get to finish after the run is cancelled.

    Raises:
        InvalidMigrationError: A value is not a positive number.
    """

    batch_rows: int = 256
    concurrency: int = 8
    calls_per_s: float | None = None
    attempts: int = 5
    chunk_rows: int | None = None
    checkpoint_s: float = 30.0
    drain_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("batch_rows", "concurrency", "attempts", "chunk_rows"):
            value = getattr(self, name)
            if value is None and name == "chunk_rows":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidMigrationError(f"Pace: {name}={value!r}.", "Give an integer from 1.")
        for name in ("calls_per_s", "checkpoint_s", "drain_s"):
            value = getattr(self, name)
            if value is None and name == "calls_per_s":
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
                raise InvalidMigrationError(f"Pace: {name}={value!r}.", "Give a number above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """A column to fill, as the argument of `Target.fill`.

    Attributes:
        column: The column; rows where it is NULL are filled.
        witness: Temporary column (int64) with the digest of the values that a finished row was
            computed from; the row is filled again if they have changed since.
        errors: Temporary column (string) with the error of each poison row.
        key: Column that identifies a row.
        sources: Columns that the function receives.
        function: The function.
        where: SQL condition on the rows to fill, `None` for all rows.
        pace: How the function is called.
        max_poison: Poison rows after which the fill stops.
        retries_poison: Whether poison rows of an earlier run are tried again.
        words: Description of the work, for errors.
        by_value: Whether the function receives a list of values of the only source, each distinct
            value once and without NULL, instead of a batch.
    """

    column: str
    witness: str
    errors: str
    key: str
    sources: tuple[str, ...]
    function: FillFunction
    where: str | None
    pace: Pace
    max_poison: int
    retries_poison: bool
    words: str
    by_value: bool = False

    @property
    def todo(self) -> str:
        """SQL condition on the rows to look at: not filled, or filled and perhaps changed since."""
        column, witness = quote(self.column), quote(self.witness)
        begun = f"({column} IS NULL OR {witness} IS NOT NULL)"
        return begun if self.where is None else f"({self.where}) AND {begun}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The values of a source column, for which a function will be called.

    Attributes:
        rows: Rows with a value.
        distinct: Number of distinct values.
        characters: Total length of the distinct values, 0 if they are not text.
        repeated: Digests of the values that several rows have.
        free_bytes: Free disk space, `None` if it is not known.
    """

    rows: int
    distinct: int
    characters: int
    repeated: frozenset[int]
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Backfill(Operation):
    """Fill a column by a function of each row, in the order of the table's fragments.

    **The data itself is the progress.** The commit that stores a value also stores a digest of its
    source values in a temporary column. After a crash, a cancellation or a failure, the next run
    resumes with the remaining rows, on any machine, and repeats only the calls whose results were
    not committed. Rows that other writers add or change meanwhile are filled (again); rows that
    they add after it has ended are not: first release code that writes the new column. It keeps
    values that it did not write. Readers see each value as soon as it is committed.

    A batch for which the function raises is tried again after growing random pauses (extra
    `backfill`), then halved until the poison rows are known; the other rows are filled. It is
    undone by dropping the column with `AddColumns`, or by restoring the previous table version,
    which a savepoint keeps.

    Attributes:
        column: The nullable column to fill, for example one that `op.AddColumns` has just added.
        function: From a `pyarrow.RecordBatch` (columns `source`) to one value for each row, async
            or plain; a plain function runs in a thread. `None` for a row leaves it NULL for good.
        key: A column with unique values and without NULL, of a type that a BTree index takes. It
            gets a temporary index if it has none.
        source: The columns that the function receives; by default all except `column`.
        where: SQL condition on the rows to fill; by default all rows.
        revision: Part of its identity. A corrected function resumes where the earlier one stopped;
            with another revision, all rows are filled again.
        on_poison: What the migration does if rows cannot be filled.
        max_poison: Poison rows after which it stops at once, as the function itself is broken.
        pace: How the function is called, and how often results are committed.
    """

    column: str
    function: FillFunction
    key: str = field(kw_only=True)
    source: str | Sequence[str] = field(default=(), kw_only=True)
    where: str | None = field(default=None, kw_only=True)
    revision: str = field(default="", kw_only=True)
    on_poison: OnPoison | str = field(default=OnPoison.FAIL, kw_only=True, metadata={TUNING: True})
    max_poison: int = field(default=1000, kw_only=True, metadata={TUNING: True})
    pace: Pace = field(default_factory=Pace, kw_only=True, metadata={TUNING: True})

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        checked_names("Backfill", [self.column])
        checked_names("Backfill", [self.key])
        if not callable(self.function):
            raise InvalidMigrationError(
                f"Backfill: {self.function!r} is not a function.",
                "Pass a function of a pyarrow.RecordBatch that returns one value for each row.",
            )
        given = (self.source,) if isinstance(self.source, str) else tuple(self.source)
        if given:
            checked_names("Backfill", given)
        if self.column in given:
            raise InvalidMigrationError(
                f"Backfill: column {self.column!r} is filled from itself.",
                "Name other columns in source=.",
            )
        object.__setattr__(self, "source", given)

    @property
    def fills(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            reversible="dropping the column, or restoring the previous table version",
            commits="1 for each chunk",
        )

    @property
    def shows(self) -> bool:
        return False

    @property
    def needs_savepoint(self) -> bool:
        return True

    @property
    def identity(self) -> str | None:
        """All fields that define the work, without the function, which may be corrected."""
        return f"backfill {self.column} {self.key} {self.source} {self.where} {self.revision}"

    @property
    def statement(self) -> Statement | None:
        return None if self.where is None else Statement(table=self.table or "", where=self.where)

    def describe(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"backfill {self.column} by {name}"

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        check_key(self, before, self.key)
        for column in (self.column, *self.source):
            if column not in before.schema.names:
                raise self.refuse_missing_column(before, column)
        if not before.column(self.column).nullable:
            raise self.refuse(
                f"column {self.column!r} is NOT NULL, so there is no row to fill.",
                "Allow NULL first with op.SetNullable.",
            )
        self.require("backfill", "tenacity", "aiolimiter")
        return before

    def predict(self, state: TableState | None, witness: str) -> TableState:
        return without_temporary_index(self.evolve(state), witness, self.key)

    async def apply(self, target: Target) -> int:
        await prepare_fill(target, target.witness, self.key, ())
        names = [f.name for f in self.existing(target.state).fields()]
        filled = await target.fill(
            Filling(
                column=self.column,
                witness=target.witness,
                errors=f"{target.witness}_error",
                key=self.key,
                sources=tuple(self.source) or tuple(n for n in names if n != self.column),
                function=self.function,
                where=self.where,
                pace=self.pace,
                max_poison=self.max_poison,
                retries_poison=self.on_poison is OnPoison.FAIL,
                words=self.describe(),
            )
        )
        await finish_fill(target, target.witness, self.key)
        await report_poison(target, target.witness, self, self.key, self.on_poison)
        return filled


def check_key(operation: Operation, state: TableState, key: str) -> None:
    """Checks the column that identifies rows.

    Raises:
        OperationError: It does not exist, or its type takes no BTree index.
    """
    if key not in state.schema.names:
        raise operation.refuse_missing_column(state, key)
    if not can_index("BTree", state.column(key).type):
        raise operation.refuse(
            f"key {key!r} is {state.column(key).type}, which takes no BTree index.",
            "Name a key of integers or text.",
        )


async def prepare_fill(
    target: Target, witness: str, key: str, more: Sequence[pa.Field[Any]]
) -> None:
    """Adds the temporary columns of a fill and an index on the key, unless they exist.

    Args:
        target: The table.
        witness: The temporary column for digests.
        key: The column that identifies rows.
        more: Further columns to add in the same commit.
    """
    state = target.state
    assert state is not None  # noqa: S101 - `evolve` has checked it
    if remembered(state, witness) is None:
        await target.add_columns([*fill_columns(state, witness, key), *more])
    if not any(i == Index("BTree", (key,)) for i in (target.state or state).indexes):
        await target.create_index(Index("BTree", (key,)), {})


def fill_columns(state: TableState, witness: str, key: str) -> list[pa.Field[Any]]:
    """Returns the temporary columns of a fill: digests (int64) and errors (string)."""
    memory = {"temporary": not any(i == Index("BTree", (key,)) for i in state.indexes)}
    return [remember(witness, memory, pa.int64()), pa.field(f"{witness}_error", pa.string())]


async def finish_fill(target: Target, witness: str, key: str) -> None:
    """Drops the temporary index, and updates the other indexes until they cover moved rows."""
    state = target.state
    assert state is not None  # noqa: S101 - `evolve` has checked it
    memory = remembered(state, witness) or {}
    for index in state.indexes:
        if index == Index("BTree", (key,)):
            if memory.get("temporary"):
                await target.drop_index(index.name)
            elif await target.uncovered(index):
                await target.create_index(index, index.options)
        elif not any(c.startswith(WITNESS_PREFIX) for c in index.columns):
            await target.cover(index, _INDEX_TIMEOUT_S)


def without_temporary_index(state: TableState, witness: str, key: str) -> TableState:
    """Returns a state without the temporary index on the key, if it exists."""
    memory = remembered(state, witness)
    if memory is None or not memory.get("temporary"):
        return state
    kept = tuple(i for i in state.indexes if i != Index("BTree", (key,)))
    return TableState(state.schema, kept)


async def report_poison(
    target: Target, witness: str, operation: Operation, key: str, policy: OnPoison | str
) -> None:
    """Reports the rows that could not be filled, as the policy says; nothing if there are none.

    Raises:
        PoisonRowsError: There are such rows, and the policy is to fail.
    """
    errors = f"{witness}_error"
    condition = f"{quote(errors)} IS NOT NULL"
    count = await target.count_rows(condition)
    if not count:
        return
    listed: list[tuple[str, str]] = []
    async for batch in target.batches(condition, [key, errors], MAX_LISTED):
        listed += [(str(k), str(e)) for k, e in zip(*batch.to_pydict().values(), strict=True)]
        if len(listed) >= MAX_LISTED:
            break
    listed = listed[:MAX_LISTED]
    if policy is OnPoison.LIST:
        target.add_fact("poison", {"rows": count, "listed": [list(row) for row in listed]})
        return
    examples = "; ".join(f"{key}={row}: {error}" for row, error in listed[:3])
    raise PoisonRowsError(
        f"{operation.describe()} on table {target.name!r}: the function failed for {count} "
        f"row{'s' if count > 1 else ''} ({examples}{'; …' if count > 3 else ''}). "
        "The other rows are filled.",
        "Correct the function or the rows and run again: only these rows are tried again. Or pass "
        "on_poison=op.OnPoison.LIST to leave them NULL.",
        rows=listed,
        count=count,
    )


_INDEX_TIMEOUT_S = 3600.0
