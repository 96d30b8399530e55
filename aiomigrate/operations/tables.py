"""Operations on whole tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import Operation, TableState, Target, Traits, checked_new, spell


class ArrowSchemaSource(Protocol):
    """Anything that can tell its Arrow schema, such as a `LanceModel` class."""

    def to_arrow_schema(self) -> pa.Schema: ...


@dataclass(frozen=True, slots=True)
class CreateTable(Operation):
    """Create an empty table.

    A table that exists with an equal schema (order of fields aside) is adopted as it is.

    Attributes:
        schema: Its fields with Arrow types; freeze it in the script.
    """

    schema: pa.Schema | ArrowSchemaSource

    def __post_init__(self) -> None:
        schema: Any = self.schema
        if not isinstance(schema, pa.Schema) and hasattr(schema, "to_arrow_schema"):
            schema = schema.to_arrow_schema()
            object.__setattr__(self, "schema", schema)
        if not isinstance(schema, pa.Schema) or not len(schema):
            raise InvalidMigrationError(
                f"CreateTable: {schema!r} is not a schema.",
                "Pass a pyarrow.Schema with at least one field, or a LanceModel class.",
            )
        if len(set(schema.names)) != len(schema.names):
            raise InvalidMigrationError(
                "CreateTable: a field is repeated.", "Name each field once."
            )
        checked_new("CreateTable", schema.names)

    @property
    def arrow(self) -> pa.Schema:
        """The schema as Arrow."""
        assert isinstance(self.schema, pa.Schema)  # noqa: S101 - __post_init__ converted it
        return self.schema

    @property
    def traits(self) -> Traits:
        return Traits(reversible="dropping the table")

    def describe(self) -> str:
        return f"create table ({', '.join(self.arrow.names)})"

    def evolve(self, state: TableState | None) -> TableState:
        wanted = TableState(self.arrow)
        if state is None:
            return wanted
        have = {f.name: spell(f) for f in state.fields()}
        want = {f.name: spell(f) for f in wanted.fields()}
        if have != want:
            parts = [
                f"{n}: is {have.get(n, 'absent')}, not {want.get(n, 'absent')}"
                for n in sorted(have.keys() | want.keys())
                if have.get(n) != want.get(n)
            ]
            raise self.refuse(
                f"the table exists with another schema ({'; '.join(parts)}).",
                "If that table is right, `aiomigrate stamp` this version; otherwise move it away.",
            )
        return state

    async def apply(self, target: Target) -> int:
        await target.create(self.arrow)
        return 0
