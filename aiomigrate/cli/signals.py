"""Runs a verb's coroutine, and ends it in order on SIGINT and SIGTERM."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, TypeVar

from aiomigrate.cli.command import Call, Exit
from aiomigrate.cli.output import Output
from aiomigrate.cli.progress import Tracker
from aiomigrate.errors import AiomigrateError

if TYPE_CHECKING:
    from aiomigrate.ledger.records import Event
    from aiomigrate.manager import MigrationManager
    from aiomigrate.reporting.status import Status


T = TypeVar("T")


# ---- running it, and being interrupted ----------------------------------------------------------


def run_async(call: Call, work: Callable[[MigrationManager], Awaitable[Exit]]) -> Exit:
    """Runs a verb's coroutine until it ends or a signal does, which is then explained."""
    import anyio

    async def main() -> Exit:
        async with call.manager() as manager:
            caught: list[signal.Signals] = []
            result = await until_signal(lambda: work(manager), caught, call.output)
            if result is not None:
                return result
            ignore_signals()
            await _explain(call, manager, caught[0])
            return Exit.INTERRUPTED if caught[0] is signal.SIGINT else Exit.TERMINATED

    return anyio.run(main)


def ignore_signals() -> None:
    """Lets further signals pass: the process only explains the first one, and ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


_PATIENCE_S = 2.0
"""After an interruption, silence that looks like a command that hangs."""


async def until_signal(
    work: Callable[[], Awaitable[T]], caught: list[signal.Signals], output: Output
) -> T | None:
    """Returns what `work` returns, or `None` when a signal cancelled it first.

    Raises:
        Exception: What `work` raises.
    """
    import anyio

    error: Exception | None = None
    result: T | None = None

    async def reassure() -> None:
        await anyio.sleep(_PATIENCE_S)
        output.note("Stopping: what is in hand is being ended or undone.")

    async def watch(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        try:
            receiver = anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM)
            with receiver as signals:
                task_status.started()
                async for number in signals:
                    again = bool(caught)
                    caught.append(number)
                    scope.cancel()
                    if again:
                        output.note("Still undoing what was in hand; nothing is lost by waiting.")
                    else:
                        group.start_soon(reassure)
        except NotImplementedError:  # Windows: Ctrl-C cancels everything, as asyncio does it
            task_status.started()

    async with anyio.create_task_group() as group:
        scope = anyio.CancelScope()
        await group.start(watch)
        with scope:
            try:
                result = await work()
            except Exception as exc:  # noqa: BLE001 - carried out of the group as it is
                error = exc
        group.cancel_scope.cancel()
    if error is not None:
        raise error
    return result


async def _explain(call: Call, manager: MigrationManager, number: signal.Signals) -> None:
    """Says what an interruption left, read from the database rather than remembered."""
    import anyio

    from aiomigrate.ledger.lease import HOST

    status: Status | None = None
    events: tuple[Event, ...] = ()
    with anyio.move_on_after(10):
        try:
            events = await manager.history()
            status = await manager.get_status()
        except AiomigrateError as exc:
            if call.tracker.seen:
                call.output.note(f"The state could not be read: {exc.what}")
    what = interruption(call.tracker, events, status, process=(HOST, os.getpid()))
    call.output.document(lambda: {"interrupted": number.name, "what": what})
    remedy = "Run `aiomigrate upgrade` to go on." if call.tracker.seen else "Run it again to go on."
    call.output.note(f"Interrupted. {what}\n{remedy}")


def interruption(
    tracker: Tracker, events: Collection[Event], status: Status | None, *, process: tuple[str, int]
) -> str:
    """Returns in words what state an interrupted run left things in. Pure.

    Args:
        tracker: What the run told while it ran.
        events: The journal afterwards.
        status: Lines and lease afterwards, `None` if they could not be read.
        process: Host and id of this process.
    """
    ours = [event for event in events if (event.host, event.pid) == process]
    epoch = max((event.epoch for event in ours), default=0)
    mine = [event for event in ours if event.epoch == epoch]
    holder = status.holder if status is not None else None
    held = holder is not None and (holder.host, holder.pid) == process
    parts = [] if tracker.seen else ["No migration was begun."]
    parts += [
        f"{word.capitalize()}: {_list_of(keys)}."
        for word in ("applied", "rolled back", "failed", "skipped")
        if (keys := tracker.in_state(word))
    ]
    parts += [
        f"{key[0]} {key[1]} was in hand: {_fate(key, mine, unresolved=held)}."
        for key in tracker.in_state("running")
    ]
    if waiting := tracker.in_state("waiting"):
        parts.append(f"Not begun: {_list_of(waiting)}.")
    if status is None:
        parts.append("Who holds the lease could not be read.")
    elif holder is None:
        parts.append("Nothing is locked.")
    elif held:
        parts.append("A commit did not end: the lease is left to expire by itself.")
    else:
        parts.append(f"The lease is held by {holder}.")
    return " ".join(parts)


def _list_of(keys: Collection[tuple[str, int]], most: int = 6) -> str:
    named = [f"{line} {version}" for line, version in keys]
    more = f" and {len(named) - most} more" if len(named) > most else ""
    return ", ".join(named[:most]) + more


def _fate(key: tuple[str, int], events: Collection[Event], *, unresolved: bool) -> str:
    mine = [event for event in events if (event.line, event.version) == key]
    if unresolved:
        return "the next run looks how far it came, and goes on from there"
    if not mine:
        return "it had changed nothing"
    last = mine[-1]
    if last.kind == "applied":
        return "it was applied"
    if last.kind == "failed":
        if foreign := last.detail.get("unresolved"):
            return f"it could not be undone ({foreign})"
        if any(e.kind == "restored" and e.epoch == last.epoch for e in mine):
            return "it was undone"
        changed = any(t.get("before") != t.get("after") for t in last.tables.values())
        return "the next run goes on with it" if changed else "it had changed nothing"
    return "the next run recovers it"
