"""The operations, as migration scripts see them: `from aiomigrate import op`."""

from aiomigrate.operations.base import Missing, Operation, Traits
from aiomigrate.operations.column_types import AlterType, SetNotNull, SetNullable
from aiomigrate.operations.columns import (
    AddColumns,
    DropColumns,
    RenameColumns,
    SetMetadata,
)
from aiomigrate.operations.fill import Backfill, Engine, OnPoison, Pace
from aiomigrate.operations.indexes import CreateIndex, DropIndex
from aiomigrate.operations.quality_gate import Gate, GateReport
from aiomigrate.operations.rebuild import CopyInto, Rebuild
from aiomigrate.operations.reembed import Reembed
from aiomigrate.operations.rows import Delete, Run, Update
from aiomigrate.operations.tables import (
    CreateTable,
    DropTable,
    Optimize,
    RenameTable,
    SetTableMetadata,
)
from aiomigrate.schema.state import Index, TableState

__all__ = [
    "AddColumns",
    "AlterType",
    "Backfill",
    "CopyInto",
    "CreateIndex",
    "CreateTable",
    "Delete",
    "DropColumns",
    "DropIndex",
    "DropTable",
    "Engine",
    "Gate",
    "GateReport",
    "Index",
    "Missing",
    "OnPoison",
    "Operation",
    "Optimize",
    "Pace",
    "Rebuild",
    "Reembed",
    "RenameColumns",
    "RenameTable",
    "Run",
    "SetMetadata",
    "SetNotNull",
    "SetNullable",
    "SetTableMetadata",
    "TableState",
    "Traits",
    "Update",
]
