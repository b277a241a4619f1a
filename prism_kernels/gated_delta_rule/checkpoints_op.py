"""Custom ops of the chunked form with checkpoints: those of op.py with one more result, and its gradient."""

import torch
from torch import Tensor

from .op import (
    Backward,
    chunk_residuals,
    fake_gradients,
    fake_outputs,
    outer_state,
    register_gradients,
    run_chunks,
    run_chunks_back,
)

NAME = "chunk_gated_delta_rule_with_checkpoints"
SHORTEST = 16  # chunk
Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def chunk_of(every: int) -> int:
    """The longest chunk that ends where a checkpoint is; what paths use inside divides it."""
    return 64 if every % 64 == 0 else 32 if every % 32 == 0 else SHORTEST


def shape_of(q: Tensor, v: Tensor, every: int, v_first: bool = False) -> tuple[int, ...]:
    """[B, T // every, HV, K, V], or [..., V, K]."""
    B, T, HV, V = v.shape
    return (B, T // every, HV, *((V, q.shape[3]) if v_first else (q.shape[3], V)))


@torch.library.custom_op(f"prism_kernels::{NAME}_fwd", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    every: int,
    save: bool,
    dtype: torch.dtype,
    impl: str,
) -> Forward:
    """Chunked forward with checkpoints in `dtype`."""
    # Packed sequences leave rows unused.
    new = v.new_empty if cu_seqlens is None else v.new_zeros
    checkpoints = new(shape_of(q, v, every), dtype=dtype)
    given = (q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias)
    how = (scale, l2norm, beta_top, v_first, chunk_of(every), save, impl)
    o, final, *residuals = run_chunks(NAME, *given, *how, checkpoints, every)
    return o, final, outer_state(checkpoints, v_first), *residuals


@forward.register_fake
def _(
    q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias,
    scale, l2norm, beta_top, v_first, every, save, dtype, impl,
):  # fmt: skip
    residuals = chunk_residuals(q, v, cu_seqlens, l2norm, chunk_of(every), impl)
    o, final, *residuals = fake_outputs(q, v, cu_seqlens, v_first, residuals, save)
    return o, final, v.new_empty(shape_of(q, v, every, v_first), dtype=dtype), *residuals


@torch.library.custom_op(f"prism_kernels::{NAME}_bwd", mutates_args=())
def backward(
    do: Tensor,
    dfinal: Tensor | None,
    dcheckpoints: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    residuals: list[Tensor],
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    every: int,
    impl: str,
) -> Backward:
    """Gradients of all that is differentiable."""
    given = (q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias)
    how = (residuals, scale, l2norm, beta_top, v_first, chunk_of(every), impl)
    return run_chunks_back(do, dfinal, dcheckpoints, *given, *how, every)


@backward.register_fake
def _(
    do, dfinal, dcheckpoints, q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias,
    residuals, scale, l2norm, beta_top, v_first, every, impl,
):  # fmt: skip
    return fake_gradients(q, k, v, g, beta, cu_seqlens, A_log, dt_bias, v_first)


register_gradients(NAME, forward, backward, outputs=3, forward_only=2)
