"""Orders pending migrations and determines which of them wait for which. Pure.

Each line runs strictly by version, a migration runs after those in its `depends_on`, and two
migrations that touch the same table never run at once. `planning.reconcile` decides what is
pending; `planning.plan` builds the plan from the order.
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
        keys: The pending migrations, in this order.
        before: The migrations that must be applied before each one starts.
    """

    keys: tuple[Key, ...]
    before: Mapping[Key, Collection[Key]]


def ordered(
    pending: Iterable[Script],
    current: Mapping[str, int],
    scripts: Scripts,
    begun: Collection[Key] = (),
) -> Order:
    """Orders pending migrations.

    Args:
        pending: The migrations to run.
        current: The version of each line, 0 for a line that is missing.
        scripts: All scripts.
        begun: Migrations that an earlier run started and did not finish. They run first among those
            on their tables, because they have changed them.

    Raises:
        DependencyError: A dependency does not exist or is not part of this run, or dependencies
            form a cycle.
    """
    by_key = {script.key: script for script in pending}
    before = {
        key: _dependencies(script, by_key, current, scripts) for key, script in by_key.items()
    }
    for earlier, later in itertools.pairwise(sorted(by_key)):
        if earlier[0] == later[0]:
            before[later].add(earlier)
    keys = _topological(by_key, before, begun)
    _serialise_tables(keys, by_key, before)
    return Order(keys=tuple(keys), before=before)


def _dependencies(
    script: Script, pending: Mapping[Key, Script], current: Mapping[str, int], scripts: Scripts
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
        if (line, version) not in pending:
            raise DependencyError(
                f"{name} depends on {line!r} version {version}, which this run leaves out.",
                f"Include it with --table {line} or a higher --to.",
                **where,  # type: ignore[arg-type]
            )
        result.add((line, version))
    return result


def _topological(
    pending: Mapping[Key, Script], before: Mapping[Key, set[Key]], begun: Collection[Key]
) -> list[Key]:
    """Returns the keys, prerequisites first; of those that may run, begun ones, then by version."""

    def sort_key(key: Key) -> tuple[bool, int, str]:
        return (key not in begun, key[1], key[0])

    waiting = {key: len(needs) for key, needs in before.items()}
    followers: dict[Key, list[Key]] = {key: [] for key in pending}
    for key, needs in before.items():
        for need in needs:
            followers[need].append(key)
    ready = [sort_key(key) for key, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    order: list[Key] = []
    while ready:
        _, version, line = heapq.heappop(ready)
        order.append((line, version))
        for follower in followers[(line, version)]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heapq.heappush(ready, sort_key(follower))
    if len(order) < len(pending):
        stuck = sorted(key for key, count in waiting.items() if count > 0)
        cycle = _one_cycle(stuck, before)
        raise DependencyError(
            "Dependencies form a cycle: " + " -> ".join(f"{line} {v}" for line, v in cycle) + ".",
            "Remove one of these depends_on entries.",
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
    order: Iterable[Key], pending: Mapping[Key, Script], before: dict[Key, set[Key]]
) -> None:
    """Adds an edge between consecutive migrations that touch the same table."""
    last: dict[str, Key] = {}
    for key in order:
        for table in pending[key].touches:
            if table in last and last[table][0] != key[0]:
                before[key].add(last[table])
            last[table] = key
