"""The error budget: how far from the float64 oracle a path may be.

A path's error is compared with the error that plain PyTorch makes in the same precision, where plain
PyTorch is the op's reference with the operands of its products rounded to that dtype. The budget is

    error(path) <= 2 error(plain) + eps * max|oracle|

for outputs, final states and every gradient, as the largest absolute error and as relative L2.
The `ratio` reported is error / (error(plain) + eps/2 * max|oracle|), so that 2 is the limit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import Case, OpSpec, Outputs

LIMIT = 2.0
LOW = (torch.float16, torch.bfloat16)


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


def budget_rows(spec: OpSpec, case: Case, impl: str) -> list[Row]:
    """Errors of one path on one case, for outputs and gradients, as ratios to plain PyTorch's."""
    data = next(t.dtype for t in case.tensors.values() if t.is_floating_point())
    product_dtype = data if data in LOW else None
    got, got_grads = forward_backward(lambda c: spec.run(c, impl), case)
    weights = cotangents(got)
    oracle, oracle_grads = forward_backward(lambda c: spec.reference(c, None), case.double(), weights)
    plain, plain_grads = forward_backward(lambda c: spec.reference(c, product_dtype), case, weights)
    rows = []
    for kind in ((got, plain, oracle), (got_grads, plain_grads, oracle_grads)):
        for name, g in kind[0].items():
            ratios = _ratios(g, kind[1][name], kind[2][name])
            rows.append(Row(spec.name, case.name, impl, data, name, *ratios))
    return rows


def _ratios(got: Tensor, plain: Tensor, oracle: Tensor) -> tuple[float, float, float]:
    """(max-abs ratio, relative L2 ratio, max-abs error)."""
    eps = torch.finfo(got.dtype).eps
    got, plain, oracle = (torch.view_as_real(t) if t.is_complex() else t for t in (got, plain, oracle))
    oracle = oracle.double().to(got.device)
    if oracle.numel() == 0:
        return 0.0, 0.0, 0.0
    error, allowed = (got.double() - oracle).abs(), (plain.double() - oracle).abs()
    peak, norm = oracle.abs().max().item(), oracle.norm().item()
    slack = torch.finfo(torch.float64).tiny
    max_ratio = error.max().item() / (allowed.max().item() + eps / 2 * peak + slack)
    l2_ratio = error.norm().item() / (allowed.norm().item() + eps / 2 * norm + slack)
    return max_ratio, l2_ratio, error.max().item()
