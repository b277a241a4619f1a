"""`python -m prism_kernels.tune`: find the fastest rows of an op's launch table on this machine's GPU.

    python -m prism_kernels.tune --op chunk_gated_delta_rule --shape 8,4096,16,128,128 --out h100.toml
    PRISM_LAUNCH_TABLE=h100.toml python train.py

Tries every row that the table's search allows, kernel by kernel, at the shape given. Rows that do not
compile, do not fit, or do not keep the error budget against the float64 reference are thrown out before
anything is timed; for the rest, the call in which the kernel runs is timed, forward or backward. Prints
medians and their ratios to the row in use, and writes the fastest rows as a launch table. Ops never time
anything: without the file they launch what ships. Exits with 2 if there is no GPU, and with 1 if no row was
found right.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import chunk_gated_delta_rule
from ._core import configs
from ._core.configs import Config, Key, use_launch_table
from ._core.runtime import watch_launches
from .testing import budgets, registry
from .testing.catalogue.gated_delta_rule import CHUNK, draw_case
from .testing.inputs import Draw
from .testing.spec import Case

__all__ = ["Job", "tune", "use_launch_table"]

Call = Callable[[], object]
Timer = Callable[[Call], float]
Say = Callable[[str], None]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UNIT: dict[str, Any] = {"use_qk_l2norm_in_kernel": True}


@dataclass(frozen=True)
class Job:
    """What to tune.

    Args:
        op: Name of the public function.
        shape: B, T, H, K, V of the calls that are timed.
        dtype: Of q, k and v.
        kernels: The kernels whose rows are sought, in this order; each keeps what was found for those before.
        device: Where to launch.
        spills: Whether rows whose kernels use local memory are timed.
    """

    op: str
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    kernels: tuple[str, ...]
    device: torch.device
    spills: bool = True

    def key(self, kernel: str) -> Key:
        width = next((w for w in configs.WIDTHS if w >= max(self.shape[3:])), configs.WIDTHS[-1])
        return Key(kernel, configs.class_of(self.dtype), configs.card_of(self.device).architecture, width)

    def in_use(self, kernel: str) -> Config:
        return configs.config(self.op, kernel, self.dtype, self.key(kernel).width, self.device)

    def candidates(self, kernel: str) -> list[Config]:
        """The row in use, then all others."""
        first, others = self.in_use(kernel), configs.candidates(self.op, self.key(kernel))
        return [first, *(c for c in others if replace(c, shared=first.shared) != first)]


@dataclass(frozen=True)
class Result:
    """A row, and its median in milliseconds or why it has none."""

    config: Config
    median: float | None
    reason: str = ""


class Refused(Exception):
    """A row that must not be timed, and why."""


def cases(job: Job) -> Iterator[Case]:
    """Small calls with heads of this width; the last has so few heads that it is cut into segments."""
    K, V = job.shape[3:]
    draw, bounds = Draw(0, job.dtype), torch.tensor([0, 37, 37, 100], dtype=torch.int32)
    yield draw_case(draw, "unit keys", (1, 70, 2, K, V), chunk_size=64, **UNIT)
    yield draw_case(draw, "keys as given", (1, 70, 2, K, V), chunk_size=64)
    case = draw_case(
        draw, "packed, in groups", (1, 100, 1, K, V), groups=2, sequences=3, chunk_size=64, **UNIT
    )
    yield case.with_tensors(cu_seqlens=bounds)
    yield draw_case(draw, "few heads", (1, 2100, 1, K, V), chunk_size=64, **UNIT)


def timed(job: Job) -> tuple[Call, Call]:
    """The calls that are timed, forward and backward, at the shape of the job."""
    B, T, H, K, V = job.shape
    options: dict[str, Any] = {"dtype": job.dtype, "device": job.device}
    q, k, v = (torch.randn(B, T, H, n, **options).requires_grad_() for n in (K, K, V))
    rate, beta = (torch.rand(B, T, H, device=job.device).requires_grad_() for _ in range(2))

    def call() -> Tensor:
        return chunk_gated_delta_rule(q, k, v, -rate, beta, **UNIT, impl="triton").o

    def forward() -> object:
        with torch.no_grad():
            return call()

    o = call()
    weights = torch.randn_like(o)
    return forward, lambda: torch.autograd.grad(o, [q, k, v, rate, beta], weights, retain_graph=True)


def check(job: Job, kernel: str, tests: Sequence[Case]) -> Config:
    """The row in use with its shared memory, if it is right in every case.

    Raises:
        Refused: With what is wrong.
    """
    spec = next(s for s in registry() if s.name == job.op)
    with watch_launches() as launched:
        for case in tests:
            try:
                rows = budgets.budget_rows(spec, case, "triton")
            except Exception as error:  # of the compiler or the driver: any means that this row cannot be had
                raise Refused(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}") from error
            if wrong := [row for row in rows if not row.ratio_if_random <= budgets.LIMIT]:
                raise Refused(f"wrong: {wrong[0]}")
    compiled = [found for name, found in launched if name == kernel and found is not None]
    if not job.spills and (spilt := max((c.n_spills for c in compiled), default=0)):
        raise Refused(f"{spilt} spills")
    shared = max((-(-c.metadata.shared // 1024) for c in compiled), default=0)
    return replace(job.in_use(kernel), shared=shared)


def results(job: Job, kernel: str, timer: Timer, say: Say) -> list[Result]:
    """Every candidate of one kernel, the row in use first; none where the shape does not launch it."""
    calls = [call for call in timed(job) if kernel in launched_by(call)]
    if not calls:
        say(f"{kernel} is not launched at this shape")
        return []
    tests = [case.to(str(job.device)) for case in cases(job)]
    tests = [case for case in tests if kernel in launched_by(partial(run, job, case))]
    found, rows = [], job.candidates(kernel)
    for i, config in enumerate(rows):
        with configs.trying(job.op, {job.key(kernel): config}):
            try:
                checked = check(job, kernel, tests)
                result = Result(checked, sum(timer(call) for call in calls))
            except Refused as refused:
                result = Result(config, None, str(refused))
        found.append(result)
        say(f"  [{i + 1}/{len(rows)}] {line(result, found[0])}")
    return found


def run(job: Job, case: Case) -> object:
    """Forward and backward of a case."""
    spec = next(s for s in registry() if s.name == job.op)
    return budgets.forward_backward(lambda c: spec.run(c, "triton"), case)


def launched_by(call: Call) -> set[str]:
    """Names of the kernels of a call."""
    with watch_launches() as launched:
        call()
    return {name for name, _ in launched}


def line(result: Result, first: Result) -> str:
    """A row, its median and the ratio to that of the row in use, or why it has none."""
    if result.median is None:
        return f"{result.config}  {result.reason}"
    ratio = f"{result.median / first.median:6.3f}" if first.median else ""
    return f"{result.config}  {result.median:9.4f} ms {ratio}"


def tune(job: Job, timer: Timer, say: Say = print) -> dict[Key, Config]:
    """The fastest right row of every kernel of the job that has one."""
    best: dict[Key, Config] = {}
    table = [f"{'kernel':<18}{'median, ms':>11}{'to the row in use':>19}  row"]
    for kernel in job.kernels:
        say(f"{kernel}: {len(job.candidates(kernel))} rows")
        with configs.trying(job.op, best):
            found = results(job, kernel, timer, say)
        right = [r for r in found if r.median is not None]
        if right:
            winner = min(right, key=lambda r: r.median or 0.0)
            best[job.key(kernel)] = winner.config
            ratio = f"{(winner.median or 0) / found[0].median:.3f}" if found[0].median else "not right"
            table.append(f"{kernel:<18}{winner.median:>11.4f}{ratio:>19}  {winner.config}")
        elif found:
            table.append(f"{kernel:<18}  NO ROW IS RIGHT")
    say("\n" + "\n".join(table))
    return best


def do_bench(call: Call) -> float:
    """Median in milliseconds."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


def sizes(text: str) -> tuple[int, ...]:
    """B, T, H, K, V of the command line."""
    shape = tuple(map(int, text.split(",")))
    if len(shape) != 5 or min(shape) < 1 or max(shape[3:]) > configs.WIDTHS[-1]:
        raise ValueError
    return shape


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; kernels are all of the op's unless named."""
    parser = argparse.ArgumentParser(
        prog="python -m prism_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", default=CHUNK, choices=list(configs.shipped()))
    parser.add_argument("--shape", type=sizes, required=True, help="B,T,H,K,V of the calls that are timed")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--kernel", nargs="+", help="only these")
    parser.add_argument("--no-spills", action="store_true", help="leave out rows that use local memory")
    parser.add_argument("--out", type=Path, help="write the fastest rows to this file")
    parser.add_argument("--dry-run", action="store_true", help="list the rows that would be tried")
    args = parser.parse_args(arguments)
    known = list(configs.shipped()[args.op].search)
    args.kernel = args.kernel or known
    if unknown := [kernel for kernel in args.kernel if kernel not in known]:
        parser.error(f"argument --kernel: expected {', '.join(known)}, got {', '.join(unknown)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    args, gpu = parsed(arguments), torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    job = Job(args.op, args.shape, DTYPES[args.dtype], tuple(args.kernel), device, not args.no_spills)
    if args.dry_run:
        for kernel in job.kernels:
            print(f"{'.'.join(map(str, job.key(kernel)))}: the row in use, and others")
            print("".join(f"  {config}\n" for config in job.candidates(kernel)), end="")
        return 0
    if not gpu:
        advice = "`--dry-run` lists the rows that would be tried."
        print(f"tune: expected a GPU to time kernels on, found none. {advice}", file=sys.stderr)
        return 2
    best = tune(job, do_bench)
    if args.out and best:
        day, card = time.strftime("%Y-%m-%d", time.gmtime()), torch.cuda.get_device_name(device)
        about = f"Tuned on {card}, B,T,H,K,V = {args.shape}, {args.dtype}, {day}."
        args.out.write_text(configs.dump(job.op, best, about), encoding="utf-8")
        print(f"\nPRISM_LAUNCH_TABLE={args.out} launches with these rows.")
    return 0 if best else 1


if __name__ == "__main__":
    sys.exit(main())
