"""Decides from the journal how applied migrations can be undone. Pure.

A migration is undone by its `down` function, by the inverses of its operations, or by restoring its
tables to their table_version before it; the last only while every later commit is known to be
aiomigrate's. `execution.reverser` does it.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from aiomigrate.errors import DependencyError, RollbackRefusedError, TargetError
from aiomigrate.ledger.history import COMMITTING_KINDS, Journal, pending_cleanup
from aiomigrate.ledger.records import Event, Kind
from aiomigrate.migration.model import Key, Script, Scripts
from aiomigrate.operations.base import Missing, Operation
from aiomigrate.planning.destructive import fills_new_columns, mark_existing
from aiomigrate.planning.reconcile import LineState, Reconciled
from aiomigrate.planning.table_identity import Commits, Match, own_commits, spell
from aiomigrate.schema.state import TableState, decode
from aiomigrate.text import nearest, spell_spans


class Way(enum.StrEnum):
    """How a migration is undone."""

    INVERSE = "inverse"  # by operations or by a function; keeps what other writers committed
    RESTORE = "restore"  # by restoring its tables to their table_version before it
    FINISH = "finish"  # by continuing an interrupted rollback


@dataclass(frozen=True, slots=True, kw_only=True)
class Undo:
    """How one migration is undone.

    Attributes:
        way: The way in which it is undone.
        to: The version of its line afterwards.
        operations: The operations to run, in order, for `Way.INVERSE`.
        restores: For `Way.RESTORE`, by table: the table_version that must be its head, and the
            one to return to (0 if the migration created the table).
        discards: Commits of other writers that are discarded because the user allowed it, as ranges
            of table_versions by table.
        branches: The savepoint branches that were kept for it, by table.
    """

    way: Way
    to: int
    operations: tuple[Operation, ...] = ()
    restores: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    discards: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    branches: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> tuple[str, ...]:
        """Returns the steps as text, one line each."""
        if self.way is Way.FINISH:
            return ("continue the interrupted rollback",)
        if self.way is Way.INVERSE:
            lines = [(f"{o.table}: " if o.table else "") + o.describe() for o in self.operations]
        else:
            lines = [
                f"return {table} to table_version {to}" if to else f"remove table {table}"
                for table, (_, to) in sorted(self.restores.items())
            ]
        return tuple(lines) or ("nothing: the migration changed no table",)


def to_undo(
    decided: Reconciled,
    journal: Journal,
    scripts: Scripts,
    to: Mapping[str, int],
) -> tuple[Key, ...]:
    """Returns the migrations to undo, last applied first; empty if every line is at its target.

    Args:
        decided: The state of every line, without problems.
        journal: The folded journal.
        scripts: All scripts.
        to: The target version of each line.

    Raises:
        TargetError: A line is unknown, its target is invalid or above its current version, or a
            migration to undo has no script.
        DependencyError: A migration that is not selected depends on one that is, or was applied
            later to one of its tables.
    """
    order = {(e.line or "", e.version or 0): n for n, e in enumerate(journal.events)
             if e.kind in (Kind.APPLIED, Kind.ADOPTED, Kind.STAMPED)}  # fmt: skip
    chosen: set[Key] = set()
    for line, target in to.items():
        chosen |= _chosen_of(line, target, decided, scripts)
    if dependents := _dependents(chosen, order, decided, scripts):
        raise _dependents_error(dependents, chosen, to, decided)
    return tuple(sorted(chosen, key=lambda key: (-order.get(key, -1), -key[1], key[0])))


def _chosen_of(line: str, target: int, decided: Reconciled, scripts: Scripts) -> set[Key]:
    known = scripts.line_names()
    state = decided.lines.get(line)
    if state is None or line not in known:
        raise TargetError(
            f"There is no migration of {line!r}.",
            f"Lines with migrations: {', '.join(known) or 'none'}.{nearest(line, known)}",
            line=line,
        )
    if not isinstance(target, int) or isinstance(target, bool) or target < 0:
        raise TargetError(f"{target!r} is not a target version.", "Use 0 or more.", line=line)
    if target > state.current:
        raise TargetError(
            f"{line!r} is at version {state.current}, below {target}.",
            "rollback only goes down; use `aiomigrate upgrade` to go up.",
            line=line,
            version=target,
        )
    if target and scripts.get(line, target) is None:
        raise TargetError(
            f"{line!r} has no version {target}.",
            f"Its versions: {', '.join(str(s.version) for s in scripts.of(line))}, or 0.",
            line=line,
            version=target,
        )
    applied = scripts.up_to(line, state.current)
    missing = [v for v in state.history.applied if v > target and scripts.get(line, v) is None]
    if missing:
        raise TargetError(
            f"Version {max(missing)} of {line!r} has no script, so it cannot be undone.",
            f"Choose version {max(missing)} or higher.",
            line=line,
            version=max(missing),
        )
    chosen = {script.key for script in applied if script.version > target}
    left = state.unfinished
    if left is not None and left.started.kind == Kind.ROLLING_BACK:
        chosen.add((line, left.started.version or 0))
    return chosen


def _dependents(
    chosen: Collection[Key], order: Mapping[Key, int], decided: Reconciled, scripts: Scripts
) -> dict[Key, str]:
    """Returns the migrations that cannot stay applied when others are undone, with the reason."""
    applied = [
        script
        for line in scripts.line_names()
        for script in scripts.up_to(line, decided.lines[line].current)
    ]
    by_key = {script.key: script for script in applied}
    undone = set(chosen)
    found: dict[Key, str] = {}
    grows = True
    while grows:
        grows = False
        for script in applied:
            if script.key in undone:
                continue
            if why := _cannot_stay(script, undone, by_key, order):
                found[script.key] = why
                undone.add(script.key)
                grows = True
    return found


def _cannot_stay(
    script: Script, undone: Collection[Key], by_key: Mapping[Key, Script], order: Mapping[Key, int]
) -> str | None:
    for line, version in undone:
        if script.line == line and script.version > version:
            return f"was applied after {line} {version}"
        if script.depends_on.get(line, 0) >= version:
            return f"depends on {line} {script.depends_on[line]}"
        other = by_key.get((line, version))
        shared = set(script.touches) & set(other.touches) if other is not None else set()
        if shared and order.get(script.key, -1) > order.get((line, version), -1):
            return f"was applied to {min(shared)} after {line} {version}"
    return None


def _dependents_error(
    dependents: Mapping[Key, str],
    chosen: Collection[Key],
    to: Mapping[str, int],
    decided: Reconciled,
) -> DependencyError:
    (line, version), why = next(iter(dependents.items()))
    more = f" (and {len(dependents) - 1} more)" if len(dependents) > 1 else ""
    targets = dict(to)
    for name, lowest in sorted({*dependents, *chosen}, reverse=True):
        below = [v for v in decided.lines[name].history.applied if v < lowest]
        targets[name] = min(max(below, default=0), targets.get(name, lowest))
    options = " ".join(f"--to {name}={target}" for name, target in sorted(targets.items()))
    return DependencyError(
        f"{line} {version} {why}, but is not selected for rollback{more}.",
        f"To undo these as well, run: aiomigrate rollback {options}",
        line=line,
        version=version,
    )


def decide(  # noqa: C901 - one case for each way to undo
    script: Script,
    state: LineState,
    journal: Journal,
    heads: Mapping[str, int],
    *,
    allow_destructive: bool,
    unattributed: Collection[str] = (),
    commits: Mapping[str, Commits] | None = None,
) -> Undo:
    """Decides how one migration is undone.

    Args:
        script: The migration, unchanged since it was applied.
        state: The state of its line.
        journal: The folded journal.
        heads: The current table_version of each of its tables, 0 for a missing table.
        allow_destructive: Whether commits of other writers may be discarded.
        unattributed: Tables with commits that are not attributed to a writer yet (see
            `unattributed_tables`).
        commits: The commits of each of its tables that exists.

    Raises:
        RollbackRefusedError: It cannot be undone; the error has the reason and the choices.
    """
    previous = [v for v in state.history.applied if v < script.version]
    to = max(previous, default=0)
    if (finishing := finish(script, state, journal)) is not None:
        return finishing
    applied = _applied_event(script.key, journal)
    was = {} if applied is None else {t: f.get("was", "?") for t, f in applied.tables.items()}
    if applied is not None:
        _refuse_other_tables(script, applied, journal, commits or {})
    operations = inverses(script, was)
    branches = {} if applied is None else dict(applied.detail.get("kept", {}))
    if operations is not None:
        return Undo(way=Way.INVERSE, to=to, operations=operations, branches=branches)
    if applied is None:
        raise _refusal(script, "aiomigrate did not apply it: it was adopted or stamped", [])
    restores: dict[str, tuple[int, int]] = {}
    discards: dict[str, list[tuple[int, int]]] = {}
    for table, facts in applied.tables.items():
        before, after = int(facts["before"]), int(facts.get("after", 0))
        if before == after:
            continue
        if not after:
            raise _refusal(script, f"it dropped table {table}", [])
        if table in unattributed:
            restores[table] = (heads.get(table, 0), before)
            continue
        known, foreign = _follow_commits(script, applied, table, journal)
        foreign = [*((int(a), int(b)) for a, b in facts.get("foreign", ())), *foreign]
        head = heads.get(table, 0)
        if head < known:
            raise _refusal(script, f"table {table} is not the one that it changed", [])
        if head > known:
            foreign.append((known + 1, head))
        if foreign:
            discards[table] = foreign
        restores[table] = (head, before)
    if discards and not allow_destructive:
        spelled = "; ".join(
            f"{table}: table_version {spell_spans(spans)}" for table, spans in discards.items()
        )
        raise _refusal(
            script,
            f"it has no inverse, and other writers committed since ({spelled})",
            ["discard those commits with --allow-destructive (allow_destructive=True)"],
        )
    return Undo(way=Way.RESTORE, to=to, restores=restores, discards=discards, branches=branches)


def _refuse_other_tables(
    script: Script, applied: Event, journal: Journal, commits: Mapping[str, Commits]
) -> None:
    accept = f"`aiomigrate stamp --table {script.line} --to VERSION`"
    for table in sorted(applied.tables.keys() & commits.keys()):
        for sighting in own_commits(journal.events, applied, table):
            match = sighting.compare(commits[table])
            if match is not Match.SAME:
                why = f"{spell(match, table, sighting)}. It was left as it is"
                choice = f"if its data is right, record its version with {accept}"
                raise _refusal(script, why, [choice])


def unattributed_tables(journal: Journal) -> frozenset[str]:
    """Returns the tables on which a crashed process left commits that are not attributed yet."""
    tables: set[str] = set()
    for history in journal.lines.values():
        if history.unfinished is not None:
            tables.update(history.unfinished.savepoints)
        if (left := pending_cleanup(history, journal)) is not None:
            tables.update(left.detail.get("cleanup", ()))
    return frozenset(tables)


def finish(script: Script, state: LineState, journal: Journal) -> Undo | None:
    """Returns how to continue an interrupted rollback of a migration, `None` if there is none."""
    left = state.unfinished
    if left is None or left.started.kind != Kind.ROLLING_BACK:
        return None
    if left.started.version != script.version:
        return None
    applied = _applied_event(script.key, journal)
    was = {} if applied is None else {t: f.get("was", "?") for t, f in applied.tables.items()}
    restores = left.started.detail.get("restores", {})
    return Undo(
        way=Way.FINISH,
        to=int(left.started.detail["to"]),
        operations=() if restores else inverses(script, was) or (),
        restores={table: (int(head), int(to)) for table, (head, to) in restores.items()},
        branches={} if applied is None else dict(applied.detail.get("kept", {})),
    )


def _refusal(script: Script, why: str, choices: Sequence[str]) -> RollbackRefusedError:
    choices = [*choices, "write a new migration that reverts the change, and upgrade"]
    if script.operations and all(o.runs_code for o in script.operations):
        choices.append(
            "write its `down` function, accept the changed script with `aiomigrate stamp "
            f"--table {script.line} --to {script.version}` (only while that is the newest applied "
            "version), and roll back again"
        )
    return RollbackRefusedError(
        f"{script} cannot be undone: {why}. Nothing was changed.",
        "Choose: " + "; or ".join(choices) + ".",
        line=script.line,
        version=script.version,
        path=script.source or None,
    )


def _applied_event(key: Key, journal: Journal) -> Event | None:
    found = None
    for event in journal.events:
        if (event.line, event.version) == key and event.kind in (
            Kind.APPLIED, Kind.ADOPTED, Kind.STAMPED,
        ):  # fmt: skip
            found = event
    return found if found is not None and found.kind == Kind.APPLIED else None


def _follow_commits(
    script: Script, applied: Event, table: str, journal: Journal
) -> tuple[int, list[tuple[int, int]]]:
    """Follows aiomigrate's own commits to a table, starting with those of a migration.

    Returns:
        The table_version after the last of them, and the ranges of table_versions that other
        writers committed between them.

    Raises:
        RollbackRefusedError: A later migration dropped or renamed the table: a table with its name
            is another one.
    """
    position = int(applied.tables[table].get("after", 0))
    foreign: list[tuple[int, int]] = []
    passed = False
    for event in journal.events:
        if event is applied:
            passed = True
            continue
        facts = event.tables.get(table)
        if not passed or not isinstance(facts, Mapping) or event.kind not in COMMITTING_KINDS:
            continue
        before, after = int(facts.get("before", 0)), int(facts.get("after", 0))
        if before and not after:
            raise _refusal(
                script, f"table {table} was dropped or renamed since, with its history", []
            )
        if after <= position or before == after:
            continue
        if before > position:
            foreign.append((position + 1, before))
        foreign += [(int(a), int(b)) for a, b in facts.get("foreign", ())]
        position = after
    return position, foreign


def inverses(script: Script, was: Mapping[str, str | None]) -> tuple[Operation, ...] | None:
    """Returns the operations that undo a migration, `None` if some operation has no inverse.

    Args:
        script: The migration.
        was: The state of each table before it, as text of `schema.state.encode`.
    """
    if script.runs_code:
        functions = [o.undo(None) for o in reversed(script.operations) if o.runs_code]
        if len(functions) == len(script.operations) and all(f is not None for f in functions):
            return tuple(o for found in functions for o in found or ())
        return None
    states: Mapping[str, TableState | None]
    try:
        states = {table: mark_existing(decode(text)) for table, text in was.items()}
    except ValueError:
        return None
    if any(table not in states for o in script.operations for table in o.tables):
        return None
    result: list[Operation] = []
    for operation in script.operations:
        before = states.get(operation.table or "")
        is_passed_over = before is None and operation.when_missing is Missing.SKIP
        undo: Iterable[Operation] | None
        undo = (
            () if is_passed_over or fills_new_columns(operation, before) else operation.undo(before)
        )
        if undo is None:
            return None
        result[:0] = undo
        states = operation.fold(states)
    return tuple(result)
