"""What is told of a run while it goes on, to a tracer; by default nothing.

The events of the log are `events`; an implementation for OpenTelemetry is `otel`.
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
    """Something that takes time, while it does."""

    def failed(self, why: str) -> None:
        """Tells that it failed, where no exception passes through."""


class Telemetry:
    """Told of everything that takes time; does nothing. Subclass it, or use `aiomigrate.otel`."""

    def span(
        self, name: str, attributes: Mapping[str, str | int]
    ) -> contextlib.AbstractContextManager[Span]:
        """Is entered when something begins and left when it ends.

        Args:
            name: What it is, as named above.
            attributes: Facts about it, by names as OpenTelemetry's.
        """
        del name, attributes
        return _NOTHING

    def ended(self, step: StepReport) -> None:
        """Is called with what came of each migration."""


class _Nothing(contextlib.AbstractContextManager["_Nothing"]):
    def __exit__(self, *_: object) -> None:
        return None

    def failed(self, why: str) -> None:
        pass


_NOTHING = _Nothing()
