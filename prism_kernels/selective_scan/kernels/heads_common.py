"""Helpers of the per-head kernels: poles, exponentials of cumulated times, operands of the products.

Numbers are tuples of planes (numbers.py). A phase or an exponent is a time S times a rate w. Both come in two
parts of which the first has 12 bits, so that the product of the first parts is exact, and what remains after
whole turns or octaves is right to rounding while there are fewer than about 2 ** 11 of them.
"""

import triton
import triton.language as tl

from ..._core.tl_math import dot, narrow
from .exponential import ACCURATE, LOG2E, TURN, decay, pole, reciprocal, sin_cos
from .numbers import (
    as_column,
    as_row,
    load_number,
    plus,
    product,
    product_conj,
    real_product_conj,
    scaled,
    zero_like,
)
from .streams import step_size

LONGEST: tl.constexpr = tl.constexpr(1e28)  # stands for any longer time: times rates must not overflow
STIFF: tl.constexpr = tl.constexpr(40.0)  # octaves by which states of a chunk may decay apart


@triton.jit
def single(time):
    """A time >= 0 as float32; rounding of differences must not make it negative."""
    return tl.minimum(tl.maximum(time.to(tl.float32), 0.0), LONGEST)


@triton.jit
def parts(x):
    """float64 as the sum of two float32, the first of 12 bits."""
    x = tl.minimum(x, LONGEST)
    high = (x.to(tl.float32).to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def cycles(S, w):
    """S w as a whole number and a rest of about -0.5 to 0.5; of -1 to 1 beyond 2 ** 24 cycles."""
    lead, low = S[0] * w[0], S[0] * w[1] + S[1] * (w[0] + w[1])
    whole = tl.floor(lead + low + 0.5)
    return whole, tl.minimum(tl.maximum((lead - whole) + low, -1.0), 1.0)


@triton.jit
def decays(S, w):
    """2 ** (S w) for S w <= 0, and its inverse; that stays finite, and is right up to 2 ** STIFF."""
    whole, rest = cycles(S, w)
    risen = tl.exp2(tl.minimum(-whole, STIFF + 2.0)) * tl.exp2(-rest)
    return tl.exp2(tl.maximum(whole, -126.0)) * tl.exp2(rest), risen


@triton.jit
def turn(S, turns, REAL: tl.constexpr):
    """exp(pi i S turns); for real poles a dummy, which `turned` and `unturned` leave alone."""
    if REAL:
        return (turns[0],)
    else:
        whole, rest = cycles(S, turns)
        more = tl.floor(rest + 0.5)
        whole, rest = whole + more, rest - more
        sin, cos = sin_cos(rest * (0.5 * TURN))
        sign = 1.0 - 2.0 * (whole - 2.0 * tl.floor(whole * 0.5))
        return sign * cos, sign * sin


@triton.jit
def turned(x, by):
    """x times a `turn`."""
    if len(x) == 1:
        return x
    else:
        return product(x, by)


@triton.jit
def unturned(x, by):
    """x over a `turn`."""
    if len(x) == 1:
        return x
    else:
        return product_conj(x, by)


@triton.jit
def slowest(p_A, i_h, N: tl.constexpr, BN: tl.constexpr, REAL: tl.constexpr):
    """The largest Re A of a head, and how far the smallest is below it, in octaves."""
    PLANES: tl.constexpr = 1 if REAL else 2
    o_n = tl.arange(0, BN)
    rate = tl.load(p_A + (i_h * N + o_n) * PLANES, mask=o_n < N, other=float("nan")).to(tl.float32) * LOG2E
    slow = tl.max(tl.where(o_n < N, rate, float("-inf")), 0)
    return slow, slow - tl.min(tl.where(o_n < N, rate, float("inf")), 0)


@triton.jit
def poles(p_A, i_h, slow, o_n, N: tl.constexpr, REAL: tl.constexpr):
    """The `pole` A of some states; of each what it decays faster than `slow`, in octaves, and its frequency
    in half turns, both in two parts; and 1 / A.
    """
    m_n = o_n < N
    A = load_number(p_A + (i_h * N + o_n) * (1 if REAL else 2), m_n, tl.float32, REAL)
    # Of equal poles none decays faster, not even by a rounding; and none slower.
    equal = A[0] * LOG2E == slow
    rate = tl.minimum(A[0].to(tl.float64) * LOG2E - slow.to(tl.float64), 0.0)
    faster = parts(tl.where(m_n & (equal == 0), rate, 0.0))
    turns = faster if REAL else parts(A[len(A) - 1].to(tl.float64) * (2 / TURN))
    A = pole(A)
    return A, faster, turns, reciprocal(A)


@triton.jit
def step_sizes(p_dt, o_t, m_t, bias, SOFTPLUS: tl.constexpr):
    """Step sizes of a chunk, 0 where there is no token."""
    raw = tl.load(p_dt + o_t, mask=m_t, other=0.0).to(tl.float32) + bias
    return tl.where(m_t, step_size(raw, SOFTPLUS, ACCURATE)[0], 0.0)


@triton.jit
def weights(dt, A, inv, EULER: tl.constexpr):
    """a = exp(dt A) and the weight w of a step, [C, N]; with EULER only w."""
    step = dt[:, None]
    if EULER:
        w = tl.broadcast_to(step, [dt.shape[0], A[0].shape[0]])
        w = (w,) if len(A) == 1 else (w, tl.zeros_like(w))
        return w, w
    else:
        a, rise = decay(step, as_row(A))
        return a, product(rise, as_row(inv))


@triton.jit
def operands(dt, S, A, turns, inv, b, c, REAL: tl.constexpr, EULER: tl.constexpr):
    """G and K [C, N] of the matrix of a chunk, but for decays, and what each token reads of itself."""
    _, w = weights(dt, A, inv, EULER)
    K = product(w, b)
    G = plus(scaled(c, 1.0 if REAL else 2.0), zero_like(w))
    own = tl.sum(real_product_conj(G, K), 1)
    by = turn(as_column(S), as_row(turns), REAL)
    return unturned(G, by), unturned(K, by), own


@triton.jit
def rows_of_weights(
    p, o_t, o_n, i_h, stride_t, m_t, N: tl.constexpr, REAL: tl.constexpr, TOKEN: tl.constexpr
):
    """B or C as [C, N], or [1, N] where it is static."""
    PLANES: tl.constexpr = 1 if REAL else 2
    if TOKEN:
        o = o_t[:, None] * stride_t + o_n[None, :] * PLANES
        m = m_t[:, None] & (o_n < N)[None, :]
    else:
        o = (i_h * N + o_n[None, :]) * PLANES
        m = (o_n < N)[None, :]
    return load_number(p + o, m, tl.float32, REAL)


@triton.jit
def split(x, COUNT: tl.constexpr):
    """`x` as a sum of COUNT numbers of 8 bits each, bfloat16, the largest first."""
    found = ()
    rest = x.to(tl.float32)
    for _ in tl.static_range(COUNT):
        part = narrow(rest, tl.bfloat16)
        rest -= part.to(tl.float32)
        found = found + (part,)
    return found


@triton.jit
def across(x, COUNT: tl.constexpr):
    """The transpose of a `split`."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.trans(x[i]),)
    return found


@triton.jit
def split_planes(x, COUNT: tl.constexpr):
    """Every plane of a number `split`."""
    if len(x) == 1:
        return (split(x[0], COUNT),)
    else:
        return split(x[0], COUNT), split(x[1], COUNT)


@triton.jit
def matmul(a, b, A: tl.constexpr, B: tl.constexpr):
    """Matrix product of real numbers in A and B parts, to the precision of the one with more."""
    MOST: tl.constexpr = A if A > B else B
    x = dot(a[0], b[0], tl.bfloat16, "ieee")
    for i in tl.static_range(A):
        for j in tl.static_range(B):
            if (i + j > 0) & (i + j < MOST):
                x += dot(a[i], b[j], tl.bfloat16, "ieee")
    return x


@triton.jit
def state_offsets(i_h, o_n, o_p, P: tl.constexpr, N: tl.constexpr, REAL: tl.constexpr):
    """Offsets of states [N, P] of a head in [H, P, N] or [H, P, N, 2]."""
    PLANES: tl.constexpr = 1 if REAL else 2
    return ((i_h * P + o_p[None, :]) * N + o_n[:, None]) * PLANES


@triton.jit
def chunks_of_part(i_split, length, SPAN, C: tl.constexpr, SPLITS: tl.constexpr):
    """First chunk of a part of a sequence, and the one after its last; none if the sequence ends before."""
    if SPLITS == 1:
        return i_split * 0, tl.cdiv(length, C)
    else:
        chunk = i_split * SPAN // C
        return chunk, tl.minimum(chunk + SPAN // C, tl.cdiv(length, C))


@triton.jit
def led(
    x, p_parts, p_totals, i_part, count, o_state, m_state, slow, faster, turns,
    STEP: tl.constexpr, HEADS: tl.constexpr, STATES: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """States of a head, led through `count` parts of its sequence from `i_part` on: forward in time, or back
    (STEP -1) where they are adjoints. What a part leaves from zero is added to what it makes of its start.
    """
    for i in range(count):
        at = i_part + STEP * i
        time = tl.load(p_totals + at * HEADS)
        S = parts(time)
        kept = decays(S, faster)[0]
        x = scaled(x, (kept * tl.exp2(slow * single(time)))[:, None])
        by = as_column(turn(S, turns, REAL))
        if STEP > 0:
            x = turned(x, by)
        else:
            x = unturned(x, by)
        x = plus(x, load_number(p_parts + at * STATES + o_state, m_state, tl.float32, REAL))
    return x


@triton.jit
def number_of_row(x, o, s):
    """Row `s` of a number whose rows are numbered `o`, as [1, N]."""
    if len(x) == 1:
        return (tl.sum(tl.where(o[:, None] == s, x[0], 0.0), 0)[None, :],)
    else:
        r = tl.sum(tl.where(o[:, None] == s, x[0], 0.0), 0)[None, :]
        return r, tl.sum(tl.where(o[:, None] == s, x[1], 0.0), 0)[None, :]
