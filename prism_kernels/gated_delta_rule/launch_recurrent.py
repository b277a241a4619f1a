"""Launchers of the token-by-token kernels. Imports Triton; op.py imports it lazily."""

import torch
import triton
from torch import Tensor

from .._core.runtime import launch
from .kernels import recurrent
from .launch import constants, padded, unnormalise

EVERY = 16  # tokens between saved states


def recurrent_block(V: int) -> int:
    """Values per program, token by token."""
    return min(32, padded(V))


def recurrent_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    checkpoints: Tensor,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """Fill the checkpoints unless empty; return o and the final state."""
    (B, T, H, K), V = q.shape, v.shape[3]
    o, final, BV = torch.empty_like(v), g.new_empty(B, H, K, V), recurrent_block(V)
    common = constants(q, v, scale, l2norm)
    del common["PRECISION"]
    launch(
        recurrent.recurrent_kernel,
        (triton.cdiv(V, BV), B * H),
        q, k, v, g, beta, final if initial_state is None else initial_state, o, final, checkpoints, T,
        V=V, BK=padded(K), BV=BV, FIRST=initial_state is not None, SAVE=checkpoints.numel() > 0, EVERY=EVERY,
        num_warps=4, num_stages=1, **common,
    )  # fmt: skip
    return o, final


def recurrent_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    checkpoints: Tensor,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state."""
    (B, T, H, K), V = q.shape, v.shape[3]
    BK, BV = padded(K), recurrent_block(V)
    NV = triton.cdiv(V, BV)
    scratch = g.new_empty(B * H, NV, EVERY, BK, BV)
    dq, dk = (g.new_empty(NV, B, T, H, K) for _ in range(2))
    dg, dbeta = (g.new_empty(NV, B, T, H) for _ in range(2))
    dv, dfirst = torch.empty_like(v), g.new_empty(B, H, K, V)
    common = constants(q, v, scale, l2norm)
    del common["PRECISION"]
    launch(
        recurrent.recurrent_backward_kernel,
        (NV, B * H),
        q, k, v, g, beta, do, dfirst if dfinal is None else dfinal, checkpoints, scratch,
        dq, dk, dv, dg, dbeta, dfirst, T, B,
        V=V, BK=BK, BV=BV, DFINAL=dfinal is not None, EVERY=EVERY, num_warps=4, num_stages=1, **common,
    )  # fmt: skip
    dq, dk = dq.sum(0), dk.sum(0)
    if l2norm:
        dq, dk = unnormalise(q, dq), unnormalise(k, dk)
    return dq.to(q.dtype), dk.to(k.dtype), dv, dg.sum(0), dbeta.sum(0), dfirst
