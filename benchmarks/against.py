"""`python -m benchmarks --against REV`: whether this tree is slower than another revision.

Both are driven by this tree's benchmarks, which use nothing of aiomigrate but its public interface
there (`ours`); all that differs between the two is the package that is imported. For each benchmark
a process of each side (`side`) makes its own databases. Then they take turns, one run at a time, in
an order that alternates (new old, old new, ...), so that a machine that becomes slower slows both.
A pair is a run of each; of what is short it is several, and their medians. The ratio is the
geometric mean of the pairs' ratios, with its 95% interval by Student's t of their logarithms.

A benchmark is `slower` where the whole interval is above 1.05. Counts (LanceDB calls, requests to
the store, ledger commits) must be the same. Some of them vary from run to run, with what happens to
meet in time: those differ where the ranges of the two sides have nothing in common, or where all
runs differ by the same number.

All benchmarks are compared, each by what aiomigrate does in it: its time, and where that is what it
is about its memory or its processor's time. What is not compared: the floor, the peers and Alembic,
which are the same on both sides; what `backfill` measures besides (bytes written and the delay of
the event loop, which have targets of their own); and the ledger commits of `overhead`, which depend
on how its clock hurries. Both sides use the dependencies that are installed.

This is not for absolute figures, which `cases` measures, nor for a revision whose public interface
lacks what `ours` uses: its side fails, and so does the comparison.
"""

from __future__ import annotations

import compileall
import contextlib
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.measure import Unit

ROOT = Path(__file__).parent.parent
FORMAT = 1
"""Of the JSON document."""

MARGIN = 1.05
"""How much slower is not called slower."""

PAIRS, QUICK_PAIRS = 9, 3

_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t for 95%, two-sided, by degrees of freedom from 1; that of 30 serves for more."""


class RevisionError(Exception):
    """There is nothing to compare with."""


class SideError(Exception):
    """One side ended before its time; why is on stderr."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The geometric mean of ratios, and where it is with a confidence of 95%."""

    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Interval:
        """Returns that of paired ratios, two at least."""
        logs = [math.log(ratio) for ratio in ratios]
        mean = statistics.fmean(logs)
        half = _T[min(len(logs) - 1, len(_T)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
        return cls(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One figure of a benchmark, measured on both sides.

    Attributes:
        name: The benchmark, and which of its figures where it has several.
        unit: Of the figure.
        new: It by pair, of this tree.
        old: It by pair, of the other revision.
    """

    name: str
    unit: Unit
    new: Sequence[float]
    old: Sequence[float]

    @property
    def interval(self) -> Interval:
        """Of the ratios new / old."""
        return Interval.of([new / old for new, old in zip(self.new, self.old, strict=True)])

    @property
    def is_worse(self) -> bool:
        """Whether all of the interval is beyond the margin."""
        return self.interval.low > MARGIN

    @property
    def verdict(self) -> str:
        """It in words."""
        what = "larger" if self.unit is Unit.MEGABYTES else "slower"
        return what.upper() if self.is_worse else f"no {what}"

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
        found = self.interval
        return {
            "name": self.name,
            "unit": str(self.unit),
            "new": list(self.new),
            "old": list(self.old),
            "ratio": found.ratio,
            "low": found.low,
            "high": found.high,
            "verdict": self.verdict.lower(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """One count of a benchmark, of every run on both sides.

    Attributes:
        name: The benchmark, and which part of it where it has several.
        what: What is counted.
        new: Of this tree.
        old: Of the other revision.
    """

    name: str
    what: str
    new: Sequence[float]
    old: Sequence[float]

    @property
    def is_same(self) -> bool:
        """Whether the ranges meet, and the runs do not all differ by the same number."""
        meet = max(min(self.new), min(self.old)) <= min(max(self.new), max(self.old))
        differences = {new - old for new, old in zip(self.new, self.old, strict=True)}
        return meet and (len(differences) > 1 or differences == {0})

    def __str__(self) -> str:
        new, old = _range(self.new), _range(self.old)
        if not self.is_same:
            return f"{self.what} {new}, old {old}: DIFFERENT"
        return f"{self.what} {new} same" if new == old else f"{self.what} {new}, old {old}: same"

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dictionary."""
        return {
            "name": self.name,
            "what": self.what,
            "new": list(self.new),
            "old": list(self.old),
            "same": self.is_same,
        }


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


class Process:
    """One side of a benchmark; with it ends whatever it has started.

    It is a session of its own: an interrupt of the terminal is for the one that compares.
    """

    def __init__(self, tree: Path, name: str, folder: Path, *, quick: bool) -> None:
        folder.mkdir()
        paths = [str(tree), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONSAFEPATH": "1",  # no process of its imports what is in the current folder
            "TMPDIR": str(folder),
        }
        size = "quick" if quick else "full"
        self._name = f"{name} of the {tree.name} side"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.side", name, str(folder), str(tree), size],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            cwd=folder, env=environment, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._input.close()
            self._process.wait(0 if kind else 30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()

    def read(self) -> Any:
        """Returns the next line that it prints.

        Raises:
            SideError: It has ended.
        """
        line = self._output.readline()
        if not line:
            raise SideError(f"{self._name} ended")
        return json.loads(line)

    def run(self, part: str) -> dict[str, float]:
        """Lets it make a run, and returns what that measured.

        Raises:
            SideError: It has ended.
        """
        with contextlib.suppress(OSError):  # where it has ended, reading says so
            self._input.write(f"{part}\n")
            self._input.flush()
        measured: dict[str, float] = self.read()
        return measured


Pairs = Mapping[tuple[str, str], Sequence[Sequence[Mapping[str, float]]]]
"""By part of the benchmark and side: for each pair the figures of its runs, by name."""


def pairs_of(name: str, folder: Path, *, pairs: int, quick: bool) -> Pairs:
    """Lets both sides of a benchmark take turns.

    Args:
        name: The benchmark.
        folder: Where `trees` has put both packages.
        pairs: How many are kept, after one that is not.
        quick: Whether it is small.

    Raises:
        SideError: It cannot be run on both.
    """
    with contextlib.ExitStack() as stack:
        with _uninterrupted():  # what has started is in the stack
            sides = {
                side: stack.enter_context(
                    Process(folder / side, name, folder / f"{name}-{side}", quick=quick)
                )
                for side in ("new", "old")
            }
        parts, _ = [process.read() for process in sides.values()]  # of one code: the same
        found: dict[tuple[str, str], list[list[Mapping[str, float]]]] = {
            (part, side): [[] for _ in range(pairs + 1)] for part in parts for side in sides
        }
        for number in range(pairs + 1):
            for part, runs in parts.items():
                for run in range(runs):
                    for side in ("new", "old") if (number + run) % 2 else ("old", "new"):
                        found[part, side][number].append(sides[side].run(part))
    return {key: made[1:] for key, made in found.items()}


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets an interrupt wait for the end of the block."""
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def compare(name: str, found: Pairs) -> tuple[list[Compared], list[Counted]]:
    """Returns the figures and the counts of a benchmark, side by side."""
    from benchmarks.side import COUNTS, TOOK

    compared, counted = [], []
    parts = list(dict.fromkeys(part for part, _ in found))
    for part in parts:
        title = name if len(parts) == 1 else f"{name} {part}"
        sides = found[part, "new"], found[part, "old"]
        for figure in sides[0][0][0]:
            if figure in COUNTS:
                new, old = ([run[figure] for pair in side for run in pair] for side in sides)
                counted.append(Counted(name=title, what=figure, new=new, old=old))
                continue
            new, old = (
                [statistics.median(run[figure] for run in pair) for pair in side] for side in sides
            )
            label = title if figure == TOOK else f"{title} {figure.removesuffix(' MB')}"
            unit = Unit.MEGABYTES if figure.endswith(" MB") else Unit.SECONDS
            compared.append(Compared(name=label, unit=unit, new=new, old=old))
    return compared, counted


@contextlib.contextmanager
def trees(revision: str) -> Iterator[tuple[Path, str]]:
    """Makes a folder with this tree's package and the other's; yields it, and the other's commit.

    The package alone is taken out of git's objects: no worktree is registered.

    Raises:
        RevisionError: There is no such revision, or this is no checkout.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top.decode().strip()).resolve() != ROOT.resolve():
        raise RevisionError(f"{ROOT} is no git checkout, so there is no revision to compare with.")
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found is None:
        raise RevisionError(f"git knows no revision {revision!r} here.")
    commit = found.decode().strip()
    package = _git("archive", "--format=tar", commit, "aiomigrate")
    if package is None:
        raise RevisionError(f"Revision {revision!r} has no package aiomigrate.")
    with tempfile.TemporaryDirectory(
        prefix="aiomigrate-against-", ignore_cleanup_errors=True
    ) as made:
        folder = Path(made).resolve()
        with tarfile.open(fileobj=io.BytesIO(package)) as tar:
            tar.extractall(folder / "old", filter="data")
        shutil.copytree(
            ROOT / "aiomigrate", folder / "new" / "aiomigrate",
            ignore=shutil.ignore_patterns("__pycache__"),
        )  # fmt: skip
        for side in ("new", "old"):
            compileall.compile_dir(folder / side, quiet=2)
        yield folder, commit


def _git(*arguments: str) -> bytes | None:
    """Returns what git prints, `None` where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True)  # noqa: S607 - whichever the user has
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def table(compared: Sequence[Compared], counted: Sequence[Counted]) -> str:
    """Returns what was found as text: a line for each figure, with the counts of its benchmark."""
    lines = [("benchmark", "new", "old", "new / old", "95% interval", "verdict", "counts")]
    for one in compared:
        found, medians = one.interval, [statistics.median(side) for side in (one.new, one.old)]
        counts = [str(count) for count in counted if count.name == one.name]
        lines.append((
            one.name, one.unit.text(medians[0]), one.unit.text(medians[1]), f"{found.ratio:.3f}",
            f"{found.low:.3f} to {found.high:.3f}", one.verdict, ", ".join(counts),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines]  # fmt: skip
    shown = {one.name for one in compared}
    rest = [f"{one.name}: {one}" for one in counted if one.name not in shown]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:], *rest])


def exit_code(compared: Sequence[Compared], counted: Sequence[Counted]) -> int:
    """Returns 1 where something is slower or larger, or a count is another; else 0."""
    worse = any(one.is_worse for one in compared)
    return 1 if worse or not all(one.is_same for one in counted) else 0


def main(
    revision: str,
    names: Sequence[str],
    *,
    pairs: int,
    quick: bool,
    written: Path | None,
    machine: Mapping[str, Any],
) -> int:
    """Compares this tree with a revision, prints a table, and returns the exit code.

    Returns:
        0 where nothing is slower and every count is the same; 1 where not, or where a benchmark
        cannot be run on both; 2 where there is no such revision; 130 after an interrupt.
    """
    begun = time.perf_counter()
    compared: list[Compared] = []
    counted: list[Counted] = []
    failed: list[str] = []
    try:
        with trees(revision) as (folder, commit):
            for name in names:
                print(f"{name} ...", file=sys.stderr, end=" ", flush=True)
                started = time.perf_counter()
                try:
                    found = pairs_of(name, folder, pairs=pairs, quick=quick)
                except SideError as error:
                    failed.append(str(error))
                    print(f"failed: {error}", file=sys.stderr, flush=True)
                    continue
                figures, counts = compare(name, found)
                compared += figures
                counted += counts
                print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    except RevisionError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"this tree (new) against {revision}, {commit[:12]} (old); {pairs} pairs")
    print("\n".join([table(compared, counted), *(f"FAILED: {one}" for one in failed)]))
    code = exit_code(compared, counted) or (1 if failed else 0)
    if written is not None:
        document = {
            "format": FORMAT,
            "against": revision,
            "commit": commit,
            "quick": quick,
            "pairs": pairs,
            "met": code == 0,
            "took_s": time.perf_counter() - begun,
            "machine": machine,
            "figures": [one.to_dict() for one in compared],
            "counts": [one.to_dict() for one in counted],
            "failed": failed,
        }
        written.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return code
