"""What `benchmarks/gpu.sh` runs: doctor, tests, benchmarks and a profile, in stages that share a time budget.

A stage gets its share of the time that is left, so what one saves the next may use. One that runs over is
stopped (interrupted first, so that it can write what it has) and the next begins. Results are written as they
come:

    summary.json                what ran, how long, how it ended
    doctor.txt                  versions, device, chosen paths
    contracts.xml, tests.xml    one entry per test; what pytest printed is in tests.log
    bench.json, bench.log       result file of the bench; a second run into the same folder goes on from it
    bench.json.unfinished       only where the bench's process died: in which rows
    profile.txt                 the slowest row, kernel by kernel

A bench whose process a provider has ended, or taken the GPU from, goes on in another one. Where pytest-xdist
is installed the tests run in its workers, so that a crash is one failed test; without it, it ends its stage.
Nothing on the GPU is set: no clocks, no partitions, no reset. Exits with 1 if a stage failed.
"""

import argparse
import ast
import contextlib
import gzip
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
LARGEST = 15 * 2**20  # bytes of one file
GRACE = 20.0  # seconds between the interruption and the end
LARGE_TESTS = "tests/kernels/test_gpu.py"  # alone on the device: they fill its memory
WORKERS = 6  # for the others, whose time goes into compiling
GPU_LOST = 3  # exit code of the bench when a provider broke the device's context: a new process goes on
RESTARTS = 20  # of the bench, within its budget: two for each provider that ends the process


@dataclass
class Stage:
    """One part of the run: commands after one another, what they print in `log`."""

    name: str
    share: float
    log: str
    commands: list[list[str]]
    note: str = ""
    budget_s: float = 0.0
    seconds: float = 0.0
    status: str = "not begun"
    exit_codes: list[int] = field(default_factory=list)


def stages(out: Path) -> list[Stage]:
    """What there is to run in this checkout, with this Python."""
    python = [sys.executable, "-u", "-m"]
    doctor = [["nvidia-smi"]] if shutil.which("nvidia-smi") else []
    note = ""
    if (ROOT / "prism_kernels" / "doctor.py").exists():
        doctor.append([*python, "prism_kernels.doctor"])
    else:
        note = "prism_kernels.doctor is not in this checkout"
    # The repository's own options and plugins that a bare machine may lack are left out.
    pytest = [
        *python,
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-m",
        "gpu",
    ]
    pytest += ["-v", "-ra", "--tb=short", "--continue-on-collection-errors"]
    left_out = missing_imports(ROOT / "tests" / "kernels")
    ignored = [f"--ignore={path}" for path in (LARGE_TESTS, *left_out)]
    parallel = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if _installed("xdist") else ["-p", "no:xdist"]
    contracts = [*pytest, *parallel, f"--junitxml={out / 'contracts.xml'}", *ignored, "tests/kernels"]
    single = ["-n", "1"] if _installed("xdist") else ["-p", "no:xdist"]
    tests = [*pytest, *single, f"--junitxml={out / 'tests.xml'}", LARGE_TESTS]
    result = str(out / "bench.json")
    bench = [*python, "benchmarks", "run", "--device", "cuda", "--out", result, "--resume"]
    profile = [*python, "benchmarks.profile_row", "--slowest-of", result]
    why = "; ".join(f"{path} left out: {module} is not installed" for path, module in left_out.items())
    return [
        Stage("doctor", 5, "doctor.txt", doctor, note),
        Stage("contracts", 25, "tests.log", [contracts], why),
        Stage("tests", 10, "tests.log", [tests]),
        Stage("benchmarks", 52, "bench.log", [bench]),
        Stage("profile", 8, "profile.txt", [profile]),
    ]


def missing_imports(folder: Path) -> dict[str, str]:
    """Test modules that import, themselves or through a helper, what is not installed: path, and what."""
    found = {}
    for path in sorted(folder.glob("test_*.py")):
        if module := _first_missing(path):
            found[str(path.relative_to(ROOT))] = module
    return found


def _first_missing(path: Path) -> str | None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for name in names:
            local = ROOT / (name.replace(".", "/") + ".py")
            if name.startswith("tests.") and local.exists():
                if module := _first_missing(local):
                    return module
            elif not (ROOT / name.split(".")[0]).exists() and not _installed(name.split(".")[0]):
                return name.split(".")[0]
    return None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def budgets(its: Sequence[Stage], seconds: float) -> list[float]:
    """The budget of each stage if every one before it uses up its own."""
    whole = sum(stage.share for stage in its)
    return [seconds * stage.share / whole for stage in its]


class Run:
    """One run of all stages into one folder."""

    def __init__(self, out: Path, its: list[Stage], seconds: float, environment: dict[str, str]):
        self.out, self.stages, self.seconds, self.environment = out, its, seconds, environment
        self.started, self.begun = time.time(), time.monotonic()

    def all(self, device: str, notes: list[str]) -> int:
        """Run every stage; return the exit code."""
        for i, stage in enumerate(self.stages):
            left = max(0.0, self.seconds - (time.monotonic() - self.begun))
            stage.budget_s = round(budgets(self.stages[i:], left)[0], 1)
            try:
                self.one(stage)
            finally:
                for file in self.out.iterdir():
                    shrink(file)
                self.write_summary(device, notes)
        for stage in self.stages:
            spent = f"{stage.seconds:>7.1f} s of {stage.budget_s:.0f}"
            say(f"{stage.name:<11}{stage.status:<9}{spent}  {stage.note}")
        say(f"results: {self.out}")
        return int(any(stage.status == "failed" for stage in self.stages))

    def one(self, stage: Stage) -> None:
        """Run one stage within its budget."""
        say(f"{stage.name}: up to {stage.budget_s:.0f} s{f' ({stage.note})' if stage.note else ''}")
        start, log = time.monotonic(), self.out / stage.log
        stage.status = "stopped"  # unless it comes to an end
        for command in stage.commands:
            for turn in range(1 + RESTARTS):
                say("  $ " + readable(command))
                code, stopped = self.command(command, log, start + stage.budget_s)
                why = "" if stopped or "--resume" not in command else lost(code)
                if not why or turn == RESTARTS:
                    break
                say(f"  {why}: going on in another")
            stage.exit_codes.append(code)
            if stopped:
                break
        else:
            stage.status = "failed" if any(stage.exit_codes) else "done" if stage.commands else "skipped"
        stage.seconds = round(time.monotonic() - start, 1)
        for line in tail(log, 12 if stage.status == "done" else 40) if stage.commands else ():
            print(f"    {line}")
        say(f"{stage.name}: {stage.status} after {stage.seconds} s")

    def command(self, command: list[str], log: Path, deadline: float) -> tuple[int, bool]:
        """Run one command, interrupted before the deadline and ended at it: exit code, whether stopped."""
        left = max(2.0, deadline - time.monotonic())
        grace = min(GRACE, left / 5)
        with log.open("ab") as file:
            file.write(f"\n$ {readable(command)}\n".encode())
            file.flush()
            child = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
                # what a shell starts in its background ignores interruptions, and would pass that on
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
            try:
                return child.wait(left - grace), False
            except subprocess.TimeoutExpired:
                say("  its time is up: stopping it; what it has written is kept")
                child.send_signal(signal.SIGINT)  # to it alone: its workers are its own to end
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(grace)
                return child.returncode or -signal.SIGKILL, True
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # whatever is left of it and its children
                child.wait()

    def write_summary(self, device: str, notes: list[str]) -> None:
        """Replace summary.json."""
        summary = {
            "command": "bash benchmarks/gpu.sh " + " ".join(sys.argv[1:]),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "device": device,
            "seconds": self.seconds,
            "notes": notes,
            "stages": [asdict(stage) for stage in self.stages],
        }
        beside = self.out / "summary.json.tmp"
        beside.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.out / "summary.json")


def lost(code: int) -> str:
    """Why another process may go on where one ended with this code, or nothing."""
    if code == GPU_LOST:
        return "the GPU was lost to that process"
    if code < 0:  # by a signal, which was not ours
        return f"signal {-code} ended that process"
    return ""


def shrink(path: Path, largest: int = LARGEST) -> None:
    """Keep a file small: of a log the beginning and the end; anything else is compressed."""
    if path.suffix == ".tmp" or not path.is_file():
        path.unlink(missing_ok=True)  # left by a writer that was stopped
    elif path.stat().st_size > largest and path.suffix in (".log", ".txt"):
        data = path.read_bytes()
        cut = f"\n\n[... {len(data) - largest} bytes left out ...]\n\n".encode()
        path.write_bytes(data[: largest // 4] + cut + data[len(data) - 3 * largest // 4 + len(cut) :])
    elif path.stat().st_size > largest and path.suffix != ".gz":
        with gzip.open(path.with_name(path.name + ".gz"), "wb") as file:
            file.write(path.read_bytes())
        path.unlink()


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:] if path.exists() else []


def install(wheels: Path, side: Path) -> list[str]:
    """Put each wheel into a side folder, by itself, without its dependencies; return what is to be said."""
    notes = []
    for wheel in sorted(wheels.glob("*.whl")):
        if wheel.name.split("-")[0].lower() in ("torch", "triton"):
            notes.append(f"{wheel.name}: left out, it would replace what is measured")
            continue
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-index", "--find-links", str(wheels), "--no-deps", "--no-compile", "--target", str(side)]
        done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
        error = (done.stderr.strip().splitlines() or ["?"])[-1]
        notes.append(f"{wheel.name}: " + (f"not installed: {error}" if done.returncode else "installed"))
    return notes or [f"{wheels}: no wheels in it"]


def environment(side: Path | None) -> dict[str, str]:
    """Variables of the stages: kernels run on the device, and peers are found."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(p) for p in (side, kept.get("PYTHONPATH")) if p]
    said = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}  # a crash leaves its stack in the log
    return {**kept, **said, "PYTHONPATH": os.pathsep.join(path)}


def device_name() -> str | None:
    """The GPU, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def readable(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return " ".join(command).replace(sys.executable, "python")


def say(text: str) -> None:
    """A line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def plan(its: list[Stage], seconds: float, out: Path, wheels: Path | None) -> None:
    """Print what would run."""
    say(f"dry run: {len(its)} stages in {seconds:g} s, results in {out}")
    if wheels:
        say(f"wheels of {wheels} are installed into a side folder, without dependencies")
    for stage, budget in zip(its, budgets(its, seconds), strict=True):
        note = f" ({stage.note})" if stage.note else ""
        say(f"{stage.name}: {budget:.0f} s, and what earlier stages leave{note}")
        for command in stage.commands:
            print(f"    $ {readable(command)}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry-run", action="store_true", help="print stages, commands and budgets; run nothing"
    )
    parser.add_argument("--seconds", type=float, default=1500.0, help="time for everything")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of results")
    parser.add_argument("--wheels", type=Path, help="folder with peers' wheels")
    parser.add_argument("--relative-to", type=Path, default=Path.cwd(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = (args.relative_to / args.out).resolve()
    wheels = (args.relative_to / args.wheels).resolve() if args.wheels else None
    if args.seconds <= 0:
        parser.error(f"expected --seconds above 0, got {args.seconds:g}")
    if wheels and not wheels.is_dir():
        parser.error(f"expected --wheels to be a folder, got {wheels}")
    its = stages(out)
    if args.dry_run:
        plan(its, args.seconds, out, wheels)
        return 0
    device = device_name()
    if device is None:
        parser.error("expected a GPU that torch can use, got none. `--dry-run` shows what would run on one.")
    out.mkdir(parents=True, exist_ok=True)
    for stage in its:
        (out / stage.log).unlink(missing_ok=True)  # bench.json stays: the bench goes on from it
    # Interruptions must reach the stages even where a shell in the background has switched them off.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the stage in progress is ended
    with tempfile.TemporaryDirectory(prefix="prism-gpu-") as side:
        run = Run(out, its, args.seconds, environment(Path(side) if wheels else None))
        say(f"{device}; {args.seconds:g} s; results in {out}")
        notes = install(wheels, Path(side)) if wheels else []
        for note in notes:
            say(note)
        return run.all(device, notes)


if __name__ == "__main__":
    sys.exit(main())
