"""Custom ops of the convolution: launchers, fakes and gradients, forward then backward."""

from typing import Any

import torch
from torch import Tensor

from .._core import checks
from .._core.autograd import first_order_only
from .._core.runtime import accumulate_dtype, launch, without_autocast
from . import torch_impl

NAME = "causal_conv1d"
BLOCK_T, BLOCK_D = 32, 64


def _blocks(D: int) -> dict[str, int]:
    return {"BLOCK_T": BLOCK_T, "BLOCK_D": max(16, min(BLOCK_D, 1 << (D - 1).bit_length()))}


def _flags(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str) -> dict:
    import triton.language as tl

    return {
        "WIDTH": weight.shape[1],
        "SILU": activation == "silu",
        "HAS_BIAS": bias is not None,
        "HAS_STATE": state is not None,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        **_blocks(x.shape[2]),
    }


def _launch_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    from .kernels import causal_conv1d_fwd_kernel

    B, T, D = x.shape
    flags = _flags(x, weight, bias, state, activation)
    y = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    weight = weight.contiguous()
    bias, state = (None if t is None else t.contiguous() for t in (bias, state))
    grid = (-(-T // flags["BLOCK_T"]), -(-D // flags["BLOCK_D"]), B)
    launch(causal_conv1d_fwd_kernel, grid, y, x, weight, bias, state, T, D, *x.stride(), **flags)
    final = torch_impl.History(x[:, -weight.shape[1] :], state, weight.shape[1], None).final_state()
    return y, final.transpose(1, 2).to(x.dtype).contiguous()


def _launch_bwd(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels import causal_conv1d_bwd_kernel

    (B, T, D), W, wide = x.shape, weight.shape[1], accumulate_dtype(x.dtype)
    flags = _flags(x, weight, bias, state, activation)
    weight = weight.contiguous()
    bias, state = (None if t is None else t.contiguous() for t in (bias, state))
    grid = (-(-(T + W - 1) // flags["BLOCK_T"]), -(-D // flags["BLOCK_D"]), B)
    dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    parts = torch.empty(grid[0] * B, D, W, dtype=wide, device=x.device)
    bias_parts = torch.empty(grid[0] * B, D, dtype=wide, device=x.device)
    dstate = torch.empty(B, D, W - 1, dtype=wide, device=x.device)
    outputs, inputs = (dx, parts, bias_parts, dstate), (dy, dfinal.contiguous(), x, weight, bias, state)
    launch(causal_conv1d_bwd_kernel, grid, *outputs, *inputs, T, D, *x.stride(), *dy.stride(), **flags)
    return dx, parts.sum(0), bias_parts.sum(0), dstate


@torch.library.custom_op("prism_kernels::causal_conv1d_fwd", mutates_args=())
def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return (y like x, final state r[B or S, D, W-1])."""
    if cu_seqlens is not None and checks.values_are_checked(cu_seqlens):
        checks.check_cu_seqlens_values(NAME, cu_seqlens, x.shape[1])
    with without_autocast(x.device):
        if impl == "triton":
            return _launch_fwd(x, weight, bias, initial_state, activation)
        return torch_impl.forward(x, weight, bias, initial_state, cu_seqlens, activation)


@causal_conv1d_fwd.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, activation, impl):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(rows, x.shape[2], weight.shape[1] - 1)


@torch.library.custom_op("prism_kernels::causal_conv1d_bwd", mutates_args=())
def causal_conv1d_bwd(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and initial state, each in its tensor's dtype."""
    with without_autocast(x.device):
        if impl == "triton":
            grads = _launch_bwd(dy, dfinal, x, weight, bias, initial_state, activation)
        else:
            args = (x, weight, bias, initial_state, cu_seqlens, activation)
            grads = torch_impl.backward(dy, dfinal, *args)
        dx, dweight, dbias, dstate = grads
        dbias = dbias.to((weight if bias is None else bias).dtype)
        dstate = dstate.to((x if initial_state is None else initial_state).dtype)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias, dstate


@causal_conv1d_bwd.register_fake
def _(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, activation, impl):
    dbias = weight.new_empty(weight.shape[0], dtype=(weight if bias is None else bias).dtype)
    dstate = dfinal.new_empty(dfinal.shape, dtype=(x if initial_state is None else initial_state).dtype)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.activation, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple:
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    args = (x, weight, bias, state, cu_seqlens, ctx.activation, ctx.impl)
    dx, dweight, dbias, dstate = causal_conv1d_bwd(dy, dfinal, *args)
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None, None, None


causal_conv1d_fwd.register_autograd(_backward, setup_context=_setup_context)
first_order_only(causal_conv1d_bwd, NAME)
