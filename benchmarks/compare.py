"""`python -m benchmarks compare A B`: is B slower than A, beyond noise?

A and B are two result files, or two git revisions. Revisions are checked out side by side and measured in
turns (A B A B), so that a machine that drifts, drifts for both. A row is faster or slower only if the 20 to
80 % quantiles do not overlap and the medians differ by more than a threshold. Exits with 1 if a row is slower
or no longer right.
"""

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .results import Key, Result, ResultError, Row, load

ROOT = Path(__file__).parent.parent
SAME, FASTER, SLOWER, BROKEN = "same within noise", "faster", "slower", "no longer right"
HEAD = ("op", "shape", "dtype", "direction", "provider", "A, ms", "B, ms", "A / B", "verdict")


class Refusal(Exception):
    """Why two things are not compared."""


@dataclass
class Line:
    """One row of both files, and what to make of it."""

    a: Row
    b: Row
    verdict: str

    def cells(self) -> tuple[str, ...]:
        """The line of the table."""
        ratio = f"{self.a.ms_p50 / self.b.ms_p50:.2f}" if self.a.ms_p50 and self.b.ms_p50 else ""
        return (*self.b.key, _times(self.a), _times(self.b), ratio, self.verdict)


def verdict(a: Row, b: Row, threshold: float) -> str:
    """Faster or slower only where quantiles are apart and medians differ by more than `threshold` percent."""
    if a.status != "ok" or b.status != "ok":
        if a.status == b.status:
            return f"both {a.status}"
        return "right now" if b.status == "ok" else f"{BROKEN}: {b.status}" if a.status == "ok" else b.status
    if a.ms_p20 <= b.ms_p80 and b.ms_p20 <= a.ms_p80:
        return SAME
    if abs(b.ms_p50 / a.ms_p50 - 1) * 100 <= threshold:
        return SAME
    return FASTER if b.ms_p50 < a.ms_p50 else SLOWER


def compare(a: Result, b: Result, threshold: float) -> tuple[list[Line], list[Key], list[Key]]:
    """Rows of both, and the keys that only A or only B has."""
    before, after = ({row.key: row for row in result.rows} for result in (a, b))
    lines = [Line(before[k], after[k], verdict(before[k], after[k], threshold)) for k in after if k in before]
    return lines, [k for k in before if k not in after], [k for k in after if k not in before]


def differences(a: Result, b: Result) -> list[str]:
    """What of the machines differs, so that times cannot be compared."""
    fields = ["device", "device_name", *(["threads"] if a.environment.device == "cpu" else [])]
    pairs = [(f, getattr(a.environment, f), getattr(b.environment, f)) for f in fields]
    return [f"{f} {x!r} against {y!r}" for f, x, y in pairs if x != y]


def merge(rounds: Sequence[Result]) -> Result:
    """One result of several rounds: the middle of the medians, the widest of the quantiles."""
    by_key: dict[Key, list[Row]] = {}
    for row in (row for result in rounds for row in result.rows):
        by_key.setdefault(row.key, []).append(row)
    return replace(rounds[0], rows=[_merged(rows) for rows in by_key.values()])


def _merged(rows: list[Row]) -> Row:
    bad = next((row for row in rows if row.status != "ok"), None)
    if bad:
        return bad
    medians = sorted(row.ms_p50 for row in rows)
    middle = (medians[(len(medians) - 1) // 2] + medians[len(medians) // 2]) / 2
    lowest, highest = min(row.ms_p20 for row in rows), max(row.ms_p80 for row in rows)
    samples = sum(row.samples for row in rows)
    return replace(rows[0], ms_p20=lowest, ms_p50=middle, ms_p80=highest, samples=samples)


def is_revision(name: str, repository: Path = ROOT) -> bool:
    """Whether git knows this name as a commit."""
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
    return subprocess.run(command, cwd=repository, capture_output=True).returncode == 0


@contextlib.contextmanager
def worktrees(revisions: Sequence[str], repository: Path = ROOT) -> Iterator[list[Path]]:
    """Each revision checked out in a folder of its own; the folders are gone afterwards, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="prism-compare-") as folder:
        paths = [Path(folder) / name for name in ("A", "B")[: len(revisions)]]
        try:
            for path, revision in zip(paths, revisions, strict=True):
                _git(repository, "worktree", "add", "--detach", "--quiet", str(path), revision)
            yield paths
        finally:
            for path in paths:
                subprocess.run(
                    ["git", "worktree", "remove", "--force", str(path)], cwd=repository, capture_output=True
                )


def _git(repository: Path, *arguments: str) -> None:
    done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True)
    if done.returncode:
        raise Refusal(f"compare: git {arguments[0]} failed: {done.stderr.strip()}")


def measure(revisions: Sequence[str], selection: str, rounds: int, repository: Path = ROOT) -> list[Result]:
    """Run the same selection in a checkout of each revision, in turns."""
    with _terminated_in_order(), worktrees(revisions, repository) as trees:
        results: list[list[Result]] = [[] for _ in trees]
        for turn in range(rounds):
            for i, (tree, revision) in enumerate(zip(trees, revisions, strict=True)):
                out = tree.parent / f"{tree.name}{turn}.json"
                command = ["-m", "benchmarks", "run", *shlex.split(selection), "--out", str(out)]
                print(f"round {turn + 1} of {rounds}, {revision}: python {shlex.join(command)}", flush=True)
                code = subprocess.run([sys.executable, *command], cwd=tree).returncode
                if not out.exists():
                    raise Refusal(f"compare: {revision} measured nothing (exit code {code}); see above.")
                results[i].append(load(out))
    return [merge(r) for r in results]


@contextlib.contextmanager
def _terminated_in_order() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that checkouts are removed and the child ends."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read(a: str, b: str, args: argparse.Namespace) -> list[Result]:
    """The two results: both from files, or both measured."""
    if Path(a).is_file() and Path(b).is_file():
        return [load(Path(a)), load(Path(b))]
    for name in (a, b):
        if Path(name).is_file():
            raise Refusal("compare: expected two files or two revisions, got one of each.")
        if not is_revision(name):
            raise Refusal(f"compare: {name!r} is neither a file nor a git revision.")
    return measure((a, b), args.select, args.rounds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `compare`."""
    parser.add_argument("a", metavar="A", help="result file or git revision: before")
    parser.add_argument("b", metavar="B", help="result file or git revision: after")
    parser.add_argument("--threshold", type=float, default=3.0, help="percent that medians must differ by")
    parser.add_argument(
        "--allow-slower", action="store_true", help="exit with 0 even if something got slower"
    )
    parser.add_argument("--force", action="store_true", help="compare results of different devices")
    parser.add_argument(
        "--select", default="", help='revisions: what to run, as for `run`, e.g. "--op rms_norm --device cpu"'
    )
    parser.add_argument("--rounds", type=int, default=2, help="revisions: turns that each takes")


def run(args: argparse.Namespace) -> int:
    """Print the table and a line of verdict."""
    try:
        a, b = read(args.a, args.b, args)
        if (different := differences(a, b)) and not args.force:
            raise Refusal(
                f"compare: different machines: {'; '.join(different)}. --force compares them still."
            )
        lines, only_a, only_b = compare(a, b, args.threshold)
        if not lines:
            raise Refusal("compare: the two have no row in common.")
    except (Refusal, ResultError) as error:
        print(error, file=sys.stderr)
        return 2
    show([line.cells() for line in lines])
    for name, keys in (("A", only_a), ("B", only_b)):
        for key in keys:
            print(f"only in {name}: {' '.join(key)}")
    count = {v: sum(line.verdict.startswith(v) for line in lines) for v in (FASTER, SLOWER, BROKEN, SAME)}
    print(f"{len(lines)} rows: " + ", ".join(f"{n} {name}" for name, n in count.items()))
    return int(bool(count[SLOWER] or count[BROKEN]) and not args.allow_slower)


def show(rows: list[tuple[str, ...]]) -> None:
    """A table by rich where it is installed, in plain text otherwise."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
        for row in (HEAD, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table()
    for name in HEAD:
        table.add_column(name, justify="right" if "ms" in name or "/" in name else "left", no_wrap=True)
    colours = {FASTER: "green", SLOWER: "red", BROKEN: "red"}
    for row in rows:
        table.add_row(*row, style=next((c for name, c in colours.items() if row[-1].startswith(name)), None))
    # Into a pipe rich would cut columns to 80 characters.
    console = Console()
    console = console if console.is_terminal else Console(width=220)
    console.print(table)


def _times(row: Row) -> str:
    if row.status != "ok":
        return row.status
    return f"{row.ms_p50:.4g} ({row.ms_p20:.4g} to {row.ms_p80:.4g})"
