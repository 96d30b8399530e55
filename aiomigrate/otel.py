"""Spans and metrics of runs for OpenTelemetry. Needs the extra `otel`.

`MigrationManager(..., telemetry=OpenTelemetry())`. Spans nest run, table, migration, operation;
waiting for the lease and for the journal are spans of their own. Names of attributes are those of
OpenTelemetry's semantic conventions for databases (`db.system.name`, `db.namespace`,
`db.collection.name`, `db.operation.name`, `error.type`) where there is one.
Source: "Semantic conventions for database client spans", OpenTelemetry.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from aiomigrate.errors import ConfigurationError
from aiomigrate.results import StepReport
from aiomigrate.telemetry import LEASE, Telemetry
from aiomigrate.version import __version__

try:
    from opentelemetry import metrics, trace
except ModuleNotFoundError as exc:
    raise ConfigurationError(
        "aiomigrate.otel needs OpenTelemetry, which is not installed.",
        "pip install 'aiomigrate[otel]'",
    ) from exc


class OpenTelemetry(Telemetry):
    """Tells OpenTelemetry of runs.

    Metrics: `aiomigrate.migrations` (count, by `db.collection.name` and `aiomigrate.outcome`),
    `aiomigrate.migration.duration` and `aiomigrate.lease.wait` (histograms, seconds),
    `aiomigrate.rows` (count of rows changed).
    """

    def __init__(self, *, tracer_provider: Any = None, meter_provider: Any = None) -> None:
        """Takes a tracer and a meter.

        Args:
            tracer_provider: Where spans go; by default the global one.
            meter_provider: Where metrics go; by default the global one.
        """
        self._tracer = trace.get_tracer("aiomigrate", __version__, tracer_provider)
        meter = metrics.get_meter("aiomigrate", __version__, meter_provider)
        self._migrations = meter.create_counter(
            "aiomigrate.migrations", unit="{migration}", description="Migrations that ended."
        )
        self._rows = meter.create_counter(
            "aiomigrate.rows", unit="{row}", description="Rows that migrations changed."
        )
        self._duration = meter.create_histogram(
            "aiomigrate.migration.duration", unit="s", description="From begin to end."
        )
        self._lease = meter.create_histogram(
            "aiomigrate.lease.wait", unit="s", description="Waiting for the lease."
        )

    @contextlib.contextmanager
    def span(self, name: str, attributes: Mapping[str, str | int]) -> Iterator[_Span]:
        """Opens a span below the one that is open where this is called."""
        begun = time.monotonic()
        told = {"db.system.name": "lancedb", **attributes}
        with self._tracer.start_as_current_span(name, attributes=told) as span:
            yield _Span(span)
        if name == LEASE:
            self._lease.record(time.monotonic() - begun)

    def ended(self, step: StepReport) -> None:
        """Counts a migration."""
        told = {"db.collection.name": step.line, "aiomigrate.outcome": step.outcome.value}
        self._migrations.add(1, told)
        self._rows.add(step.rows, told)
        self._duration.record(step.ran_s + step.ledger_s, told)


class _Span:
    def __init__(self, span: Any) -> None:
        self._span = span

    def failed(self, why: str) -> None:
        kind = re.search(r"\b\w+(?:Error|Exception|Exit)(?=:)", why)
        self._span.set_attribute("error.type", kind[0] if kind else "failed")
        self._span.set_status(trace.StatusCode.ERROR, why)
