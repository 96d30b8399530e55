"""Going back: undoing a failed migration, and making good what a crash left of one.

Decides from the journal which commits are known to be ours; whatever is not stops it. The
restores themselves are `savepoint`; running forward is `executor`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiomigrate import events as ev
from aiomigrate.applier import Applier
from aiomigrate.effects import Effect, shape_effect
from aiomigrate.errors import (
    OperationError,
    StoreError,
    TableVersionGoneError,
    UnresolvedError,
)
from aiomigrate.fold import Unfinished, standing
from aiomigrate.lance import Store
from aiomigrate.model import NOT_YET, Event, Kind, Script
from aiomigrate.operations.base import TableState
from aiomigrate.operations.stored import encode
from aiomigrate.places import Place
from aiomigrate.savepoint import (
    Guard,
    drop_branch,
    is_branch_of,
    is_ours,
    restore_fenced,
    uncover,
    unresolved,
    vacate,
)
from aiomigrate.touched import Touched


@dataclass(eq=False)
class Work:
    """One attempt at one migration.

    Attributes:
        script: The migration.
        is_quick: Whether it neither rewrites rows nor runs code.
        place: Its place among those that operate, if it lends it while it waits for the journal.
        tables: The tables it touches, opened, by name.
        done: Positions of the operations that are known to be complete.
        doing: The operation in hand, in words; empty before the first.
        resumed: Whether it goes on where a dead process was.
        acted: Whether code of it did what a crash must not make it do again, as far as we know.
        savepoints: table_version of each table when it was first begun, where it is resumed.
        branches: Savepoint branch by table, made or to be made.
        protected: The tables whose branch was made.
        held_back: Events to be written with the next commit's announcement, which needs them.
        abreast: How many of its operations are in hand.
        depended_s: Seconds spent waiting for what it depends on.
        waited_s: Seconds spent waiting for that and for its place.
        ledger_s: Seconds spent waiting for the journal, shared out among the operations in hand.
        size: Bytes of data that its tables hold afterwards, `None` where that is not measured.
        started_s: Monotonic time when it began.
    """

    script: Script
    is_quick: bool = False
    place: Place | None = None
    tables: dict[str, Touched] = field(default_factory=dict)
    done: frozenset[int] = frozenset()
    doing: str = ""
    resumed: bool = False
    acted: bool = False
    savepoints: Mapping[str, int] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    protected: frozenset[str] = frozenset()
    held_back: list[Event] = field(default_factory=list)
    abreast: int = 0
    depended_s: float = 0.0
    waited_s: float = 0.0
    ledger_s: float = 0.0
    size: int | None = None
    started_s: float = 0.0

    @property
    def goes_on(self) -> bool:
        """Whether a failure leaves it where it is, for the next run to go on."""
        return self.resumed or any(t.keeps_progress for t in self.tables.values())

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Counts one more operation in hand, inside."""
        self.abreast += 1
        try:
            yield
        finally:
            self.abreast -= 1

    def made_branches(self) -> dict[str, str]:
        """Returns the savepoint branch by table, of those that were made."""
        return {table: b for table, b in self.branches.items() if table in self.protected}

    def versions(self) -> dict[str, tuple[int, int]]:
        """Returns each table's table_version before and after."""
        return {t.name: (t.before, t.version) for t in self.tables.values()}

    def told(self) -> dict[str, dict[str, Any]]:
        """Returns what operations tell of their work, by table."""
        return {t.name: t.told for t in self.tables.values() if t.told}

    def facts(self) -> dict[str, Any]:
        """Returns what an `applied` event tells of the tables."""
        return {t.name: _facts(t) for t in self.tables.values()}


def _facts(touched: Touched) -> dict[str, Any]:
    told: dict[str, Any] = {
        "before": touched.before,
        "after": touched.version if touched.state is not None else 0,
        "shape": touched.shape,
    }
    if touched.commits or touched.before != touched.version:
        told["was"] = encode(touched.was)
    if touched.foreign:
        told["foreign"] = [list(span) for span in touched.foreign]
    return told


Record = Callable[..., Awaitable[None]]
"""Makes events of a `Work` durable: `await record(work, *events)`."""


def event_of(script: Script, kind: Kind, **facts: Any) -> Event:
    """Returns an event of a migration; the writer fills in where, and when unless it is given."""
    return Event(
        lease="", epoch=0, seq=0, kind=kind,
        line=script.line, version=script.version, **{"at": NOT_YET, **facts},
    )  # fmt: skip


def intended(
    script: Script,
    table: str,
    base: int,
    effect: Effect,
    foreign: Sequence[tuple[int, int]] = (),
    *,
    foreseen: bool = False,
) -> Event:
    """Returns the announcement of a commit.

    Args:
        script: The migration that makes it.
        table: The table.
        base: The table_version it is computed from.
        effect: What it does, as `savepoint.is_ours` knows it again.
        foreign: table_versions that others are known to have committed before.
        foreseen: Whether it follows the one announced before it, if all goes as foreseen.
    """
    detail = {"table": table, "base": base, "effect": dict(effect), "foreign": list(foreign)}
    if foreseen:
        detail["foreseen"] = True
    return event_of(script, Kind.INTENDED, detail=detail)


class Recovery:
    """Returns tables to where a migration found them, when that discards nothing of others."""

    def __init__(
        self,
        store: Store,
        applier: Applier,
        record: Record,
        *,
        check: Guard,
        branch_of: Callable[[Script], str],
        log: Any,
    ) -> None:
        """Binds to a database.

        Args:
            store: The database.
            applier: For fencing and cleaning.
            record: Writes events of a migration.
            check: Raises unless the lease is safely ours.
            branch_of: Returns what this holder calls the savepoint branches of a migration.
            log: Bound logger.
        """
        self._branch_of = branch_of
        self._store = store
        self._applier = applier
        self._record = record
        self._check = check
        self._log = log

    async def undo(self, work: Work) -> bool:
        """Returns every table to where it was; whether anything had to be done.

        Raises:
            UnresolvedError: Others committed since, or a table could not be looked at.
        """
        changed = [t for t in work.tables.values() if t.commits]
        try:
            for touched in changed:
                table = await self._store.find(touched.name)
                live = 0 if table is None else await table.version()
                foreign = list(touched.foreign)
                if live != touched.version:
                    foreign.append((touched.version + 1, max(live, touched.version + 1)))
                if table is None and touched.version:
                    raise UnresolvedError(
                        f"{work.script}: table {touched.name!r} was dropped by someone else.",
                        "Find out why, then correct the migration and run again.",
                        line=work.script.line,
                        version=work.script.version,
                    )
                if foreign:
                    raise unresolved(work.script, touched.name, touched.before, foreign)
            back = [t for t in changed if t.version not in (0, t.before)]
            # Announced first: a crash after the restore must not take its commit for another's.
            if back:
                await self._record(work, *[_going_back(work.script, t) for t in back])
            for touched in back:
                touched.version = await self._return(
                    work.script,
                    touched.name,
                    touched.before,
                    touched.version,
                    protected=touched.name in work.protected,
                )
        except StoreError as exc:
            raise UnresolvedError(
                f"{work.script} failed and could not be undone: {exc.what}",
                "Correct the cause and run again: the next run undoes it.",
                line=work.script.line,
                version=work.script.version,
            ) from exc
        return bool(back)

    async def _return(
        self, script: Script, table: str, to: int, head: int, *, protected: bool
    ) -> int:
        if not to:
            return await vacate(self._store, table, head=head, guard=self._check, script=script)
        return await restore_fenced(
            self._store,
            table,
            to=to,
            head=head,
            guard=self._check,
            script=script,
            protected=protected,
        )

    async def recover(self, work: Work, unfinished: Unfinished) -> None:
        """Decides what to do with a migration that was started and neither applied nor undone.

        Unchanged operations go on where the journal says (each looks for its own effect first).
        Anything else is returned to its savepoints, if every commit since is known to be ours.

        Raises:
            UnresolvedError: Others committed in between: a person must decide.
        """
        script = work.script
        self._log.info(
            ev.STEP_RECOVERING,
            table=script.line,
            version=script.version,
            savepoints=dict(unfinished.savepoints),
        )
        effects = [intent.detail["effect"]["do"] for intent in unfinished.intents]
        going_back = "restore" in effects or "vacate" in effects
        if unfinished.started.checksum == script.checksum and not (script.runs_code or going_back):
            await self._resume(work, unfinished, done=unfinished.done_of(len(script.operations)))
            return
        if "fill" in effects and not going_back and await self._fits(script):
            # Corrected, and what was paid for is in the table: each operation looks how far it is.
            await self._resume(work, unfinished, done=frozenset())
            return
        restores: list[tuple[str, int, int]] = []
        for table, savepoint in unfinished.savepoints.items():
            head = await self._owned_head(script, unfinished, table, savepoint)
            if head is not None:
                restores.append((table, savepoint, head))
        if restores:
            await self._record(
                work,
                *[intended(script, t, head, _back_effect(to)) for t, to, head in restores],
            )
        branches = unfinished.started.detail.get("branches", {})
        for table, to, head in restores:
            # The first commit is announced before its savepoint is kept.
            kept = table in branches and head != to
            await self._return(script, table, to, head, protected=kept)
        for name in branches:  # before the event: after it nobody looks for them
            await self.drop_leftovers(script, name)
        await self._record(work, event_of(script, Kind.RESTORED))
        self._log.info(
            ev.STEP_RESTORED,
            table=script.line,
            version=script.version,
            tables={table: to for table, to, _ in restores},
        )
        # A restore fences what it returned. Only now: a commit of ours before the event would be
        # taken for someone else's if we died too.
        await self._applier.fence(
            unfinished.savepoints.keys() - {table for table, _, _ in restores}
        )

    async def _fits(self, script: Script) -> bool:
        """Returns whether a corrected migration can begin with its tables as they are."""
        if script.runs_code:
            return False
        states = {name: (await self._store.state_of(name))[1] for name in script.touches}
        try:
            for operation in script.operations:
                states = operation.fold(states)
        except OperationError:
            return False
        return True

    async def _resume(self, work: Work, unfinished: Unfinished, *, done: frozenset[int]) -> None:
        script = work.script
        work.done = done
        work.resumed = True
        work.savepoints = unfinished.savepoints
        work.branches = dict(unfinished.started.detail.get("branches", {}))
        await self._protect(work)
        for intent in unfinished.intents:
            if intent.detail["effect"]["do"] == "overwrite":
                await uncover(
                    self._store,
                    intent.detail["table"],
                    base=int(intent.detail["base"]),
                    witness=intent.detail["effect"]["witness"],
                    guard=self._check,
                    script=script,
                )

        await self.fence_resumed(work, unfinished)

    async def _protect(self, work: Work) -> None:
        """Keeps the savepoints of a migration that is gone on with, by branches of our own.

        Those of its dead process go: it may only be paused, and removes them when it wakes.
        """
        mine = self._branch_of(work.script)
        for name in list(work.branches):
            table = await self._store.find(name)
            if table is None:
                continue
            try:
                await self._check()
                await table.create_branch(mine, work.savepoints[name])
                work.branches[name] = mine
                work.protected |= {name}
            except TableVersionGoneError:  # there is nothing to keep
                del work.branches[name]
            await self.drop_leftovers(work.script, name, but=mine)

    async def drop_leftovers(self, script: Script, name: str, *, but: str = "") -> None:
        """Deletes the savepoint branches that attempts at a migration left on a table.

        Raises:
            LeaseLostError: Another process has taken over.
            StoreError: They could not be listed or deleted.
        """
        table = await self._store.find(name)
        for left in [] if table is None else await table.branches():
            if left != but and is_branch_of(left, script):
                await self._check()
                await drop_branch(self._store, name, left)

    async def fence_resumed(self, work: Work, unfinished: Unfinished) -> None:
        """Fences what a dead process may have in flight, on tables that are gone on with."""

        async def announce(table: str, base: int, state: TableState) -> None:
            await self._record(work, intended(work.script, table, base, shape_effect(state)))

        # Not where a restore was announced: whether that is done is told by the version.
        restored = {
            i.detail["table"]
            for i in unfinished.intents
            if i.detail["effect"]["do"] in ("restore", "vacate")
        }
        restores = unfinished.started.detail.get("restores", {})
        await self._applier.fence(unfinished.savepoints.keys() - restored - set(restores), announce)

    async def return_table(self, work: Work, table: str, to: int, head: int) -> None:
        """Returns a table that an applied migration changed, unless that was done already.

        Args:
            work: The undoing.
            table: The table.
            to: The table_version to return to, 0 to take it away.
            head: The table_version that was its head when it was decided.

        Raises:
            UnresolvedError: Others have committed since.
        """
        found = await self._store.find(table)
        live = 0 if found is None else await found.version()
        if live > head and await is_ours(self._store, table, head, _back_effect(to)):
            return
        await self._record(work, intended(work.script, table, head, _back_effect(to)))
        await self._return(work.script, table, to, head, protected=False)

    async def _owned_head(
        self, script: Script, unfinished: Unfinished, table: str, savepoint: int
    ) -> int | None:
        """Returns the table_version to restore from, `None` if there is nothing to undo.

        Where a commit was announced and not made, there is: a paused process may be about to make
        it, and nothing but a restore refuses a late append (facts: 12).

        Raises:
            UnresolvedError: A commit since the savepoint is not known to be ours.
        """
        found = await self._store.find(table)
        head = 0 if found is None else await found.version()
        known, last = standing(i for i in unfinished.intents if i.detail["table"] == table)
        if not last or head == 0:
            return None  # every commit is announced: none of ours was made, or nothing is left
        expected = savepoint or int((*known, *last)[0].detail["base"])
        several = False  # whether the commit before was of a kind that makes several
        for intent in (*known, *last):
            base = int(intent.detail["base"])
            effect = intent.detail["effect"]["do"]
            going_back = effect in ("restore", "vacate")  # what came before was checked then
            if intent.detail.get("foreign"):
                spans = [(int(a), int(b)) for a, b in intent.detail["foreign"]]
                raise unresolved(script, table, savepoint, spans)
            if base > expected and not (going_back or several):
                raise unresolved(script, table, savepoint, [(expected + 1, base)])
            expected = base + 1
            several = effect == "optimize"
        made = int(last[0].detail["base"])
        for intent in last:
            effect = intent.detail["effect"]
            if head == made:
                return head  # not made, and perhaps told with the one before
            if not await is_ours(self._store, table, made, effect):
                break
            if effect["do"] in ("restore", "vacate"):
                return None  # it is back; what was committed on top of that stays
            made += 1
        else:
            if head == made or several:
                return head
        raise unresolved(script, table, savepoint, [(made + 1, head)])


def _back_effect(to: int) -> dict[str, Any]:
    return {"do": "restore", "to": to} if to else {"do": "vacate"}


def _going_back(script: Script, touched: Touched) -> Event:
    return intended(script, touched.name, touched.version, _back_effect(touched.before))
