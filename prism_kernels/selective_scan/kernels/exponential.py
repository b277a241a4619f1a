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
LEAST_FAST: tl.constexpr = tl.constexpr(0.05)  # the least |A| of a state for fast ways of computing
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
    """What `decay` and `decay_rise` take in place of A: A itself; if fast, its rate in octaves, in turns."""
    if FAST == ACCURATE or A_r.dtype == tl.float64:
        return A_r, A_i
    else:
        return A_r * LOG2E, A_i * (1 / TURN)


@triton.jit
def decay(dt, rate, frequency, FAST: tl.constexpr):
    """exp(dt A), of `rates` of A."""
    if FAST == ACCURATE or dt.dtype == tl.float64:
        gain, _ = growth(dt * rate)
        sin, cos = half_turned((0.5 * dt) * frequency)
        twice = (gain + gain) * sin
        return gain - sin * twice, twice * cos
    else:
        gain = exp2_approx(dt * rate, FAST == MUFU)
        sin, cos = turned(dt, frequency, FAST)
        return gain * cos, gain * sin


@triton.jit
def decay_rise(dt, rate, frequency, FAST: tl.constexpr):
    """E = exp(dt A) - 1, of `rates` of A.

    Accurate: with m = exp(x) - 1 for z = x + iy, and s, c the sine and cosine of y/2,
    Re E = m - 2 exp(x) s^2 and Im E = 2 exp(x) s c, where nothing cancels near z = 0.
    """
    if FAST == ACCURATE or dt.dtype == tl.float64:
        gain, rise = growth(dt * rate)
        sin, cos = half_turned((0.5 * dt) * frequency)
        twice = (gain + gain) * sin
        return rise - sin * twice, twice * cos
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
    """exp(x) and exp(x) - 1, both to rounding, for x <= 0.

    With x = k log 2 + r, one polynomial in r gives both. (tl.exp is off by several units in the last place,
    and its error has a sign, which a recurrence adds up.) Below -87 nothing is left but 1e-38.
    """
    if x.dtype == tl.float64:
        near = tl.abs(x) < 0.35
        r = tl.where(near, x, 0.0)
        series = tl.full(x.shape, 1.0, x.dtype)
        for i in tl.static_range(14, 1, -1):
            series = 1.0 + r * series * (1.0 / i)
        e = tl.exp(x)
        return e, tl.where(near, r * series, e - 1.0)
    else:
        x = tl.maximum(x, -87.0)
        shifted = x * LOG2E + ROUND
        k = shifted - ROUND
        r = (x - k * 0.693359375) + k * 2.12194440e-4
        high = 0.041666354 + r * (0.0083332741 + r * (0.0013941042 + r * 0.00019913604))
        rise = r + r * r * (0.5 + r * (0.16666667 + r * high))
        # the last bits of `shifted` are k; they become an exponent
        power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
        return power + power * rise, power * rise + (power - 1.0)


@triton.jit
def half_turned(y):
    """sin(y) and cos(y), both of either sign: whole half turns are taken off.

    tl.sin and tl.cos carry a reduction for any float32 with a table in local memory. Phases here are
    small: three exact parts of pi hold to |y| = 1e4, and beyond it float32 phases mean little.
    """
    if y.dtype == tl.float64:
        return tl.sin(y), tl.cos(y)
    else:
        turns = (y * (2 / TURN) + ROUND) - ROUND
        r = ((y - turns * 3.140625) - turns * 9.67502593994140625e-4) - turns * 1.5099579897537296e-7
        r = tl.minimum(tl.maximum(r, -1.6), 1.6)
        z = r * r
        sin = -1.9811037e-4 + z * 2.6087502e-6
        sin = r + r * z * (-0.1666666 + z * (0.0083330872 + z * sin))
        cos = 0.041666656 + z * (-0.0013888568 + z * (2.4769223e-5 + z * -2.6192115e-7))
        return sin, 1.0 - z * (0.5 - z * cos)


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


@triton.jit
def decay_of_span(total, A_r, A_i, REAL: tl.constexpr):
    """exp(total A) over many tokens, `total` in float64: the phase of a long span keeps its digits."""
    if A_r.dtype == tl.float64:
        half = 0.5 * total * A_i
    else:
        turns = total * A_i * (1 / TURN)
        half = ((turns - tl.floor(turns + 0.5)) * (0.5 * TURN)).to(tl.float32)
    gain, _ = growth((total * A_r).to(A_r.dtype))
    if REAL:
        return gain, gain
    else:
        sin, cos = half_turned(half)
        return gain - 2.0 * gain * sin * sin, 2.0 * gain * sin * cos


@triton.jit
def fast_is_right(A_r, A_i, mask, ANY: tl.constexpr, FAST: tl.constexpr):
    """Whether no |A| of a program is so small that the absolute error of fast ways would show."""
    if ANY or FAST == ACCURATE or A_r.dtype == tl.float64:
        return True
    else:
        return tl.min(tl.where(mask, tl.maximum(tl.abs(A_r), tl.abs(A_i)), 1.0)) >= LEAST_FAST
