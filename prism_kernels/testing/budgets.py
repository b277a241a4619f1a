"""The error budget: how far from the float64 oracle a path may be.

A path's error is compared with the error that plain PyTorch makes in the same precision, where plain
PyTorch is the op's reference with the operands of its products rounded to that dtype. The budget is

    error(path) <= 2 error(plain) + eps * max|oracle|

for outputs, final states and every gradient, as the largest absolute error and as relative L2.
The `ratio` reported is error / (error(plain) + eps/2 * max|oracle|), so that 2 is the limit.

On a small float32 case plain PyTorch may be exact by luck, where another order of the same sums is not. The
fixed cases are known not to be of that kind. Random ones are not, and are allowed ROUNDINGS units in the last
place of float32 more (`Row.ratio_if_random`); a product in TF32 alone would be some thousand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Case, OpSpec, Outputs

LIMIT = 2.0
ROUNDINGS = 8
LOW = (torch.float16, torch.bfloat16)
Evaluate = Callable[[Callable[[Case], Outputs], Case, Outputs | None], tuple[Outputs, Outputs]]


@dataclass(frozen=True)
class Row:
    """One output or gradient of one case: its errors as ratios to plain PyTorch's."""

    op: str
    case: str
    path: str
    dtype: torch.dtype
    tensor: str
    max_ratio: float
    l2_ratio: float
    max_error: float
    relative: tuple[float, float] = (0.0, 0.0)
    plain: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0

    @property
    def ratio_if_random(self) -> float:
        """The ratio by which a randomly drawn case is judged."""
        slack = self.eps / 2 + ROUNDINGS * torch.finfo(torch.float32).eps
        return max(e / (p + slack) for e, p in zip(self.relative, self.plain, strict=True))

    @property
    def ratio(self) -> float:
        return max(self.max_ratio, self.l2_ratio)

    @property
    def ok(self) -> bool:
        return self.ratio <= LIMIT  # False for NaN

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"{self.op} [{self.case}] {self.path} {dtype} {self.tensor}"
        ratios = f"max {self.max_ratio:.2f}, L2 {self.l2_ratio:.2f} times plain PyTorch's"
        return f"{name}: error {self.max_error:.2e}; {ratios} (limit {LIMIT:g})"


def differentiable(tensor: Tensor) -> bool:
    """Whether the contracts differentiate by this input."""
    return tensor.is_floating_point() or tensor.is_complex()


def cotangents(outputs: Outputs, seed: int = 1) -> Outputs:
    """One fixed random weight per output element, in the output's dtype."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, y in outputs.items():
        shape = (*y.shape, 2) if y.is_complex() else y.shape
        w = torch.randn(shape, generator=generator, dtype=torch.float64)
        w = torch.view_as_complex(w) if y.is_complex() else w
        weights[name] = w.to(dtype=y.dtype, device=y.device)
    return weights


def forward_backward(run, case: Case, weights: Outputs | None = None) -> tuple[Outputs, Outputs]:
    """Outputs of `run(case)` and the gradients ("dq", ...) of their sum weighted by `weights`."""
    inputs = {n: t.detach().requires_grad_() if differentiable(t) else t for n, t in case.tensors.items()}
    outputs = run(case.with_tensors(**inputs))
    weights = cotangents(outputs) if weights is None else weights
    weights = {n: w.to(outputs[n].dtype) for n, w in weights.items()}
    leaves = {n: t for n, t in inputs.items() if differentiable(t)}
    grads = torch.autograd.grad(
        list(outputs.values()),
        list(leaves.values()),
        [weights[n] for n in outputs],
        allow_unused=True,
        materialize_grads=True,
    )
    grads = {f"d{n}": g.detach() for n, g in zip(leaves, grads, strict=True)}
    return {n: y.detach() for n, y in outputs.items()}, grads


def forward_only(run, case: Case, weights: Outputs | None = None) -> tuple[Outputs, Outputs]:
    """Outputs of `run(case)`, and no gradients: for code that has no backward."""
    with torch.no_grad():
        return run(case), {}


def definition(
    spec: OpSpec,
    case: Case,
    got: Outputs,
    product_dtype: torch.dtype | None = None,
    evaluate: Evaluate = forward_backward,
) -> tuple[Outputs, Outputs]:
    """Outputs and gradients of the op's reference, for the outputs in `got` and with their weights."""

    def run(c: Case) -> Outputs:
        return {n: y for n, y in spec.reference(c, product_dtype).items() if n in got}

    return evaluate(run, case, cotangents(got))


class Errors(NamedTuple):
    """How far a tensor is from the oracle: largest absolute error, L2 error, and the same of the oracle."""

    largest: float
    l2: float
    peak: float
    norm: float

    @property
    def relative(self) -> tuple[float, float]:
        """(largest, L2) error over the oracle's largest entry and norm."""
        tiny = torch.finfo(torch.float64).tiny
        return self.largest / (self.peak + tiny), self.l2 / (self.norm + tiny)


def errors(got: Tensor, oracle: Tensor) -> Errors:
    """Errors against an oracle of the same shape, in float64; complex entries count as two. NaN stays NaN."""
    got, oracle = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (got, oracle))
    if got.shape != oracle.shape:
        raise ValueError(f"expected a result of shape {tuple(oracle.shape)}, got {tuple(got.shape)}")
    if oracle.numel() == 0:
        return Errors(0.0, 0.0, 0.0, 0.0)
    oracle = oracle.double().to(got.device)
    error = (got.double() - oracle).abs()
    return Errors(error.max().item(), error.norm().item(), oracle.abs().max().item(), oracle.norm().item())


def budget_rows(
    spec: OpSpec,
    case: Case,
    impl: str,
    run: Callable[[Case], Outputs] | None = None,
    evaluate: Evaluate = forward_backward,
) -> list[Row]:
    """Errors of one path on one case, for outputs and gradients, as ratios to plain PyTorch's.

    With `run`, errors of that function, which may give some of the outputs only; `impl` is its label.
    `evaluate` is `forward_only` for code without a backward.
    """
    data = next(t.dtype for t in case.tensors.values() if t.is_floating_point())
    tiny = torch.finfo(torch.float64).tiny
    got, got_grads = evaluate(run or (lambda c: spec.run(c, impl)), case, None)
    oracle, oracle_grads = definition(spec, case.double(), got, None, evaluate)
    plain, plain_grads = definition(spec, case, got, data if data in LOW else None, evaluate)
    rows = []
    for kind in ((got, plain, oracle), (got_grads, plain_grads, oracle_grads)):
        for name, g in kind[0].items():
            eps = torch.finfo(g.dtype).eps
            e, p = errors(g, kind[2][name]), errors(kind[1][name], kind[2][name])
            max_ratio = e.largest / (p.largest + eps / 2 * e.peak + tiny)
            l2_ratio = e.l2 / (p.l2 + eps / 2 * e.norm + tiny)
            found = (max_ratio, l2_ratio, e.largest, e.relative, p.relative, eps)
            rows.append(Row(spec.name, case.name, impl, data, name, *found))
    return rows
