"""The benchmarks run and write what they document; times are not judged here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import exit_code, table
from benchmarks.cases import CASES
from benchmarks.measure import Result, Target, Unit

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def example(**counts: float) -> Result:
    """Returns a result with targets of every form; counts are added, each to be within 12."""
    return Result(
        name="example",
        what="an <example>",
        samples={
            "ours": [3.0, 2.0, 90.0], "floor": [1.0, 1.0, 1.0], "peer": [30.0, 10.0, 36.0],
            "memory": [180.0], "bare": [100.0], **{name: [n] for name, n in counts.items()},
        },
        targets=(
            Target(of="ours", against="floor", at_most=2),
            Target(of="ours", against="peer", at_least=10),
            Target(of="ours", within=3.5),
            Target(of="memory", against="bare", within=75),
            *(Target(of=name, within=12) for name in counts),
        ),
        units={
            "memory": Unit.MEGABYTES, "bare": Unit.MEGABYTES, **dict.fromkeys(counts, Unit.COUNT),
        },
    )  # fmt: skip


def test_quick_benchmark_writes_its_documented_files(tmp_path: Path) -> None:
    """One quick benchmark prints a table, writes JSON and a page, and fails for no time."""
    written, page = tmp_path / "benchmarks.json", tmp_path / "benchmarks.html"

    done = benchmarks("--quick", "--only", "nothing-to-do", "--json", str(written),
                      "--html", str(page))  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "nothing-to-do" in done.stdout
    document = json.loads(written.read_text(encoding="utf-8"))
    assert document.keys() == {"format", "quick", "met", "took_s", "machine", "benchmarks"}
    assert document["quick"] is True
    assert {"python", "cores", "lancedb", "pyarrow"} <= document["machine"].keys()
    (case,) = document["benchmarks"]
    assert case.keys() == {"name", "what", "units", "medians", "samples", "targets", "facts"}
    contenders = {"ours", "floor", "peer", "gather", "alembic"}
    assert case["medians"].keys() == case["samples"].keys() == case["units"].keys() == contenders
    assert len({len(values) for values in case["samples"].values()}) == 1
    for target in case["targets"]:
        assert target.keys() == {
            "target", "of", "against", "measured", "at_most", "at_least", "within", "met",
            "out_of_reach",
        }  # fmt: skip
    assert "<h2>nothing-to-do</h2>" in page.read_text(encoding="utf-8")


def test_unknown_benchmark_is_a_usage_error() -> None:
    """A misspelt name is told, with the names there are."""
    done = benchmarks("--only", "nothing")

    assert done.returncode == 2
    assert "nothing-to-do" in done.stderr


def test_a_missed_target_shows_and_a_met_one_does_too() -> None:
    """Ratios, differences and figures by themselves are judged by medians, each in its unit."""
    result = example()
    told = result.to_dict()["targets"]

    assert [t["measured"] for t in told] == pytest.approx([3.0, 10.0, 3.0, 80.0])
    assert [t["met"] for t in told] == [False, True, True, False]
    assert [t["target"] for t in told] == [
        "<= 2 x floor", ">= 10 x faster than peer", "<= 3500 ms", "<= 75.00 MB over bare",
    ]  # fmt: skip
    assert [t.edge(result.medians) for t in result.targets] == pytest.approx([2, 3, 3.5, 175])
    assert table([result], quick=False).count("MISSED") == 2


def test_what_nobody_could_reach_is_missed_all_the_same_and_says_so() -> None:
    """A limit above the bound is told with its ratio; one below it excuses nothing."""
    samples = {"ours": [3.0], "floor": [1.0], "calls": [2.5]}

    def judged(at_most: float) -> Result:
        target = Target(of="ours", against="floor", at_most=at_most, limit=("calls", "floor"))
        return Result(name="example", what="one", samples=samples, targets=(target,))

    beyond, reachable, met = judged(2.4), judged(2.6), judged(3.0)

    assert "MISSED, out of reach: calls 2.50 x floor" in table([beyond], quick=False)
    assert "out of reach" not in table([reachable, met], quick=False)
    assert [r.to_dict()["targets"][0]["out_of_reach"] for r in (beyond, reachable, met)] == [
        2.5, None, None,
    ]  # fmt: skip
    assert [exit_code([r], quick=False) for r in (beyond, reachable, met)] == [1, 1, 0]


def test_a_quick_run_fails_by_counts_only() -> None:
    """What takes long on a busy machine is a warning there, one commit too many is a failure."""
    assert exit_code([example()], quick=False) == 1
    assert exit_code([example()], quick=True) == 0
    assert exit_code([example(), example(commits=12)], quick=True) == 0
    assert exit_code([example(), example(commits=13)], quick=True) == 1
    assert "warning" in table([example()], quick=True)
    assert "MISSED" in table([example(commits=13)], quick=True)


def test_the_page_holds_every_sample_and_asks_no_one() -> None:
    """A plot for each unit with every run of every contender; texts are escaped."""
    pytest.importorskip("plotly")
    from benchmarks.page import page

    text = page([example(commits=13)], {"python": "3"})
    own = re.sub(r"<script[^>]*>.*?</script>", "", text, flags=re.DOTALL)

    assert "an &lt;example&gt;" in own
    assert not re.findall(r"(?:src|href)=", own)
    assert text.count("Plotly.newPlot(") >= 3
    for contender in ("ours", "floor", "peer", "memory", "bare", "commits"):
        assert f'"name":"{contender}"' in text
    assert '"x":[3000.0,2000.0,90000.0]' in text


def test_every_benchmark_is_documented() -> None:
    """The README's table names each."""
    assert [name for name in CASES if f"`{name}`" not in README] == []
