"""The house rules: imports point downward and are light, the public face is documented."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import aiomigrate
from aiomigrate import errors, load, op
from aiomigrate.operations.base import Operation

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_imports_point_downward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of pyproject.toml hold; what decides does no I/O; one module imports LanceDB."""
    cli = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(ROOT)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the linter's own dependencies
        assert cli.lint_imports(no_cache=True, no_logo=True) == 0


def test_public_names_are_pinned() -> None:
    """Whoever imports from the package may rely on these; a new one is added here on purpose."""
    assert set(aiomigrate.__all__) == {
        "AiomigrateError", "Context", "DatabaseReport", "Event", "Health", "HealthState", "Kind",
        "ManyReport", "Migration", "MigrationFailedError", "MigrationManager", "OnAhead",
        "OnDestructive", "OnPending", "OnUnsafeStore", "Outcome", "Plan", "Progress",
        "RecordedTable", "Report", "RunTiming", "Script", "Scripts", "Status", "Step", "StepReport",
        "Validation", "__version__", "errors", "events", "load", "migrate_all", "op",
    }  # fmt: skip
    assert dir(aiomigrate) == sorted(aiomigrate.__all__)
    assert all(getattr(aiomigrate, name) is not None for name in aiomigrate.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Migrations'"):
        _ = aiomigrate.Migrations


def test_importing_costs_next_to_nothing() -> None:
    """`import aiomigrate` loads none of its dependencies, and a script none but Arrow."""
    code = (
        "import sys, aiomigrate\n"
        "heavy = {'lancedb', 'pyarrow', 'anyio', 'structlog', 'typer', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from aiomigrate import Migration, op\n"
        "assert not (heavy - {'pyarrow'}) & set(sys.modules), set(sys.modules) & heavy\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_error_is_in_one_tree_and_documented() -> None:
    """`except AiomigrateError` catches them all; the README says what to do about each family."""
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)
               if c.__module__ == errors.__name__]  # fmt: skip
    told = [c for c in classes if c.__base__ in (errors.AiomigrateError, errors.PlanError)]

    assert all(issubclass(c, errors.AiomigrateError) for c in classes)
    assert all(inspect.getdoc(c) for c in classes)
    assert [c.__name__ for c in told if c.__name__ not in README] == []


def test_every_operation_is_documented() -> None:
    """The README's table has a row for each, and each says what its attributes are."""
    operations = [getattr(op, name) for name in op.__all__]
    concrete = [o for o in operations if inspect.isclass(o) and issubclass(o, Operation)]

    missing = [
        o.__name__ for o in concrete if o is not Operation and f"`{o.__name__}(" not in README
    ]
    assert missing == []
    assert all(inspect.getdoc(o) for o in concrete)


def test_the_migrations_of_the_readme_load(tmp_path: Path) -> None:
    """Whoever copies an example gets a migration that is accepted."""
    blocks = re.findall(r"```python\n# migrations/(\S+)\n(.*?)```", README, re.DOTALL)
    for name, text in blocks:
        (tmp_path / name).write_text(text, encoding="utf-8")
    scripts = load(tmp_path, {})

    assert len(blocks) >= 2
    assert {script.line for script in scripts.all} == {"memos", "categories"}


def test_the_readme_names_the_commands_that_ci_runs() -> None:
    """The two commands of a fresh machine are those that are tried."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")

    for command in ("python3 -m venv .venv && .venv/bin/pip install",):
        assert command in README
        assert command in ci
    assert ".venv/bin/pytest" in README
    assert ".venv/bin/pytest" in ci


def test_every_verb_is_documented() -> None:
    """README and `--help` name the same verbs."""
    pytest.importorskip("typer")
    from aiomigrate.cli.app import app

    verbs = [command.name for command in app.registered_commands]
    assert [verb for verb in verbs if f"`{verb}`" not in README] == []
