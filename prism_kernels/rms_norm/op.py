"""Custom ops of the normalisation: fakes and gradients, forward then backward."""

from typing import Any

import torch
from torch import Tensor

from .._core.autograd import first_order_only
from .._core.runtime import accumulate_dtype, without_autocast
from . import torch_impl

NAME = "rms_norm"


@torch.library.custom_op("prism_kernels::rms_norm_fwd", mutates_args=())
def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y like x, x + residual or an empty tensor, rstd r[...,1])."""
    with without_autocast(x.device):
        return torch_impl.forward(x, weight, residual, gate, eps)


@rms_norm_fwd.register_fake
def _(x, weight, residual, gate, eps):
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape), total, x.new_empty(*x.shape[:-1], 1, dtype=accumulate_dtype(x.dtype))


@torch.library.custom_op("prism_kernels::rms_norm_bwd", mutates_args=())
def rms_norm_bwd(
    dy: Tensor,
    dtotal: Tensor,
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, residual and gate (empty where there is none)."""
    with without_autocast(x.device):
        ds, dweight, dgate = torch_impl.backward(dy, dtotal, x, weight, residual, gate, rstd)
        dresidual = x.new_empty(0) if residual is None else ds.to(residual.dtype, copy=True)
        dweight = dweight if weight is None else dweight.to(weight.dtype)
        return ds.to(x.dtype), dweight, dresidual, dgate if gate is None else dgate.to(gate.dtype)


@rms_norm_bwd.register_fake
def _(dy, dtotal, x, weight, residual, gate, rstd):
    empty = rstd.new_empty(0)
    dresidual = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    dweight, dgate = (empty if t is None else t.new_empty(t.shape) for t in (weight, gate))
    return x.new_empty(x.shape), dweight, dresidual, dgate


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4], output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, dy: Tensor, dtotal: Tensor, _: Any) -> tuple:
    x, weight, residual, gate, rstd = ctx.saved_tensors
    grads = rms_norm_bwd(dy, dtotal, x, weight, residual, gate, rstd)
    inputs = (x, weight, residual, gate)
    return *(None if t is None else g for g, t in zip(grads, inputs, strict=True)), None


rms_norm_fwd.register_autograd(_backward, setup_context=_setup_context)
first_order_only(rms_norm_bwd, NAME)
