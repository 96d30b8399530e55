"""The values everything else speaks in: migrations, journal events, head rows.

Frozen, without I/O. Not for deciding (see `fold` and `plan`) nor for storing (see `ledger`).
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
"""A migration: its line and its version."""

Params = Mapping[str, Any]
Target = int | Mapping[str, int] | None
"""Where to go: every line to its newest script (`None`), to at most a version, or line by line."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Migration:
    """One step of one line, to `version`.

    Attributes:
        version: A positive integer, unique in its line, equal to the number of its file.
        table: The table it changes; also the name of its line.
        line: The name of its line where that is not a table (then give `touches`).
        description: A few words, shown wherever the migration is.
        operations: What to do, in order; or a function of the run's parameters returning that.
        up: An async function of a `Context`, instead of `operations`; it must be idempotent.
        down: The inverse of `up`.
        touches: The tables it changes; by default `table` and those its operations name.
        depends_on: Version of another line that must be applied first, by line.
        contracts: The compatible halves that this one completes: once it is applied, the
            savepoints kept for them are given up. Version by line; those of other lines are
            depended on.
        background: Whether an application's start does not wait for it, nor for what comes after
            it. It may be changed at any time: it is not part of the checksum.

    Raises:
        InvalidMigrationError: The values cannot be.
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
                    f"{text!r} is no name for a table or line.",
                    "Use a non-empty string that does not start with a colon.",
                    **where,
                )
        if name is None:
            raise InvalidMigrationError(
                "A Migration names no table.", 'Pass table="..." (or line= and touches=).'
            )

        def wrong(what: str, remedy: str) -> InvalidMigrationError:
            return InvalidMigrationError(f"Migration of {name!r}: {what}", remedy, **where)

        if not _is_int(self.version) or not 1 <= self.version <= MAX_VERSION:
            raise wrong(
                f"version {self.version!r} is not a positive integer.",
                "Number it like its file: 004_add_tags.py holds version 4.",
            )
        if self.table is None and self.touches is None:
            raise wrong("a line without a table touches nothing.", "Pass touches=(tables...).")
        if (self.up is not None) == bool(self.operations):
            raise wrong("it needs operations or up, not both.", "Pass one of them.")
        if self.down is not None and self.up is None:
            raise wrong("down has no up.", "Pass up=, or leave down= out.")
        if not isinstance(self.background, bool):
            raise wrong(f"background is {self.background!r}.", "Write background=True.")
        if isinstance(self.touches, str):
            raise wrong("touches is text, not names.", f"Write touches=({self.touches!r},).")
        for text in (*(self.touches or ()), *([] if self.table is None else [self.table])):
            if not is_table_name(text):
                raise wrong(
                    f"LanceDB takes no table named {text!r}.",
                    "Use up to 200 letters (a to z), digits and _ - . only.",
                )
        for given, versions in (("depends_on", self.depends_on), ("contracts", self.contracts)):
            for other, version in versions.items():
                if not _is_int(version) or version < 1 or not isinstance(other, str):
                    raise wrong(
                        f"{given} {other!r}: {version!r} is no version.",
                        f'Write {given}={{"users": 2}}.',
                    )
        if self.contracts.get(name, 0) >= self.version:
            raise wrong(
                f"it contracts its own version {self.contracts[name]}, which does not come before.",
                "Name an earlier version.",
            )
        if isinstance(self.operations, Operation):
            raise wrong("operations is one operation, not a list.", "Write operations=[...].")
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
        given = tuple(operations)  # once: it may be a generator
        for operation in given:
            if not isinstance(operation, Operation):
                raise InvalidMigrationError(
                    f"Migration of {self.name!r}: {operation!r} is no operation.",
                    "Use operations from aiomigrate.op.",
                    line=self.name,
                    version=self.version,
                )
        return given

    @property
    def name(self) -> str:
        """The line it belongs to."""
        name = self.line or self.table
        assert name is not None  # noqa: S101 - __post_init__ checked it
        return name

    def resolve(self, params: Params) -> tuple[Operation, ...]:
        """Returns its operations for a run's parameters, each bound to a table.

        Raises:
            InvalidMigrationError: The function of the parameters returned something else, or an
                operation names no table and neither does the migration.
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
                        f"Migration of {self.name!r}: LanceDB takes no table named {table!r}.",
                        "Use up to 200 letters (a to z), digits and _ - . only.",
                        line=self.name,
                        version=self.version,
                    )
            if operation.table is None and not isinstance(operation, Run):
                raise InvalidMigrationError(
                    f"Migration of {self.name!r}: {operation.describe()!r} names no table.",
                    'Pass table="..." to the operation.',
                    line=self.name,
                    version=self.version,
                )
            if self.touches is not None and (others := set(operation.tables) - {*self.touches}):
                raise InvalidMigrationError(
                    f"Migration of {self.name!r}: {operation.describe()!r} concerns table "
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
    """A migration as loaded: resolved for a run's parameters, with where it came from.

    Attributes:
        line: Its line.
        version: Its version.
        description: Its description.
        operations: Its operations, each bound to a table (`Run` may have none).
        touches: Tables it may change, sorted.
        depends_on: Version that must be applied first, by line.
        contracts: Version whose savepoints are given up once it is applied, by line.
        background: Whether an application's start does not wait for it.
        checksum: Digest of its content; formatting and comments do not count.
        source: The file's name, or empty.
        table: The table of the line, `None` for a pseudo-table.
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
        """Line and version: what identifies it."""
        return (self.line, self.version)

    @property
    def runs_code(self) -> bool:
        """Whether a function of the user's takes part, so that its effect cannot be predicted."""
        return any(isinstance(operation, Run) for operation in self.operations)

    def __str__(self) -> str:
        return f"{self.line} {self.version}"


@dataclass(frozen=True, slots=True)
class Scripts:
    """All loaded migrations: the questions that need no database.

    Attributes:
        all: Every script, ordered by version, then line.
        has_background: Whether any of them is marked to run in the background.
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
        """Returns the names of all lines (tables and pseudo-tables), sorted."""
        return tuple(sorted(self._lines))

    def of(self, line: str) -> tuple[Script, ...]:
        """Returns a line's scripts by version; empty for an unknown line."""
        return self._lines.get(line, ())

    def after(self, line: str, version: int) -> tuple[Script, ...]:
        """Returns a line's scripts above a version: those pending there."""
        return tuple(s for s in self.of(line) if s.version > version)

    def up_to(self, line: str, version: int) -> tuple[Script, ...]:
        """Returns a line's scripts at or below a version: those applied there."""
        return tuple(s for s in self.of(line) if s.version <= version)

    def latest(self, line: str) -> int:
        """Returns a line's newest version, 0 for an unknown line."""
        found = self.of(line)
        return found[-1].version if found else 0

    def get(self, line: str, version: int) -> Script | None:
        """Returns one script, `None` if there is none."""
        return next((s for s in self.of(line) if s.version == version), None)

    def target(self, line: str, to: Target) -> int:
        """Returns the version a line goes to: its newest script at or below what `to` asks."""
        if to is None:
            return self.latest(line)
        limit = to if isinstance(to, int) else to.get(line)
        if limit is None:
            return self.latest(line)
        below = self.up_to(line, limit)
        return below[-1].version if below else 0
