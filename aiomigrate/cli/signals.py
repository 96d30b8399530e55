"""Runs the coroutine of a verb, and cancels it on SIGINT and SIGTERM.

After an interruption it shows the state of the database. Undoing or finishing the running
migrations is done by `runs` and `execution`.
"""

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


def run_async(call: Call, work: Callable[[MigrationManager], Awaitable[Exit]]) -> Exit:
    """Runs the coroutine of a verb and returns its exit code.

    On SIGINT or SIGTERM the coroutine is cancelled, and the state of the database is shown.

    Args:
        call: The call of the command.
        work: The coroutine function of the verb; called with an open manager.

    Raises:
        Exception: The exception that `work` raised.
    """
    import anyio

    async def main() -> Exit:
        async with call.manager() as manager:
            caught: list[signal.Signals] = []
            result = await until_signal(lambda: work(manager), caught, call.output)
            if result is not None:
                return result
            ignore_signals()
            await _show_interruption(call, manager, caught[0])
            return Exit.INTERRUPTED if caught[0] is signal.SIGINT else Exit.TERMINATED

    return anyio.run(main)


def ignore_signals() -> None:
    """Ignores further signals, while the process shows the state and ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


_STOPPING_NOTE_AFTER_S = 2.0
"""Seconds after an interruption until a note says that the command has not hung."""


async def until_signal(
    work: Callable[[], Awaitable[T]], caught: list[signal.Signals], output: Output
) -> T | None:
    """Returns the result of `work`, or `None` if a signal cancelled it first.

    Args:
        work: The coroutine function.
        caught: Receives every signal that arrives, in order.
        output: Where notes about the interruption are shown.

    Raises:
        Exception: The exception that `work` raised.
    """
    import anyio

    error: Exception | None = None
    result: T | None = None

    async def note_stopping() -> None:
        await anyio.sleep(_STOPPING_NOTE_AFTER_S)
        output.note("Stopping: running migrations are being finished or undone.")

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
                        output.note("Still finishing or undoing running migrations; please wait.")
                    else:
                        group.start_soon(note_stopping)
        except NotImplementedError:  # Windows: asyncio cancels everything on Ctrl-C
            task_status.started()

    async with anyio.create_task_group() as group:
        scope = anyio.CancelScope()
        await group.start(watch)
        with scope:
            try:
                result = await work()
            except Exception as exc:  # noqa: BLE001 - raised outside of the task group
                error = exc
        group.cancel_scope.cancel()
    if error is not None:
        raise error
    return result


async def _show_interruption(call: Call, manager: MigrationManager, number: signal.Signals) -> None:
    """Shows the state after an interruption, as read from the database within 10 s."""
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
    what = interruption_text(call.tracker, events, status, process=(HOST, os.getpid()))
    call.output.document(lambda: {"interrupted": number.name, "what": what})
    verb = "`aiomigrate upgrade`" if call.tracker.seen else "the command again"
    call.output.note(f"Interrupted. {what}\nRun {verb} to continue.")


def interruption_text(
    tracker: Tracker, events: Collection[Event], status: Status | None, *, process: tuple[str, int]
) -> str:
    """Returns the state in which an interrupted run left the database, as text. Pure.

    Args:
        tracker: The progress of the run.
        events: The journal after the interruption.
        status: Lines and lease after the interruption; `None` if they could not be read.
        process: Host and process id of this process.
    """
    own = [event for event in events if (event.host, event.pid) == process]
    epoch = max((event.epoch for event in own), default=0)
    of_run = [event for event in own if event.epoch == epoch]
    holder = status.holder if status is not None else None
    held = holder is not None and (holder.host, holder.pid) == process
    parts = [] if tracker.seen else ["No migration was started."]
    parts += [
        f"{word.capitalize()}: {_list_of(keys)}."
        for word in ("applied", "rolled back", "failed", "skipped")
        if (keys := tracker.in_state(word))
    ]
    parts += [
        f"{key[0]} {key[1]} was running: {_result_text(key, of_run, unresolved=held)}."
        for key in tracker.in_state("running")
    ]
    if waiting := tracker.in_state("waiting"):
        parts.append(f"Not started: {_list_of(waiting)}.")
    if status is None:
        parts.append("The holder of the lease could not be read.")
    elif holder is None:
        parts.append("The lease is free.")
    elif held:
        parts.append("A commit did not finish, so the lease was kept until it expires.")
    else:
        parts.append(f"The lease is held by {holder}.")
    return " ".join(parts)


def _list_of(keys: Collection[tuple[str, int]], most: int = 6) -> str:
    named = [f"{line} {version}" for line, version in keys]
    more = f" and {len(named) - most} more" if len(named) > most else ""
    return ", ".join(named[:most]) + more


def _result_text(key: tuple[str, int], events: Collection[Event], *, unresolved: bool) -> str:
    """Returns what became of a migration that was running, from its journal entries."""
    entries = [event for event in events if (event.line, event.version) == key]
    if unresolved:
        return "the next run checks how far it got and continues from there"
    if not entries:
        return "it had changed nothing"
    last = entries[-1]
    if last.kind == "applied":
        return "it was applied"
    if last.kind == "failed":
        if foreign := last.detail.get("unresolved"):
            return f"it could not be undone ({foreign})"
        if any(e.kind == "restored" and e.epoch == last.epoch for e in entries):
            return "it was undone"
        changed = any(t.get("before") != t.get("after") for t in last.tables.values())
        return "the next run continues it" if changed else "it had changed nothing"
    return "the next run recovers it"
