"""Device functions of the discretisation: E = exp(dt A) - 1, from which everything else follows.

The kernels carry c = A h, with the state h normalised to B = 1, so that a step of zero-order hold is

    c_t = exp(dt A) c_{t-1} + (exp(dt A) - 1) u_t = c_{t-1} + E (c_{t-1} + u_t)

with no division, no weight and no case apart for A -> 0: E is all there is. Complex numbers are two planes,
`_r` and `_i`. FAST says how E is computed: ACCURATE, to rounding relative to |dt A| by polynomials; or
PORTABLE and MUFU, exp(dt A) from one exponential, one sine and one cosine, less 1, which is right to a few
units of 2**-22 absolute (on NVIDIA, in three special-function instructions).
"""

import triton
import triton.language as tl

from ..._core.tl_math import cos_approx, exp2_approx, sin_approx

ACCURATE: tl.constexpr = tl.constexpr(0)
PORTABLE: tl.constexpr = tl.constexpr(1)
MUFU: tl.constexpr = tl.constexpr(2)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
TURN: tl.constexpr = tl.constexpr(6.283185307179586)
ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to integers
LEAST_POLE: tl.constexpr = tl.constexpr(2.0**-40)  # stands for any smaller |A|: exp(dt A) - 1 = dt A there


@triton.jit
def times(a_r, a_i, b_r, b_i):
    """a b."""
    return a_r * b_r - a_i * b_i, a_r * b_i + a_i * b_r


@triton.jit
def times_conj(a_r, a_i, b_r, b_i):
    """a conj(b)."""
    return a_r * b_r + a_i * b_i, a_i * b_r - a_r * b_i


@triton.jit
def off_zero(A_r, A_i):
    """A, with -LEAST_POLE in place of what is smaller: then c = A h never loses the state."""
    vanishing = (tl.abs(A_r) < LEAST_POLE) & (tl.abs(A_i) < LEAST_POLE)
    return tl.where(vanishing, -LEAST_POLE, A_r), tl.where(vanishing, 0.0, A_i)


@triton.jit
def inverse(A_r, A_i):
    """1 / A, in float64: its error meets every token. `A` does not vanish (`off_zero`)."""
    r = A_r.to(tl.float64)
    i = A_i.to(tl.float64)
    norm = r * r + i * i
    return (r / norm).to(A_r.dtype), (-i / norm).to(A_r.dtype)


@triton.jit
def rates(A_r, A_i, FAST: tl.constexpr):
    """What `decay_rise` takes in place of A: A itself, or its rate in octaves and its frequency in turns."""
    if FAST == ACCURATE or A_r.dtype == tl.float64:
        return A_r, A_i
    else:
        return A_r * LOG2E, A_i * (1 / TURN)


@triton.jit
def decay(dt, rate, frequency, FAST: tl.constexpr):
    """exp(dt A), of `rates` of A."""
    if FAST == ACCURATE or dt.dtype == tl.float64:
        gain, _ = growth(dt * rate)
        sin, cos, _ = rotation(dt * frequency)
    else:
        gain = exp2_approx(dt * rate, FAST == MUFU)
        sin, cos = turned(dt, frequency, FAST)
    return gain * cos, gain * sin


@triton.jit
def decay_rise(dt, rate, frequency, FAST: tl.constexpr):
    """E = exp(dt A) - 1, of `rates` of A."""
    if FAST == ACCURATE or dt.dtype == tl.float64:
        gain, rise = growth(dt * rate)
        sin, cos, versine = rotation(dt * frequency)
        return rise * cos - versine, gain * sin
    else:
        gain = exp2_approx(dt * rate, FAST == MUFU)
        sin, cos = turned(dt, frequency, FAST)
        return gain * cos - 1.0, gain * sin


@triton.jit
def turned(dt, frequency, FAST: tl.constexpr):
    """sin and cos of 2 pi dt frequency; whole turns are taken off exactly, up to 2**22 of them."""
    turns = (dt * frequency + ROUND) - ROUND
    y = (dt * frequency - turns) * TURN
    return sin_approx(y, FAST == MUFU), cos_approx(y, FAST == MUFU)


@triton.jit
def real_rise(dt, A, FAST: tl.constexpr):
    """exp(dt A) - 1 for real A <= 0, accurate near 0 in either way of computing (A itself, not `rates`)."""
    x = dt * A
    if FAST == ACCURATE or dt.dtype == tl.float64:
        _, rise = growth(x)
        return rise
    else:
        series = 1 / 120 + x * (1 / 720)
        series = x + x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * series)))
        return tl.where(x > -0.25, series, exp2_approx(x * LOG2E, FAST == MUFU) - 1.0)


@triton.jit
def growth(x):
    """exp(x) and exp(x) - 1, both to rounding, for x <= 0 (at most 88).

    With x = k log 2 + r, one series for exp(r) - 1 gives both. (tl.exp is off by several units in the
    last place, and its error has a sign, which a recurrence adds up.)
    """
    TERMS: tl.constexpr = 14 if x.dtype == tl.float64 else 8
    near = tl.abs(x) < 0.35
    k = tl.minimum(tl.maximum(tl.floor(x * LOG2E + 0.5), -126.0), 127.0)
    if x.dtype == tl.float64:
        r = tl.where(near, x, 0.0)
    else:
        r = tl.where(x < -87.0, 0.0, (x - k * 0.693359375) + k * 2.12194440e-4)
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(TERMS, 1, -1):
        series = 1.0 + r * series * (1.0 / i)
    rise = r * series
    if x.dtype == tl.float64:
        e = tl.exp(x)
        return e, tl.where(near, rise, e - 1.0)
    power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    gone = x < -87.0
    return tl.where(gone, 0.0, power + power * rise), tl.where(gone, -1.0, power * rise + (power - 1.0))


@triton.jit
def rotation(y):
    """sin(y), cos(y) and 1 - cos(y), the last accurate near 0 too.

    tl.sin and tl.cos carry a reduction for any float32 with a table in local memory. Phases here are
    small: three exact parts of pi/2 hold to |y| = 1e4, and beyond it float32 phases mean little.
    """
    if y.dtype == tl.float64:
        half = tl.sin(0.5 * y)
        return tl.sin(y), tl.cos(y), 2.0 * half * half
    turns = tl.floor(y * 0.6366197723675814 + 0.5)
    r = ((y - turns * 1.5703125) - turns * 4.837512969970703e-4) - turns * 7.549789948768648e-8
    r = tl.minimum(tl.maximum(r, -1.0), 1.0)
    q = turns - 4.0 * tl.floor(turns * 0.25)
    z = r * r
    sin = r + r * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    rest = z * z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800))))
    lead = 1.0 - 0.5 * z
    cos = lead + (((1.0 - lead) - 0.5 * z) + rest)
    versine = 0.5 * z - rest
    odd = (q == 1.0) | (q == 3.0)
    s = tl.where(odd, cos, sin)
    c = tl.where(odd, sin, cos)
    s = tl.where(q >= 2.0, -s, s)
    c = tl.where((q == 1.0) | (q == 2.0), -c, c)
    return s, c, tl.where(q == 0.0, versine, 1.0 - c)


@triton.jit
def weight_slope(dt, A_r, A_i, inv_r, inv_i, E_r, E_i, TERMS: tl.constexpr):
    """chi = dw/dA of the weight w = E / A: (dt exp(dt A) - w) / A, by a series near 0.

    The series is dt^2 sum_k (k+1)/(k+2)! (dt A)^k, with 6 terms in float32 and 12 in float64.
    """
    near = dt * tl.maximum(tl.abs(A_r), tl.abs(A_i)) < 0.25
    z_r = tl.where(near, dt * A_r, 0.0)
    z_i = tl.where(near, dt * A_i, 0.0)
    w_r, w_i = times(E_r, E_i, inv_r, inv_i)
    far_r, far_i = times(dt + dt * E_r - w_r, dt * E_i - w_i, inv_r, inv_i)
    s_r = tl.full(z_r.shape, 1.0, z_r.dtype)
    s_i = tl.zeros_like(s_r)
    for k in tl.static_range(TERMS, 0, -1):
        p_r, p_i = times(s_r, s_i, z_r, z_i)
        s_r = 1.0 + p_r * ((k + 1.0) / (k * (k + 2.0)))
        s_i = p_i * ((k + 1.0) / (k * (k + 2.0)))
    scale = 0.5 * dt * dt
    return tl.where(near, scale * s_r, far_r), tl.where(near, scale * s_i, far_i)
