"""Launcher of the decoding kernel, and its table. Imports Triton; decode_op.py imports it lazily."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.runtime import launch
from .kernels.decode import decode_kernel
from .launch import padded

# Values per program, so that a row of its block is a line of memory in float32. Warps, by padded K: at most
# 64 entries of the state in a thread, so that a multiprocessor has blocks of 128 kB in all on their way.
BLOCK, WARPS = 32, {16: 1, 32: 1, 64: 1, 128: 2, 256: 4}


def step(
    state: Tensor,
    new: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    snapshots: bool,
) -> tuple[Tensor, Tensor]:
    """Write states after the tokens into `new`, which may be `state`; return o and snapshots (or empty)."""
    (B, T, HV, V), (H, K) = v.shape, q.shape[2:]
    if v_first:
        state, new = state.mT, new.mT
    BK, BV = padded(K), min(BLOCK, padded(V))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    A_log, dt_bias, indices = (None if x is None else x.contiguous() for x in (A_log, dt_bias, indices))
    o = v.new_empty(v.shape)
    inner = (V, K) if v_first else (K, V)
    taken = state.new_empty((B, T, HV, *inner) if snapshots else (0,))
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    strides += [s for x in (g, beta) for s in ((0, 0, 0) if x is None else x.stride())]
    launch(
        decode_kernel,
        (B * HV * triton.cdiv(V, BV),),
        state, q, k, v, g, beta, A_log, dt_bias, indices, new, o, taken, T, state.shape[0],
        *state.stride(), *new.stride(), *((1, K) if v_first else (V, 1)), *strides,
        H=H, HV=HV, K=K, V=V, BK=BK, BV=BV, SCALE=scale, L2=l2norm,
        DECAY="none" if g is None else "log" if A_log is None else "raw", HAS_BIAS=dt_bias is not None,
        STRENGTH="none" if beta is None else "raw" if beta_top else "given", TOP=beta_top,
        POOL=indices is not None, SNAPSHOTS=snapshots,
        ACC=tl.float64 if q.dtype == torch.float64 else tl.float32, num_warps=WARPS[BK], num_stages=1,
    )  # fmt: skip
    return o, taken
