"""The planner: what runs, in which order, what never runs at once, and every mistake beforehand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiomigrate import Context, Plan, Script, Scripts, op
from aiomigrate.errors import DependencyError, OperationError, TargetError
from aiomigrate.ledger.history import Journal, fold
from aiomigrate.ledger.records import Event, HeadRow, Kind
from aiomigrate.migration.model import Key
from aiomigrate.planning.plan import build_plan, build_rollback
from aiomigrate.planning.preflight import check_operations
from aiomigrate.planning.reconcile import OnAhead, digest_at, reconcile
from aiomigrate.planning.rollback import Undo, Way
from tests.planning.test_reconcile import AT


def script(
    line: str,
    version: int,
    *,
    depends_on: Mapping[str, int] | None = None,
    touches: Sequence[str] | None = None,
    operations: Sequence[op.Operation] = (),
) -> Script:
    """Builds a script of a line, on a table of its name unless it touches others."""
    return Script(
        line=line, version=version, description="", operations=tuple(operations),
        touches=tuple(touches if touches is not None else [line]), depends_on=depends_on or {},
        checksum=f"{line}{version}", source=f"{version:03}_{line}.py", table=line,
    )  # fmt: skip


def plan(scripts: Sequence[Script], at: Mapping[str, int] | None = None, **options: Any) -> Plan:
    """Plans scripts on a database whose lines are at some versions."""
    loaded = Scripts(tuple(scripts))
    events = []
    for (line, version), seq in zip((at or {}).items(), itertools.count(1), strict=False):
        known = {str(s.version): s.checksum for s in loaded.up_to(line, version)}
        events.append(Event(lease="run", epoch=1, seq=seq, at=AT, kind=Kind.STAMPED, line=line,
                            version=version, detail={"checksums": known}))  # fmt: skip
    rows = [
        HeadRow(name=n, version=v, migrated_at=AT, epoch=1, digest=digest_at(loaded, n, v))
        for n, v in (at or {}).items()
    ]
    decided = reconcile(rows, fold(events), loaded, on_ahead=OnAhead.WARN)
    decided.raise_first()
    return build_plan(decided, loaded, **options)


def order(planned: Plan) -> list[Key]:
    """Returns the keys of a plan's steps in order."""
    return [step.key for step in planned.steps]


def after(planned: Plan, line: str, version: int) -> tuple[Key, ...]:
    """Returns what one step waits for."""
    return next(step.after for step in planned.steps if step.key == (line, version))


# ---- order ---------------------------------------------------------------------------------------


def test_each_line_goes_in_order_from_where_it_is() -> None:
    """What is applied is left out, what is pending follows its predecessor."""
    planned = plan([script("memos", v) for v in (4, 1, 2)], {"memos": 1})

    assert order(planned) == [("memos", 2), ("memos", 4)]
    assert after(planned, "memos", 2) == ()
    assert after(planned, "memos", 4) == (("memos", 2),)


def test_independent_lines_wait_for_nobody() -> None:
    """No edge between lines that share no table and do not depend on each other."""
    planned = plan([script("memos", 1), script("users", 1), script("tags", 3)])

    assert order(planned) == [("memos", 1), ("users", 1), ("tags", 3)]
    assert all(step.after == () for step in planned.steps)


def test_a_dependency_comes_before_what_depends_on_it() -> None:
    """Even if its version is higher."""
    planned = plan([script("memos", 1, depends_on={"users": 5}), script("users", 5)])

    assert order(planned) == [("users", 5), ("memos", 1)]
    assert after(planned, "memos", 1) == (("users", 5),)


def test_a_dependency_that_is_applied_is_not_waited_for() -> None:
    """Also one of a version that was passed without a script of its own."""
    scripts = [script("memos", 1, depends_on={"users": 3}), script("users", 2), script("users", 4)]

    planned = plan(scripts, {"users": 4})

    assert after(planned, "memos", 1) == ()


def test_of_two_that_share_a_table_the_lower_version_goes_first() -> None:
    """Nothing else orders them, so that every process decides alike."""
    scripts = [script("indexes", 2, touches=["memos"]), script("memos", 1), script("memos", 3)]

    planned = plan(scripts)

    assert order(planned) == [("memos", 1), ("indexes", 2), ("memos", 3)]
    assert after(planned, "indexes", 2) == (("memos", 1),)
    assert after(planned, "memos", 3) == (("indexes", 2), ("memos", 1))


def test_a_cycle_is_named() -> None:
    """The error shows the way round."""
    scripts = [
        script("a", 1, depends_on={"b": 1}), script("b", 1, depends_on={"c": 2}),
        script("c", 1), script("c", 2, depends_on={"a": 1}), script("d", 1, depends_on={"a": 1}),
    ]  # fmt: skip

    with pytest.raises(DependencyError, match="a 1 -> b 1 -> c 2 -> a 1"):
        plan(scripts)


def test_a_cycle_through_the_order_of_a_line_is_named() -> None:
    """A migration cannot depend on a later one of its own line."""
    with pytest.raises(DependencyError, match="a 1 -> a 2 -> a 1"):
        plan([script("a", 1, depends_on={"a": 2}), script("a", 2)])


@pytest.mark.parametrize(
    ("depends_on", "message"),
    [
        ({"user": 1}, r"'user' version 1, which does not exist.*Did you mean 'users'\?"),
        ({"users": 7}, "'users' version 7, which does not exist"),
    ],
)
def test_a_dependency_that_does_not_exist_is_named(
    depends_on: dict[str, int], message: str
) -> None:
    """With file, line and version of who depends, and a suggestion."""
    with pytest.raises(DependencyError, match=message) as caught:
        plan([script("memos", 2, depends_on=depends_on), script("users", 1)])

    error = caught.value
    assert (error.line, error.version, error.path) == ("memos", 2, "002_memos.py")


@pytest.mark.parametrize("options", [{"tables": ["memos"]}, {"to": {"memos": 2}}, {"to": 2}])
def test_a_dependency_that_the_run_leaves_out_is_told(options: dict[str, Any]) -> None:
    """Running half of it would fail later: the error says what to include."""
    scripts = [script("memos", 2, depends_on={"users": 3}), script("users", 3)]

    with pytest.raises(DependencyError, match="which this run leaves out") as caught:
        plan(scripts, **options)

    assert "--table users" in caught.value.remedy


# ---- targets -------------------------------------------------------------------------------------

LINES = [script("memos", 1), script("memos", 2), script("memos", 4), script("users", 3)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["memos 1", "memos 2", "users 3", "memos 4"]),
        ({"to": 3}, ["memos 1", "memos 2", "users 3"]),
        ({"to": 2}, ["memos 1", "memos 2"]),
        ({"to": 0}, []),
        ({"to": 99}, ["memos 1", "memos 2", "users 3", "memos 4"]),
        ({"to": {"memos": 2}}, ["memos 1", "memos 2"]),
        ({"to": {"memos": 1, "users": 3}}, ["memos 1", "users 3"]),
        ({"to": {}}, []),
        ({"tables": ["users"]}, ["users 3"]),
        ({"tables": ("memos",), "to": 2}, ["memos 1", "memos 2"]),
        ({"tables": ["users", "memos"], "to": {"memos": 1}}, ["memos 1", "users 3"]),
        ({"tables": []}, []),
    ],
)
def test_what_is_asked_for_is_what_runs(options: dict[str, Any], expected: list[str]) -> None:
    """`tables` selects lines, `to` limits versions; a mapping selects its lines too."""
    assert [f"{line} {version}" for line, version in order(plan(LINES, **options))] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tables": ["memo"]}, r"no migration of 'memo'.*memos, users.*Did you mean 'memos'\?"),
        ({"to": {"user": 3}}, r"no migration of 'user'.*Did you mean 'users'\?"),
        ({"to": {"memos": 3}}, r"'memos' has no version 3.*1, 2, 4"),
        ({"to": {"memos": 1}}, r"'memos' is at version 2, above 1.*only goes up"),
        ({"to": -1}, "-1 is not a target version"),
        ({"to": "2"}, "'2' is not a target version"),
        ({"to": True}, "True is not a target version"),
        ({"to": {"users": None}}, "None is not a target version"),
        (
            {"tables": ["users"], "to": {"memos": 2}},
            "given for 'memos', which is not among the lines to upgrade.*Lines to upgrade: users",
        ),
        ({"tables": ["memos"], "to": {"nope": 3}}, "given for 'nope', which is not among"),
        ({"tables": [], "to": {"memos": 2}}, "Lines to upgrade: none"),
    ],
)
def test_a_target_that_cannot_be_is_named(options: dict[str, Any], message: str) -> None:
    """With what there is instead."""
    with pytest.raises(TargetError, match=message):
        plan(LINES, {"memos": 2}, **options)


def test_a_line_above_the_target_stays() -> None:
    """A number is at most: it takes no line back."""
    assert order(plan(LINES, {"memos": 4}, to=2)) == []


def test_a_plan_without_scripts_is_empty() -> None:
    """Nothing to do, nothing to write."""
    planned = plan([])

    assert planned.is_empty
    assert not planned.needs_lease


# ---- what a plan tells ---------------------------------------------------------------------------


def test_a_plan_is_a_value_for_people_and_programs() -> None:
    """`str()` is text, `to_dict()` is JSON, `touched()` names every table."""
    change = op.DropColumns("a", table="memos")
    planned = plan(
        [script("users", 1), script("memos", 2, depends_on={"users": 1}, operations=[change])],
    )

    told = json.loads(json.dumps(planned.to_dict()))

    assert planned.touched() == ("memos", "users")
    assert told["direction"] == "upgrade"
    assert told["at_target"] is False
    assert told["lines"]["memos"] == {"current": 0, "latest": 2}
    assert told["steps"][1] == {
        "line": "memos", "version": 2, "description": "", "source": "002_memos.py",
        "checksum": "memos2", "touches": ["memos"],
        "resumes": False, "deferred": False, "undo": None,
        "after": [{"line": "users", "version": 1}],
        "operations": [{
            "table": "memos", "does": "drop a", "rewriting": False, "destructive": True,
            "reversible": "restoring the previous table version",
            "commits": "1, and 1 for each index",
        }],
    }  # fmt: skip
    assert "drop a  [destructive]" in str(planned)


def test_a_plan_tells_adoptions_unknown_lines_and_lines_ahead() -> None:
    """What is not a migration but will be done, or left alone, is said."""
    scripts = Scripts((script("memos", 2), script("users", 1)))
    rows = [
        HeadRow(name="memos", version=1, migrated_at=AT),
        HeadRow(name="users", version=5, migrated_at=AT),
        HeadRow(name="memo_vectors", version=18, migrated_at=AT),
    ]

    decided = reconcile(rows, Journal(), scripts, on_ahead=OnAhead.WARN)
    planned = build_plan(decided, scripts)

    assert order(planned) == [("memos", 2)]
    assert planned.adopts == ("memos", "users")
    assert dict(planned.unknown) == {"memo_vectors": 18}
    assert planned.warnings == ("users is at version 5, above its newest script 1",)
    assert planned.needs_lease


def test_an_interrupted_migration_is_planned_as_one_to_resume() -> None:
    """So that people see it, and the executor recovers it rather than beginning it."""
    started = Event(lease="run", epoch=1, seq=1, at=AT, kind=Kind.STARTED, line="memos", version=1)
    scripts = Scripts((script("memos", 1), script("memos", 2)))

    planned = build_plan(reconcile([], fold([started]), scripts), scripts)

    assert [step.resumes for step in planned.steps] == [True, False]


# ---- operations beforehand -----------------------------------------------------------------------


async def up(context: Context) -> None:
    """Does what nobody can predict."""


TABLE = op.TableState(pa.schema([("a", pa.int64())]))
WRONG = op.SetNullable("nope", table="memos")


def check(*scripts: Script, tables: Mapping[str, op.TableState | None], at: int = 0) -> None:
    """Checks the operations of a plan of scripts."""
    check_operations(plan(scripts, {"memos": at} if at else None), tables)


def test_operations_are_checked_over_what_earlier_ones_predict() -> None:
    """The error names the file and the version of the migration that does not fit."""
    first = script("memos", 1, operations=[op.RenameColumns({"a": "b"}, table="memos")])
    fits = script("memos", 2, operations=[op.SetNullable("b", table="memos")])
    wrong = script("memos", 2, operations=[op.SetNullable("a", table="memos")])

    check(first, fits, tables={"memos": TABLE})
    with pytest.raises(OperationError, match=r"002_memos\.py.*no column 'a'") as caught:
        check(first, wrong, tables={"memos": TABLE})
    assert (caught.value.line, caught.value.version) == ("memos", 2)


def test_what_follows_a_function_is_not_judged() -> None:
    """On the tables it may touch; on others mistakes still show."""
    function = script("memos", 1, operations=[op.Run(up, table="memos")])
    later = script("memos", 2, operations=[WRONG])
    other = script("users", 3, operations=[op.DropIndex("a", table="users")])

    check(function, later, tables={"memos": TABLE})
    with pytest.raises(OperationError, match="users"):
        check(function, other, tables={"memos": TABLE, "users": None})


def test_a_missing_table_is_passed_over_where_the_operation_says_so() -> None:
    """`when_missing=SKIP` is not an error, and does not make the table appear."""
    skips = op.SetNullable("a", table="memos", when_missing=op.Missing.SKIP)

    check(script("memos", 1, operations=[skips]), tables={"memos": None})
    with pytest.raises(OperationError, match="does not exist"):
        check(script("memos", 1, operations=[skips, WRONG]), tables={"memos": None})


# ---- any scripts ---------------------------------------------------------------------------------


@st.composite
def script_sets(draw: st.DrawFn) -> tuple[list[Script], dict[str, int]]:
    """Draws scripts without cycles, and where their lines are."""
    lines = ["a", "b", "c", "d"][: draw(st.integers(1, 4))]
    keys = sorted(
        draw(st.sets(st.tuples(st.integers(1, 6), st.sampled_from(lines)), max_size=16)),
        key=lambda key: (key[0], key[1]),
    )
    scripts: list[Script] = []
    for version, line in keys:
        # On what comes before in one order of all: so there is no cycle.
        earlier = [s for s in scripts if s.line != line]
        chosen = draw(st.lists(st.sampled_from(earlier), max_size=2)) if earlier else []
        touches = draw(st.sets(st.sampled_from(["t", "u", "v", line]), max_size=2))
        depends_on = {s.line: s.version for s in chosen}
        scripts.append(script(line, version, depends_on=depends_on, touches=sorted(touches)))
    at = {}
    for line in draw(st.sets(st.sampled_from(lines))):
        if found := [s.version for s in scripts if s.line == line]:
            at[line] = draw(st.sampled_from([0, *found]))
    return draw(st.permutations(scripts)), {line: v for line, v in at.items() if v}


@given(script_sets())
def test_any_plan_satisfies_every_constraint(drawn: tuple[list[Script], dict[str, int]]) -> None:
    """Everything pending once, lines in order, dependencies first, a shared table never at once.

    Of those that could go the lowest version goes, and the order of scripts makes no difference.
    """
    scripts, at = drawn

    planned = plan(scripts, at)

    steps = {step.key: step for step in planned.steps}
    position = {key: n for n, key in enumerate(order(planned))}
    assert sorted(steps) == sorted(s.key for s in scripts if s.version > at.get(s.line, 0))
    before: dict[Key, set[Key]] = {}
    for key in order(planned):  # everything each step waits for, directly or not
        assert all(position[other] < position[key] for other in steps[key].after)
        before[key] = set(steps[key].after).union(*(before[o] for o in steps[key].after))
    for one, other in itertools.permutations(steps.values(), 2):
        ordered = one.key in before[other.key] or other.key in before[one.key]
        if one.script.line == other.script.line:
            assert (one.key in before[other.key]) is (one.script.version < other.script.version)
        if set(one.script.touches) & set(other.script.touches):
            assert ordered
        if other.script.depends_on.get(one.script.line) == one.script.version:
            assert one.key in before[other.key]
    waiting = dict(steps)
    for line, version in order(planned):
        free = [
            (v, n)
            for (n, v), step in waiting.items()
            if not any((n, w) in waiting for w in range(v))
            and not any(need in waiting for need in step.script.depends_on.items())
        ]
        assert (version, line) == min(free)
        del waiting[line, version]
    assert order(plan(sorted(scripts, key=lambda s: s.key), at)) == order(planned)
    assert plan(sorted(scripts, key=lambda s: s.key), at).steps == planned.steps


# ---- rollbacks and interrupted migrations --------------------------------------------------------


def test_what_depends_on_a_migration_is_undone_before_it() -> None:
    """Also where the two share neither line nor table, and only just satisfy the dependency."""
    scripts = Scripts((script("memos", 1), script("users", 1, depends_on={"memos": 1})))
    undo = Undo(way=Way.INVERSE, to=0)
    undos = {("users", 1): undo, ("memos", 1): undo}
    planned = build_rollback(undos, reconcile([], Journal(), scripts), scripts)

    assert order(planned) == [("users", 1), ("memos", 1)]
    assert after(planned, "users", 1) == ()
    assert after(planned, "memos", 1) == (("users", 1),)


def test_an_interrupted_migration_is_not_judged_by_the_tables_that_it_has_changed() -> None:
    """What it has done already must not stop its recovery; other tables are judged all the same."""
    done = [op.SetNullable("a", table="memos"), op.RenameColumns({"a": "b"}, table="memos")]
    scripts = Scripts(
        (
            script("memos", 1, operations=done),
            script("memos", 2, operations=[op.SetNullable("b", table="memos")]),
            script("users", 1, operations=[op.DropIndex("a", table="users")]),
        )
    )
    started = Event(lease="run", epoch=1, seq=1, at=AT, kind=Kind.STARTED, line="memos", version=1)
    decided = reconcile([], fold([started]), scripts)
    renamed = {"memos": op.TableState(pa.schema([("b", pa.int64())])), "users": None}

    check_operations(build_plan(decided, scripts, tables=["memos"]), renamed)
    with pytest.raises(OperationError, match="users"):
        check_operations(build_plan(decided, scripts), renamed)
    with pytest.raises(OperationError, match="no column 'a'"):
        check_operations(
            build_plan(reconcile([], Journal(), scripts), scripts, tables=["memos"]), renamed
        )
