"""Custom ops of the convolution: launchers, fakes and gradients, forward then backward."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._core import checks
from .._core.autograd import first_order_only
from .._core.runtime import accumulate_dtype, launch, without_autocast
from . import torch_impl

NAME = "causal_conv1d"
UPDATE = "causal_conv1d_update"
BLOCK_T, BLOCK_D = 32, 64


def _block_d(D: int) -> int:
    return max(16, min(BLOCK_D, 1 << (D - 1).bit_length()))


def _flags(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> dict:
    import triton.language as tl

    return {
        "WIDTH": weight.shape[1],
        "SILU": activation == "silu",
        "HAS_BIAS": bias is not None,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }


@dataclass(frozen=True)
class Plan:
    """What the forward and backward launches share: inputs, sizes, blocks of rows, constants.

    Rows are the tokens and W - 1 more before each of the S sequences of a batch row, for its initial state.
    """

    inputs: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    row_blocks: int
    grid: tuple[int]
    flags: dict[str, Any]
    states: tuple[int, int, int]

    @staticmethod
    def of(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        seq_idx: Tensor | None,
        activation: str,
    ) -> "Plan":
        (B, T, D), W = x.shape, weight.shape[1]
        S = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = None if state is None else state.mT
        parts = (None if t is None else t.contiguous() for t in (weight, bias, state, cu_seqlens, seq_idx))
        block_d, per_row = _block_d(D), -(-(T + S * (W - 1)) // BLOCK_T)
        flags = _flags(x, weight, bias, activation) | {
            "HAS_STATE": state is not None,
            "PACKED": cu_seqlens is not None,
            "HAS_IDS": seq_idx is not None,
            "CHANNEL_BLOCKS": -(-D // block_d),
            "BLOCK_T": BLOCK_T,
            "BLOCK_D": block_d,
        }
        sizes, row_blocks = (T, D, S, (S - 1).bit_length(), per_row), B * per_row
        grid = (row_blocks * flags["CHANNEL_BLOCKS"],)
        return Plan((x, *parts), sizes, row_blocks, grid, flags, (B * S, W - 1, D))


def _launch_fwd(plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
    from .kernels import causal_conv1d_fwd_kernel

    y, final = x.new_empty(x.shape), x.new_empty(plan.states)
    launch(
        causal_conv1d_fwd_kernel, plan.grid, y, final, *plan.inputs, *plan.sizes, *x.stride(), **plan.flags
    )
    return y, final.mT.contiguous()


def _launch_bwd(
    plan: Plan, dy: Tensor, dfinal: Tensor, x: Tensor, W: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels import causal_conv1d_bwd_kernel

    D, wide, blocks = x.shape[2], accumulate_dtype(x.dtype), plan.row_blocks
    dx = x.new_empty(x.shape)
    parts, bias_parts = x.new_empty(blocks, D, W, dtype=wide), x.new_empty(blocks, D, dtype=wide)
    dstate = x.new_empty(plan.states, dtype=wide)
    tensors = (dx, parts, bias_parts, dstate, dy, dfinal.mT.contiguous(), *plan.inputs)
    strides = (*x.stride(), *dy.stride())
    warps = 8 if plan.flags["HAS_STATE"] else 4  # with 4, the addresses of the state would spill
    launch(
        causal_conv1d_bwd_kernel, plan.grid, *tensors, *plan.sizes, *strides, num_warps=warps, **plan.flags
    )
    return dx, parts.sum(0), bias_parts.sum(0), dstate.mT.contiguous()


def _launch_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    cache_seqlens: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    from .kernels import causal_conv1d_update_kernel

    (B, D, T), L, block_d = x.shape, conv_state.shape[2], _block_d(x.shape[1])
    flags = _flags(x, weight, bias, activation) | {
        "HAS_ROWS": rows is not None,
        "CIRCULAR": cache_seqlens is not None,
        "BLOCK_T": min(16, 1 << (T - 1).bit_length()),
        "BLOCK_L": 1 << (L - 1).bit_length(),
        "BLOCK_D": block_d,
    }
    y = x.new_empty(B, D, T)
    parts = (None if t is None else t.contiguous() for t in (weight, bias, cache_seqlens, rows))
    strides = (*x.stride(), *conv_state.stride())
    grid = (B, -(-D // block_d))
    launch(causal_conv1d_update_kernel, grid, y, conv_state, x, *parts, T, D, L, *strides, **flags)
    return y


@torch.library.custom_op("prism_kernels::causal_conv1d_fwd", mutates_args=())
def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return (y like x, final state r[B or S, D, W-1])."""
    if cu_seqlens is not None and checks.values_are_checked(cu_seqlens):
        checks.check_cu_seqlens_values(NAME, cu_seqlens, x.shape[1])
    args = (x, weight, bias, initial_state, cu_seqlens, seq_idx, activation)
    with without_autocast(x.device):
        return _launch_fwd(Plan.of(*args), x) if impl == "triton" else torch_impl.forward(*args)


@causal_conv1d_fwd.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, seq_idx, activation, impl):
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
    seq_idx: Tensor | None,
    activation: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and initial state, each in its tensor's dtype."""
    args = (x, weight, bias, initial_state, cu_seqlens, seq_idx, activation)
    with without_autocast(x.device):
        if impl == "triton":
            grads = _launch_bwd(Plan.of(*args), dy, dfinal, x, weight.shape[1])
        else:
            grads = torch_impl.backward(dy, dfinal, *args)
        dx, dweight, dbias, dstate = grads
        dbias = dbias.to((weight if bias is None else bias).dtype)
        dstate = dstate.to((x if initial_state is None else initial_state).dtype)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias, dstate


@causal_conv1d_bwd.register_fake
def _(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, seq_idx, activation, impl):
    dbias = weight.new_empty(weight.shape[0], dtype=(weight if bias is None else bias).dtype)
    dstate = dfinal.new_empty(dfinal.shape, dtype=(x if initial_state is None else initial_state).dtype)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.activation, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple:
    _, _, bias, state, _, _ = ctx.saved_tensors
    grads = causal_conv1d_bwd(dy, dfinal, *ctx.saved_tensors, ctx.activation, ctx.impl)
    dx, dweight, dbias, dstate = grads
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, *[None] * 4


causal_conv1d_fwd.register_autograd(_backward, setup_context=_setup_context)
first_order_only(causal_conv1d_bwd, NAME)


@torch.library.custom_op("prism_kernels::causal_conv1d_update", mutates_args={"conv_state"})
def causal_conv1d_state_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    """Return y r[B,D,T] for x r[B,D,T], and move x into conv_state r[rows,D,L]. No gradients."""
    if conv_state_indices is not None and checks.values_are_checked(conv_state_indices):
        _check_rows(conv_state_indices, conv_state.shape[0])
    with without_autocast(x.device):
        update = _launch_update if impl == "triton" else torch_impl.update
        return update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


@causal_conv1d_state_update.register_fake
def _(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, activation, impl):
    return x.new_empty(x.shape)


def _check_rows(rows: Tensor, count: int) -> None:
    """Each row of the state is named once; negative entries are left out."""
    named = rows[rows >= 0]
    if named.numel() and named.max() >= count:
        advice = "Pass -1 for entries of the batch to leave out."
        checks.fail(
            UPDATE, f"`conv_state_indices` below {count}, the rows of `conv_state`", f"{named.max()}", advice
        )
    if named.unique().numel() < named.numel():
        advice = "Two entries of a batch cannot move into the same state."
        checks.fail(UPDATE, "`conv_state_indices` that differ", str(rows.tolist()), advice)
