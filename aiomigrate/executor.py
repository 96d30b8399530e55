"""One migration: run its operations, record it, or have it undone.

The order of writes is the protocol: `started` and each commit's announcement (durable) before the
commit, `applied` before anything of ours is removed, the head last. One operation is `applier`,
going back is `recovery`; which migrations run, and when, is for `runner`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel

from aiomigrate import events as ev
from aiomigrate.applier import Applier, Progress, witness_name
from aiomigrate.checksum import ALGORITHM
from aiomigrate.clock import Clock
from aiomigrate.context import Context
from aiomigrate.effects import Effect, shape_effect
from aiomigrate.errors import (
    AiomigrateError,
    KeepsProgressError,
    LeaseLostError,
    MigrationTimeoutError,
    OperationError,
    OverwriteLostError,
    StoreError,
    TableVersionGoneError,
    UnresolvedError,
)
from aiomigrate.fold import Unfinished
from aiomigrate.foresight import foreseen
from aiomigrate.lance import Opened, Store, Table
from aiomigrate.model import Event, HeadRow, Kind, Params, Script
from aiomigrate.operations.base import Operation, TableState
from aiomigrate.operations.data import Run
from aiomigrate.operations.tables import CreateTable
from aiomigrate.places import Place, Places
from aiomigrate.recovery import Recovery, Work, event_of, intended
from aiomigrate.report import Outcome, StepReport
from aiomigrate.savepoint import branch_name, drop_branch, is_ours
from aiomigrate.telemetry import LEDGER, OPERATION, Telemetry
from aiomigrate.together import each
from aiomigrate.touched import Touched
from aiomigrate.undo import destroys
from aiomigrate.writer import Writer


@dataclass(frozen=True, slots=True)
class _Uncleaned:
    """A migration that is done, and whose savepoint branches go once that is durable."""

    version: int
    branches: Mapping[str, str]
    opened: Mapping[str, Table]
    is_durable: anyio.Event


class Executor:
    """Runs migrations under one lease."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        *,
        params: Params,
        digest_at: Callable[[str, int], str],
        clock: Clock,
        log: Any,
        timeout_s: float | None,
        concurrency: int,
        keeps: bool,
        progress: Progress,
        telemetry: Telemetry,
    ) -> None:
        """Binds to the writer whose lease everything happens under.

        Args:
            store: The database.
            writer: The holder's ledger writer.
            params: The run's parameters.
            digest_at: Returns a line's chain digest at a version.
            clock: Clocks.
            log: Bound logger.
            timeout_s: Seconds one migration may take.
            concurrency: How many migrations may operate at once.
            keeps: Whether savepoints of destructive migrations are kept.
            progress: Told how steps proceed.
            telemetry: Told of everything that takes time.
        """
        self._store = store
        self._writer = writer
        self._params = params
        self._digest_at = digest_at
        self._clock = clock
        self._log = log
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._places = Places(concurrency)
        self._progress = progress
        self._telemetry = telemetry
        self._keeps = keeps
        self._just_seen: dict[str, tuple[float, Opened | None]] = {}
        self._ran_code = False
        self._uncleaned: dict[str, _Uncleaned] = {}
        self.applier = Applier(store, writer.check, progress=progress, log=log)
        lease = writer.lease
        self.recovery = Recovery(
            store,
            self.applier,
            self.record,
            check=writer.check,
            branch_of=lambda script: branch_name(lease.epoch, lease.owner, script),
            log=log,
        )

    async def run(
        self,
        script: Script,
        unfinished: Unfinished | None,
        ready_at: float,
        *,
        depended_s: float = 0.0,
        is_retry: bool = False,
    ) -> StepReport:
        """Runs one migration to its end: applied, or undone and failed.

        Waits for a slot first. On cancellation what was committed is undone under a shield, then
        cancellation goes on.

        Args:
            script: The migration.
            unfinished: What an earlier attempt left, if it did not end.
            ready_at: Monotonic time since when its wait counts.
            depended_s: Seconds of that wait that were for what it depends on.
            is_retry: Whether an earlier attempt failed: what it could not remove is looked for.

        Raises:
            LeaseLostError: Another process has the lease; nothing was undone.
            AiomigrateError: The ledger cannot be written.
        """
        log = self._log.bind(table=script.line, version=script.version)
        limit = anyio.CancelScope()
        place = Place(self._places, limit, self._clock)
        # What is quickly done lets others in while it waits for the journal: then many announce
        # themselves in one commit.
        work = Work(script, is_quick=_is_quick(script), depended_s=depended_s)
        work.place = place if work.is_quick else None
        try:
            async with place:  # not held while waiting for the journal at the end
                work.started_s = self._clock.monotonic()
                work.waited_s = work.started_s - ready_at
                log.debug(ev.STEP_STARTED, description=script.description)
                if self._timeout_s is not None:
                    limit.deadline = anyio.current_time() + self._timeout_s
                with limit:
                    with self._writer.working():
                        if unfinished is not None:
                            self.forget((*script.touches, *unfinished.savepoints))
                            await self.recovery.recover(work, unfinished)
                        elif is_retry:
                            for name in script.touches:
                                await self.recovery.drop_leftovers(script, name)
                        await self._begin(work)
                    await each(
                        chains(script.operations, work.done),
                        partial(self._operate, work, log),
                        at_once=self._concurrency,
                    )
                    # A function that swallowed its cancellation is not done.
                    await anyio.lowlevel.checkpoint_if_cancelled()
            failure = self._too_slow(script) if limit.cancelled_caught else None
        except anyio.get_cancelled_exc_class():
            if self._writer.error is not None:
                raise  # not ours any more: hands off
            with anyio.CancelScope(shield=True):
                await self._undo(work, None, log)
            raise
        except Exception as exc:
            if isinstance(exc, LeaseLostError) or self._writer.error is not None:
                raise
            failure = exc
        finally:
            work.waited_s += place.waited_s
            work.started_s += place.waited_s
            for touched in work.tables.values():
                touched.ended = True  # a task that the function left behind may write no more
        result: StepReport
        with anyio.CancelScope(shield=True):
            if failure is None:
                result = await self._finish(work, log)
            else:
                result = await self._undo(work, failure, log)
        return result

    def _too_slow(self, script: Script) -> Exception:
        return MigrationTimeoutError(
            f"{script} took longer than {self._timeout_s:g} s.",
            "Raise the timeout per migration, or make the migration smaller.",
            line=script.line,
            version=script.version,
        )

    # ---- forward --------------------------------------------------------------------------------

    async def _begin(self, work: Work) -> None:
        await self.touch(work)
        if not work.resumed:
            _check(work.script, work.tables)
            await self._start(work)

    async def _operate(self, work: Work, log: Any, chain: Sequence[int]) -> None:
        """Runs some of a migration's operations, given by position, one after another."""
        script = work.script
        with self._writer.working(), work.beside():
            for number, position in enumerate(chain):
                operation = script.operations[position]
                words = operation.describe()
                work.doing = in_hand(words)
                await self._foresee(work, chain[number:])
                self._progress(script, words, len(work.done), len(script.operations))
                try:
                    await self._apply(work, position, log)
                except Exception:
                    work.doing = in_hand(words)  # not what another chain has in hand
                    raise
                work.done |= {position}
                # Durable before the next commit of its table, with whose announcement it goes.
                work.held_back = [e for e in work.held_back if e.kind != Kind.ADVANCED]
                if len(work.done) < len(script.operations):
                    done = event_of(script, Kind.ADVANCED, detail=advance(work.done))
                    work.held_back.append(done)

    async def _foresee(self, work: Work, left: Sequence[int]) -> None:
        """Lets a table know what is about to be done to it, if that is more than one commit."""
        script = work.script
        first = script.operations[left[0]]
        touched = work.tables.get(first.table or "")
        if touched is None or touched.is_announced or (len(left) == 1 and first.shows):
            return
        of_table = itertools.takewhile(
            lambda position: _is_foreseeable(script.operations[position], first.table), left
        )
        named = (
            (script.operations[position], _witness_of(script, position)) for position in of_table
        )
        touched.ahead = await foreseen(named, touched.state)

    async def _apply(self, work: Work, position: int, log: Any) -> None:
        script = work.script
        operation = script.operations[position]
        facts = {"db.operation.name": work.doing, "db.collection.name": operation.table or ""}
        with self._telemetry.span(OPERATION, facts):
            if isinstance(operation, Run):
                await self.run_function(work, operation, log)
            else:
                touched = work.tables[operation.table or ""]
                witness = _witness_of(script, position)
                await self.applier.apply(operation, touched, script, witness)

    async def touch(self, work: Work) -> None:
        """Opens every table that a migration touches."""
        tables = {
            name: Touched(
                self._store,
                name,
                guard=self._writer.check,
                announce=self._announcer(work),
                others=work.tables,
            )
            for name in work.script.touches
        }

        async def opened(touched: Touched) -> None:
            is_seen, known = self._seen(work, touched.name)
            if not (is_seen and known is None):  # else it was not there, as a new `Touched` says
                await touched.open(known, is_latest=work.is_quick and not self._ran_code)
            if touched.name in work.savepoints:
                await touched.resume_from(work.savepoints[touched.name])

        await each(tables.values(), opened)
        work.tables |= tables  # only now: what is not opened yet has no state to be told of

    def know(self, seen: Mapping[str, Opened | None], at_s: float) -> None:
        """Takes over tables as they were seen a moment ago, by nobody but whom we know of.

        Args:
            seen: What was seen, by table; `None` where there was none.
            at_s: Monotonic time of it.
        """
        self._just_seen |= {name: (at_s, opened) for name, opened in seen.items()}

    def forget(self, names: Iterable[str]) -> None:
        """Looks at tables anew when their turn comes: something is about to commit to them."""
        for name in names:
            self._just_seen.pop(name, None)

    async def state_of(self, name: str) -> tuple[int, TableState | None]:
        """Returns table_version and state of a table, as it was a moment ago if it was seen then.

        Raises:
            StoreError: It exists but cannot be opened.
        """
        at_s, opened = self._just_seen.get(name, (0.0, None))
        if opened is not None and self._clock.monotonic() - at_s < _JUST_S:
            return opened.version, opened.state
        return await self._store.state_of(name)

    def _seen(self, work: Work, name: str) -> tuple[bool, Opened | None]:
        """Returns whether a table was looked at a moment ago, and what was there.

        To a migration that is quickly done that is good enough: its first commit tells if others
        came between, as it does of those that come right after a look. That there was none is good
        enough for one that begins by making it; code may have made it through its own connection.
        """
        at_s, opened = self._just_seen.pop(name, (-math.inf, None))
        is_fresh = self._clock.monotonic() - at_s < _JUST_S and not work.savepoints
        if opened is None:
            first = next(iter(work.script.operations), None)
            is_fresh = is_fresh and isinstance(first, CreateTable) and first.table == name
        return is_fresh, opened if is_fresh else None

    def _leave(self, work: Work) -> None:
        now = self._clock.monotonic()
        while self._just_seen:  # oldest first
            name, (at_s, _) = next(iter(self._just_seen.items()))
            if now - at_s < _JUST_S:
                break
            del self._just_seen[name]
        self.know({t.name: t.opened for t in work.tables.values() if t.opened is not None}, now)

    async def _start(self, work: Work) -> None:
        script = work.script
        declared = [o for o in script.operations if not isinstance(o, Run)]
        needing = {o.table for o in declared if o.needs_savepoint and o.table}
        names = script.touches if script.runs_code else sorted(needing)
        lease = self._writer.lease
        # Written before they exist: after a crash this is the only pointer to them.
        work.branches = {
            name: branch_name(lease.epoch, lease.owner, script)
            for name in names
            if work.tables[name].state is not None
        }
        started = event_of(
            script,
            Kind.STARTED,
            description=script.description,
            checksum=script.checksum,
            algorithm=ALGORITHM,
            source=script.source,
            tables={t.name: {"before": t.before} for t in work.tables.values()},
            detail={"branches": work.branches},
        )
        # Each is made before the first commit to its table: what is never changed needs none.
        for name in work.branches:
            work.tables[name].protect = partial(self._protect, work, name)
        if all(map(_is_plain, script.operations)):
            work.held_back.append(started)  # the first commit's announcement takes it along
        else:
            await self.record(work, started)

    async def _protect(self, work: Work, name: str) -> None:
        """Makes the savepoint branch of one table."""
        branch, touched = work.branches[name], work.tables[name]
        work.protected |= {name}
        await self._writer.check()
        try:
            await touched.table.create_branch(branch, touched.before)
        except TableVersionGoneError:
            # Others committed, and cleaned up: it could not be returned to in any case.
            work.protected -= {name}
            return
        try:
            await self._writer.check()
        except (LeaseLostError, anyio.get_cancelled_exc_class()):
            if self._writer.error is not None:
                # Paused on the way: the next holder may have looked for it already.
                with anyio.CancelScope(shield=True):
                    await drop_branch(self._store, name, branch)
            raise

    async def run_function(self, work: Work, operation: Run, log: Any) -> None:
        """Runs a migration's function with a context.

        Raises:
            OperationError: It raised `CancelledError` or `SystemExit` by itself.
            Exception: What it raised.
        """
        script = work.script
        applied: list[Operation] = []

        async def apply(inner: Operation, touched: Touched) -> None:
            witness = witness_name(script, inner, applied)
            applied.append(inner)
            await self.applier.apply(inner, touched, script, witness)

        context = Context(
            script,
            work.tables,
            params=self._params,
            connection=self._store.connection,
            log=log,
            apply=apply,
            progress=lambda done, total: self._progress(script, "running", done, total),
        )
        self._ran_code = True
        try:
            await operation.function(context)
            work.acted = context.took_connection or any(t.commits for t in work.tables.values())
        except anyio.get_cancelled_exc_class() as exc:
            await anyio.lowlevel.checkpoint_if_cancelled()  # the run's own goes on
            raise OperationError(
                f"{operation.describe()} raised {type(exc).__name__}, but nobody cancelled it.",
                "Await tasks that were cancelled with contextlib.suppress(CancelledError).",
            ) from exc
        except SystemExit as exc:
            raise OperationError(
                f"{operation.describe()} called sys.exit({exc.code!r}).",
                "Raise an error to make the migration fail, or return.",
            ) from exc

    def _announcer(self, work: Work) -> Any:
        async def announce(
            table: str, base: int, effects: Sequence[Effect], foreign: Sequence[tuple[int, int]]
        ) -> None:
            held_back, work.held_back = work.held_back, []
            events = [
                intended(work.script, table, base + n, effect, foreign, foreseen=n > 0)
                for n, effect in enumerate(effects)
            ]
            await self.record(work, *held_back, *events)

        return announce

    async def record(self, work: Work, *events: Event) -> None:
        """Makes events durable, and counts the time that takes.

        Raises:
            LeaseLostError: Another process has taken over.
            LedgerError: The journal cannot be written.
        """
        lent = work.place.lent() if work.place else contextlib.nullcontext()
        with self._telemetry.span(LEDGER, {"aiomigrate.events": len(events)}):
            async with lent:
                begun = self._clock.monotonic()
                await self._writer.record(*events)
                waited_s = self._clock.monotonic() - begun
                work.ledger_s += waited_s / max(1, work.abreast)

    async def _finish(self, work: Work, log: Any) -> StepReport:
        script = work.script
        ran_s = max(0.0, self._clock.monotonic() - work.started_s - work.ledger_s)
        await self.clean_line(script.line)
        cleanup = [t.name for t in work.tables.values() if t.state and t.state.witnesses()]
        if not work.is_quick and any(t.version != t.before for t in work.tables.values()):
            with self._writer.working(), contextlib.suppress(StoreError):
                there = [t for t in work.tables.values() if t.state is not None]
                work.size = await _size(there)
        report = self.report(work, Outcome.APPLIED, ran_s)
        made = work.made_branches()
        was = {t.name: t.was for t in work.tables.values()}
        destroyed = destroys(script, was) if made and self._keeps else ()
        told: dict[str, Any] = {
            "cleanup": cleanup,
            "branches": {t: b for t, b in made.items() if t not in destroyed},
            "kept": {t: b for t, b in made.items() if t in destroyed},
            "told": work.told(),
            "depended_s": work.depended_s,
        }
        applied = event_of(
            script,
            Kind.APPLIED,
            at=self._clock.wall(),  # it may be written with a later commit
            description=script.description,
            checksum=script.checksum,
            algorithm=ALGORITHM,
            source=script.source,
            tables=work.facts(),
            waited_s=work.waited_s,
            ran_s=ran_s,
            ledger_s=work.ledger_s,
            rows=report.rows,
            commits=report.commits,
            retries=report.retries,
            size=work.size,
            detail={key: value for key, value in told.items() if value},
        )
        branches = told["branches"]
        opened = {
            name: handle.table
            for name in branches
            if (handle := work.tables[name].opened) is not None
        }
        # A crash that loses it costs a look: what is done is found done, or set to the same values
        # once more, and code that did nothing is run again. And nothing is committed before it is
        # durable: that would be announced, later in the same journal.
        if cleanup or work.acted:
            await self.record(work, applied)
            await self.clean(script.line, script.version, cleanup, branches, opened)
            self.lift(script.line, script.version)
        elif branches:
            is_durable = self._writer.follow(applied)
            self._uncleaned[script.line] = _Uncleaned(script.version, branches, opened, is_durable)
        else:
            self._writer.follow(applied, lifts=self._head_row(script.line, script.version))
        if not (cleanup or script.runs_code):  # else it is not as it was seen
            self._leave(work)
        if work.ledger_s != report.ledger_s:
            report = replace(report, ledger_s=work.ledger_s)
        log.info(
            ev.STEP_APPLIED,
            description=script.description,
            waited_s=round(report.waited_s, 4),
            ran_s=round(report.ran_s, 4),
            ledger_s=round(report.ledger_s, 4),
            rows=report.rows,
            commits=report.commits,
            retries=report.retries,
            tables={t: f"{b} -> {a}" for t, (b, a) in report.tables.items()},
        )
        return report

    async def clean(
        self,
        line: str,
        version: int,
        tables: list[str],
        branches: Mapping[str, str],
        opened: Mapping[str, Table] | None = None,
    ) -> None:
        """Removes what a recorded migration needed only while it ran, and records those commits.

        The head follows only afterwards, so that a crash here is seen and made good.

        Raises:
            LeaseLostError: Another process has taken over.
        """
        if cleaned := await self.applier.clean(tables, branches, opened):
            await self._record_cleaned(line, version, cleaned)

    async def clean_line(self, line: str) -> None:
        """Cleans after the last migration of a line, if that is still to be done.

        Before the next one ends, so there is one at most, the last that the journal has: whoever
        comes after a crash looks for no other. And when none follows at once. Shielded.

        Raises:
            LeaseLostError: Another process has taken over.
        """
        left = self._uncleaned.pop(line, None)
        if left is None or self._writer.error is not None:
            return
        with anyio.CancelScope(shield=True):
            await self._writer.ripen(left.is_durable)
            await self.clean(line, left.version, [], left.branches, left.opened)
            self.lift(line, left.version)

    async def clean_after(self, ended: Event) -> None:
        """Cleans after a migration whose process may have died before, or while, it did so.

        Args:
            ended: Its `applied` or `rolled_back` event, after which nothing else was recorded.

        Raises:
            LeaseLostError: Another process has taken over.
        """
        tables = list(ended.detail.get("cleanup", []))
        self.forget(tables)
        cleaned = await self.applier.clean(tables, ended.detail.get("branches", {}))
        for name in tables:
            after = int(ended.tables.get(name, {}).get("after", 0))
            if name not in cleaned and await self._was_cleaned(name, after):
                cleaned[name] = {"before": after, "after": after + 1}
        if cleaned:
            await self._record_cleaned(ended.line or "", ended.version or 0, cleaned)

    async def _was_cleaned(self, name: str, after: int) -> bool:
        """Returns whether the commit after a table_version is the one that cleaned it."""
        table = await self._store.find(name)
        if table is None:
            return False
        try:
            state = await (await table.at(after)).state()
        except TableVersionGoneError:
            return False
        effect = shape_effect(state.with_fields(state.fields()))
        return await is_ours(self._store, name, after, effect)

    async def _record_cleaned(self, line: str, version: int, tables: Mapping[str, Any]) -> None:
        event = Event(
            lease="", epoch=0, seq=0, at=self._clock.wall(), kind=Kind.CLEANED,
            line=line, version=version, tables=tables,
        )  # fmt: skip
        await self._writer.record(event)

    def lift(self, line: str, version: int) -> None:
        """Lets the head follow to a version the journal holds."""
        self._writer.lift(self._head_row(line, version))

    def _head_row(self, line: str, version: int) -> HeadRow:
        digest = self._digest_at(line, version)
        return self._writer.lease.row(line, version, at=self._clock.wall(), digest=digest)

    def report(self, work: Work, outcome: Outcome, ran_s: float, **more: Any) -> StepReport:
        """Returns what came of a migration."""
        tables = work.tables.values()
        return StepReport(
            line=work.script.line,
            version=work.script.version,
            description=work.script.description,
            outcome=outcome,
            depended_s=work.depended_s,
            waited_s=work.waited_s,
            ran_s=ran_s,
            ledger_s=work.ledger_s,
            rows=sum(t.rows for t in tables),
            commits=sum(t.commits for t in tables),
            retries=sum(t.retries for t in tables),
            size=work.size,
            tables=work.versions(),
            told=work.told(),
            resumed=work.resumed,
            **more,
        )

    # ---- back -----------------------------------------------------------------------------------

    async def _undo(self, work: Work, exc: Exception | None, log: Any) -> StepReport:
        """Returns every table to where it was, if all commits since are ours, and records it."""
        script = work.script
        outcome = Outcome.CANCELLED if exc is None else Outcome.FAILED
        error = exc if isinstance(exc, AiomigrateError) else None
        restored = False
        under_way = self._store.abandoned & work.tables.keys()
        if under_way:
            # A mutation may still commit under us: whoever takes the lease next recovers.
            log.warning(ev.COMMIT_UNRESOLVED, tables=sorted(under_way))
        # A resumed migration stays where it is, and the next run goes on from there again.
        elif not isinstance(exc, UnresolvedError) and not work.goes_on:
            try:
                restored = await self.recovery.undo(work)
            except UnresolvedError as unresolvable:
                error = unresolvable
        why = "cancelled" if exc is None else failure_text(exc, self._store, work.doing)
        trace = "" if exc is None else failure_trace(exc, self._store)
        unresolved_now = isinstance(error, UnresolvedError)
        if unresolved_now:
            log.error(ev.STEP_UNRESOLVED, error=str(error))
        is_back = not (unresolved_now or work.goes_on or under_way)
        events = []
        if is_back:
            events.append(event_of(script, Kind.RESTORED))
        detail: dict[str, Any] = {"cancelled": True} if exc is None else {}
        if unresolved_now and error is not None:
            detail["unresolved"] = str(error)
        ran_s = self._clock.monotonic() - work.started_s
        events.append(
            event_of(
                script,
                Kind.FAILED,
                description=script.description,
                checksum=script.checksum,
                algorithm=ALGORITHM,
                source=script.source,
                tables={t: {"before": b, "after": a} for t, (b, a) in work.versions().items()},
                waited_s=work.waited_s,
                ran_s=ran_s,
                error=trace or why,
                detail=detail,
            )
        )
        await self.record(work, *events)
        await self.clean_line(script.line)
        if is_back:
            await self.applier.clean([], work.made_branches())
        log.error(
            ev.STEP_FAILED, error=why, restored=restored, unresolved=unresolved_now,
            ran_s=round(ran_s, 4),
        )  # fmt: skip
        remedy = _remedy(work, exc, error)
        if unresolved_now and error is not None and exc is not error:
            why = f"{why} {error.what}"
        if is_back and script.runs_code and (moved := await self._moved(work)):
            why = (
                f"{why} (Table {', '.join(moved)} was changed meanwhile by others, or through "
                "ctx.connection; that was left as it is.)"
            )
        if under_way:
            why = f"{why} A commit to {', '.join(sorted(under_way))} is still under way."
            remedy = "Run again: the next run looks how far it came."
        return self.report(work, outcome, ran_s, error=why, remedy=remedy)

    async def _moved(self, work: Work) -> list[str]:
        """Returns the tables that were committed to since, though not by the migration."""
        found = []
        for touched in work.tables.values():
            table = await self._store.find(touched.name)
            live = 0 if table is None else await table.version()
            if not touched.commits and live != touched.version:
                found.append(touched.name)
        return found


def chains(operations: Sequence[Operation], done: Collection[int]) -> list[list[int]]:
    """Returns what is to be run at once, and in which order within each. Pure.

    Operations of one table stay in order. Those of others wait for each other only where one
    may need another to have succeeded: where a table is dropped, code runs, work is paid for, or an
    operation concerns more than one table.

    Args:
        operations: Of a migration.
        done: Positions of those that are complete.

    Returns:
        Chains of positions.
    """
    left = [position for position in range(len(operations)) if position not in done]
    if not all(_stands_alone(operation) for operation in operations):
        return [left] if left else []
    by_table: dict[str | None, list[int]] = {}
    for position in left:
        by_table.setdefault(operations[position].table, []).append(position)
    return list(by_table.values())


def _is_foreseeable(operation: Operation, table: str | None) -> bool:
    return _is_plain(operation) and operation.table == table


def _witness_of(script: Script, position: int) -> str:
    return witness_name(script, script.operations[position], script.operations[:position])


def _is_plain(operation: Operation) -> bool:
    """Returns whether an operation is neither code nor work that is paid for."""
    return not isinstance(operation, Run) and operation.identity is None


def _stands_alone(operation: Operation) -> bool:
    return (
        _is_plain(operation)
        and (operation.needs_savepoint or not operation.traits.destructive)
        and operation.tables == (operation.table,)
    )


def advance(done: Collection[int]) -> dict[str, Any]:
    """Returns what an `advanced` event tells of the operations that are complete. Pure.

    Args:
        done: Their positions.
    """
    count = next(number for number in itertools.count() if number not in done)
    also = sorted(position for position in done if position > count)
    return {"operations": count, **({"also": also} if also else {})}


def _is_quick(script: Script) -> bool:
    """Returns whether a migration neither rewrites rows nor runs code."""
    return not any(o.traits.rewriting or isinstance(o, Run) for o in script.operations)


async def _size(tables: Iterable[Touched]) -> int:
    """Returns of how many bytes the data of some tables consists."""
    sizes: list[int] = []

    async def one(touched: Touched) -> None:
        sizes.append(await touched.table.size())

    await each(tables, one)
    return sum(sizes)


def _check(script: Script, tables: Mapping[str, Touched]) -> None:
    """Folds the operations over the live tables before the first commit."""
    states: dict[str, TableState | None] = {name: t.state for name, t in tables.items()}
    for operation in script.operations:
        if isinstance(operation, Run):
            return
        states = operation.fold(states)


def _remedy(work: Work, exc: Exception | None, error: AiomigrateError | None) -> str:
    """Returns what to do after a failure."""
    if isinstance(exc, OverwriteLostError):
        return exc.remedy  # unchanged, it goes on where it was
    remedy = error.remedy if error else "Correct the migration and run again."
    if work.goes_on and not isinstance(error, (UnresolvedError, KeepsProgressError)):
        remedy = f"{remedy} What it has done is kept: the next run goes on from there."
    return remedy


def in_hand(words: str) -> str:
    """Returns what an operation does, short enough to begin an error."""
    return words if len(words) <= _WORDS else f"{words[:_WORDS]}..."


_JUST_S = 1.0
_WORDS = 80


def failure_text(exc: BaseException, store: Store, doing: str = "") -> str:
    """Returns a failure in one sentence, without secrets.

    Args:
        exc: What was raised.
        store: Knows the secrets.
        doing: The operation in hand, in words.
    """
    leaf = exc
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    told = exc.what if isinstance(exc, AiomigrateError) else f"{type(leaf).__name__}: {leaf}"
    is_told = not doing or doing.removesuffix("...") in told
    return store.scrub(told if is_told else f"{doing!r}: {told}")


def failure_trace(exc: BaseException, store: Store) -> str:
    """Returns a failure as the journal keeps it, without secrets."""
    if isinstance(exc, (OperationError, KeepsProgressError)):
        return store.scrub(str(exc))
    return store.scrub("".join(traceback.format_exception(exc)))
