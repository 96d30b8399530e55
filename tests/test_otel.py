"""Spans and metrics, as the SDK's in-memory exporters receive them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from aiomigrate import Context, Migration, MigrationFailedError, op
from aiomigrate.otel import OpenTelemetry
from tests.tools import manager

T = pa.schema([("id", pa.string())])


class Told:
    """What was exported.

    Attributes:
        telemetry: To give to a manager.
    """

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._metrics = InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self.tracer = tracers.get_tracer("the application")
        meters = MeterProvider(metric_readers=[self._metrics])
        self.telemetry = OpenTelemetry(tracer_provider=tracers, meter_provider=meters)

    def spans(self, name: str) -> list[ReadableSpan]:
        """Returns the spans of a name, in order of their begin."""
        found = [s for s in self._spans.get_finished_spans() if s.name == name]
        return sorted(found, key=lambda span: span.start_time or 0)

    def path(self, span: ReadableSpan) -> list[str]:
        """Returns the names of a span and of those above it, innermost first."""
        by_id = {s.context.span_id: s for s in self._spans.get_finished_spans() if s.context}
        names = [span.name]
        while span.parent is not None:
            span = by_id[span.parent.span_id]
            names.append(span.name)
        return names

    def metrics(self) -> dict[str, list[Any]]:
        """Returns the data points of each metric."""
        data = self._metrics.get_metrics_data()
        assert data is not None
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def steps(told: Told) -> list[Migration]:
    """Returns two lines; a function of the second opens a span of its own."""

    async def up(ctx: Context) -> None:
        with told.tracer.start_as_current_span("embed"):
            await ctx.table().add([{"id": "a"}])

    return [
        Migration(table="a", version=1, operations=[op.CreateTable(T), op.CreateIndex("id")]),
        Migration(table="b", version=1, operations=[op.CreateTable(T)], depends_on={"a": 1}),
        Migration(table="b", version=2, up=up),
    ]


async def test_spans_nest_from_run_to_operation(database: Path) -> None:
    """Also what a function opens itself; lease and journal have spans; names are the standard's."""
    told = Told()
    async with manager(database, steps(told), telemetry=told.telemetry) as migrating:
        await migrating.initialize()

    run, table, migration = "aiomigrate.run", "aiomigrate.table", "aiomigrate.migration"
    operation = "aiomigrate.operation"
    assert told.path(told.spans("embed")[0]) == ["embed", operation, migration, table, run]
    assert {tuple(told.path(span)) for span in told.spans("aiomigrate.lease")} == {
        ("aiomigrate.lease", run)
    }
    assert all(told.path(span)[-1] == run for span in told.spans("aiomigrate.ledger"))
    assert any(migration in told.path(span) for span in told.spans("aiomigrate.ledger"))
    assert len(told.spans(run)) == 1
    assert [dict(s.attributes or {}) for s in told.spans(migration)][1:] == [
        {"db.system.name": "lancedb", "db.collection.name": "b", "db.operation.name": "upgrade",
         "aiomigrate.version": version, "aiomigrate.description": ""}
        for version in (1, 2)
    ]  # fmt: skip
    assert (told.spans(run)[0].attributes or {})["db.namespace"] == str(database)


async def test_metrics_count_what_ended(database: Path) -> None:
    """By table and outcome; durations and the wait for the lease in seconds."""
    told = Told()
    async with manager(database, steps(told), telemetry=told.telemetry) as migrating:
        await migrating.initialize()
        await migrating.rollback("b", to=1)
    found = told.metrics()

    counts = {
        (p.attributes["db.collection.name"], p.attributes["aiomigrate.outcome"]): p.value
        for p in found["aiomigrate.migrations"]
    }
    assert counts == {("a", "applied"): 1, ("b", "applied"): 2, ("b", "rolled back"): 1}
    assert sum(point.value for point in found["aiomigrate.rows"]) >= 1
    assert sum(point.count for point in found["aiomigrate.migration.duration"]) == 4
    assert found["aiomigrate.lease.wait"][0].count == 2


async def test_a_failure_is_an_error_of_its_span(database: Path) -> None:
    """With its type and its words; a start at target has a run's span and no more."""
    told = Told()

    async def up(ctx: Context) -> None:
        raise ValueError("wrong on purpose")

    wrong = [Migration(table="a", version=1, operations=[op.CreateTable(T), op.Run(up)])]
    async with manager(database, wrong, telemetry=told.telemetry) as migrating:
        with pytest.raises(MigrationFailedError):
            await migrating.initialize()
    span = told.spans("aiomigrate.migration")[0]
    assert span.status.status_code is trace.StatusCode.ERROR
    assert "wrong on purpose" in (span.status.description or "")
    assert (span.attributes or {})["error.type"] == "ValueError"

    quiet = Told()
    async with manager(database.parent / "other", steps(quiet)) as migrating:
        await migrating.initialize()
    async with manager(
        database.parent / "other", steps(quiet), telemetry=quiet.telemetry
    ) as migrating:
        await migrating.initialize()
    assert [len(quiet.spans(f"aiomigrate.{n}")) for n in ("run", "table", "lease")] == [1, 0, 0]


def test_without_the_extra_it_says_what_to_install() -> None:
    """Not an ImportError of a module that nobody has heard of."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import aiomigrate.errors\n"
        "try:\n    import aiomigrate.otel\n"
        "except aiomigrate.errors.ConfigurationError as exc: print(exc.remedy)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "aiomigrate[otel]" in ran.stdout
