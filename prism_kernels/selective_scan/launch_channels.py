"""Launchers of the channelwise kernels."""

from typing import Any

import torch
from torch import Tensor

from .._core.configs import is_amd
from .._core.runtime import accumulate_dtype, launch
from .kernels import channels_forward

SEGMENT = 32  # tokens between two stored states
STATES_PER_THREAD = 8
UNROLL = 4  # tokens
MANY_PROGRAMS = 1056  # enough to fill a device: with far fewer, sequences are cut
LEAST_SPLITS, MOST_SPLITS = 3, 16  # cut in two, a sequence would take as long as whole
LEAST_SPAN = 256  # tokens of a part


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    euler: bool,
    accurate: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y, the final state, and the states before every SEGMENT tokens."""
    batch, T, H, P = u.shape
    N, pair = A.shape[1], A.shape[2:]
    wide = accumulate_dtype(u.dtype)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    fresh = torch.empty if cu_seqlens is None else torch.zeros
    y = fresh(u.shape, dtype=u.dtype, device=u.device)
    last = u.new_empty((rows, H, P, N, *pair), dtype=wide)
    kept = u.new_empty(residuals(u, A, cu_seqlens)[0][0] if save else (0,), dtype=wide)
    given = (u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    tensors, numbers, constants, warps = arguments(*given, dt_softplus, reverse, euler, accurate)
    programs, splits, part = cut(rows, -(-H * P // constants["BLOCK_C"]), T, MANY_PROGRAMS)
    ends = totals = None
    if splits > 1:
        ends = u.new_empty((rows, splits, H * P, N, *pair), dtype=wide)
        totals = u.new_empty((rows, splits, H * P), dtype=torch.float64)
        launch(
            channels_forward.scan_forward,
            (programs,),
            *(*tensors, None, totals, None, ends, None, T, part, *numbers),
            num_warps=warps,
            SPLITS=splits,
            **constants,
        )
    if not programs:
        return y, last, [kept]
    launch(
        channels_forward.scan_forward,
        (programs,),
        *(*tensors, ends, totals, y, last, kept if save else None, T, part, *numbers),
        num_warps=warps,
        SPLITS=splits,
        **constants,
    )
    return y, last, [kept]


def arguments(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    euler: bool,
    accurate: bool,
) -> tuple[list[Tensor | None], list[int], dict[str, Any], int]:
    """Input tensors, strides, constants and warps, as every channelwise kernel takes them."""
    T, H, P = u.shape[1:]
    N, real = A.shape[1], A.ndim == 2
    B, C = dense(B, A), dense(C, A)
    by_token = [x.ndim == A.ndim + 2 for x in (B, C)]
    small = [None if x is None else x.contiguous() for x in (D, dt_bias, initial_state)]
    tensors = [u, dt, A.contiguous(), B, C, small[0], z, *small[1:], cu_seqlens]
    z_strides = (0, 0, 0, 0) if z is None else z.stride()
    numbers = [
        *(u.stride(i) for i in (0, 2, 3)),
        *(dt.stride(i) for i in (0, 2)),
        *(z_strides[i] for i in (0, 2, 3)),
    ]
    groups = []
    for x, varies in zip((B, C), by_token, strict=True):
        by_channel = x.ndim == A.ndim + 1
        numbers += [x.stride(0) if varies else 0, x.stride(2) if varies else N * (2 - real)]
        groups.append(H * P // x.shape[2] if varies else 1 if by_channel else P)
    block_n = 1 << (N - 1).bit_length()
    block_c = max(1, 32 * STATES_PER_THREAD // block_n)
    constants: dict[str, Any] = {
        "U_STRIDE": u.stride(1),
        "DT_STRIDE": dt.stride(1),
        "Z_STRIDE": z_strides[1],
        "B_STRIDE": B.stride(1) if by_token[0] else 0,
        "C_STRIDE": C.stride(1) if by_token[1] else 0,
        "B_GROUP": groups[0],
        "C_GROUP": groups[1],
        "D_GROUP": P if D is not None and D.ndim == 1 else 1,
        "CHANNELS": H * P,
        "P": P,
        "N": N,
        "BLOCK_C": block_c,
        "BLOCK_N": block_n,
        "UNROLL": UNROLL if T > 1 else 1,
        "SEGMENT": SEGMENT,
        "REAL": real,
        "EULER": euler,
        "SOFTPLUS": dt_softplus,
        "REVERSE": reverse,
        "FAST": 0 if accurate else 1 if is_amd(u.device) else 2,
    }
    return tensors, numbers, constants, max(1, block_c * block_n // (32 * STATES_PER_THREAD))


def dense(weights: Tensor, A: Tensor) -> Tensor:
    """B or C with the states of a row side by side; a copy where they are not."""
    if weights.ndim < A.ndim + 2 or weights.stride(1) == 0:  # a time stride of 0 stands for static weights
        return weights.contiguous()
    pair = A.ndim - 2
    steps = weights.stride()[3:]
    return weights if steps == ((2, 1) if pair else (1,)) else weights.contiguous()


def cut(sequences: int, blocks: int, T: int, enough: int) -> tuple[int, int, int]:
    """Programs, the parts that every sequence is cut into, and their tokens, by the shape alone.

    Parts are multiples of SEGMENT; where there would be more than `enough` programs, sequences stay whole.
    """
    splits = min(MOST_SPLITS, enough // max(1, sequences * blocks), T // LEAST_SPAN)
    if splits < LEAST_SPLITS:
        return sequences * blocks, 1, T
    part = -(-T // (splits * SEGMENT)) * SEGMENT
    splits = -(-T // part)
    return sequences * blocks * splits, splits, part


def residuals(u: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `forward` keeps: the state before every SEGMENT tokens.

    A packed sequence that starts at token t has its rows from t // SEGMENT plus its number on.
    """
    batch, T, H, P = u.shape
    rows = batch * -(-T // SEGMENT) if cu_seqlens is None else T // SEGMENT + cu_seqlens.shape[0] - 1
    return [((rows, H * P, *A.shape[1:]), accumulate_dtype(u.dtype))]
