"""aiomigrate: crash-safe, exactly-once migrations for LanceDB, in async Python.

Everything public is here. Names are imported when first used, so that `import aiomigrate` costs
next to nothing and migration scripts do not load LanceDB.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aiomigrate.version import __version__

if TYPE_CHECKING:
    from aiomigrate import errors, events
    from aiomigrate import operations as op
    from aiomigrate.context import Context, RecordedTable
    from aiomigrate.discovery import load
    from aiomigrate.errors import AiomigrateError, MigrationFailedError
    from aiomigrate.ledger import OnUnsafeStore
    from aiomigrate.manager import MigrationManager, OnPending
    from aiomigrate.many import DatabaseReport, ManyReport, migrate_all
    from aiomigrate.model import Event, Migration, Script, Scripts
    from aiomigrate.plan import OnDestructive, Plan, Step
    from aiomigrate.reconcile import OnAhead
    from aiomigrate.report import (
        Health,
        HealthState,
        Outcome,
        Report,
        Status,
        StepReport,
        Validation,
    )
    from aiomigrate.runner import Progress
    from aiomigrate.timing import RunTiming

_MODULES = {
    "AiomigrateError": "errors",
    "Context": "context",
    "DatabaseReport": "many",
    "Event": "model",
    "Health": "report",
    "HealthState": "report",
    "ManyReport": "many",
    "Migration": "model",
    "MigrationFailedError": "errors",
    "MigrationManager": "manager",
    "OnAhead": "reconcile",
    "OnDestructive": "plan",
    "OnPending": "manager",
    "OnUnsafeStore": "ledger",
    "Outcome": "report",
    "Plan": "plan",
    "Progress": "runner",
    "RecordedTable": "context",
    "Report": "report",
    "RunTiming": "timing",
    "Script": "model",
    "Scripts": "model",
    "Status": "report",
    "Step": "plan",
    "StepReport": "report",
    "Validation": "report",
    "load": "discovery",
    "migrate_all": "many",
}
_SUBMODULES = {"errors": "errors", "events": "events", "op": "operations"}

__all__ = [
    "AiomigrateError",
    "Context",
    "DatabaseReport",
    "Event",
    "Health",
    "HealthState",
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
