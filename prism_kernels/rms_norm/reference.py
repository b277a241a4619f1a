"""The definition, differentiable by autograd."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.runtime import accumulate_dtype, without_autocast


def rms_norm_reference(
    x: Tensor,  # r[...,D]
    weight: Tensor | None = None,  # r[D]
    *,
    residual: Tensor | None = None,  # r[...,D]
    gate: Tensor | None = None,  # r[...,D]
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """s = x + residual; y = s / sqrt(mean(s^2) + eps) * weight * silu(gate); returns (y, s)."""
    with without_autocast(x.device):
        wide = accumulate_dtype(x.dtype)
        s = x.to(wide)
        if residual is not None:
            s = s + residual.to(wide)
        y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
        if weight is not None:
            y = y * weight.to(wide)
        if gate is not None:
            y = y * F.silu(gate.to(wide))
        return y.to(x.dtype), None if residual is None else s.to(residual.dtype)
