"""Resolves the URI of a database, and finds the secrets in it. Pure except for path look-ups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from aiomigrate.errors import ConfigurationError, UnsupportedDatabaseError

SCHEMES = ("s3", "s3+ddb", "gs", "az", "abfs", "abfss", "hf", "oss", "cos", "memory", "file")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # of two characters or more: `C:` is a drive
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]*")
_WITH_CONTAINER = ("abfs", "abfss")  # abfss://container@account.dfs.core.windows.net/database
_SECRET_NAME = re.compile(r"key|secret|token|pass|pwd|sig|credential|sas", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def locate(uri: str | Path) -> str:
    """Returns the URI to pass to LanceDB, with local paths made absolute.

    LanceDB takes a URI that it cannot parse for a local folder; here it is an error.

    Args:
        uri: A path, or a URI. In a text, `$NAME` is refused as a variable that nobody expanded; a
            `Path` may contain it.

    Raises:
        UnsupportedDatabaseError: The URI names a LanceDB Cloud database.
        ConfigurationError: The URI is empty, malformed or of an unknown scheme, contains
            credentials or a variable, is the folder of a table, or is a bare word that LanceDB
            could take for the name of a cloud database. The error repeats no credentials.
    """
    text = str(uri)
    if not text.strip():
        raise ConfigurationError("The database's URI is empty.", "Pass a path or a URI.")
    match = _SCHEME.match(text)
    if isinstance(uri, Path):
        if match is not None and match[1].lower() in (*SCHEMES, "db"):
            raise ConfigurationError(
                f"A Path is a local folder, but this one begins with {match[0]!r}.",
                "Pass the URI as text.",
            )
        return _folder(uri)
    if match is not None:
        return _remote(text, match[1].lower(), text[match.end() :])
    _refuse_variable(text)
    if not re.search(r"[/\\]", text) and text not in (".", ".."):
        raise ConfigurationError(
            f"{text!r} has no slash: LanceDB may take it for the name of a cloud database.",
            f"Write ./{text} for a folder in the current directory.",
        )
    return _folder(Path(text))


def _remote(uri: str, scheme: str, rest: str) -> str:
    if scheme == "db":
        raise UnsupportedDatabaseError(
            f"{redact(uri)} is a LanceDB Cloud or Enterprise database, which aiomigrate does not "
            "support yet.",
            "Use a local path or an object-store URI such as s3://bucket/database.",
        )
    if scheme not in SCHEMES:
        raise ConfigurationError(
            f"{redact(uri)}: LanceDB does not support the scheme {scheme!r}.",
            f"Use a local path or one of {', '.join(SCHEMES)}; for a folder of that name write "
            "./ before it.",
        )
    if scheme == "file":
        return _local(uri, rest)
    if not rest.startswith("//"):
        raise ConfigurationError(
            f"The URI begins with {scheme}: but not with {scheme}://.",
            f"Write {scheme}://bucket/database; for a folder of that name write ./ before it.",
        )
    authority, query = re.split(r"[/?#]", rest[2:], maxsplit=1)[0], rest.partition("?")[2]
    container, at, host = authority.rpartition("@")
    is_container = scheme in _WITH_CONTAINER and _BUCKET.fullmatch(container)
    names = [pair.partition("=")[0] for pair in re.split(r"[&;]", query)]
    if ":" in authority or (at and not is_container) or any(map(_SECRET_NAME.search, names)):
        raise ConfigurationError(
            f"The {scheme}:// URI contains credentials, or a port.",
            f"Write {scheme}://bucket/database, and pass credentials and the endpoint by "
            "storage_options (-o key=value, [tool.aiomigrate.storage_options]) or by the variables "
            "of the object store, such as AWS_ACCESS_KEY_ID.",
        )
    _refuse_variable(uri)
    if scheme != "memory" and not _BUCKET.fullmatch(host):
        raise ConfigurationError(
            f"The {scheme}:// URI names no valid bucket.", f"Write {scheme}://bucket/database."
        )
    return uri


def _local(uri: str, rest: str) -> str:
    """Returns the path of a `file:` URI, as LanceDB reads it."""
    parts = urlsplit(f"file:{rest}")
    _refuse_variable(uri)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ConfigurationError(
            f"{uri} is not an absolute path.",
            "Write file:///folder/database with three slashes, or the path without file:.",
        )
    if parts.query or parts.fragment:
        raise ConfigurationError(
            f"{uri} has a part after {'?' if parts.query else '#'!r}, which LanceDB ignores.",
            "Pass the path without file:.",
        )
    return _folder(Path(unquote(parts.path)))


def _refuse_variable(uri: str) -> None:
    if (found := _VARIABLE.search(uri)) is not None:
        raise ConfigurationError(
            f"{redact(uri)}: {found[0]} is not expanded.",
            "Set the variable where it is expanded, e.g. by the shell or in pyproject.toml; in "
            "Python, pass a Path for a folder of that name.",
        )


def _folder(path: Path) -> str:
    path = path.expanduser().absolute()
    if path.suffix == ".lance" and (path / "_versions").is_dir():
        raise ConfigurationError(
            f"{path} is a table, not a database.", f"Use the folder that holds it: {path.parent}."
        )
    return str(path)


def is_local(uri: str) -> bool:
    """Returns whether a URI, as `locate` returns it, is a local path."""
    return "://" not in uri


def has_scheme(text: str) -> bool:
    """Returns whether a text is a URI, as opposed to a local path."""
    return _SCHEME.match(text) is not None


def redact(uri: str) -> str:
    """Returns a URI without user information, query and fragment, even if it is malformed.

    A secret may itself contain the characters that end it, such as the slash of one of AWS.
    """
    match = _SCHEME.match(uri)
    if match is None:
        return uri
    rest = uri[match.end() :]
    slashes = rest[: len(rest) - len(rest.lstrip("/"))]
    rest = rest[len(slashes) :]
    authority = re.split(r"[/?#]", rest)[0]
    if "@" in authority or ":" in authority:
        rest = rest.rpartition("@")[2] if "@" in rest else rest[len(authority) :]
    return f"{match[0]}{slashes}{re.split('[?#]', rest)[0]}"


def secrets_of(uri: str, storage_options: Mapping[str, str] | None) -> tuple[str, ...]:
    """Returns the texts to hide in all output, longest first.

    They are the values of the storage options, except for endpoints, booleans and short values,
    and the user, password and query of the URI and of the endpoints.
    """
    found = {str(v) for v in (storage_options or {}).values() if len(str(v)) > 3}
    found -= {"true", "false", "auto"}
    endpoints = {text for text in found if text.startswith(("http://", "https://"))}
    found -= endpoints
    for text in (uri, *endpoints):
        found |= set(_secrets_in(text))
    return tuple(sorted(found, key=len, reverse=True))


def _secrets_in(uri: str) -> tuple[str, ...]:
    _, colon, rest = uri.partition("://")
    if not colon:
        return ()
    authority = re.split(r"[/?#]", rest)[0]
    information = rest.rpartition("@")[0] if re.search("[@:]", authority) else ""
    user, _, password = information.partition(":")
    query = rest.partition("?")[2].partition("#")[0]
    return tuple(text for text in (information, user, password, query) if len(text) > 3)
