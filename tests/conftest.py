"""What every test shares."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

import tests.tools  # noqa: F401 - takes the settings of tests out of the environment

# A property holds or does not: how long an example takes depends on what else the machine does.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.fixture
def anyio_backend() -> str:
    """LanceDB's bindings run on asyncio only."""
    return "asyncio"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A place for a database that does not exist yet."""
    return tmp_path / "database"
