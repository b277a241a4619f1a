"""Launcher of the channelwise backward."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.configs import is_amd
from .._core.runtime import accumulate_dtype, launch
from .kernels.channels_adjoint import scan_adjoint
from .kernels.channels_backward import scan_backward
from .kernels.exponential import ACCURATE, MUFU, PORTABLE
from .launch_channels import MANY_PROGRAMS, SEGMENT, STATES_PER_THREAD, UNROLL, cut, dense

PARTS = 2  # in which the accurate walk does them
MOST_WARPS = 8
# By how many natural logs a state may grow again when a fast call walks it back through a segment. Errors of
# rounding grow with it.
MOST_DECAY = 4.0
# Mean |dt A| from which on differences of states shifted by B u / A keep enough digits: u in 16, in 32 bits.
LEAST_ANGLE = (2.0**-10, 2.0**-4)


class Tiling(NamedTuple):
    """How channels and states are divided over programs."""

    block_c: int
    block_n: int
    blocks: int  # of one group
    warps: int


def tiling(channels: int, N: int) -> Tiling:
    """STATES_PER_THREAD states per lane, one warp where N allows; `channels` of one group of heads."""
    block_n = 1 << (N - 1).bit_length()
    block_c = max(1, min(32 * STATES_PER_THREAD // block_n, 1 << (channels - 1).bit_length()))
    warps = min(MOST_WARPS, max(1, block_c * block_n // (32 * STATES_PER_THREAD)))
    return Tiling(block_c, block_n, -(-channels // block_c), warps)


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    residuals: list[Tensor],
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
) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and initial_state; empty where there is no input.

    `residuals` are the states before every segment and the final state.
    """
    (batch, T, H, P), N, wide = u.shape, A.shape[1], accumulate_dtype(u.dtype)
    pair = tuple(A.shape[2:])
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    by_token = [x.ndim == 4 + len(pair) for x in (B, C)]
    groups = [x.shape[2] if token else 1 for x, token in zip((B, C), by_token, strict=True)]
    G = math.lcm(*groups)
    if len({g for g, token in zip(groups, by_token, strict=True) if token}) > 1:
        B, C = (
            x.repeat_interleave(G // g, 2) if token and g < G else x
            for x, g, token in zip((B, C), groups, by_token, strict=True)
        )
    tile = tiling(H * P // G, N)
    fast = not accurate and wide == torch.float32
    programs, splits, part = cut(sequences, G * tile.blocks, T, MANY_PROGRAMS)
    A, B, C, dy = A.contiguous(), dense(B, A), dense(C, A), dy.contiguous()
    dt_bias = None if dt_bias is None else dt_bias.contiguous()
    z_strides = (0, 0, 0, 0) if z is None else z.stride()
    B_strides, C_strides = (weight_strides(x, t, pair) for x, t in zip((B, C), by_token, strict=True))
    common = {
        "DT_STRIDE": dt.stride(1),
        "Z_STRIDE": z_strides[1],
        "C_STRIDE": C_strides[1],
        "H": H,
        "P": P,
        "G": G,
        "N": N,
        "BLOCK_C": tile.block_c,
        "BLOCK_N": tile.block_n,
        "REAL": not pair,
        "EULER": euler,
        "TOKEN_C": by_token[1],
        "SOFTPLUS": dt_softplus,
        "REVERSE": reverse,
        "SPLITS": splits,
        "FAST": (PORTABLE if is_amd(u.device) else MUFU).value if fast else ACCURATE.value,
        "num_warps": tile.warps,
    }
    ends = totals = None
    if splits > 1:
        ends = u.new_empty((sequences, splits, H * P, N, *pair), dtype=wide)
        totals = u.new_empty((sequences, splits, H * P), dtype=torch.float64)
        launch(
            scan_adjoint,
            (programs,),
            *(dy, dt, A, C, z, dt_bias, cu_seqlens, ends, totals, T, part, dt.stride(0), dt.stride(2)),
            *(z_strides[i] for i in (0, 2, 3)),
            *(C_strides[i] for i in (0, 2, 3)),
            UNROLL=UNROLL,
            **common,
        )

    like_u = torch.zeros if cu_seqlens is not None else torch.empty
    du = like_u(u.shape, dtype=u.dtype, device=u.device)
    ddt = like_u(u.shape, dtype=dt.dtype if P == 1 else wide, device=u.device)
    dz = None if z is None else like_u(z.shape, dtype=z.dtype, device=u.device)
    dA = u.new_empty((sequences * splits, H, P, N, *pair), dtype=wide)
    dh0 = u.new_empty((sequences, H, P, N, *pair), dtype=wide)
    dB, dC = (
        like_u((batch, T, G, tile.blocks, N, *pair), dtype=wide, device=u.device)
        if token
        else torch.empty_like(dA)
        for token in by_token
    )
    dD, dbias = (u.new_empty((sequences * splits, H, P), dtype=wide) for _ in range(2))
    planes, halves = 1 + len(pair), min(PARTS if pair else 1, tile.block_n)
    size = tile.block_c * tile.block_n * planes
    kept = (6 * SEGMENT + 3) * tile.block_c + 4 * size + SEGMENT * size // halves
    scratch = u.new_empty(programs * kept, dtype=wide)
    launch(
        scan_backward,
        (programs,),
        *(dy, u, dt, A, B, C, D if D is None else per_channel(D, P), z, dt_bias, cu_seqlens),
        *(*residuals, None if dfinal is None else dfinal.contiguous(), ends, totals),
        *(du, ddt, dz, dA, dB, dC, dD, dbias, dh0, scratch, T, part),
        *(u.stride(i) for i in (0, 2, 3)),
        *(dt.stride(0), dt.stride(2)),
        *(z_strides[i] for i in (0, 2, 3)),
        *(B_strides[i] for i in (0, 2, 3)),
        *(C_strides[i] for i in (0, 2, 3)),
        U_STRIDE=u.stride(1),
        B_STRIDE=B_strides[1],
        SEGMENT=SEGMENT,
        PARTS=halves,
        ROWS=min(SEGMENT, max(8, 128 // tile.block_c)),
        TOKEN_B=by_token[0],
        NVIDIA=not is_amd(u.device),
        SHIFTED=(fast or u.element_size() == 2) and bool(pair) and not euler and not any(by_token),
        MOST_DECAY=MOST_DECAY,
        LEAST_ANGLE=LEAST_ANGLE[u.dtype == torch.float32],
        **common,
    )
    dweights = []
    for d, x, token, g in zip((dB, dC), (B, C), by_token, groups, strict=True):
        if token:
            d = d.sum(3)
            d = d if g == G else d.unflatten(2, (g, G // g)).sum(3)
        else:
            d = d.sum(0) if x.ndim == 3 + len(pair) else d.sum((0, 2))
        dweights.append(d.to(x.dtype))
    return (
        du,
        ddt.view(dt.shape) if P == 1 else ddt.sum(-1).to(dt.dtype),
        dA.sum((0, 2)).to(A.dtype),
        *dweights,
        u.new_empty(0) if D is None else (dD.sum(0) if D.ndim == 2 else dD.sum((0, 2))).to(D.dtype),
        u.new_empty(0) if dz is None else dz,
        u.new_empty(0) if dt_bias is None else dbias.sum((0, 2)).to(dt_bias.dtype),
        u.new_empty(0) if initial_state is None else dh0.to(initial_state.dtype),
    )


def per_channel(D: Tensor, P: int) -> Tensor:
    """D r[H] or r[H,P] as r[H,P]."""
    return D.contiguous() if D.ndim == 2 else D[:, None].expand(-1, P).contiguous()


def weight_strides(x: Tensor, by_token: bool, pair: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Steps of B or C from sequence to sequence, token, group (head, where static) and channel."""
    if by_token:
        return x.stride(0), x.stride(1), x.stride(2), 0
    return 0, 0, x.stride(0), x.stride(1) if x.ndim == 3 + len(pair) else 0
