"""Re-embedding on a Ray cluster: the same operation, ledger and recovery."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lance_ray", reason="the extra `ray` is not installed")

ROOT = Path(__file__).parents[2]


def reembedded(database: Path, rows: int, intrusions: int) -> dict[str, Any]:
    """Runs the program; returns what it told."""
    command = [sys.executable, "-m", "tests.ray_program", str(database), str(rows), str(intrusions)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_a_table_is_embedded_on_a_cluster(database: Path) -> None:
    """Two workers, one commit, read back; a commit of others that fails it is overcome."""
    told = reembedded(database, 20_000, 1)
    assert told["failed"] == ""
    assert told["right"]
    assert told["rows"] == 20_000 + told["added"]
    assert told["attempts"] == 2
    assert told["columns"] == ["id", "text", "vector", "vector_old"]
    assert told["lag_ms"] < 1000


@pytest.mark.campaign
def test_it_gives_up_beside_a_writer(database: Path) -> None:
    """After three losses it says so, with everything as it was."""
    told = reembedded(database, 20_000, 9)
    assert "Other writers committed to table" in told["failed"]
    assert "during each of 3 attempts to compute" in told["failed"]
    assert told["attempts"] == 3
    assert told["rows"] == 20_000 + told["added"]
