"""From files to scripts: what is found, what is left alone, and every mistake by file."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aiomigrate import Migration, Scripts, op
from aiomigrate.errors import (
    AiomigrateError,
    ConfigurationError,
    DuplicateVersionError,
    InvalidMigrationError,
    ScriptError,
    ScriptImportError,
)
from aiomigrate.migration.loader import find, load

HEAD = "from aiomigrate import Migration, op\nimport pyarrow as pa\n"
ONE = (
    HEAD + 'it = Migration(table="{table}", version={version}, operations=[op.DropColumns("a")])\n'
)


def write(folder: Path, **files: str) -> Path:
    """Writes files named without `.py`, those that start with a number after an `n`."""
    for name, text in files.items():
        (folder / f"{re.sub(r'^n(?=[0-9])', '', name)}.py").write_text(text)
    return folder


def names(scripts: Scripts) -> list[str]:
    """Returns line, version and file of every script."""
    return [f"{s} {s.source}" for s in scripts.all]


def test_a_folder_is_read_by_the_numbers_of_its_files(tmp_path: Path) -> None:
    """Ordered by version, whatever the width of the numbers and the kind of separator."""
    write(
        tmp_path,
        n010_tags=ONE.format(table="tags", version=10),
        n2_memos=ONE.format(table="memos", version=2),
        n0003=ONE.format(table="users", version=3),
    )
    (tmp_path / "004-memos.py").write_text(ONE.format(table="memos", version=4))

    assert names(load(tmp_path, {})) == [
        "memos 2 2_memos.py", "users 3 0003.py", "memos 4 004-memos.py", "tags 10 010_tags.py",
    ]  # fmt: skip
    assert names(load(str(tmp_path), {})) == names(load(tmp_path, {}))


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    """Only `NNN_name.py` is imported: no notes, helpers, folders, caches."""
    write(tmp_path, n001_a=ONE.format(table="a", version=1))
    write(tmp_path, __init__="raise SystemExit", helpers="raise OSError", x001_b="1/0", n1a="1/0")
    (tmp_path / "002_b.py.orig").write_text("1/0")
    (tmp_path / "003_c.sql").write_text("DROP")
    (tmp_path / "004_d").mkdir()
    (tmp_path / "__pycache__").mkdir()

    assert names(load(tmp_path, {})) == ["a 1 001_a.py"]


def test_an_empty_folder_has_no_scripts(tmp_path: Path) -> None:
    """That is no mistake: the first migration is yet to be written."""
    assert load(tmp_path, {}).all == ()


def test_a_file_may_hold_several_lines_in_any_form(tmp_path: Path) -> None:
    """At module level: names, lists and tuples; what is bound twice counts once."""
    write(
        tmp_path,
        n001_a=HEAD
        + """
def make(table):
    return Migration(table=table, version=1, operations=[op.DropColumns("a")])
one = also = make("one")
_two = make("two")
several = [make("three"), one]
pair = (make("four"), "something else")
hidden = {"five": make("five")}
""",
    )

    assert [s.line for s in load(tmp_path, {}).all] == ["four", "one", "three", "two"]


def test_a_migration_imported_from_an_earlier_file_counts_once(tmp_path: Path) -> None:
    """Scanning is by identity: what another file made is that file's."""
    write(
        tmp_path,
        n001_a=HEAD
        + """
import sys
it = Migration(table="a", version=1, operations=[op.DropColumns("a")])
sys.modules["shared_by_a_test"] = sys.modules[__name__]
""",
        n002_b="from shared_by_a_test import it\n"
        + ONE.format(table="b", version=2).replace("it =", "mine ="),
    )

    try:
        assert names(load(tmp_path, {})) == ["a 1 001_a.py", "b 2 002_b.py"]
    finally:
        sys.modules.pop("shared_by_a_test", None)


def test_a_package_is_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given as the imported module, wherever it is installed."""
    folder = tmp_path / "history_of_a_test"
    folder.mkdir()
    write(folder, __init__="", n001_a=ONE.format(table="a", version=1))
    monkeypatch.syspath_prepend(tmp_path)

    assert names(load(importlib.import_module("history_of_a_test"), {})) == ["a 1 001_a.py"]


def test_a_package_without_a_folder_is_refused() -> None:
    """A built-in module has no files to look for."""
    with pytest.raises(ConfigurationError, match=r"'sys' has no folder"):
        find(sys)


def test_a_sequence_is_taken_as_it_is() -> None:
    """The migrations themselves, each once, without a file."""
    one = Migration(table="a", version=1, operations=[op.DropColumns("a")])
    two = Migration(table="a", version=2, operations=[op.DropColumns("b")])

    assert names(load([two, one, two], {})) == ["a 1 ", "a 2 "]
    with pytest.raises(InvalidMigrationError, match="'x' is not a Migration"):
        load([one, "x"], {})  # type: ignore[list-item]


def test_two_managers_load_one_folder_side_by_side(tmp_path: Path) -> None:
    """Loading twice imports twice: nothing is shared but the files."""
    write(tmp_path, n001_a=ONE.format(table="a", version=1))

    first, second = find(tmp_path), find(tmp_path)

    assert first[0][0] is not second[0][0]
    assert names(load(tmp_path, {})) == ["a 1 001_a.py"]


WRONG: dict[str, tuple[dict[str, str], type[AiomigrateError], str, str]] = {
    # files, error, what it says, the file it names
    "two files with one number": (
        {"n001_a": ONE.format(table="a", version=1), "n01_b": ONE.format(table="b", version=1)},
        DuplicateVersionError, r"01_b\.py and 001_a\.py have the same number", "01_b.py",
    ),
    "no migration": (
        {"n001_a": "x = 1\n"}, ScriptError, r"001_a\.py contains no Migration", "001_a.py",
    ),
    "another version": (
        {"n003_a": ONE.format(table="a", version=2)},
        ScriptError, r"003_a\.py contains version 2 of 'a'.*version=3", "003_a.py",
    ),
    "version 0": (
        {"n000_a": ONE.format(table="a", version=0)},
        InvalidMigrationError, r"000_a\.py: .*version 0 is not a positive integer", "000_a.py",
    ),
    "two of one version in a file": (
        {"n001_a": ONE.format(table="a", version=1) + ONE.format(table="a", version=1).replace(
            "it =", "other =")},
        DuplicateVersionError, r"Two migrations are version 1 of 'a' \(001_a\.py\)", "001_a.py",
    ),
    "a syntax error": (
        {"n001_a": "def f(:\n"}, ScriptImportError, r"001_a\.py cannot .*SyntaxError", "001_a.py",
    ),
    "a file that raises": (
        {"n001_a": "1/0\n"}, ScriptImportError, r"001_a\.py cannot .*ZeroDivisionError", "001_a.py",
    ),
    "a missing import": (
        {"n001_a": "import no_such_module\n"},
        ScriptImportError, r"001_a\.py cannot .*no_such_module", "001_a.py",
    ),
    "a file that exits": (
        {"n001_a": "raise SystemExit(3)\n"}, ScriptImportError,
        r"001_a\.py .*SystemExit: 3", "001_a.py",
    ),
    "text that is no source": (
        {"n001_a": "x = '\0'\n"}, ScriptImportError, r"001_a\.py cannot be imported", "001_a.py",
    ),
    "a migration that cannot be": (
        {"n001_a": HEAD + 'it = Migration(table="a", version=1)\n'},
        InvalidMigrationError,
        r"001_a\.py: Migration of 'a': it needs either operations or up", "001_a.py",
    ),
    "an operation that cannot be": (
        {"n001_a": HEAD + "it = op.DropColumns()\n"},
        InvalidMigrationError, r"001_a\.py: DropColumns: nothing is named", "001_a.py",
    ),
    "operations that raise for these parameters": (
        {"n001_a": HEAD + """
def operations(params):
    return [op.AddColumns({"v": pa.list_(pa.float32(), params["dimension"])})]
it = Migration(table="a", version=1, operations=operations)
"""},
        ScriptError,
        r"001_a\.py: operations\(params\) of 'a' version 1 raised KeyError: 'dimension'",
        "001_a.py",
    ),
    "operations that are none for these parameters": (
        {"n001_a": HEAD + 'it = Migration(table="a", version=1, operations=lambda p: [1])\n'},
        InvalidMigrationError, r"001_a\.py: .*1 is not an operation", "001_a.py",
    ),
    "operations of a table that is not touched": (
        {"n001_a": HEAD + """
it = Migration(line="l", version=1, touches=["a"], operations=[op.DropIndex("x", table="b")])
"""},
        InvalidMigrationError, r"001_a\.py: .*'b', which is not in touches", "001_a.py",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_a_mistake_in_a_script_is_told_by_its_file(
    case: tuple[dict[str, str], type[AiomigrateError], str, str], tmp_path: Path
) -> None:
    """Which file, what is wrong, what to do; and a failed import leaves no module behind."""
    files, kind, message, file = case
    write(tmp_path, **files)
    modules = set(sys.modules)

    with pytest.raises(kind, match=message) as caught:
        load(tmp_path, {})

    assert type(caught.value) is kind
    assert caught.value.remedy
    assert Path(caught.value.path or "").name == file
    if kind is ScriptImportError:
        assert set(sys.modules) == modules


def test_an_interruption_while_importing_is_not_taken_for_a_mistake(tmp_path: Path) -> None:
    """Ctrl-C stays Ctrl-C."""
    write(tmp_path, n001_a="raise KeyboardInterrupt\n")

    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, {})


def test_two_of_one_version_in_a_sequence_are_told() -> None:
    """Without files, by line and version."""
    one, two = (Migration(table="a", version=1, operations=[op.DropColumns(c)]) for c in "ab")

    with pytest.raises(
        DuplicateVersionError, match="Two migrations are version 1 of 'a'"
    ) as caught:
        load([one, two], {})

    assert (caught.value.line, caught.value.version) == ("a", 1)


@pytest.mark.parametrize("name", ["gone", "file.txt"])
def test_a_folder_that_is_none_is_told(name: str, tmp_path: Path) -> None:
    """The error names it and the command that makes one."""
    (tmp_path / "file.txt").write_text("")

    with pytest.raises(ConfigurationError, match="no migrations folder") as caught:
        load(tmp_path / name, {})

    assert "aiomigrate new" in caught.value.remedy
    assert caught.value.path == str(tmp_path / name)


def test_a_folder_that_cannot_be_looked_at_is_told(tmp_path: Path) -> None:
    """An error of the system is no traceback of ours."""
    with pytest.raises(ConfigurationError, match=r"cannot be read|no migrations folder"):
        load(tmp_path / ("x" * 5000), {})


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything"
)
def test_a_folder_or_file_without_permission_is_told(tmp_path: Path) -> None:
    """By name, before anything else."""
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, n001_a=ONE.format(table="a", version=1))

    (folder / "001_a.py").chmod(0)
    with pytest.raises(ScriptImportError, match=r"001_a\.py cannot be imported"):
        load(folder, {})
    folder.chmod(0)
    try:
        with pytest.raises(ConfigurationError, match="cannot be read"):
            load(folder, {})
    finally:
        folder.chmod(0o700)


def test_what_a_script_touches_is_known_beforehand() -> None:
    """What it declares, its own table, and those its operations name."""

    async def up(context: object) -> None:
        """Does nothing."""

    def touches(**values: Any) -> tuple[str, ...]:
        (script,) = load([Migration(version=1, **values)], {}).all
        return script.touches

    drop = op.DropIndex("a")
    elsewhere = op.DropIndex("a", table="users")
    assert touches(table="memos", operations=[drop]) == ("memos",)
    assert touches(table="memos", operations=[drop, elsewhere]) == ("memos", "users")
    assert touches(table="memos", up=up) == ("memos",)
    assert touches(table="memos", up=up, touches=["users"]) == ("memos", "users")
    assert touches(line="l", touches=["users"], operations=[elsewhere]) == ("users",)
    assert touches(line="l", touches=[], up=up) == ()


def test_operations_are_resolved_for_the_parameters_of_the_run() -> None:
    """The checksum is of the function, the operations are of this run."""

    def operations(params: Any) -> list[op.Operation]:
        return [op.AddColumns({"v": pa.list_(pa.float32(), params["dimension"])})]

    source = [Migration(table="memos", version=1, operations=operations)]

    (three,), (four,) = (load(source, {"dimension": n}).all for n in (3, 4))

    assert three.checksum == four.checksum
    assert three.operations[0].describe() == "add v fixed_size_list<item: float>[3]"
    assert four.operations[0].describe() == "add v fixed_size_list<item: float>[4]"
