"""`python -m tests.campaign`: random migrations, random faults, many processes, one oracle.

Each round has a seed of its own, told when something is wrong with the folder that is kept, and is
replayed by it. A round makes
a set of migrations, runs it once undisturbed, then starts several processes on a copy of the same
tables, each with a fault, beside a writer that appends; a last run without faults must end where
the undisturbed one ended, with every row that was appended there once.

`--plant` breaks the library in one way, to show that the campaign would find that: see `PLANTS`.
What is proved in one place, at every commit, is in the `test_*` modules.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import enum
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import lancedb
import pyarrow as pa

from aiomigrate import (
    Context,
    Migration,
    MigrationFailedError,
    MigrationManager,
    OnDestructive,
    op,
)
from aiomigrate.clock import Clock
from aiomigrate.errors import AiomigrateError, OperationError
from aiomigrate.operations.base import Operation
from aiomigrate.schema.state import TableState
from tests import scenario
from tests.faults import Fault, faulty_manager
from tests.processes import MP, quiet_logger, start

TTL_S = 0.6
ROWS = 30
FOREIGN = -1_000_000
"""The number of a row that a foreign writer appends: no condition of ours matches it."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("n", pa.int64()),
        pa.field("small", pa.int32()),
        pa.field("text", pa.string()),
        pa.field("vector", pa.list_(pa.float32(), 4)),
    ]
)
FIRST = pa.table(
    {
        "id": [f"r{n}" for n in range(ROWS)],
        "n": list(range(ROWS)),
        "small": pa.array(range(ROWS), pa.int32()),
        "text": [f"text {n}" for n in range(ROWS)],
        "vector": [[n, n % 7, 1, 0] for n in range(ROWS)],
    },
    SCHEMA,
)


# ---- migrations ---------------------------------------------------------------------------------


async def marked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A rebuild's function: leaves rows as they are."""
    await asyncio.sleep(0)
    return batch


async def tripled(batch: pa.RecordBatch) -> list[int]:
    """A backfill's function."""
    await asyncio.sleep(0.01)
    return [3 * n for n in batch["n"].to_pylist()]


async def embedded(texts: Sequence[str]) -> list[list[float]]:
    """A model: the same text has the same vector, near texts have near ones."""
    await asyncio.sleep(0.01)
    return [[float(len(text)), *map(float, text.encode()[-3:])] for text in texts]


async def seeded(ctx: Context) -> None:
    """A function that is no good when it is run twice: adds a row, slowly."""
    table = ctx.table()
    number = await table.count_rows("id LIKE 'seeded%'")
    await table.add([{"id": f"seeded {number}", "n": 1_000_000}])
    await asyncio.sleep(0.2)
    await table.update(sql={"n": "n + 1"}, where="n >= 0")


async def slow(ctx: Context) -> None:
    """A function that takes longer than a lease lives without being renewed."""
    table = ctx.table()
    await table.add([{"id": "slow", "n": 2_000_000}])
    await asyncio.sleep(2 * TTL_S)
    await table.delete("id = 'slow'")


WRONG = "wrong on purpose"


async def failing(ctx: Context) -> None:
    """A function that fails after two commits."""
    table = ctx.table()
    await table.add([{"id": "failing", "n": 3_000_000}])
    await table.update(sql={"n": "n + 5"}, where="n >= 0")
    raise ValueError(WRONG)


WAKES_S = 3 * TTL_S
"""How long `widening` waits before its commit: a paused holder can wake meanwhile."""


async def widening(ctx: Context) -> None:
    """A function that changes the schema, late, and fails."""
    await asyncio.sleep(WAKES_S)
    await ctx.apply(op.AddColumns({"wide": pa.int64()}))
    raise ValueError(WRONG)


async def failing_slowly(ctx: Context) -> None:
    """A function that fails after two commits, between which others have time for theirs."""
    table = ctx.table()
    await table.add([{"id": "failing", "n": 3_000_000}])
    await asyncio.sleep(0.5)
    await table.update(sql={"n": "n + 5"}, where="n >= 0")
    await asyncio.sleep(0.3)
    raise ValueError(WRONG)


FUNCTIONS = (seeded, seeded, slow, failing)

PACE = op.Pace(batch_rows=8, concurrency=2, chunk_rows=8)

Maker = Callable[[random.Random, int, list[str]], Operation]
"""Makes an operation from chance, a number of its own, and the columns there are."""

MAKERS: Sequence[Maker] = (
    *3 * (lambda chance, number, names: op.Backfill(
        _one_of(chance, names, "c"), tripled, key="id", source="n", pace=PACE
    ),),
    lambda chance, number, names: op.AddColumns({f"c{number}": pa.int64()}),
    lambda chance, number, names: op.AddColumns({f"s{number}": pa.list_(pa.int32())}),
    lambda chance, number, names: op.Update(sql={"n": "n + 1"}, where="n >= 0"),
    lambda chance, number, names: op.Update(sql={"n": "n * 2"}, where="n >= 0"),
    lambda chance, number, names: op.Update({"text": f"text {number}"}, where="n > 10"),
    lambda chance, number, names: op.DropColumns(chance.choice(names)),
    lambda chance, number, names: op.RenameColumns({chance.choice(names): f"d{number}"}),
    lambda chance, number, names: op.AlterType({"small": pa.int64()}),
    lambda chance, number, names: op.AlterType({"small": pa.string()}),
    lambda chance, number, names: op.Delete(f"n >= 0 AND n % 7 = {number % 7}"),
    lambda chance, number, names: op.CreateIndex("n"),
    lambda chance, number, names: op.CreateIndex("text"),
    lambda chance, number, names: op.SetNullable("id"),
    lambda chance, number, names: op.Rebuild(marked),
    lambda chance, number, names: op.Optimize(),
    lambda chance, number, names: op.AddColumns(
        {f"q{number}": pa.int64()}, sql={f"q{number}": "n + 3"}
    ),
    lambda chance, number, names: op.SetMetadata("n", {"unit": str(number)}),
    lambda chance, number, names: op.SetNotNull("n"),
    lambda chance, number, names: op.DropIndex("n"),
    lambda chance, number, names: op.Reembed(
        source="text", function=embedded, dimension=4, model=f"model@{number}", key="id",
        keep=f"old_{number}", index=False, gate=op.Gate(min_overlap=0), readers_name_column=True,
        pace=PACE,
    ),
    lambda chance, number, names: op.CreateTable(SCHEMA, table=f"extra_{number}"),
)  # fmt: skip

OF_EXTRAS: Sequence[Callable[[str, str, int], Operation]] = (
    lambda table, extra, number: op.CopyInto(
        table, key="id", where="n >= 0", table=extra, batch_rows=8
    ),
    lambda table, extra, number: op.RenameTable(to=f"renamed_{number}", table=extra),
    lambda table, extra, number: op.Update(sql={"n": "n + 1"}, table=extra),
)
"""Make operations on a table that an earlier migration has made."""


def _one_of(chance: random.Random, names: Sequence[str], prefix: str) -> str:
    return chance.choice([name for name in names if name.startswith(prefix)])


@dataclass(frozen=True)
class Set:
    """Migrations of one seed.

    Attributes:
        migrations: All of them.
        written: The table that a foreign writer appends to, empty for none.
        on_destructive: Whether tables may be dropped, and no savepoints are kept.
    """

    migrations: list[Migration]
    written: str
    on_destructive: OnDestructive = OnDestructive.KEEP


class Kind(enum.StrEnum):
    """Rounds: what chance makes, and such as it makes too seldom. Begins a round's own seed."""

    FREE = "free"
    PAUSED = "paused"  # see `paused_round`
    CHAINED = "chained"  # killed right before something of a long line is in the journal
    BESIDE = "beside"  # a function fails while others write
    LATE = "late"  # cancelled, and a commit takes effect later


def kind_of(seed: str) -> Kind:
    """Returns the kind of a round, by the number that its seed ends with: each within eight."""
    special = [Kind.PAUSED, Kind.CHAINED, Kind.BESIDE, Kind.LATE]
    number = seed.rpartition(".")[2]
    if not number.isdigit() or int(number) % 2 == 0:
        return Kind.FREE
    return special[int(number) // 2 % len(special)]


def made(seed: str) -> Set:
    """Returns the migrations of a round's own seed: some tables, with some migrations each."""
    table = "table_0"
    match seed.split(maxsplit=1)[0]:
        case Kind.PAUSED:
            return Set([Migration(table=table, version=1, up=widening)], "")
        case Kind.BESIDE:
            return Set([Migration(table=table, version=1, up=failing_slowly)], table)
        case Kind.CHAINED:
            steps = [op.AddColumns({f"c{version}": pa.int64()}) for version in range(5)]
        case Kind.LATE:
            steps = [op.Update(sql={"n": "n + 1"}), op.Update(sql={"n": "n * 2"})]
        case _:
            return _made_by_chance(seed)
    migrations = [
        Migration(table=table, version=version, operations=[step])
        for version, step in enumerate(steps, 1)
    ]
    return Set(migrations, "")


def _made_by_chance(seed: str) -> Set:
    chance = random.Random(seed)
    tables = [f"table_{n}" for n in range(chance.randint(1, 3))]
    written = chance.choice([tables[0], ""])
    allows = chance.random() < 0.3
    numbers = itertools.count()
    result: list[Migration] = []
    for table in tables:
        states: dict[str, TableState | None] = {table: TableState(SCHEMA)}
        for version in range(1, chance.randint(2, 5)):
            before = {t: v for t in tables if t < table and chance.random() < 0.3
                      for v in [max(m.version for m in result if m.table == t)]}  # fmt: skip
            if chance.random() < 0.25:
                up = chance.choice(FUNCTIONS)
                result.append(Migration(table=table, version=version, up=up, depends_on=before))
                continue
            operations: list[Operation] = []
            for _ in range(chance.randint(1, 3)):
                if (one := _fitting(chance, next(numbers), table, states)) is not None:
                    operations.append(one)
                    states = _after(one, table, states)
            extras = _extras(table, states)
            if allows and extras and chance.random() < 0.5:
                operations.append(op.DropTable(table=chance.choice(extras)))
                states = _after(operations[-1], table, states)
            result.append(
                Migration(table=table, version=version, operations=operations, depends_on=before)
            )
    return Set(result, written, OnDestructive.ALLOW if allows else OnDestructive.KEEP)


def _extras(table: str, states: dict[str, TableState | None]) -> list[str]:
    """Returns the tables that earlier migrations of a line have made."""
    return [name for name, known in states.items() if known is not None and name != table]


def _fitting(
    chance: random.Random, number: int, table: str, states: dict[str, TableState | None]
) -> Operation | None:
    """Returns an operation that can be applied; what others need stays there."""
    for _ in range(20):
        state = states[table]
        assert state is not None
        names = [f.name for f in state.fields() if f.name not in SCHEMA.names]
        extras = _extras(table, states)
        with contextlib.suppress(OperationError, IndexError):
            if extras and chance.random() < 0.3:
                one = chance.choice(OF_EXTRAS)(table, chance.choice(extras), number)
            else:
                one = chance.choice(MAKERS)(chance, number, names)
            _after(one, table, states)
            return one
    return None


def _after(
    operation: Operation, table: str, states: dict[str, TableState | None]
) -> dict[str, TableState | None]:
    for simple in operation.on(table).expand():
        states = simple.fold({**dict.fromkeys(simple.tables), **states})
    return states


# ---- faults -------------------------------------------------------------------------------------

JOURNAL = "table_migrations_history"
ACTIONS = (
    "kill", "kill", "stop", "stop", "cancel", "late", "reset", "slow", "disk", "readonly", "clock",
    "count",
)  # fmt: skip
"""What strikes a process (see `tests.faults`); `count` is no fault."""


def faults_of(seed: str) -> list[Fault]:
    """Returns what strikes each of some processes, by a round's own seed."""
    chance = random.Random(f"{seed} faults")
    match seed.split(maxsplit=1)[0]:
        case Kind.CHAINED:
            at = chance.randint(3, 6)
            return [Fault("kill", at=at, when="before", verb="add", table=JOURNAL)]
        case Kind.LATE:
            late = Fault("late", at=chance.randint(1, 2), when="before", verb="update",
                         table="table_0")  # fmt: skip
            return [late, Fault(), Fault()]
        case Kind.BESIDE:
            return [Fault()]
        case _:
            return [_fault(chance) for _ in range(chance.randint(2, 3))]


def _fault(chance: random.Random) -> Fault:
    when = chance.choice(["before", "after"])
    if chance.random() < 0.25:  # between what the journal tells and what head and tables hold
        at = chance.randint(2, 8)
        return Fault("kill", at=at, when=when, verb="add", table=JOURNAL)
    return Fault(
        action=chance.choice(ACTIONS),
        at=chance.randint(1, 60),
        when=when,
        mutations=chance.random() < 0.7,
    )


async def run_in_process(uri: str, seed: str, fault: Fault, plant: str) -> None:
    """Runs a seed's migrations with a fault; what it ends with does not matter."""
    PLANTS[plant]()
    planned = made(seed)
    manager_type = faulty_manager(fault)
    store_type: Any = manager_type._store_type
    with contextlib.suppress(AiomigrateError, MigrationFailedError):
        async with manager_type(
            uri,
            migrations=planned.migrations,
            on_destructive=planned.on_destructive,
            logger=quiet_logger(),
            lease_ttl=TTL_S,
            clock=Clock(wall=store_type.wall),
        ) as manager:
            with anyio.CancelScope() as scope:
                store_type.scope = scope
                await manager.initialize()
            if fault.action == "late":
                await anyio.sleep(1)  # an application goes on; what is under way may take effect


async def last_in_process(uri: str, seed: str, plant: str, ended: Any) -> None:
    """Runs a seed's migrations without a fault; tells the failure, empty for none."""
    PLANTS[plant]()
    try:
        await _run(Path(uri), made(seed))
    except (AiomigrateError, MigrationFailedError) as exc:
        ended.put(str(exc))
        return
    except BaseException as exc:  # whatever it is, the round waits for it
        ended.put(repr(exc))
        raise
    ended.put("")


async def write_in_process(uri: str, table: str, seed: str, over: Any, told: Any) -> None:
    """Does what an application does beside us, until it is over; tells what was acknowledged.

    Appends rows, and now and then adds a column of its own, optimizes, or cleans old versions.
    """
    chance = random.Random(f"{seed} writer")
    connection = await lancedb.connect_async(uri)
    rows: list[str] = []
    columns: list[str] = []
    for number in itertools.count():
        if over.is_set():
            break
        with contextlib.suppress(ValueError, RuntimeError):  # refused: it may be there or not
            handle = await connection.open_table(table)
            match chance.choice(["rows"] * 12 + ["column", "optimize", "cleanup"]):
                case "column":
                    field = pa.field(f"foreign_{number}", pa.int64())
                    await handle.add_columns(pa.schema([field]))
                    columns.append(field.name)
                case "optimize":
                    await handle.optimize()
                case "cleanup":
                    await handle.optimize(cleanup_older_than=dt.timedelta(hours=1))
                case _:
                    await handle.add([{"id": f"foreign {number}", "n": FOREIGN}])
                    rows.append(f"foreign {number}")
        await anyio.sleep(0.05)
    told.put((rows, columns))


Written = tuple[Sequence[str], Sequence[str]]
"""Rows and columns of the foreign writer that were acknowledged."""


# ---- a round ------------------------------------------------------------------------------------


async def one_round(seed: str, folder: Path, plant: str = "") -> str:
    """Runs one round; returns what is wrong, or nothing."""
    kind = kind_of(seed)
    seed = f"{kind} {seed}"
    if kind is Kind.PAUSED:
        return await paused_round(seed, folder, plant)
    planned = made(seed)
    tables = sorted({m.table for m in planned.migrations if m.table})
    before = folder / "before"
    connection = await lancedb.connect_async(before)
    for table in tables:
        await connection.create_table(table, FIRST)
    connection.close()
    for name in ("expected", "disturbed"):
        shutil.copytree(before, folder / name)
    with contextlib.suppress(MigrationFailedError):  # of its failing function, if it has one
        await _run(folder / "expected", planned)
    expected = await scenario.snapshot(folder / "expected")

    uri = folder / "disturbed"
    faults = faults_of(seed)
    failure, written = await _disturbed(uri, seed, faults, planned.written, plant)
    end = await scenario.snapshot(uri)
    if failure and WRONG not in failure:
        # A function that was interrupted while others committed is for a person to resolve.
        if not planned.written or "so it was not undone" not in failure:
            return f"the last run failed: {failure}"
        return _lost(end, planned.written, written)
    if any(fault.action == "clock" for fault in faults):  # the age of savepoints goes by it
        for told in (*expected["tables"].values(), *end["tables"].values()):
            told["branches"] = 0
    return _differing(expected, end, planned.written, written)


async def paused_round(seed: str, folder: Path, plant: str) -> str:
    """Pauses a holder right before a change of the schema, and wakes it at the worst time.

    Its successor has returned the table and runs the function again, whose change has not come.
    """
    uri = folder / "paused"
    connection = await lancedb.connect_async(uri)
    await connection.create_table("table_0", FIRST)
    connection.close()
    mark = folder / "stopped"
    fault = Fault("stop", at=1, when="before", verb="add_columns", signal_file=str(mark))
    holder = start(run_in_process, str(uri), seed, fault, plant)
    with anyio.move_on_after(30):
        while not mark.exists():  # noqa: ASYNC110 - it happens in another process
            await anyio.sleep(0.05)
    failures: list[str] = []

    async def succeed() -> None:
        failures.append(await _last(uri, seed, plant))

    async with anyio.create_task_group() as group:
        group.start_soon(succeed)
        with anyio.move_on_after(30):
            while not await _is_begun_again(uri):  # noqa: ASYNC110 - it happens in another process
                await anyio.sleep(0.05)
        await anyio.sleep(random.Random(seed).uniform(0, WAKES_S / 3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder.pid or 0, signal.SIGCONT)
    await _ended(holder)
    if WRONG not in failures[0] or "so it was not undone" in failures[0]:
        return f"a paused holder woke: {failures[0]}"
    end = await scenario.snapshot(uri)
    fields = set(end["tables"]["table_0"]["shape"]["fields"])
    return "" if fields == set(SCHEMA.names) else f"a paused holder woke: columns {sorted(fields)}"


async def _is_begun_again(uri: Path) -> bool:
    """Returns whether a migration was started under a later lease than the first."""
    async with MigrationManager(uri, migrations=[], logger=quiet_logger()) as manager:
        events = await manager.history()
    return any(event.kind == "started" and event.epoch > 1 for event in events)


async def _disturbed(
    uri: Path, seed: str, faults: Sequence[Fault], written_to: str, plant: str
) -> tuple[str, Written]:
    """Runs processes with faults beside a writer, and a last one without.

    Those that are stopped wake at any time, also while the last one runs.

    Returns:
        What the last one failed with, empty for nothing, and what the writer had acknowledged.
    """
    chance = random.Random(f"{seed} wake")
    written: Written = ([], [])
    over, told = MP.Event(), MP.Queue()
    writer = None
    if written_to:
        writer = start(write_in_process, str(uri), written_to, seed, over, told)
    processes = [start(run_in_process, str(uri), seed, fault, plant) for fault in faults]
    stopped = [p for p, f in zip(processes, faults, strict=True) if f.action == "stop"]
    async with anyio.create_task_group() as group:
        for process in stopped:
            group.start_soon(_wake, process, chance.uniform(0.5, 5) + TTL_S)
        await anyio.sleep(chance.uniform(0.5, 2))
        for process in processes:
            if process not in stopped:
                await _ended(process)
        if writer is not None:
            over.set()
            written = await anyio.to_thread.run_sync(told.get)
            await anyio.to_thread.run_sync(writer.join)
        _allow_writing(uri)
        failure = await _last(uri, seed, plant)
    for process in stopped:
        await _ended(process)
    if stopped:  # one that woke late may have had the lease once more
        failure = await _last(uri, seed, plant)
    return failure, written


async def _wake(process: Any, after_s: float) -> None:
    await anyio.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid or 0, signal.SIGCONT)


async def _ended(process: Any) -> None:
    await anyio.to_thread.run_sync(process.join, 60)
    if process.is_alive():
        process.kill()
        await anyio.to_thread.run_sync(process.join)


def _allow_writing(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)


async def _last(uri: Path, seed: str, plant: str) -> str:
    ended = MP.Queue()
    last = start(last_in_process, str(uri), seed, plant, ended)
    failure: str = await anyio.to_thread.run_sync(ended.get)
    await anyio.to_thread.run_sync(last.join)
    return failure


async def _run(uri: Path, planned: Set) -> None:
    with anyio.fail_after(120):
        async with MigrationManager(
            uri,
            migrations=planned.migrations,
            on_destructive=planned.on_destructive,
            logger=quiet_logger(),
            lease_ttl=TTL_S,
        ) as manager:
            await manager.initialize()


def _differing(
    expected: dict[str, Any], end: dict[str, Any], written_to: str, written: Written
) -> str:
    """Tells how an end differs from what is expected, but for what others wrote."""
    if written_to:
        if lost := _lost(end, written_to, written):
            return lost
        table = end["tables"][written_to]
        rows = [json.loads(row) for row in table["rows"]]
        table["rows"] = sorted(
            json.dumps({k: v for k, v in row.items() if not k.startswith("foreign_")},
                       sort_keys=True)
            for row in rows if not row["id"].startswith("foreign ")
        )  # fmt: skip
        fields = table["shape"]["fields"]
        table["shape"]["fields"] = {k: v for k, v in fields.items() if not k.startswith("foreign_")}
    for key in ("head", "held", "journal", "leases"):
        if expected[key] != end[key]:
            return f"{key}: {end[key]}, not {expected[key]}"
    for table, told in expected["tables"].items():
        for what, value in told.items():
            if end["tables"].get(table, {}).get(what) != value:
                return f"{what} of {table}: {end['tables'].get(table, {}).get(what)}, not {value}"
    return ""


def _lost(end: dict[str, Any], written_to: str, written: Written) -> str:
    """Tells which rows and columns of the foreign writer are not there once."""
    table = end["tables"][written_to]
    rows = [json.loads(row) for row in table["rows"]]
    found = [row["id"] for row in rows if row["id"].startswith("foreign ")]
    if missing := set(written[0]) - set(found):
        return f"rows of others are gone: {sorted(missing)[:5]}"
    if missing := set(written[1]) - table["shape"]["fields"].keys():
        return f"columns of others are gone: {sorted(missing)}"
    return "rows of others are there twice" * (len(set(found)) != len(found))


# ---- plants -------------------------------------------------------------------------------------


def _no_plant() -> None:
    pass


def _no_epoch() -> None:
    """A holder that was succeeded goes on writing."""
    from aiomigrate.ledger.ledger import Ledger
    from aiomigrate.ledger.writer import Writer

    async def check(self: Any) -> None:
        pass

    async def write_rows(self: Any, rows: Any, epoch: int, owner: str) -> bool:
        await self.own_rows(rows)
        return True

    Writer.check = check  # type: ignore[method-assign]
    Ledger.write_rows = write_rows  # type: ignore[method-assign]


def _head_first() -> None:
    """The head is written before what it tells of is in the journal."""
    from aiomigrate.ledger.writer import Writer

    append = Writer._append

    async def head_first(self: Any, batch: Any) -> None:
        for request in batch:
            if request.head_row is not None:
                self._dirty[request.head_row.name] = request.head_row
                await self._write_head(closing=False)
        await append(self, batch)

    Writer._append = head_first  # type: ignore[method-assign]


def _restore_blindly() -> None:
    """What others committed is not looked for before going back."""
    from aiomigrate.execution.recovery import Recovery

    async def owned_head(self: Any, script: Any, unfinished: Any, table: str, to: int) -> Any:
        found = await self._store.find(table)
        return None if found is None else await found.version()

    Recovery._owned_head = owned_head  # type: ignore[method-assign]


def _no_fence() -> None:
    """What a dead holder has in flight may still take effect."""
    from aiomigrate.execution.applier import Applier

    async def fence(self: Any, tables: Any, announce: Any = None) -> None:
        pass

    Applier.fence = fence  # type: ignore[method-assign]


def _release_early() -> None:
    """A run that is cancelled gives its lease back while a commit of its own is under way."""
    from aiomigrate.store.connection import Store

    running: set[Any] = set()

    async def settle(self: Any, table: str, run: Any) -> Any:
        task = asyncio.ensure_future(run())
        running.add(task)
        return await asyncio.shield(task)

    Store.settle = settle  # type: ignore[method-assign]


def _no_start() -> None:
    """Nothing tells that a migration was begun."""
    from aiomigrate.execution.executor import Executor

    async def start_nothing(self: Any, work: Any) -> None:
        pass

    Executor._start = start_nothing  # type: ignore[method-assign]


PLANTS: dict[str, Callable[[], None]] = {
    "": _no_plant,
    "no-epoch": _no_epoch,
    "head-first": _head_first,
    "restore-blindly": _restore_blindly,
    "no-start": _no_start,
    "no-fence": _no_fence,
    "release-early": _release_early,
}
"""Ways to break the library, for processes with faults."""


# ---- the command --------------------------------------------------------------------------------


async def campaign(seed: str, minutes: float, plant: str, rounds: int | None = None) -> list[str]:
    """Runs rounds until the time is over, or one is wrong with a plant; returns what was wrong."""
    ends = time.monotonic() + 60 * minutes
    wrong: list[str] = []
    for number in itertools.count():
        if time.monotonic() > ends or number == rounds:
            return wrong
        own = seed if rounds == 1 else f"{seed}.{number}"
        folder = Path(tempfile.mkdtemp(prefix="aiomigrate-campaign-"))
        os.chmod(folder, 0o755)  # noqa: PTH101, S103 - what becomes read-only can be read
        found = "it was broken off"
        try:
            found = await one_round(own, folder, plant)
        finally:
            if plant or not found:
                shutil.rmtree(folder, ignore_errors=True)
        if found:
            wrong.append(f"{own}: {found}")
            kept = "" if plant else f"\n  kept: {folder}"
            print(f"WRONG {wrong[-1]}\n  again: python -m tests.campaign --replay {own}{kept}",
                  flush=True)  # fmt: skip
            if plant:
                return wrong
        else:
            print(f"{own}: as without faults", flush=True)
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the campaign; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="how long; default 30")
    parser.add_argument("--seed", default=str(random.randrange(10**6)), help="of all rounds")
    parser.add_argument("--replay", metavar="SEED", help="one round, by the seed it told")
    parser.add_argument("--plant", choices=sorted(PLANTS), default="", help="break the library")
    options = parser.parse_args(arguments)
    os.environ.setdefault("RUST_LOG", "error")
    seed, rounds = (options.replay, 1) if options.replay else (options.seed, None)
    print(f"seed {seed}", flush=True)
    return 1 if asyncio.run(campaign(seed, options.minutes, options.plant, rounds)) else 0


if __name__ == "__main__":
    sys.exit(main())
