"""Helpers of all kernels: row loads, decays, the inverse.

Tensors of tokens are [B, T, H, D] as given; what the kernels keep between launches is padded to whole
chunks and laid out per head, [B, H, N * C, ...], so that only tensors of the caller need masks along time.
Padding rows hold G of the last token and beta 0, and masked loads give them q = k = v = 0: they write and
read nothing.

Products take q and k as they lie in memory. Where rows are to have length one, their factors multiply rows
and columns of results instead, in ACC: exact, and no operand has to pass through registers.
"""

import triton
import triton.language as tl

from ..._core.tl_math import dot, narrow

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


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
def store_parts(p, p_low, o, high, low, m, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """Both parts that `split` gave, the second where there is one."""
    tl.store(p + o, high, mask=m)
    if DTYPE != ACC:
        tl.store(p_low + o, low, mask=m)


@triton.jit
def load_parts(p, p_low, o, m, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """What `store_parts` stored."""
    high = tl.load(p + o, mask=m, other=0.0)
    if DTYPE != ACC:
        return high, tl.load(p_low + o, mask=m, other=0.0)
    else:
        return high, high


@triton.jit
def load_sum(p, p_low, o, m, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """The number that `store_parts` stored."""
    high, low = load_parts(p, p_low, o, m, DTYPE, ACC)
    if DTYPE != ACC:
        return high.to(ACC) + low.to(ACC)
    else:
        return high


@triton.jit
def store_square(p, p_low, o, x, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """Split a whole block and store both parts."""
    high, low = split(x, DTYPE, ACC)
    store_parts(p, p_low, o, high, low, None, DTYPE, ACC)


@triton.jit
def load_square(p, p_low, o, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """What `store_square` stored."""
    high = tl.load(p + o)
    if DTYPE != ACC:
        return high, tl.load(p_low + o)
    else:
        return high, high


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
