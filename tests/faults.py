"""Ports that fail: subclasses of the LanceDB port, injected by tests and never shipped.

A fault is told as data, so that it can be sent to another process: which call, before or after it
took effect, and what happens there.
"""

from __future__ import annotations

import datetime as dt
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio

from aiomigrate.manager import MigrationManager
from aiomigrate.store.connection import Store

T = TypeVar("T")

Hook = Callable[[str, str], Awaitable[None]]
"""Awaited with the verb and the table of a call."""


@dataclass(frozen=True)
class Fault:
    """What happens at one LanceDB call.

    Attributes:
        action: `kill`, `stop` (SIGSTOP to itself), `cancel`, `count`, `fail` or `reset`
            (raises although the store has applied it); `slow` (that call and every later one takes
            effect late), `late` (cancelled, and that call takes effect 0.4 s later),
            `disk` (no file takes a byte from now on), `readonly` (nothing can
            be written any more), `clock` (the wall clock jumps by days).
        at: At the n-th matching call, from 1.
        when: `before` or `after` the call took effect.
        mutations: Whether only mutating calls count.
        verb: Only calls of this verb count.
        table: Only calls on this table count.
        signal_file: Touched when the fault strikes.
    """

    action: str = "count"
    at: int = 0
    when: str = "after"
    mutations: bool = True
    verb: str = ""
    table: str = ""
    signal_file: str = ""


class FaultyStore(Store):
    """Counts calls and strikes at one of them."""

    fault = Fault()
    calls: list[tuple[str, str]]
    scope: anyio.CancelScope | None = None
    wall_offset = dt.timedelta()
    late_s = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = []

    @classmethod
    def wall(cls) -> dt.datetime:
        """Returns what the wall clock shows, which a fault may have moved."""
        return dt.datetime.now(dt.UTC) + cls.wall_offset

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
    ) -> T:
        async def late() -> T:
            await anyio.sleep(type(self).late_s)
            return await run()

        fault = self.fault
        counts = (mutates or not fault.mutations) and fault.table in ("", table)
        strikes = False
        if counts and (not fault.verb or verb == fault.verb):
            self.calls.append((verb, table))
            strikes = len(self.calls) == fault.at
        if strikes and fault.when == "before":
            self._strike(verb, table)
        is_late = mutates and type(self).late_s
        result = await super().call(verb, table, late if is_late else run, mutates=mutates)
        if strikes and fault.when == "after":
            self._strike(verb, table)
        if strikes and fault.action == "late":
            type(self).late_s = 0.0
        return result

    def _strike(self, verb: str, table: str) -> None:  # noqa: C901 - one case for each action
        if self.fault.signal_file:
            Path(self.fault.signal_file).write_text(f"{verb} {table}")
        match self.fault.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "cancel":
                assert self.scope is not None
                self.scope.cancel()
            case "late":
                assert self.scope is not None
                type(self).late_s = 0.4  # longer than is waited for, shorter than a lease lives
                self.scope.cancel()
            case "slow":
                type(self).late_s = 0.1
            case "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            case "readonly":
                _forbid_writing(Path(self._location))
            case "clock":
                type(self).wall_offset = dt.timedelta(days=self.fault.at - 30)
            case "fail":
                raise RuntimeError(f"injected at {verb} {table}")
            case "reset":
                from aiomigrate.errors import StoreError

                raise StoreError(f"connection reset at {verb} {table}", "Try again.")
            case _:
                pass


def _forbid_writing(folder: Path) -> None:
    """Takes this process's right to write away, or, if it is not the superuser, everyone's."""
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)  # nobody
        return
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o555)


def faulty_manager(fault: Fault) -> type[MigrationManager]:
    """Returns a manager class whose port has the fault."""

    class Faulty(FaultyStore):
        pass

    Faulty.fault = fault

    class FaultyManager(MigrationManager):
        _store_type = Faulty

    return FaultyManager


class Died(BaseException):
    """The process is dead. Nothing handles that."""


class _CarriedError(Exception):
    """Brings `Died` out of the task in which a mutation is settled."""


class DyingStore(Store):
    """Dies at its n-th mutating call: that call and every later one raise `Died`.

    A killed process without the process: whatever still runs can reach the database no more.
    """

    at = 0
    when = "before"
    calls: list[tuple[str, str]]
    is_dead = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = []

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
    ) -> T:
        if self.is_dead:
            raise Died
        strikes = False
        if mutates:
            self.calls.append((verb, table))
            strikes = len(self.calls) == self.at
        if strikes and self.when == "before":
            self.is_dead = True
            raise Died
        result = await super().call(verb, table, run, mutates=mutates)
        if strikes:
            self.is_dead = True
        if self.is_dead:
            raise Died
        return result

    async def settle(self, table: str, run: Callable[[], Awaitable[T]]) -> T:
        async def carrying() -> T:
            try:
                return await run()
            except Died as exc:
                raise _CarriedError from exc

        if self.is_dead:
            raise Died
        try:
            return await super().settle(table, carrying)
        except _CarriedError:
            raise Died from None


def dying_manager(at: int = 0, when: str = "before") -> type[MigrationManager]:
    """Returns a manager class that dies before or after its n-th mutating call, 0 for never."""
    store = type("Dying", (DyingStore,), {"at": at, "when": when})
    return type("DyingManager", (MigrationManager,), {"_store_type": store})


class WatchedStore(Store):
    """Has something else happen right before each mutating call is made, or right after it."""

    before: Hook | None = None
    after: Hook | None = None

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
    ) -> T:
        if mutates and self.before is not None:
            await self.before(verb, table)
        result = await super().call(verb, table, run, mutates=mutates)
        if mutates and self.after is not None:
            await self.after(verb, table)
        return result


def watched_manager(
    *, before: Hook | None = None, after: Hook | None = None
) -> type[MigrationManager]:
    """Returns a manager class that is told of its mutating calls."""
    hooks = {"before": before and staticmethod(before), "after": after and staticmethod(after)}
    return type("WatchedManager", (MigrationManager,), {
        "_store_type": type("Watched", (WatchedStore,), hooks)
    })  # fmt: skip
