"""The operations, as migration scripts see them: `from aiomigrate import op`."""

from aiomigrate.operations.base import Index, Missing, Operation, TableState, Traits
from aiomigrate.operations.columns import (
    AddColumns,
    DropColumns,
    RenameColumns,
    SetNotNull,
    SetNullable,
)
from aiomigrate.operations.data import Run, Update
from aiomigrate.operations.indexes import CreateIndex, DropIndex
from aiomigrate.operations.tables import CreateTable

__all__ = [
    "AddColumns",
    "CreateIndex",
    "CreateTable",
    "DropColumns",
    "DropIndex",
    "Index",
    "Missing",
    "Operation",
    "RenameColumns",
    "Run",
    "SetNotNull",
    "SetNullable",
    "TableState",
    "Traits",
    "Update",
]
