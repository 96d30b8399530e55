"""`Reembed`: another embedding model for a table that is in use.

A shadow column is filled, indexed and judged while the old one answers; one commit swaps them.
How the model is called and its results are committed is for `filling`.
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
    begin,
    check_extra,
    check_key,
    columns_of,
    end,
    judge_poison,
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

    A shadow column is filled by the new model (as by `Backfill`: resumable, nothing paid twice,
    equal sources paid once), indexed like the old one, and judged by a quality gate; then one
    commit puts it in the place of the old column, which is kept under another name until a later
    migration drops it (`op.DropColumns(keep)` with `contracts=`). Undoing swaps them back, in
    milliseconds; rows that were added since then have no old vector.

    Rows that others add or change meanwhile are done (again), up to the swap and once after it.
    A few known texts are embedded at the start and whenever it goes on: a model that answers
    otherwise than it did is another one, and stops it before two models mix in one column.

    Attributes:
        column: The vector column.
        source: The column that vectors are computed from. Rows where it is NULL get no vector.
        function: From a list of values to a vector for each, async or plain (then in a thread),
            or one of lancedb's `EmbeddingFunction` objects. It is no part of the checksum:
            `model` says what it is.
        dimension: Of the new vectors.
        model: The model's name and revision, recorded in the column's field metadata.
        key: As in `Backfill`.
        keep: What the old column is called afterwards; by default the column's name with `_old`.
        index: The index of the new column: by default of the kind and with the options of the old
            one's, as far as LanceDB tells them; `False` for none, or an `op.CreateIndex` of the
            column.
        gate: Thresholds for the new vectors.
        readers_name_column: Searches that do not name their vector column fail while there are
            two of one dimension, so a new model of the same dimension is refused unless this says
            that all of them name it.
        probes: Values of `source` by which the model is known again, where it is no text.
        on_poison: What becomes of it when rows cannot be embedded. To leave some without a vector
            takes a gate that allows it.
        max_poison: As in `Backfill`.
        pace: As in `Backfill`.
        engine: `op.Engine.RAY` embeds the rows that are there at first on a Ray cluster (extra
            `ray`; the function is sent to its workers, of which it uses `pace.concurrency`).
            That is one commit without a checkpoint: a kill pays for it again, and a commit of
            others meanwhile fails it, after which it is tried again, twice. What changes later
            is embedded here.
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
    on_poison: OnPoison = field(default=OnPoison.FAIL, metadata={TUNING: True})
    max_poison: int = field(default=1000, metadata={TUNING: True})
    pace: Pace = field(default_factory=Pace, metadata={TUNING: True})
    engine: Engine = field(default=Engine.LOCAL, metadata={TUNING: True})

    def __post_init__(self) -> None:
        checked_names("Reembed", [self.column, self.source])
        checked_names("Reembed", [self.key])
        if not self.keep:
            object.__setattr__(self, "keep", f"{self.column}_old")
        checked_new("Reembed", checked_names("Reembed", [self.keep]))
        checked_names("Reembed", [self.column, self.keep])
        if not callable(embed_function(self.function)):
            raise InvalidMigrationError(
                f"Reembed: {self.function!r} is neither a function nor an embedding function.",
                "Pass a function from a list of values to a list of vectors.",
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
        if isinstance(self.index, CreateIndex) and self.index.column != self.column:
            raise InvalidMigrationError(
                f"Reembed: the index is on {self.index.column!r}.",
                f"Give an op.CreateIndex({self.column!r}, ...).",
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
        """What makes it the same work for a corrected script: its columns and the model."""
        told = (self.column, self.source, self.key, self.dimension, self.model)
        return f"reembed {told}"

    @property
    def surveyed(self) -> str | None:
        return self.source

    def estimate(self, survey: Survey) -> tuple[str, ...]:
        payload = survey.rows * self.dimension * 4
        told = [
            (
                f"{self.describe()}: {survey.rows} rows, {survey.distinct} different sources with "
                f"{survey.characters} characters to pay for; {bytes_text(payload)} of vectors "
                f"to write{'' if self.index is False else ', and an index to build on them'}; "
                f"up to {bytes_text(self._needs(survey.rows))} of disk meanwhile."
            )
        ]
        if survey.free_bytes is not None and survey.free_bytes < self._needs(survey.rows):
            told.append(f"{self.describe()}: the disk has {bytes_text(survey.free_bytes)} only.")
        return tuple(told)

    def _needs(self, rows: int) -> int:
        """Returns about how many bytes the disk holds more at the peak: vectors and index."""
        return int(rows * (self.dimension * 4 + 64) * (1.3 if self.index is False else 2.4))

    def describe(self) -> str:
        return f"re-embed {self.source} into {self.column} ({self.dimension}) by {self.model}"

    def hazards(self, before: TableState | None) -> tuple[str, ...]:
        if before is None or not before.has(self.column) or self._is_swapped(before):
            return ()
        told = [
            (
                f"{self.column}: code that searches with vectors of the old model, or writes them, "
                f"must be replaced by code for {self.model} at the swap; the old ones stay in "
                f"{self.keep!r}."
            )
        ]
        named = embedding_columns(before.schema)
        if self.column in named and not hasattr(self.function, "safe_model_dump"):
            told.append(
                f"{self.column}: the table's embedding function {named[self.column]!r} no longer "
                "fills it on add(): writers must give vectors."
            )
        return tuple(told)

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
                raise self.refuse(
                    f"there is no column {column!r}.",
                    f"Its columns are {', '.join(f.name for f in before.fields())}.",
                )
        if self._is_swapped(before):
            return before
        check_extra(self)
        if self.engine is Engine.RAY and find_spec("lance_ray") is None:
            raise self.refuse(
                "lance-ray is not installed.", "pip install 'aiomigrate[ray]', here and there."
            )
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
                f"column {self.column!r} is {old.type}, no vector.", "Name the vector column."
            )
        if before.has(self.keep):
            raise self.refuse(
                f"there is a column {self.keep!r} already, where the old vectors would be kept.",
                "Drop it, or choose another name with keep=.",
            )
        if self._is_new(old):
            raise self.refuse(
                f"column {self.column!r} is of that model already.",
                "Give another model, or another revision of it.",
            )
        same = [f.name for f in before.fields() if dimension_of(f.type) == self.dimension]
        if same and not self.readers_name_column:
            raise self.refuse(
                f"column {same[0]!r} has {self.dimension} dimensions too: while both are there, "
                "every search that does not name its column fails.",
                'First release code that names it (.column("vector")), then pass '
                "readers_name_column=True; or re-embed to another dimension.",
            )
        if self.column in embedding_columns(before.schema):
            self._check_pylance(before)

    def _check_pylance(self, before: TableState) -> None:
        if find_spec("lance") is None:
            name = embedding_columns(before.schema)[self.column]
            raise self.refuse(
                f"the table's embedding function {name!r} fills column {self.column!r} on add(), "
                "by the old model, and lancedb alone cannot change that.",
                "pip install 'aiomigrate[lance]', or first op.Rebuild() the table without it.",
            )

    def _index(self, before: TableState) -> Index | None:
        """Returns the index of the new column, called as if it were in place already."""
        if self.index is False:
            return None
        if isinstance(self.index, CreateIndex):
            return self.index.index
        for index in before.indexes:
            if index.columns == (self.column,):
                # What it was made of is of the old dimension.
                options = {k: v for k, v in index.options.items() if k != "num_sub_vectors"}
                return Index(index.kind, (self.column,), options=options)
        return None

    def predict(self, state: TableState | None, witness: str) -> TableState:
        have = self.existing(state)
        memory = remembered(have, f"{witness}_fill")
        temporary = memory is not None and bool(memory.get("temporary"))
        ours = (f"{witness}_new", *([self.key] if temporary else []))
        kept = tuple(i for i in have.indexes if i.columns[0] not in ours)
        after = self.evolve(TableState(have.schema, kept))
        fields = [f for f in after.schema if f.name != f"{witness}_new"]
        return TableState(pa.schema(fields), after.indexes)

    def undo(self, before: TableState | None) -> tuple[Operation, ...]:
        was = self.existing(before)
        named = (was.schema.metadata or {}).get(EMBEDDING)
        text = named.decode() if named and self.column in embedding_columns(was.schema) else None
        return (
            SwapBack(
                self.column,
                self.keep,
                not_null=not was.column(self.column).nullable,
                embedding=text,
                table=self.table,
            ),
        )

    async def apply(self, target: Target) -> int:
        shadow, fill = f"{target.witness}_new", f"{target.witness}_fill"
        await self._know(target)
        rows = 0
        if not self._is_swapped(self.existing(target.state)):
            rows += await target.fill(self._filling(shadow, fill))
            await judge_poison(target, fill, self, self.key, self.on_poison)
            await self._build(target, shadow)
            await self._judge(target, shadow)
            # What was written while the index was built; then there is little left to come.
            rows += await target.fill(self._filling(shadow, fill))
            await self._swap(target, shadow)
        rows += await target.fill(self._filling(self.column, fill))
        await self._embed_from_now_on(target)
        await end(target, fill, self.key)
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

    async def _know(self, target: Target) -> None:
        """Begins: the shadow with what the model answers to known texts; or knows it again.

        Raises:
            ModelChangedError: It answers otherwise.
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
                await begin(target, fill, self.key, [new, model])
                return
            await target.add_columns([model])
        if self.engine is Engine.RAY and remembered(target.state, fill) is None:
            await target.compute(
                embed_function(self.function),
                self.source,
                [new, *columns_of(self.existing(target.state), fill, self.key)],
                batch_rows=self.pace.batch_rows,
                workers=self.pace.concurrency,
            )
        await begin(target, fill, self.key, [new])
        expected = (memory or {"answers": answers})["answers"]
        refuse_other_model(f"{self.describe()} on table {target.name!r}", expected, answers)

    async def _check_disk(self, target: Target) -> None:
        free = target.free_bytes()
        needs = self._needs(await target.count_rows())
        if free is not None and free < needs:
            raise self.refuse(
                f"it needs up to {bytes_text(needs)} of disk, which has {bytes_text(free)}.",
                "Make room, then run again.",
            )

    # ---- before the swap ------------------------------------------------------------------------

    async def _build(self, target: Target, shadow: str) -> None:
        state = self.existing(target.state)
        wanted = self._index(state)
        if wanted is None:
            return
        index = Index(wanted.kind, (shadow,), options=wanted.options)
        if index not in state.indexes:
            if not await target.count_rows(f"{quote(shadow)} IS NOT NULL"):
                return  # LanceDB trains none on nothing
            await target.create_index(index, wanted.options)
        await target.cover(index, _COVER_S)

    async def _judge(self, target: Target, shadow: str) -> None:
        """Measures the new vectors.

        Raises:
            QualityGateError: They are beyond the thresholds.
        """
        source, new, old = quote(self.source), quote(shadow), quote(self.column)
        rows = await target.count_rows(f"{source} IS NOT NULL")
        done = quote(f"{target.witness}_fill")  # not what others have added since
        missing = await target.count_rows(
            f"{source} IS NOT NULL AND {new} IS NULL AND {done} IS NOT NULL"
        )
        columns = [self.key, self.source, self.column, shadow]
        wanted = f"{new} IS NOT NULL"
        drawn = await target.sample(wanted, columns, self.gate.sample, seed=self.model)
        have = drawn.to_pylist()
        both = [row for row in have if row[self.column] is not None]
        share = f"{new} IS NOT NULL AND {old} IS NOT NULL"
        k = self.gate.neighbours
        near = {
            column: await target.nearest(column, [r[column] for r in both], k + 1, self.key, share)
            for column in (self.column, shadow)
        }
        others = {
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
                    old=None if n is None else others[self.column][n],
                    new=() if n is None else others[shadow][n],
                )
            )
        report = judge(self.gate, rows=rows, missing=missing, samples=samples)
        target.add_fact("gate", report.to_dict())
        if not report.passed:
            raise QualityGateError(
                f"{self.describe()} on table {target.name!r}: the new vectors are not good enough: "
                f"{'; '.join(report.failures)}. Measured: {report} The old ones stay in use.",
                "Look at the model. If it is as good as it can be, lower the threshold in gate= "
                "and run again: nothing is embedded twice.",
            )

    async def _swap(self, target: Target, shadow: str) -> None:
        if self.column in embedding_columns(self.existing(target.state).schema):
            # Not the old model for new rows: without it they have no vector, and are swept.
            await target.set_schema_metadata({EMBEDDING.decode(): self._without(target)})
        renames: list[dict[str, Any]] = [
            {"path": self.column, "rename": self.keep, "nullable": True},  # new code leaves it out
            {"path": shadow, "rename": self.column},
        ]
        await target.alter_columns(renames)

    def _without(self, target: Target) -> str | None:
        told = embeddings(self.existing(target.state).schema.metadata)
        others = [dict(one) for one in told if one.get("vector_column") != self.column]
        return json.dumps(others) if others else None

    async def _embed_from_now_on(self, target: Target) -> None:
        """Makes lancedb's own embedding function, if it is one, that of the column."""
        memory = remembered(self.existing(target.state), f"{target.witness}_model")
        told = embedding_columns(self.existing(target.state).schema)
        if memory is None or not memory.get("embedded") or self.column in told:
            return
        mine = registered_entry(self.function, self.source, self.column)
        if mine is None:
            return
        others = embeddings(self.existing(target.state).schema.metadata)
        text = json.dumps([*map(dict, others), mine])
        await target.set_schema_metadata({EMBEDDING.decode(): text})


_COVER_S = 24 * 3600.0
