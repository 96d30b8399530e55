"""Reads the settings of the command from pyproject.toml, the environment and the command line.

The command line overrides `AIOMIGRATE_*`, which override `[tool.aiomigrate]`, which overrides the
defaults. The library does not use this module: `MigrationManager` takes its options by keyword and
reads neither files nor the environment. No error here repeats a URI, a storage option or a
parameter, since they may contain secrets.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from string import Template
from typing import Any

from aiomigrate.errors import ConfigurationError
from aiomigrate.option_checks import NUMERIC_OPTIONS, check_number
from aiomigrate.store.uri import has_scheme, secrets_of

ENV_PREFIX = "AIOMIGRATE_"
POLICIES: Mapping[str, tuple[str, ...]] = {
    "on_ahead": ("error", "warn"),
    "on_destructive": ("keep", "allow", "refuse"),
    "on_unsafe_store": ("error", "warn"),
}
_MAPPINGS = ("params", "storage_options")
_MIN_SECRET_LENGTH = 4  # shorter texts occur in ordinary words


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one call of the command.

    Attributes:
        uri: Path or URI of the database.
        migrations: Folder of the migration files.
        ledger: Name of the head table.
        concurrency: Maximum number of migrations that run at the same time.
        lease_ttl: Seconds without renewal after which another process may take over a lease.
        lease_wait: Seconds to wait for another process that is migrating.
        timeout: Seconds that one migration may take; `None` for no limit.
        on_ahead: What to do if the database is newer than the code: `error` or `warn`.
        on_destructive: What to do about destructive steps: `keep` a savepoint, `allow` them
            without one, or `refuse` them.
        keep_savepoints: Seconds for which savepoints of destructive steps are kept.
        on_unsafe_store: What to do if the object store loses commits: `error` or `warn`.
        params: Parameters of the migrations.
        storage_options: Passed to `lancedb.connect_async`.
    """

    uri: str = field(default="./data/app.lancedb", repr=False)
    migrations: str = "./migrations"
    ledger: str = "table_migrations"
    concurrency: int = 16
    lease_ttl: float = 30.0
    lease_wait: float = 600.0
    timeout: float | None = None
    on_ahead: str = "error"
    on_destructive: str = "keep"
    keep_savepoints: float = 604_800.0
    on_unsafe_store: str = "error"
    params: Mapping[str, Any] = field(default_factory=dict, repr=False)
    storage_options: Mapping[str, str] = field(default_factory=dict, repr=False)

    def secrets(self) -> tuple[str, ...]:
        """Returns the texts that must never be shown, longest first; empty without any.

        These are the user information and the query of the URI, and the storage options other
        than flags and endpoints.
        """
        found = {
            value
            for value in self.storage_options.values()
            if value not in ("true", "false", "auto") and not value.startswith(("http:", "https:"))
        }
        found |= set(secrets_of(self.uri, None))
        long_enough = (text for text in found if len(text) >= _MIN_SECRET_LENGTH)
        return tuple(sorted(long_enough, key=len, reverse=True))


KEYS = tuple(item.name for item in fields(Settings))
"""The names of the settings in pyproject.toml."""

Layer = Mapping[str, Any]
"""Checked settings from one source, by key. Settings that the source does not set are absent."""


# ---- reading the three sources ------------------------------------------------------------------


def load(given: Layer, *, cwd: Path, env: Mapping[str, str]) -> Settings:
    """Returns the settings of one call of the command. Without any source, the defaults.

    Args:
        given: Settings from the command line, not yet checked.
        cwd: The folder from which pyproject.toml is searched upwards.
        env: The environment variables.

    Raises:
        ConfigurationError: A source has an unknown key or an invalid value.
    """
    found = find_table(cwd)
    layers: list[Layer] = []
    if found is not None:
        layers.append(from_table(*found, env=env))
    layers.append(from_env(env))
    layers.append({key: check(key, value, option_name(key)) for key, value in given.items()})
    return merge(layers)


def option_name(key: str) -> str:
    """Returns the command-line option of a setting."""
    return {"params": "-x", "storage_options": "-o"}.get(key, "--" + key.replace("_", "-"))


def merge(layers: Iterable[Layer]) -> Settings:
    """Returns the settings of several layers.

    A later layer overrides an earlier one; `params` and `storage_options` are merged key by key.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            merged[key] = {**merged.get(key, {}), **value} if key in _MAPPINGS else value
    return Settings(**merged)


def find_table(start: Path) -> tuple[Mapping[str, Any], Path] | None:
    """Returns the nearest `[tool.aiomigrate]` in a folder or its parents, with the file's path.

    Returns `None` if no pyproject.toml has that table.

    Raises:
        ConfigurationError: A pyproject.toml on the way cannot be read or is not TOML, or
            `tool.aiomigrate` is not a table.
    """
    for folder in (start, *start.parents):
        path = folder / "pyproject.toml"
        if not path.is_file():
            continue
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
            raise ConfigurationError(
                f"{path} cannot be read: {exc}.", "Correct the file.", path=path
            ) from exc
        tool = document.get("tool", {})
        if isinstance(tool, Mapping) and "aiomigrate" in tool:
            table = tool["aiomigrate"]
            if not isinstance(table, Mapping):
                raise ConfigurationError(
                    f"{path}: tool.aiomigrate is not a table.",
                    "Write the settings under the header [tool.aiomigrate].",
                    path=path,
                )
            return table, path
    return None


def from_table(table: Mapping[str, Any], path: Path, *, env: Mapping[str, str]) -> Layer:
    """Returns the settings of a `[tool.aiomigrate]` table.

    In `uri` and `migrations`, `$NAME` and `${NAME}` are the environment variable, and `$$` is a
    dollar sign. Relative paths are resolved against the folder of the file.

    Args:
        table: The content of the table.
        path: The path of its pyproject.toml.
        env: The environment variables.

    Raises:
        ConfigurationError: A key is unknown, a value is invalid, or a variable is not set.
    """
    layer: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{path}: tool.aiomigrate.{key}"
        if key not in KEYS:
            raise ConfigurationError(
                f"{where} is not a setting.",
                _suggestion(key, KEYS, "Settings"),
                path=path,
            )
        layer[key] = check(key, value, where)
    for key in ("uri", "migrations"):
        if key in layer:
            expanded = _expand(layer[key], f"{path}: tool.aiomigrate.{key}", env)
            layer[key] = _resolve(path.parent, expanded)
    return layer


def _expand(text: str, where: str, env: Mapping[str, str]) -> str:
    try:
        return Template(text).substitute(env)
    except KeyError as exc:
        raise ConfigurationError(
            f"{where}: the environment variable {exc.args[0]} is not set.",
            f"Set {exc.args[0]}, or write $$ for a dollar sign.",
        ) from None
    except ValueError:
        raise ConfigurationError(
            f"{where} has a $ without the name of a variable.",
            "Write $NAME, ${NAME}, or $$ for a dollar sign.",
        ) from None


def _resolve(folder: Path, path: str) -> str:
    return path if has_scheme(path) or path.startswith("~") else str(folder / path)


def from_env(env: Mapping[str, str]) -> Layer:
    """Returns the settings of the variables `AIOMIGRATE_*`. An empty variable counts as unset.

    Raises:
        ConfigurationError: A variable is unknown or its value is invalid.
    """
    layer: dict[str, Any] = {}
    names = {ENV_PREFIX + key.upper(): key for key in KEYS}
    for name, text in env.items():
        if not name.startswith(ENV_PREFIX):
            continue
        key = names.get(name)
        if key is None:
            raise ConfigurationError(
                f"The environment variable {name} is not a setting.",
                _suggestion(name, names, "Variables"),
            )
        if text:
            layer[key] = check(key, _from_text(key, text, name), name)
    return layer


def _from_text(key: str, text: str, where: str) -> object:
    if key in _MAPPINGS:
        try:
            return json.loads(text)
        except ValueError:
            raise ConfigurationError(
                f"{where} is not JSON.", f"""Write a JSON object: {where}='{{"key": "value"}}'."""
            ) from None
    convert: Callable[[str], object] = NUMERIC_OPTIONS.get(key, str)
    try:
        return convert(text)
    except ValueError:
        return text  # `check` raises the error


def _suggestion(name: str, names: Iterable[str], what: str) -> str:
    known = list(names)
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"{hint}{what}: {', '.join(known)}."


# ---- checking one value -------------------------------------------------------------------------


def check(key: str, value: object, where: str) -> object:
    """Returns the value of a setting if it is valid.

    Args:
        key: The setting.
        value: The value from a source. The values of `storage_options` are converted to text.
        where: The name of the setting in that source, for the error.

    Raises:
        ConfigurationError: The value is invalid.
    """
    if key in _MAPPINGS:
        return _check_mapping(key, value, where)
    if key in NUMERIC_OPTIONS:
        return check_number(key, value, where)
    if key in POLICIES:
        if value not in POLICIES[key]:
            raise ConfigurationError(
                f"{where}: {value!r} is not a valid policy.",
                f"Use one of {', '.join(POLICIES[key])}.",
            )
        return value
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{where} is not text, or is empty.", "Pass a non-empty text.")
    return value


def _check_mapping(key: str, value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigurationError(
            f"{where} is not a table of keys and values.", "Write each entry as key = value."
        )
    if key == "params":
        return dict(value)
    for name, item in value.items():
        if not isinstance(item, str | bool | int | float):
            raise ConfigurationError(f"{where}.{name} is not text.", "Write the value as text.")
    return {
        name: str(item).lower() if isinstance(item, bool) else str(item)
        for name, item in value.items()
    }


# ---- parsing command-line values ----------------------------------------------------------------


def parse_pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """Returns the pairs of a repeatable `key=value` option; empty without any.

    Args:
        texts: The values of the option.
        option: The option, for the error.

    Raises:
        ConfigurationError: A value has no `=` or no key. The error does not repeat the value, which
            may be secret.
    """
    pairs: dict[str, str] = {}
    for number, text in enumerate(texts, 1):
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigurationError(
                f"{option} number {number} is not of the form key=value.",
                f"Write {option} key=value.",
            )
        pairs[key] = value
    return pairs


def parse_params(texts: Sequence[str]) -> dict[str, Any]:
    """Returns the parameters of `-x`. A value that is a JSON scalar is decoded, others are text.

    Raises:
        ConfigurationError: A text is not of the form `key=value`.
    """
    return {key: _scalar(value) for key, value in parse_pairs(texts, "-x").items()}


def _scalar(text: str) -> object:
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        return text
    return text if isinstance(value, list | dict) else value


def parse_target(texts: Sequence[str]) -> int | dict[str, int] | None:
    """Returns the target of `--to`: one version, versions by line, or `None` for the newest.

    Raises:
        ConfigurationError: A text is neither a version, nor `LINE=VERSION`, nor a single `latest`.
    """
    if not texts or list(texts) == ["latest"]:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return _version(texts[0])
    result: dict[str, int] = {}
    for text in texts:
        line, equals, version = text.rpartition("=")
        if not equals or not line:
            raise ConfigurationError(
                f"--to {text} does not name a line.",
                "Pass one version, or --to LINE=VERSION for each line.",
            )
        result[line] = _version(version)
    return result


def _version(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigurationError(
            f"--to: {text!r} is not a version.", "Pass a whole number, LINE=VERSION, or latest."
        )
    return int(text)
