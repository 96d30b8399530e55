"""The names of the structlog events. They are stable across releases; all data is in the keys.

Use them to filter or count log lines. The event kinds of the journal are in `aiomigrate.Kind`.
"""

BACKGROUND_FAILED = "background.failed"
BACKGROUND_STARTED = "background.started"
PROGRESS_FAILED = "progress.failed"

RUN_AT_TARGET = "run.at_target"
RUN_PLANNED = "run.planned"
RUN_FINISHED = "run.finished"
RUN_FAILED = "run.failed"

LEASE_WAITING = "lease.waiting"
LEASE_ACQUIRED = "lease.acquired"
LEASE_STOLEN = "lease.stolen"
LEASE_LOST = "lease.lost"
LEASE_RELEASED = "lease.released"
LEASE_LEFT = "lease.left_to_expire"

LEDGER_FOUNDED = "ledger.founded"
LEDGER_ADOPTED = "ledger.adopted"
LEDGER_HEALED = "ledger.healed"
LEDGER_COMPACTED = "ledger.compacted"
LEDGER_RETRIED = "ledger.retried"
LEDGER_REPAIRED = "ledger.repaired"
STORE_UNSAFE = "store.unsafe"

STEP_STARTED = "step.started"
STEP_APPLIED = "step.applied"  # the canonical line: one for each applied migration
STEP_FAILED = "step.failed"
STEP_SKIPPED = "step.skipped"
STEP_ROLLED_BACK = "step.rolled_back"
STEP_RESTORED = "step.restored"
STEP_UNRESOLVED = "step.unresolved"
STEP_RECOVERING = "step.recovering"

SAVEPOINTS_PRUNED = "savepoints.pruned"

LINE_UNKNOWN = "line.unknown"
LINE_AHEAD = "line.ahead"
LINE_STAMPED = "line.stamped"

COMMIT_RETRIED = "commit.retried"
COMMIT_UNRESOLVED = "commit.unresolved"
