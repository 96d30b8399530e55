"""What migrations are executed with under one lease, put together in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiomigrate.clock import Clock
from aiomigrate.commits.savepoints import branch_name
from aiomigrate.execution.applier import Applier, Progress
from aiomigrate.execution.attempt import Recorder
from aiomigrate.execution.cleanup import Cleanup
from aiomigrate.execution.context import Functions
from aiomigrate.execution.open_tables import OpenTables
from aiomigrate.execution.recovery import Recovery
from aiomigrate.ledger.writer import Writer
from aiomigrate.migration.model import Params
from aiomigrate.store.connection import Store
from aiomigrate.telemetry import Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """The collaborators that execute and undo migrations under one lease.

    Attributes:
        store: The database.
        writer: The ledger writer of the lease's holder.
        recorder: Makes events durable.
        tables: The open tables.
        applier: Applies single operations.
        functions: Runs functions.
        recovery: Returns tables to where a migration found them.
        cleanup: Removes what recorded migrations have left.
        clock: Clocks.
        log: Bound logger.
        progress: Called with how far each migration is.
        telemetry: Measures everything that takes time.
    """

    store: Store
    writer: Writer
    recorder: Recorder
    tables: OpenTables
    applier: Applier
    functions: Functions
    recovery: Recovery
    cleanup: Cleanup
    clock: Clock
    log: Any
    progress: Progress
    telemetry: Telemetry

    @classmethod
    def under(
        cls,
        writer: Writer,
        store: Store,
        *,
        params: Params,
        digest_at: Callable[[str, int], str],
        clock: Clock,
        log: Any,
        progress: Progress,
        telemetry: Telemetry,
    ) -> Workspace:
        """Puts the collaborators together; nothing is read or written yet.

        Args:
            writer: The ledger writer of the lease under which everything happens.
            store: The database.
            params: The run's parameters.
            digest_at: Returns a line's chain digest at a version.
            clock: Clocks.
            log: Bound logger.
            progress: Called with how far each migration is.
            telemetry: Measures everything that takes time.
        """
        lease = writer.lease
        recorder = Recorder(writer, clock=clock, telemetry=telemetry)
        tables = OpenTables(store, writer, recorder, clock=clock)
        applier = Applier(store, writer.check, progress=progress, log=log)
        return cls(
            store=store,
            writer=writer,
            recorder=recorder,
            tables=tables,
            applier=applier,
            functions=Functions(
                store.connection, applier, tables, params=params, progress=progress
            ),
            recovery=Recovery(
                store,
                applier,
                recorder,
                check=writer.check,
                branch_of=lambda script: branch_name(lease.epoch, lease.owner, script),
                log=log,
            ),
            cleanup=Cleanup(store, writer, applier, tables, digest_at=digest_at, clock=clock),
            clock=clock,
            log=log,
            progress=progress,
            telemetry=telemetry,
        )
