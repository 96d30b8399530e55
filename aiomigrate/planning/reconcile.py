"""Compares head, journal and scripts, and decides the state of each line. Pure.

Another system may have written the head, a crash may have occurred between the writes of journal
and head, and a person may have edited either. This module decides what to do in each case.
`runs.snapshot` and `ledger` read and repair; `planning.plan` orders what is pending.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from aiomigrate.errors import (
    AiomigrateError,
    ChecksumMismatchError,
    DatabaseAheadError,
    LedgerConflictError,
    MissingScriptError,
    OutOfOrderError,
)
from aiomigrate.ledger.history import Journal, LineHistory, Unfinished, pending_cleanup
from aiomigrate.ledger.records import HeadRow, Kind
from aiomigrate.migration.checksum import ALGORITHM, chain_digest
from aiomigrate.migration.model import Script, Scripts, Target


class OnAhead(enum.Enum):
    """What to do when a line is recorded above its newest script."""

    ERROR = "error"
    WARN = "warn"


class Act(enum.Enum):
    """What the holder of the lease must do with a line's head row before migrating."""

    KEEP = "keep"  # nothing: the row is correct
    ENROL = "enrol"  # add the row: it does not exist yet, or was lost
    ADOPT = "adopt"  # accept the version that another system recorded
    REOWN = "reown"  # write the row again: another system rewrote it, with the same version
    LIFT = "lift"  # raise the row to the journal: a crash occurred before the head was written
    IGNORE = "ignore"  # nothing: the line has no script


@dataclass(frozen=True, slots=True, kw_only=True)
class LineState:
    """The state of one line.

    Attributes:
        line: Its name.
        current: Its current version, 0 if no migration is applied.
        latest: The version of its newest script, 0 if it has none.
        act: What must be done with its head row.
        history: Its history according to the journal.
        is_ahead: Whether its version is above its newest script.
        rows: The number of its head rows; duplicates with the same version are merged.
        is_unclean: Whether a rollback crashed before its clean-up. (If an applied migration crashed
            before its clean-up, the head is behind the journal, and `act` covers it.)
    """

    line: str
    current: int
    latest: int
    act: Act
    history: LineHistory
    is_ahead: bool = False
    rows: int = 1
    is_unclean: bool = False

    @property
    def unfinished(self) -> Unfinished | None:
        """The migration that a crash interrupted, `None` if there is none."""
        return self.history.unfinished

    @property
    def needs_lease(self) -> bool:
        """Whether the ledger must be written, even if no migration is pending."""
        if self.act is Act.IGNORE:
            return False
        lost = self.act is Act.ENROL and self.current > 0
        changed = self.act in (Act.ADOPT, Act.REOWN, Act.LIFT)
        return lost or changed or self.rows > 1 or self.is_unclean


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """The state of all lines, and the problems found.

    Attributes:
        lines: The state of each line, sorted by name.
        problems: The errors that prevent a run, by line; of one line, the most important first.
    """

    lines: Mapping[str, LineState]
    problems: tuple[AiomigrateError, ...]

    def raise_first(self) -> None:
        """Raises the first problem, if there is one."""
        if self.problems:
            raise self.problems[0]


def is_at_target(rows: Iterable[HeadRow], scripts: Scripts, to: Target = None) -> bool:
    """Returns whether the head alone proves that there is nothing to do.

    `False` does not mean that something is pending, but that the journal must be read. An invalid
    target also gives `False`: `build_plan` raises its error.
    """
    if not _is_valid_target(scripts, to):
        return False
    recorded: dict[str, HeadRow] = {}
    for found in rows:
        if found.name in recorded and scripts.of(found.name):
            return False
        recorded[found.name] = found
    for line in scripts.line_names():
        target = scripts.target(line, to)
        row = recorded.get(line)
        if row is None:
            if target:
                return False
            continue
        if not row.is_ours or row.version != target or row.version > scripts.latest(line):
            return False
        if row.digest != digest_at(scripts, line, target):
            return False
    return True


def _is_valid_target(scripts: Scripts, to: Target) -> bool:
    if isinstance(to, Mapping):
        return all(
            type(version) is int and scripts.get(line, version) is not None
            for line, version in to.items()
        )
    return to is None or (type(to) is int and to >= 0)


def at_target(scripts: Scripts) -> dict[str, tuple[int, str]]:
    """Returns the version and the chain digest of every line at its newest script."""
    return {
        line: (scripts.latest(line), digest_at(scripts, line, scripts.latest(line)))
        for line in scripts.line_names()
    }


def digest_at(scripts: Scripts, line: str, version: int) -> str:
    """Returns the chain digest of a line at a version, according to the current scripts."""
    return chain_digest((s.version, s.checksum) for s in scripts.up_to(line, version))


def disputed(rows: Sequence[HeadRow], journal: Journal, scripts: Scripts) -> tuple[str, ...]:
    """Returns the lines whose head row was removed or lowered by another system.

    For these lines the journal decides only if the tables match it: the caller compares the live
    tables with `journal.shapes` and passes the differences to `reconcile`.
    """
    recorded = {row.name: row for row in rows}
    result = []
    for line in scripts.line_names():
        current = journal.of(line).current
        row = recorded.get(line)
        if current and (row is None or (not row.is_ours and row.version < current)):
            result.append(line)
    return tuple(result)


def reconcile(
    rows: Sequence[HeadRow],
    journal: Journal,
    scripts: Scripts,
    *,
    on_ahead: OnAhead = OnAhead.ERROR,
    mismatched: Mapping[str, str] | None = None,
) -> Reconciled:
    """Decides the state of every line, and collects problems instead of raising them.

    Args:
        rows: The head without lease rows.
        journal: The folded journal.
        scripts: All scripts.
        on_ahead: Whether a line above its newest script is a problem.
        mismatched: The difference between table and journal, for each `disputed` line that has one.
    """
    by_line: dict[str, list[HeadRow]] = {}
    for row in rows:
        by_line.setdefault(row.name, []).append(row)
    lines: dict[str, LineState] = {}
    problems: list[AiomigrateError] = []
    for line in sorted({*by_line, *journal.lines, *scripts.line_names()}):
        found = by_line.get(line, [])
        try:
            state = _decide_line(
                line, found, journal.of(line), scripts, (mismatched or {}).get(line)
            )
        except LedgerConflictError as exc:
            problems.append(exc)
            continue
        left = pending_cleanup(state.history, journal)
        if left is not None and left.kind == Kind.ROLLED_BACK and left.detail.get("cleanup"):
            state = replace(state, is_unclean=True)
        lines[line] = state
        if state.act is Act.IGNORE:
            continue
        if state.is_ahead and on_ahead is OnAhead.ERROR:
            problems.append(_ahead(state))
        problems.extend(_history_problems(state, scripts))
    lost = lost_lines(lines, scripts)
    if lost and not scripts.all:
        problems.insert(0, _no_scripts(lost))
    return Reconciled(lines=lines, problems=tuple(problems))


def lost_lines(lines: Mapping[str, LineState], scripts: Scripts) -> dict[str, int]:
    """Returns the version of each line that aiomigrate migrated and that has no scripts any more.

    Lines that only other systems recorded are none of them.
    """
    return {
        line: state.current or state.history.current
        for line, state in lines.items()
        if state.history.current and not scripts.of(line)
    }


def missing_parts(
    lost: Mapping[str, int], scripts: Scripts, *, has_database: bool
) -> tuple[str, ...]:
    """Returns one sentence for each thing that is not there and should perhaps be.

    Args:
        lost: The version of each line that has no scripts any more.
        scripts: All scripts.
        has_database: Whether the database exists.
    """
    out = []
    if not has_database:
        out.append(
            "The database does not exist. An upgrade creates it; if it should exist, check its "
            "path (--uri)."
        )
    if not scripts.all:
        out.append(
            "There is no migration script. Check the migrations folder, or write the first script "
            "with `aiomigrate new`."
        )
    out += [
        f"{line} is recorded at version {version}, but none of its scripts exists. Restore them, "
        f"or, if the line has ended, run `aiomigrate stamp --table {line} --to 0`."
        for line, version in sorted(lost.items())
    ]
    return tuple(out)


def _no_scripts(lost: Mapping[str, int]) -> MissingScriptError:
    listed = ", ".join(f"{line} {version}" for line, version in sorted(lost.items()))
    return MissingScriptError(
        f"There is no migration script, but the database records applied versions: {listed}.",
        "Deploy the migrations folder with the application, or correct --migrations.",
    )


def _decide_line(
    line: str,
    rows: Sequence[HeadRow],
    history: LineHistory,
    scripts: Scripts,
    mismatch: str | None,
) -> LineState:
    versions = {row.version for row in rows}
    known = bool(scripts.of(line))
    if len(versions) > 1 and known:
        listed = ", ".join(str(v) for v in sorted(versions))
        raise LedgerConflictError(
            f"The head has several rows for {line!r} with different versions ({listed}).",
            "Determine which version is correct, then run "
            f"`aiomigrate stamp --table {line} --to VERSION`.",
            line=line,
        )
    row = next((r for r in rows if r.is_ours), rows[0] if rows else None)
    act, current = _decide_act(line, row, history, mismatch) if known else (Act.IGNORE, 0)
    if not known and row is not None:
        current = row.version
    latest = scripts.latest(line)
    if (
        act is Act.KEEP
        and row is not None
        and current <= latest  # never replace the digest of newer code
        and (row.digest or "") != digest_at(scripts, line, current)
    ):
        act = Act.LIFT  # so that the next start needs one read to find that it has nothing to do
    return LineState(
        line=line,
        current=current,
        latest=latest,
        act=act,
        history=history,
        is_ahead=known and current > latest,
        rows=len(rows),
    )


def _decide_act(
    line: str, row: HeadRow | None, history: LineHistory, mismatch: str | None
) -> tuple[Act, int]:
    known = history.current
    if row is not None and row.version == known and (row.is_ours or known):
        return (Act.KEEP if row.is_ours else Act.REOWN), known
    if row is not None and row.version > known:
        if not row.is_ours:
            return Act.ADOPT, row.version
        raise LedgerConflictError(
            f"The head says {line!r} is at version {row.version}, the journal says {known}.",
            "The head is never above the journal: one of them was edited or lost. Check the data, "
            f"then run `aiomigrate stamp --table {line} --to VERSION`.",
            line=line,
            version=row.version,
        )
    if mismatch is not None:
        head = "has no row" if row is None else f"says version {row.version}"
        raise LedgerConflictError(
            f"The head {head} for {line!r}, the journal says version {known}, and the data does "
            f"not match the journal: {mismatch}.",
            f"Check the data, then run `aiomigrate stamp --table {line} --to VERSION`.",
            line=line,
            version=known,
        )
    if row is None:
        return Act.ENROL, known
    return (Act.LIFT if known else Act.ADOPT), known


def _ahead(state: LineState) -> DatabaseAheadError:
    return DatabaseAheadError(
        f"{state.line!r} is at version {state.current}, but its newest script is {state.latest}: "
        "the database is newer than this code.",
        "Deploy the code that contains the newer scripts, or allow it with on_ahead=OnAhead.WARN "
        "(`--on-ahead warn`).",
        line=state.line,
        version=state.current,
    )


def _history_problems(state: LineState, scripts: Scripts) -> list[AiomigrateError]:
    problems: list[AiomigrateError] = []
    applied = state.history.applied
    accept = (
        f"or, if the database is correct, accept the current scripts with "
        f"`aiomigrate stamp --table {state.line} --to {state.current}`."
    )
    for script in scripts.up_to(state.line, min(state.current, state.history.current)):
        known = applied.get(script.version)
        name = script.source or str(script)
        where = {"line": state.line, "version": script.version, "path": script.source or None}
        if known is None:
            problems.append(
                OutOfOrderError(
                    f"{name}: version {script.version} of {state.line!r} was added below version "
                    f"{state.history.current}, which is applied.",
                    f"Give it a number above {state.current}, {accept}",
                    **where,  # type: ignore[arg-type]
                )
            )
        elif (
            known.checksum is not None
            and known.algorithm == ALGORITHM
            and known.checksum != script.checksum
        ):
            problems.append(
                ChecksumMismatchError(
                    f"{name}: version {script.version} of {state.line!r} was edited after it was "
                    "applied.",
                    f"Restore the file and put the change into a new migration, {accept}",
                    **where,  # type: ignore[arg-type]
                )
            )
    for version, record in sorted(applied.items()):
        if version > state.latest:
            continue  # newer than this code: see `is_ahead`
        if record.checksum is not None and scripts.get(state.line, version) is None:
            problems.append(
                MissingScriptError(
                    f"Version {version} of {state.line!r} was applied from "
                    f"{record.source or 'a script'}, which no longer exists.",
                    f"Restore the file, {accept}",
                    line=state.line,
                    version=version,
                    path=record.source,
                )
            )
    return problems


def newly_covered(state: LineState, scripts: Scripts) -> dict[str, str | None]:
    """Returns the checksums to record when a line is adopted or stamped, by version as text.

    A migration that aiomigrate applied keeps its checksum. A migration that another system applied
    gets the checksum of its current script. A version without a script has none (`None`).
    """
    result: dict[str, str | None] = {
        str(v): a.checksum for v, a in state.history.applied.items() if v <= state.current
    }
    for script in scripts.up_to(state.line, state.current):
        result.setdefault(str(script.version), script.checksum)
    if state.current:
        result.setdefault(str(state.current), None)
    return result


def pending(state: LineState, scripts: Scripts, to: Target) -> tuple[Script, ...]:
    """Returns the pending scripts of a line, in order; empty if it is at or above its target."""
    target = scripts.target(state.line, to)
    return tuple(s for s in scripts.after(state.line, state.current) if s.version <= target)
