"""What every test shares."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.tools  # noqa: F401 - takes the settings of tests out of the environment


@pytest.fixture
def anyio_backend() -> str:
    """LanceDB's bindings run on asyncio only."""
    return "asyncio"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A place for a database that does not exist yet."""
    return tmp_path / "database"
