"""Settings of the command: from pyproject.toml, the environment and the command line.

The command line wins over `AIOMIGRATE_*`, that over `[tool.aiomigrate]`, that over the defaults.
Not for the library: `MigrationManager` takes its options by keyword and reads neither files nor
the environment. No error here ever repeats a URI, a storage option or a parameter: they may hold
secrets.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiomigrate.errors import ConfigurationError
from aiomigrate.option_checks import NUMERIC_OPTIONS, check_number

ENV_PREFIX = "AIOMIGRATE_"
POLICIES: Mapping[str, tuple[str, ...]] = {
    "on_ahead": ("error", "warn"),
    "on_destructive": ("keep", "allow", "refuse"),
    "on_unsafe_store": ("error", "warn"),
}
_MAPPINGS = ("params", "storage_options")
_MIN_SECRET = 4  # shorter texts occur in ordinary words


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command works with.

    Attributes:
        uri: Path or URI of the database.
        migrations: Folder of the migration files.
        ledger: Name of the head table.
        concurrency: How many migrations may run at once.
        lease_ttl: Seconds after which a silent process may be succeeded.
        lease_wait: Seconds to wait for another process that is migrating.
        timeout: Seconds one migration may take, `None` for no limit.
        on_ahead: Whether a database newer than the code is an `error` or a reason to `warn`.
        on_destructive: Whether to `keep` savepoints of destructive steps, `allow` them without, or
            `refuse` them.
        keep_savepoints: Seconds for which such savepoints are kept.
        on_unsafe_store: Whether a store that loses commits is an `error` or a reason to `warn`.
        params: Parameters of the migrations.
        storage_options: As for `lancedb.connect_async`.
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
        """Returns the texts that must never be shown, longest first."""
        found = {
            value
            for value in self.storage_options.values()
            if value not in ("true", "false", "auto") and not value.startswith(("http:", "https:"))
        }
        found |= set(_uri_secrets(self.uri))
        return tuple(sorted((t for t in found if len(t) >= _MIN_SECRET), key=len, reverse=True))


KEYS = tuple(item.name for item in fields(Settings))
"""Every setting, as it is called in pyproject.toml."""

Layer = Mapping[str, Any]
"""Checked settings from one source, by key; what the source does not say is absent."""


def _uri_secrets(uri: str) -> Iterable[str]:
    if "://" not in uri:
        return
    try:
        parts = urlsplit(uri)
    except ValueError:  # such as an unfinished [IPv6] address
        yield uri
        return
    user, at, _ = parts.netloc.rpartition("@")
    yield user + at
    yield from (text for text in (parts.username, parts.password, parts.query) if text)


# ---- from the three sources ---------------------------------------------------------------------


def load(given: Layer, *, cwd: Path, env: Mapping[str, str]) -> Settings:
    """Returns the settings of one command.

    Args:
        given: From the command line, checked here.
        cwd: The folder from which pyproject.toml is searched upwards.
        env: The environment.

    Raises:
        ConfigurationError: A source holds an unknown key or a value that cannot be.
    """
    found = find_table(cwd)
    layers: list[Layer] = []
    if found is not None:
        layers.append(from_table(*found))
    layers.append(from_env(env))
    layers.append({key: check(key, value, option_name(key)) for key, value in given.items()})
    return merge(layers)


def option_name(key: str) -> str:
    """Returns how a setting is called on the command line."""
    return {"params": "-x", "storage_options": "-o"}.get(key, "--" + key.replace("_", "-"))


def merge(layers: Iterable[Layer]) -> Settings:
    """Returns settings from layers, later ones winning; the two mappings are merged key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            merged[key] = {**merged.get(key, {}), **value} if key in _MAPPINGS else value
    return Settings(**merged)


def find_table(start: Path) -> tuple[Mapping[str, Any], Path] | None:
    """Returns the nearest `[tool.aiomigrate]` of a folder and its parents, with its file.

    Raises:
        ConfigurationError: A pyproject.toml on the way is not TOML or cannot be read.
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
                    "Write [tool.aiomigrate] and the settings beneath it.",
                    path=path,
                )
            return table, path
    return None


def from_table(table: Mapping[str, Any], path: Path) -> Layer:
    """Returns the settings of a `[tool.aiomigrate]`, its paths taken from the file's folder.

    Raises:
        ConfigurationError: An unknown key, or a value that cannot be.
    """
    layer: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{path}: tool.aiomigrate.{key}"
        if key not in KEYS:
            raise ConfigurationError(
                f"{where} is no setting.",
                _known(key, KEYS, "Settings"),
                path=path,
            )
        layer[key] = check(key, value, where)
    for key in ("uri", "migrations"):
        if key in layer:
            layer[key] = _relative_to(path.parent, layer[key])
    return layer


def _relative_to(folder: Path, path: str) -> str:
    if "://" in path or path.startswith(("~", "db:")):
        return path
    return str(folder / path)


def from_env(env: Mapping[str, str]) -> Layer:
    """Returns the settings of `AIOMIGRATE_*`; an empty variable counts as unset.

    Raises:
        ConfigurationError: An unknown variable, or a value that cannot be.
    """
    layer: dict[str, Any] = {}
    names = {ENV_PREFIX + key.upper(): key for key in KEYS}
    for name, text in env.items():
        if not name.startswith(ENV_PREFIX):
            continue
        key = names.get(name)
        if key is None:
            raise ConfigurationError(
                f"The environment variable {name} is no setting.",
                _known(name, names, "Variables"),
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
                f"{where} is not JSON.", f"""Write an object: {where}='{{"key": "value"}}'."""
            ) from None
    convert: Callable[[str], object] = NUMERIC_OPTIONS.get(key, str)
    try:
        return convert(text)
    except ValueError:
        return text  # `check` says what is wrong with it


def _known(name: str, names: Iterable[str], what: str) -> str:
    known = list(names)
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"{hint}{what}: {', '.join(known)}."


# ---- one value ----------------------------------------------------------------------------------


def check(key: str, value: object, where: str) -> object:
    """Returns a setting's value if it can be.

    Args:
        key: The setting.
        value: What a source says.
        where: What that source calls it, for the error.

    Raises:
        ConfigurationError: It cannot be.
    """
    if key in _MAPPINGS:
        return _check_mapping(key, value, where)
    if key in NUMERIC_OPTIONS:
        return check_number(key, value, where)
    if key in POLICIES:
        if value not in POLICIES[key]:
            raise ConfigurationError(
                f"{where}: {value!r} is no policy.", f"Use one of {', '.join(POLICIES[key])}."
            )
        return value
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{where} is not a text, or empty.", "Give it as text.")
    return value


def _check_mapping(key: str, value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigurationError(
            f"{where} is not a table of keys and values.", "Give it as key = value."
        )
    if key == "params":
        return dict(value)
    for name, item in value.items():
        if not isinstance(item, str | bool | int | float):
            raise ConfigurationError(f"{where}.{name} is not a text.", "Give it as text.")
    return {
        name: str(item).lower() if isinstance(item, bool) else str(item)
        for name, item in value.items()
    }


# ---- what only the command line has -------------------------------------------------------------


def parse_pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """Returns the pairs of a repeatable `key=value` option.

    Raises:
        ConfigurationError: One has no `=` or no key. Its text is not repeated: it may be secret.
    """
    pairs: dict[str, str] = {}
    for number, text in enumerate(texts, 1):
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigurationError(
                f"{option} number {number} is not key=value.", f"Write {option} key=value."
            )
        pairs[key] = value
    return pairs


def parse_params(texts: Sequence[str]) -> dict[str, Any]:
    """Returns parameters: JSON scalars where the value is one, else text.

    Raises:
        ConfigurationError: One is not `key=value`.
    """
    return {key: _scalar(value) for key, value in parse_pairs(texts, "-x").items()}


def _scalar(text: str) -> object:
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        return text
    return text if isinstance(value, list | dict) else value


def parse_target(texts: Sequence[str]) -> int | dict[str, int] | None:
    """Returns what `--to` asks: one version, versions by line, or `None` for the newest.

    Raises:
        ConfigurationError: It is neither.
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
                f"--to {text} names no line.",
                "Give one version, or for each line --to LINE=VERSION.",
            )
        result[line] = _version(version)
    return result


def _version(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigurationError(
            f"--to: {text!r} is no version.", "Use a whole number, LINE=VERSION, or latest."
        )
    return int(text)
