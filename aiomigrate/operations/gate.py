"""The quality gate of a re-embedding: are the new vectors good enough to be used? Pure."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiomigrate.errors import InvalidMigrationError

Vector = Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Thresholds for new vectors, measured on sampled rows before they are used.

    Attributes:
        sample: Rows that are looked at.
        neighbours: How many nearest rows are compared between the old column and the new one.
        min_overlap: Mean share of them that must be the same, 0 to 1. Models differ: a good one
            may well change half of them, one that is broken shares next to none.
        max_missing: Share of all rows with a source that may have no new vector.
        max_zero: Share of the sample that may have a vector of length 0.
        max_duplicates: Share of the sample, of different sources, that may share one vector.
    """

    sample: int = 100
    neighbours: int = 10
    min_overlap: float = 0.1
    max_missing: float = 0.0
    max_zero: float = 0.0
    max_duplicates: float = 0.1

    def __post_init__(self) -> None:
        for name in ("sample", "neighbours"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidMigrationError(f"Gate: {name}={value!r}.", "Give 1 or more.")
        for name in ("min_overlap", "max_missing", "max_zero", "max_duplicates"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InvalidMigrationError(f"Gate: {name}={value!r}.", "Give 0 to 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was measured of one row.

    Attributes:
        key: The row's key.
        source: What its vector was computed from, or something equal for equal ones.
        vector: Its new vector.
        old: Keys of its nearest rows by the old column, `None` where it has no old vector.
        new: Keys of its nearest rows by the new column.
    """

    key: Hashable
    source: Hashable
    vector: Vector
    old: Sequence[Hashable] | None
    new: Sequence[Hashable]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What the gate measured. `str()` is for people.

    Attributes:
        rows: Rows with a source.
        missing: Share of them without a new vector.
        sample: Rows that were looked at.
        compared: Those of them that have an old vector too.
        overlap: Mean share of common neighbours, `None` where nothing could be compared.
        zero: Share of the sample whose vector has length 0.
        duplicates: Share of the sample that shares its vector with another source.
        norm: Smallest, mean and largest length of a vector.
        failures: What is beyond its threshold, one sentence each.
    """

    rows: int
    missing: float
    sample: int
    compared: int
    overlap: float | None
    zero: float
    duplicates: float
    norm: tuple[float, float, float]
    failures: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether the new vectors are good enough."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
        out = {name: getattr(self, name) for name in self.__slots__}
        return {**out, "norm": list(self.norm), "failures": list(self.failures)}

    def __str__(self) -> str:
        overlap = "nothing to compare" if self.overlap is None else f"{self.overlap:.1%}"
        low, mean, high = self.norm
        same = f"{overlap} of their neighbours are the same ({self.compared} compared)"
        lines = [
            f"{self.rows} rows with a source, {self.missing:.2%} of them without a new vector",
            f"{self.sample} sampled: {same}",
            f"{self.duplicates:.1%} share a vector with another source, {self.zero:.1%} are zero",
            f"length of the vectors: {low:.3g} to {high:.3g}, mean {mean:.3g}",
        ]
        return "; ".join(lines) + "."


def judge(gate: Gate, *, rows: int, missing: int, samples: Sequence[Sample]) -> GateReport:
    """Judges new vectors.

    Args:
        gate: The thresholds.
        rows: Rows that have a source.
        missing: Those of them that have no new vector.
        samples: What was measured of some; none where the table is empty.
    """
    norms = [math.sqrt(sum(x * x for x in sample.vector)) for sample in samples]
    shares = [
        len(set(s.old) & set(s.new)) / len(s.old) for s in samples if s.old is not None and s.old
    ]
    by_vector: dict[tuple[float, ...], set[Hashable]] = {}
    for sample in samples:
        by_vector.setdefault(tuple(sample.vector), set()).add(sample.source)
    shared = sum(len(by_vector[tuple(sample.vector)]) > 1 for sample in samples)
    count = max(len(samples), 1)
    measured = GateReport(
        rows=rows,
        missing=missing / max(rows, 1),
        sample=len(samples),
        compared=len(shares),
        overlap=sum(shares) / len(shares) if shares else None,
        zero=sum(norm == 0 for norm in norms) / count,
        duplicates=shared / count,
        norm=(min(norms, default=0.0), sum(norms) / count, max(norms, default=0.0)),
    )
    failures = []
    if measured.missing > gate.max_missing:
        failures.append(
            f"{missing} of {rows} rows have no new vector (max_missing={gate.max_missing:g})"
        )
    if measured.overlap is not None and measured.overlap < gate.min_overlap:
        failures.append(
            f"only {measured.overlap:.1%} of the {gate.neighbours} nearest rows are the same "
            f"(min_overlap={gate.min_overlap:g})"
        )
    if measured.zero > gate.max_zero:
        failures.append(f"{measured.zero:.1%} of the vectors are zero (max_zero={gate.max_zero:g})")
    if measured.duplicates > gate.max_duplicates:
        failures.append(
            f"{measured.duplicates:.1%} of the rows share their vector with another source "
            f"(max_duplicates={gate.max_duplicates:g})"
        )
    values = {name: getattr(measured, name) for name in measured.__slots__}
    return GateReport(**{**values, "failures": tuple(failures)})
