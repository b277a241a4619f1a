"""Launchers of the kernels, and the table of their constants. Imports Triton; op.py imports it lazily."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.runtime import accumulate_dtype, launch
from .kernels import chunk_backward as chunk_backward_kernels
from .kernels import chunk_forward as chunk_forward_kernels

UNIT_ROWS = 16  # rows per program of `unnormalise_kernel`

# Largest block of values and warps of the state kernels, by padded width of the head; 16-bit operands.
# Blocks of 64 values would spill in the loop where the table says 32 (128 in both, 64 in `states_kernel`).
SCAN = {16: (32, 2), 32: (32, 2), 64: (64, 4), 128: (32, 4)}
STATES = {16: (32, 2), 32: (32, 2), 64: (32, 4), 128: (32, 4)}
PREPARE_WARPS = {16: 1, 32: 1, 64: 2}  # by chunk size


def padded(width: int) -> int:
    """Width of a head in registers."""
    return max(16, triton.next_power_of_2(width))


def inner_chunk(chunk_size: int, K: int, V: int, dtype: torch.dtype) -> int:
    """Chunk used here: heads up to 32 wide and operands of 32 bits or more do best with at most 32."""
    return min(chunk_size, 32 if max(K, V) <= 32 or dtype.itemsize > 2 else 64)


def constants(q: Tensor, v: Tensor, scale: float, l2norm: bool) -> dict:
    """What all kernels of the chunked form take."""
    H, K = q.shape[2:]
    ACC = tl.float64 if q.dtype == torch.float64 else tl.float32
    return {"H": H, "K": K, "SCALE": scale, "L2": l2norm, "PRECISION": "ieee", "ACC": ACC}


def unpacked(residuals: list[Tensor], l2norm: bool) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """N, P, G and (beta, norm of q, norm of k), where norms that do not exist are any tensor. N and P are two
    parts each; in 32 bits and more they are one, given twice."""
    N, P, G, tokens = residuals
    N, P = (x.expand(2, *x.shape[1:]) for x in (N, P))
    return N, P, G, tuple(tokens if l2norm else tokens.expand(3, *tokens.shape[1:]))


def inverse_precision(dtype: torch.dtype, l2norm: bool) -> dict:
    """Products of the inverse: fp16 where keys of length one bound it by 2, else float32 (or wider).

    Triton has tf32x3 for NVIDIA alone; AMD's matrix units multiply float32 as it is.
    """
    if dtype == torch.float64:
        return {"INVERSE": tl.float64, "INVERSE_PRECISION": "ieee"}
    if dtype == torch.float32:
        return {"INVERSE": tl.float32, "INVERSE_PRECISION": "ieee"}
    precision = "ieee" if torch.version.hip else "tf32x3"
    return {"INVERSE": tl.float16 if l2norm else tl.float32, "INVERSE_PRECISION": precision}


def narrower(table: dict[int, tuple[int, int]], K: int, V: int, dtype: torch.dtype) -> dict:
    """Block of values, warps and stages of a state kernel for this head."""
    BV, warps = table[max(padded(K), padded(V))]
    if dtype.itemsize > 2:
        return {"BV": min(32, padded(V)), "num_warps": 4, "num_stages": 1}
    return {"BV": min(BV, padded(V)), "num_warps": warps, "num_stages": 2}


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    residuals: list[Tensor],
    scale: float,
    l2norm: bool,
    C: int,
) -> tuple[Tensor, Tensor]:
    """Fill the residuals (N, P, G, per-token factors); return o and the final state."""
    (B, T, H, K), V = q.shape, v.shape[3]
    N, P, G, (b, norm_q, norm_k) = unpacked(residuals, l2norm)
    steps, common = triton.cdiv(T, C), constants(q, v, scale, l2norm)
    half = min(C, 32)
    launch(
        chunk_forward_kernels.prepare_kernel,
        (steps, B * H),
        q, k, g, beta, *N, *P, G, b, norm_q, norm_k, T,
        BK=padded(K), C=C, HALF=half, LOG_HALF=half.bit_length() - 1,
        num_warps=PREPARE_WARPS[C], num_stages=1,
        **common, **inverse_precision(q.dtype, l2norm),
    )  # fmt: skip
    o, final = torch.empty_like(v), g.new_empty(B, H, K, V)
    blocks = narrower(SCAN, K, V, q.dtype)
    launch(
        chunk_forward_kernels.scan_kernel,
        (triton.cdiv(V, blocks["BV"]), B * H),
        q, k, v, *N, P[0], G, b, norm_q, norm_k, final if initial_state is None else initial_state,
        o, final, T,
        V=V, BK=padded(K), C=C, FIRST=initial_state is not None, **common, **blocks,
    )  # fmt: skip
    return o, final


def chunk_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    residuals: list[Tensor],
    scale: float,
    l2norm: bool,
    C: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state."""
    (B, T, H, K), V = q.shape, v.shape[3]
    N, P, G, (b, norm_q, norm_k) = unpacked(residuals, l2norm)
    steps, common = triton.cdiv(T, C), constants(q, v, scale, l2norm)
    parts = 2 if v.dtype.itemsize == 2 else 1
    E, dR = (v.new_empty(parts, B, H, steps * C, V).expand(2, -1, -1, -1, -1) for _ in range(2))
    S, dS = (v.new_empty(parts, B, H, steps, K, V).expand(2, *[-1] * 5) for _ in range(2))
    dfirst = g.new_empty(B, H, K, V)
    blocks = narrower(STATES, K, V, q.dtype)
    launch(
        chunk_backward_kernels.states_kernel,
        (triton.cdiv(V, blocks["BV"]), B * H, 2),
        q, k, v, do, *N, *P, G, b, norm_q, norm_k,
        dfirst if initial_state is None else initial_state, dfirst if dfinal is None else dfinal,
        *E, *S, *dR, *dS, dfirst, T,
        V=V, BK=padded(K), C=C, FIRST=initial_state is not None, DFINAL=dfinal is not None,
        **common, **blocks,
    )  # fmt: skip
    warps = 8 if padded(V) == 128 and parts == 2 else 4  # four would spill
    of_rows = accumulate_dtype(q.dtype) if l2norm else q.dtype
    dq, dk = (torch.empty_like(q, dtype=of_rows) for _ in range(2))
    dv, dbeta, dg = torch.empty_like(v), g.new_empty(g.shape), g.new_empty(2, *g.shape)
    launch(
        chunk_backward_kernels.inputs_kernel,
        (steps, B * H, 2),
        q, k, do, G, b, norm_q, norm_k, *E, *S, *dR, *dS, dq, dk, dv, dg[0], dg[1], dbeta, T,
        V=V, BK=min(32, padded(K)), BV=padded(V), C=C, num_warps=warps, num_stages=1, **common,
    )  # fmt: skip
    if l2norm:
        dq, dk = unnormalise(q, dq), unnormalise(k, dk)
    return dq, dk, dv, dg.sum(0), dbeta, dfirst


def unnormalise(x: Tensor, dy: Tensor) -> Tensor:
    """Gradient of `x` from that of its rows at length one."""
    R, K, dx = x.numel() // x.shape[-1], x.shape[-1], torch.empty_like(x)
    ACC = tl.float64 if x.dtype == torch.float64 else tl.float32
    launch(
        chunk_backward_kernels.unnormalise_kernel,
        (triton.cdiv(R, UNIT_ROWS),),
        x, dy, dx, R,
        K=K, BK=padded(K), BR=UNIT_ROWS, ACC=ACC,
    )  # fmt: skip
    return dx
