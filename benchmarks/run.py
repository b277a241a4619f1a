"""`python -m benchmarks run`: check, then time, and keep every finished row.

    python -m benchmarks run                                        # this device's shapes, everybody
    python -m benchmarks run --op 'chunk*' --shape B2_T2048_H8_D64 --direction forward
    python -m benchmarks run --op rms_norm --sizes B2_T64_D96       # in the letters of the op's shapes
    python -m benchmarks run --provider torch transformers --out mine.json
    python -m benchmarks run --out mine.json --resume               # after an interruption
    python -m benchmarks run --plugin mine.py                       # a file that calls registry.register(...)

Selections take names and globs. Each provider's outputs and gradients are checked against float64 before it
is timed (`judge.py`); one that is wrong, crashes, runs out of memory or returns NaN is a row that says so,
is not timed, and the run goes on. On a CPU the repeats of all providers of one op, shape, dtype and
direction are interleaved; on a GPU `triton.testing.do_bench` times one after the other. The file is
replaced after every row.

Where others use the same cores, OpenMP's threads wait by spinning for one that does not run, and a call of
many small steps takes up to fifty times as long. Set OMP_WAIT_POLICY=PASSIVE there, or --threads 1.

A provider that ends the whole process (a segmentation fault, an abort, the kernel's out-of-memory killer) is
tried once more by `--resume`; when the process dies again in the same step, its row says so, and the next
`--resume` gets past it (`attempts.py`).

Exits with 0; with 1 if one of our own paths was wrong, failed or returned NaN, or no peer ran under
--require-peer; with 2 on a selection or a file that cannot be used; with 3 if the GPU was lost on the way.
"""

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from prism_kernels.testing.budgets import cotangents, differentiable

from . import attempts, measure
from .attempts import Attempts
from .judge import Judge, judge, limit_of, not_finite
from .progress import Progress
from .ranking import EAGER, INDUCTOR, OURS, REFERENCE, floor_ms
from .registry import Adapter, Provider, Skip, Tensors
from .results import DIRECTIONS, Result, ResultError, Roofline, Row, environment, load
from .selection import Group, Refusal, check_numbers, load_plugin, select

DTYPES = ("float32", "bfloat16", "float16", "float64")
OUT = Path("runs/bench.json")
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


class DeviceLost(Exception):
    """A kernel has broken the GPU's context: nothing more can run in this process."""


@dataclass
class Run:
    """A run on its way."""

    args: argparse.Namespace
    result: Result
    attempts: Attempts
    progress: Progress

    def finish(self, row: Row) -> None:
        """Keep a row, in the file before on the screen.

        Raises:
            DeviceLost: The GPU does not answer any more.
        """
        self.result.rows.append(row)
        self.result.save(self.args.out)
        self.attempts.finished(row.key)
        self.progress.row(row)
        if self.args.device == "cuda" and row.status in ("failed", "not finite", "wrong"):
            check_device(row)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `run`."""
    add = parser.add_argument
    add("--op", nargs="+", default=["*"], metavar="NAME", help="ops, layers and models")
    add("--shape", nargs="+", metavar="NAME", help="shapes; default: those of the device")
    add("--sizes", nargs="+", metavar="SIZES", help="shapes of your own, spelt like the named ones")
    add("--provider", nargs="+", metavar="NAME", help="who computes; default: all but the reference")
    add("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    add("--dtype", nargs="+", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads; default: torch's")
    add("--seconds", type=float, default=6.0, help="time for the samples of one group (CPU) or row (GPU)")
    add("--repeats", type=int, default=50, help="most samples of a row")
    add("--within", type=float, metavar="SECONDS", help="start no group later; --resume measures the rest")
    add("--no-memory", action="store_true", help="leave peak memory out")
    add("--out", type=Path, default=OUT, help=f"result file, default {OUT}")
    add("--resume", action="store_true", help="keep the file's finished rows and measure the rest")
    add("--force", action="store_true", help="resume a file of another commit or device")
    add("--plugin", type=Path, nargs="+", default=[], help="files that register more providers")
    add("--require-peer", action="store_true", help="exit with 1 if no other people's code ran")


def run(args: argparse.Namespace) -> int:
    """Measure what was selected."""
    try:
        for plugin in args.plugin:
            load_plugin(plugin)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise Refusal("run: --device cuda, and torch sees no CUDA device here.")
        check_numbers(args)
        if args.threads:
            torch.set_num_threads(args.threads)
        groups = select(args)
        resumes = args.resume and args.out.exists()
        result = begin(args, groups)
        tried = Attempts(args.out, resumes)
    except (Refusal, ResultError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"run: --out {args.out} cannot be written: {error}", file=sys.stderr)
        return 2
    try:
        with Progress(sum(len(group.providers) for group in groups)) as progress:
            measure_all(Run(args, result, tried, progress), groups)
        raise_ceilings(result, args.device)
        result.save(args.out)
    except DeviceLost as error:
        print(
            f"{error}\nThe GPU is lost to this process; the same command with --resume goes on.",
            file=sys.stderr,
        )
        return 3
    return verdict(groups, result, args.require_peer)


def begin(args: argparse.Namespace, groups: list[Group]) -> Result:
    """A new result, or the one to go on with.

    Raises:
        ResultError: The file to resume, or to write over, is no result of this bench.
        Refusal: It comes from another commit or device.
    """
    from .peers import installed

    here = environment(args.device, installed())
    dtypes = list(dict.fromkeys(group.setting.dtype for group in groups))
    if args.out.exists() and not args.resume:
        try:
            load(args.out)
        except ResultError as error:
            raise ResultError(f"{error} It is not written over: remove it, or name another --out.") from error
    if args.resume and args.out.exists():
        result = load(args.out)
        there = result.environment
        same = ("device_name", "driver", "commit", "dirty", "threads", "torch", "triton")
        names = [n for n in same if getattr(here, n) != getattr(there, n)]
        if names and not args.force:
            what = "; ".join(f"{n} {getattr(there, n)!r}, here {getattr(here, n)!r}" for n in names)
            raise Refusal(f"run: {args.out} comes from elsewhere ({what}). --force goes on with it still.")
        # Who was missing may have come since.
        asked = {group.key(p.name) for group in groups for p in group.providers}
        result.rows = [row for row in result.rows if row.status != "skipped" or row.key not in asked]
        there.peers = here.peers
        if new := [x for x in dtypes if str(x).removeprefix("torch.") not in result.roofline.tflop_s]:
            result.roofline.tflop_s |= measure.roofline(args.device, new).tflop_s
        return result
    result = Result(
        command=f"python -m benchmarks {shlex.join(sys.argv[1:])}",
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=here,
        roofline=measure.roofline(args.device, dtypes),
    )
    result.save(args.out)
    return result


def measure_all(run: Run, groups: list[Group]) -> None:
    """Work through the groups; those on the same inputs share their oracle."""
    within, done = run.args.within, run.result.finished()
    start, left = time.monotonic(), 0
    inputs: tuple[object, Tensors] | None = None
    for group in groups:
        todo = [p for p in group.providers if group.key(p.name) not in done]
        run.progress.skip(len(group.providers) - len(todo))
        if within and time.monotonic() - start > within:
            left += len(todo)
        todo = [] if left else not_given_up(run, group, todo)
        if not todo:
            continue
        what = (group.bench.name, group.setting.shape, group.setting.dtype)
        try:
            if inputs is None or inputs[0] != what:
                inputs = None
                with run.attempts.during(attempts.INPUTS, group.keys(todo)):
                    drawn = group.bench.draw(group.setting)
                    inputs = what, {n: t.to(group.setting.device) for n, t in drawn.items()}
        except Exception as error:
            for provider in todo:
                row = Row(*group.key(provider.name), status="failed")
                run.finish(broken(row, error, "the inputs: "))
            continue
        measure_group(run, group, todo, inputs[1])
    if left:
        print(f"{left} rows not reached within {within:g} s: the same command with --resume goes on.")


def not_given_up(run: Run, group: Group, todo: list[Provider]) -> list[Provider]:
    """Providers to try; the others, during which the process has died, get their rows."""
    tried = []
    for provider in todo:
        if why := run.attempts.given_up(group.key(provider.name)):
            row = new_row(group, provider)
            row.status, row.reason = why
            run.finish(row)
        else:
            tried.append(provider)
    return tried


def measure_group(run: Run, group: Group, todo: list[Provider], tensors: Tensors) -> None:
    """Check every provider, then time those that are right."""
    backward = group.direction != "forward"
    adapters: dict[str, Adapter] = {}
    for provider in todo:
        row, adapter = open_row(run, group, provider)
        if adapter is None:
            run.finish(row)
        else:
            adapters[provider.name] = adapter
    todo = [p for p in todo if p.name in adapters]
    if not todo:
        return
    try:
        with run.attempts.during(attempts.ORACLE, group.keys(todo)):
            held_to = judge(group.bench, group.setting, tensors, backward)
    except Exception as error:  # whatever it is, it is the finding of these rows
        for provider in todo:
            run.finish(broken(new_row(group, provider), error, "the oracle: "))
        return
    right: dict[str, tuple[Row, Callable]] = {}
    for provider in todo:
        row, adapter = new_row(group, provider), adapters[provider.name]
        try:
            with run.attempts.during(attempts.CHECKING, [row.key]):
                check(row, provider, adapter, held_to, tensors)
                if row.status == "ok":
                    right[provider.name] = row, call_of(adapter, tensors, backward)
                    measure.synchronize(
                        run.args.device
                    )  # what goes wrong late is its own, not the next one's
                    continue
        except Exception as error:
            right.pop(provider.name, None)
            row = broken(row, error)
        run.finish(row)
    del held_to
    for row in timed_rows(run, group, right):
        run.finish(row)


def open_row(run: Run, group: Group, provider: Provider) -> tuple[Row, Adapter | None]:
    """A provider's adapter, or the row that says why there is none."""
    row = new_row(group, provider)
    try:
        with run.attempts.during(attempts.OPENING, [row.key]):
            made = provider.factory(group.setting)
            measure.synchronize(run.args.device)
        return row, made if isinstance(made, Adapter) else Adapter(made)
    except Skip as reason:
        row.status, row.reason = "skipped", str(reason) or "its provider does not say why"
    except Exception as error:
        row = broken(row, error)
    return row, None


def new_row(group: Group, provider: Provider) -> Row:
    floor = group.bench.floor_of(group.setting, group.direction)
    row = Row(*group.key(provider.name), status="ok")
    row.floor_bytes, row.floor_flops, row.floor_special = floor.bytes, floor.flops, floor.special
    return row


def broken(row: Row, error: Exception, where: str = "") -> Row:
    """The row of something that was raised."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    memory = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    memory = memory or any(text in str(error).lower() for text in OUT_OF_MEMORY)
    row.status = "out of memory" if memory else "failed"
    row.reason = f"{where}{type(error).__name__}: {message}"[:300]
    row.error_ratio, row.error_in = None, ""
    with contextlib.suppress(RuntimeError):  # a GPU that is lost raises here too
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return row


def check(row: Row, provider: Provider, adapter: Adapter, held_to: Judge, tensors: Tensors) -> None:
    """Compare a provider's results with the oracle's, on inputs of its own."""
    own = {n: t.clone() for n, t in tensors.items()}
    got = held_to.values(adapter, own)
    if written := [n for n, t in tensors.items() if not torch.equal(own[n], t)]:
        row.status, row.reason = "wrong", f"writes to its inputs: {', '.join(written)}"
        return
    if name := not_finite(got):
        row.status, row.reason = "not finite", f"NaN or infinity in {name}"
        return
    row.error_ratio, row.error_in = held_to.worst(got)
    row.reason, limit = adapter.note, limit_of(provider.ours)
    if not row.error_ratio <= limit:
        row.status = "wrong"
        row.reason = (
            f"{row.error_in} is {row.error_ratio:.3g} times as far off as plain PyTorch, limit {limit:g}"
        )


def call_of(adapter: Adapter, tensors: Tensors, backward: bool) -> Callable:
    """What is timed: the provider on its own layout, forward alone or with gradients of all its inputs."""
    with torch.no_grad():
        native = adapter.prepare(tensors)
        if not backward:
            return torch.no_grad()(lambda: adapter.call(native))
        weights = list(cotangents(adapter.call(native)).values())
    native = {n: t.detach().requires_grad_() if differentiable(t) else t for n, t in native.items()}
    leaves = [t for t in native.values() if t.requires_grad]

    def forward_backward() -> None:
        outputs = list(adapter.call(native).values())
        torch.autograd.grad(outputs, leaves, weights, allow_unused=True)

    return forward_backward


def timed_rows(run: Run, group: Group, right: dict[str, tuple[Row, Callable]]) -> Iterable[Row]:
    """Rows with their times: on a CPU all at once, one by one on a GPU and after a death among several."""
    args, tried = run.args, run.attempts
    alone = [n for n in right if args.device == "cuda" or tried.count(attempts.TIMING, group.key(n))]
    together = [n for n in right if n not in alone]
    for names in filter(None, (together, *([n] for n in alone))):
        samples: dict[str, list[float] | Exception] = {}
        try:
            with tried.during(attempts.TIMING, map(group.key, names)):
                samples = samples_of(args, {n: right[n][1] for n in names}, len(names) / len(right))
        except Exception as error:
            samples = dict.fromkeys(names, error)
        for name in names:
            row, call = right[name]
            try:
                if isinstance(taken := samples[name], Exception):
                    raise taken
                fill(row, taken, run.result)
                if not args.no_memory:
                    with tried.during(attempts.TIMING, [row.key]):
                        row.peak_bytes = measure.peak_bytes(call, args.device)
            except Exception as error:
                row = broken(row, error, "while timing: ")
            yield row


def samples_of(
    args: argparse.Namespace, calls: dict[str, Callable], share: float
) -> dict[str, list[float] | Exception]:
    """Samples of each call; on a CPU within their share of the time of the group."""
    if args.device == "cpu":
        return measure.interleaved(calls, args.seconds * share, args.repeats, args.device)
    return {name: measure.on_gpu(call, args.seconds, args.repeats) for name, call in calls.items()}


def fill(row: Row, samples: list[float], result: Result) -> None:
    """Quantiles, rates, and the share of what this machine can do at best."""
    row.ms_p20, row.ms_p50, row.ms_p80 = measure.quantiles(samples)
    row.samples = len(samples)
    row.gb_s = row.floor_bytes / row.ms_p50 / 1e6
    row.tflop_s = row.floor_flops / row.ms_p50 / 1e9
    row.roofline_percent = percent_of(row, result.roofline)


def percent_of(row: Row, roofline: Roofline) -> float | None:
    """The least time that this machine could need, as a percentage of what a row took."""
    floor = floor_ms(row, roofline)
    return 100 * floor / row.ms_p50 if floor and row.ms_p50 else None


def raise_ceilings(result: Result, device: str) -> None:
    """Measure once more what the machine does at best, as others may have used it before; keep the better."""
    roofline, dtypes = result.roofline, [getattr(torch, name) for name in result.roofline.tflop_s]
    again = measure.roofline(device, dtypes)
    roofline.copy_gb_s = max(roofline.copy_gb_s, again.copy_gb_s)
    roofline.tflop_s = {name: max(rate, again.tflop_s[name]) for name, rate in roofline.tflop_s.items()}
    for row in result.rows:
        row.roofline_percent = percent_of(row, roofline)


def check_device(row: Row) -> None:
    """Raise if the GPU does not answer any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(f"after {' '.join(row.key)}: {str(error).splitlines()[0]}") from error


def verdict(groups: list[Group], result: Result, require_peer: bool) -> int:
    """The exit status, and why it is not 0."""
    ours = {group.key(p.name) for group in groups for p in group.providers if p.ours}
    everybody = {group.key(p.name) for group in groups for p in group.providers}
    rows = [row for row in result.rows if row.key in everybody]
    bad = [row for row in rows if row.key in ours and row.status in ("wrong", "not finite", "failed")]
    for row in bad:
        print(f"ours, {row.status}: {' '.join(row.key)}: {row.reason}", file=sys.stderr)
    if require_peer and not any(
        row.status == "ok" and row.provider not in (*OURS, REFERENCE, *EAGER, INDUCTOR) for row in rows
    ):
        print("no peer at all could run: nothing was compared.", file=sys.stderr)
        return 1
    return int(bool(bad))
