"""Settings: where they come from, which wins, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from aiomigrate.errors import ConfigurationError
from aiomigrate.settings import (
    KEYS,
    Settings,
    check,
    find_table,
    from_env,
    from_table,
    load,
    merge,
    parse_pairs,
    parse_params,
    parse_target,
)


def write(folder: Path, text: str) -> Path:
    """Writes a pyproject.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pyproject.toml"
    path.write_text(text)
    return path


class TestPrecedence:
    def test_defaults(self, tmp_path: Path) -> None:
        """Without any setting it is ./data/app.lancedb with the scripts in ./migrations."""
        found = load({}, cwd=tmp_path, env={})

        assert found == Settings()
        assert (found.uri, found.migrations) == ("./data/app.lancedb", "./migrations")

    def test_command_line_over_environment_over_file(self, tmp_path: Path) -> None:
        """The command line wins over the environment, that over pyproject.toml."""
        write(tmp_path, "[tool.aiomigrate]\nconcurrency = 1\nlease_ttl = 1\nledger = 'file'\n")
        env = {"AIOMIGRATE_CONCURRENCY": "2", "AIOMIGRATE_LEASE_TTL": "2.5", "OTHER": "x"}

        found = load({"concurrency": 3}, cwd=tmp_path, env=env)

        assert (found.concurrency, found.lease_ttl, found.ledger) == (3, 2.5, "file")

    def test_mappings_are_merged_by_key(self) -> None:
        """Params and storage options are merged key by key, later sources winning."""
        layers = [{"params": {"a": 1, "b": 1}}, {"params": {"b": 2}}, {"params": {"c": 3}}]

        assert merge(layers).params == {"a": 1, "b": 2, "c": 3}

    def test_every_setting_has_a_variable(self) -> None:
        """Each key of pyproject.toml can also be given as AIOMIGRATE_KEY."""
        texts = {
            "concurrency": "4",
            "lease_ttl": "5",
            "lease_wait": "0",
            "timeout": "1.5",
            "on_ahead": "warn",
            "on_destructive": "refuse",
            "on_unsafe_store": "warn",
            "keep_savepoints": "0",
            "params": '{"d": 1}',
            "storage_options": '{"region": "x", "n": 1, "flag": true}',
        }

        found = from_env({f"AIOMIGRATE_{key.upper()}": texts.get(key, "./x") for key in KEYS})

        assert set(found) == set(KEYS)
        assert found["concurrency"] == 4
        assert found["storage_options"] == {"region": "x", "n": "1", "flag": "true"}

    def test_empty_variable_counts_as_unset(self) -> None:
        """An empty variable, as container files leave them, does not hide the file's value."""
        assert from_env({"AIOMIGRATE_URI": ""}) == {}


class TestFile:
    def test_nearest_table_of_the_parents(self, tmp_path: Path) -> None:
        """The nearest pyproject.toml with the table counts, one without it is passed over."""
        wanted = write(tmp_path / "a", "[tool.aiomigrate]\nledger = 'near'\n")
        write(tmp_path, "[tool.aiomigrate]\nledger = 'far'\n")
        write(tmp_path / "a" / "b", "[tool.other]\n")

        assert find_table(tmp_path / "a" / "b") == ({"ledger": "near"}, wanted)

    def test_paths_are_relative_to_the_file(self, tmp_path: Path) -> None:
        """A path in pyproject.toml is meant from its folder, a URI as it is."""
        path = tmp_path / "pyproject.toml"

        local = from_table({"uri": "data/x", "migrations": "m"}, path, env={})
        remote = from_table({"uri": "s3://bucket/x"}, path, env={})

        assert local == {"uri": str(tmp_path / "data/x"), "migrations": str(tmp_path / "m")}
        assert remote == {"uri": "s3://bucket/x"}

    @pytest.mark.parametrize("text", ["[tool.aiomigrate", "[tool]\naiomigrate = 1\n"])
    def test_broken_file(self, tmp_path: Path, text: str) -> None:
        """A file that is not TOML, or has no table there, is named."""
        path = write(tmp_path, text)

        with pytest.raises(ConfigurationError, match=r"pyproject\.toml") as caught:
            load({}, cwd=tmp_path, env={})

        assert caught.value.path == str(path)


class TestRefused:
    def test_unknown_key_names_the_nearest(self, tmp_path: Path) -> None:
        """A misspelt key is an error that proposes the right one."""
        write(tmp_path, "[tool.aiomigrate]\nlease-tll = 3\n")

        with pytest.raises(ConfigurationError) as caught:
            load({}, cwd=tmp_path, env={})

        assert "lease-tll is not a setting" in caught.value.what
        assert "Did you mean lease_ttl?" in caught.value.remedy

    def test_unknown_variable_names_the_nearest(self) -> None:
        """A misspelt variable is an error that proposes the right one."""
        with pytest.raises(ConfigurationError) as caught:
            from_env({"AIOMIGRATE_MIGRATION": "x"})

        assert "Did you mean AIOMIGRATE_MIGRATIONS?" in caught.value.remedy

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("concurrency", 1.5),
            ("concurrency", True),
            ("concurrency", 0),
            ("concurrency", "many"),
            ("lease_ttl", "3"),
            ("lease_ttl", float("nan")),
            ("lease_ttl", 0),
            ("lease_wait", -1),
            ("timeout", float("inf")),
            ("on_ahead", "ignore"),
            ("uri", 3),
            ("uri", " "),
            ("migrations", ["a"]),
            ("params", "a=1"),
            ("storage_options", {"a": {"b": 1}}),
            ("storage_options", [1]),
        ],
    )
    def test_wrong_value(self, key: str, value: object) -> None:
        """A value of the wrong type or size is an error that names where it stands."""
        with pytest.raises(ConfigurationError, match="HERE"):
            check(key, value, "HERE")

    def test_secrets_are_not_repeated(self) -> None:
        """No error repeats a storage option, a parameter or a URI."""
        wrong = [
            {"AIOMIGRATE_STORAGE_OPTIONS": '{"key": "hunter2"'},
            {"AIOMIGRATE_STORAGE_OPTIONS": '["hunter2"]'},
            {"AIOMIGRATE_STORAGE_OPTIONS": '{"key": ["hunter2"]}'},
            {"AIOMIGRATE_PARAMS": '"hunter2"'},
        ]
        for env in wrong:
            with pytest.raises(ConfigurationError) as caught:
                from_env(env)
            assert "hunter2" not in str(caught.value)
        with pytest.raises(ConfigurationError) as caught:
            parse_pairs(["hunter2"], "-o")
        assert "hunter2" not in str(caught.value)

    def test_settings_hide_their_secrets(self) -> None:
        """The repr of settings shows neither URI nor storage options nor parameters."""
        shown = repr(
            Settings(
                uri="s3://key:hunter2@bucket/x",
                storage_options={"secret": "hunter2"},
                params={"token": "hunter2"},
            )
        )

        assert "hunter2" not in shown


class TestSecrets:
    def test_of_uri_and_storage_options(self) -> None:
        """User information, query and storage options are secret; flags and endpoints are not."""
        found = Settings(
            uri="s3://key:hunter2@bucket/x?token=abcd",
            storage_options={"secret": "s3cr3t", "ssl": "true", "endpoint": "http://x"},
        ).secrets()

        assert set(found) == {"key:hunter2", "hunter2", "token=abcd", "s3cr3t"}
        assert list(found) == sorted(found, key=len, reverse=True)

    def test_with_the_characters_that_end_a_secret(self) -> None:
        """A secret with a slash, as AWS has them, is a secret with what is around it."""
        found = Settings(uri="s3://key:hun/ter2@bucket/x").secrets()

        assert found == ("key:hun/ter2", "hun/ter2")


class TestCommandLine:
    def test_params_are_json_scalars_or_text(self) -> None:
        """A value that is a JSON scalar becomes one, anything else stays text."""
        found = parse_params(
            [
                "n=1536",
                "f=0.5",
                "b=true",
                "z=null",
                "t=abc",
                "q=a=b",
                "l=[1]",
                "x=NaN",
                's="5"',
                "e=",
            ]
        )

        assert found == {
            "n": 1536,
            "f": 0.5,
            "b": True,
            "z": None,
            "t": "abc",
            "q": "a=b",
            "l": "[1]",
            "x": "NaN",
            "s": "5",
            "e": "",
        }

    @pytest.mark.parametrize(
        ("texts", "target"),
        [
            ([], None),
            (["latest"], None),
            (["3"], 3),
            (["memos=3", "users=0"], {"memos": 3, "users": 0}),
            (["a=b=2"], {"a=b": 2}),
        ],
    )
    def test_target(self, texts: list[str], target: object) -> None:
        """`--to` is a version, versions by line, or the newest."""
        assert parse_target(texts) == target

    @pytest.mark.parametrize("texts", [["x"], ["1", "2"], ["memos=x"], ["=1"], ["-1"], ["1.5"]])
    def test_no_target(self, texts: list[str]) -> None:
        """What is neither is refused."""
        with pytest.raises(ConfigurationError, match="--to"):
            parse_target(texts)


class TestVariables:
    ENV: ClassVar = {"STAGE": "dev", "EMPTY": ""}

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("s3://bucket-$STAGE/db", "s3://bucket-dev/db"),
            ("s3://bucket/${STAGE}db", "s3://bucket/devdb"),
            ("s3://bucket/a$$b", "s3://bucket/a$b"),
        ],
    )
    def test_are_expanded_in_pyproject(self, tmp_path: Path, text: str, expected: str) -> None:
        """In the URI, as a shell does."""
        table = {"uri": text}
        assert from_table(table, tmp_path / "pyproject.toml", env=self.ENV) == {"uri": expected}

    def test_are_expanded_in_paths(self, tmp_path: Path) -> None:
        """A relative path with a variable is that of the file's folder."""
        table = {"uri": "./$STAGE/db", "migrations": "${STAGE}"}
        found = from_table(table, tmp_path / "pyproject.toml", env=self.ENV)
        assert found == {"uri": str(tmp_path / "dev/db"), "migrations": str(tmp_path / "dev")}

    @pytest.mark.parametrize("text", ["./$MISSING/db", "./${MISSING}", "s3://$MISSING/x"])
    def test_that_are_not_set_are_named(self, tmp_path: Path, text: str) -> None:
        """Nothing is migrated in a folder of that name."""
        with pytest.raises(ConfigurationError, match="MISSING is not set"):
            from_table({"uri": text}, tmp_path / "pyproject.toml", env=self.ENV)

    @pytest.mark.parametrize("text", ["./a$", "./$(pwd)/db", "./$1", "./${a b}"])
    def test_that_have_no_name_are_refused(self, tmp_path: Path, text: str) -> None:
        """A command is not run, and does not name a folder either."""
        with pytest.raises(ConfigurationError, match=r"\$\$ for a dollar sign"):
            from_table({"migrations": text}, tmp_path / "pyproject.toml", env=self.ENV)

    def test_storage_options_are_taken_literally(self, tmp_path: Path) -> None:
        """A password may contain a dollar sign."""
        table = {"storage_options": {"password": "pa$$word$STAGE"}}
        assert from_table(table, tmp_path / "pyproject.toml", env=self.ENV) == table

    def test_a_uri_with_one_slash_is_no_path(self, tmp_path: Path) -> None:
        """It is refused later, as a URI, instead of becoming a folder beside the file."""
        found = from_table({"uri": "s3:/bucket/x"}, tmp_path / "pyproject.toml", env={})
        assert found == {"uri": "s3:/bucket/x"}
