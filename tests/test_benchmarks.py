"""The benchmarks run and write what they document; times are not judged here."""

import ast
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import against
from benchmarks.__main__ import exit_code, main, table
from benchmarks.against import Compared, Counted, Interval
from benchmarks.cases import CASES
from benchmarks.measure import Result, Target, Unit
from benchmarks.ours import SIDES

ROOT = Path(__file__).parent.parent
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")
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


def test_the_interval_is_that_of_student() -> None:
    """Of 1/2, 1 and 2 the mean is 1; half of the interval is 4.303 x ln 2 / sqrt 3."""
    found = Interval.of([0.5, 1.0, 2.0])
    half = 4.303 * math.log(2) / math.sqrt(3)

    assert found.ratio == pytest.approx(1)
    assert (found.low, found.high) == pytest.approx((math.exp(-half), math.exp(half)))
    assert Interval.of([1.2] * 40) == Interval(*(pytest.approx(1.2),) * 3)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=50))
def test_the_interval_holds_its_mean_and_turns_with_the_sides(ratios: list[float]) -> None:
    """The mean is the geometric one, within the interval; with the sides changed all is 1 / x."""
    found, turned = Interval.of(ratios), Interval.of([1 / ratio for ratio in ratios])

    assert found.ratio == pytest.approx(statistics.geometric_mean(ratios))
    assert found.low <= found.ratio * (1 + 1e-9)
    assert found.ratio <= found.high * (1 + 1e-9)
    assert (1 / turned.high, 1 / turned.ratio, 1 / turned.low) == pytest.approx(
        (found.low, found.ratio, found.high)
    )


def compared(*new: float, unit: Unit = Unit.SECONDS) -> Compared:
    """Returns a figure that is 1 on the old side."""
    return Compared(name="example", unit=unit, new=new, old=[1.0] * len(new))


def counted(new: list[float], old: list[float]) -> Counted:
    """Returns a count."""
    return Counted(name="example", what="requests", new=new, old=old)


def test_slower_is_what_is_surely_beyond_the_margin() -> None:
    """The lower bound decides: a wide interval, or a little more, is no failure."""
    slower, wide, little = compared(1.2, 1.21), compared(1.0, 3.0), compared(1.04, 1.04)
    larger = compared(1.2, 1.21, unit=Unit.MEGABYTES)

    assert [one.verdict for one in (slower, wide, little)] == ["SLOWER", "no slower", "no slower"]
    assert larger.verdict == "LARGER"
    assert [against.exit_code([one], []) for one in (slower, wide, little)] == [1, 0, 0]
    assert "SLOWER" in against.table([wide, slower], [])


def test_a_count_differs_where_its_ranges_do_not_meet_or_all_runs_differ_alike() -> None:
    """What is always the same is compared exactly; what varies may vary."""
    same = [counted([4, 4], [4, 4]), counted([10, 11], [11, 9]), counted([438, 441], [438, 441])]
    different = [counted([5, 5], [4, 4]), counted([6, 7], [4, 5]), counted([439, 442], [438, 441])]

    assert [one.is_same for one in (*same, *different)] == [True] * 3 + [False] * 3
    assert [against.exit_code([], [one]) for one in (same[0], different[0])] == [0, 1]
    text = against.table([compared(1, 1)], [same[0], different[0]])
    assert "requests 4 same" in text
    assert "requests 5, old 4: DIFFERENT" in text


def test_every_benchmark_is_compared() -> None:
    """Each has a side of its own."""
    assert list(SIDES) == list(CASES)


def test_what_both_sides_run_imports_nothing_inside_of_aiomigrate() -> None:
    """Other revisions have other modules: see `ours`."""
    code = "import sys, benchmarks.side; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = {
        ROOT / folder / f"{name or '__init__'}.py"
        for folder, _, name in (module.partition(".") for module in done.stdout.split())
        if folder in ("benchmarks", "tests")
    }
    files |= {
        ROOT / "benchmarks" / f"{name}.py" for name in ("rebuild", "backfill", "wide", "hour")
    }
    found = [
        f"{path.name}: {module}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([node.module] if isinstance(node, ast.ImportFrom) else
                       [alias.name for alias in node.names])
        if module and module.startswith("aiomigrate.")
    ]  # fmt: skip

    assert ROOT / "benchmarks" / "ours.py" in files
    assert found == []


@needs_git
def test_a_revision_is_compared_and_written(tmp_path: Path) -> None:
    """Figures and counts of both sides are printed and written; the exit code follows them."""
    written = tmp_path / "against.json"

    done = benchmarks("--against", "HEAD", "--quick", "--json", str(written), "nothing-to-do")

    assert "LanceDB calls" in done.stdout, done.stderr
    document = json.loads(written.read_text(encoding="utf-8"))
    assert done.returncode == (0 if document["met"] else 1)
    (figure,) = document["figures"]
    assert len(figure["new"]) == len(figure["old"]) == document["pairs"] == 3
    assert figure["low"] <= figure["ratio"] <= figure["high"]
    assert [count["what"] for count in document["counts"]] == ["ledger commits", "LanceDB calls"]
    assert document["failed"] == []


@needs_git
def test_an_interrupt_of_a_comparison_leaves_nothing(tmp_path: Path) -> None:
    """Folders and processes go; git knows of nothing."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "--against", "HEAD", "together"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    with process:
        assert process.stderr is not None
        assert process.stderr.read(len("together")) == "together"
        (made,) = tmp_path.iterdir()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    running = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]

    assert list(tmp_path.iterdir()) == []
    assert [line for line in running if any(str(made) in word for word in line)] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--against", "no-such-revision"], "git knows no revision 'no-such-revision' here."),
        (["--against", "HEAD", "nothing"], "no benchmark nothing"),
        (["--against", "HEAD", "--pairs", "1"], "--pairs: two at least"),
        (["--pairs", "3"], "--pairs is for --against"),
    ],
)
@needs_git
def test_what_cannot_be_compared_is_a_usage_error(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, and the exit code of wrong usage."""
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code

    assert code == 2
    assert said in capsys.readouterr().err
