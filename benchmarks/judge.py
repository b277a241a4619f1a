"""Is a result right? Errors against float64, as multiples of the error that plain PyTorch makes.

The rule is that of `prism_kernels/testing/budgets.py`: error / (error of plain PyTorch + eps/2 of the
largest entry), as the largest absolute error and as relative L2, over outputs and every gradient. Plain
PyTorch is the op's definition with the operands of its products rounded to the dtype. Our paths may reach
2. Other people's code may reach 10: keeping whole intermediates in 16 bits (flash-linear-attention,
flash-qla), summing chunk by chunk, or rounding a step size to 16 bits are legitimate choices that cost a
small factor; a wrong sign, mask, scale or gradient costs hundreds.

Most definitions walk token by token and keep every state, which long shapes do not allow. So the oracle of
a whole shape is our PyTorch path in float64, some heads at a time where memory asks for it. It is tied to
the definition on the spot: on a cut (few rows, tokens and heads) both must agree to 1e-9, or nothing is
timed. Plain PyTorch's error comes from the same cut, relative to the size of the oracle there. The largest
error of the whole is the largest of many more entries, so it may be 1 + log10(how many times more) times as
large. Of a layer or a model relative L2 alone counts, and the gradients of all its parameters are one vector,
which is what an optimiser meets.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_kernels.testing.budgets import LIMIT, LOW, cotangents, errors, forward_backward
from prism_kernels.testing.spec import Case

from .registry import Bench, Setting, Tensors

PEER_LIMIT = 10.0
TIE = 1e-9
ROWS, TOKENS, CHANNELS = 2, 128, 64  # of the cut
BLOCK = 2**26  # elements of [B,T,heads,width] that the oracle may take at once

Run = Callable[[Tensors], Tensors]


@dataclass
class Judge:
    """What the results of one bench on one setting are held to.

    Args:
        weights: The fixed cotangent of each output; none where gradients are not asked for.
        oracle: Outputs and gradients in float64.
        allowed: Plain PyTorch's relative errors on the cut, largest and L2.
        entries: Entries of each tensor in the cut.
        eps: Rounding of each tensor in the dtype that it should have.
    """

    bench: Bench
    weights: Tensors | None
    oracle: Tensors
    allowed: dict[str, tuple[float, float]]
    entries: dict[str, int]
    eps: dict[str, float]

    def values(self, run: Run, tensors: Tensors) -> Tensors:
        """What a provider makes of the inputs."""
        return values(self.bench, run, tensors, self.weights)

    def worst(self, got: Tensors) -> tuple[float, str]:
        """The largest ratio, and the output or gradient that has it; infinite for NaN."""
        worst = (0.0, "")
        for name, value in got.items():
            eps = self.eps[name]
            largest, l2 = relative_errors(value, self.oracle[name])
            plain, plain_l2 = self.allowed[name]
            more = 1 + math.log10(value.numel() / self.entries[name])
            ratio = l2 / (plain_l2 + eps / 2)
            if self.bench.kind == "op":
                ratio = max(ratio, largest / (plain * more + eps / 2))
            worst = max(worst, (ratio, name))
        return worst


def judge(bench: Bench, setting: Setting, tensors: Tensors, backward: bool) -> Judge:
    """Compute the oracle of a setting, tie it to the definition, and measure plain PyTorch.

    Raises:
        ArithmeticError: The oracle and the definition disagree in float64.
    """
    fast, exact = bench.oracle(setting), bench.definition(setting, None)
    plain = bench.definition(setting, setting.dtype if setting.dtype in LOW else None)
    weights = cotangents_of(bench, setting) if backward else None
    limits = {"B": ROWS, "T": TOKENS, bench.split: heads_of_cut(setting)} if bench.looped else {}
    part = cut(tensors, bench.axes, limits)
    part_weights = cut(weights, bench.outputs, limits) if weights else None
    oracle = values(bench, fast, double(part), part_weights)
    for name, value in values(bench, exact, double(part), part_weights).items():
        if not max(relative_errors(oracle[name], value)) < TIE:
            raise ArithmeticError(f"the oracle of {bench.name} is not its definition: {name} differs")
    plain_values = values(bench, plain, part, part_weights)
    allowed = {n: relative_errors(y, oracle[n]) for n, y in plain_values.items()}
    entries = {n: y.numel() for n, y in oracle.items()}
    if any(part[n].shape != t.shape for n, t in tensors.items()):
        oracle = by_blocks(bench, setting, fast, double(tensors), weights)
    eps = {n: torch.finfo(y.dtype).eps for n, y in plain_values.items()}
    return Judge(bench, weights, oracle, allowed, entries, eps)


def values(bench: Bench, run: Run, tensors: Tensors, weights: Tensors | None) -> Tensors:
    """Outputs and, with weights, gradients; those of parameters as one vector."""

    def ordered(given: Tensors) -> Tensors:
        outputs = run(given)
        return {name: outputs[name] for name in bench.outputs}

    if weights is None:
        with torch.no_grad():
            return ordered(tensors)
    outputs, grads = forward_backward(lambda case: ordered(case.tensors), Case("", tensors), weights)
    own = {n: g for n, g in grads.items() if "." not in n}
    rest = [g.flatten() for n, g in grads.items() if "." in n]
    return outputs | own | ({"dparameters": torch.cat(rest)} if rest else {})


def cotangents_of(bench: Bench, setting: Setting) -> Tensors:
    """A fixed weight for every entry of the outputs, representable in the dtype of the data."""
    shapes = {
        n: torch.empty([setting.sizes[a] for a in axes], device=setting.device, dtype=setting.dtype)
        for n, axes in bench.outputs.items()
    }
    return cotangents(shapes)


def relative_errors(got: Tensor, oracle: Tensor) -> tuple[float, float]:
    """(largest, L2) error relative to the oracle's largest entry and norm; infinite for NaN."""
    largest, l2 = errors(got, oracle).relative
    return (largest, l2) if largest == largest else (math.inf, math.inf)


def not_finite(tensors: Tensors) -> str:
    """The first tensor with a NaN or an infinity in it, or nothing."""
    return next((n for n, t in tensors.items() if not torch.isfinite(t).all()), "")


def double(tensors: Tensors) -> Tensors:
    """The same values in float64 and complex128."""
    return Case("", tensors).double().tensors


def heads_of_cut(setting: Setting) -> int:
    """Two heads, or as many narrow ones as make `CHANNELS`."""
    width = setting.sizes.get("K", setting.sizes.get("P", 1))
    return max(2, CHANNELS // width)


def cut(tensors: Tensors, axes: dict[str, str], limits: dict[str, int]) -> Tensors:
    """The first rows, tokens and heads."""
    part = {}
    for name, tensor in tensors.items():
        for axis, letter in enumerate(axes.get(name, "")):
            if tensor.shape[axis] > limits.get(letter, tensor.shape[axis]):
                tensor = tensor.narrow(axis, 0, limits[letter])
        part[name] = tensor
    return part


def by_blocks(bench: Bench, setting: Setting, run: Run, tensors: Tensors, weights: Tensors | None) -> Tensors:
    """`values`, some independent heads at a time; of all at once where the bench has no such axis."""
    if not bench.split:
        return values(bench, run, tensors, weights)
    s = setting.sizes
    width = max(s.get(letter, 1) for letter in "KVPNW")
    count = max(1, BLOCK // (s.get("B", 1) * s.get("T", 1) * width))

    def blocks(named: Tensors, axes: dict[str, str]) -> list[Tensors]:
        split = {n: t.split(count, axes[n].index(bench.split)) for n, t in named.items()}
        return [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]

    inputs = blocks(tensors, bench.axes)
    given = blocks(weights, bench.outputs) if weights else [None] * len(inputs)
    parts = [values(bench, run, x, w) for x, w in zip(inputs, given, strict=True)]
    axis = bench.outputs | {f"d{n}": a for n, a in bench.axes.items()}
    return {n: torch.cat([p[n] for p in parts], axis[n].index(bench.split)) for n in parts[0]}


def limit_of(ours: bool) -> float:
    """How many times plain PyTorch's error a provider may make."""
    return LIMIT if ours else PEER_LIMIT
