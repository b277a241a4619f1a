"""Helpers of the chunked kernels: where chunks lie, rows, decays, rows of fixed point, the inverse.

Tensors of tokens are [B, T, H, D] as given. What the kernels keep between launches has one row per chunk of
any sequence, [R, HV, ...], padded to whole chunks, so that only tensors of the caller need masks along time.
Padding holds G of the last token and beta 0, and masked loads give it q = k = v = 0: it writes and reads
nothing.

A packed sequence that starts at token t has its chunks from row t // C plus its number on. That never
overlaps the next sequence, needs no table and no sum over sequences, and leaves some rows unused.

Products take q and k as they lie in memory. Where rows are to have length one, their factors multiply rows
and columns of results instead, in ACC: exact, and no operand has to pass through registers.
"""

import triton
import triton.language as tl

from ..._core.chunk_rows import sequence_at, span
from ..._core.tl_math import dot, narrow

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
FIXED_MAX: tl.constexpr = tl.constexpr(32767.0)


@triton.jit
def segment_at(p_bounds, i_x, T, S, L, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of the segment in row `i_x`, how many follow in its sequence, its first row of chunks, its
    sequence, and its number there. No token follows if the row is unused, or its sequence is empty.
    """
    if PACKED:
        i_s = sequence_at(p_bounds, i_x, S, L)
        number = i_x - (tl.load(p_bounds + i_s).to(tl.int64) // L + i_s)
    else:
        segments = tl.cdiv(T, L)
        i_s, number = i_x // segments, i_x % segments
    start, length, row = span(p_bounds, i_s, T, C, PACKED)
    into = number * L
    return start + into, (length - into).to(tl.int32), row + number * (L // C), i_s, number


@triton.jit
def checkpoint_row(p_bounds, i_s, T, EVERY: tl.constexpr, PACKED: tl.constexpr):
    """First row of the checkpoints of a sequence, one for each EVERY tokens that it has whole. A sequence of
    a batch has T // EVERY; a packed one that starts at token t has its own from row t // EVERY on.
    """
    if PACKED:
        return tl.load(p_bounds + i_s).to(tl.int64) // EVERY
    else:
        return i_s * (T // EVERY)


@triton.jit
def checkpoint_at(row, tokens, rest, HV: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr):
    """Whether there is a checkpoint at the end of a chunk, which is `tokens` into its sequence and of which
    `rest` >= C tokens are real; and, from the `row` of the first, how many states lie before it.
    """
    return (tokens % EVERY == 0) & (rest >= C), (row + tokens // EVERY - 1) * HV


@triton.jit
def split(x, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """`x` rounded to DTYPE, and what that leaves out, rounded likewise (any tensor where DTYPE is ACC)."""
    high = narrow(x, DTYPE)
    if DTYPE != ACC:
        return high, narrow(x - high.to(ACC), DTYPE)
    else:
        return high, high


@triton.jit
def dot_parts(a, a_low, b, b_low, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Product of operands of which those with a `low` part (not None) come in two parts."""
    product = dot(a, b, DTYPE, PRECISION, ACC)
    if DTYPE != ACC:
        if a_low is not None:
            product += dot(a_low, b, DTYPE, PRECISION, ACC)
        if b_low is not None:
            product += dot(a, b_low, DTYPE, PRECISION, ACC)
    return product


@triton.jit
def errors_of(
    state, k, v, N, N_low, N_row, gamma, beta,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Error of each token of a chunk that starts from `state`."""
    error = v.to(ACC) - dot(k, state, DTYPE, PRECISION, ACC) * gamma[:, None]
    R = narrow(error * beta[:, None], DTYPE)
    return error + dot_parts(N, N_low, R, None, DTYPE, PRECISION, ACC) * N_row[:, None]


@triton.jit
def written(
    state, k, error, strength, G_end, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """The state at the end of a chunk; `strength` is beta, decayed to there."""
    U, U_low = split(error * strength[:, None], DTYPE, ACC)
    state *= tl.exp2(G_end).to(ACC)
    return state + dot_parts(tl.trans(k), None, U, U_low, DTYPE, PRECISION, ACC)


@triton.jit
def errors_of_back(
    dstate, k, do, N, N_low, N_row, P, tail, beta,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dR of a chunk, given the gradient of the state at its end."""
    held, held_low = split(dstate, DTYPE, ACC)
    dU = dot_parts(k, None, held, held_low, DTYPE, PRECISION, ACC) * tail[:, None]
    dU += dot(tl.trans(P), do, DTYPE, PRECISION, ACC)
    x, x_low = split(dU * (beta * N_row)[:, None], DTYPE, ACC)
    return dU + dot_parts(tl.trans(N), tl.trans(N_low), x, x_low, DTYPE, PRECISION, ACC)


@triton.jit
def written_back(
    dstate, q, k, do, dR, of_q, of_k, G_first, G_end,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the state at the start of a chunk. Factors `of_q` and `of_k` decay from its first token on:
    its share must not vanish in 16 bits under a strong decay before it.
    """
    dstate *= tl.exp2(G_end - G_first).to(ACC)
    dstate += dot(tl.trans(q), do.to(ACC) * of_q[:, None], DTYPE, PRECISION, ACC)
    dstate -= dot(tl.trans(k), dR * of_k[:, None], DTYPE, PRECISION, ACC)
    return dstate * tl.exp2(G_first).to(ACC)


@triton.jit
def largest(x):
    """Largest size in each row; NaN if the row has a NaN or an infinity in it."""
    return tl.max(tl.abs(x), 1) + tl.sum(x - x, 1)


@triton.jit
def store_fixed(p, o, x, top, m, ACC: tl.constexpr):
    """Rows of `x` as 16-bit integers times a step per row, `top` (their `largest`) / 32767. As they are where
    `p` has ACC.
    """
    if p.dtype.element_ty == ACC:
        tl.store(p + o, x, mask=m)
    else:
        inverse = tl.where(top > 1e-30, FIXED_MAX / tl.maximum(top, 1e-30), 0.0)
        tl.store(p + o, tl.floor(x * inverse[:, None] + 0.5).to(tl.int16), mask=m)


@triton.jit
def load_fixed(p, o, top, m, ACC: tl.constexpr):
    """What `store_fixed` stored, in ACC."""
    if m is None:
        x = tl.load(p + o).to(ACC)
    else:
        x = tl.load(p + o, mask=m, other=0).to(ACC)
    if p.dtype.element_ty == ACC:
        return x
    else:
        return x * (top * (1.0 / FIXED_MAX))[:, None]


@triton.jit
def load_square(p, o, top, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """Rows of a square that `store_fixed` stored, as the two bytes of each number, which are exact in any
    DTYPE, and the factor of each row: (high + low) * factor. One part where `p` has ACC.
    """
    n = tl.load(p + o)
    if p.dtype.element_ty == ACC:
        return n, n, tl.full([o.shape[0]], 1.0, ACC)
    else:
        high, low = (n >> 8).to(ACC) * (1.0 / 128), (n & 255).to(ACC) * (1.0 / 32768)
        return narrow(high, DTYPE), narrow(low, DTYPE), top * (32768.0 / FIXED_MAX)


@triton.jit
def load_tokens(p, o_t, o_d, T, H: tl.constexpr, D: tl.constexpr):
    """Rows `o_t` of one head of [.., T, H, D], as [len(o_t), len(o_d)]; zero outside."""
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    return tl.load(p + o_t[:, None] * (H * D) + o_d[None, :], mask=m, other=0.0)


@triton.jit
def load_tokens_across(p, o_t, o_d, T, H: tl.constexpr, D: tl.constexpr):
    """The same as [len(o_d), len(o_t)]."""
    m = (o_d < D)[:, None] & (o_t < T)[None, :]
    return tl.load(p + o_t[None, :] * (H * D) + o_d[:, None], mask=m, other=0.0)


@triton.jit
def load_norm(p, o_t, L2: tl.constexpr, ACC: tl.constexpr):
    """Factors that give rows length one, or ones."""
    if L2:
        return tl.load(p + o_t)
    else:
        return tl.full([o_t.shape[0]], 1.0, ACC)


@triton.jit
def decays(G_to, G_from, m, ACC: tl.constexpr):
    """2 ** (G_to - G_from) where `m`, else 0; the exponent is capped at 0 before the exponential."""
    return tl.where(m, tl.exp2(tl.minimum(G_to - G_from, 0.0)).to(ACC), 0.0)


@triton.jit
def coupling_step(
    N_to, W, N_from, beta_to, beta_from, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """-(I + N_to beta) W (I + beta N_from): what a block of W adds to N between two solved blocks."""
    o = tl.arange(0, C)
    identity = tl.where(o[:, None] == o[None, :], 1.0, 0.0).to(ACC)
    left = dot(identity + N_to * beta_to[None, :], W, DTYPE, PRECISION, ACC)
    return -dot(left, identity + beta_from[:, None] * N_from, DTYPE, PRECISION, ACC)


@triton.jit
def coupling(
    W, beta, C: tl.constexpr, LOG_C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """N = -W (I + diag(beta) W)^-1 of the strictly lower part of W [C, C]: blocks of 1, 2, 4, ... rows."""
    o = tl.arange(0, C)
    i, j = o[:, None], o[None, :]
    N = tl.where((i // 2 == j // 2) & (i > j), -W, 0.0)
    for level in tl.static_range(1, LOG_C):
        corner = (i // (2 << level) == j // (2 << level)) & (i // (1 << level) > j // (1 << level))
        N += coupling_step(N, tl.where(corner, W, 0.0), N, beta, beta, C, DTYPE, PRECISION, ACC)
    return N
