"""Builds the collaborators that execute migrations under one lease.

Nothing is decided or executed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    """The collaborators that execute and roll back migrations under one lease.

    Attributes:
        store: The database.
        writer: The ledger writer of the lease's holder.
        recorder: Writes events durably.
        tables: The open tables.
        applier: Applies single operations.
        functions: Runs functions.
        recovery: Undoes and recovers migrations.
        cleanup: Cleans up after recorded migrations.
        clock: Clocks.
        log: Bound logger.
        progress: Called with the progress of each migration.
        telemetry: Creates spans for everything that takes time.
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
        """Builds the collaborators without I/O.

        Args:
            writer: The ledger writer of the lease's holder.
            store: The database.
            params: The run's parameters.
            digest_at: Returns a line's chain digest at a version.
            clock: Clocks.
            log: Bound logger.
            progress: Called with the progress of each migration.
            telemetry: Creates spans for everything that takes time.
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
                branch_of=partial(branch_name, lease.epoch, lease.owner),
                log=log,
            ),
            cleanup=Cleanup(store, writer, applier, tables, digest_at=digest_at, clock=clock),
            clock=clock,
            log=log,
            progress=progress,
            telemetry=telemetry,
        )
