"""Launchers of the kernels of the chunked form. Imports Triton; op.py imports it lazily."""

from math import isqrt
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.configs import check_room, config, is_amd
from .._core.runtime import accumulate_dtype, launch
from .kernels import chunk_backward as chunk_backward_kernels
from .kernels import chunk_forward as chunk_forward_kernels
from .kernels import segments as segments_kernels

OP = "chunk_gated_delta_rule"  # whose table is launch_table.toml

# Sequences are cut into segments where a state kernel has at most PROGRAMS / LEAST programs: see the README.
PROGRAMS = 128  # of them that a large device runs side by side
LEAST = 4  # segments of a sequence, on average
SHORTEST = 8  # chunks of a segment


def padded(width: int) -> int:
    """Width of a head in registers."""
    return max(16, triton.next_power_of_2(width))


def inner_chunk(chunk_size: int, K: int, V: int, dtype: torch.dtype) -> int:
    """Chunk used here: short ones where a block of the state, or products in float32, need the registers."""
    widest = max(padded(K), padded(V))
    if dtype.itemsize > 2:
        return min(chunk_size, 16 if widest > 64 else 32)
    return min(chunk_size, 64 if 32 < widest < 256 else 32)


def row(kernel: str, q: Tensor, v: Tensor) -> dict[str, int]:
    """Blocks, warps and stages of a kernel for these inputs."""
    K, V = padded(q.shape[3]), padded(v.shape[3])
    return config(OP, kernel, q.dtype, max(K, V), q.device).options(BV=V, BJ=K)


def check_card(q: Tensor, v: Tensor) -> None:
    """Raise NotImplementedError, before anything is launched, where the card is too small for the heads."""
    check_room(OP, q.dtype, padded(max(q.shape[3], v.shape[3])), q.device, "K and V")


def segment_length(programs: int, tokens: int, C: int) -> int:
    """Tokens of a segment, or 0 for none, given the programs of a state kernel and the (mean) tokens of a
    sequence: by shapes alone, so that results repeat.
    """
    chunks, segments = triton.cdiv(tokens, C), PROGRAMS // max(1, programs)
    if segments < LEAST or chunks < LEAST * SHORTEST:
        return 0
    return C * max(SHORTEST, isqrt(chunks), triton.cdiv(chunks, segments))


def rows_of_chunks(B: int, T: int, C: int, cu_seqlens: Tensor | None) -> int:
    """Rows R of what is kept per chunk (or segment of C tokens): exact, or for packed sequences the bound of
    `kernels/common.py`.
    """
    return B * triton.cdiv(T, C) if cu_seqlens is None else T // C + cu_seqlens.shape[0] - 1


def residuals(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, l2norm: bool, chunk_size: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of N, P, G and the factors of tokens, which the forward hands to its backward."""
    (B, T, HV, V), K = v.shape, q.shape[3]
    C = inner_chunk(chunk_size, K, V, q.dtype)
    shape = (rows_of_chunks(B, T, C, cu_seqlens), HV, C)
    N = (*shape, C), fixed(q.dtype)
    # Differences of G must be exact to the last bit of what they decay.
    G = torch.float64 if q.dtype.itemsize > 2 else torch.float32
    factors = ((4 if l2norm else 2, *shape), accumulate_dtype(q.dtype))
    return [N, ((*shape, C), q.dtype), (shape, G), factors]


def fixed(dtype: torch.dtype) -> torch.dtype:
    """How rows of fixed point are stored: with operands of 16 bits in as many, else as they are."""
    return torch.int16 if dtype.itemsize == 2 else dtype


def constants(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, l2norm: bool, C: int) -> dict:
    """What all kernels of the chunked form take."""
    (H, K), HV = q.shape[2:], v.shape[2]
    return {
        "H": H,
        "HV": HV,
        "K": K,
        "BK": padded(K),
        "C": C,
        "SCALE": scale,
        "L2": l2norm,
        "PACKED": cu_seqlens is not None,
        "PRECISION": "ieee",
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
    }


def factors(tokens: Tensor) -> tuple[Tensor, ...]:
    """beta, the largest entry in each row of N, and the norms of q and k; those that do not exist are any."""
    return tuple(tokens) if tokens.shape[0] == 4 else (*tokens, *tokens)


def inverse_precision(q: Tensor, l2norm: bool) -> dict:
    """Products of the inverse: fp16 where keys of length one bound it by 2, else float32 (or wider).

    Triton has tf32x3 for NVIDIA alone; AMD's matrix units multiply float32 as it is.
    """
    if q.dtype == torch.float64:
        return {"INVERSE": tl.float64, "INVERSE_PRECISION": "ieee"}
    if q.dtype == torch.float32:
        return {"INVERSE": tl.float32, "INVERSE_PRECISION": "ieee"}
    precision = "ieee" if is_amd(q.device) else "tf32x3"
    return {"INVERSE": tl.float16 if l2norm else tl.float32, "INVERSE_PRECISION": precision}


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: list[Tensor],
    scale: float,
    l2norm: bool,
    checkpoints: Tensor | None = None,
    every: int = 0,
) -> tuple[Tensor, Tensor]:
    """Fill `kept`, see `residuals`, and the checkpoints; return o and the final state."""
    (B, T, HV, V), K = v.shape, q.shape[3]
    N, P, G, tokens = kept
    R, _, C = G.shape
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    common, bounds = constants(q, v, cu_seqlens, scale, l2norm, C), G if cu_seqlens is None else cu_seqlens
    check_card(q, v)
    half = min(C, 32)
    launch(
        chunk_forward_kernels.prepare_kernel,
        (R * HV,),
        q, k, g, beta, bounds, N, P, G, *factors(tokens), T, S,
        HALF=half, LOG_HALF=half.bit_length() - 1,
        **row("prepare_kernel", q, v), **common, **inverse_precision(q, l2norm),
    )  # fmt: skip
    o, final = empty_tokens(v, cu_seqlens), g.new_empty(S, HV, K, V)
    blocks = row("scan_kernel", q, v)
    NV = triton.cdiv(V, blocks["BV"])
    first, rows = initial_state, S
    L = segment_length(S * HV * NV, B * T // S, C)
    if L:
        first, _, rows = between_segments(q, k, v, None, None, initial_state, cu_seqlens, kept, L, common)
    launch(
        chunk_forward_kernels.scan_kernel,
        (rows * HV * NV,),
        q, k, v, N, P, G, *factors(tokens), final if first is None else first, bounds,
        o, final, final if checkpoints is None else checkpoints, T, S, L,
        V=V, FIRST=first is not None, EVERY=every, SEGMENTED=L > 0, **common, **blocks,
    )  # fmt: skip
    return o, final


class Segments(NamedTuple):
    """What cuts the recurrences: the state at the start of each segment, the gradient of that at its end, and
    their number.
    """

    first: Tensor
    dfinal: Tensor
    rows: int


def between_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor | None,
    dfinal: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: list[Tensor],
    L: int,
    common: dict,
    dcheckpoints: Tensor | None = None,
    every: int = 0,
) -> Segments:
    """The state at the start of every segment of L tokens and, given `do`, the gradient at its end."""
    (B, T, HV, V), K = v.shape, q.shape[3]
    N, P, G, tokens = kept
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows, wide = rows_of_chunks(B, T, L, cu_seqlens), accumulate_dtype(q.dtype)
    M, first = (q.new_empty(rows, HV, K, width, dtype=wide) for width in (K, V))
    last = first if do is None else torch.empty_like(first)
    bounds = G if cu_seqlens is None else cu_seqlens
    given = {"FIRST": initial_state is not None, "DFINAL": dfinal is not None, "BACKWARD": do is not None}
    blocks = row("segments_kernel", q, v)
    NV, NK = (triton.cdiv(width, blocks["BV"]) for width in (V, K))
    launch(
        segments_kernels.segments_kernel,
        (rows * HV * (NV + NK + (0 if do is None else NV)),),
        q, k, v, v if do is None else do, N, P, G, *factors(tokens),
        last if dcheckpoints is None else dcheckpoints, bounds, M, first, last, T, S, L,
        V=V, EVERY=every, **common, **blocks, **given,
    )  # fmt: skip
    blocks = row("carry_kernel", q, v)
    launch(
        segments_kernels.carry_kernel,
        (S * HV * triton.cdiv(V, blocks["BV"]) * (1 if do is None else 2),),
        M, first, last, first if initial_state is None else initial_state,
        last if dfinal is None else dfinal, bounds, T, L,
        HV=HV, K=K, V=V, BK=padded(K),
        PACKED=cu_seqlens is not None, **blocks, **given,
    )  # fmt: skip
    return Segments(first, last, rows)


def empty_tokens(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Room for one entry per token, contiguous; zero where padding may follow the last sequence."""
    return like.new_empty(like.shape) if cu_seqlens is None else like.new_zeros(like.shape)


def chunk_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: list[Tensor],
    scale: float,
    l2norm: bool,
    dcheckpoints: Tensor | None = None,
    every: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state."""
    (B, T, HV, V), (H, K) = v.shape, q.shape[2:]
    N, P, G, tokens = kept
    R, _, C = G.shape
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    common, bounds = constants(q, v, cu_seqlens, scale, l2norm, C), G if cu_seqlens is None else cu_seqlens
    blocks = row("states_kernel", q, v)
    NV = triton.cdiv(V, blocks["BV"])
    E, dR = (g.new_empty(R, HV, C, V, dtype=fixed(q.dtype)) for _ in range(2))
    state, dstate = (g.new_empty(R, HV, K, V, dtype=fixed(q.dtype)) for _ in range(2))
    E_top, dR_top = (g.new_empty(R, HV, NV, C) for _ in range(2))
    state_top, dstate_top = (g.new_empty(R, HV, NV, K) for _ in range(2))
    dfirst = g.new_empty(S, HV, K, V)
    first, rows = initial_state, S
    L = segment_length(S * HV * NV * 2, B * T // S, C)
    if L:
        first, dfinal, rows = between_segments(
            q, k, v, do, dfinal, initial_state, cu_seqlens, kept, L, common, dcheckpoints, every
        )
    launch(
        chunk_backward_kernels.states_kernel,
        (rows * HV * NV * 2,),
        q, k, v, do, N, P, G, *factors(tokens),
        dfirst if first is None else first, dfirst if dfinal is None else dfinal,
        dfirst if dcheckpoints is None else dcheckpoints, bounds,
        E, E_top, state, state_top, dR, dR_top, dstate, dstate_top, dfirst, T, S, L,
        V=V, FIRST=first is not None, DFINAL=dfinal is not None, EVERY=every, SEGMENTED=L > 0,
        **common, **blocks,
    )  # fmt: skip
    dq, dk, dv, dbeta = (empty_tokens(x, cu_seqlens) for x in (q, k, v, g))
    dg = empty_tokens(g.expand(2, *g.shape), cu_seqlens)
    b, _, norm_q, norm_k = factors(tokens)
    launch(
        chunk_backward_kernels.inputs_kernel,
        (R * H * 2,),
        q, k, do, G, b, norm_q, norm_k, bounds,
        E, E_top, state, state_top, dR, dR_top, dstate, dstate_top, dq, dk, dv, dg[0], dg[1], dbeta, T, S,
        V=V, BV=blocks["BV"], PTX=not is_amd(q.device), **row("inputs_kernel", q, v), **common,
    )  # fmt: skip
    return dq, dk, dv, dg.sum(0), dbeta, dfirst
