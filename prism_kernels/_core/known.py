"""Versions and hardware known to go wrong together: what `python -m prism_kernels.doctor` looks up."""

import re
from collections.abc import Callable
from dataclasses import dataclass

LEVELS = ("note", "limit", "broken")  # in rising order; a note concerns others' kernels, or speed


@dataclass(frozen=True)
class Facts:
    """What the table is judged on. A version is None where the thing is not there or would not tell."""

    python: str | None = None
    torch: str | None = None
    triton: str | None = None
    numpy: str | None = None
    einops: str | None = None
    ptxas: str | None = None
    triton_for_torch: str | None = None  # the version that this build of torch requires, if it names one
    capabilities: tuple[tuple[int, int], ...] = ()  # of the NVIDIA GPUs present
    gpus: int = 0  # of any maker
    interpreting: bool = False

    @property
    def hopper(self) -> bool:
        return (9, 0) in self.capabilities


@dataclass(frozen=True)
class Problem:
    """One row: when it holds, why it matters, what to do."""

    name: str
    level: str
    holds: Callable[[Facts], bool]
    reason: str
    remedy: str


def numbers(version: str | None) -> tuple[int, ...]:
    """The leading numbers of a version: (3, 7, 1) of "3.7.1+git"; () of None."""
    found = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(int(n) for n in found.group().split(".")) if found else ()


def within(version: str | None, low: str = "0", below: str | None = None) -> bool:
    """low <= version < below; False where there is no version."""
    given = numbers(version)
    return bool(given) and given >= numbers(low) and (below is None or given < numbers(below))


def problems(facts: Facts) -> list[Problem]:
    """The rows that hold, the worst first."""
    return sorted((p for p in KNOWN if p.holds(facts)), key=lambda p: -LEVELS.index(p.level))


CHECK = "run `python -m prism_kernels.verify --device cuda`; if a row fails, set TRITON_PTXAS_PATH to "
KNOWN = (
    Problem(
        "Python before 3.11",
        "broken",
        lambda f: within(f.python, below="3.11"),
        "the packages use its syntax",
        "install Python 3.11 or later",
    ),
    Problem(
        "torch before 2.7",
        "broken",
        lambda f: within(f.torch, below="2.7"),
        "custom ops and their gradients are registered through its torch.library",
        "pip install 'torch>=2.7'",
    ),
    Problem(
        "numpy before 1.26",
        "limit",
        lambda f: within(f.numpy, below="1.26"),
        "older than anything tested",
        "pip install 'numpy>=1.26'",
    ),
    Problem(
        "a GPU without Triton",
        "broken",
        lambda f: f.gpus > 0 and f.triton is None,
        "CUDA and ROCm tensors take the 'triton' path, which raises without Triton",
        "pip install triton, or pass impl='torch' to every call",
    ),
    Problem(
        "no Triton",
        "limit",
        lambda f: f.gpus == 0 and f.triton is None,
        "only the 'torch' and 'reference' paths are there",
        "pip install triton (Linux), to run or interpret the kernels",
    ),
    Problem(
        "triton before 3.4",
        "limit",
        lambda f: within(f.triton, below="3.4"),
        "older than anything the kernels were compiled with",
        "pip install 'triton>=3.4'",
    ),
    Problem(
        "triton before 3.9 with numpy 2.4 or later, interpreted",
        "limit",
        lambda f: (
            within(f.triton, below="3.9") and within(f.numpy, "2.4") and (f.interpreting or f.gpus == 0)
        ),
        "the interpreter's `range` over a tensor breaks: kernels with loops fail on the CPU, not on a GPU",
        "pip install 'numpy<2.4', or triton 3.9",
    ),
    Problem(
        "another triton than this torch requires",
        "limit",
        lambda f: (
            f.triton_for_torch is not None
            and f.triton is not None
            and numbers(f.triton)[:3] != numbers(f.triton_for_torch)[:3]
        ),
        "torch.compile generates code for the version that its wheel names",
        "pip install the triton that `pip show torch` requires",
    ),
    Problem(
        "the interpreter is on, and there is a GPU",
        "limit",
        lambda f: f.interpreting and f.gpus > 0,
        "TRITON_INTERPRET=1 runs every kernel on the CPU, thousands of times slower",
        "unset TRITON_INTERPRET",
    ),
    Problem(
        "ptxas 12.8 to 13.0 on a GPU",
        "limit",
        lambda f: bool(f.capabilities) and within(f.ptxas, "12.8", "13.1.80"),
        "12.8.93 and 13.0.88 were seen to miscompile a shared-memory write of an mma.sync kernel "
        "(flash-linear-attention #1262: wrong dv); 13.1.80 does not",
        CHECK + "a newer one",
    ),
    Problem(
        "ptxas before 13.3 on Hopper",
        "limit",
        lambda f: f.hopper and within(f.ptxas, below="13.3"),
        "it may corrupt warp-group products whose A operand is in registers (triton #11781)",
        CHECK + "ptxas 13.3 or later, or use triton 3.9, which brings 13.4",
    ),
    Problem(
        "triton 3.4 to 3.7.0 on Hopper",
        "note",
        lambda f: f.hopper and within(f.triton, "3.4", "3.7.1"),
        "`tl.trans` of an accumulator as a 16-bit operand of a product is miscompiled; kernels here avoid "
        "it. flash-linear-attention's gated backward raises there (#640); with its guard lifted it is right "
        "for K = 128 and wrong for K from 33 to 64",
        "to compare with it: triton 3.7.1, or K = 128, gradients checked first",
    ),
    Problem(
        "triton 3.6.0 on Hopper",
        "note",
        lambda f: f.hopper and within(f.triton, "3.6", "3.6.1"),
        "the state kernel of the gated delta rule was reported 30 to 60 % slower than on 3.5 (triton #9757)",
        "compare speeds on one triton only",
    ),
    Problem(
        "flash-linear-attention on Hopper",
        "note",
        lambda f: f.hopper and within(f.triton, "3.4"),
        "its delta-rule backward with chunks of 64 and 4 warps was wrong on Hopper, on triton 3.7.1 too "
        "(flash-linear-attention #984, #988)",
        "check a peer's gradients before timing: `python -m prism_kernels.verify --against fla`",
    ),
)
