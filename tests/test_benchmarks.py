"""The benchmarks run and write what they document; times are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_quick_benchmark_writes_its_documented_json(tmp_path: Path) -> None:
    """One quick benchmark prints a table, writes JSON and does not fail because of a time."""
    written = tmp_path / "benchmarks.json"

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--only", "nothing-to-do",
         "--json", str(written)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "nothing-to-do" in done.stdout
    document = json.loads(written.read_text(encoding="utf-8"))
    assert document.keys() == {"format", "quick", "met", "took_s", "machine", "benchmarks"}
    assert document["quick"] is True
    assert {"python", "cores", "lancedb", "pyarrow"} <= document["machine"].keys()
    (case,) = document["benchmarks"]
    assert case.keys() == {"name", "what", "medians_s", "samples_s", "targets", "facts"}
    assert case["medians_s"].keys() == case["samples_s"].keys() == {"ours", "floor", "peer"}
    assert len({len(times) for times in case["samples_s"].values()}) == 1
    for target in case["targets"]:
        assert {"target", "of", "against", "ratio", "met"} <= target.keys()


def test_unknown_benchmark_is_a_usage_error() -> None:
    """A misspelt name is told, with the names there are."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--only", "nothing"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert "nothing-to-do" in done.stderr


def test_a_missed_target_shows_and_a_met_one_does_too() -> None:
    """Targets are judged by the ratio of medians, in the direction each is about."""
    from benchmarks.__main__ import table
    from benchmarks.measure import Result, Target

    result = Result(
        name="example",
        what="an example",
        samples={"ours": [3.0, 2.0, 90.0], "floor": [1.0, 1.0, 1.0], "peer": [30.0, 10.0, 36.0]},
        targets=(
            Target(of="ours", against="floor", at_most=2),
            Target(of="ours", against="peer", at_least=10),
        ),
    )

    assert [t["ratio"] for t in result.to_dict()["targets"]] == pytest.approx([3.0, 10.0])
    assert [t["met"] for t in result.to_dict()["targets"]] == [False, True]
    assert not result.is_met
    assert "MISSED" in table([result], quick=False)
