"""Result files: written as a run goes on, checked whenever they are read.

A file is one JSON object: what ran (command, environment, roofline) and one row per combination of op,
shape, dtype, direction and provider. It is replaced as a whole after every finished row, so that a run that
is killed keeps what it measured and `--resume` goes on from there.
"""

import json
import math
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_origin

import torch

SCHEMA = 1
DIRECTIONS = ("forward", "forward+backward")
STATUSES = ("ok", "wrong", "not finite", "failed", "out of memory", "skipped")
RESULTS = Path(__file__).parent / "results"

Key = tuple[str, str, str, str, str]


class ResultError(ValueError):
    """A file that is not a result of this bench, and why."""


@dataclass
class Row:
    """One provider on one shape: what came out, and how long it took.

    `error_ratio` is the largest error of outputs and gradients as a ratio to plain PyTorch's in the same
    dtype, both against the float64 reference; None where nothing came out. Times are milliseconds.
    """

    op: str
    shape: str
    dtype: str
    direction: str
    provider: str
    status: str
    reason: str = ""
    error_ratio: float | None = None
    error_in: str = ""
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    samples: int = 0
    peak_bytes: int | None = None
    floor_bytes: int = 0
    floor_flops: int = 0
    floor_special: int = 0
    gb_s: float | None = None
    tflop_s: float | None = None
    roofline_percent: float | None = None

    @property
    def key(self) -> Key:
        return self.op, self.shape, self.dtype, self.direction, self.provider


@dataclass
class Environment:
    """Where and from what a result came."""

    device: str  # "cpu" or "cuda"
    device_name: str
    driver: str  # empty on a CPU
    platform: str
    python: str
    torch: str
    triton: str  # empty where it is not installed
    threads: int
    commit: str
    dirty: bool
    peers: dict[str, str] = field(default_factory=dict)  # importable ones, with their versions


@dataclass
class Roofline:
    """What this machine does at best, measured: a large copy, and a matrix product per dtype."""

    copy_gb_s: float
    tflop_s: dict[str, float]


@dataclass
class Result:
    """One result file."""

    command: str
    started: str  # UTC, ISO 8601
    environment: Environment
    roofline: Roofline
    rows: list[Row] = field(default_factory=list)
    kind: str = "benchmark"
    schema: int = SCHEMA

    def finished(self) -> set[Key]:
        """Rows that `--resume` need not measure again."""
        return {row.key for row in self.rows}

    def save(self, path: Path) -> None:
        """Replace the file as a whole: whoever is killed leaves the old one or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(asdict(self), indent=1))


def replace(path: Path, text: str) -> None:
    """Write a file as a whole, through one beside it."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load(path: Path) -> Result:
    """Read and check a result file.

    Raises:
        ResultError: The file is missing, truncated, foreign or of another schema; the message says which.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ResultError(f"{path}: not whole JSON ({error}). Was it cut off while being copied?") from error
    if not isinstance(data, dict) or data.get("kind") != "benchmark":
        raise ResultError(f"{path}: not a result of `python -m benchmarks run` (no kind 'benchmark').")
    if data.get("schema") != SCHEMA:
        raise ResultError(f"{path}: schema {data.get('schema')!r}, and this bench reads {SCHEMA}.")
    try:
        result = Result(
            command=data["command"],
            started=data["started"],
            environment=Environment(**data["environment"]),
            roofline=Roofline(**data["roofline"]),
            rows=[Row(**row) for row in data["rows"]],
        )
    except (KeyError, TypeError) as error:
        raise ResultError(f"{path}: a field is missing or unknown: {error}.") from error
    parts = (result, result.environment, result.roofline, *result.rows)
    problems = [p for part in parts for p in problems_of(part)]
    if not problems:
        times = Counter(row.key for row in result.rows)
        problems = [f"twice: {' '.join(key)}" for key, n in times.items() if n > 1]
    if problems:
        raise ResultError(f"{path}: " + "; ".join(problems[:5]))
    return result


def problems_of(part: Result | Environment | Roofline | Row) -> list[str]:
    """What is wrong with one part of a file, in words."""
    problems = []
    for f in fields(part):
        value = getattr(part, f.name)
        expected = get_origin(f.type) if get_origin(f.type) in (dict, list) else f.type
        if not isinstance(value, expected):
            problems.append(f"{f.name} is {value!r}")
    if isinstance(part, Roofline) and not problems:
        rates = {"copy": part.copy_gb_s, **part.tflop_s}
        problems += [f"roofline: {n} at {x!r}" for n, x in rates.items() if not _is_rate(x)]
    if not isinstance(part, Row) or problems:
        return problems
    name = " ".join(part.key)
    if part.direction not in DIRECTIONS or part.status not in STATUSES:
        problems.append(f"{name}: direction {part.direction!r}, status {part.status!r}")
    times = (part.ms_p20, part.ms_p50, part.ms_p80)
    if part.status == "ok":
        measured = all(_is_rate(t) for t in (*times, part.gb_s)) and math.isfinite(part.error_ratio or 0.0)
        if not measured or not part.samples or part.error_ratio is None or sorted(times) != list(times):
            problems.append(f"{name}: ok without three ordered quantiles, samples, a rate and an error")
    elif not part.reason:
        problems.append(f"{name}: {part.status} without a reason")
    return problems


def _is_rate(x: object) -> bool:
    return isinstance(x, float) and math.isfinite(x) and x > 0


def environment(device: str, peers: dict[str, str]) -> Environment:
    """This machine, this checkout."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    on_gpu = device == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else ""
    return Environment(
        device=device,
        device_name=torch.cuda.get_device_name() if on_gpu else cpu_name(),
        driver=driver,
        platform=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton_version,
        threads=torch.get_num_threads(),
        commit=_output("git", "rev-parse", "HEAD"),
        dirty=bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        peers=peers,
    )


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
