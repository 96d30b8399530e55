"""`Reembed`: changes the embedding model of a table that is in use.

A shadow column is filled, indexed and checked while searches use the old one; one commit swaps
them. `backfill.engine` calls the model and commits its results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError, QualityGateError
from aiomigrate.operations.base import TUNING, Operation, Traits
from aiomigrate.operations.columns import SwapBack
from aiomigrate.operations.fill import (
    Engine,
    Filling,
    OnPoison,
    Pace,
    Survey,
    check_key,
    fill_columns,
    finish_fill,
    prepare_fill,
    report_poison,
)
from aiomigrate.operations.indexes import CreateIndex
from aiomigrate.operations.quality_gate import (
    MODEL,
    Gate,
    Sample,
    answers_of,
    default_probes,
    dimension_of,
    embed_function,
    judge,
    refuse_other_model,
    registered_entry,
)  # fmt: skip
from aiomigrate.operations.target import Target
from aiomigrate.schema.sql import checked_names, checked_new, quote
from aiomigrate.schema.state import (
    EMBEDDING,
    Index,
    TableState,
    embedding_columns,
    embeddings,
    remember,
    remembered,
)
from aiomigrate.text import bytes_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Reembed(Operation):
    """Change the embedding model of a vector column, while the table is in use.

    A shadow column is filled by the new model (as by `Backfill`: it resumes, embeds equal sources
    once, and keeps committed results), indexed like the old one, and checked by a quality gate.
    Then one commit swaps the columns; the old one stays under another name until a later migration
    drops it (`op.DropColumns(keep)` with `contracts=`). Readers use the old vectors until the
    swap. It is undone by swapping back, in milliseconds; rows added since have no old vector.

    Rows that other writers add or change meanwhile are embedded (again), until the swap and once
    after it. A few probes are embedded at the start and at each resumption: if their vectors
    differ, the model is another one, and the run stops before two models mix in one column.

    Attributes:
        column: The vector column.
        source: The column that vectors are computed from. Rows where it is NULL get no vector.
        function: From a list of values to one vector for each, async or plain (then in a thread);
            or one of lancedb's `EmbeddingFunction` objects. It is not in the checksum: `model`
            identifies it.
        dimension: Length of the new vectors, which are stored as float32.
        model: The model's name and revision, recorded in the column's metadata.
        key: As in `Backfill`.
        keep: The later name of the old column; by default the column's name with `_old`.
        index: The index of the new column: by default one of the kind and the reported options of
            the old one's; `False` for none, or an `op.CreateIndex` of the column.
        gate: Thresholds for the new vectors.
        readers_name_column: Whether all searches name their vector column. Others fail while two
            columns have one dimension, so a model of the same dimension is refused without it.
        probes: Values of `source` that identify the model by their vectors; by default known texts
            if `source` is text.
        on_poison: What it does if rows cannot be embedded. To leave them without a vector, the
            gate must allow it.
        max_poison: As in `Backfill`.
        pace: As in `Backfill`.
        engine: `op.Engine.RAY` embeds the rows present at the start on a Ray cluster (extra `ray`;
            the function is sent to `pace.concurrency` workers). That is one commit without a
            checkpoint: after a crash it is paid again, and if another writer commits meanwhile it
            fails and is tried again, twice. Later changes are embedded by this process.
    """

    column: str = "vector"
    source: str
    function: Any = field(metadata={TUNING: True})
    dimension: int
    model: str
    key: str
    keep: str = ""
    index: CreateIndex | bool = True
    gate: Gate = field(default_factory=Gate, metadata={TUNING: True})
    readers_name_column: bool = field(default=False, metadata={TUNING: True})
    probes: Sequence[Any] = ()
    on_poison: OnPoison | str = field(default=OnPoison.FAIL, metadata={TUNING: True})
    max_poison: int = field(default=1000, metadata={TUNING: True})
    pace: Pace = field(default_factory=Pace, metadata={TUNING: True})
    engine: Engine | str = field(default=Engine.LOCAL, metadata={TUNING: True})

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        checked_names("Reembed", [self.column, self.source])
        checked_names("Reembed", [self.key])
        if not self.keep:
            object.__setattr__(self, "keep", f"{self.column}_old")
        checked_new("Reembed", checked_names("Reembed", [self.keep]))
        checked_names("Reembed", [self.column, self.keep])
        if not callable(embed_function(self.function)):
            raise InvalidMigrationError(
                f"Reembed: {self.function!r} is neither a function nor an embedding function.",
                "Pass a function from a list of values to a list of vectors, one for each value.",
            )
        is_number = isinstance(self.dimension, int) and not isinstance(self.dimension, bool)
        if not is_number or self.dimension < 1:
            raise InvalidMigrationError(
                f"Reembed: dimension={self.dimension!r}.", "Give the length of a new vector."
            )
        if not isinstance(self.model, str) or not self.model.strip():
            raise InvalidMigrationError(
                f"Reembed: model={self.model!r}.", 'Name it with its revision: "name@revision".'
            )
        index = self.index
        if not isinstance(index, bool) and getattr(index, "column", None) != self.column:
            raise InvalidMigrationError(
                f"Reembed: index={index!r} is no index on {self.column!r}.",
                f"Give True, False, or an op.CreateIndex({self.column!r}, ...).",
            )
        object.__setattr__(self, "probes", tuple(self.probes))

    @property
    def traits(self) -> Traits:
        return Traits(
            rewriting=True,
            reversible="swapping the columns back",
            commits="1 for each chunk, and about 6",
        )

    @property
    def shows(self) -> bool:
        return False

    @property
    def needs_savepoint(self) -> bool:
        return True

    @property
    def identity(self) -> str | None:
        """Its columns and its model, without the function, which may be corrected."""
        parts = (self.column, self.source, self.key, self.dimension, self.model)
        return f"reembed {parts}"

    @property
    def surveyed(self) -> str | None:
        return self.source

    def estimate(self, survey: Survey) -> tuple[str, ...]:
        payload = survey.rows * self.dimension * 4
        needed = self._disk_needed(survey.rows)
        lines = [
            (
                f"{self.describe()}: {survey.rows} rows; {survey.distinct} distinct sources with "
                f"{survey.characters} characters to embed; {bytes_text(payload)} of vectors to "
                f"write{'' if self.index is False else ', and an index to build on them'}; "
                f"up to {bytes_text(needed)} of additional disk space."
            )
        ]
        if survey.free_bytes is not None and survey.free_bytes < needed:
            free = bytes_text(survey.free_bytes)
            lines.append(f"{self.describe()}: the disk has only {free} free; make room first.")
        return tuple(lines)

    def _disk_needed(self, rows: int) -> int:
        """Returns about how many additional bytes vectors and index take at the peak."""
        return int(rows * (self.dimension * 4 + 64) * (1.3 if self.index is False else 2.4))

    def describe(self) -> str:
        return f"re-embed {self.source} into {self.column} ({self.dimension}) by {self.model}"

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None or not before.has(self.column) or self._is_swapped(before):
            return ()
        warnings = [
            (
                f"{self.column}: code that searches with vectors of the old model, or writes them, "
                f"must be replaced by code for {self.model} at the swap; the old vectors stay in "
                f"{self.keep!r}."
            )
        ]
        named = embedding_columns(before.schema)
        if self.column in named and not hasattr(self.function, "safe_model_dump"):
            warnings.append(
                f"{self.column}: the table's embedding function {named[self.column]!r} no longer "
                "fills it on add(); writers must give vectors."
            )
        return tuple(warnings)

    def _is_swapped(self, state: TableState) -> bool:
        return state.has(self.keep) and self._is_new(state.column(self.column))

    def _is_new(self, column: pa.Field[Any]) -> bool:
        return (column.metadata or {}).get(MODEL.encode()) == self.model.encode()

    def _field(self, name: str) -> pa.Field[Any]:
        kind = pa.list_(pa.float32(), self.dimension)
        return pa.field(name, kind, metadata={MODEL: self.model})

    def evolve(self, state: TableState | None) -> TableState:
        before = self.existing(state)
        check_key(self, before, self.key)
        for column in (self.column, self.source):
            if column not in before.schema.names:
                raise self.refuse_missing_column(before, column)
        if self._is_swapped(before):
            return before
        self.require("backfill", "tenacity", "aiolimiter")
        if self.engine is Engine.RAY:  # on the cluster too
            self.require("ray", "lance_ray")
        self._check_columns(before)
        fields = [f for f in before.schema if f.name != self.column]
        old = before.column(self.column).with_name(self.keep).with_nullable(nullable=True)
        schema = pa.schema([*fields, old, self._field(self.column)])
        renamed = TableState(
            schema, tuple(index.renamed({self.column: self.keep}) for index in before.indexes)
        )
        made = self._index(before)
        if made is None:
            return renamed
        return TableState(schema, (*renamed.indexes, made))

    def _check_columns(self, before: TableState) -> None:
        old = before.column(self.column)
        if not pa.types.is_fixed_size_list(old.type):
            raise self.refuse(
                f"column {self.column!r} is {old.type}, not a vector.", "Name a vector column."
            )
        if before.has(self.keep):
            raise self.refuse(
                f"column {self.keep!r} exists already, so it cannot keep the old vectors.",
                "Drop it first, or choose another name with keep=.",
            )
        if self._is_new(old):
            raise self.refuse(
                f"column {self.column!r} has vectors of {self.model} already.",
                "Give another model, or another revision, in model=.",
            )
        same = [f.name for f in before.fields() if dimension_of(f.type) == self.dimension]
        if same and not self.readers_name_column:
            raise self.refuse(
                f"column {same[0]!r} has {self.dimension} dimensions too: while both exist, every "
                "search that does not name its column fails.",
                f'First release code that names it (.column("{self.column}")), then pass '
                "readers_name_column=True; or embed to another dimension.",
            )
        if self.column in embedding_columns(before.schema):
            self._check_pylance(before)

    def _check_pylance(self, before: TableState) -> None:
        if find_spec("lance") is None:
            name = embedding_columns(before.schema)[self.column]
            raise self.refuse(
                f"the table's embedding function {name!r} fills column {self.column!r} on add(), "
                "by the old model, and lancedb alone cannot replace it.",
                "pip install 'aiomigrate[lance]', or first op.Rebuild() the table without it.",
            )

    def _index(self, before: TableState) -> Index | None:
        """Returns the index of the new column, under the column's name after the swap."""
        if self.index is False:
            return None
        if isinstance(self.index, CreateIndex):
            return self.index.index
        for index in before.indexes:
            if index.columns == (self.column,):
                # `num_sub_vectors` fits the old dimension only.
                options = {k: v for k, v in index.options.items() if k != "num_sub_vectors"}
                return Index(index.kind, (self.column,), options=options)
        return None

    def predict(self, state: TableState | None, witness: str) -> TableState:
        have = self.existing(state)
        memory = remembered(have, f"{witness}_fill")
        temporary = memory is not None and bool(memory.get("temporary"))
        unwanted = (f"{witness}_new", *([self.key] if temporary else []))
        kept = tuple(i for i in have.indexes if i.columns[0] not in unwanted)
        after = self.evolve(TableState(have.schema, kept))
        fields = [f for f in after.schema if f.name != f"{witness}_new"]
        return TableState(pa.schema(fields), after.indexes)

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = self.existing(before)
        named = (was.schema.metadata or {}).get(EMBEDDING)
        text = named.decode() if named and self.column in embedding_columns(was.schema) else None
        back = SwapBack(
            self.column,
            self.keep,
            not_null=not was.column(self.column).nullable,
            embedding=text,
            table=self.table,
        )
        if text is not None:
            back.require("lance", "lance")
        return (back,)

    async def apply(self, target: Target) -> int:
        shadow, fill = f"{target.witness}_new", f"{target.witness}_fill"
        await self._start_or_resume(target)
        rows = 0
        if not self._is_swapped(self.existing(target.state)):
            rows += await target.fill(self._filling(shadow, fill))
            await report_poison(target, fill, self, self.key, self.on_poison)
            await self._build_index(target, shadow)
            await self._check_quality(target, shadow)
            # Rows written while the index was built, so that few are left after the swap.
            rows += await target.fill(self._filling(shadow, fill))
            await self._swap(target, shadow)
        rows += await target.fill(self._filling(self.column, fill))
        await self._register_function(target)
        await finish_fill(target, fill, self.key)
        return rows

    def _filling(self, column: str, fill: str) -> Filling:
        return Filling(
            column=column,
            witness=fill,
            errors=f"{fill}_error",
            key=self.key,
            sources=(self.source,),
            function=embed_function(self.function),
            where=None,
            pace=self.pace,
            max_poison=self.max_poison,
            retries_poison=self.on_poison is OnPoison.FAIL,
            words=self.describe(),
            by_value=True,
        )

    # ---- the model ------------------------------------------------------------------------------

    async def _start_or_resume(self, target: Target) -> None:
        """Adds the shadow column and records the vectors of the probes, or compares these.

        Raises:
            ModelChangedError: The model returns other vectors than at the start.
            OperationError: The disk is too small.
        """
        state = self.existing(target.state)
        memory = remembered(state, f"{target.witness}_model")
        probes = self.probes or default_probes(state.column(self.source).type)
        answers = await answers_of(
            target, self.function, probes, dimension=self.dimension, pace=self.pace
        )
        fill = f"{target.witness}_fill"
        new = self._field(f"{target.witness}_new")
        if memory is None:
            await self._check_disk(target)
            embedded = self.column in embedding_columns(state.schema)
            model = remember(f"{target.witness}_model", {"answers": answers, "embedded": embedded})
            if self.engine is Engine.LOCAL:
                await prepare_fill(target, fill, self.key, [new, model])
                return
            await target.add_columns([model])
        if self.engine is Engine.RAY and remembered(target.state, fill) is None:
            await target.compute(
                embed_function(self.function),
                self.source,
                [new, *fill_columns(self.existing(target.state), fill, self.key)],
                batch_rows=self.pace.batch_rows,
                workers=self.pace.concurrency,
            )
        await prepare_fill(target, fill, self.key, [new])
        expected = (memory or {"answers": answers})["answers"]
        refuse_other_model(f"{self.describe()} on table {target.name!r}", expected, answers)

    async def _check_disk(self, target: Target) -> None:
        free = target.free_bytes()
        needed = self._disk_needed(await target.count_rows())
        if free is not None and free < needed:
            raise self.refuse(
                f"it needs up to {bytes_text(needed)} of disk space; {bytes_text(free)} are free.",
                "Make room, then run again.",
            )

    # ---- before the swap ------------------------------------------------------------------------

    async def _build_index(self, target: Target, shadow: str) -> None:
        state = self.existing(target.state)
        wanted = self._index(state)
        if wanted is None:
            return
        index = Index(wanted.kind, (shadow,), options=wanted.options)
        if index not in state.indexes:
            if not await target.count_rows(f"{quote(shadow)} IS NOT NULL"):
                return  # LanceDB trains no index without vectors
            await target.create_index(index, wanted.options)
        await target.cover(index, _INDEX_TIMEOUT_S)

    async def _check_quality(self, target: Target, shadow: str) -> None:
        """Measures the new vectors, and adds the `GateReport` to the migration's report.

        Raises:
            QualityGateError: A measurement is beyond its threshold.
        """
        source, new, old = quote(self.source), quote(shadow), quote(self.column)
        rows = await target.count_rows(f"{source} IS NOT NULL")
        done = quote(f"{target.witness}_fill")  # leaves out rows added since the fill
        missing = await target.count_rows(
            f"{source} IS NOT NULL AND {new} IS NULL AND {done} IS NOT NULL"
        )
        columns = [self.key, self.source, self.column, shadow]
        wanted = f"{new} IS NOT NULL"
        sample = await target.sample(wanted, columns, self.gate.sample, seed=self.model)
        have = sample.to_pylist()
        both = [row for row in have if row[self.column] is not None]
        share = f"{new} IS NOT NULL AND {old} IS NOT NULL"
        k = self.gate.neighbours
        near = {
            column: await target.nearest(column, [r[column] for r in both], k + 1, self.key, share)
            for column in (self.column, shadow)
        }
        neighbours = {  # without the row itself
            column: [
                [key for key in keys if key != row[self.key]][:k]
                for row, keys in zip(both, found, strict=True)
            ]
            for column, found in near.items()
        }
        compared = {row[self.key]: n for n, row in enumerate(both)}
        samples = []
        for row in have:
            n = compared.get(row[self.key])
            samples.append(
                Sample(
                    key=row[self.key],
                    source=json.dumps(row[self.source], default=repr),
                    vector=row[shadow],
                    old=None if n is None else neighbours[self.column][n],
                    new=() if n is None else neighbours[shadow][n],
                )
            )
        report = judge(self.gate, rows=rows, missing=missing, samples=samples)
        target.add_fact("gate", report.to_dict())
        if not report.passed:
            raise QualityGateError(
                f"{self.describe()} on table {target.name!r}: the new vectors fail the quality "
                f"gate: {'; '.join(report.failures)}. Measured: {report} The old vectors stay in "
                "use.",
                "Check the model. If its vectors are acceptable, change thresholds in gate= and "
                "run again: nothing is embedded twice.",
            )

    async def _swap(self, target: Target, shadow: str) -> None:
        if self.column in embedding_columns(self.existing(target.state).schema):
            # New rows must not get vectors of the old model: without one, the last fill adds it.
            await target.set_schema_metadata({EMBEDDING.decode(): self._other_functions(target)})
        renames: list[dict[str, Any]] = [
            {"path": self.column, "rename": self.keep, "nullable": True},  # writers leave it out
            {"path": shadow, "rename": self.column},
        ]
        await target.alter_columns(renames)

    def _other_functions(self, target: Target) -> str | None:
        """Returns the embedding functions of other columns as JSON, `None` if there are none."""
        entries = embeddings(self.existing(target.state).schema.metadata)
        others = [dict(entry) for entry in entries if entry.get("vector_column") != self.column]
        return json.dumps(others) if others else None

    async def _register_function(self, target: Target) -> None:
        """Registers `function` for the column, if it is lancedb's and the column had one."""
        memory = remembered(self.existing(target.state), f"{target.witness}_model")
        named = embedding_columns(self.existing(target.state).schema)
        if memory is None or not memory.get("embedded") or self.column in named:
            return
        entry = registered_entry(self.function, self.source, self.column)
        if entry is None:
            return
        others = embeddings(self.existing(target.state).schema.metadata)
        text = json.dumps([*map(dict, others), entry])
        await target.set_schema_metadata({EMBEDDING.decode(): text})


_INDEX_TIMEOUT_S = 24 * 3600.0
