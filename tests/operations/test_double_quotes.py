"""Double quotes in users' SQL: a text in LanceDB's expressions, a column in its conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, op
from aiomigrate.errors import MigrationFailedError, OperationError
from aiomigrate.execution import context
from aiomigrate.operations.base import Operation
from aiomigrate.schema.sql import double_quotes
from tests.faults import Died, dying_manager
from tests.tools import TABLE, make, manager, rows_of, tree

TEXT = pa.string()
INNER = pa.struct([pa.field("In", TEXT)])
SCHEMA = pa.schema([("docId", TEXT), ("kind", TEXT), ("s", INNER)])
ROWS = [
    {"docId": "a", "kind": "a", "s": {"In": "p"}},
    {"docId": "b", "kind": 'say "docId"', "s": {"In": "q"}},
    {"docId": "c", "kind": None, "s": None},
]
BOTH_WAYS = r'LanceDB reads "docId" as a text.*Write `docId` for a column, or \'docId\' for a text'


def slug(expression: str) -> op.AddColumns:
    """Adds a column that is filled by SQL."""
    return op.AddColumns({"slug": TEXT}, sql={"slug": expression})


def on(*operations: op.Operation, version: int = 1, **how: Any) -> Migration:
    """Returns a migration of the table."""
    return Migration(table=TABLE, version=version, operations=operations, **how)


def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes migrations run as by a release that did not know of double quotes."""
    monkeypatch.setattr(Operation, "check_expressions", lambda _: None)
    monkeypatch.setattr(context, "double_quotes", lambda _: None)


REFUSED = {
    "alone": '"docId"',
    "in a function": 'upper("docId")',
    "in a cast": 'CAST("docId" AS STRING)',
    "compared": "\"docId\" = 'a'",
    "after a text": "'it''s' || \"docId\"",
    "after a text that ends with a backslash": "'\\' || \"docId\"",
    "after a text of two quotes": "'' || \"docId\"",
    "after a column": '`kind` || "docId"',
    "after a comment": '-- it\'s `\n"docId"',
    "after a comment in a line": '/* it\'s ` */ "docId"',
    "after a comment that does not nest": '/* /* */ "docId"',
    "after double quotes in a text": '\'"\' || "docId"',
}


@pytest.mark.parametrize("expression", REFUSED.values(), ids=REFUSED.keys())
async def test_lancedb_reads_what_is_refused_as_a_text(expression: str, database: Path) -> None:
    """What is refused is accepted by LanceDB, which stores the same for every row."""
    assert double_quotes({"kind": expression}) is not None
    await make(database, SCHEMA, [{**row, "kind": "k"} for row in ROWS])
    table = await (await lancedb.connect_async(database)).open_table(TABLE)

    await table.update(updates_sql={"kind": expression})

    assert len(set((await table.to_arrow())["kind"].to_pylist())) == 1


ALLOWED: dict[str, tuple[str, list[str | None]]] = {
    "a column": ("`docId`", ["a", "b", "c"]),
    "a text": ("'docId'", ["docId"] * 3),
    "quotes in a text": ("'\"docId\"'", ['"docId"'] * 3),
    "quotes after a quote in a text": ("'it''s \"docId\"'", ['it\'s "docId"'] * 3),
    "quotes after a backslash": ("'\\\"' || docId", ['\\"a', '\\"b', '\\"c']),
    "a comment": ('docId -- not "kind"', ["a", "b", "c"]),
    "a comment in a line": ('docId /* it\'s not\n"kind" */', ["a", "b", "c"]),
    "a comment with the end of none": ('docId /*/ "kind" */', ["a", "b", "c"]),
    "a field": ("s['In']", ["p", "q", None]),
    "a column with quotes": ('`a "b"`', ["x", "x", "x"]),
}


async def test_quotes_in_texts_names_and_comments_are_no_double_quotes(database: Path) -> None:
    """Such expressions are planned and store what LanceDB's rules say."""
    schema = SCHEMA.append(pa.field('a "b"', TEXT))
    await make(database, schema, [{**row, 'a "b"': "x"} for row in ROWS])
    names = [f"n{number}" for number in range(len(ALLOWED))]
    sql = {name: given for name, (given, _) in zip(names, ALLOWED.values(), strict=True)}

    async with manager(database, [on(op.AddColumns(dict.fromkeys(names, TEXT), sql=sql))]) as run:
        await run.plan()
        await run.upgrade()

    rows = sorted(await rows_of(database), key=lambda row: str(row["docId"]))
    stored = {case: [row[name] for row in rows] for case, name in zip(ALLOWED, names, strict=True)}
    assert stored == {case: expected for case, (_, expected) in ALLOWED.items()}


async def test_literals_may_contain_double_quotes(database: Path) -> None:
    """`values=` and `fill=` are texts as they are, in operations and in functions."""
    await make(database, SCHEMA, ROWS)

    async def up(ctx: Context) -> None:
        await ctx.table().update({"docId": '"z"'}, where="`docId` = 'a'")

    steps = [
        on(
            op.AddColumns({"slug": TEXT}, values={"slug": '"docId"'}),
            op.SetNotNull("kind", fill={"kind": '"docId"'}),
        ),
        Migration(table=TABLE, version=2, up=up),
    ]
    async with manager(database, steps) as run:
        await run.upgrade()

    rows = {row["docId"]: row for row in await rows_of(database)}
    assert {row["slug"] for row in rows.values()} == {'"docId"'}
    assert rows["c"]["kind"] == '"docId"'
    assert set(rows) == {'"z"', "b", "c"}


async def nothing(_: Context) -> None:
    """Changes nothing; operations after it cannot be predicted."""


STEPS: dict[str, Callable[[], Sequence[Migration]]] = {
    "add": lambda: [on(slug('"docId"'))],
    "update": lambda: [on(op.Update(sql={"kind": 'concat(kind, "docId")'}))],
    "after a function": lambda: [on(op.Run(nothing), slug('"docId"'))],
    "after a function of another migration": lambda: [
        Migration(table=TABLE, version=1, up=nothing), on(slug('"docId"'), version=2)
    ],
    "in the background": lambda: [on(slug('"docId"'), background=True)],
    "on a table that is new": lambda: [
        Migration(table="new", version=1, operations=[op.CreateTable(SCHEMA)]),
        Migration(table="new", version=2, operations=[slug('"docId"')]),
    ],
    "on a table that may be missing": lambda: [
        on(op.Update(sql={"kind": '"docId"'}, table="gone", when_missing=op.Missing.SKIP))
    ],
    "of a function of parameters": lambda: [
        Migration(table=TABLE, version=1, operations=lambda _: [slug('"docId"')])
    ],
}  # fmt: skip


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
async def test_a_double_quoted_name_in_an_expression_is_refused_in_the_plan(
    steps: Callable[[], Sequence[Migration]], database: Path
) -> None:
    """The error names the migration and both ways to write it, and no byte changed."""
    await make(database, SCHEMA, ROWS)
    before = tree(database)
    wrong = steps()

    async with manager(database, wrong) as run:
        for start in (run.plan, run.upgrade):
            with pytest.raises(OperationError, match=BOTH_WAYS) as caught:
                await start()
            assert (caught.value.line, caught.value.version) == (wrong[-1].table, len(wrong))

    assert before == tree(database)


async def by_table(ctx: Context) -> None:
    """Updates by the table's own method."""
    await ctx.table().update(sql={"kind": '"docId"'})


async def by_update(ctx: Context) -> None:
    """Updates by an operation."""
    await ctx.apply(op.Update(sql={"kind": '"docId"'}))


async def by_column(ctx: Context) -> None:
    """Adds a column that is filled."""
    await ctx.apply(slug('"docId"'))


@pytest.mark.parametrize("up", [by_table, by_update, by_column])
async def test_functions_are_refused_it_before_anything_is_written(
    up: Callable[[Context], Any], database: Path
) -> None:
    """The call raises the same error as a plan; the migration fails and the table is as before."""
    await make(database, SCHEMA, ROWS)
    before = await rows_of(database)
    seen: list[OperationError] = []

    async def watched(ctx: Context) -> None:
        try:
            await up(ctx)
        except OperationError as exc:
            seen.append(exc)
            raise

    async with manager(database, [Migration(table=TABLE, version=1, up=watched)]) as run:
        with pytest.raises(MigrationFailedError, match=BOTH_WAYS):
            await run.upgrade()

    assert [exc.remedy for exc in seen] == ["Write `docId` for a column, or 'docId' for a text."]
    assert await rows_of(database) == before


async def test_an_applied_migration_with_double_quotes_stays_applied(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads, validates, plans, is followed by others and rolls back; only pending ones fail."""
    await make(database, SCHEMA, ROWS)

    async def up(ctx: Context) -> None:
        await ctx.table().update(sql={"kind": '"docId"'})

    applied = [on(slug('"docId"')), Migration(table=TABLE, version=2, up=up)]
    with monkeypatch.context() as earlier:
        unchecked(earlier)
        async with manager(database, applied) as run:
            await run.upgrade()
    assert {row["slug"] for row in await rows_of(database)} == {"docId"}

    more = [*applied, on(op.Update(sql={"slug": "`docId`"}), version=3)]
    async with manager(database, more) as run:
        assert [step.script.version for step in (await run.plan()).steps] == [3]
        await run.upgrade()
        assert (await run.validate()).errors == ()
        assert sorted(row["slug"] for row in await rows_of(database)) == ["a", "b", "c"]
        await run.rollback({TABLE: 0})
    assert await rows_of(database) == sorted(
        ROWS, key=lambda row: sorted((name, repr(value)) for name, value in row.items())
    )


@pytest.mark.parametrize("at", [4, 5, 6, 7])
async def test_an_interrupted_one_is_refused_until_it_is_corrected(
    at: int, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a release without the check left half done is not finished; corrected, it is right."""
    await make(database, SCHEMA, ROWS)
    with monkeypatch.context() as earlier:
        unchecked(earlier)
        dying = dying_manager(at, "after")(
            database, migrations=[on(slug('"docId"'))], lease_ttl=0.5
        )
        with pytest.raises(Died):
            async with dying:
                await dying.upgrade()

    async with manager(database, [on(slug('"docId"'))], lease_ttl=0.5) as run:
        for start in (run.plan, run.upgrade):
            with pytest.raises(OperationError, match=BOTH_WAYS):
                await start()
    async with manager(database, [on(slug("`docId`"))], lease_ttl=0.5) as run:
        await run.upgrade()

    assert {row["docId"]: row["slug"] for row in await rows_of(database)} == {
        "a": "a", "b": "b", "c": "c"
    }  # fmt: skip
