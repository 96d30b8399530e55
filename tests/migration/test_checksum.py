"""Checksums: what counts as an edit, the same on every supported Python."""

from __future__ import annotations

import datetime as dt
import enum
import functools
import importlib.util
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aiomigrate import Context, Migration, op
from aiomigrate.errors import InvalidMigrationError
from aiomigrate.migration.checksum import ALGORITHM, canonical, chain_digest, checksum

ROOT = Path(__file__).parents[2]

GOLDEN_SOURCE = '''
"""Uses what has changed between Python releases: f-strings, docstrings, decorators, match."""
import pyarrow as pa
from aiomigrate import Migration, op

def decorated(function):
    return function

@decorated
async def fill(context, *more, limit: int = 3, **rest) -> None:
    """Fills,
        in steps."""
    table = context.table("memos")
    x, y = 1.5, None
    text = f"{x!r:>{limit}} {y=} a" "b" u"c" rf"\\d{x:%Y}"
    match x:
        case 1 | 2 if y is None:
            pass
        case {"a": [*_, 3], **others}:
            del others
        case None | True | "" | b"z" | -1j:
            ...
    async with table as t, table:
        rows = [r async for r in t if (n := r["n"]) and not 0x1F < n <= 10_000]
    try:
        await table.update({"a": lambda q, /, *, w=2: (yield)}, where=f"id = '{x}'")
    except* ValueError as exc:
        raise RuntimeError from exc
    class Inner(dict, metaclass=type):
        slot: "int"
    return [*rows, *()], {**rest}, {1, 2}, rows[1:-1, ...]

async def undo(context): await context.table().delete("true")

def operations(params):
    return [op.AddColumns({"v": pa.list_(pa.float32(), params["dimension"])})]

memos = Migration(table="memos", version=1, up=fill, down=undo, touches=("memos", "a"))
users = Migration(table="users", version=1, operations=operations, depends_on={"memos": 1})
tags = Migration(table="tags", version=1, operations=lambda params: [op.DropColumns("a")])
plain = Migration(table="plain", version=1, operations=[
    op.CreateTable(pa.schema([pa.field("id", pa.string(), nullable=False),
                              pa.field("at", pa.timestamp("ms", "UTC")),
                              pa.field("v", pa.list_(pa.float32(), 4))])),
    op.AddColumns({"n": pa.int64(), "tags": pa.list_(pa.string())}),
    op.Update({"n": 1, "s": "it's \u6587"}, sql={"f": "f * 1.5"}, where="n IS NULL"),
    op.RenameColumns({"a": "b", "b": "a"}),
    op.SetNullable("a"), op.SetNotNull("a", when_missing=op.Missing.SKIP),
    op.CreateIndex("id", kind="IvfPq", options={"num_partitions": 2, "x": 0.1}),
    op.DropIndex("id", table="other"), op.DropColumns("a", "b"),
])
'''
"""Never edit: databases hold checksums made of such sources."""

GOLDEN = {
    "memos": "6b4f8759bcf3cbda905588af4eec8528c076ac71a5a1bbbf640b24fdbf77599b",
    "plain": "1b2dc7222455467ca3e83f8025fb2155dcb3710fb793ae03860c86fc822a61fe",
    "tags": "0f67a178adf0e45ea42ed0be04ba2beafab39ea43efd4e93f96ee4db21ad3f2c",
    "users": "32118dda2851b9fe2b7682c00160e188b571ad166ac5823e4200263ec195c361",
}
GOLDEN_TREE = "513c511774f55289a0bb4941ec32b89a15ba746c38d627828ba21b74a28411ae"

PRINT_GOLDEN = """
import sys
from aiomigrate.migration import loader
for script in loader.load(sys.argv[1], {"dimension": 3}).all:
    print(script.line, script.checksum)
"""


def load(tmp_path: Path, source: str, name: str = "001_a.py") -> Any:
    """Imports a source text as a module from a file of its own."""
    path = tmp_path / name
    path.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_function(tmp_path: Path, source: str, number: list[int]) -> str:
    """Returns the checksum of a migration whose `up` a source text defines."""
    number[0] += 1  # another file each time: sources are cached by file
    module = load(tmp_path, source, f"{number[0]}_a.py")
    return checksum(Migration(table="memos", version=1, up=module.up))


def of(*operations: op.Operation, **values: Any) -> str:
    """Returns the checksum of a migration with some operations."""
    return checksum(
        Migration(**{"table": "memos", "version": 1, "operations": operations, **values})
    )


def test_checksums_are_pinned(tmp_path: Path) -> None:
    """They are recorded in databases: another release must compute the same."""
    module = load(tmp_path, GOLDEN_SOURCE)

    found = {name: checksum(getattr(module, name)) for name in GOLDEN}

    assert found == GOLDEN
    assert ALGORITHM == "aiomigrate-1"


def _other_pythons() -> list[str]:
    names = ("python3.11", "python3.12", "python3.13", "python3.14")
    return [n for n in names if n != f"python3.{sys.version_info.minor}"]


def succeeds(*command: str) -> bool:
    """Returns whether a command exits with 0."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", _other_pythons())
def test_another_python_computes_the_same_checksums(name: str, tmp_path: Path) -> None:
    """The pinned values hold on every minor version at hand that has pyarrow."""
    (tmp_path / "001_a.py").write_text(GOLDEN_SOURCE)
    python = shutil.which(name)
    if python is None or not succeeds(python, "-c", "import pyarrow"):
        pytest.skip(f"no {name} with pyarrow here")

    run = subprocess.run(
        [python, "-c", PRINT_GOLDEN, str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip

    assert dict(line.split() for line in run.stdout.splitlines()) == GOLDEN


PRINT_TREES = """
import ast, hashlib, json, sys, types
class Anything(types.ModuleType):
    def __getattr__(self, name):
        return type(name, (), {})
sys.modules["pyarrow"] = Anything("pyarrow")
sys.modules["pyarrow.compute"] = Anything("pyarrow.compute")
from aiomigrate.migration.checksum import _dump
tree = ast.parse(open(sys.argv[1], encoding="utf-8").read())
print(hashlib.sha256(json.dumps(_dump(tree), sort_keys=True).encode()).hexdigest())
"""


@pytest.mark.parametrize("name", [sys.executable, *_other_pythons()])
def test_another_python_parses_to_the_same_canonical_form(name: str, tmp_path: Path) -> None:
    """The form of parsed source, which needs no pyarrow, is equal on every Python at hand."""
    path = tmp_path / "source.py"
    path.write_text(GOLDEN_SOURCE, encoding="utf-8")
    python = shutil.which(name)
    if python is None or not succeeds(python, "--version"):
        pytest.skip(f"no {name} here")

    run = subprocess.run(
        [python, "-c", PRINT_TREES, str(path)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip

    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == GOLDEN_TREE


BASE = """
async def up(context):
    rows = await context.table("memos").read("n = 3")
    await context.table("memos").add([{"n": len(rows) + 1, "s": "a"}])
"""

SAME = {
    "a comment": BASE.replace("rows =", "# a comment\n    rows ="),
    "a docstring": BASE.replace("    rows", '    """Does it."""\n    rows', 1),
    "formatting": """
        async   def up( context ) :

            rows = (
                await context
                    .table('memos').read("n "
                                         "= 3")
            )
            await context.table("memos").add([
                {"n": (len(rows)+0x1), 's': u"a",},
            ])
    """,
    "other functions": "def helper():\n    return 1\n" + BASE,
    "its place in the file": "\n" * 50 + BASE + "\nx = 1\n",
}

CHANGED = {
    "SQL": BASE.replace("n = 3", "n = 4"),
    "a constant": BASE.replace("+ 1", "+ 2"),
    "the type of a constant": BASE.replace("+ 1", "+ 1.0"),
    "a constant as text": BASE.replace("+ 1", "+ 'int 1'"),
    "a name": BASE.replace("rows", "found"),
    "an operator": BASE.replace("+ 1", "- 1"),
    "an order": BASE.replace('"n": len(rows) + 1, "s": "a"', '"s": "a", "n": len(rows) + 1'),
    "a default": BASE.replace("(context)", "(context, limit=3)"),
    "a decorator": "def d(f):\n    return f\n\n@d" + BASE.replace("\nasync", "\nasync", 1),
    "text that is no docstring": BASE + '    "done"\n',
}


@pytest.mark.parametrize("source", SAME.values(), ids=SAME.keys())
def test_what_does_not_change_what_a_function_does_does_not_count(
    source: str, tmp_path: Path
) -> None:
    """Formatting, comments and docstrings may be edited after a migration was applied."""
    number = [0]

    assert of_function(tmp_path, BASE, number) == of_function(tmp_path, source, number)


@pytest.mark.parametrize("source", CHANGED.values(), ids=CHANGED.keys())
def test_what_changes_what_a_function_does_counts(source: str, tmp_path: Path) -> None:
    """An edit of a function that was applied is an edit of history."""
    number = [0]

    assert of_function(tmp_path, BASE, number) != of_function(tmp_path, source, number)


def test_a_decorated_function_counts_by_its_own_source(tmp_path: Path) -> None:
    """With a wrapping decorator it is not the wrapper that is compared."""
    wrapped = """
    import functools
    def retry(function):
        @functools.wraps(function)
        async def wrapper(context):
            return await function(context)
        return wrapper

    @retry
    async def up(context):
        await context.table().delete("n = {}")
    """
    number = [0]

    assert of_function(tmp_path, wrapped.format(1), number) != of_function(
        tmp_path, wrapped.format(2), number
    )


SCHEMA = pa.schema([pa.field("a", pa.int64()), pa.field("b", pa.string(), nullable=False)])

EDITS: dict[str, tuple[Callable[[], str], Callable[[], str]]] = {
    "a type": (
        lambda: of(op.AddColumns({"a": pa.int64()})), lambda: of(op.AddColumns({"a": pa.int32()})),
    ),
    "a dimension": (
        lambda: of(op.AddColumns({"a": pa.list_(pa.float32(), 3)})),
        lambda: of(op.AddColumns({"a": pa.list_(pa.float32(), 4)})),
    ),
    "nullability": (
        lambda: of(op.CreateTable(SCHEMA)),
        lambda: of(op.CreateTable(pa.schema([("a", pa.int64()), ("b", pa.string())]))),
    ),
    "a literal": (lambda: of(op.Update({"a": 1})), lambda: of(op.Update({"a": 2}))),
    "the type of a literal": (lambda: of(op.Update({"a": 1})), lambda: of(op.Update({"a": "1"}))),
    "a boolean for a number": (lambda: of(op.Update({"a": 1})), lambda: of(op.Update({"a": True}))),
    "SQL": (lambda: of(op.Update(sql={"a": "1"})), lambda: of(op.Update(sql={"a": "2"}))),
    "SQL for a literal": (lambda: of(op.Update({"a": "1"})), lambda: of(op.Update(sql={"a": "1"}))),
    "a condition": (
        lambda: of(op.Update({"a": 1})), lambda: of(op.Update({"a": 1}, where="b = 1")),
    ),
    "an operation": (lambda: of(op.SetNullable("a")), lambda: of(op.SetNotNull("a"))),
    "the order of operations": (
        lambda: of(op.SetNullable("a"), op.DropIndex("b")),
        lambda: of(op.DropIndex("b"), op.SetNullable("a")),
    ),
    "the table of an operation": (
        lambda: of(op.DropIndex("a")), lambda: of(op.DropIndex("a", table="users")),
    ),
    "the table": (
        lambda: of(op.DropIndex("a"), line="l"), lambda: of(op.DropIndex("a"), line="l", table="b"),
    ),
    "the kind of index": (
        lambda: of(op.CreateIndex("a")), lambda: of(op.CreateIndex("a", kind="Bitmap")),
    ),
    "an option of an index": (
        lambda: of(op.CreateIndex("a", kind="FTS")),
        lambda: of(op.CreateIndex("a", kind="FTS", options={"stem": True})),
    ),
    "what happens without the table": (
        lambda: of(op.DropIndex("a")), lambda: of(op.DropIndex("a", when_missing=op.Missing.SKIP)),
    ),
    "touches": (
        lambda: of(op.DropIndex("a")), lambda: of(op.DropIndex("a"), touches=("memos", "users")),
    ),
    "depends_on": (
        lambda: of(op.DropIndex("a")), lambda: of(op.DropIndex("a"), depends_on={"users": 1}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS.values(), ids=EDITS.keys())
def test_a_changed_declaration_counts(case: tuple[Callable[[], str], Callable[[], str]]) -> None:
    """Every part of a declaration that changes what happens is part of the checksum."""
    before, after = case

    assert before() == before()
    assert before() != after()


def test_what_a_declaration_does_not_mean_does_not_count() -> None:
    """Descriptions, the order of names in a mapping, of fields in a schema, and metadata."""
    fields = list(SCHEMA)
    again = pa.schema([fields[1], fields[0].with_metadata({"k": "v"})], metadata={"x": "y"})

    assert of(op.CreateTable(SCHEMA)) == of(op.CreateTable(again), description="Create it")
    assert of(op.AddColumns({"a": pa.int8(), "b": pa.int8()})) == of(
        op.AddColumns({"b": pa.int8(), "a": pa.int8()})
    )
    assert of(op.DropIndex("a"), touches=("memos", "x")) == of(
        op.DropIndex("a"), touches=["x", "memos"]
    )


def test_a_function_of_the_parameters_counts_by_its_source(tmp_path: Path) -> None:
    """The same script has one checksum whatever the run's parameters are."""
    module = load(tmp_path, GOLDEN_SOURCE)

    assert checksum(module.users) == checksum(module.users)
    assert checksum(module.users) != checksum(module.tags)


def test_lambdas_on_one_line_cannot_be_told_apart(tmp_path: Path) -> None:
    """Rather than guess, the error says how to write it."""
    module = load(tmp_path, "a, b = (lambda params: [], 1), (lambda params: [2], 2)\n")
    made = Migration(table="memos", version=4, operations=module.a[0])

    with pytest.raises(InvalidMigrationError, match="cannot be identified") as caught:
        checksum(made)

    assert (caught.value.line, caught.value.version) == ("memos", 4)
    assert "def" in caught.value.remedy


def test_a_function_without_source_is_refused() -> None:
    """What cannot be compared later is not applied."""
    scope: dict[str, Any] = {}
    exec("async def up(context): pass", scope)  # noqa: S102 - a function without a file

    with pytest.raises(InvalidMigrationError, match=r"source of function 'up' is not available"):
        checksum(Migration(table="memos", version=1, up=scope["up"]))


async def partial_up(context: Context, name: str) -> None:
    """Takes a second argument."""


def test_a_partial_counts_with_its_arguments() -> None:
    """One function with other arguments is another migration."""
    one = functools.partial(partial_up, name="a")
    same = functools.partial(partial_up, name="a")
    other = functools.partial(partial_up, name="b")

    def of_up(up: Any) -> str:
        return checksum(Migration(table="memos", version=1, up=up))

    assert of_up(one) == of_up(same)
    assert of_up(one) != of_up(other)


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [None, True, 1, 1.0, "1", b"1", dt.date(2026, 1, 1), dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
     dt.time(1), dt.timedelta(seconds=1), Colour.RED, pa.int64(), pa.schema([("1", pa.int8())]),
     {"a": 1}, {"a": "1"}, [1], ["1"], {1, 2}, frozenset({"b", "a"})],
    ids=lambda value: f"{type(value).__name__}-{value}" * (not isinstance(value, frozenset)),
)  # fmt: skip
def test_values_of_one_meaning_have_one_form_and_others_another(value: object) -> None:
    """The canonical form is JSON, stable, and told apart from that of every other value."""
    import json

    form = json.dumps(canonical(value), sort_keys=True)

    assert form == json.dumps(canonical(value), sort_keys=True)
    assert canonical((1, [2])) == canonical([1, (2,)])
    assert form != json.dumps(canonical("something else"), sort_keys=True)


def test_a_value_without_a_form_is_refused() -> None:
    """An object whose meaning is unknown would make the checksum lie."""
    with pytest.raises(InvalidMigrationError, match="cannot be part of a migration's checksum"):
        of(op.CreateIndex("a", options={"x": object()}))


def test_the_chain_digest_tells_any_edit_of_history() -> None:
    """One comparison shows whether a migration was edited, removed, inserted or renumbered."""
    base = [(1, "a"), (2, "b"), (4, "c")]
    others = [
        [(1, "x"), (2, "b"), (4, "c")],
        [(1, "a"), (4, "c")],
        [(1, "a"), (2, "b"), (3, "x"), (4, "c")],
        [(1, "a"), (2, "b"), (5, "c")],
        [(1, "a"), (2, "b")],
        [],
    ]

    assert chain_digest([]) == ""
    assert len({chain_digest(pairs) for pairs in [base, *others]}) == len(others) + 1
    assert chain_digest(iter(base)) == chain_digest(base)
