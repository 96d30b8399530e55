"""The next migration file, as `aiomigrate new` writes it.

From file names only: nothing is imported, so that a broken script does not keep one from writing
the next. Not for loading them: that is `discovery`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aiomigrate.errors import ConfigurationError

DEFAULT_TABLE = "app"
MAX_VERSION = 2**31 - 1
_MAX_SLUG = 60
_FILE = re.compile(r"^(\d+)(?:[-_].*)?\.py$")
_TABLE_IN_WORDS = (
    re.compile(r"\b(?:to|from|of|on|in|into)\s+(?:the\s+)?([A-Za-z_]\w*)\s*$", re.IGNORECASE),
    re.compile(r"^\s*create\s+(?:table\s+)?([A-Za-z_]\w*)\s*$", re.IGNORECASE),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A migration file to be written.

    Attributes:
        name: The file's name.
        version: Its number, and the version in it.
        table: The table it is for.
        text: Its content.
    """

    name: str
    version: int
    table: str
    text: str


def draft(names: Iterable[str], description: str, *, table: str | None = None) -> Draft:
    """Returns the migration file that follows some others.

    Args:
        names: Names of the files that are there.
        description: A few words: the file's name and the migration's description.
        table: The table it is for; by default taken from words such as "create users" or
            "add tags to memos", else `app`.

    Raises:
        ConfigurationError: The description or the table cannot be, or there is no number left.
    """
    words = " ".join(description.split())
    slug = slug_of(words)
    name = table_in(words) if table is None else table
    if not name or name[0] == ":" or not name.isprintable():
        raise ConfigurationError(f"{name!r} is no name of a table.", "Pass --table NAME.")
    version = next_version(names)
    return Draft(
        name=f"{version:03d}_{slug}.py",
        version=version,
        table=name,
        text=_text(version, words, name),
    )


def slug_of(description: str) -> str:
    """Returns a description as part of a file's name.

    Raises:
        ConfigurationError: It is a path, or nothing would be left of it.
    """
    if any(c in "/\\" or not c.isprintable() for c in description):
        raise ConfigurationError(
            f"{description!r} would leave the migrations folder.",
            'Describe the change in a few words: aiomigrate new "add tags".',
        )
    slug = re.sub(r"\W+", "_", description.lower())[:_MAX_SLUG].strip("_")
    if not slug:
        raise ConfigurationError(
            f"{description!r} has no letter or digit to name a file by.",
            'Describe the change in a few words: aiomigrate new "add tags".',
        )
    return slug


def table_in(description: str) -> str:
    """Returns the table a description names, or a neutral name."""
    for pattern in _TABLE_IN_WORDS:
        if match := pattern.search(description):
            return match[1]
    return DEFAULT_TABLE


def next_version(names: Iterable[str]) -> int:
    """Returns the number above the highest of some files.

    Raises:
        ConfigurationError: There is no number left.
    """
    taken = [int(match[1]) for name in names if (match := _FILE.match(name))]
    version = max(taken, default=0) + 1
    if version > MAX_VERSION:
        raise ConfigurationError(
            f"The highest number of the folder is {version - 1}: there is no number above it.",
            "Versions are 32-bit integers: renumber the files.",
        )
    return version


def write(folder: Path, description: str, *, table: str | None = None) -> tuple[Path, Draft]:
    """Writes the next migration file; makes the folder if it is missing, overwrites nothing.

    Raises:
        ConfigurationError: The description cannot be, or the folder cannot be written.
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
            "Check the folder, or pass another with --migrations.",
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

`aiomigrate plan` shows what this would do, `aiomigrate upgrade` does it, once. Do not edit it
after it was applied anywhere: write a new one.

Functions must be idempotent: a migration that was interrupted is run again. Import nothing from
your application's live models: what they are today must not change what this did.
"""

from aiomigrate import Context, Migration

TABLE = {table}


async def up(ctx: Context) -> None:
    """Does nothing yet. Must be idempotent: it may be run again after a crash."""
    table = ctx.table()
    ctx.log.info("nothing to do yet", exists=table.exists)
    # Every write is one commit, so write many rows at once:
    # await table.update({{"nickname": "-"}}, where="nickname IS NULL")


migration = Migration(table=TABLE, version={version}, description={description}, up=up)

# Declarative is better where it can say it: it is checked before anything is written, and undone
# or taken up again after a crash. Instead of `up`:
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
