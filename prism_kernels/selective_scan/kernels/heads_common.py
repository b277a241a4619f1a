"""Helpers of the per-head kernels: poles, exponentials of cumulated times, operands of the products.

Complex numbers are two planes, `_r` and `_i`; with REAL the second is a dummy that nothing reads. A phase
or an exponent is a time S times a rate w. Both come in two parts of which the first has 12 bits, so that the
product of the first parts is exact, and what remains after whole (quarter) turns or octaves is right to
rounding however large S w is.
"""

import triton
import triton.language as tl

from ..._core.tl_math import dot, narrow
from .exponential import ACCURATE, LOG2E, growth
from .streams import step_size

QUARTERS: tl.constexpr = tl.constexpr(0.6366197723675814)  # quarter turns of a radian
STIFF: tl.constexpr = tl.constexpr(40.0)  # octaves by which states of a chunk may decay apart


@triton.jit
def times(a_r, a_i, b_r, b_i, REAL: tl.constexpr):
    """a b."""
    if REAL:
        return a_r * b_r, a_i
    else:
        return a_r * b_r - a_i * b_i, a_r * b_i + a_i * b_r


@triton.jit
def times_conj(a_r, a_i, b_r, b_i, REAL: tl.constexpr):
    """a conj(b)."""
    if REAL:
        return a_r * b_r, a_i
    else:
        return a_r * b_r + a_i * b_i, a_i * b_r - a_r * b_i


@triton.jit
def real_times(a_r, a_i, b_r, b_i, REAL: tl.constexpr):
    """Re a conj(b)."""
    if REAL:
        return a_r * b_r
    else:
        return a_r * b_r + a_i * b_i


@triton.jit
def parts(x):
    """float64 as the sum of two float32, the first of 12 bits."""
    high = (x.to(tl.float32).to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def cycles(S, S_low, w, w_low):
    """S w as a whole number and a rest of about -0.5 to 0.5."""
    lead, low = S * w, S * w_low + S_low * (w + w_low)
    whole = tl.floor(lead + low + 0.5)
    # Beyond 2 ** 24 cycles nothing is known of the rest, which must not overflow.
    return whole, tl.minimum(tl.maximum((lead - whole) + low, -1.0), 1.0)


@triton.jit
def decays(S, S_low, w, w_low):
    """2 ** (S w) for S w <= 0, and its inverse; that stays finite, and is right up to 2 ** STIFF."""
    whole, rest = cycles(S, S_low, w, w_low)
    risen = tl.exp2(tl.minimum(-whole, STIFF + 2.0)) * tl.exp2(-rest)
    return tl.exp2(tl.maximum(whole, -126.0)) * tl.exp2(rest), risen


@triton.jit
def rotation(quarters, r):
    """sin, cos and 1 - cos of quarter turns and a rest in radians, the last accurate near 0 too."""
    z = r * r
    sin = r + r * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    more = z * z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800))))
    lead = 1.0 - 0.5 * z
    cos = lead + (((1.0 - lead) - 0.5 * z) + more)
    q = quarters - 4.0 * tl.floor(quarters * 0.25)
    odd = (q == 1.0) | (q == 3.0)
    s, c = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    s = tl.where(q >= 2.0, -s, s)
    c = tl.where((q == 1.0) | (q == 2.0), -c, c)
    return s, c, tl.where(q == 0.0, 0.5 * z - more, 1.0 - c)


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
    """A of some states; and of each what it decays faster than `slow`, in two parts, its frequency in quarter
    turns, likewise, 1 / A, which is 0 where A vanishes, and whether it does.
    """
    PLANES: tl.constexpr = 1 if REAL else 2
    m_n = o_n < N
    o = (i_h * N + o_n) * PLANES
    A_r = tl.load(p_A + o, mask=m_n, other=0.0).to(tl.float32)
    A_i = A_r if REAL else tl.load(p_A + o + PLANES - 1, mask=m_n, other=0.0).to(tl.float32)
    r, i = A_r.to(tl.float64), A_i.to(tl.float64)
    # Of equal poles none decays faster, not even by a rounding.
    even = A_r * LOG2E == slow
    faster = parts(tl.where(m_n & (even == 0), r * LOG2E - slow.to(tl.float64), 0.0))
    vanishing = (tl.abs(A_r) < 1e-20) & (REAL | (tl.abs(A_i) < 1e-20))
    inverse = 1.0 / tl.where(vanishing, 1.0, r * r if REAL else r * r + i * i)
    inv_r = tl.where(vanishing, 0.0, r * inverse).to(tl.float32)
    inv_i = tl.where(vanishing, 0.0, -i * inverse).to(tl.float32)
    return A_r, A_i, faster, parts(i * QUARTERS), (inv_r, inv_i, vanishing)


@triton.jit
def step_sizes(p_dt, o_t, m_t, bias, SOFTPLUS: tl.constexpr):
    """Step sizes of a chunk, 0 where there is no token."""
    raw = tl.load(p_dt + o_t, mask=m_t, other=0.0).to(tl.float32) + bias
    return tl.where(m_t, step_size(raw, SOFTPLUS, ACCURATE)[0], 0.0)


@triton.jit
def weights(dt, A_r, A_i, inverse, REAL: tl.constexpr, EULER: tl.constexpr):
    """a = exp(dt A) and the weight w of a step [C, N]; with EULER only w."""
    step = dt[:, None]
    if EULER:
        w = tl.broadcast_to(step, [dt.shape[0], A_r.shape[0]])
        return w, w, w, tl.zeros_like(w)
    inv_r, inv_i, vanishing = inverse
    gain, rise = growth(step * A_r[None, :])
    if REAL:
        w = tl.where(vanishing[None, :], step, rise * inv_r[None, :])
        return gain, gain, w, w
    else:
        y = step * A_i[None, :]
        quarters = tl.floor(y * QUARTERS + 0.5)
        rest = (
            (y - quarters * 1.5703125) - quarters * 4.837512969970703e-4
        ) - quarters * 7.549789948768648e-8
        sin, cos, versine = rotation(quarters, rest)
        a_i = gain * sin
        w_r, w_i = times(rise * cos - versine, a_i, inv_r[None, :], inv_i[None, :], REAL)
        return gain * cos, a_i, tl.where(vanishing[None, :], step, w_r), w_i


@triton.jit
def turned(S_high, S_low, turn, turn_low, REAL: tl.constexpr):
    """sin and cos of the phases of times S; for real poles nothing."""
    if REAL:
        return S_high, S_high
    else:
        quarters, rest = cycles(S_high, S_low, turn, turn_low)
        sin, cos, _ = rotation(quarters, rest * 1.5707963267948966)
        return sin, cos


@triton.jit
def unturned(x_r, x_i, cos, sin, REAL: tl.constexpr):
    """x times conj(cos + i sin); a real x as it is."""
    if REAL:
        return x_r, x_i
    else:
        return times_conj(x_r, x_i, cos, sin, REAL)


@triton.jit
def turned_back(x_r, x_i, cos, sin, REAL: tl.constexpr):
    """x times cos + i sin; a real x as it is."""
    if REAL:
        return x_r, x_i
    else:
        return times(x_r, x_i, cos, sin, REAL)


@triton.jit
def operands(
    dt, S_high, S_low, A_r, A_i, turns, inverse, B_r, B_i, C_r, C_i, REAL: tl.constexpr, EULER: tl.constexpr
):
    """G and K [C, N] of the matrix of a chunk, but for decays, and what each token reads of itself."""
    FACTOR: tl.constexpr = 1.0 if REAL else 2.0
    _, _, w_r, w_i = weights(dt, A_r, A_i, inverse, REAL, EULER)
    K_r, K_i = times(w_r, w_i, B_r, B_i, REAL)
    G_r, G_i = FACTOR * C_r + tl.zeros_like(w_r), FACTOR * C_i + tl.zeros_like(w_r)
    own = tl.sum(real_times(G_r, G_i, K_r, K_i, REAL), 1)
    sin, cos = turned(S_high[:, None], S_low[:, None], turns[0][None, :], turns[1][None, :], REAL)
    K_r, K_i = unturned(K_r, K_i, cos, sin, REAL)
    G_r, G_i = unturned(G_r, G_i, cos, sin, REAL)
    return G_r, G_i, K_r, K_i, own


@triton.jit
def weight_slope(dt, A_r, A_i, inverse, a_r, a_i, w_r, w_i, REAL: tl.constexpr):
    """chi = dw / dA = (dt a - w) / A, by its series dt^2 sum_k (k+1)/(k+2)! (dt A)^k near 0."""
    inv_r, inv_i = inverse[0][None, :], inverse[1][None, :]
    near = dt * (tl.abs(A_r) if REAL else tl.maximum(tl.abs(A_r), tl.abs(A_i))) < 0.25
    z_r, z_i = tl.where(near, dt * A_r, 0.0), tl.where(near, dt * A_i, 0.0)
    far_r, far_i = times(dt * a_r - w_r, dt * a_i - w_i, inv_r, inv_i, REAL)
    s_r = tl.full(z_r.shape, 1.0, tl.float32)
    s_i = tl.zeros_like(s_r)
    for k in tl.static_range(6, 0, -1):
        p_r, p_i = times(s_r, s_i, z_r, z_i, REAL)
        s_r = 1.0 + p_r * ((k + 1.0) / (k * (k + 2.0)))
        s_i = p_i * ((k + 1.0) / (k * (k + 2.0)))
    scale = 0.5 * dt * dt
    return tl.where(near, scale * s_r, far_r), tl.where(near, scale * s_i, far_i)


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
    x = tl.load(p + o, mask=m, other=0.0).to(tl.float32)
    if REAL:
        return x, x
    else:
        return x, tl.load(p + o + 1, mask=m, other=0.0).to(tl.float32)


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
def product(a, b, A: tl.constexpr, B: tl.constexpr):
    """Matrix product of numbers in A and B parts, to the precision of the one with more."""
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
def load_planes(p, o, m, STEP: tl.constexpr, REAL: tl.constexpr):
    """Both planes of complex numbers, the second STEP after the first."""
    x = tl.load(p + o, mask=m, other=0.0).to(tl.float32)
    if REAL:
        return x, x
    else:
        return x, tl.load(p + o + STEP, mask=m, other=0.0).to(tl.float32)


@triton.jit
def store_planes(p, o, r, i, m, STEP: tl.constexpr, REAL: tl.constexpr):
    """The inverse of `load_planes`."""
    tl.store(p + o, r, mask=m)
    if not REAL:
        tl.store(p + o + STEP, i, mask=m)


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
    x_r, x_i, p_parts, p_totals, i_part, count, o_state, m_state, slow, faster, turns,
    STEP: tl.constexpr, HEADS: tl.constexpr, STATES: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """States of a head, led through `count` parts of its sequence from `i_part` on: forward in time, or back
    (STEP -1) where they are adjoints. What a part leaves from zero is added to what it makes of its start.
    """
    for i in range(count):
        at = i_part + STEP * i
        time = tl.load(p_totals + at * HEADS)
        high, low = parts(time)
        kept, _ = decays(high, low, faster[0], faster[1])
        kept = (kept * tl.exp2(slow * time.to(tl.float32)))[:, None]
        x_r, x_i = x_r * kept, x_i * kept
        if not REAL:
            sin, cos = turned(high, low, turns[0], turns[1], REAL)
            x_r, x_i = times(x_r, x_i, cos[:, None], STEP * sin[:, None], REAL)
        end_r, end_i = load_planes(p_parts + at * STATES, o_state, m_state, 1, REAL)
        x_r, x_i = x_r + end_r, x_i + end_i
    return x_r, x_i


@triton.jit
def row_of(x, o, s):
    """Row `s` of a block whose rows are numbered `o`."""
    return tl.sum(tl.where(o[:, None] == s, x, 0.0), 0)
