"""Exports spans and metrics of runs to OpenTelemetry. Needs the extra `otel`.

Use it as `MigrationManager(..., telemetry=OpenTelemetry())`. Spans nest: run, table, migration,
operation. Waiting for the lease and waiting for the journal have their own spans. Attributes are
named as in OpenTelemetry's semantic conventions for databases where these have a name
(`db.system.name`, `db.namespace`, `db.collection.name`, `db.operation.name`, `error.type`).
Source: "Semantic conventions for database client spans", OpenTelemetry.

This module configures no exporter: the application does.
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
    """Exports runs to OpenTelemetry.

    Metrics: `aiomigrate.migrations` (counter, by `db.collection.name` and `aiomigrate.outcome`),
    `aiomigrate.rows` (counter of changed rows), `aiomigrate.migration.duration` and
    `aiomigrate.lease.wait` (histograms, in seconds).
    """

    def __init__(self, *, tracer_provider: Any = None, meter_provider: Any = None) -> None:
        """Creates the tracer and the instruments.

        Args:
            tracer_provider: The provider of the tracer; by default the global one.
            meter_provider: The provider of the meter; by default the global one.
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
            "aiomigrate.migration.duration", unit="s", description="Duration of a migration."
        )
        self._lease = meter.create_histogram(
            "aiomigrate.lease.wait", unit="s", description="Time spent waiting for the lease."
        )

    @contextlib.contextmanager
    def span(self, name: str, attributes: Mapping[str, str | int]) -> Iterator[_Span]:
        """Opens a span as a child of the caller's current span, and closes it afterwards.

        Args:
            name: The name of the span.
            attributes: Its attributes; `db.system.name` is added.
        """
        started = time.monotonic()
        all_attributes = {"db.system.name": "lancedb", **attributes}
        with self._tracer.start_as_current_span(name, attributes=all_attributes) as span:
            yield _Span(span)
        if name == LEASE:
            self._lease.record(time.monotonic() - started)

    def ended(self, step: StepReport) -> None:
        """Updates the metrics with the result of a migration."""
        attributes = {"db.collection.name": step.line, "aiomigrate.outcome": step.outcome.value}
        self._migrations.add(1, attributes)
        self._rows.add(step.rows, attributes)
        self._duration.record(step.ran_s + step.ledger_s, attributes)


class _Span:
    def __init__(self, span: Any) -> None:
        self._span = span

    def failed(self, why: str) -> None:
        kind = re.search(r"\b\w+(?:Error|Exception|Exit)(?=:)", why)
        self._span.set_attribute("error.type", kind[0] if kind else "failed")
        self._span.set_status(trace.StatusCode.ERROR, why)
