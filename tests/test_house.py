"""The house rules: imports point downward and are light, the public face is documented."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
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


def test_the_documents_name_files_that_exist() -> None:
    """Every module and test that CONTRIBUTING.md or README.md names is there."""
    guide = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = (ROOT, ROOT / "aiomigrate", ROOT / "aiomigrate" / "operations")
    named = re.findall(r"`([\w./]+(?:\.py|/))`", guide)
    named += re.findall(r"`(tests/[\w./]+\.py)`", README)

    assert len(named) > 50
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


# ---- the structure ------------------------------------------------------------------------------

PACKAGE = ROOT / "aiomigrate"
MODULES = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
LAYERS_3_TO_6 = ("ledger", "planning", "reporting", "commits", "execution", "runs")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the import linter on the package that lies in a folder."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from importlinter.cli import lint_imports\n"
        "sys.exit(lint_imports(no_cache=True, no_logo=True))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


PLANTED = {
    "lazy": "def late():\n    from aiomigrate.manager import MigrationManager\n",
    "typing only": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from aiomigrate.manager import MigrationManager\n"
    ),
    "of LanceDB": "import lancedb\n",
    "of LanceDB, typing only": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lancedb\n"
    ),
    "of a clock": "import time\n",
    "of what imports it": "def late():\n    from aiomigrate.schema import state\n",
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_import_breaks_a_contract(planted: str, tmp_path: Path) -> None:
    """An upward import, or I/O in a pure module, is found wherever it is hidden."""
    pytest.importorskip("importlinter")
    shutil.copytree(PACKAGE, tmp_path / "aiomigrate", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    module = tmp_path / "aiomigrate" / "schema" / "paths.py"
    module.write_text(module.read_text(encoding="utf-8") + PLANTED[planted], encoding="utf-8")

    result = lint(tmp_path)

    assert result.returncode == 1, result.stdout + result.stderr
    assert "paths" in result.stdout.split("Broken contracts")[1]


def test_modules_are_few_and_small() -> None:
    """No module has over 500 lines, the top level is short, and no name is ambiguous."""
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in MODULES}
    top = [path for path in MODULES if path.parent == PACKAGE]
    exports = [
        path.name
        for path in top
        if re.search(r"^__all__ = ", path.read_text("utf-8"), re.MULTILINE)
    ]
    names = Counter(path.stem for path in MODULES if path.parent.name in LAYERS_3_TO_6)

    lines["manager.py"] -= 30  # its docstrings are the contract of every option and verb
    assert {name: count for name, count in lines.items() if count > 500} == {}
    assert len(MODULES) <= 110  # 95 when the move was done; each new one needs a new reason
    assert len(top) <= 18
    assert len(exports) <= 5
    assert [name for name, count in names.items() if count > 1] == []


def test_operations_are_asked_and_not_told_apart_by_class() -> None:
    """Outside of `operations`, no code depends on which operation it is given."""
    classes = [c for c in map(op.__dict__.get, op.__all__) if inspect.isclass(c)]
    kinds = {c.__name__ for c in classes if issubclass(c, Operation) and c is not Operation}
    found = []
    for path in MODULES:
        if path.parent.name == "operations":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                named = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                found += [f"{path.name}: {name}" for name in named & kinds]

    assert found == []
