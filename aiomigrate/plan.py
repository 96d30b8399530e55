"""What a run will do, decided before anything is written. Pure.

Takes decided line states (`reconcile`) and orders the pending migrations of all lines: each line
strictly by version, `depends_on` before its dependants, and never two migrations at once that
touch one table. Running it is for `executor`.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aiomigrate.errors import (
    DependencyError,
    DestructiveError,
    OperationError,
    TargetError,
)
from aiomigrate.model import Script, Scripts, Target
from aiomigrate.operations.base import TableState
from aiomigrate.operations.data import Run
from aiomigrate.reconcile import LineState, Reconciled, nearest, pending
from aiomigrate.undo import Undo, Way, destroying, keeps_savepoint, spell_spans

Key = tuple[str, int]
"""Line and version."""


class Direction(enum.Enum):
    """Which way a plan goes; a property of the plan, never of a step."""

    UPGRADE = "upgrade"
    ROLLBACK = "rollback"


class OnDestructive(enum.Enum):
    """What to do about steps that discard data or structure."""

    KEEP = "keep"  # run them, and keep a savepoint of each table; refuse what has none
    ALLOW = "allow"  # run them, and keep nothing
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One migration of a plan.

    Attributes:
        script: What to run.
        after: Migrations of this plan that must be applied before it starts; when one of them is
            not, this one is skipped.
        resumes: Whether a crash interrupted it, so that it is recovered rather than begun.
        undo: How it is undone, in a plan that rolls back.
    """

    script: Script
    after: tuple[Key, ...] = ()
    resumes: bool = False
    undo: Undo | None = None

    @property
    def key(self) -> Key:
        """Line and version."""
        return self.script.key

    def to_dict(self) -> dict[str, Any]:
        """Returns the step as a JSON-ready dictionary."""
        script = self.script
        return {
            "line": script.line,
            "version": script.version,
            "description": script.description,
            "source": script.source,
            "checksum": script.checksum,
            "touches": list(script.touches),
            "after": [{"line": line, "version": version} for line, version in self.after],
            "resumes": self.resumes,
            "undo": None
            if self.undo is None
            else {
                "way": self.undo.way.value,
                "to": self.undo.to,
                "does": list(self.undo.describe()),
                "discards": {t: [list(s) for s in d] for t, d in self.undo.discards.items()},
            },
            "operations": [
                {
                    "table": operation.table,
                    "does": operation.describe(),
                    "rewriting": operation.traits.rewriting,
                    "destructive": operation.traits.destructive,
                    "reversible": operation.traits.reversible,
                    "commits": operation.traits.commits,
                }
                for operation in script.operations
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do: a value, printable with `str()`, JSON with `to_dict()`.

    Attributes:
        direction: Which way it goes.
        steps: The migrations in an order that satisfies every constraint; empty at target.
        lines: Every line that has scripts and was selected, by name.
        unknown: Recorded lines that no script knows; they are left alone.
        adopts: Lines another system wrote, to be adopted first.
        warnings: One sentence each.
    """

    direction: Direction = Direction.UPGRADE
    steps: tuple[Step, ...] = ()
    lines: Mapping[str, LineState] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)
    adopts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether no migration is to be run."""
        return not self.steps

    @property
    def needs_lease(self) -> bool:
        """Whether anything is to be written, be it only to the ledger."""
        return bool(self.steps) or any(state.needs_lease for state in self.lines.values())

    def touched(self) -> tuple[str, ...]:
        """Returns every table some step may change, sorted."""
        return tuple(sorted({t for step in self.steps for t in step.script.touches}))

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as a JSON-ready dictionary."""
        return {
            "direction": self.direction.value,
            "at_target": self.is_empty,
            "steps": [step.to_dict() for step in self.steps],
            "lines": {
                name: {"current": state.current, "latest": state.latest}
                for name, state in self.lines.items()
            },
            "unknown": dict(self.unknown),
            "adopts": list(self.adopts),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        from aiomigrate.render import plan_text  # rendering is a layer above the value it prints

        return plan_text(self)


def build_plan(
    decided: Reconciled,
    scripts: Scripts,
    *,
    tables: Collection[str] | None = None,
    to: Target = None,
) -> Plan:
    """Orders what is pending.

    Args:
        decided: The state of every line, without problems.
        scripts: All scripts.
        tables: Lines to upgrade; all by default.
        to: Target; a mapping also selects its lines when `tables` is not given.

    Raises:
        TargetError: A selected line has no scripts, or a target is no version or below the
            version a line is at.
        DependencyError: A dependency will not be met, or dependencies form a cycle.
    """
    selected = _select(scripts, tables, to)
    states = {line: decided.lines[line] for line in selected}
    _check_targets(states, scripts, to)
    chains = [pending(states[line], scripts, to) for line in selected]
    pend = {script.key: script for chain in chains for script in chain}
    before = {key: _dependencies(script, pend, decided, scripts) for key, script in pend.items()}
    for chain in chains:
        for earlier, later in itertools.pairwise(chain):
            before[later.key].add(earlier.key)
    order = _topological(pend, before)
    _serialise_tables(order, pend, before)
    resumed = {
        (line, state.unfinished.started.version)
        for line, state in states.items()
        if state.unfinished is not None
    }
    return Plan(
        steps=tuple(
            Step(script=pend[key], after=tuple(sorted(before[key])), resumes=key in resumed)
            for key in order
        ),
        lines=states,
        unknown={n: s.current for n, s in decided.lines.items() if not scripts.of(n)},
        adopts=tuple(n for n, s in states.items() if s.act.value == "adopt"),
        warnings=tuple(
            f"{s.line} is at version {s.current}, above its newest script {s.latest}"
            for s in states.values()
            if s.is_ahead
        ),
    )


def build_rollback(undos: Mapping[Key, Undo], decided: Reconciled, scripts: Scripts) -> Plan:
    """Orders what is to be undone: what was applied later first, on each line and table.

    Args:
        undos: How each migration is undone, in the order in which they were applied, last first.
        decided: The state of every line.
        scripts: All scripts.
    """
    found = {key: scripts.get(*key) for key in undos}
    steps: list[Step] = []
    for key, undo in undos.items():
        script = found[key]
        assert script is not None  # noqa: S101 - `to_undo` chose scripts
        after = tuple(
            step.key
            for step in steps
            if step.script.line == script.line
            or not set(step.script.touches).isdisjoint(script.touches)
            or step.script.depends_on.get(script.line, 0) >= script.version
        )
        steps.append(Step(script=script, after=after, undo=undo, resumes=undo.way is Way.FINISH))
    warnings = [
        f"{step.script}: gives up what others committed to {table}: table_version "
        f"{spell_spans(spans)}"
        for step in steps
        if step.undo is not None
        for table, spans in step.undo.discards.items()
    ]
    return Plan(
        direction=Direction.ROLLBACK,
        steps=tuple(steps),
        lines=decided.lines,
        warnings=tuple(warnings),
    )


def _select(scripts: Scripts, tables: Collection[str] | None, to: Target) -> tuple[str, ...]:
    known = scripts.line_names()
    asked: Collection[str] | None = tables
    if asked is None and isinstance(to, Mapping):
        asked = to.keys()
    if asked is None:
        return known
    for name in asked:
        if name not in known:
            raise TargetError(
                f"There is no migration of {name!r}.",
                f"Lines with migrations: {', '.join(known) or 'none'}.{nearest(name, known)}",
                line=name,
            )
    return tuple(name for name in known if name in asked)


def _check_targets(states: Mapping[str, LineState], scripts: Scripts, to: Target) -> None:
    if to is None:
        return
    wanted = to if isinstance(to, Mapping) else dict.fromkeys(states, to)
    for line, version in wanted.items():
        if not isinstance(version, int) or isinstance(version, bool) or version < 0:
            raise TargetError(f"{version!r} is no version to go to.", "Use 0 or more.", line=line)
        if not isinstance(to, Mapping):
            continue
        if line not in states:
            raise TargetError(
                f"A version is given for {line!r}, which is not among the lines to upgrade.",
                f"Those are {', '.join(states) or 'none'}.{nearest(line, tuple(states))}",
                line=line,
            )
        current = states[line].current
        if version < current:
            raise TargetError(
                f"{line!r} is at version {current}, above {version}.",
                "upgrade only goes up: choose a version at or above the current one.",
                line=line,
                version=version,
            )
        if version > current and scripts.get(line, version) is None:
            raise TargetError(
                f"{line!r} has no version {version}.",
                f"Its versions: {', '.join(str(s.version) for s in scripts.of(line))}.",
                line=line,
                version=version,
            )


def _dependencies(
    script: Script, pend: Mapping[Key, Script], decided: Reconciled, scripts: Scripts
) -> set[Key]:
    result: set[Key] = set()
    name = script.source or str(script)
    for line, version in script.depends_on.items():
        where = {"line": script.line, "version": script.version, "path": script.source or None}
        state = decided.lines.get(line)
        if state is not None and state.current >= version and scripts.of(line):
            continue
        if scripts.get(line, version) is None:
            raise DependencyError(
                f"{name} depends on {line!r} version {version}, which does not exist.",
                f"Correct depends_on.{nearest(line, scripts.line_names())}",
                **where,  # type: ignore[arg-type]
            )
        if (line, version) not in pend:
            raise DependencyError(
                f"{name} depends on {line!r} version {version}, which this run leaves out.",
                f"Include it: --table {line}, or a higher --to.",
                **where,  # type: ignore[arg-type]
            )
        result.add((line, version))
    return result


def _topological(pend: Mapping[Key, Script], before: Mapping[Key, set[Key]]) -> list[Key]:
    """Returns the keys, prerequisites first; among free ones the lower version goes first."""
    waiting = {key: len(needs) for key, needs in before.items()}
    followers: dict[Key, list[Key]] = {key: [] for key in pend}
    for key, needs in before.items():
        for need in needs:
            followers[need].append(key)
    free = [(key[1], key[0]) for key, count in waiting.items() if count == 0]
    heapq.heapify(free)
    order: list[Key] = []
    while free:
        version, line = heapq.heappop(free)
        order.append((line, version))
        for follower in followers[(line, version)]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heapq.heappush(free, (follower[1], follower[0]))
    if len(order) < len(pend):
        stuck = sorted(key for key, count in waiting.items() if count > 0)
        cycle = _one_cycle(stuck, before)
        raise DependencyError(
            "Dependencies form a cycle: " + " -> ".join(f"{line} {v}" for line, v in cycle) + ".",
            "Remove one of the depends_on.",
            line=cycle[0][0],
            version=cycle[0][1],
        )
    return order


def _one_cycle(stuck: list[Key], before: Mapping[Key, set[Key]]) -> list[Key]:
    inside = set(stuck)
    path = [stuck[0]]
    while True:
        following = min(need for need in before[path[-1]] if need in inside)
        if following in path:
            return [*path[path.index(following) :], following]
        path.append(following)


def _serialise_tables(
    order: Iterable[Key], pend: Mapping[Key, Script], before: dict[Key, set[Key]]
) -> None:
    """Adds, for each table, an edge between consecutive steps that touch it."""
    last: dict[str, Key] = {}
    for key in order:
        for table in pend[key].touches:
            if table in last and last[table][0] != key[0]:
                before[key].add(last[table])
            last[table] = key


def check_operations(
    plan: Plan,
    tables: Mapping[str, TableState | None],
    on_destructive: OnDestructive = OnDestructive.KEEP,
) -> Plan:
    """Folds every operation's pure half over the live tables, so that mistakes show beforehand.

    What follows a `Run` on the tables it may touch, and what a crash left half done, cannot be
    predicted and is checked when it runs.

    Args:
        plan: What will run.
        tables: The state of each table the plan touches.
        on_destructive: Whether steps may discard what is there.

    Returns:
        The plan, with a warning for each step that breaks code or handles still running.

    Raises:
        OperationError: An operation does not fit the table as it will be.
        DestructiveError: A step discards what may not be.
    """
    states = dict(tables)
    unpredictable: set[str] = set()
    warnings: list[str] = []
    for step in plan.steps:
        if step.resumes:
            unpredictable.update(step.script.touches)
        _check_destructive(step.script, states, on_destructive)
        for operation in step.script.operations:
            if isinstance(operation, Run):
                unpredictable.update(step.script.touches)
            if operation.table is None or not unpredictable.isdisjoint(operation.tables):
                unpredictable.update(operation.tables)
                continue
            # A table that this very migration makes has no users yet.
            if tables.get(operation.table) is not None:
                told = operation.hazards(states.get(operation.table))
                warnings += [f"{step.script}: {hazard}" for hazard in told]
            try:
                states = operation.fold(states)
            except OperationError as exc:
                raise in_script(exc, step.script) from exc
    return replace(plan, warnings=(*plan.warnings, *warnings))


def _check_destructive(
    script: Script, states: Mapping[str, TableState | None], policy: OnDestructive
) -> None:
    if policy is OnDestructive.ALLOW:
        return
    for operation in destroying(script, states):
        if policy is OnDestructive.KEEP and keeps_savepoint(script, operation, states):
            continue
        why = (
            "no savepoint of it can be kept"
            if policy is OnDestructive.KEEP
            else "destructive steps are refused"
        )
        raise DestructiveError(
            f"{script.source or script}: {operation.describe()!r} on {operation.table!r} discards "
            f"what is there, and {why}.",
            "If that is meant, allow it: --allow-destructive (on_destructive=OnDestructive.ALLOW).",
            line=script.line,
            version=script.version,
            path=script.source or None,
        )


def in_script(exc: OperationError, script: Script) -> OperationError:
    """Returns the error with the script it concerns."""
    name = script.source or str(script)
    return OperationError(
        f"{name}: {exc.what}",
        exc.remedy,
        line=script.line,
        version=script.version,
        path=script.source or None,
    )
