"""The operations, as migration scripts see them: `from aiomigrate import op`."""

from aiomigrate.operations.base import Index, Missing, Operation, TableState, Traits
from aiomigrate.operations.columns import (
    AddColumns,
    AlterType,
    DropColumns,
    RenameColumns,
    SetMetadata,
    SetNotNull,
    SetNullable,
)
from aiomigrate.operations.data import Delete, Run, Update
from aiomigrate.operations.fill import Backfill, Engine, OnPoison, Pace
from aiomigrate.operations.gate import Gate, GateReport
from aiomigrate.operations.indexes import CreateIndex, DropIndex
from aiomigrate.operations.reembed import Reembed
from aiomigrate.operations.rewrite import CopyInto, Rebuild
from aiomigrate.operations.tables import CreateTable, DropTable, Optimize, RenameTable

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
    "TableState",
    "Traits",
    "Update",
]
