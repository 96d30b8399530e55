"""Migrations as users write them, and scripts as they are loaded: frozen values without I/O.

`planning` decides what to do with them, and `ledger` stores which of them are applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from aiomigrate.errors import InvalidMigrationError
from aiomigrate.operations.base import Operation
from aiomigrate.operations.rows import Run, Up
from aiomigrate.schema.sql import is_table_name

MAX_VERSION = 2**31 - 1
"""Versions are stored as int32."""

Key = tuple[str, int]
"""The key of a migration: its line and its version."""

Params = Mapping[str, Any]
Target = int | Mapping[str, int] | None
"""The target of a run: the newest scripts (`None`), a highest version, or versions by line."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Migration:
    """A migration that takes one line (usually a table) to `version`.

    Attributes:
        version: A positive integer, unique in its line, equal to the number of its file.
        table: The table that it changes; also the name of its line.
        line: The name of its line if that is not a table; then `touches` is required.
        description: A few words, shown in plans and reports.
        operations: Its operations, in order; or a function that returns them for the run's
            parameters.
        up: An async function of a `Context`, instead of `operations`; it must be idempotent.
        down: An async function that reverts `up`.
        touches: The tables that it changes; by default `table` and the tables of its operations.
        depends_on: Versions of other lines that must be applied first, by line.
        contracts: Earlier compatible migrations that this one completes, as versions by line. Once
            it is applied, the savepoints kept for them may be deleted. It depends on those of
            other lines.
        background: Whether an application starts without waiting for it and for the migrations
            after it. It may be changed at any time: it is not part of the checksum.

    Raises:
        InvalidMigrationError: A value is invalid, or values contradict each other.
    """

    version: int
    table: str | None = None
    line: str | None = None
    description: str = ""
    operations: Sequence[Operation] | Callable[[Params], Sequence[Operation]] = ()
    up: Up | None = None
    down: Up | None = None
    touches: Sequence[str] | None = None
    depends_on: Mapping[str, int] = field(default_factory=dict)
    contracts: Mapping[str, int] = field(default_factory=dict)
    background: bool = False

    def __post_init__(self) -> None:  # noqa: C901 - one check after another
        name = self.line or self.table
        where: dict[str, Any] = {
            "line": name,
            "version": self.version if _is_int(self.version) else None,
        }
        for text in (self.table, self.line):
            if text is not None and (not isinstance(text, str) or not text or text[0] == ":"):
                raise InvalidMigrationError(
                    f"{text!r} is not a valid name for a table or line.",
                    "Use a non-empty string that does not start with a colon.",
                    **where,
                )
        if name is None:
            raise InvalidMigrationError(
                "A migration names no table.", 'Pass table="..." (or line= and touches=).'
            )

        def invalid(what: str, remedy: str) -> InvalidMigrationError:
            return InvalidMigrationError(f"Migration of {name!r}: {what}", remedy, **where)

        if not _is_int(self.version) or not 1 <= self.version <= MAX_VERSION:
            raise invalid(
                f"version {self.version!r} is not a positive integer.",
                "Use the number of its file: 004_add_tags.py contains version 4.",
            )
        if self.table is None and self.touches is None:
            raise invalid("a line without a table needs touches.", "Pass touches=(tables...).")
        if (self.up is not None) == bool(self.operations):
            raise invalid("it needs either operations or up, not both.", "Pass one of them.")
        if self.down is not None and self.up is None:
            raise invalid("it has down but no up.", "Pass up=, or remove down=.")
        if not isinstance(self.background, bool):
            raise invalid(
                f"background is {self.background!r}, not a boolean.", "Write background=True."
            )
        if isinstance(self.touches, str):
            raise invalid(
                "touches is a string, not a sequence of names.",
                f"Write touches=({self.touches!r},).",
            )
        for text in (*(self.touches or ()), *([] if self.table is None else [self.table])):
            if not is_table_name(text):
                raise invalid(
                    f"LanceDB does not accept a table named {text!r}.",
                    "Use at most 200 characters: letters (a to z), digits, and _ - . only.",
                )
        for given, versions in (("depends_on", self.depends_on), ("contracts", self.contracts)):
            for other, version in versions.items():
                if not _is_int(version) or version < 1 or not isinstance(other, str):
                    raise invalid(
                        f"{given} {other!r}: {version!r} is not a version.",
                        f'Write {given}={{"users": 2}}.',
                    )
        if self.contracts.get(name, 0) >= self.version:
            raise invalid(
                f"it contracts version {self.contracts[name]} of its own line, which does not come "
                "before it.",
                "Name an earlier version.",
            )
        if isinstance(self.operations, Operation):
            raise invalid("operations is one operation, not a list.", "Write operations=[...].")
        if not callable(self.operations):
            object.__setattr__(self, "operations", self._checked(self.operations))
        others = {line: version for line, version in self.contracts.items() if line != name}
        needed = {
            line: max(self.depends_on.get(line, 0), others.get(line, 0))
            for line in {**self.depends_on, **others}
        }
        object.__setattr__(self, "depends_on", MappingProxyType(needed))
        object.__setattr__(self, "contracts", MappingProxyType(dict(self.contracts)))

    def _checked(self, operations: Iterable[Operation]) -> tuple[Operation, ...]:
        given = tuple(operations)  # read it only once: it may be a generator
        for operation in given:
            if not isinstance(operation, Operation):
                raise InvalidMigrationError(
                    f"Migration of {self.name!r}: {operation!r} is not an operation.",
                    "Use operations from aiomigrate.op.",
                    line=self.name,
                    version=self.version,
                )
        return given

    @property
    def name(self) -> str:
        """The name of its line."""
        name = self.line or self.table
        assert name is not None  # noqa: S101 - __post_init__ checked it
        return name

    def resolve(self, params: Params) -> tuple[Operation, ...]:
        """Returns its operations for a run's parameters, each bound to a table.

        A migration with `up` has one operation, `Run`.

        Args:
            params: The run's parameters, passed to `operations` if that is a function.

        Raises:
            InvalidMigrationError: The function returned something else than operations, neither an
                operation nor the migration names a table, LanceDB does not accept a table name, or
                an operation uses a table that is not in `touches`.
        """
        if self.up is not None:
            return (Run(self.up, self.down, table=self.table),)
        found = self.operations(params) if callable(self.operations) else self.operations
        given = self._checked(found)
        bound = tuple(simple for o in given for simple in o.on(self.table).expand())
        for operation in bound:
            for table in operation.tables:
                if not is_table_name(table):
                    raise InvalidMigrationError(
                        f"Migration of {self.name!r}: LanceDB does not accept a table named "
                        f"{table!r}.",
                        "Use at most 200 characters: letters (a to z), digits, and _ - . only.",
                        line=self.name,
                        version=self.version,
                    )
            if operation.table is None and not operation.runs_code:
                raise InvalidMigrationError(
                    f"Migration of {self.name!r}: {operation.describe()!r} names no table.",
                    'Pass table="..." to the operation.',
                    line=self.name,
                    version=self.version,
                )
            if self.touches is not None and (others := set(operation.tables) - {*self.touches}):
                raise InvalidMigrationError(
                    f"Migration of {self.name!r}: {operation.describe()!r} uses table "
                    f"{min(others)!r}, which is not in touches.",
                    "Add the table to touches=(...).",
                    line=self.name,
                    version=self.version,
                )
        return bound


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A loaded migration, with its operations resolved for a run's parameters.

    Attributes:
        line: The name of its line.
        version: Its version.
        description: Its description.
        operations: Its operations, each bound to a table (`Run` may have none).
        touches: The tables that it may change, sorted.
        depends_on: Versions that must be applied first, by line.
        contracts: Versions whose savepoints may be deleted once it is applied, by line.
        background: Whether an application starts without waiting for it.
        checksum: The digest of its content, without formatting and comments.
        source: The name of its file, empty if it has none.
        table: The table of the line, `None` for a line without a table.
    """

    line: str
    version: int
    description: str
    operations: tuple[Operation, ...]
    touches: tuple[str, ...]
    depends_on: Mapping[str, int]
    checksum: str
    source: str = ""
    table: str | None = None
    contracts: Mapping[str, int] = field(default_factory=dict)
    background: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """Its line and version, which identify it."""
        return (self.line, self.version)

    @property
    def runs_code(self) -> bool:
        """Whether it runs a function of the user, so that its effect cannot be predicted."""
        return any(operation.runs_code for operation in self.operations)

    def __str__(self) -> str:
        return f"{self.line} {self.version}"


@dataclass(frozen=True, slots=True)
class Scripts:
    """All loaded migrations, with the queries that need no database.

    Attributes:
        all: Every script, ordered by version, then line.
        has_background: Whether any script is marked to run in the background.
    """

    all: tuple[Script, ...]
    has_background: bool = field(init=False, repr=False)
    _lines: Mapping[str, tuple[Script, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lines: dict[str, list[Script]] = {}
        for script in sorted(self.all, key=lambda s: (s.version, s.line)):
            lines.setdefault(script.line, []).append(script)
        object.__setattr__(self, "_lines", {k: tuple(v) for k, v in lines.items()})
        object.__setattr__(self, "has_background", any(s.background for s in self.all))

    def line_names(self) -> tuple[str, ...]:
        """Returns the names of all lines, sorted."""
        return tuple(sorted(self._lines))

    def of(self, line: str) -> tuple[Script, ...]:
        """Returns a line's scripts by version; empty for an unknown line."""
        return self._lines.get(line, ())

    def after(self, line: str, version: int) -> tuple[Script, ...]:
        """Returns a line's scripts above a version: those pending at that version."""
        return tuple(s for s in self.of(line) if s.version > version)

    def up_to(self, line: str, version: int) -> tuple[Script, ...]:
        """Returns a line's scripts at or below a version: those applied at that version."""
        return tuple(s for s in self.of(line) if s.version <= version)

    def latest(self, line: str) -> int:
        """Returns a line's newest version, 0 for an unknown line."""
        found = self.of(line)
        return found[-1].version if found else 0

    def get(self, line: str, version: int) -> Script | None:
        """Returns the script of a version, `None` if there is none."""
        return next((s for s in self.of(line) if s.version == version), None)

    def target(self, line: str, to: Target) -> int:
        """Returns a line's target: its newest version at or below the one that `to` asks for."""
        if to is None:
            return self.latest(line)
        limit = to if isinstance(to, int) else to.get(line)
        if limit is None:
            return self.latest(line)
        below = self.up_to(line, limit)
        return below[-1].version if below else 0
