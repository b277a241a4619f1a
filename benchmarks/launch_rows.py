"""`python -m benchmarks.launch_rows`: what each row that a launch table may have compiles to, best first.

For architectures without a card at hand: every candidate of the op's `launch_table.toml` is compiled for the
calls of the compile report, and what the worst of them costs is ranked: local-memory instructions in loops,
then in all, then how many values the programs hold that a multiprocessor has room for side by side. Only a
GPU shows the speed of a row; `python -m prism_kernels.tune` measures it there.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from prism_kernels._core import configs
from prism_kernels._core.configs import CLASSES, ROOM, WIDTHS, Config, Key
from prism_kernels._core.runtime import interpreting

from . import compile_report
from .compile_report import Entry, is_cuda

REGISTERS, WARPS = 65_536, 48  # of a multiprocessor; the least number of warps that any here takes
OP = "chunk_gated_delta_rule"
DTYPES = dict(zip(CLASSES, ("bf16", "fp32"), strict=True))


@dataclass(frozen=True)
class Candidate:
    """A row and the entries of the report that it comes to."""

    config: Config
    entries: tuple[Entry, ...]

    def worst(self, what: str) -> int:
        return max(getattr(e, what) for e in self.entries)

    @property
    def failed(self) -> str:
        return next((e.error for e in self.entries if e.error), "")

    def side_by_side(self, target: str) -> int:
        """Programs that a multiprocessor has room for, by registers, warps and shared memory."""
        if not is_cuda(target):
            return min(ROOM[target] * 1024 // max(1, self.worst("smem")), 8 // self.config.warps or 1)
        registers = REGISTERS // (32 * self.config.warps * -(-self.worst("regs") // 8) * 8)
        shared = (ROOM[target] + 1) * 1024 // (self.worst("smem") + 1024)
        return min(registers, shared, WARPS // self.config.warps)

    def rank(self, target: str) -> tuple:
        filled = math.prod(v for n, v in self.config.blocks if n == "BV") * self.side_by_side(target)
        return (
            bool(self.failed),
            self.worst("spill_in_loops"),
            self.worst("spill"),
            -filled,
            self.config.warps,
        )


def calls(key: Key) -> list[tuple[str, Callable[[], object]]]:
    """The cases of the compile report that a row decides."""
    wanted = f"K=V={key.width} "
    return [(n, c) for n, c in compile_report.cases() if f"{n} ".startswith(wanted) and DTYPES[key.kind] in n]


def compiled(key: Key, config: Config) -> Candidate:
    """One row, compiled for all its calls."""
    with configs.pretend(key.architecture, sys.maxsize), configs.trying(OP, {key: config}):
        found = [(n, x) for n, c in calls(key) for x in compile_report.record(c)]
    launches = [(n, x) for n, x in found if x.kernel.__name__ == key.kernel]
    return Candidate(
        config, tuple(compile_report.compile_launch(x, n, key.architecture) for n, x in launches)
    )


def line(c: Candidate, target: str) -> str:
    """What a row compiles to, and the row with its shared memory."""
    row = replace(c.config, shared=math.ceil(c.worst("smem") / 1024))
    cost = f"{c.worst('spill_in_loops'):>5} in loops, {c.worst('spill'):>5} in all"
    return f"  {cost}, {c.worst('regs')} registers, {c.side_by_side(target)} side by side  {row}  {c.failed}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launch_rows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kernels = list(configs.shipped()[OP].search)
    parser.add_argument("--target", nargs="+", default=["sm_90"], help=", ".join(ROOM))
    parser.add_argument("--kernel", nargs="+", default=kernels, choices=kernels)
    parser.add_argument("--dtype", nargs="+", default=list(CLASSES), choices=CLASSES)
    parser.add_argument("--width", nargs="+", type=int, default=list(WIDTHS[1:]), choices=WIDTHS[1:])
    for part in ("BV", "warps", "stages"):
        parser.add_argument(f"--{part}", nargs="+", type=int, help="only these")
    args = parser.parse_args()
    if interpreting():
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled. Unset it.")
    only = {part: values for part in ("BV", "warps", "stages") if (values := getattr(args, part))}
    for kernel, kind, target, width in product(args.kernel, args.dtype, args.target, args.width):
        key = Key(kernel, kind, target, width)
        print(f"[{kernel}.{kind}.{target}] {width}", flush=True)
        found = []
        for config in configs.candidates(OP, key, only):
            found.append(compiled(key, config))
            print(line(found[-1], target), flush=True)
        best = min(found, key=lambda c: c.rank(target), default=None)
        print("best:" + line(best, target) if best else "no candidate", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
