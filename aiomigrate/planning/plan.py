"""Builds the plan of a run before anything is written. Pure.

It takes the line states from `planning.reconcile`, orders the pending migrations of all lines with
`planning.dependencies`, and marks those that an application's start does not wait for with
`planning.background`. `runs.scheduler` runs the plan.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aiomigrate.errors import DependencyError, TargetError
from aiomigrate.migration.model import Key, Script, Scripts, Target
from aiomigrate.planning.background import IDLE, Busy, defer
from aiomigrate.planning.dependencies import ordered
from aiomigrate.planning.reconcile import (
    LineState,
    Reconciled,
    lost_lines,
    missing_parts,
    pending,
)
from aiomigrate.planning.rollback import Undo, Way
from aiomigrate.text import nearest, spell_spans


class Direction(enum.Enum):
    """The direction of a plan; all of its steps have the same one."""

    UPGRADE = "upgrade"
    ROLLBACK = "rollback"


class Part(enum.Enum):
    """The part of an upgrade to run."""

    ALL = "all"
    FAST = "fast"  # the migrations that an application's start waits for
    BACKGROUND = "background"  # the others: migrations marked `background` and those after them


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One migration of a plan.

    Attributes:
        script: The migration to run.
        after: Migrations of this plan that must be applied before it starts; if one of them fails,
            this one is skipped.
        resumes: Whether a crash interrupted it, so that it is recovered first.
        undo: How it is undone, in a rollback plan.
        deferred: Whether an application's start does not wait for it.
        discards: Positions of the operations that discard existing data or structure; `None` if the
            plan was not checked against the tables, or that cannot be predicted.
    """

    script: Script
    after: tuple[Key, ...] = ()
    resumes: bool = False
    undo: Undo | None = None
    deferred: bool = False
    discards: frozenset[int] | None = None

    def is_destructive(self, position: int) -> bool:
        """Returns whether the operation at a position discards data or structure, or may do so."""
        if self.discards is None:
            return self.script.operations[position].traits.destructive
        return position in self.discards

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
            "deferred": self.deferred,
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
                    "destructive": self.is_destructive(position),
                    "reversible": operation.traits.reversible,
                    "commits": operation.traits.commits,
                }
                for position, operation in enumerate(script.operations)
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The migrations that a run will execute. `str()` is text, `to_dict()` is JSON-ready.

    Attributes:
        direction: Whether it upgrades or rolls back.
        steps: The migrations in an order that satisfies every constraint; empty at target.
        lines: The state of every selected line that has scripts, by name.
        unknown: Versions of recorded lines that have no scripts; they are not changed.
        adopts: Lines that another system recorded; they are adopted first.
        warnings: One sentence each.
        missing: One sentence for each thing that is not there and should perhaps be: the database,
            all scripts, or the scripts of a line that aiomigrate migrated.
        busy: Lines that background work is using: no other run writes their records.
    """

    direction: Direction = Direction.UPGRADE
    steps: tuple[Step, ...] = ()
    lines: Mapping[str, LineState] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)
    adopts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    busy: frozenset[str] = frozenset()

    @property
    def is_empty(self) -> bool:
        """Whether no migration is to be run."""
        return not self.steps

    @property
    def deferred(self) -> tuple[Key, ...]:
        """The migrations that an application's start does not wait for, in order."""
        return tuple(step.key for step in self.steps if step.deferred)

    @property
    def needs_lease(self) -> bool:
        """Whether anything must be written, even if only to the ledger."""
        states = (state for line, state in self.lines.items() if line not in self.busy)
        return bool(self.steps) or any(state.needs_lease for state in states)

    @property
    def needs_background(self) -> bool:
        """Whether there is work for the background."""
        return bool(self.deferred) or any(
            state.needs_lease for line, state in self.lines.items() if line in self.busy
        )

    def part(self, part: Part) -> Plan:
        """Returns the plan with the steps of one part only.

        Raises:
            DependencyError: A step of this part must run after a pending step of the other part.
        """
        if part is Part.ALL:
            return self
        wanted = part is Part.BACKGROUND
        steps = tuple(step for step in self.steps if step.deferred is wanted)
        kept = {step.key for step in steps}
        for step in steps:
            for key in step.after:
                if key not in kept:
                    raise DependencyError(
                        f"{step.script} must run after {key[0]} {key[1]}, which is pending and "
                        "does not run in the background.",
                        "First run `aiomigrate upgrade --skip-background`, or call initialize().",
                        line=step.script.line,
                        version=step.script.version,
                    )
        return replace(self, steps=steps)

    def touched(self) -> tuple[str, ...]:
        """Returns every table that a step may change, sorted."""
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
            "deferred": [{"line": line, "version": version} for line, version in self.deferred],
            "warnings": list(self.warnings),
            "missing": list(self.missing),
        }

    def __str__(self) -> str:
        return plan_text(self)


def build_plan(
    decided: Reconciled,
    scripts: Scripts,
    *,
    tables: Collection[str] | None = None,
    to: Target = None,
    existing: Collection[str] = (),
    busy: Busy = IDLE,
    has_database: bool = True,
) -> Plan:
    """Returns the plan of an upgrade; it has no steps if nothing is pending.

    Args:
        decided: The state of every line, without problems.
        scripts: All scripts.
        tables: Lines to upgrade; all by default.
        to: The target; a mapping also selects its lines if `tables` is not given.
        existing: Tables that exist, as far as background migrations touch them.
        busy: The lines and tables that background work is using.
        has_database: Whether the database exists.

    Raises:
        TargetError: A selected line has no scripts, or a target is not a version or is below the
            current version of a line.
        DependencyError: A dependency does not exist or is not part of this run, or dependencies
            form a cycle.
    """
    selected = _select(scripts, tables, to)
    states = {line: decided.lines[line] for line in selected}
    _check_targets(states, scripts, to)
    by_key = {s.key: s for line in selected for s in pending(states[line], scripts, to)}
    current = {line: state.current for line, state in decided.lines.items()}
    resumed = {
        (line, state.unfinished.started.version or 0)
        for line, state in states.items()
        if state.unfinished is not None
    }
    order = ordered(by_key.values(), current, scripts, resumed)
    deferred = defer(by_key, order, existing, busy)
    return Plan(
        steps=tuple(
            Step(
                script=by_key[key],
                after=tuple(sorted(order.before[key])),
                resumes=key in resumed,
                deferred=key in deferred,
            )
            for key in order.keys
        ),
        lines=states,
        busy=busy.lines,
        unknown={n: s.current for n, s in decided.lines.items() if not scripts.of(n)},
        adopts=tuple(n for n, s in states.items() if s.act.value == "adopt"),
        warnings=tuple(
            f"{s.line} is at version {s.current}, above its newest script {s.latest}"
            for s in states.values()
            if s.is_ahead
        ),
        missing=missing_parts(
            lost_lines(decided.lines, scripts), scripts, has_database=has_database
        ),
    )


def build_rollback(
    undos: Mapping[Key, Undo], decided: Reconciled, scripts: Scripts, busy: Busy = IDLE
) -> Plan:
    """Returns the plan of a rollback: on each line and table, the last applied migration first.

    Args:
        undos: How each migration is undone, last applied first.
        decided: The state of every line.
        scripts: All scripts.
        busy: The lines and tables that background work is using.

    Raises:
        BackgroundBusyError: Background work uses one of the lines or tables.
    """
    found = {key: scripts.get(*key) for key in undos}
    steps: list[Step] = []
    for key, undo in undos.items():
        script = found[key]
        assert script is not None  # noqa: S101 - `to_undo` returns only keys of scripts
        after = tuple(
            step.key
            for step in steps
            if step.script.line == script.line
            or not set(step.script.touches).isdisjoint(script.touches)
            or step.script.depends_on.get(script.line, 0) >= script.version
        )
        busy.refuse(script)
        steps.append(Step(script=script, after=after, undo=undo, resumes=undo.way is Way.FINISH))
    warnings = [
        f"{step.script}: discards commits of other writers to {table}: table_version "
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
        busy=busy.lines,
    )


def plan_text(plan: Plan) -> str:
    """Returns a plan as text: one paragraph per migration, with one line per operation."""
    if plan.is_empty:
        is_rollback = plan.direction is Direction.ROLLBACK
        at_target = "Nothing to do." if plan.missing else "Everything is at target; nothing to do."
        head = "Nothing to undo." if is_rollback else at_target
    else:
        lines = len({step.script.line for step in plan.steps})
        count = len(plan.steps)
        undo = "Undo " if plan.direction is Direction.ROLLBACK else ""
        head = f"{undo}{count} migration{'s'[: count != 1]} on {lines} line{'s'[: lines != 1]}:"
    out = [head]
    for step in plan.steps:
        script = step.script
        title = f"  {script.version:>4}  {script.line}"
        if script.description:
            title += f"  {script.description}"
        if step.resumes:
            title += "  (interrupted; will be recovered)"
        if step.deferred:
            title += "  (in the background)"
        out.append(title)
        if step.undo is not None:
            out += [f"        - {line}" for line in step.undo.describe()]
            out.append(f"        afterwards {script.line} is at version {step.undo.to}")
            continue
        for position, operation in enumerate(script.operations):
            where = "" if operation.table in (None, script.table) else f"{operation.table}: "
            traits = operation.traits
            marks = [
                mark
                for mark, is_set in (
                    ("rewriting", traits.rewriting),
                    ("destructive", step.is_destructive(position)),
                    ("irreversible", not traits.reversible),
                )
                if is_set
            ]
            marked = f"  [{', '.join(marks)}]" if marks else ""
            out.append(f"        - {where}{operation.describe()}{marked}")
        others = [f"{line} {version}" for line, version in step.after if line != script.line]
        if others:
            out.append(f"        after {', '.join(others)}")
    out += [f"adopt: the version of {line} was recorded by another system" for line in plan.adopts]
    out += [f"unknown: {line} is recorded at version {v} and has no script; it is not changed"
            for line, v in sorted(plan.unknown.items())]  # fmt: skip
    out += [f"warning: {warning}" for warning in (*plan.warnings, *plan.missing)]
    return "\n".join(out)


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
            raise TargetError(f"{version!r} is not a target version.", "Use 0 or more.", line=line)
        if not isinstance(to, Mapping):
            continue
        if line not in states:
            raise TargetError(
                f"A version is given for {line!r}, which is not among the lines to upgrade.",
                f"Lines to upgrade: {', '.join(states) or 'none'}.{nearest(line, tuple(states))}",
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
