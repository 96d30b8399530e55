"""Ports that fail: subclasses of the LanceDB port, injected by tests and never shipped.

A fault is told as data, so that it can be sent to another process: which call, before or after it
took effect, and what happens there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio

from aiomigrate.lance import Store
from aiomigrate.manager import MigrationManager

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """What happens at one LanceDB call.

    Attributes:
        action: `kill`, `stop` (SIGSTOP to itself), `cancel`, `count`, `fail` or `reset`
            (raises although the store has applied it).
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = []

    async def call(
        self, verb: str, table: str, run: Callable[[], Awaitable[T]], *, mutates: bool = False
    ) -> T:
        fault = self.fault
        counts = (mutates or not fault.mutations) and fault.table in ("", table)
        strikes = False
        if counts and (not fault.verb or verb == fault.verb):
            self.calls.append((verb, table))
            strikes = len(self.calls) == fault.at
        if strikes and fault.when == "before":
            self._strike(verb, table)
        result = await super().call(verb, table, run, mutates=mutates)
        if strikes and fault.when == "after":
            self._strike(verb, table)
        return result

    def _strike(self, verb: str, table: str) -> None:
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
            case "fail":
                raise RuntimeError(f"injected at {verb} {table}")
            case "reset":
                from aiomigrate.errors import StoreError

                raise StoreError(f"connection reset at {verb} {table}", "Try again.")
            case _:
                pass


def faulty_manager(fault: Fault) -> type[MigrationManager]:
    """Returns a manager class whose port has the fault."""

    class Faulty(FaultyStore):
        pass

    Faulty.fault = fault

    class FaultyManager(MigrationManager):
        _store_type = Faulty

    return FaultyManager
