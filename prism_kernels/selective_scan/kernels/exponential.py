"""Device functions of the discretisation: E = exp(dt A) - 1, from which everything else follows.

Numbers are tuples of planes (numbers.py). FAST says how E is computed: ACCURATE, to rounding relative to
|dt A| by polynomials; or PORTABLE and MUFU, exp(dt A) from one exponential, one sine and one cosine, less 1,
which is right to a few units of 2**-22 absolute (on NVIDIA, in three special-function instructions).
"""

import math

import triton
import triton.language as tl

from ..._core.tl_math import cos_approx, exp2_approx, sin_approx
from .numbers import minus, pick, product, scaled

ACCURATE: tl.constexpr = tl.constexpr(0)
PORTABLE: tl.constexpr = tl.constexpr(1)
MUFU: tl.constexpr = tl.constexpr(2)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
TURN: tl.constexpr = tl.constexpr(6.283185307179586)
ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to integers
LEAST_FAST: tl.constexpr = tl.constexpr(0.05)  # the least |A| of a state for fast ways of computing
LEAST_POLE: tl.constexpr = tl.constexpr(2.0**-40)  # stands for any smaller |A|: exp(dt A) - 1 = dt A there


@triton.jit
def pole(A):
    """A, with -LEAST_POLE in place of what is smaller: then A h never loses the state h."""
    if len(A) == 1:
        return (tl.where(tl.abs(A[0]) < LEAST_POLE, -LEAST_POLE, A[0]),)
    else:
        vanishing = (tl.abs(A[0]) < LEAST_POLE) & (tl.abs(A[1]) < LEAST_POLE)
        return tl.where(vanishing, -LEAST_POLE, A[0]), tl.where(vanishing, 0.0, A[1])


@triton.jit
def reciprocal(A):
    """1 / A of a `pole`, to rounding, for which float64 is needed: its error meets every token."""
    r = A[0].to(tl.float64)
    if len(A) == 1:
        return ((1.0 / r).to(A[0].dtype),)
    else:
        i = A[1].to(tl.float64)
        norm = r * r + i * i
        return (r / norm).to(A[0].dtype), (-i / norm).to(A[0].dtype)


@triton.jit
def rates(A, FAST: tl.constexpr):
    """What `decay_rise` takes in place of A: A itself; complex and fast, its rate in octaves and in turns."""
    if FAST == ACCURATE or A[0].dtype == tl.float64 or len(A) == 1:
        return A
    else:
        return A[0] * LOG2E, A[1] * (1 / TURN)


@triton.jit
def decay_rise(dt, rate, FAST: tl.constexpr):
    """E = exp(dt A) - 1, of `rates` of A; for real A accurate near 0 in either way of computing."""
    if FAST == ACCURATE or dt.dtype == tl.float64:
        _, E = decay(dt, rate)
        return E
    elif len(rate) == 1:
        x = dt * rate[0]
        series = 1 / 120 + x * (1 / 720)
        series = x + x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * series)))
        return (tl.where(x > -0.25, series, exp2_approx(x * LOG2E, FAST == MUFU) - 1.0),)
    else:
        gain = exp2_approx(dt * rate[0], FAST == MUFU)
        sin, cos = turned(dt, rate[1], FAST)
        return gain * cos - 1.0, gain * sin


@triton.jit
def decay(dt, A):
    """a = exp(dt A) and E = a - 1, both to rounding.

    With m = exp(x) - 1 for dt A = x + iy, and s, c the sine and cosine of y/2, Re E = m - 2 exp(x) s^2 and
    Im E = 2 exp(x) s c, where nothing cancels near 0.
    """
    gain, rise = growth(dt * A[0])
    if len(A) == 1:
        return (gain,), (rise,)
    else:
        sin, cos = half_turned((0.5 * dt) * A[1])
        twice = (gain + gain) * sin
        return (gain - sin * twice, twice * cos), (rise - sin * twice, twice * cos)


@triton.jit
def decay_and_inverse(dt, rate, FAST: tl.constexpr):
    """exp(dt A) and its inverse, of `rates` of A; the caller bounds |dt Re A|."""
    if FAST == ACCURATE:
        a, _ = decay(dt, rate)
        gain, _ = growth(dt * rate[0])
        loss = 1.0 / gain
        loss = loss * loss
        return a, (a[0] * loss, -(a[1] * loss))
    else:
        sin, cos = turned(dt, rate[1], FAST)
        x = dt * rate[0]
        gain = exp2_approx(x, FAST == MUFU)
        loss = exp2_approx(-x, FAST == MUFU)
        return (gain * cos, gain * sin), (loss * cos, -(loss * sin))


@triton.jit
def turned(dt, frequency, FAST: tl.constexpr):
    """sin and cos of 2 pi dt frequency; whole turns are taken off exactly, up to 2**22 of them."""
    turns = (dt * frequency + ROUND) - ROUND
    y = (dt * frequency - turns) * TURN
    return sin_approx(y, FAST == MUFU), cos_approx(y, FAST == MUFU)


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
        return sin_cos(tl.minimum(tl.maximum(r, -1.6), 1.6))


@triton.jit
def sin_cos(r):
    """sin(r) and cos(r) to rounding, for |r| at most a quarter turn."""
    z = r * r
    sin = -1.9811037e-4 + z * 2.6087502e-6
    sin = r + r * z * (-0.1666666 + z * (0.0083330872 + z * sin))
    cos = 0.041666656 + z * (-0.0013888568 + z * (2.4769223e-5 + z * -2.6192115e-7))
    return sin, 1.0 - z * (0.5 - z * cos)


@triton.constexpr_function
def slope_coefficient(k):
    """Of z^k in the series of 2 chi / dt^2."""
    return 2 * (k + 1) / math.factorial(k + 2)


@triton.jit
def slope_series(z, TERMS: tl.constexpr):
    """sum_k 2 (k+1)/(k+2)! z^k; for complex z by division by its real quadratic, two products a term."""
    last = tl.full(z[0].shape, slope_coefficient(TERMS), z[0].dtype)
    if len(z) == 1:
        for k in tl.static_range(TERMS - 1, -1, -1):
            last = slope_coefficient(k) + z[0] * last
        return (last,)
    else:
        twice = 2.0 * z[0]
        norm = z[0] * z[0] + z[1] * z[1]
        before = tl.zeros_like(last)
        for k in tl.static_range(TERMS - 1, 0, -1):
            last, before = slope_coefficient(k) + (twice * last - norm * before), last
        return 1.0 + (z[0] * last - norm * before), z[1] * last


@triton.jit
def weight_slope(dt, A, inv, a, w):
    """chi = dw / dA of the weight w = E / A: (dt a - w) / A, by a series near 0.

    The series is dt^2 sum_k (k+1)/(k+2)! (dt A)^k, with 6 terms in float32 and 12 in float64.
    """
    TERMS: tl.constexpr = 12 if dt.dtype == tl.float64 else 6
    size = tl.abs(A[0])
    if len(A) == 2:
        size = tl.maximum(size, tl.abs(A[1]))
    near = dt * size < 0.25
    series = slope_series(scaled(A, tl.where(near, dt, 0.0)), TERMS)
    return pick(near, scaled(series, 0.5 * dt * dt), product(minus(scaled(a, dt), w), inv))


@triton.jit
def decay_of_span(time, A):
    """exp(time A) over many tokens, `time` in float64: the phase of a long span keeps its digits."""
    gain, _ = growth((time * A[0]).to(A[0].dtype))
    if len(A) == 1:
        return (gain,)
    else:
        if A[0].dtype == tl.float64:
            half = 0.5 * time * A[1]
        else:
            turns = time * A[1] * (1 / TURN)
            half = ((turns - tl.floor(turns + 0.5)) * (0.5 * TURN)).to(tl.float32)
        sin, cos = half_turned(half)
        return gain - 2.0 * gain * sin * sin, 2.0 * gain * sin * cos


@triton.jit
def fast_is_right(A, mask, ANY: tl.constexpr, FAST: tl.constexpr):
    """Whether no |A| of a program is so small that the absolute error of fast ways would show."""
    if ANY or FAST == ACCURATE or A[0].dtype == tl.float64 or len(A) == 1:
        return True
    else:
        return tl.min(tl.where(mask, tl.maximum(tl.abs(A[0]), tl.abs(A[1])), 1.0)) >= LEAST_FAST
