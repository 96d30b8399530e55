"""Generates the next migration file, as written by `aiomigrate new`.

Reads only the names of existing files and imports none of them, so that a broken script does not
prevent writing the next one. `migration.loader` loads scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aiomigrate.errors import ConfigurationError

DEFAULT_TABLE = "app"
MAX_VERSION = 2**31 - 1
_MAX_SLUG_LENGTH = 60
_FILE = re.compile(r"^(\d+)(?:[-_].*)?\.py$")
_TABLE_PATTERNS = (
    re.compile(r"\b(?:to|from|of|on|in|into)\s+(?:the\s+)?([A-Za-z_]\w*)\s*$", re.IGNORECASE),
    re.compile(r"^\s*create\s+(?:table\s+)?([A-Za-z_]\w*)\s*$", re.IGNORECASE),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The name and content of a migration file that is not yet written.

    Attributes:
        name: The name of the file.
        version: The number in the file's name, and the version of its migration.
        table: The table of the migration.
        text: The content of the file.
    """

    name: str
    version: int
    table: str
    text: str


def draft(names: Iterable[str], description: str, *, table: str | None = None) -> Draft:
    """Returns the migration file that follows the existing ones. Writes nothing.

    Args:
        names: Names of the existing files.
        description: A few words, used for the file's name and as the migration's description.
        table: The table of the migration; by default taken from a description such as
            "create users" or "add tags to memos", else `app`.

    Raises:
        ConfigurationError: The description or the table name is invalid, or there is no higher
            version.
    """
    words = " ".join(description.split())
    slug = slug_of(words)
    name = table_in(words) if table is None else table
    if not name or name[0] == ":" or not name.isprintable():
        raise ConfigurationError(f"{name!r} is not a valid table name.", "Pass --table NAME.")
    version = next_version(names)
    return Draft(
        name=f"{version:03d}_{slug}.py",
        version=version,
        table=name,
        text=_text(version, words, name),
    )


def slug_of(description: str) -> str:
    """Returns a description as part of a file's name: lower case, with `_` between words.

    Raises:
        ConfigurationError: The description contains a slash, a backslash or an unprintable
            character, or neither a letter nor a digit.
    """
    if any(c in "/\\" or not c.isprintable() for c in description):
        raise ConfigurationError(
            f"{description!r} contains a slash, a backslash or an unprintable character.",
            'Describe the change in a few words: aiomigrate new "add tags".',
        )
    slug = re.sub(r"\W+", "_", description.lower())[:_MAX_SLUG_LENGTH].strip("_")
    if not slug:
        raise ConfigurationError(
            f"{description!r} contains no letter or digit, so no file can be named after it.",
            'Describe the change in a few words: aiomigrate new "add tags".',
        )
    return slug


def table_in(description: str) -> str:
    """Returns the table that a description names, or `DEFAULT_TABLE`."""
    for pattern in _TABLE_PATTERNS:
        if match := pattern.search(description):
            return match[1]
    return DEFAULT_TABLE


def next_version(names: Iterable[str]) -> int:
    """Returns the version above the highest one in the file names; 1 if there is none.

    Raises:
        ConfigurationError: The highest version is the largest possible one.
    """
    taken = [int(match[1]) for name in names if (match := _FILE.match(name))]
    version = max(taken, default=0) + 1
    if version > MAX_VERSION:
        raise ConfigurationError(
            f"The highest version in the folder is {version - 1}; no higher one is possible.",
            "Versions are 32-bit integers: renumber the files.",
        )
    return version


def write(folder: Path, description: str, *, table: str | None = None) -> tuple[Path, Draft]:
    """Writes the next migration file. Creates the folder if needed; never overwrites a file.

    Args:
        folder: The folder of the migration files.
        description: See `draft`.
        table: See `draft`.

    Returns:
        The path of the file and its content.

    Raises:
        ConfigurationError: The description or the table name is invalid, there is no higher
            version, or the folder cannot be written.
    """
    try:
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        new = draft(names, description, table=table)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / new.name
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(new.text)
    except OSError as exc:
        raise ConfigurationError(
            f"{folder} cannot be written: {exc.strerror}.",
            "Check the folder, or pass another one with --migrations.",
            path=folder,
        ) from exc
    return path, new


def _text(version: int, description: str, table: str) -> str:
    title = description.replace('"', "'")
    title = title[0].upper() + title[1:]
    return _TEMPLATE.format(
        version=version,
        title=title + ("" if title.endswith((".", "!", "?")) else "."),
        description=_literal(description),
        table=_literal(table),
    )


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


_TEMPLATE = '''"""{title}

`aiomigrate plan` shows what this migration does; `aiomigrate upgrade` applies it once. Do not edit
this file after it was applied anywhere: write a new one.

Functions must be idempotent: an interrupted migration is run again. Import nothing from your
application's models: later changes to them must not change this migration.
"""

from aiomigrate import Context, Migration

TABLE = {table}


async def up(ctx: Context) -> None:
    """Does nothing yet. Must be idempotent: it may run again after a crash."""
    table = ctx.table()
    ctx.log.info("nothing to do yet", exists=table.exists)
    # Every write is one commit, so write many rows in one call:
    # await table.update({{"nickname": "-"}}, where="nickname IS NULL")


migration = Migration(table=TABLE, version={version}, description={description}, up=up)

# Prefer declarative operations where possible: they are checked before anything is written, and
# are undone or resumed after a crash. Instead of `up`:
#
# import pyarrow as pa
# from aiomigrate import op
#
# migration = Migration(
#     table=TABLE,
#     version={version},
#     description={description},
#     operations=[
#         op.AddColumns({{"tags": pa.list_(pa.string())}}),
#         op.CreateIndex("tags", kind="LabelList"),
#     ],
# )
'''
