"""`Backfill`: a column computed by a function of the user's, row by row, never paid for twice.

How the calls are made, retried and committed is for `filling`; here is what they are.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError, PoisonRowsError
from aiomigrate.operations.base import TUNING, Operation, Traits
from aiomigrate.operations.target import Target
from aiomigrate.schema.index import can_index
from aiomigrate.schema.sql import checked_names, quote
from aiomigrate.schema.state import WITNESS_PREFIX, Index, TableState, remember, remembered

FillFunction = Callable[[pa.RecordBatch], Any | Awaitable[Any]]
"""From a batch of rows to one value for each: an Arrow or numpy array, or a sequence."""

LISTED = 100
"""How many poison rows are told with key and error; the others are counted."""


class OnPoison(enum.Enum):
    """What becomes of a migration with rows that the function fails for."""

    FAIL = "fail"  # the others are filled, then it fails; the next run tries those rows again
    LIST = "list"  # they stay NULL, and are listed in report and history


class Engine(enum.Enum):
    """Where a function is called."""

    LOCAL = "local"  # in this process: resumable to the call, beside any writer
    RAY = "ray"  # on a Ray cluster, the rows that are there first in one commit


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a function is called, and how often its results are committed.

    Attributes:
        batch_rows: Rows given to the function at once.
        concurrency: Calls in flight.
        calls_per_s: Calls begun per second, `None` for no limit.
        attempts: How often a batch is tried; between two tries it waits, longer each time.
        chunk_rows: Rows of one commit, `None` to follow the table's fragments, which writes each
            value once, up to some 100 MB.
        checkpoint_s: Seconds after which results are committed even if their chunk is not full:
            what a kill can cost, besides the calls in flight.
        drain_s: Seconds that calls in flight have to end when the run is cancelled.
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
                raise InvalidMigrationError(f"Pace: {name}={value!r}.", "Give 1 or more.")
        for name in ("calls_per_s", "checkpoint_s", "drain_s"):
            value = getattr(self, name)
            if value is None and name == "calls_per_s":
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
                raise InvalidMigrationError(f"Pace: {name}={value!r}.", "Give more than 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """A column to fill: what `Target.fill` is given.

    Attributes:
        column: The column; rows where it is NULL are to do.
        witness: Column of ours (int64) that holds, for a row that was done, the digest of the
            values it was computed from: it is to do again when they have changed since.
        errors: Column of ours (text) with what the function raised for a poison row.
        key: Column that identifies a row.
        sources: Columns given to the function.
        function: The function.
        where: SQL condition on the rows that are to do, `None` for all.
        pace: How it is called.
        max_poison: Poison rows after which it stops.
        retries_poison: Whether rows that it failed for in an earlier run are tried again.
        words: What is being done, for errors.
        by_value: Whether the function is given a list of the values of the one source, equal ones
            once and without NULLs, instead of a batch.
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
        """SQL condition on the rows that may be to do: not yet, or done and perhaps changed."""
        column, witness = quote(self.column), quote(self.witness)
        begun = f"({column} IS NULL OR {witness} IS NOT NULL)"
        return begun if self.where is None else f"({self.where}) AND {begun}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a function will be called for.

    Attributes:
        rows: Rows with a value.
        distinct: How many different values there are.
        characters: The length of these, where they are text.
        repeated: Digests of the values that more than one row has.
        free_bytes: What the disk still takes, `None` where that is not known.
    """

    rows: int
    distinct: int
    characters: int
    repeated: frozenset[int]
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Backfill(Operation):
    """Fill a column by a function of each row, in the order of the table's fragments.

    **The data itself is the progress.** A row is done once its value is committed, with a digest
    of what it was computed from in a column of ours: after a kill, a cancellation or a failure
    the next run goes on with the rows that are left, on any machine, and the function is called
    again for at most what was in flight. Rows that others add or change meanwhile are seen and
    done (again); what they change after it has ended is theirs: first release code that writes
    the new column. Values that are there already, and that it did not write itself, stay.

    A batch for which the function raises is tried again, with growing and random pauses (extra
    `backfill`), then halved until the rows that it fails for are known; the others go on.

    Attributes:
        column: The nullable column to fill, such as `op.AddColumns` has added just before.
        function: From a `pyarrow.RecordBatch` (columns `source`) to one value for each row, async
            or plain; a plain one runs in a thread. `None` for a row leaves it NULL for good.
        key: A column without NULLs whose values are unique, of a type that a BTree takes. It gets
            a temporary index where it has none.
        source: The columns that the function is given; by default all but the one to fill.
        where: SQL condition on the rows to fill; by default all.
        revision: Part of its identity: a corrected function goes on where the first one was,
            unless this is changed too.
        on_poison: What becomes of the migration when rows cannot be filled.
        max_poison: Poison rows after which it stops at once: the function is broken, not the rows.
        pace: How the function is called, and how often results are committed.
    """

    column: str
    function: FillFunction
    key: str = field(kw_only=True)
    source: str | Sequence[str] = field(default=(), kw_only=True)
    where: str | None = field(default=None, kw_only=True)
    revision: str = field(default="", kw_only=True)
    on_poison: OnPoison = field(default=OnPoison.FAIL, kw_only=True, metadata={TUNING: True})
    max_poison: int = field(default=1000, kw_only=True, metadata={TUNING: True})
    pace: Pace = field(default_factory=Pace, kw_only=True, metadata={TUNING: True})

    def __post_init__(self) -> None:
        checked_names("Backfill", [self.column])
        checked_names("Backfill", [self.key])
        if not callable(self.function):
            raise InvalidMigrationError(
                f"Backfill: {self.function!r} is not a function.",
                "Pass a function of a pyarrow.RecordBatch that returns a value for each row.",
            )
        given = (self.source,) if isinstance(self.source, str) else tuple(self.source)
        if given:
            checked_names("Backfill", given)
        if self.column in given:
            raise InvalidMigrationError(
                f"Backfill: column {self.column!r} is filled from itself.", "Name other columns."
            )
        object.__setattr__(self, "source", given)

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            reversible="dropping the column with it, or restoring the table_version before",
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
        """What makes it the same work for a corrected script: all but its function."""
        return f"backfill {self.column} {self.key} {self.source} {self.where} {self.revision}"

    def describe(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"backfill {self.column} by {name}"

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        check_key(self, before, self.key)
        for column in (self.column, *self.source):
            if column not in before.schema.names:
                raise self.refuse(
                    f"there is no column {column!r}.",
                    f"Its columns are {', '.join(f.name for f in before.fields())}.",
                )
        if not before.column(self.column).nullable:
            raise self.refuse(
                f"column {self.column!r} forbids NULL, so no row is to do.",
                "Allow it first with op.SetNullable.",
            )
        check_extra(self)
        return before

    def predict(self, state: TableState | None, witness: str) -> TableState:
        return without_temporary(self.evolve(state), witness, self.key)

    async def apply(self, target: Target) -> int:
        await begin(target, target.witness, self.key, ())
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
        await end(target, target.witness, self.key)
        await judge_poison(target, target.witness, self, self.key, self.on_poison)
        return filled


def check_extra(operation: Operation) -> None:
    """Refuses to begin without the libraries that calling a function takes.

    Raises:
        OperationError: They are not installed.
    """
    if find_spec("tenacity") is None or find_spec("aiolimiter") is None:
        raise operation.refuse(
            "the libraries that it calls functions with are not installed.",
            "pip install 'aiomigrate[backfill]'",
        )


def check_key(operation: Operation, state: TableState, key: str) -> None:
    """Checks the column that identifies rows.

    Raises:
        OperationError: There is none, or none that LanceDB can find rows by.
    """
    if key not in state.schema.names:
        raise operation.refuse(
            f"there is no column {key!r}.",
            f"Its columns are {', '.join(f.name for f in state.fields())}.",
        )
    if not can_index("BTree", state.column(key).type):
        raise operation.refuse(
            f"rows cannot be found by {key!r}, which is {state.column(key).type}.",
            "Name a key of integers or text.",
        )


async def begin(target: Target, witness: str, key: str, more: Sequence[pa.Field[Any]]) -> None:
    """Adds the columns of ours that a filling needs, and an index on the key; or finds them.

    Args:
        target: The table.
        witness: The column that will hold digests.
        key: The column that identifies rows.
        more: Columns to add with them.
    """
    state = target.state
    assert state is not None  # noqa: S101 - `evolve` was asked
    if remembered(state, witness) is None:
        await target.add_columns([*columns_of(state, witness, key), *more])
    if not any(i == Index("BTree", (key,)) for i in (target.state or state).indexes):
        await target.create_index(Index("BTree", (key,)), {})


def columns_of(state: TableState, witness: str, key: str) -> list[pa.Field[Any]]:
    """Returns the columns of ours that a filling needs: digests, and errors."""
    memory = {"temporary": not any(i == Index("BTree", (key,)) for i in state.indexes)}
    return [remember(witness, memory, pa.int64()), pa.field(f"{witness}_error", pa.string())]


async def end(target: Target, witness: str, key: str) -> None:
    """Drops the temporary index, and makes others cover again what the filling has moved."""
    state = target.state
    assert state is not None  # noqa: S101 - as above
    memory = remembered(state, witness) or {}
    for index in state.indexes:
        if index == Index("BTree", (key,)):
            if memory.get("temporary"):
                await target.drop_index(index.name)
            elif await target.uncovered(index):
                await target.create_index(index, index.options)
        elif not any(c.startswith(WITNESS_PREFIX) for c in index.columns):
            await target.cover(index, _COVER_S)


def without_temporary(state: TableState, witness: str, key: str) -> TableState:
    """Returns a state without the index that only a filling needs, if it is there."""
    memory = remembered(state, witness)
    if memory is None or not memory.get("temporary"):
        return state
    kept = tuple(i for i in state.indexes if i != Index("BTree", (key,)))
    return TableState(state.schema, kept)


async def judge_poison(
    target: Target, witness: str, operation: Operation, key: str, policy: OnPoison
) -> None:
    """Tells of the rows that could not be filled, and ends as the policy says.

    Raises:
        PoisonRowsError: There are some, and the policy is to fail.
    """
    errors = f"{witness}_error"
    condition = f"{quote(errors)} IS NOT NULL"
    count = await target.count_rows(condition)
    if not count:
        return
    listed: list[tuple[str, str]] = []
    async for batch in target.batches(condition, [key, errors], LISTED):
        listed += [(str(k), str(e)) for k, e in zip(*batch.to_pydict().values(), strict=True)]
        if len(listed) >= LISTED:
            break
    listed = listed[:LISTED]
    if policy is OnPoison.LIST:
        target.add_fact("poison", {"rows": count, "listed": [list(row) for row in listed]})
        return
    told = "; ".join(f"{key}={row}: {error}" for row, error in listed[:3])
    raise PoisonRowsError(
        f"{operation.describe()} on table {target.name!r}: the function failed for {count} "
        f"row{'s' if count > 1 else ''} ({told}{'; …' if count > 3 else ''}). "
        "The others are filled.",
        "Correct the function or the rows and run again: only they are tried again. Or pass "
        "on_poison=op.OnPoison.LIST to leave them NULL.",
        rows=listed,
        count=count,
    )


_COVER_S = 3600.0
