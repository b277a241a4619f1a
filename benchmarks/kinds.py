"""Kinds of committed result files, and what makes a file of each kind whole.

`benchmark` files are rows of `python -m benchmarks run`; the others are single measurements with a script of
their own: `published` times us against other people's code, `demo` is the demonstration's report,
`compile report` is what the kernels compile to, `traffic` is what they load, store and multiply, and `drift`
is how errors add up over a long sequence.
"""

import json
import math
from pathlib import Path

from .results import ResultError, load


def check(path: Path) -> str:
    """Validate one result file and return its kind.

    Raises:
        ResultError: The file cannot be read, is of no known kind, or lacks what its kind must have.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: cannot be read as JSON ({error}).") from error
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ResultError(f"{path}: kind {kind!r}, expected one of {', '.join(map(repr, KINDS))}.")
    if kind == "benchmark":
        load(path)
        return kind
    try:
        problems = KINDS[kind](data)
    except (AttributeError, KeyError, TypeError) as error:
        raise ResultError(f"{path}: not what a file of kind {kind!r} holds: {error}.") from error
    if not str(data.get("command", "")).startswith("python -m "):
        problems.append("no command that makes it")
    if problems:
        raise ResultError(f"{path}: " + "; ".join(problems))
    return kind


def _demo(data: dict) -> list[str]:
    accuracies = data.get("test_accuracy_percent", {})
    problems = [] if data.get("versions", {}).get("torch") else ["no version of torch"]
    if not accuracies:
        problems.append("no test_accuracy_percent")
    for modality, values in accuracies.items():
        for run in ("hybrid", "no state", "no delta", "majority"):
            if not 0 <= values.get(run, math.nan) <= 100:
                problems.append(f"{modality}: accuracy of {run!r} is {values.get(run)!r}")
    return problems


def _published(data: dict) -> list[str]:
    rows = data.get("rows", [])
    problems = [] if rows else ["no rows"]
    for row in rows:
        ratio = row.get("ratio")
        if not (isinstance(ratio, float) and math.isfinite(ratio) and ratio > 0):
            problems.append(f"{row.get('name', row.get('case'))}: ratio {ratio!r}")
    return problems


def _compile_report(data: dict) -> list[str]:
    problems = [] if data.get("rows") or data.get("kernels") else ["no rows"]
    return problems if data.get("versions") else [*problems, "no versions"]


def _traffic(data: dict) -> list[str]:
    problems = [] if data.get("rows") else ["no rows"]
    for row in data.get("rows", []):
        counts = [row.get(name, math.nan) for name in ("read", "written", "issued", "flops")]
        if not all(math.isfinite(n) and n > 0 for n in counts) or counts[2] < counts[0] + counts[1]:
            problems.append(f"{row.get('kernel')}: counts {counts}")
    return problems if data.get("versions") else [*problems, "no versions"]


def _drift(data: dict) -> list[str]:
    problems = [] if data.get("rows") else ["no rows"]
    for row in data.get("rows", []):
        found = [row.get(way, math.nan) for way in ("accurate", "fast", "special", "plain PyTorch")]
        if not all(0 < x < 1 for x in found):
            problems.append(f"steps {row.get('step')}: errors {found}")
    return problems if data.get("versions") else [*problems, "no versions"]


KINDS = {
    "benchmark": None,
    "demo": _demo,
    "published": _published,
    "compile report": _compile_report,
    "traffic": _traffic,
    "drift": _drift,
}
