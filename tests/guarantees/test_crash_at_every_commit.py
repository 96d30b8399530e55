"""Every operation dies at every commit, runs beside writers, and ends as if nothing had happened.

A run dies in this process: its port raises at one mutating call and at every later one, so that a
point costs a tenth of what a killed process does; `guarantees.test_killed_process` kills real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import lancedb
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from aiomigrate import Migration, MigrationFailedError, MigrationManager, OnDestructive, op
from aiomigrate.clock import Clock
from aiomigrate.errors import OverwriteLostError
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.store.connection import Store
from tests import scenario
from tests.faults import Died, DyingStore, dying_manager, watched_manager
from tests.operations.test_operations import CASES, ROWS, THINGS, Case, upper
from tests.processes import quiet_logger
from tests.tools import SEED, TABLE, found, make, rows_of

LEDGER = "table_migrations"
OPTIONS: dict[str, Any] = {
    "logger": quiet_logger(), "concurrency": 1, "on_destructive": OnDestructive.ALLOW,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Given:
    """A table that is there before."""

    schema: pa.Schema = THINGS
    rows: Sequence[Mapping[str, Any]] = field(default_factory=lambda: ROWS)
    indexes: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class Journey:
    """Tables, and migrations that change them.

    Attributes:
        name: What it shows.
        tables: What is there before.
        migrations: What is run.
        written: A table that others may append to meanwhile, if they may.
        at_once: How much may be done at once.
    """

    name: str
    tables: Mapping[str, Given]
    migrations: Sequence[Migration]
    written: str | None = None
    at_once: int = 1


def journey_of(case: Case) -> Journey:
    """Returns a case of the operations' own tests as a journey."""
    given = Given(schema=case.schema, rows=case.rows, indexes=case.indexes) if case.schema else None
    return Journey(
        name=case.name,
        tables={} if given is None else {TABLE: given},
        migrations=[Migration(table=TABLE, version=1, operations=case.operations)],
        written=None if case.fields is None else TABLE,
    )


def sized(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Keeps id and text, and puts the text's length in `n`."""
    sizes = pc.fill_null(pc.utf8_length(batch["text"]), 0)
    return pa.RecordBatch.from_arrays([batch["id"], batch["text"], sizes], ["id", "text", "n"])


INDEXES = [("id", "BTree"), ("n", "Bitmap"), ("text", "FTS")]
BOTH = (TABLE, "others")
MANY = [{"id": f"r{n}", "n": n, "text": f"text {n}", "tags": [str(n)]} for n in range(7)]

JOURNEYS = [
    *map(journey_of, CASES),
    Journey(
        name="rename a table",
        tables={TABLE: Given(indexes=INDEXES)},
        migrations=[
            Migration(table=TABLE, version=1, operations=[op.RenameTable("items")]),
        ],
    ),
    Journey(
        name="rename an empty table",
        tables={TABLE: Given(rows=(), indexes=INDEXES[:1])},
        migrations=[
            Migration(
                table=TABLE,
                version=1,
                operations=[op.AddColumns({"x": pa.int64()}), op.RenameTable("items")],
            ),
        ],
    ),
    Journey(
        name="rename a table, then change it under its new name",
        tables={TABLE: Given(indexes=INDEXES)},
        migrations=[
            Migration(table=TABLE, version=1, operations=[op.RenameTable("items")]),
            Migration(
                table="items",
                line=TABLE,
                version=2,
                operations=[op.Update(sql={"n": "n + 1"}), op.DropIndex("text")],
            ),
        ],
    ),
    Journey(
        name="copy into a table by a function",
        tables={
            TABLE: Given(indexes=INDEXES[:1]),
            "others": Given(rows=[*MANY, {**MANY[0], "id": "a"}]),
        },
        migrations=[
            Migration(
                table=TABLE,
                version=1,
                operations=[
                    op.CopyInto("others", key="id", where="n < 5", function=sized, batch_rows=2),
                    op.Update(sql={"n": "n * 2"}),
                ],
            )
        ],
        written=TABLE,
    ),
    Journey(
        name="split a table",
        tables={TABLE: Given(rows=MANY, indexes=INDEXES)},
        migrations=[
            Migration(
                table=TABLE,
                version=1,
                operations=[
                    op.CreateTable(THINGS, table="few"),
                    op.CreateTable(THINGS, table="many"),
                    op.CopyInto(TABLE, key="id", where="n < 2", table="few", batch_rows=1),
                    op.CopyInto(TABLE, key="id", where="n >= 2", table="many", batch_rows=3),
                    op.Delete("n IS NOT NULL"),
                ],
            )
        ],
        written="many",
    ),
    Journey(
        name="merge two tables",
        tables={TABLE: Given(), "others": Given(rows=MANY, indexes=INDEXES)},
        migrations=[
            Migration(
                line="merge",
                version=1,
                touches=("both", TABLE, "others"),
                operations=[
                    op.CreateTable(pa.schema([*THINGS, ("extra", pa.int64())]), table="both"),
                    op.CopyInto(TABLE, key="id", table="both"),
                    op.CopyInto("others", key="id", table="both", batch_rows=4),
                    op.CreateIndex("id", table="both"),
                    op.DropTable(table=TABLE),
                    op.DropTable(table="others"),
                ],
            )
        ],
        written="both",
    ),
    Journey(
        name="one migration right after the other",
        tables={TABLE: Given(rows=MANY, indexes=INDEXES[:1])},
        migrations=[
            Migration(table=TABLE, version=1, operations=[op.Update({"n": 1}, where="n < 3")]),
            Migration(
                table=TABLE,
                version=2,
                operations=[op.AddColumns({"x": pa.int64()}), op.Update({"x": 2})],
            ),
            Migration(table=TABLE, version=3, operations=[op.AddColumns({"n": pa.int64()})]),
            Migration(table=TABLE, version=4, operations=[op.Update(sql={"x": "x + n"})]),
        ],
        written=TABLE,
    ),
    Journey(
        name="change two tables at once",
        tables={TABLE: Given(indexes=INDEXES[:1]), "others": Given(rows=MANY)},
        migrations=[
            Migration(
                line="both",
                version=1,
                touches=BOTH,
                operations=[
                    one
                    for number, name in enumerate(BOTH, 1)
                    for one in (  # what is complete of the second cannot be begun again
                        op.RenameColumns({"text": "words"}, table=name),
                        op.AddColumns({"text": pa.int64()}, table=name),
                        op.Update(sql={"n": f"n + {number}"}, table=name),
                        op.CreateIndex("n", table=name),
                    )
                ],
            )
        ],
        at_once=4,
    ),
]


def names(journey: Journey) -> str:
    """Returns a test's id."""
    return journey.name


async def laid_out(journey: Journey, database: Path) -> None:
    """Makes the tables as an application would, and a ledger without anything in it.

    Founding a ledger under kills is in `guarantees.test_killed_process` and `ledger.test_ledger`.
    """
    for name, given in journey.tables.items():
        await make(database, given.schema, given.rows, given.indexes, table=name)
    store = await Store.connect(str(database))
    await Ledger(store, LEDGER, clock=Clock(), log=quiet_logger()).ensure()
    store.close()


async def migrated(
    database: Path,
    migrations: Sequence[Migration],
    kind: type[MigrationManager],
    *,
    at_once: int = 1,
) -> list[tuple[str, str]]:
    """Runs migrations with a manager of some kind; returns its mutating calls if it counts them."""
    options = {**OPTIONS, "concurrency": at_once}
    async with kind(database, migrations=migrations, **options) as manager:
        await manager.upgrade()
        assert (await manager.validate()).valid
        store = manager._database.store
        return store.calls if isinstance(store, DyingStore) else []


async def dies(
    database: Path,
    migrations: Sequence[Migration],
    kind: type[MigrationManager],
    *,
    at_once: int = 1,
) -> bool:
    """Runs migrations until the process dies, and its lease has expired; whether it did die."""
    options = {**OPTIONS, "concurrency": at_once}
    tasks = len(asyncio.all_tasks())
    with anyio.fail_after(60):
        manager = kind(database, migrations=migrations, **options)
        try:
            await manager.upgrade()
        except Died:
            died = True
        else:
            died = False
        await manager.aclose()
    assert len(asyncio.all_tasks()) == tasks
    connection = await lancedb.connect_async(database)
    head = await connection.open_table(LEDGER)
    await head.update({"owner": ""}, where="tableName = ':lease:run' AND owner != ''")
    connection.close()
    return died


async def end_of(database: Path) -> dict[str, Any]:
    """Returns all that must be the same whatever happened on the way."""
    end = await scenario.snapshot(database)
    store = await Store.connect(str(database))
    for name, told in end["tables"].items():
        assert told != "ghost", name
        state = await (await store.open(name)).state()
        told["metadata"] = {f.name: f.metadata for f in state.schema if f.metadata}
        told["table metadata"] = state.schema.metadata or {}
        told["indexes"] = sorted((i.name, str(i), sorted(i.options.items())) for i in state.indexes)
    store.close()
    return end


Point = tuple[int, str]
"""A mutating call, and whether before or after it took effect."""


class Crashes:
    """One journey, to be run again and again from the same tables."""

    def __init__(self, journey: Journey, folder: Path) -> None:
        self.journey = journey
        self.folder = folder
        self.calls: list[tuple[str, str]] = []
        self.expected: dict[str, Any] = {}
        self.number = 0

    async def prepare(self) -> None:
        """Makes the tables, and runs once undisturbed."""
        await laid_out(self.journey, self.folder / "before")
        path = self.copy()
        self.calls = await self.migrated(path, dying_manager())
        self.expected = await end_of(path)
        for table in self.expected["tables"].values():
            assert (table["witnesses"], table["branches"]) == ([], 0)

    async def migrated(self, path: Path, kind: type[MigrationManager]) -> list[tuple[str, str]]:
        """Runs the journey's migrations; as the function of that name."""
        return await migrated(path, self.journey.migrations, kind, at_once=self.journey.at_once)

    def copy(self) -> Path:
        """Returns a database as it was before."""
        self.number += 1
        path = self.folder / str(self.number)
        shutil.copytree(self.folder / "before", path)
        return path

    def points(self) -> list[Point]:
        """Returns every mutating call, before and after it."""
        return [(n, when) for n in range(1, len(self.calls) + 1) for when in ("before", "after")]

    async def wrong_after(self, *deaths: Point) -> str:
        """Dies at each of some points, one run after the other, then runs; tells what differs."""
        path = self.copy()
        try:
            for at, when in deaths:
                await dies(
                    path,
                    self.journey.migrations,
                    dying_manager(at, when),
                    at_once=self.journey.at_once,
                )
        except Exception as exc:  # noqa: BLE001 - at which points it fails is the finding
            return f"{self._spelled(deaths)}: {exc!r}"
        return await self.difference(path, self._spelled(deaths))

    async def difference(self, path: Path, how: str) -> str:
        """Runs to the end after deaths; returns what differs from an undisturbed run, as text."""
        try:
            with anyio.fail_after(60):
                await self.migrated(path, MigrationManager)
            end = await end_of(path)
        except Exception as exc:  # noqa: BLE001 - at which points it fails is the finding
            return f"{how}: {exc!r}"
        shutil.rmtree(path)
        wrong = [
            f"{key}: expected {self.expected[key]}, found {end[key]}"
            for key in self.expected
            if self.expected[key] != end[key]
        ]
        return f"{how}: {'; '.join(wrong)}" if wrong else ""

    def _spelled(self, deaths: Sequence[Point]) -> str:
        at, when = deaths[0]
        verb, table = self.calls[at - 1]
        later = "".join(f", then {w} call {n}" for n, w in deaths[1:])
        return f"died {when} call {at} ({verb} {table}){later}"


@pytest.mark.parametrize("journey", JOURNEYS, ids=names)
async def test_sampled_deaths_of_an_operation_end_as_undisturbed(
    journey: Journey, tmp_path: Path
) -> None:
    """Dead before or after a sampled commit, once or twice: the next run ends the same.

    Rows, schema, metadata, indexes, head and journal are those of a run that nothing disturbed; no
    column of ours and no branch is left.
    """
    crashes = Crashes(journey, tmp_path)
    await crashes.prepare()
    chance = random.Random(f"{SEED} {journey.name}")
    once = chance.sample(crashes.points(), 2)
    wrong = [await crashes.wrong_after(point) for point in once]
    wrong.append(await crashes.wrong_after(*chance.sample(crashes.points(), 2)))

    assert [text for text in wrong if text] == []


@pytest.mark.campaign
@pytest.mark.parametrize("journey", JOURNEYS, ids=names)
async def test_every_death_of_an_operation_ends_as_undisturbed(
    journey: Journey, tmp_path: Path
) -> None:
    """The whole of the above: every commit, and a second death somewhere in the recovery."""
    crashes = Crashes(journey, tmp_path)
    await crashes.prepare()
    chance = random.Random(f"{SEED} {journey.name}")
    wrong = []
    for point in crashes.points():
        wrong.append(await crashes.wrong_after(point))
        wrong.append(await crashes.wrong_after(point, chance.choice(crashes.points())))

    assert [text for text in wrong if text] == []


# ---- beside a writer ----------------------------------------------------------------------------


def value_of(kind: pa.DataType, number: int) -> Any:
    """Returns a value of a type by which the number is known again, `None` if it has no room."""
    made: Any = kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return f"w{number}"
    if pa.types.is_integer(kind) and made.bit_width >= 32:
        return number
    if pa.types.is_floating(kind) and made.bit_width >= 32:
        return float(number)
    if pa.types.is_fixed_size_list(kind):
        return [value_of(made.value_type, number)] * made.list_size
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [value_of(made.value_type, number)]
    if pa.types.is_struct(kind):
        fields = [made.field(position) for position in range(made.num_fields)]
        return {inner.name: value_of(inner.type, number) for inner in fields}
    return True if pa.types.is_boolean(kind) else None


def is_row(row: Mapping[str, Any], number: int) -> bool:
    """Returns whether a row is the one with that number, whatever became of its columns."""
    return re.search(rf"(?<!\d){number}(?!\d)", repr(row)) is not None


class Application:
    """Appends rows, each through a table opened anew, filling the columns that are there.

    Attributes:
        written: Numbers of the rows whose append succeeded.
    """

    def __init__(self, database: Path, table: str, pause_s: float = 0.001) -> None:
        self._pause_s = pause_s
        self.database = database
        self.table = table
        self.written: list[int] = []
        self._number = 1_000_000
        self._connection: lancedb.AsyncConnection | None = None
        self._over = False

    async def append(self) -> int:
        """Appends one row; returns its number."""
        self._number += 1000  # what an operation adds to a number makes no other row of it
        number = self._number
        if self._connection is None:
            self._connection = await lancedb.connect_async(self.database)
        table = await self._connection.open_table(self.table)
        known = pa.schema([f for f in await table.schema() if not f.name.startswith("_aiomigrate")])
        row = {f.name: value_of(f.type, number) for f in known}
        await table.add(pa.Table.from_pylist([row], schema=known))
        self.written.append(number)
        return number

    async def _run(self) -> None:
        # Not for ever: LanceDB's own retries may starve beside a writer on a busy machine.
        while not self._over and len(self.written) < _MOST_WRITTEN:
            # Refused while the schema changes, or there is no table yet: it may be there or not.
            with contextlib.suppress(ValueError, RuntimeError):
                await self.append()
            await anyio.sleep(self._pause_s)

    @contextlib.asynccontextmanager
    async def appending(self) -> AsyncIterator[None]:
        """Appends all the while."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._run)
            try:
                yield
            finally:
                self._over = True


_MOST_WRITTEN = 1000


async def with_a_writer(journey: Journey, folder: Path) -> str:
    """Runs a journey beside a writer; tells what is wrong in the end."""
    assert journey.written is not None
    crashes = Crashes(journey, folder)
    await crashes.prepare()
    database = crashes.copy()
    # LanceDB's merges starve where someone commits faster than one of them takes (measured).
    is_merging = any(
        isinstance(o, op.Backfill | op.Reembed)
        for migration in journey.migrations
        for o in migration.resolve({})
    )
    application = Application(database, journey.written, 0.3 if is_merging else 0.001)
    try:
        with anyio.fail_after(120):
            async with application.appending():
                await anyio.sleep(0.05)
                failed = ""
                try:
                    await migrated(database, journey.migrations, MigrationManager)
                except MigrationFailedError as exc:
                    failed = str(exc)
            lost = await _lost(database, application)
            if failed and not lost:
                await migrated(database, journey.migrations, MigrationManager)
                lost = await _lost(database, application)
    except Exception as exc:  # noqa: BLE001 - which journeys fail is the finding
        return f"{exc!r} after {failed!r}"
    if lost:
        return f"lost or doubled {lost} of {application.written} after {failed!r}"
    return await _differing(database, crashes.expected)


async def _lost(database: Path, application: Application) -> dict[int, int]:
    """Returns how often each row is there that is not there once."""
    rows = await rows_of(database, application.table)
    counts = {number: sum(is_row(r, number) for r in rows) for number in application.written}
    return {number: count for number, count in counts.items() if count != 1}


async def _differing(database: Path, expected: dict[str, Any]) -> str:
    """Tells what differs from an undisturbed run but for rows that were added."""
    end = await end_of(database)
    wrong = [f"{k}: {expected[k]}, not {end[k]}" for k in ("head", "held", "journal", "leases")
             if expected[k] != end[k]]  # fmt: skip
    if expected["tables"].keys() != end["tables"].keys():
        return f"tables {sorted(end['tables'])}"
    for name, told in end["tables"].items():
        want = expected["tables"][name]
        wrong += [
            f"{name}.{key}: {want[key]}, not {told[key]}"
            for key in told.keys() - {"rows"}
            if want[key] != told[key]
        ]
        if missing := Counter(want["rows"]) - Counter(told["rows"]):
            wrong.append(f"{name}: lost {missing}")
    return "; ".join(wrong)


# Not those that double rows, nor those whose condition takes the writer's rows too.
WRITTEN = [j for j in JOURNEYS if j.written and not re.search("multiply|delete", j.name)]


@pytest.mark.parametrize("journey", random.Random(SEED).sample(WRITTEN, 9), ids=names)
async def test_a_sampled_operation_beside_a_writer_loses_nothing(
    journey: Journey, tmp_path: Path
) -> None:
    """Each row appended meanwhile is there once, and the operation is as it is without a writer.

    It may fail, with everything kept; run again without the writer it succeeds.
    """
    assert await with_a_writer(journey, tmp_path) == ""


@pytest.mark.campaign
@pytest.mark.parametrize("journey", WRITTEN, ids=names)
async def test_every_operation_beside_a_writer_loses_nothing(
    journey: Journey, tmp_path: Path
) -> None:
    """The whole of the above, several times over."""
    wrong = [await with_a_writer(journey, tmp_path / str(turn)) for turn in range(5)]

    assert [text for text in wrong if text] == []


# ---- commits of others in the worst place -------------------------------------------------------


def one(*operations: op.Operation) -> list[Migration]:
    """Returns one migration of the table."""
    return [Migration(table=TABLE, version=1, operations=operations)]


class Intruder:
    """Appends a row right before or after some mutating calls on the table."""

    def __init__(self, database: Path, verb: str, times: int) -> None:
        self._database = database
        self._verb = verb
        self._left = times
        self.added: list[str] = []

    async def __call__(self, verb: str, table: str) -> None:
        """Called with each mutating call."""
        if (verb, table) != (self._verb, TABLE) or not self._left:
            return
        self._left -= 1
        self.added.append(f"intruder {self._left}")
        opened = await (await lancedb.connect_async(self._database)).open_table(TABLE)
        await opened.add([{"id": self.added[-1], "n": 5}])


async def ids(database: Path, table: str = TABLE) -> list[str]:
    """Returns the ids of all rows."""
    return sorted(row["id"] for row in await rows_of(database, table))


class Overtaken(DyingStore):
    """Has a row land after the last look of an overwrite, right before its commit; may die then."""

    intruder: Intruder
    dies = False
    is_rewriting = False

    async def call(self, verb: str, table: str, run: Any, *, mutates: bool = False) -> Any:
        if (verb, table) == ("overwrite", TABLE):
            self.is_rewriting = True
            if self.dies:
                self.at, self.when = len(self.calls) + 1, "after"
        result = await super().call(verb, table, run, mutates=mutates)
        if self.is_rewriting and (verb, table) == ("version", TABLE):
            self.is_rewriting = False
            await self.intruder("overwrite", TABLE)
        return result


def overtaken_manager(intruder: Intruder, *, dies: bool = False) -> type[MigrationManager]:
    """Returns a manager class whose overwrites are overtaken."""
    store = type("Store", (Overtaken,), {"intruder": intruder, "dies": dies})
    return type("Kind", (MigrationManager,), {"_store_type": store})


@pytest.mark.parametrize("moment", ["while it is read", "right before the commit"])
@pytest.mark.parametrize("times", [1, 2])
async def test_a_rebuild_that_would_discard_a_commit_is_done_again(
    database: Path, times: int, moment: str
) -> None:
    """A row that lands meanwhile is rebuilt with the others; an overwrite over it is undone."""
    await make(database, THINGS, ROWS, INDEXES[:1])
    intruder = Intruder(database, "overwrite", times)
    early = watched_manager(before=intruder)
    kind = early if moment == "while it is read" else overtaken_manager(intruder)
    async with kind(database, migrations=one(op.Rebuild(upper)), **OPTIONS) as manager:
        (step,) = (await manager.upgrade()).applied
        validation = await manager.validate()

    assert await ids(database) == sorted(["a", "b", "c", *intruder.added])
    assert len(intruder.added) == step.retries == times
    assert validation.valid


@pytest.mark.parametrize("moment", ["while it is read", "right before the commit"])
async def test_a_rebuild_that_always_comes_second_stops_with_everything_kept(
    database: Path, moment: str
) -> None:
    """After three losses it says so; nothing of the others is lost, and nothing is rebuilt."""
    await make(database, THINGS, ROWS)
    intruder = Intruder(database, "overwrite", 99)
    early = watched_manager(before=intruder)
    kind = early if moment == "while it is read" else overtaken_manager(intruder)
    async with kind(database, migrations=one(op.Rebuild(upper)), **OPTIONS) as manager:
        with pytest.raises(MigrationFailedError, match="during each of 3 attempts") as caught:
            await manager.upgrade()
    state, _ = await found(database)
    rows = {row["id"]: row["text"] for row in await rows_of(database)}

    assert issubclass(OverwriteLostError, Exception)
    assert "fewer processes write" in caught.value.report.failed[0].remedy
    assert state is not None
    assert state.witnesses() == []
    assert len(intruder.added) == 3
    assert {i: rows[i] for i in "abc"} == {row["id"]: row["text"] for row in ROWS}
    assert rows.keys() == {"a", "b", "c", *intruder.added}


async def test_what_a_dead_rebuild_discarded_is_brought_back(database: Path) -> None:
    """Killed after its commit and before it could look: the next run finds what it covered."""
    await make(database, THINGS, ROWS)
    kind = overtaken_manager(Intruder(database, "overwrite", 1), dies=True)
    migrations = one(op.Rebuild(upper), op.SetMetadata("n", {"unit": "cm"}))
    assert await dies(database, migrations, kind)
    covered = await ids(database)
    await migrated(database, migrations, MigrationManager)

    assert covered == ["a", "b", "c"]
    assert await ids(database) == ["a", "b", "c", "intruder 0"]


async def test_a_row_that_lands_while_a_table_is_copied_is_copied(database: Path) -> None:
    """A renamed table has what was committed until it was dropped."""
    await make(database, THINGS, ROWS, INDEXES)

    async def land(verb: str, table: str) -> None:
        if table == "items" and verb == "create":
            await intruder("create", TABLE)

    intruder = Intruder(database, "create", 1)
    kind = watched_manager(after=land)
    async with kind(database, migrations=one(op.RenameTable("items")), **OPTIONS) as manager:
        await manager.upgrade()
        validation = await manager.validate()

    assert await ids(database, "items") == ["a", "b", "c", "intruder 0"]
    assert (await found(database))[0] is None
    assert validation.valid


@pytest.mark.parametrize("strict", [False, True])
async def test_a_row_that_lands_between_fill_and_swap_keeps_its_value(
    database: Path, strict: bool
) -> None:
    """The column that takes the old one's place has every value, and is NOT NULL again."""
    schema = pa.schema(
        [pa.field("id", pa.string()), pa.field("n", pa.int64(), nullable=not strict)]
    )
    await make(database, schema, [{"id": "a", "n": 1}])
    intruder = Intruder(database, "alter_columns", 9)
    kind = watched_manager(before=intruder)
    migrations = one(op.AlterType({"n": pa.string()}))
    async with kind(database, migrations=migrations, **OPTIONS) as manager:
        await manager.upgrade()
    state, _ = await found(database)
    values = {row["id"]: row["n"] for row in await rows_of(database)}

    assert state is not None
    assert state.shape()["fields"]["n"] == ("string!" if strict else "string")
    assert intruder.added
    assert values.pop("a") == "1"
    assert set(values.values()) == {"5"}


async def test_an_update_beside_writers_goes_in_batches(database: Path) -> None:
    """Chosen for a large table that others commit to; each row is changed once."""
    await make(database, THINGS, [{"id": str(n), "n": n} for n in range(21_000)])
    table = await (await lancedb.connect_async(database)).open_table(TABLE)
    for number in range(3):
        await table.add([{"id": f"late {number}", "n": number}])
    update = op.Update(sql={"n": "n + 1"})
    commits = {}
    for name, operation in {
        "chosen": update,
        "forced off": dataclasses.replace(update, batch_rows=0),
        "forced": dataclasses.replace(update, batch_rows=4_000),
    }.items():
        path = database.parent / name
        shutil.copytree(database, path)
        async with MigrationManager(path, migrations=one(operation), **OPTIONS) as manager:
            (step,) = (await manager.upgrade()).applied
        commits[name] = step.commits
        found_rows = {row["id"]: row["n"] for row in await rows_of(path)}
        assert found_rows == {
            **{str(n): n + 1 for n in range(21_000)}, "late 0": 1, "late 1": 2, "late 2": 3,
        }  # fmt: skip

    assert commits == {"chosen": 3, "forced off": 2, "forced": 7}


async def test_an_index_covers_what_was_written_while_it_was_built(database: Path) -> None:
    """Rows that land during the build are covered before the migration ends."""
    await make(database, THINGS, ROWS)
    intruder = Intruder(database, "create_index", 1)
    kind = watched_manager(before=intruder)
    async with kind(database, migrations=one(op.CreateIndex("id")), **OPTIONS) as manager:
        await manager.upgrade()
    table = await (await lancedb.connect_async(database)).open_table(TABLE)
    (index,) = await table.list_indices()

    assert (index.num_indexed_rows, index.num_unindexed_rows) == (4, 0)


async def test_an_index_that_does_not_get_done_in_time_says_so(database: Path) -> None:
    """Coverage is waited for so long and no longer."""
    await make(database, THINGS, ROWS)

    class Slow(Store):
        async def call(self, verb: str, table: str, run: Any, *, mutates: bool = False) -> Any:
            if verb == "create_index":
                await Intruder(database, verb, 1)(verb, table)
            if verb == "optimize" and table == TABLE:
                await anyio.sleep(60)
            return await super().call(verb, table, run, mutates=mutates)

    kind = type("Kind", (MigrationManager,), {"_store_type": Slow})
    migrations = one(op.CreateIndex("id", timeout_s=0.2))
    async with kind(database, migrations=migrations, **OPTIONS) as manager:
        with pytest.raises(MigrationFailedError, match=r"did not cover its rows in 0\.2 s"):
            await manager.upgrade()
