"""Which URIs are taken, as what, and what the errors of the others say and hide."""

from __future__ import annotations

from pathlib import Path

import lancedb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiomigrate import MigrationManager
from aiomigrate.errors import ConfigurationError, UnsupportedDatabaseError
from aiomigrate.store.uri import has_scheme, is_local, locate, redact, secrets_of

REMOTE = [
    "s3://bucket/database",
    "s3://bucket.with-dots_1/a b/ü",
    "s3://bucket/user@host/database",
    "s3://bucket/a:b@c/database",
    "s3+ddb://bucket/database?ddbTableName=locks",
    "gs://bucket/database",
    "az://container/database",
    "abfss://container@account.dfs.core.windows.net/database",
    "hf://datasets/user/name@revision",
    "memory://",
    "memory://name",
]


@pytest.mark.parametrize("uri", REMOTE)
def test_a_uri_without_credentials_is_passed_as_it_is(uri: str) -> None:
    """It is not local, and LanceDB gets what the user wrote."""
    assert locate(uri) == uri
    assert not is_local(uri)


WITH_CREDENTIALS = [
    "s3://AKIAX:hunter2@bucket/database",
    "s3://AKIAX:hun/ter2@bucket/database",
    "s3://AKIAX:hun?ter2@bucket/database",
    "s3://AKIAX:hun#ter2@bucket/database",
    "s3://AKIAX:hun@ter2@bucket/database",
    "s3://AKIAX:123/ter2@bucket/database",
    "s3://hunter2@bucket/database",
    "gs://hunter2@bucket/database",
    "az://user:hunter2@container/database",
    "abfss://user:hunter2@account.dfs.core.windows.net/database",
    "s3://bucket/database?aws_secret_access_key=hunter2",
    "az://container/database?sv=1&sig=hunter2",
    "s3://bucket/database?x=1;session_token=hunter2",
    "s3://AKIAX:hunter2",
    "memory://user:hunter2@x",
]


@pytest.mark.parametrize("uri", WITH_CREDENTIALS)
def test_credentials_in_a_uri_are_refused_and_not_shown(uri: str, tmp_path: Path) -> None:
    """LanceDB would ignore them, or take the whole for a folder; the error says where they go."""
    with pytest.raises(ConfigurationError, match="credentials") as caught:
        MigrationManager(uri, migrations=[])

    shown = str(caught.value) + repr(caught.value)
    assert not [part for part in ("hun", "ter2", "AKIAX", "user:") if part in shown]
    assert "storage_options" in shown
    assert not [part for part in ("hun", "ter2") if part in redact(uri)]
    assert list(tmp_path.iterdir()) == []


MALFORMED = [
    "", " ", "s3://", "s3:///database", "s3:/bucket/database", "s3:bucket", "gs:/x", "memory:",
    "s3://my bucket/database", "s3://[bucket/database", "s3://bucket]/x", "s3://b%20/x",
    "s3://{{ bucket }}/x", "s3://-b/x", "ftp://host/x", "https://bucket.s3.amazonaws.com/x",
    "file://folder/database", "file:folder", "file:///a?b", "file:///a#b", "database",
]  # fmt: skip


@pytest.mark.parametrize("uri", MALFORMED)
def test_a_malformed_uri_is_no_local_folder(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LanceDB takes what it cannot parse for a folder, and would create it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError):
        locate(uri)


@pytest.mark.parametrize("path", ["s3://bucket/database", "gs:/bucket", "db://name", "file:///x"])
def test_a_path_object_is_no_uri(path: str) -> None:
    """`Path("s3://…")` has lost a slash; it would be a folder named `s3:`."""
    with pytest.raises(ConfigurationError, match="Pass the URI as text"):
        locate(Path(path))


@pytest.mark.parametrize(
    "uri",
    ["./$HOME/x", "/data/${APP}/db", "s3://$BUCKET/x", "s3://bucket/${STAGE}/x", "file:///$X"],
)
def test_a_variable_that_nobody_expanded_is_refused(uri: str) -> None:
    """It would be the name of a folder."""
    with pytest.raises(ConfigurationError, match=r"\$\{?\w+\}? is not expanded"):
        locate(uri)


def test_a_folder_may_be_named_like_a_variable_or_a_scheme(tmp_path: Path) -> None:
    """As a Path, or with `./`."""
    assert locate(tmp_path / "$HOME") == str(tmp_path / "$HOME")
    assert locate("./s3:x").endswith("/s3:x")
    assert locate("/data/cost$") == "/data/cost$"
    assert not has_scheme("C:/data/x")


def test_cloud_databases_are_named() -> None:
    """They are another kind, which is told."""
    with pytest.raises(UnsupportedDatabaseError):
        locate("db://name")


@pytest.mark.parametrize(
    "text",
    ["file://{0}/a", "FILE://{0}/b", "file:{0}/c", "file://localhost{0}/d", "file://{0}/e%20f"],
)
async def test_a_file_uri_is_the_folder_that_lancedb_takes(text: str, tmp_path: Path) -> None:
    """What the application opens by the same URI is what is migrated."""
    uri = text.format(tmp_path)
    theirs = await lancedb.connect_async(uri)
    await theirs.create_table("t", [{"a": 1}])
    ours = await lancedb.connect_async(locate(uri))

    assert (await ours.list_tables()).tables == ["t"]
    assert is_local(locate(uri))


@given(st.text("ab:/?#@%", min_size=1), st.sampled_from(["s3", "gs", "az", "abfss", "oss"]))
def test_whatever_follows_the_scheme_no_folder_is_made_of_it(rest: str, scheme: str) -> None:
    """It is passed on, or refused; it never becomes a local path, and is never shown with `@`."""
    uri = f"{scheme}://{rest}"
    try:
        assert locate(uri) == uri
    except ConfigurationError as exc:
        assert "@" not in str(exc)  # noqa: PT017 - both ways are right
    assert all(len(secret) > 3 for secret in secrets_of(uri, None))
