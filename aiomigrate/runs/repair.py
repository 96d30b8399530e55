"""Repairing a journal whose newest versions cannot be read.

The manager calls `repair`; an upgrade calls `repair_if_clear` when it cannot read the journal. What
to record is decided in `planning.lost_events`; the journal is opened again in `ledger.damage`.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiomigrate import events as ev
from aiomigrate.commits.savepoints import is_branch_of
from aiomigrate.errors import LedgerUnreadableError
from aiomigrate.ledger.codec import Head
from aiomigrate.ledger.damage import Damage
from aiomigrate.ledger.lease import Lease
from aiomigrate.ledger.ledger import Ledger
from aiomigrate.ledger.records import Kind, new_event
from aiomigrate.ledger.writer import Writer
from aiomigrate.migration.model import Scripts
from aiomigrate.planning.lost_events import RepairPlan, plan_repair
from aiomigrate.results import Repair
from aiomigrate.runs.environment import Environment
from aiomigrate.runs.maintenance import stamp_events
from aiomigrate.runs.session import Job, RunStart, Session
from aiomigrate.runs.settlement import head_row
from aiomigrate.runs.snapshot import UncheckedView
from aiomigrate.store.connection import Store


async def repair(environment: Environment) -> Repair | None:
    """Opens a damaged journal again at its last readable version. Takes the lease if it is damaged.

    Args:
        environment: The manager's database, options, clocks and logger.

    Returns:
        What was done; `None` if the journal can be read, or if there is none.

    Raises:
        ScriptError: A script is invalid.
        LedgerUnreadableError: The head, or every version of the journal, cannot be read.
        LeaseError: The lease could not be acquired, or was lost.
        StoreError: A LanceDB call failed.
    """
    store = await environment.database.open()
    if store is None:
        return None
    run = await RunStart.begin(environment)
    ledger = environment.database.ledger(store, run.log)
    try:
        await ledger.read_journal()
    except LedgerUnreadableError:
        if await ledger.find_damage() is None:
            raise
    else:
        return None
    session = run.session(store, ledger)
    job = RepairJob(session)
    await session.hold(job)
    return job.result


async def repair_if_clear(environment: Environment, cause: LedgerUnreadableError) -> Repair:
    """Repairs a damaged journal, if some of it can be read and a person has nothing to check.

    Args:
        environment: The manager's database, options, clocks and logger.
        cause: Why the journal could not be read.

    Returns:
        What was done.

    Raises:
        LedgerUnreadableError: It cannot be repaired, none of its events can be read, or a person
            has to check the data. Nothing was written.
        LeaseError: The lease could not be acquired, or was lost.
        StoreError: A LanceDB call failed.
    """
    database = environment.database
    store = await database.open()
    ledger = None if store is None else database.ledger(store, environment.log)
    damage = None if ledger is None else await ledger.find_damage()
    if store is None or ledger is None or damage is None or damage.is_total:
        raise cause
    scripts = await database.scripts()
    plan = await _plan(store, ledger, scripts, await ledger.read_head(), damage)
    if plan.unclear:
        raise LedgerUnreadableError(
            f"{cause.what} {damage.lost} events are lost.",
            "Run `aiomigrate repair`, which opens it again without them and names what to check.",
        ) from cause
    result = await repair(environment)
    if result is None:  # another process was faster
        return Repair(latest=damage.latest, readable=damage.readable)
    return result


class RepairJob(Job):
    """Opens a damaged journal again, and records what the head and the tables still show.

    Attributes:
        result: What was done, `None` before.
    """

    doing = "repairing"
    is_founded = True

    def __init__(self, session: Session) -> None:
        """Reads nothing.

        Args:
            session: Takes the lease.
        """
        self._session = session
        self.result: Repair | None = None

    async def work(self, writer: Writer, lease: Lease) -> None:
        """Repairs the journal. A crash leaves the rest for the next run.

        Raises:
            LeaseLostError: Another process has the lease.
            StoreError: A LanceDB call failed, or another process wrote to the journal.
        """
        session, run = self._session, self._session.run
        damage = await run.ledger.find_damage()
        if damage is None:
            return
        plan = await _plan(run.store, run.ledger, run.scripts, lease.head, damage)
        await writer.check()
        await run.ledger.reopen(damage)
        snapshot = await session.take_over(writer, lease, UncheckedView(run.ledger, run.scripts))
        workspace = session.workspace(writer)
        events = await stamp_events(run, plan.stamps, workspace.tables)
        detail = {"latest": damage.latest, "readable": damage.readable, "lost": damage.lost}
        repaired = new_event(Kind.REPAIRED, at=run.clock.wall(), detail=detail)
        await writer.record(repaired, *events)
        await run.ledger.own_rows(
            [head_row(run, lease, line, version) for line, version in plan.stamps.items()]
        )
        for line, version in plan.stamps.items():
            known = snapshot.journal.of(line).current
            again = [s for s in run.scripts.up_to(line, version) if s.version > known]
            for name in sorted({name for script in again for name in script.touches}):
                table = await run.store.find(name)
                left = [] if table is None else await table.branches()
                for branch in left:
                    if any(is_branch_of(branch, script) for script in again):
                        await workspace.cleanup.clean(line, version, [], {name: branch})
                await workspace.cleanup.clean(line, version, [name], {})
            workspace.cleanup.set_head_later(line, version)
        self.result = Repair(
            latest=damage.latest,
            readable=damage.readable,
            lost=damage.lost,
            rescued=len(damage.rescued),
            stamped=dict(plan.stamps),
            unclear=plan.unclear,
        )
        run.log.warning(
            ev.LEDGER_REPAIRED, lost=damage.lost, rescued=len(damage.rescued), stamped=plan.stamps
        )


async def _plan(
    store: Store, ledger: Ledger, scripts: Scripts, head: Head | None, damage: Damage
) -> RepairPlan:
    journal = ledger.fold_rows(damage.rows())
    names: Sequence[str] = sorted({name for script in scripts.all for name in script.touches})
    versions = {name: (await store.state_of(name))[0] for name in names}
    rows = () if head is None else head.rows
    return plan_repair(rows, journal, scripts, versions, lost=damage.lost)
