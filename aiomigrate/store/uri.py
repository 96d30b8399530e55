"""Resolves the URI of a database, and finds the secrets in it. Pure except for path look-ups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from aiomigrate.errors import ConfigurationError, UnsupportedDatabaseError

SCHEMES = ("s3", "s3+ddb", "gs", "az", "abfs", "abfss", "hf", "oss", "cos", "memory", "file")


def locate(uri: str | Path) -> str:
    """Returns the URI to pass to LanceDB, with local paths made absolute.

    Raises:
        UnsupportedDatabaseError: The URI names a LanceDB Cloud database.
        ConfigurationError: The URI is empty, malformed or of an unknown scheme, is the folder of a
            table, or is a bare word that LanceDB could take for the name of a cloud database.
    """
    if isinstance(uri, Path):
        return _folder(uri)
    if not uri.strip():
        raise ConfigurationError("The database's URI is empty.", "Pass a path or a URI.")
    scheme, colon, _ = uri.partition(":")
    if scheme == "db" and colon:
        raise UnsupportedDatabaseError(
            f"{redact(uri)} is a LanceDB Cloud or Enterprise database, which aiomigrate does not "
            "support yet.",
            "Use a local path or an object-store URI such as s3://bucket/database.",
        )
    if "://" in uri:
        try:
            urlsplit(uri)
        except ValueError as exc:
            raise ConfigurationError(
                f"{redact(uri)} is not a valid URI: {exc}.",
                "Correct it; an example is s3://bucket/database.",
            ) from None
        if scheme not in SCHEMES:
            raise ConfigurationError(
                f"{redact(uri)}: LanceDB does not support the scheme {scheme!r}.",
                f"Use a local path or one of {', '.join(SCHEMES)}.",
            )
        return _folder(Path(uri.removeprefix("file://"))) if scheme == "file" else uri
    if not re.search(r"[/\\]", uri) and uri not in (".", ".."):
        raise ConfigurationError(
            f"{uri!r} has no slash: LanceDB may take it for the name of a cloud database.",
            f"Write ./{uri} for a folder in the current directory.",
        )
    return _folder(Path(uri))


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


def redact(uri: str) -> str:
    """Returns a URI without user information, query and fragment, even if it is malformed."""
    scheme, colon, rest = uri.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme):
        return uri
    slashes = rest[: len(rest) - len(rest.lstrip("/"))]
    authority, slash, path = re.split(r"[?#]", rest[len(slashes) :])[0].partition("/")
    return f"{scheme}:{slashes}{authority.rpartition('@')[2]}{slash}{path}"


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
        if "://" in text:
            parts = urlsplit(text)
            found |= {t for t in (parts.username, parts.password, parts.query) if t}
    return tuple(sorted(found, key=len, reverse=True))
