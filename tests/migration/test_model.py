"""The values: what a migration may be, and the questions that need no database."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pytest

from aiomigrate import Context, Event, Migration, Script, Scripts, op
from aiomigrate.errors import InvalidMigrationError
from aiomigrate.migration.model import Params

ADD = op.AddColumns({"a": pa.int8()})


async def up(context: Context) -> None:
    """Does nothing."""


async def down(context: Context) -> None:
    """Does nothing."""


def migration(**values: Any) -> Migration:
    """Builds a migration from defaults and some values."""
    return Migration(**{"table": "memos", "version": 2, "operations": [ADD], **values})


def script(line: str, version: int) -> Script:
    """Builds a script of a line."""
    return Script(line=line, version=version, description="", operations=(ADD.on(line),),
                  touches=(line,), depends_on={}, checksum=f"{line}{version}")  # fmt: skip


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "version 0": ({"version": 0}, "version 0 is not a positive integer"),
    "a negative version": ({"version": -3}, "not a positive integer"),
    "a version as text": ({"version": "2"}, "'2' is not a positive integer"),
    "a boolean version": ({"version": True}, "not a positive integer"),
    "a fractional version": ({"version": 2.0}, "not a positive integer"),
    "a version beyond int32": ({"version": 2**31}, "not a positive integer"),
    "no name": ({"table": None}, "names no table"),
    "an empty name": ({"table": ""}, "'' is not a valid name"),
    "an empty line": ({"line": ""}, "'' is not a valid name"),
    "a reserved name": ({"table": ":lease"}, "':lease' is not a valid name"),
    "a name that is no text": ({"table": 3}, "3 is not a valid name"),
    "a line that touches nothing": (
        {"table": None, "line": "indexes"},
        "without a table needs touches",
    ),
    "touches as text": ({"touches": "memos"}, "touches is a string"),
    "touches no name": ({"touches": ("memos", "")}, "does not accept a table named ''"),
    "neither operations nor up": ({"operations": []}, "operations or up, not both"),
    "operations and up": ({"up": up}, "operations or up, not both"),
    "down without up": ({"down": down}, "it has down but no up"),
    "one operation instead of a list": ({"operations": ADD}, "not a list"),
    "no operation": ({"operations": [ADD, "drop"]}, "'drop' is not an operation"),
    "a class instead of an operation": ({"operations": [op.AddColumns]}, "is not an operation"),
    "depends_on no version": ({"depends_on": {"users": "2"}}, "'users': '2' is not a version"),
    "depends_on version 0": ({"depends_on": {"users": 0}}, "'users': 0 is not a version"),
    "depends_on no line": ({"depends_on": {3: 2}}, "depends_on 3"),
}


@pytest.mark.parametrize("case", INVALID.values(), ids=INVALID.keys())
def test_a_migration_that_cannot_be_is_refused_where_it_is_written(
    case: tuple[dict[str, Any], str],
) -> None:
    """The error says what is wrong and what to write, and names line and version where it can."""
    values, message = case

    with pytest.raises(InvalidMigrationError, match=message) as caught:
        migration(**values)

    assert caught.value.remedy
    if "table" not in values and "line" not in values:
        assert caught.value.line == "memos"
    assert caught.value.version in (2, None, *(v for v in values.values() if type(v) is int))


IMPOSSIBLE_TABLES = (
    "my table", "it's", 'q"t', "mem\u00f6s", "\u65e5\u8bb0", "a/b", "a\\b", "a\nb", "a%20b", " t",
    "con:", ".", "..", "x" * 201,
)  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE_TABLES, ids=ascii)
def test_a_table_that_lancedb_cannot_have_is_refused_where_it_is_written(name: str) -> None:
    """As the migration's own, among what it touches, and as the table of an operation."""
    elsewhere = op.AddColumns({"a": pa.int8()}, table=name)
    with pytest.raises(InvalidMigrationError, match="does not accept a table named"):
        migration(table=name)
    with pytest.raises(InvalidMigrationError, match="does not accept a table named"):
        migration(touches=("memos", name))
    with pytest.raises(InvalidMigrationError, match="does not accept a table named") as caught:
        migration(operations=[elsewhere]).resolve({})

    assert "letters" in caught.value.remedy


@pytest.mark.parametrize("name", ["a.b", "A-b_c.1", "1", "x" * 200])
def test_an_odd_name_that_lancedb_takes_is_accepted(name: str) -> None:
    """Letters, digits and `_ - .`, up to 200 of them."""
    assert migration(table=name).resolve({})[0].table == name


@pytest.mark.parametrize("name", ["a`b", "_rowid", "_ROWADDR", "_row_created_at_version", ""])
def test_a_column_that_lancedb_cannot_have_is_refused_where_it_is_written(name: str) -> None:
    """By every operation that gives a column its name."""
    with pytest.raises(InvalidMigrationError):
        op.AddColumns({name: pa.int8()})
    with pytest.raises(InvalidMigrationError):
        op.RenameColumns({"a": name})
    with pytest.raises(InvalidMigrationError):
        op.CreateTable(pa.schema([pa.field(name, pa.int8())]))


def test_operations_are_bound_to_the_table_they_do_not_name() -> None:
    """An operation of a migration acts on the migration's table unless it names its own."""
    elsewhere = op.AddColumns({"a": pa.int8()}, table="users")

    bound = migration(operations=[ADD, elsewhere]).resolve({})

    assert [o.table for o in bound] == ["memos", "users"]
    assert ADD.table is None


def test_operations_may_be_any_iterable() -> None:
    """A generator is read once and kept: what it gave is what runs."""
    given: Any = (operation for operation in (ADD, ADD))

    made = migration(operations=given)

    assert len(made.resolve({})) == len(made.resolve({})) == 2


def by_list(params: Params) -> list[op.Operation]:
    """Returns an operation that depends on the parameters."""
    return [op.AddColumns({"v": pa.list_(pa.float32(), params["dimension"])})]


def by_generator(params: Params) -> Any:
    """Yields what `by_list` returns."""
    yield from by_list(params)


@pytest.mark.parametrize("function", [by_list, by_generator])
def test_operations_may_depend_on_the_parameters(
    function: Callable[[Params], list[op.Operation]],
) -> None:
    """A function of the parameters is asked for each run, and may be a generator function."""
    made = migration(operations=function)

    (operation,) = made.resolve({"dimension": 3})

    assert operation.describe() == "add v fixed_size_list<item: float>[3]"
    assert operation.table == "memos"


def test_what_a_function_of_the_parameters_returns_is_checked() -> None:
    """A function that returns something else is refused, naming the migration."""
    made = migration(operations=lambda params: ["drop"])

    with pytest.raises(InvalidMigrationError, match="'drop' is not an operation") as caught:
        made.resolve({})

    assert (caught.value.line, caught.value.version) == ("memos", 2)


def test_a_function_becomes_an_operation() -> None:
    """`up` is sugar for `op.Run`, which must be async."""
    made = migration(operations=[], up=up, down=down)
    wrong = migration(operations=[], up=lambda context: None)

    assert made.resolve({}) == (op.Run(up, down, table="memos"),)
    with pytest.raises(InvalidMigrationError, match="not an async function"):
        wrong.resolve({})


def test_a_line_that_is_no_table_has_operations_that_name_theirs() -> None:
    """Without a table of its own, a migration's operation without a table is refused."""
    made = migration(table=None, line="indexes", touches=("memos",))

    with pytest.raises(InvalidMigrationError, match="names no table"):
        made.resolve({})


def test_an_operation_may_only_change_tables_that_are_touched() -> None:
    """What `touches` leaves out could be changed by two migrations at once."""
    made = migration(touches=("users",))

    with pytest.raises(InvalidMigrationError, match="'memos', which is not in touches"):
        made.resolve({})


def test_the_line_of_a_migration_may_have_another_name_than_its_table() -> None:
    """`line` names the version line, `table` what the operations change."""
    made = migration(line="memo schema")

    assert made.name == "memo schema"
    assert made.resolve({})[0].table == "memos"


def test_a_migration_is_a_value_that_cannot_be_changed() -> None:
    """What was checked stays as it was checked."""
    made = migration(depends_on={"users": 2})
    depends_on: Any = made.depends_on

    with pytest.raises(AttributeError):
        made.version = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        depends_on["users"] = 9
    assert isinstance(made.operations, tuple)


SCRIPTS = Scripts(
    tuple(script(line, v) for line, v in [("memos", 7), ("users", 1), ("memos", 2), ("memos", 4)])
)


def test_the_questions_about_scripts_need_no_database() -> None:
    """Lines, pending from a version, applied at a version, newest: plain methods on a value."""

    def versions(found: tuple[Script, ...]) -> list[int]:
        return [s.version for s in found]

    assert SCRIPTS.line_names() == ("memos", "users")
    assert versions(SCRIPTS.of("memos")) == [2, 4, 7]
    assert versions(SCRIPTS.of("tags")) == []
    assert versions(SCRIPTS.after("memos", 2)) == [4, 7]
    assert versions(SCRIPTS.after("memos", 0)) == [2, 4, 7]
    assert versions(SCRIPTS.after("memos", 7)) == []
    assert versions(SCRIPTS.up_to("memos", 5)) == [2, 4]
    assert (SCRIPTS.latest("memos"), SCRIPTS.latest("tags")) == (7, 0)
    assert SCRIPTS.get("memos", 4) == script("memos", 4)
    assert SCRIPTS.get("memos", 5) is None


@pytest.mark.parametrize(
    ("to", "expected"),
    [(None, 7), (7, 7), (6, 4), (2, 2), (1, 0), (0, 0), (99, 7),
     ({"memos": 4}, 4), ({"users": 1}, 7), ({}, 7)],
)  # fmt: skip
def test_a_target_is_the_newest_script_at_or_below_what_is_asked(
    to: int | Mapping[str, int] | None, expected: int
) -> None:
    """`to` means the same everywhere: all, at most a version, or line by line."""
    assert SCRIPTS.target("memos", to) == expected


def test_an_event_is_ready_for_json_without_what_is_unknown() -> None:
    """Programs get a dictionary of plain values."""
    event = Event(lease="run", epoch=3, seq=0, at=dt.datetime(2026, 1, 2, tzinfo=dt.UTC),
                  kind="applied", version=0, tables={"a": {"after": 2}})  # fmt: skip

    assert event.to_dict() == {
        "lease": "run", "epoch": 3, "seq": 0, "at": "2026-01-02T00:00:00+00:00",
        "kind": "applied", "run_id": "", "version": 0, "tables": {"a": {"after": 2}},
    }  # fmt: skip
