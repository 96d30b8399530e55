"""Checks a plan against the live tables before anything is written. Pure.

It predicts what each operation does to its table; `runs.snapshot` asks LanceDB whether it accepts
the SQL of the operations.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from aiomigrate.errors import DestructiveError, OperationError
from aiomigrate.migration.model import Script
from aiomigrate.operations.base import Operation
from aiomigrate.planning.destructive import destroying, keeps_savepoint
from aiomigrate.planning.plan import Plan, Step
from aiomigrate.schema.sql import Statement
from aiomigrate.schema.state import TableState


class OnDestructive(enum.Enum):
    """What to do with steps that discard data or structure."""

    KEEP = "keep"  # run them and keep a savepoint of each table; refuse them where none can be kept
    ALLOW = "allow"  # run them and keep no savepoint
    REFUSE = "refuse"  # refuse them


@dataclass(frozen=True, slots=True)
class Trial:
    """The SQL of an operation, to be tried on an empty table before anything is written.

    Attributes:
        script: The migration.
        operation: Its operation.
        statement: The SQL.
        state: The predicted state of its table before the operation.
    """

    script: Script
    operation: Operation
    statement: Statement
    state: TableState

    def refused(self, why: str) -> OperationError:
        """Returns the error for SQL that LanceDB rejects, with the reason `why`."""
        quoted = '"' in (self.statement.where or "")
        hint = " Write names of columns in `backticks`, and texts in 'single quotes'."
        columns = ", ".join(f.name for f in self.state.fields())
        error = self.operation.refuse(
            f"LanceDB rejects its SQL: {why}.",
            f"Correct the SQL.{hint if quoted else ''} At that point, the columns of "
            f"{self.statement.table!r} are {columns}.",
        )
        return in_script(error, self.script)


def check_operations(  # noqa: C901 - one pass over the plan, with the states that it predicts
    plan: Plan,
    tables: Mapping[str, TableState | None],
    on_destructive: OnDestructive = OnDestructive.KEEP,
) -> tuple[Plan, tuple[Trial, ...]]:
    """Predicts the effect of every operation on the live tables, to find mistakes beforehand.

    Operations cannot be predicted after a `Run` on the tables that it may touch, nor on tables of a
    migration that a crash interrupted; these are checked when they run. Double quotes in the
    expressions of these are found here too.

    Args:
        plan: The plan.
        tables: The state of each table that the plan touches, `None` for a missing one.
        on_destructive: Whether steps may discard existing data or structure.

    Returns:
        The plan, with warnings about operations that break running code or open handles; and the
        SQL that LanceDB must still check.

    Raises:
        OperationError: An operation does not fit the predicted state of its table, or its SQL
            expressions contain double quotes.
        DestructiveError: A step discards data or structure, and `on_destructive` does not allow it.
    """
    states = dict(tables)
    unpredictable: set[str] = set()
    warnings: list[str] = []
    trials: list[Trial] = []
    steps: list[Step] = []
    for step in plan.steps:
        _check_expressions(step.script)
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
            if operation.runs_code:
                unpredictable.update(step.script.touches)
            if operation.table is None or not unpredictable.isdisjoint(operation.tables):
                unpredictable.update(operation.tables)
                continue
            # A table that does not exist yet has no users.
            if tables.get(operation.table) is not None:
                prefix = f"{operation.table}: "
                for hazard in operation.hazards(states.get(operation.table)):
                    is_named = operation.table == step.script.table or hazard.startswith(prefix)
                    warnings.append(f"{step.script}: {'' if is_named else prefix}{hazard}")
            statement = operation.statement
            before = None if statement is None else states.get(statement.table)
            try:
                # Only the operation's own tables: there may be thousands of others.
                own = {name: states[name] for name in operation.tables if name in states}
                states |= operation.fold(own)
            except OperationError as exc:
                raise in_script(exc, step.script) from exc
            if statement is not None and before is not None:
                trials.append(Trial(step.script, operation, statement, before))
    checked = replace(plan, steps=tuple(steps), warnings=(*plan.warnings, *warnings))
    return checked, tuple(trials)


def _check_expressions(script: Script) -> None:
    for operation in script.operations:
        try:
            operation.check_expressions()
        except OperationError as exc:
            raise in_script(exc, script) from exc


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
            f"existing data or structure, and {why}.",
            "To allow it, pass --allow-destructive (on_destructive=OnDestructive.ALLOW).",
            line=script.line,
            version=script.version,
            path=script.source or None,
        )


def in_script(exc: OperationError, script: Script) -> OperationError:
    """Returns the error with the script that caused it."""
    name = script.source or str(script)
    return OperationError(
        f"{name}: {exc.what}",
        exc.remedy,
        line=script.line,
        version=script.version,
        path=script.source or None,
    )
