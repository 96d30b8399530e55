"""The interface through which a run reports spans and results to a tracer. The default is a no-op.

Log events are in `events`; `otel` implements the interface for OpenTelemetry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Protocol

from aiomigrate.results import StepReport

RUN = "aiomigrate.run"
LEASE = "aiomigrate.lease"
TABLE = "aiomigrate.table"
MIGRATION = "aiomigrate.migration"
OPERATION = "aiomigrate.operation"
LEDGER = "aiomigrate.ledger"


class Span(Protocol):
    """An open span."""

    def failed(self, why: str) -> None:
        """Marks the span as failed, where no exception leaves it.

        Args:
            why: The error as text.
        """


class Telemetry:
    """Receives the spans and results of runs and ignores them.

    Subclass it, or use `aiomigrate.otel.OpenTelemetry`.
    """

    def span(
        self, name: str, attributes: Mapping[str, str | int]
    ) -> contextlib.AbstractContextManager[Span]:
        """Returns a context manager that is entered when a span starts and left when it ends.

        Args:
            name: The name of the span: `RUN`, `LEASE`, `TABLE`, `MIGRATION`, `OPERATION` or
                `LEDGER`.
            attributes: Attributes of the span, named as in OpenTelemetry.
        """
        del name, attributes
        return _NO_SPAN

    def ended(self, step: StepReport) -> None:
        """Receives the result of each migration that ended."""


class _NoSpan(contextlib.AbstractContextManager["_NoSpan"]):
    def __exit__(self, *_: object) -> None:
        return None

    def failed(self, why: str) -> None:
        pass


_NO_SPAN = _NoSpan()
