"""Pure-PyTorch path with its own backward: saves one number a row, recomputes the rest."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.runtime import accumulate_dtype


def forward(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y like x, the sum x + residual (empty without a residual), and rstd r[...,1]."""
    s = _sum(x, residual)
    rstd = torch.linalg.vector_norm(s, dim=-1, keepdim=True).square_().div_(s.shape[-1]).add_(eps).rsqrt_()
    y = s * rstd
    if weight is not None:
        y *= weight.to(y.dtype)
    if gate is not None:
        y *= F.silu(gate.to(y.dtype))
    total = x.new_empty(0) if residual is None else s.to(residual.dtype, copy=True)
    return y.to(x.dtype).contiguous(), total.contiguous(), rstd.contiguous()


def backward(
    dy: Tensor,
    dtotal: Tensor,
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x + residual, weight and gate (empty where there is none)."""
    unit = _sum(x, residual) * rstd
    dy = dy.to(unit.dtype)
    dgate, dweight = unit.new_empty(0), unit.new_empty(0)
    if gate is not None:
        z = gate.to(unit.dtype)
        sigmoid = torch.sigmoid(z)
        scaled = unit if weight is None else unit * weight.to(unit.dtype)
        dgate = dy * scaled * (sigmoid * (1 + z * (1 - sigmoid)))
        dy = dy * (z * sigmoid)
    along = dy * unit
    if weight is None:
        share = along.sum(-1, keepdim=True)
    else:
        dweight, weight = along.reshape(-1, unit.shape[-1]).sum(0), weight.to(unit.dtype)
        share, dy = (along @ weight)[..., None], dy * weight
    ds = torch.addcmul(dy, unit, share, value=-1 / unit.shape[-1]).mul_(rstd)
    if residual is not None:
        ds += dtotal.to(ds.dtype)
    return ds.contiguous(), dweight, dgate.contiguous()


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    s = x.to(accumulate_dtype(x.dtype))
    return s if residual is None else s + residual.to(s.dtype)
