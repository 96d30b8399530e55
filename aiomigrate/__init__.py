"""aiomigrate: crash-safe, exactly-once migrations for LanceDB, in async Python.

The public names are here; `aiomigrate.asgi` and `aiomigrate.otel` are imported separately. Each
name is imported on first use, so that `import aiomigrate` is fast and migration scripts do not
import LanceDB.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aiomigrate.version import __version__

if TYPE_CHECKING:
    from aiomigrate import errors, events
    from aiomigrate import operations as op
    from aiomigrate.errors import AiomigrateError, MigrationFailedError
    from aiomigrate.execution.context import Context, RecordedTable
    from aiomigrate.fleet import DatabaseReport, ManyReport, migrate_all
    from aiomigrate.inspection import OnPending
    from aiomigrate.ledger.founding import OnUnsafeStore
    from aiomigrate.ledger.records import Event, Kind
    from aiomigrate.manager import MigrationManager
    from aiomigrate.migration.loader import load
    from aiomigrate.migration.model import Migration, Script, Scripts
    from aiomigrate.planning.plan import Plan, Step
    from aiomigrate.planning.preflight import OnDestructive
    from aiomigrate.planning.reconcile import OnAhead
    from aiomigrate.reporting.status import Health, HealthState, Status, Validation
    from aiomigrate.reporting.timing import RunTiming
    from aiomigrate.results import Outcome, Report, StepReport
    from aiomigrate.runs.progress import Progress

_MODULES = {
    "AiomigrateError": "errors",
    "Context": "execution.context",
    "DatabaseReport": "fleet",
    "Event": "ledger.records",
    "Health": "reporting.status",
    "HealthState": "reporting.status",
    "ManyReport": "fleet",
    "Migration": "migration.model",
    "MigrationFailedError": "errors",
    "MigrationManager": "manager",
    "OnAhead": "planning.reconcile",
    "OnDestructive": "planning.preflight",
    "OnPending": "inspection",
    "OnUnsafeStore": "ledger.founding",
    "Outcome": "results",
    "Plan": "planning.plan",
    "Progress": "runs.progress",
    "RecordedTable": "execution.context",
    "Report": "results",
    "RunTiming": "reporting.timing",
    "Script": "migration.model",
    "Scripts": "migration.model",
    "Status": "reporting.status",
    "Step": "planning.plan",
    "StepReport": "results",
    "Validation": "reporting.status",
    "load": "migration.loader",
    "migrate_all": "fleet",
    "Kind": "ledger.records",
}
_SUBMODULES = {"errors": "errors", "events": "events", "op": "operations"}

__all__ = [
    "AiomigrateError",
    "Context",
    "DatabaseReport",
    "Event",
    "Health",
    "HealthState",
    "Kind",
    "ManyReport",
    "Migration",
    "MigrationFailedError",
    "MigrationManager",
    "OnAhead",
    "OnDestructive",
    "OnPending",
    "OnUnsafeStore",
    "Outcome",
    "Plan",
    "Progress",
    "RecordedTable",
    "Report",
    "RunTiming",
    "Script",
    "Scripts",
    "Status",
    "Step",
    "StepReport",
    "Validation",
    "__version__",
    "errors",
    "events",
    "load",
    "migrate_all",
    "op",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        value: Any = importlib.import_module(f"aiomigrate.{_SUBMODULES[name]}")
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"aiomigrate.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'aiomigrate' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
