"""Launchers of the token-by-token kernels. Imports Triton; op.py imports it lazily."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.runtime import launch
from .kernels import recurrent
from .launch import padded

EVERY = 16  # tokens between saved states
PROGRAMS = 1024  # of the backward pass, each with EVERY states of scratch; more than any card runs at once
SUM_ROWS = 16  # rows per program of `sum_kernel`


def constants(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, l2norm: bool) -> dict[str, Any]:
    """What forward and backward take. Two blocks of a state fit the registers of four warps at any width."""
    (H, K), (HV, V) = q.shape[2:], v.shape[2:]
    return {
        "H": H,
        "HV": HV,
        "K": K,
        "V": V,
        "BK": padded(K),
        "BV": min(16 if K > 128 else 32, padded(V)),
        "SCALE": scale,
        "L2": l2norm,
        "PACKED": cu_seqlens is not None,
        "EVERY": EVERY,
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """Fill `saved` unless it is empty; return o and the final state."""
    (B, T, HV, V), K = v.shape, q.shape[3]
    common = constants(q, v, cu_seqlens, scale, l2norm)
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty_like(v) if cu_seqlens is None else torch.zeros_like(v)
    final = g.new_empty(S, HV, K, V)
    launch(
        recurrent.recurrent_kernel,
        (S * HV * triton.cdiv(V, common["BV"]),),
        q, k, v, g, beta, initial_state, cu_seqlens, o, final, saved, T,
        FIRST=initial_state is not None, SAVE=saved.numel() > 0, num_warps=4, num_stages=1, **common,
    )  # fmt: skip
    return o, final


def backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state."""
    (B, T, HV, V), K = v.shape, q.shape[3]
    common = constants(q, v, cu_seqlens, scale, l2norm)
    BK, BV, packed = common["BK"], common["BV"], cu_seqlens is not None
    S, NV = B if cu_seqlens is None else cu_seqlens.shape[0] - 1, triton.cdiv(V, BV)
    units = S * HV * NV
    programs = min(units, PROGRAMS)
    new = g.new_zeros if packed else g.new_empty  # padding has a gradient of 0
    scratch = g.new_empty(programs, EVERY, BK, BV)
    dq, dk = (g.new_empty(NV, B, T, HV, K) for _ in range(2))
    (dg, dbeta), dv = (new(NV, B, T, HV) for _ in range(2)), new(B, T, HV, V, dtype=v.dtype)
    dfirst = g.new_empty(S, HV, K, V)
    launch(
        recurrent.recurrent_backward_kernel,
        (programs,),
        q, k, v, g, beta, do, dfinal, cu_seqlens, saved, scratch,
        dq, dk, dv, dg, dbeta, dfirst, T, B * T, units,
        DFINAL=dfinal is not None, num_warps=4, num_stages=1, **common,
    )  # fmt: skip
    dq, dk = (sum_parts(parts, x, cu_seqlens, common) for parts, x in ((dq, q), (dk, k)))
    return dq, dk, dv, dg.sum(0), dbeta.sum(0), dfirst


def sum_parts(parts: Tensor, x: Tensor, cu_seqlens: Tensor | None, common: dict) -> Tensor:
    """Gradient of `x`, which is q or k, from parts r[NV,B,T,HV,K]."""
    B, T, H, _ = x.shape
    S = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    taken = {n: common[n] for n in ("H", "HV", "K", "BK", "L2", "PACKED", "ACC")}
    dx = torch.empty_like(x)
    launch(
        recurrent.sum_kernel,
        (triton.cdiv(B * T * H, SUM_ROWS),),
        parts, x, cu_seqlens, dx, B * T, S,
        BR=SUM_ROWS, PARTS=parts.shape[0], num_warps=4, num_stages=1, **taken,
    )  # fmt: skip
    return dx
