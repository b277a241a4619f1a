"""Calls that between them launch every shipped configuration of every kernel: block sizes, warps, dtypes.

Small in tokens and heads, wide where configurations change with width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from prism_kernels._core import configs
from prism_kernels._core.runtime import Launch
from prism_kernels.causal_conv1d.op import causal_conv1d_state_update
from prism_kernels.gated_delta_rule.launch import inner_chunk
from prism_kernels.testing import Case
from prism_kernels.testing.catalogue import gated_delta_rule, gated_delta_rule_step, selective_scan
from prism_kernels.testing.inputs import Draw

BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
UPDATES = ((24, 3, 1), (600, 4, 1), (40, 7, 5))  # channels, length of the state, tokens
WIDTHS = (16, 32, 64, 128, 256)  # of a head in registers: smaller ones are padded to the next


@dataclass(frozen=True)
class Configuration:
    """An op by name, and a call of it."""

    op: str
    name: str
    make: Callable[[], Case]


def configurations() -> Iterator[Configuration]:
    """Every call."""
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for op, name, make in (*_delta(dtype), *_scan(dtype), *_pointwise(dtype)):
            yield Configuration(op, f"{name} {short}", make)


def _delta(dtype: torch.dtype) -> Iterator[tuple]:
    # 16-bit operands take what they are asked for, wider ones at most 32 tokens a chunk
    chunks = {BF16: ((64, True), (64, False), (32, True), (16, False)), FP16: ((64, True), (64, False))}
    draw = partial(gated_delta_rule.draw_case, Draw(0, dtype))
    for K, V in (*((w, w) for w in WIDTHS), (128, 64), (40, 128), (64, 200)):
        for C, unit in chunks.get(dtype, ((64, True), (16, False))):
            name = f"K{K} V{V} C{C}" + " unit keys" * unit
            options = {"chunk_size": C, "use_qk_l2norm_in_kernel": unit}
            yield "chunk_gated_delta_rule", name, partial(draw, name, (1, 70, 2, K, V), **options)
    for K in WIDTHS:  # as many tokens as it takes for sequences to be cut into segments
        name = f"K{K} V{K} few heads"
        yield "chunk_gated_delta_rule", name, partial(draw, name, (1, 2100, 1, K, K), chunk_size=64)
    for K, V in (*((w, w) for w in WIDTHS), (128, 64), (40, 128)):
        name = f"K{K} V{V}"
        yield "fused_recurrent_gated_delta_rule", name, partial(draw, name, (1, 19, 2, K, V))
        step = partial(gated_delta_rule_step.draw_case, Draw(0, dtype), name, (2, 3, 2, K, V))
        yield "gated_delta_rule_step", name, partial(step, groups=2, rows=[3, 0], **gated_delta_rule_step.ALL)


@dataclass(frozen=True)
class RowsOf:
    """Rows of a launch table that go together: those of an architecture for a dtype and a width."""

    architecture: str
    dtype: torch.dtype
    width: int

    def __str__(self) -> str:
        return f"{self.architecture}-{str(self.dtype).removeprefix('torch.')}-{self.width}"

    def case(self) -> Case:
        """A call of two chunks, the second with few tokens."""
        T = inner_chunk(64, self.width, self.width, self.dtype) + 6
        options = {"chunk_size": 64, "use_qk_l2norm_in_kernel": True}
        draw = Draw(0, self.dtype)
        return gated_delta_rule.draw_case(draw, str(self), (1, T, 1, self.width, self.width), **options)


def rows(card: str | None = None) -> Iterator[RowsOf]:
    """Those of every architecture: each set of rows that the maker of `card` has; without a card each set of
    blocks, since warps and stages are nothing to the interpreter.
    """
    table, seen = configs.shipped()["chunk_gated_delta_rule"], set()
    for architecture in sorted({key.architecture for key in table.rows}):
        if card and configs.generation(card)[0] != configs.generation(architecture)[0]:
            continue
        for dtype, width in product((BF16, FP32), WIDTHS):
            with configs.pretend(architecture):
                found = [configs.config(table.op, k, dtype, width, torch.device("cpu")) for k in table.search]
            launched = (dtype, width, *(row if card else row.blocks for row in found))
            if launched not in seen:
                seen.add(launched)
                yield RowsOf(architecture, dtype, width)


def _scan(dtype: torch.dtype) -> Iterator[tuple]:
    for P, N in ((1, 1), (1, 8), (1, 16), (1, 64), (32, 64), (2, 128), (1, 256), (1, 512), (1, 1024)):
        name = f"P{P} N{N}"
        make = partial(selective_scan.draw_case, dtype, name, (1, 67, 4, P, N), full=N <= 64)
        yield "selective_scan", name, make
    for H, P, N in ((16, 1, 16), (2, 32, 64)):  # long enough to be cut in time
        name = f"P{P} N{N} in parts"
        yield "selective_scan", name, partial(selective_scan.draw_case, dtype, name, (1, 800, H, P, N))
    for N in (64, 128):
        name, mamba = (
            f"P64 N{N} mamba",
            {"real": True, "discretization": "euler", "weights": ("token", "token")},
        )
        yield (
            "selective_scan",
            name,
            partial(selective_scan.draw_case, dtype, name, (1, 67, 4, 64, N), **mamba),
        )


def _pointwise(dtype: torch.dtype) -> Iterator[tuple]:
    for D in (3, 24, 40, 200):
        yield "causal_conv1d", f"D{D}", partial(_convolution, dtype, D, state=False)
        yield "causal_conv1d", f"D{D} state", partial(_convolution, dtype, D, state=True)
    for D in (24, 600, 1024, 2048, 4096, 8192, 10_000):
        yield "rms_norm", f"D{D}", partial(_norm, dtype, D)
        yield "swiglu", f"F{D}", partial(_swiglu, dtype, D, packed=False)
        yield "swiglu", f"F{D} packed", partial(_swiglu, dtype, D, packed=True)


def _convolution(dtype: torch.dtype, D: int, state: bool) -> Case:
    draw, W = Draw(0, dtype), 2 + D % 3
    tensors = {"x": draw.normal(2, 67, D), "weight": draw.wide_normal(D, W), "bias": draw.wide_normal(D)}
    if state:
        tensors["initial_state"] = draw.normal(2, D, W - 1)
    return Case("drawn", tensors, {"activation": "silu"})


def _norm(dtype: torch.dtype, D: int) -> Case:
    draw = Draw(0, dtype)
    tensors = {"x": draw.normal(70, D), "weight": 1 + draw.wide_normal(D, scale=0.1)}
    return Case("drawn", {**tensors, "residual": draw.wide_normal(70, D), "gate": draw.normal(70, D)})


def _swiglu(dtype: torch.dtype, F: int, packed: bool) -> Case:
    draw = Draw(0, dtype)
    if packed:
        return Case("drawn", {"gate": draw.normal(7, 2 * F)})
    return Case("drawn", {"gate": draw.normal(7, F), "up": draw.normal(7, F)})


def update(D: int, L: int, T: int, dtype: torch.dtype, device: str, impl: str) -> tuple[Tensor, Tensor]:
    """Output and moved state of the convolution's step; the second row of three has no state."""
    draw, W = Draw(0, dtype), min(4, L)
    state, x, weight, bias = draw.normal(2, D, L), draw.normal(3, D, T), draw.normal(D, W), draw.normal(D)
    state, x, weight, bias = (t.to(device) for t in (state, x, weight, bias))
    rows, lengths = (torch.tensor(t, dtype=torch.int32, device=device) for t in ([1, -1, 0], [5, 0, 2]))
    return causal_conv1d_state_update(x, state, weight, bias, lengths, rows, "silu", impl), state


def configuration_of(launch: Launch) -> tuple:
    """What was chosen for a launch: the kernel, the dtype of its data, blocks, warps and stages."""
    tensors = [a for a in launch.args if isinstance(a, torch.Tensor)]
    dtype = min((t.dtype for t in tensors), key=lambda d: d.itemsize)
    others = ("BIAS", "B_GROUP", "B_HEADS", "B_STRIDE")  # what begins with a B and is no block
    blocks = {
        n: v
        for n, v in launch.constexprs.items()
        if (n.startswith("B") and n not in others) or n in ("C", "SEGMENT", "SEGMENTED")
    }
    return launch.kernel.__name__, str(dtype), *sorted(blocks.items()), *sorted(launch.options.items())
