"""Undoes failed migrations, and recovers migrations that a crash interrupted.

Finds out from the journal which commits a migration made; any other commit stops the recovery. The
restores themselves are in `commits.savepoints`; applying operations is in `execution.executor`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiomigrate import events as ev
from aiomigrate.commits.commit_identity import matches_announcement
from aiomigrate.commits.effects import shape_effect
from aiomigrate.commits.savepoints import (
    Guard,
    drop_branch,
    is_branch_of,
    restore_fenced,
    restore_overwritten,
    unresolved,
    vacate,
)
from aiomigrate.commits.table_target import TableTarget
from aiomigrate.errors import OperationError, StoreError, TableVersionGoneError, UnresolvedError
from aiomigrate.execution.applier import Applier
from aiomigrate.execution.attempt import Attempt, Recorder, announcement, event_of
from aiomigrate.execution.ownership import claim_of, goes_back
from aiomigrate.ledger.history import Unfinished
from aiomigrate.ledger.records import Event, Kind
from aiomigrate.migration.model import Script
from aiomigrate.planning.table_identity import Match, Sighting, sightings_before, spell
from aiomigrate.schema.state import TableState
from aiomigrate.store.commit_log import commit_times
from aiomigrate.store.connection import Store
from aiomigrate.store.table import Table


class Recovery:
    """Restores tables to their savepoints, if that discards no foreign commit."""

    def __init__(
        self,
        store: Store,
        applier: Applier,
        recorder: Recorder,
        *,
        check: Guard,
        branch_of: Callable[[Script], str],
        log: Any,
    ) -> None:
        """Binds to a database without I/O.

        Args:
            store: The database.
            applier: Fences pending schema changes.
            recorder: Writes the events of a migration.
            check: Raises `LeaseLostError` unless this process safely holds the lease.
            branch_of: Returns this holder's name for the savepoint branches of a migration.
            log: Bound logger.
        """
        self._branch_of = branch_of
        self._store = store
        self._applier = applier
        self._recorder = recorder
        self._check = check
        self._log = log

    async def undo(self, attempt: Attempt) -> bool:
        """Restores every table that an attempt has changed to its savepoint.

        The restores are announced first. After a crash in between, the next holder completes them.

        Returns:
            Whether any table was restored; `False` if no commit was made.

        Raises:
            LeaseLostError: Another process has taken over.
            UnresolvedError: Other writers committed since, or LanceDB failed.
        """
        changed = [t for t in attempt.tables.values() if t.commits]
        try:
            for target in changed:
                table = await self._store.find(target.name)
                live = 0 if table is None else await table.version()
                foreign = list(target.foreign)
                if live != target.version:
                    foreign.append((target.version + 1, max(live, target.version + 1)))
                if table is None and target.version:
                    raise UnresolvedError(
                        f"{attempt.script}: table {target.name!r} was dropped by another writer.",
                        "Find out why, then correct the migration and run again.",
                        line=attempt.script.line,
                        version=attempt.script.version,
                    )
                if table is not None and not foreign:
                    seen = Sighting(target.version, *target.committed)
                    await _refuse_other_table(attempt.script, table, seen)
                if foreign:
                    raise unresolved(attempt.script, target.name, target.before, foreign)
            back = [t for t in changed if t.version not in (0, t.before)]
            # Announced first, so that after a crash the restore is not taken for a foreign commit.
            if back:
                await self._recorder.record(
                    attempt, *[_restore_announcement(attempt.script, t) for t in back]
                )
            for target in back:
                target.record_restore(
                    await self._restore(
                        attempt.script,
                        target.name,
                        target.before,
                        target.version,
                        protected=target.name in attempt.protected,
                    )
                )
        except StoreError as exc:
            raise UnresolvedError(
                f"{attempt.script} failed and could not be undone: {exc.what}",
                "Correct the cause and run again: the next run undoes it.",
                line=attempt.script.line,
                version=attempt.script.version,
            ) from exc
        return bool(back)

    async def _restore(
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

    async def recover(self, attempt: Attempt, unfinished: Unfinished) -> None:
        """Recovers a migration that was started and neither applied nor undone.

        A migration with unchanged operations is resumed from its position in the journal; each
        operation first checks whether its effect exists. Any other migration is restored to its
        savepoints, if every commit since is known to be its own. After a crash in here, the next
        holder recovers the migration again.

        Args:
            attempt: The new attempt; `resumed`, `done` and `savepoints` are set if it is resumed.
            unfinished: The attempt that did not end.

        Raises:
            LeaseLostError: Another process has taken over.
            StoreError: LanceDB failed.
            UnresolvedError: Other writers committed in between, or a table is not the one that the
                migration began with; a person must decide.
        """
        attempt.begin_recovery()
        await self.refuse_other_tables(attempt.script, unfinished)
        await self._resume_or_restore(attempt, unfinished)
        attempt.end_recovery()  # not if that failed: then nothing may count as restored

    async def refuse_other_tables(self, script: Script, unfinished: Unfinished) -> None:
        """Checks that the tables of an unfinished migration are those it began with.

        Raises:
            StoreError: LanceDB failed.
            UnresolvedError: One was dropped and created again, or has lost commits.
        """
        effects = {i.detail["table"]: i.detail["effect"]["do"] for i in unfinished.intents}
        for name, sighting in sightings_before(unfinished.started).items():
            table = await self._store.find(name)
            if table is not None and effects.get(name) != "drop":
                await _refuse_other_table(script, table, sighting)

    async def _resume_or_restore(self, attempt: Attempt, unfinished: Unfinished) -> None:
        script = attempt.script
        self._log.info(
            ev.STEP_RECOVERING,
            table=script.line,
            version=script.version,
            savepoints=dict(unfinished.savepoints),
        )
        effects = [intent.detail["effect"] for intent in unfinished.intents]
        going_back = any(map(goes_back, effects))
        if unfinished.started.checksum == script.checksum and not (script.runs_code or going_back):
            await self._resume(attempt, unfinished, done=unfinished.done_of(len(script.operations)))
            return
        filled = any(effect["do"] == "fill" for effect in effects)
        if filled and not going_back and await self._can_continue(script):
            # Corrected, but the paid results are in the table: each operation continues from them.
            await self._resume(attempt, unfinished, done=frozenset())
            return
        restores: list[tuple[str, int, int]] = []
        for table, savepoint in unfinished.savepoints.items():
            head = await self._head_to_undo(script, table, savepoint, unfinished)
            if head is not None:
                restores.append((table, savepoint, head))
        if restores:
            await self._recorder.record(
                attempt,
                *[announcement(script, t, head, _restore_effect(to)) for t, to, head in restores],
            )
        branches = unfinished.started.detail.get("branches", {})
        for table, to, head in restores:
            # The first commit is announced before the savepoint branch is created.
            kept = table in branches and head != to
            await self._restore(script, table, to, head, protected=kept)
        for name in branches:  # before the event: after it no run looks for them
            await self.drop_leftovers(script, name)
        await self._recorder.record(attempt, event_of(script, Kind.RESTORED))
        self._log.info(
            ev.STEP_RESTORED,
            table=script.line,
            version=script.version,
            tables={table: to for table, to, _ in restores},
        )
        # A restore fences its table. The others are fenced only now: after a crash, a commit before
        # the event would be taken for a foreign one.
        await self._applier.fence(
            unfinished.savepoints.keys() - {table for table, _, _ in restores}
        )

    async def _can_continue(self, script: Script) -> bool:
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

    async def _resume(
        self, attempt: Attempt, unfinished: Unfinished, *, done: frozenset[int]
    ) -> None:
        script = attempt.script
        attempt.resume(unfinished, done)
        await self._renew_savepoints(attempt)
        for intent in unfinished.intents:
            if intent.detail["effect"]["do"] == "overwrite":
                await restore_overwritten(
                    self._store,
                    intent.detail["table"],
                    base=int(intent.detail["base"]),
                    witness=intent.detail["effect"]["witness"],
                    guard=self._check,
                    script=script,
                )

        await self.fence_resumed(attempt, unfinished)

    async def _renew_savepoints(self, attempt: Attempt) -> None:
        """Replaces the savepoint branches of a resumed migration by branches of this holder.

        Those of the crashed process are deleted: it may only be paused, and would delete them when
        it continues.
        """
        own = self._branch_of(attempt.script)
        for name in list(attempt.branches):
            table = await self._store.find(name)
            if table is None:
                continue
            try:
                await self._check()
                await table.create_branch(own, attempt.savepoints[name])
                attempt.protect(name, own)
            except TableVersionGoneError:  # the savepoint was cleaned up
                attempt.unprotect(name)
            await self.drop_leftovers(attempt.script, name, but=own)

    async def drop_leftovers(self, script: Script, name: str, *, but: str = "") -> None:
        """Deletes the savepoint branches that attempts of a migration left on a table.

        Does nothing if the table does not exist.

        Args:
            script: The migration.
            name: The table.
            but: A branch to keep, none by default.

        Raises:
            LeaseLostError: Another process has taken over.
            StoreError: They could not be listed or deleted.
        """
        table = await self._store.find(name)
        for left in [] if table is None else await table.branches():
            if left != but and is_branch_of(left, script):
                await self._check()
                await drop_branch(self._store, name, left)

    async def fence_resumed(self, attempt: Attempt, unfinished: Unfinished) -> None:
        """Fences pending schema changes of a crashed process on the tables of a resumed migration.

        Raises:
            LeaseLostError: Another process has taken over.
            StoreError: LanceDB failed.
        """

        async def announce(table: str, base: int, state: TableState) -> None:
            await self._recorder.record(
                attempt, announcement(attempt.script, table, base, shape_effect(state))
            )

        # Not where a restore was announced: the table_version shows whether it was made.
        restored = {i.detail["table"] for i in unfinished.intents if goes_back(i.detail["effect"])}
        restores = unfinished.started.detail.get("restores", {})
        await self._applier.fence(unfinished.savepoints.keys() - restored - set(restores), announce)

    async def restore_table(self, attempt: Attempt, table: str, to: int, head: int) -> None:
        """Restores a table that an applied migration changed, unless it is restored already.

        Args:
            attempt: The rollback.
            table: The table.
            to: The table_version to restore, 0 to remove the table.
            head: The latest table_version when the rollback was decided.

        Raises:
            LeaseLostError: Another process has taken over.
            StoreError: LanceDB failed.
            UnresolvedError: Other writers have committed since.
        """
        found = await self._store.find(table)
        live = 0 if found is None else await found.version()
        if live > head and await matches_announcement(
            self._store, table, head, _restore_effect(to)
        ):
            return
        await self._recorder.record(
            attempt, announcement(attempt.script, table, head, _restore_effect(to))
        )
        await self._restore(attempt.script, table, to, head, protected=False)

    async def _head_to_undo(
        self, script: Script, table: str, savepoint: int, unfinished: Unfinished
    ) -> int | None:
        """Returns the table_version to restore a table from, `None` if there is nothing to undo.

        Raises:
            UnresolvedError: A commit since the savepoint is not known to be the migration's.
        """
        found = await self._store.find(table)
        if found is None:
            return None
        head = await found.version()
        claim = claim_of(script, table, savepoint, unfinished.intents)
        if claim is None:
            return None  # every commit is announced first: none was made
        made = 0
        while (effect := claim.expected_at(head, made)) is not None:
            if not await matches_announcement(self._store, table, claim.base + made, effect):
                break
            made += 1
        return claim.head_to_undo(head, made)


async def _refuse_other_table(script: Script, table: Table, sighting: Sighting) -> None:
    match = sighting.compare(await commit_times(table))
    if match is not Match.SAME:
        raise UnresolvedError(
            f"{script}: {spell(match, table.name, sighting)} while the migration was unfinished. "
            "It was left as it is.",
            f"Find out why. If its data is right, run `aiomigrate stamp --table {script.line} --to "
            f"{script.version - 1}` (or --to {script.version} if the migration is complete), then "
            "`aiomigrate upgrade`.",
            line=script.line,
            version=script.version,
        )


def _restore_effect(to: int) -> dict[str, Any]:
    return {"do": "restore", "to": to} if to else {"do": "vacate"}


def _restore_announcement(script: Script, target: TableTarget) -> Event:
    return announcement(script, target.name, target.version, _restore_effect(target.before))
