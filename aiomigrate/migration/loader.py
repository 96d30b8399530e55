"""Loads migrations from a folder, a package or a sequence.

This module imports migration files and checks each of them; `planning.reconcile` and
`planning.plan` check whether they fit a database. The manager imports the files of a folder once,
in a thread.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import types
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from aiomigrate.errors import (
    ConfigurationError,
    DuplicateVersionError,
    InvalidMigrationError,
    ScriptError,
    ScriptImportError,
)
from aiomigrate.migration.checksum import PARSE_LOCK, checksum
from aiomigrate.migration.model import Migration, Params, Script, Scripts

Source = str | Path | types.ModuleType | Sequence[Migration] | Scripts
"""Where migrations come from: a folder, a package, a sequence of migrations, or loaded scripts."""

_FILE = re.compile(r"^(\d+)[-_].*\.py$|^(\d+)\.py$")


def load(source: Source, params: Params) -> Scripts:
    """Imports and checks all migrations. Blocks, because imports run user code.

    Args:
        source: A folder (files `NNN_name.py`; other files must contain no migration), a package, a
            sequence of migrations, or loaded scripts, which are returned unchanged.
        params: The run's parameters, passed to `operations` where that is a function.

    Returns:
        All scripts; none for an empty folder.

    Raises:
        ConfigurationError: The folder does not exist or cannot be read.
        ScriptError: A file cannot be imported, contains no migration or one with another version,
            or two migrations have the same version of a line; a file without a number contains a
            migration, or a link leads nowhere.
    """
    return source if isinstance(source, Scripts) else check(find(source), params)


def find(
    source: str | Path | types.ModuleType | Sequence[Migration],
) -> list[tuple[Migration, str]]:
    """Returns every migration once, with the name of its file (empty if it has none).

    Raises:
        ConfigurationError: The folder does not exist or cannot be read.
        ScriptError: A file cannot be imported, contains no migration, or contains one whose
            version is not the number of the file; or an item of the sequence is no migration.
    """
    if isinstance(source, types.ModuleType):
        file = getattr(source, "__file__", None)
        if not file:
            raise ConfigurationError(
                f"Package {source.__name__!r} has no folder.",
                "Pass a folder or a sequence of migrations.",
            )
        source = Path(file).parent
    if isinstance(source, str | Path):
        return _from_folder(Path(source))
    found: list[tuple[Migration, str]] = []
    for item in source:
        if not isinstance(item, Migration):
            raise InvalidMigrationError(f"{item!r} is not a Migration.", "Pass Migration objects.")
        if all(item is not known for known, _ in found):
            found.append((item, ""))
    return found


def _from_folder(folder: Path) -> list[tuple[Migration, str]]:
    folder = folder.expanduser().absolute()
    try:
        if not folder.is_dir():
            raise ConfigurationError(
                f"There is no migrations folder {folder}.",
                'Create it with `aiomigrate new "first migration"`, or pass --migrations.',
                path=folder,
            )
        entries = sorted(folder.iterdir())
    except OSError as exc:
        raise ConfigurationError(
            f"The migrations folder {folder} cannot be read: {exc.strerror}.",
            "Check its permissions.",
            path=folder,
        ) from exc
    numbered = _numbered(entries)
    found: list[tuple[Migration, str]] = []
    for number, path in numbered.items():
        found += [(migration, path.name) for migration in _from_file(path, number, found)]
    linked = {path.resolve() for path in numbered.values()}
    for path in entries:
        if _is_source(path) and path.resolve() not in linked:
            _refuse_migrations_in(path, found)
    return found


def _is_source(path: Path) -> bool:
    return path.suffix.lower() == ".py" and not path.name.startswith(".")  # editors hide files


def _numbered(entries: Iterable[Path]) -> dict[int, Path]:
    """Returns the files of migrations by number, in the order of their names.

    Raises:
        ScriptError: Two have the same number, one is no file, or a link leads nowhere.
    """
    numbered: dict[int, Path] = {}
    for path in filter(_is_source, entries):
        if path.is_symlink() and not path.exists():
            raise ScriptError(
                f"{path.name} is a link to {path.readlink()}, which does not exist.",
                "Restore the file, or remove the link.",
                path=path,
            )
        match = _FILE.match(path.name)
        if match is None:
            continue
        if not path.is_file():
            raise ScriptError(
                f"{path.name} has the name of a migration, but is no file.", "Rename it.", path=path
            )
        number = int(match[1] or match[2])
        if number in numbered:
            raise DuplicateVersionError(
                f"{path.name} and {numbered[number].name} have the same number.",
                "Change the number of the newer file, and the version in it.",
                version=number,
                path=path,
            )
        numbered[number] = path
    return numbered


def _refuse_migrations_in(path: Path, found: Iterable[tuple[Migration, str]]) -> None:
    """Checks that a file without a number has no migration that would silently not be run.

    It is not imported: only statements are looked at. Migrations that a numbered file imports from
    it are no error.
    """
    if not path.is_file():
        return
    try:
        source = path.read_bytes()
    except OSError as exc:
        raise ScriptError(
            f"{path.name} cannot be read: {exc.strerror}.", "Check its permissions.", path=path
        ) from exc
    if not _has_migration(source):
        return
    known = {id(migration) for migration, _ in found}
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            values = [value for value in vars(module).values() if isinstance(value, Migration)]
            if values and all(id(value) in known for value in values):
                return
    raise ScriptError(
        f"{path.name} contains a migration, but its name does not begin with a number: it would "
        "not be run.",
        "Name it NNN_name.py, where NNN is the version of its migrations.",
        path=path,
    )


def _has_migration(source: bytes) -> bool:
    """Returns whether statements of a module make a migration, outside functions and classes."""
    try:
        with PARSE_LOCK:
            pending: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError):
        return b"Migration(" in source
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            if name == Migration.__name__:
                return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return False


def _from_file(path: Path, number: int, known: Iterable[tuple[Migration, str]]) -> list[Migration]:
    module = _import(path)
    seen = {id(migration) for migration, _ in known}
    found: list[Migration] = []
    for value in vars(module).values():
        items = value if isinstance(value, list | tuple) else [value]
        for item in items:
            if isinstance(item, Migration) and id(item) not in seen:
                seen.add(id(item))
                found.append(item)
    for migration in found:
        if migration.version != number:
            raise ScriptError(
                f"{path.name} contains version {migration.version} of {migration.name!r}.",
                "The version must be the number of the file: "
                f"write version={number}, or rename the file.",
                line=migration.name,
                version=migration.version,
                path=path,
            )
    if not found:
        raise ScriptError(
            f"{path.name} contains no Migration.",
            f'Assign one at module level: users = Migration(table="users", version={number}, ...).',
            path=path,
        )
    return found


def _import(path: Path) -> types.ModuleType:
    name = f"_aiomigrate_scripts_.{abs(hash(str(path.parent)))}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ScriptImportError(
            f"{path.name} cannot be imported.", "Check that it is a .py file.", path=path
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        del sys.modules[name]
        if isinstance(exc, InvalidMigrationError):
            raise InvalidMigrationError(
                f"{path.name}: {exc.what}",
                exc.remedy,
                line=exc.line,
                version=exc.version,
                path=path,
            ) from exc
        raise ScriptImportError(
            f"{path.name} cannot be imported: {type(exc).__name__}: {exc}.",
            "Correct the file; run it with `python` to see the full traceback.",
            path=path,
        ) from exc
    return module


def check(found: Iterable[tuple[Migration, str]], params: Params) -> Scripts:
    """Resolves migrations for a run's parameters and checks that no version occurs twice.

    Raises:
        ScriptError: Two migrations have the same version of a line, or a migration is invalid.
    """
    scripts: dict[tuple[str, int], Script] = {}
    for migration, source in found:
        script = _script(migration, source, params)
        if (other := scripts.get(script.key)) is not None:
            files = " and ".join(sorted({source or "one", other.source or "another"}))
            raise DuplicateVersionError(
                f"Two migrations are version {script.version} of {script.line!r} ({files}).",
                "Give one of them another version.",
                line=script.line,
                version=script.version,
                path=source or None,
            )
        scripts[script.key] = script
    return Scripts(tuple(sorted(scripts.values(), key=lambda s: (s.version, s.line))))


def _script(migration: Migration, source: str, params: Params) -> Script:
    try:
        operations = migration.resolve(params)
    except InvalidMigrationError as exc:
        raise InvalidMigrationError(
            f"{source}: {exc.what}" if source else exc.what,
            exc.remedy,
            line=migration.name,
            version=migration.version,
            path=source or None,
        ) from exc
    except Exception as exc:  # the user's function of the parameters
        raise ScriptError(
            f"{source or migration.name}: operations(params) of {migration.name!r} version "
            f"{migration.version} raised {type(exc).__name__}: {exc}.",
            "Check the given parameters (-x key=value).",
            line=migration.name,
            version=migration.version,
            path=source or None,
        ) from exc
    touches = set(migration.touches or ())
    touches |= {table for operation in operations for table in operation.tables}
    if migration.table and migration.touches is None:
        touches.add(migration.table)
    return Script(
        line=migration.name,
        version=migration.version,
        description=migration.description,
        operations=operations,
        touches=tuple(sorted(touches)),
        depends_on=dict(migration.depends_on),
        checksum=checksum(migration),
        source=source,
        table=migration.table,
        contracts=dict(migration.contracts),
        background=migration.background,
    )


def refuse_tables(scripts: Scripts, names: Collection[str]) -> None:
    """Checks that no migration changes aiomigrate's own tables.

    Args:
        scripts: All scripts.
        names: The names of those tables.

    Raises:
        InvalidMigrationError: A migration changes one of them.
    """
    for script in scripts.all:
        if found := {script.line, *script.touches} & set(names):
            raise InvalidMigrationError(
                f"{script.source or script}: aiomigrate keeps its records in table {min(found)!r}.",
                "Use another table, or pass another ledger= to the manager.",
                line=script.line,
                version=script.version,
                path=script.source or None,
            )
