"""The file `aiomigrate new` writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiomigrate import MigrationManager, load
from aiomigrate.authoring.scaffold import (
    DEFAULT_TABLE,
    draft,
    next_version,
    slug_of,
    table_in,
    write,
)
from aiomigrate.errors import ConfigurationError


class TestName:
    @pytest.mark.parametrize(
        ("names", "version"),
        [
            ([], 1),
            (["001_a.py", "002-b.py", "notes.txt", "__init__.py", "900_readme.md"], 3),
            (["014_a.py", "9.py"], 15),
            (["999_a.py"], 1000),
            (["12abc.py"], 1),
        ],
    )
    def test_number_is_above_the_highest(self, names: list[str], version: int) -> None:
        """The number follows the highest of the files that discovery would take."""
        assert version == next_version(names)

    def test_three_digits(self) -> None:
        """Numbers have three digits, so that a folder sorts by version."""
        assert draft(["041_x.py"], "Add tags").name == "042_add_tags.py"

    def test_no_number_left(self) -> None:
        """Versions are 32-bit: above the last there is none."""
        with pytest.raises(ConfigurationError, match="no higher one is possible"):
            next_version([f"{2**31 - 1}_x.py"])

    @pytest.mark.parametrize(
        ("description", "slug"),
        [
            ("Add tags!", "add_tags"),
            ("  memos.tagIds -> list  ", "memos_tagids_list"),
            ("日记 category", "日记_category"),
            ("..", None),
            ("../../etc/passwd", None),
            ("a/b", None),
            ("a\\b", None),
            ("a\0b", None),
            ("", None),
        ],
    )
    def test_slug(self, description: str, slug: str | None) -> None:
        """A description becomes a file name that cannot leave the folder, or is refused."""
        if slug is None:
            with pytest.raises(ConfigurationError):
                slug_of(description)
        else:
            assert slug == slug_of(description)

    def test_slug_is_short(self) -> None:
        """A long description does not make a name the file system refuses."""
        assert len(slug_of("word " * 100)) <= 60


class TestTable:
    @pytest.mark.parametrize(
        ("description", "table"),
        [
            ("create users", "users"),
            ("Create table push_rules", "push_rules"),
            ("add tags to memos", "memos"),
            ("drop avatar from the users", "users"),
            ("add tags", DEFAULT_TABLE),
        ],
    )
    def test_is_taken_from_the_description(self, description: str, table: str) -> None:
        """Without --table the name is taken from plain wording, else it is neutral."""
        assert table == table_in(description)

    def test_given_table_wins(self) -> None:
        """--table is used as it is."""
        new = draft([], "add tags to memos", table="notes")

        assert new.table == "notes"
        assert 'TABLE = "notes"' in new.text

    @pytest.mark.parametrize("table", ["", ":run", "a\nb"])
    def test_no_table(self, table: str) -> None:
        """A name no table can have is refused."""
        with pytest.raises(ConfigurationError, match="not a valid table name"):
            draft([], "add tags", table=table)


class TestFile:
    async def test_runs_as_it_is(self, tmp_path: Path) -> None:
        """Written files load and upgrade a database untouched by hand, one after the other."""
        folder = tmp_path / "deep" / "migrations"
        write(folder, "add tags", table="memos")
        write(folder, "add tags to users")

        async with MigrationManager(tmp_path / "db", migrations=folder) as manager:
            report = await manager.initialize()

        assert report.lines == {"memos": 1, "users": 2}
        assert [step.commits for step in report.steps] == [0, 0]

    @pytest.mark.parametrize(
        "description", ['say "hi"', "it's a {brace} 日记", 'x """ y', "100 %s"]
    )
    def test_any_description_makes_a_script(self, tmp_path: Path, description: str) -> None:
        """Quotes and braces in a description end up as text in the file."""
        path, new = write(tmp_path, description)

        (script,) = load(tmp_path, {}).all
        assert (script.version, script.description) == (new.version, description)
        assert path.parent == tmp_path

    def test_says_that_functions_must_be_idempotent(self) -> None:
        """The contract of functions stands in every file."""
        text = draft([], "add tags").text

        assert "idempotent" in text.split('"""')[1]
        assert "-> None" in text

    def test_the_commented_example_is_valid(self, tmp_path: Path) -> None:
        """The declarative example in the file works when its comment signs are removed."""
        path, _ = write(tmp_path, "add tags", table="memos")
        text, _, example = path.read_text().partition("# import pyarrow as pa\n")
        lines = [line.removeprefix("# ") for line in example.split("\n")]
        text = text.replace("Migration(table", "dict(table")
        path.write_text("\n".join([text, "import pyarrow as pa", *lines]))

        (script,) = load(tmp_path, {}).all

        assert [o.describe() for o in script.operations][1] == "index tags (LabelList)"

    def test_nothing_is_imported(self, tmp_path: Path) -> None:
        """A broken neighbour does not keep one from writing the next file."""
        (tmp_path / "001_broken.py").write_text("raise SystemExit('imported')")

        path, _ = write(tmp_path, "repair")

        assert path.name == "002_repair.py"

    def test_folder_that_is_a_file(self, tmp_path: Path) -> None:
        """A folder that cannot be one is told as such."""
        (tmp_path / "file").touch()

        with pytest.raises(ConfigurationError, match="cannot be written"):
            write(tmp_path / "file", "add tags")
