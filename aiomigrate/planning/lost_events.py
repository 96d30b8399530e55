"""Decides what to record after a journal was opened again at an earlier version. Pure.

The head and the tables show what the lost events recorded: a head row has the version of its line
and the digest of its scripts. Opening the journal again is for `ledger.damage`, recording for
`runs.repair`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from aiomigrate.ledger.history import Journal, pending_cleanup
from aiomigrate.ledger.records import HeadRow
from aiomigrate.migration.model import Script, Scripts
from aiomigrate.planning.reconcile import digest_at
from aiomigrate.planning.table_identity import last_sightings, sightings_before


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairPlan:
    """What to do about lost events.

    Attributes:
        stamps: Lines whose versions are recorded again, as the head has them.
        unclear: One sentence for each line that a person has to check.
    """

    stamps: Mapping[str, int] = field(default_factory=dict)
    unclear: tuple[str, ...] = ()


def plan_repair(
    rows: Iterable[HeadRow],
    journal: Journal,
    scripts: Scripts,
    table_versions: Mapping[str, int],
    *,
    lost: int,
) -> RepairPlan:
    """Returns what to record after events were lost.

    Args:
        rows: The head without lease rows.
        journal: The events that can be read, folded.
        scripts: All migrations.
        table_versions: The latest table_version of each table that they touch, 0 if missing.
        lost: The number of lost events.
    """
    recorded = {row.name: row for row in rows if row.is_ours}
    stamps: dict[str, int] = {}
    unclear: list[str] = []
    for line in scripts.line_names():
        row, current = recorded.get(line), journal.of(line).current
        if row is not None and row.version and row.digest == digest_at(scripts, line, row.version):
            if row.version > current or _has_gap(line, row.version, journal, scripts):
                stamps[line] = current = row.version
        elif row is not None and row.version > current:
            unclear.append(
                f"{line}: the head records version {row.version}, the journal version {current}, "
                "and the scripts are not those that were applied. Check the data, then run "
                f"`aiomigrate stamp --table {line} --to VERSION`."
            )
            continue
        script = _perhaps_begun(line, row, current, journal, scripts) if lost else None
        changed = () if script is None else _changed(script, journal, table_versions)
        if script is not None and changed:
            unclear.append(
                f"{line}: table {', '.join(changed)} was changed after the last event that can "
                f"be read, perhaps by version {script.version}. If that version was applied, "
                f"run `aiomigrate stamp --table {line} --to {script.version}`; if only a part "
                "of it was, correct the data first."
            )
    return RepairPlan(stamps=stamps, unclear=tuple(unclear))


def _has_gap(line: str, version: int, journal: Journal, scripts: Scripts) -> bool:
    applied = journal.of(line).applied
    return any(script.version not in applied for script in scripts.up_to(line, version))


def _perhaps_begun(
    line: str, row: HeadRow | None, current: int, journal: Journal, scripts: Scripts
) -> Script | None:
    """Returns the migration that may have run without events, if running it again may do harm.

    An unchanged migration without code does none: each operation first checks whether its effect
    is already there.
    """
    history = journal.of(line)
    if row is not None and row.version < history.current:  # its rollback had begun
        return scripts.get(line, history.current)
    if history.unfinished is not None and (history.unfinished.started.version or 0) > current:
        started = history.unfinished.started
        script = scripts.get(line, started.version or 0)
        if script is None:
            return None
        return script if script.runs_code or script.checksum != started.checksum else None
    script = next(iter(scripts.after(line, current)), None)
    return script if script is not None and script.runs_code else None


def _changed(
    script: Script, journal: Journal, table_versions: Mapping[str, int]
) -> tuple[str, ...]:
    """Returns the tables of a migration that have commits that no event records."""
    seen = {name: s.table_version for name, s in last_sightings(journal.events).items()}
    unfinished = journal.of(script.line).unfinished
    if unfinished is not None:
        begun = sightings_before(unfinished.started)
        seen |= {name: max(s.table_version, seen.get(name, 0)) for name, s in begun.items()}
    left = pending_cleanup(journal.of(script.line), journal)
    for name in () if left is None else left.detail.get("cleanup", ()):
        seen[name] = seen.get(name, 0) + 1  # the commit that drops its witness columns
    return tuple(t for t in script.touches if table_versions.get(t, 0) > seen.get(t, 0))
