"""Checks of embedding models: whether a model is the same as before, and its vectors good enough.

Everything except `answers_of` is pure. `operations.reembed` decides when to check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError, ModelChangedError
from aiomigrate.operations.fill import Pace
from aiomigrate.operations.target import Target

Vector = Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Thresholds for new vectors, measured on sampled rows before the vectors are used.

    All shares are from 0 to 1.

    Attributes:
        sample: Rows in the sample.
        neighbours: Nearest rows that are compared between the old column and the new one.
        min_overlap: Smallest mean share of nearest rows that both columns have in common. A good
            model may change half of them; a broken model has almost none in common.
        max_missing: Largest share of the rows with a source that have no new vector.
        max_zero: Largest share of the sample with a vector of length 0.
        max_duplicates: Largest share of the sample with a vector that another source has too.

    Raises:
        InvalidMigrationError: A value is out of its range.
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
                raise InvalidMigrationError(f"Gate: {name}={value!r}.", "Give an integer from 1.")
        for name in ("min_overlap", "max_missing", "max_zero", "max_duplicates"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InvalidMigrationError(f"Gate: {name}={value!r}.", "Give a share, 0 to 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The measurements of one sampled row.

    Attributes:
        key: The row's key.
        source: The value its vector was computed from, or a text that is equal for equal values.
        vector: Its new vector.
        old: Keys of its nearest rows by the old column, `None` if it has no old vector.
        new: Keys of its nearest rows by the new column.
    """

    key: Hashable
    source: Hashable
    vector: Vector
    old: Sequence[Hashable] | None
    new: Sequence[Hashable]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """The measurements of a quality gate. `str()` is one sentence for people.

    Attributes:
        rows: Rows with a source.
        missing: Share of these rows without a new vector.
        sample: Rows in the sample.
        compared: Sampled rows that also have an old vector.
        overlap: Mean share of common neighbours, `None` if no row could be compared.
        zero: Share of the sample with a vector of length 0.
        duplicates: Share of the sample with a vector that another source has too.
        norm: Smallest, mean and largest length of a vector.
        failures: The measurements beyond their thresholds, one phrase each.
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
        """Whether all measurements are within their thresholds."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
        out = {name: getattr(self, name) for name in self.__slots__}
        return {**out, "norm": list(self.norm), "failures": list(self.failures)}

    def __str__(self) -> str:
        low, mean, high = self.norm
        overlap = (
            "no old vectors to compare"
            if self.overlap is None
            else f"{self.overlap:.1%} of their neighbours are the same ({self.compared} compared)"
        )
        lines = [
            f"{self.rows} rows with a source, {self.missing:.2%} of them without a new vector",
            f"{self.sample} sampled: {overlap}",
            f"{self.duplicates:.1%} have the vector of another source, {self.zero:.1%} are zero",
            f"length of the vectors: {low:.3g} to {high:.3g}, mean {mean:.3g}",
        ]
        return "; ".join(lines) + "."


def judge(gate: Gate, *, rows: int, missing: int, samples: Sequence[Sample]) -> GateReport:
    """Compares new vectors with the thresholds. Pure.

    Args:
        gate: The thresholds.
        rows: Rows with a source.
        missing: Rows with a source and without a new vector.
        samples: The sampled rows; empty for an empty table.
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
            f"{measured.duplicates:.1%} of the rows have the vector of another source "
            f"(max_duplicates={gate.max_duplicates:g})"
        )
    values = {name: getattr(measured, name) for name in measured.__slots__}
    return GateReport(**{**values, "failures": tuple(failures)})


MODEL = "aiomigrate:model"
"""Key in a vector column's metadata for the name of its model."""

PROBES = (
    "aiomigrate",
    "The quick brown fox jumps over the lazy dog.",
    "7 + 5 = 12; 東京, Zürich, naïve",
)
"""Texts whose vectors identify a model of text."""

SAME_MODEL = 0.999
"""Smallest cosine similarity of two vectors of one text by one model: services round values."""


def default_probes(kind: pa.DataType) -> tuple[str, ...]:
    """Returns the values that identify a model of such a column; none if it is not text."""
    return PROBES if pa.types.is_string(kind) or pa.types.is_large_string(kind) else ()


def embed_function(function: Any) -> Callable[..., Any]:
    """Returns the callable that takes a list of values: a method of lancedb's functions."""
    found: Callable[..., Any] = getattr(function, "compute_source_embeddings", function)
    return found


def dimension_of(kind: Any) -> int | None:
    """Returns the dimension of a vector type, `None` for any other type."""
    is_vector = pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)
    return int(kind.list_size) if is_vector else None


def similarity(one: Sequence[float], other: Sequence[float]) -> float:
    """Returns the cosine similarity of two vectors, 0 if their dimensions differ."""
    if len(one) != len(other):
        return 0.0
    lengths = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(x * x for x in other))
    if not lengths:
        return 1.0 if list(one) == list(other) else 0.0
    return sum(x * y for x, y in zip(one, other, strict=True)) / lengths


def refuse_other_model(doing: str, expected: Iterable[Vector], answers: Iterable[Vector]) -> None:
    """Refuses a model whose vectors of the probes differ from those at the start of the work.

    Args:
        doing: The operation and its table, as text.
        expected: The vectors at the start.
        answers: The vectors now.

    Raises:
        ModelChangedError: One of them differs.
    """
    for was, now in zip(expected, answers, strict=True):
        if (alike := similarity(was, now)) < SAME_MODEL:
            raise ModelChangedError(
                f"{doing}: the model returns other vectors than at the start (similarity "
                f"{alike:.3f} for one text), so another model has the same name.",
                "Restore the first model and run again to resume; or give the new model its own "
                "name in model=, and all rows are embedded by it.",
            )


async def answers_of(
    target: Target, function: Any, probes: Sequence[Any], *, dimension: int, pace: Pace
) -> list[list[float]]:
    """Returns a model's vectors of the probes, rounded to 5 digits; empty without probes.

    Args:
        target: Calls the function.
        function: The model.
        probes: The values to embed.
        dimension: Length of a vector.
        pace: How the function is called.

    Raises:
        KeepsProgressError: The function failed every time.
    """
    if not probes:
        return []
    kind = pa.list_(pa.float32(), dimension)
    given = await target.ask(embed_function(function), list(probes), kind, pace)
    return [[float(f"{x:.5g}") for x in vector or ()] for vector in given]


def registered_entry(function: Any, source: str, column: str) -> dict[str, Any] | None:
    """Returns lancedb's metadata entry of an embedding function; `None` for other functions.

    Args:
        function: The model.
        source: The column that it embeds.
        column: The vector column.
    """
    dump = getattr(function, "safe_model_dump", None)
    if dump is None:
        return None
    kind = type(function)
    name = getattr(kind, "__embedding_function_registry_alias__", kind.__name__)
    return {"name": name, "model": dump(), "source_column": source, "vector_column": column}
