"""Segments of several chunks, for few sequences and heads: what each does to the state; the states between.

A segment takes the state at its start to M S + X, and the gradient at its end to M^T dS + dX, where M, X and
dX do not depend on either: all segments find theirs at once, then a short recurrence over segments finds
every S and dS. X is written where the state at the start of the next segment belongs, dX where the gradient
at the end of the one before does; the recurrence adds to them in place.

Segments have rows as chunks do: sequence s, which starts at token t, has its own from row t // L + s.
"""

import triton
import triton.language as tl

from ..._core.chunk_rows import span
from ..._core.tl_math import dot
from .common import (
    checkpoint_at,
    checkpoint_row,
    errors_of,
    errors_of_back,
    load_norm,
    load_square,
    load_tokens,
    segment_at,
    written,
    written_back,
)

FADED: tl.constexpr = tl.constexpr(-150.0)  # below the smallest float32, as a power of two
FADED_64: tl.constexpr = tl.constexpr(-1075.0)


@triton.jit
def has_faded(p_G, row, steps, HV: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """Whether the decay over `steps` chunks from `row` on is zero in ACC."""
    total, o = tl.zeros([32], p_G.dtype.element_ty), tl.arange(0, 32)
    for first in range(0, steps, 32):
        total += tl.load(p_G + ((row + first + o) * HV * C + C - 1), mask=first + o < steps, other=0.0)
    return tl.sum(total, 0) < (FADED_64 if tl.float64 == ACC else FADED)


@triton.jit(do_not_specialize=["T", "S", "L"])
def segments_kernel(
    p_q, p_k, p_v, p_do, p_N, p_P, p_G, p_b, p_top, p_norm_q, p_norm_k, p_dkept, p_bounds,
    p_M, p_S, p_dS,
    T, S, L,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SCALE: tl.constexpr, L2: tl.constexpr, PACKED: tl.constexpr,
    FIRST: tl.constexpr, DFINAL: tl.constexpr, BACKWARD: tl.constexpr,
    EVERY: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """X and M, a block of columns per program, and in the backward dX, in which are gradients of checkpoints
    unless EVERY is 0. Columns of M are those of a state that starts as the identity and reads no values.
    Grid (rows of segments * HV * (V / BV + K / BV [+ V / BV])).
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NX: tl.constexpr = NV + (K + BV - 1) // BV
    N_ALL: tl.constexpr = NX + NV if BACKWARD else NX
    i_b, i_xh = tl.program_id(0) % N_ALL, (tl.program_id(0) // N_ALL).to(tl.int64)
    i_hv = i_xh % HV
    i_h = i_hv // (HV // H)
    start, rest, row, i_s, number = segment_at(p_bounds, i_xh // HV, T, S, L, C, PACKED)
    first, last, of_M = number == 0, rest <= L, (i_b >= NV) & (i_b < NX)
    # Without a state before the first segment, or a gradient after the last, nobody multiplies by their M.
    idle_M = (first and not FIRST) | (last and not DFINAL)
    if (rest <= 0) | (of_M & idle_M) | ((i_b < NV) & last) | ((i_b >= NX) & first):
        return
    steps = tl.cdiv(tl.minimum(rest, L), C)
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    o_cc = o_c[:, None] * C + o_c[None, :]

    if i_b < NX:
        o_v = tl.where(of_M, i_b - NV, i_b) * BV + tl.arange(0, BV)
        state = tl.where(of_M & (o_k[:, None] == o_v[None, :]), 1.0, 0.0).to(ACC)
        if has_faded(p_G + i_hv * C, row, tl.where(of_M, steps, 0), HV, C, ACC):
            state, steps = tl.zeros([BK, BV], ACC), steps * 0
        for i_c in range(0, steps):
            left = rest - i_c * C
            rows = ((row + i_c) * HV + i_hv) * C
            of_key, of_value = (start + i_c * C) * H + i_h, (start + i_c * C) * HV + i_hv
            k = load_tokens(p_k + of_key * K, o_c, o_k, left, H, K)
            v = load_tokens(p_v + of_value * V, o_c, o_v, tl.where(of_M, 0, left), HV, V)
            N, N_low, N_row = load_square(p_N + rows * C, o_cc, tl.load(p_top + rows + o_c), DTYPE, ACC)
            G = tl.load(p_G + rows + o_c)
            beta = tl.load(p_b + rows + o_c)
            G_end = tl.load(p_G + rows + C - 1)
            norm_k = load_norm(p_norm_k + rows, o_c, L2, ACC)
            gamma, tail = tl.exp2(G).to(ACC) * norm_k, tl.exp2(G_end - G).to(ACC) * norm_k
            error = errors_of(state, k, v, N, N_low, N_row, gamma, beta, DTYPE, PRECISION, ACC)
            state = written(state, k, error, beta * tail, G_end, DTYPE, PRECISION, ACC)
        if of_M:
            o_kk = o_k[:, None] * K + o_v[None, :]
            tl.store(p_M + i_xh * K * K + o_kk, state, mask=(o_k < K)[:, None] & (o_v < K)[None, :])
        else:
            o_kv = o_k[:, None] * V + o_v[None, :]
            tl.store(p_S + (i_xh + HV) * K * V + o_kv, state, mask=(o_k < K)[:, None] & (o_v < V)[None, :])
    elif BACKWARD:
        o_v = (i_b - NX) * BV + tl.arange(0, BV)
        o_kv, m_kv = o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]
        dstate = tl.zeros([BK, BV], ACC)
        if EVERY > 0:
            of_kept = checkpoint_row(p_bounds, i_s, T, EVERY, PACKED)
        for i_back in range(0, steps):
            i_c = steps - 1 - i_back
            left = rest - i_c * C
            rows = ((row + i_c) * HV + i_hv) * C
            of_key, of_value = (start + i_c * C) * H + i_h, (start + i_c * C) * HV + i_hv
            k = load_tokens(p_k + of_key * K, o_c, o_k, left, H, K)
            q = load_tokens(p_q + of_key * K, o_c, o_k, left, H, K)
            do = load_tokens(p_do + of_value * V, o_c, o_v, left, HV, V)
            N, N_low, N_row = load_square(p_N + rows * C, o_cc, tl.load(p_top + rows + o_c), DTYPE, ACC)
            P = tl.load(p_P + rows * C + o_cc)
            G = tl.load(p_G + rows + o_c)
            beta = tl.load(p_b + rows + o_c)
            G_first, G_end = tl.load(p_G + rows), tl.load(p_G + rows + C - 1)
            norm_k = load_norm(p_norm_k + rows, o_c, L2, ACC)
            norm_q = load_norm(p_norm_q + rows, o_c, L2, ACC)
            gamma, tail = tl.exp2(G - G_first).to(ACC), tl.exp2(G_end - G).to(ACC) * norm_k
            if EVERY > 0:
                here, before = checkpoint_at(of_kept, number * L + (i_c + 1) * C, left, HV, C, EVERY)
                if here:
                    p = p_dkept + (before + i_hv) * (K * V) + o_kv
                    dstate += tl.load(p, mask=m_kv, other=0.0).to(ACC)
            dR = errors_of_back(dstate, k, do, N, N_low, N_row, P, tail, beta, DTYPE, PRECISION, ACC)
            of_q, of_k = gamma * norm_q * SCALE, gamma * norm_k * beta
            dstate = written_back(dstate, q, k, do, dR, of_q, of_k, G_first, G_end, DTYPE, PRECISION, ACC)
        tl.store(p_dS + (i_xh - HV) * K * V + o_kv, dstate, mask=m_kv)


@triton.jit
def add_product(
    p_to, p_M, p_from, o_k, o_j, o_v, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Add M times the block of columns `o_v` at `p_from`, or its transpose times it, to that at `p_to`."""
    m_k, m_v = (o_k < K)[:, None], (o_v < V)[None, :]
    p_to += o_k[:, None] * V + o_v[None, :]
    x = tl.load(p_to, mask=m_k & m_v, other=0.0)
    for first in range(0, K, o_j.shape[0]):
        o = first + o_j
        if TRANSPOSED:
            M = tl.trans(
                tl.load(
                    p_M + o[:, None] * K + o_k[None, :], mask=(o < K)[:, None] & (o_k < K)[None, :], other=0.0
                )
            )
        else:
            M = tl.load(p_M + o_k[:, None] * K + o[None, :], mask=m_k & (o < K)[None, :], other=0.0)
        part = tl.load(p_from + o[:, None] * V + o_v[None, :], mask=(o < K)[:, None] & m_v, other=0.0)
        x += dot(M, part, x.dtype, "ieee", x.dtype)
    tl.store(p_to, x, mask=m_k & m_v)
    tl.debug_barrier()  # other threads read it in the next step


@triton.jit(do_not_specialize=["T", "L"])
def carry_kernel(
    p_M, p_S, p_dS, p_first, p_dfinal, p_bounds,
    T, L,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, FIRST: tl.constexpr, DFINAL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The state at the start of every segment and, in the backward, in other programs, the gradient at its
    end, from X and dX in their places. Grid (S * HV * V / BV [* 2]).
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    HALVES: tl.constexpr = 2 if BACKWARD else 1
    half, i_v = tl.program_id(0) % HALVES, tl.program_id(0) // HALVES % NV
    i_sh = (tl.program_id(0) // (HALVES * NV)).to(tl.int64)
    i_s, i_hv = i_sh // HV, i_sh % HV
    _, length, row = span(p_bounds, i_s, T, L, PACKED)
    segments = tl.cdiv(length, L)
    o_k, o_j, o_v = tl.arange(0, BK), tl.arange(0, BJ), i_v * BV + tl.arange(0, BV)
    o_kv, m_kv = o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]
    STEP: tl.constexpr = HV * K * V
    p_M += (row * HV + i_hv) * K * K

    if half == 0:
        p_S += (row * HV + i_hv) * K * V
        state = tl.zeros([BK, BV], p_S.dtype.element_ty)
        if FIRST:
            state += tl.load(p_first + i_sh * K * V + o_kv, mask=m_kv, other=0.0)
        tl.store(p_S + o_kv, state, mask=m_kv)
        tl.debug_barrier()
        for i in range(0 if FIRST else 1, segments - 1):
            add_product(
                p_S + (i + 1) * STEP, p_M + i * (HV * K * K), p_S + i * STEP, o_k, o_j, o_v, K, V, False
            )
    elif BACKWARD:
        p_dS += (row * HV + i_hv) * K * V
        end = tl.maximum(segments, 1) - 1
        dstate = tl.zeros([BK, BV], p_dS.dtype.element_ty)
        if DFINAL:
            dstate += tl.load(p_dfinal + i_sh * K * V + o_kv, mask=m_kv, other=0.0)
        tl.store(p_dS + end * STEP + o_kv, dstate, mask=m_kv)
        tl.debug_barrier()
        for back in range(0 if DFINAL else 1, end):
            i = end - back
            add_product(
                p_dS + (i - 1) * STEP, p_M + i * (HV * K * K), p_dS + i * STEP, o_k, o_j, o_v, K, V, True
            )
