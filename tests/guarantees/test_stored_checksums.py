"""Checksums, descriptions and identities that databases hold: every release computes the same.

A case that is new is pinned by

    python -m tests.guarantees.test_stored_checksums

which adds what is missing to the file and never changes a value that is there.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aiomigrate import op
from tests.guarantees.checksum_cases import MIGRATIONS, OPERATIONS, computed

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "data" / "stored_checksums.json"

GOLDEN: dict[str, dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else {}
NAMES = [
    *(f"operation: {name}" for name in OPERATIONS), *(f"migration: {name}" for name in MIGRATIONS),
]  # fmt: skip

KINDS = {
    kind
    for name in op.__all__
    if inspect.isclass(kind := getattr(op, name))
    and issubclass(kind, op.Operation)
    and kind is not op.Operation
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What this release computes, by case."""
    return computed()


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_value_is_computed_as_it_was_stored(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    """The checksum, the description and the identity of a case equal the pinned ones.

    A database that holds another checksum refuses the migration as edited. A column that an
    interrupted migration left is not found by another description or identity.
    """
    assert name in GOLDEN, f"pin it: python -m {__spec__.name}"
    assert found[name] == GOLDEN[name]


def test_no_pinned_case_is_removed() -> None:
    """Every pinned value is compared: no case leaves the list."""
    assert set(GOLDEN) <= set(NAMES)


@pytest.mark.parametrize("kind", sorted(KINDS, key=lambda kind: kind.__name__))
def test_every_field_of_every_operation_is_pinned(kind: type[op.Operation]) -> None:
    """Each public operation has a case with defaults, and each of its fields a case that sets it.

    A new operation, or a new field of one, fails here until it has a case.
    """
    cases = [operation for operation in OPERATIONS.values() if type(operation) is kind]
    fields = dataclasses.fields(kind)
    pinned = {field.name for field in fields for case in cases if _is_set(field, case)}

    assert any(case.table is None for case in cases)
    assert pinned == {field.name for field in fields}


def _is_set(field: dataclasses.Field[Any], case: op.Operation) -> bool:
    value = getattr(case, field.name)
    if field.default is not dataclasses.MISSING:
        return bool(value != field.default)
    if field.default_factory is not dataclasses.MISSING:
        return bool(value != field.default_factory())
    return True


@pytest.mark.parametrize("python", ["python3.11", "python3.12", "python3.13", "python3.14"])
def test_another_python_computes_what_was_stored(python: str) -> None:
    """The values do not depend on the Python release, nor on the seed of its hashes."""
    command = shutil.which(python)
    if python == f"python3.{sys.version_info.minor}":
        command = sys.executable
    if command is None or not _has_pyarrow(command):
        pytest.skip(f"no {python} with pyarrow here")

    run = subprocess.run(
        [command, "-P", "-m", "tests.guarantees.checksum_cases"],
        capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"},
    )  # fmt: skip

    assert json.loads(run.stdout) == GOLDEN


def _has_pyarrow(command: str) -> bool:
    code = [command, "-c", "import pyarrow"]
    return subprocess.run(code, capture_output=True, check=False).returncode == 0


def add_missing() -> list[str]:
    """Pins the cases that are not pinned yet; returns their names."""
    values = computed()
    added = [name for name in NAMES if name not in GOLDEN]
    whole = {name: GOLDEN.get(name, values.get(name)) for name in [*GOLDEN, *added]}
    FILE.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    return added


if __name__ == "__main__":
    sys.stdout.write("".join(f"pinned {name}\n" for name in add_missing()))
