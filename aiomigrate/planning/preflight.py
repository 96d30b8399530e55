"""Checks a plan against the live tables before anything is written. Pure."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from aiomigrate.errors import DestructiveError, OperationError
from aiomigrate.migration.model import Script
from aiomigrate.operations.base import Operation
from aiomigrate.operations.rows import Run
from aiomigrate.planning.destructive import destroying, keeps_savepoint
from aiomigrate.planning.plan import Plan, Step
from aiomigrate.schema.sql import Statement
from aiomigrate.schema.state import TableState


class OnDestructive(enum.Enum):
    """What to do about steps that discard data or structure."""

    KEEP = "keep"  # run them, and keep a savepoint of each table; refuse what has none
    ALLOW = "allow"  # run them, and keep nothing
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Trial:
    """SQL of an operation, to be tried on an empty table before anything is written.

    Attributes:
        script: The migration.
        operation: Its operation.
        statement: The SQL.
        state: The table that it is about, as it will be.
    """

    script: Script
    operation: Operation
    statement: Statement
    state: TableState

    def refused(self, why: str) -> OperationError:
        """Builds the error of SQL that LanceDB does not take."""
        texts = (self.statement.where or "", *self.statement.sets.values())
        quoted = any('"' in text for text in texts)
        hint = " Names are quoted by `backticks`; what is in double quotes is text."
        told = self.operation.refuse(
            f"LanceDB refuses its SQL: {why}.",
            f"Correct it.{hint if quoted else ''} The columns of {self.statement.table!r} are by "
            f"then {', '.join(f.name for f in self.state.fields())}.",
        )
        return in_script(told, self.script)


def check_operations(
    plan: Plan,
    tables: Mapping[str, TableState | None],
    on_destructive: OnDestructive = OnDestructive.KEEP,
) -> tuple[Plan, tuple[Trial, ...]]:
    """Folds every operation's pure half over the live tables, so that mistakes show beforehand.

    What follows a `Run` on the tables it may touch, and what a crash left half done, cannot be
    predicted and is checked when it runs.

    Args:
        plan: What will run.
        tables: The state of each table the plan touches.
        on_destructive: Whether steps may discard what is there.

    Returns:
        The plan, with a warning for each step that breaks code or handles still running; and the
        SQL that LanceDB is still to be asked about.

    Raises:
        OperationError: An operation does not fit the table as it will be.
        DestructiveError: A step discards what may not be.
    """
    states = dict(tables)
    unpredictable: set[str] = set()
    warnings: list[str] = []
    trials: list[Trial] = []
    steps: list[Step] = []
    for step in plan.steps:
        if step.resumes:
            unpredictable.update(step.script.touches)
        found = destroying(step.script, states)
        _check_destructive(step.script, found, states, on_destructive)
        if unpredictable.isdisjoint(step.script.touches):
            positions = [
                n for n, o in enumerate(step.script.operations) if any(o is f for f in found)
            ]
            steps.append(replace(step, discards=frozenset(positions)))
        else:
            steps.append(step)
        for operation in step.script.operations:
            if isinstance(operation, Run):
                unpredictable.update(step.script.touches)
            if operation.table is None or not unpredictable.isdisjoint(operation.tables):
                unpredictable.update(operation.tables)
                continue
            # A table that this very migration makes has no users yet.
            if tables.get(operation.table) is not None:
                told = operation.hazards(states.get(operation.table))
                about = f"{operation.table}: "
                for hazard in told:
                    is_told = operation.table == step.script.table or hazard.startswith(about)
                    warnings.append(f"{step.script}: {'' if is_told else about}{hazard}")
            statement = operation.statement
            asked = None if statement is None else states.get(statement.table)
            try:
                # Of its own tables alone: there may be thousands.
                own = {name: states[name] for name in operation.tables if name in states}
                states |= operation.fold(own)
            except OperationError as exc:
                raise in_script(exc, step.script) from exc
            if statement is not None and asked is not None:
                trials.append(Trial(step.script, operation, statement, asked))
    checked = replace(plan, steps=tuple(steps), warnings=(*plan.warnings, *warnings))
    return checked, tuple(trials)


def _check_destructive(
    script: Script,
    found: Collection[Operation],
    states: Mapping[str, TableState | None],
    policy: OnDestructive,
) -> None:
    if policy is OnDestructive.ALLOW:
        return
    for operation in found:
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
