"""In which order pending migrations go, and which wait for which. Pure.

Each line goes strictly by version, `depends_on` before its dependants, and never two migrations at
once that touch one table. What is pending is `reconcile`'s; what comes of the order is `plan`'s.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from aiomigrate.errors import DependencyError
from aiomigrate.migration.model import Key, Script, Scripts
from aiomigrate.text import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Pending migrations in an order that satisfies every constraint.

    Attributes:
        keys: All of them.
        before: What must be applied before each one starts.
    """

    keys: tuple[Key, ...]
    before: Mapping[Key, Collection[Key]]


def ordered(
    pending: Iterable[Script],
    current: Mapping[str, int],
    scripts: Scripts,
    begun: Collection[Key] = (),
) -> Order:
    """Orders migrations.

    Args:
        pending: What is to run.
        current: The version each line is at, 0 where it is not named.
        scripts: All scripts.
        begun: What an earlier run has begun and not ended: first on its tables, which it changed.

    Raises:
        DependencyError: A dependency will not be met, or dependencies form a cycle.
    """
    pend = {script.key: script for script in pending}
    before = {key: _dependencies(script, pend, current, scripts) for key, script in pend.items()}
    for earlier, later in itertools.pairwise(sorted(pend)):
        if earlier[0] == later[0]:
            before[later].add(earlier)
    keys = _topological(pend, before, begun)
    _serialise_tables(keys, pend, before)
    return Order(keys=tuple(keys), before=before)


def _dependencies(
    script: Script, pend: Mapping[Key, Script], current: Mapping[str, int], scripts: Scripts
) -> set[Key]:
    result: set[Key] = set()
    name = script.source or str(script)
    for line, version in script.depends_on.items():
        where = {"line": script.line, "version": script.version, "path": script.source or None}
        if current.get(line, 0) >= version and scripts.of(line):
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


def _topological(
    pend: Mapping[Key, Script], before: Mapping[Key, set[Key]], begun: Collection[Key]
) -> list[Key]:
    """Returns the keys, prerequisites first; of free ones what was begun, then by version."""

    def place(key: Key) -> tuple[bool, int, str]:
        return (key not in begun, key[1], key[0])

    waiting = {key: len(needs) for key, needs in before.items()}
    followers: dict[Key, list[Key]] = {key: [] for key in pend}
    for key, needs in before.items():
        for need in needs:
            followers[need].append(key)
    free = [place(key) for key, count in waiting.items() if count == 0]
    heapq.heapify(free)
    order: list[Key] = []
    while free:
        _, version, line = heapq.heappop(free)
        order.append((line, version))
        for follower in followers[(line, version)]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heapq.heappush(free, place(follower))
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
