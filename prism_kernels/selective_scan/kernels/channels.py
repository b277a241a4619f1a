"""Device functions of the channelwise kernels: where tokens and states lie, step sizes, one step.

Tiles are [states, channels] with channels along the lanes first, so that a thread holds several states of
one channel and the sum over states is mostly within threads. Real numbers are carried as their real plane;
the imaginary one is never looked at.
"""

import triton
import triton.language as tl

from ..._core.tl_math import exp2_approx
from .exponential import ACCURATE, LOG2E, MUFU, decay_rise, inverse, real_rise, times


@triton.jit
def span(p_bounds, i_s, T, SEGMENT: tl.constexpr, PACKED: tl.constexpr):
    """Batch row of a sequence, its first token there, how many it has, and its first row of stored states."""
    if PACKED:
        start = tl.load(p_bounds + i_s).to(tl.int64)
        length = (tl.load(p_bounds + i_s + 1) - start).to(tl.int32)
        return i_s * 0, start, length, start // SEGMENT + i_s
    else:
        return i_s, i_s * 0, T, i_s * tl.cdiv(T, SEGMENT)


@triton.jit
def load_pair(p, mask, REAL: tl.constexpr, WIDE: tl.constexpr):
    """Real and imaginary part of complex numbers stored as pairs; of real ones, the number twice."""
    r = tl.load(p, mask=mask, other=0.0).to(WIDE)
    if REAL:
        return r, r
    else:
        return r, tl.load(p + 1, mask=mask, other=0.0).to(WIDE)


@triton.jit
def store_pair(p, r, i, mask, REAL: tl.constexpr):
    """The inverse of `load_pair`."""
    tl.store(p, r, mask=mask)
    if not REAL:
        tl.store(p + 1, i, mask=mask)


@triton.jit
def softplus(x, FAST: tl.constexpr):
    """log(1 + exp(x)), right to rounding for very negative x too: log1p(v) = 2 atanh(v / (2 + v))."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    if x.dtype == tl.float64 or FAST == ACCURATE:
        v = tl.exp(-tl.abs(x))
    else:
        v = exp2_approx(-tl.abs(x) * LOG2E, FAST == MUFU)
    s = v / (2.0 + v)
    z = s * s
    series = tl.full(x.shape, 1 / (2 * TERMS - 1), x.dtype)
    for i in tl.static_range(TERMS - 1, 0, -1):
        series = 1 / (2 * i - 1) + z * series
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def advance(
    c_r, c_i, u, dt, rate, frequency, B_r, B_i,
    REAL: tl.constexpr, EULER: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The scaled state after one token."""
    if REAL:
        E_r = real_rise(dt, rate, FAST)
        if EULER:
            return (c_r + E_r * c_r) + B_r * (dt * u), c_i
        else:
            return c_r + E_r * (c_r + B_r * u), c_i
    else:
        E_r, E_i = decay_rise(dt, rate, frequency, FAST)
        if EULER:
            x = dt * u
            return c_r + E_r * c_r - E_i * c_i + B_r * x, c_i + E_r * c_i + E_i * c_r + B_i * x
        else:
            s_r = c_r + B_r * u
            s_i = c_i + B_i * u
            return c_r + E_r * s_r - E_i * s_i, c_i + E_r * s_i + E_i * s_r


@triton.jit
def load_tokens(p, stride: tl.constexpr, first, end, mask, COUNT: tl.constexpr):
    """COUNT tokens from number `first` on, where `p` points, as a tuple; those from `end` on are zero."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(p + i * stride, mask=mask & (first + i < end), other=0.0),)
    return values


@triton.jit
def step_size(dt, here, bias, SOFTPLUS: tl.constexpr, FAST: tl.constexpr):
    """The step size after bias (None: no bias) and softplus, 0 where there is no token."""
    if bias is not None:
        dt += bias
    if SOFTPLUS:
        dt = softplus(dt, FAST)
    if SOFTPLUS or bias is not None:
        dt = tl.where(here, dt, 0.0)
    return dt


@triton.jit
def silu(z, FAST: tl.constexpr):
    """z sigmoid(z)."""
    if z.dtype == tl.float64 or FAST == ACCURATE:
        return z / (1.0 + tl.exp(-z))
    else:
        return z / (1.0 + exp2_approx(z * -LOG2E, FAST == MUFU))


@triton.jit
def read(W_r, W_i, c_r, c_i, REAL: tl.constexpr):
    """Re sum W c over the states."""
    if REAL:
        return tl.sum(W_r * c_r, axis=0)[None, :]
    else:
        return tl.sum(W_r * c_r - W_i * c_i, axis=0)[None, :]


@triton.jit
def read_out_factor(A_r, A_i, REAL: tl.constexpr, EULER: tl.constexpr):
    """The factor that makes W of conj(C), with y = Re sum W c: kappa / A, or kappa under Euler's rule."""
    one = tl.full(A_r.shape, 1.0, A_r.dtype)
    if REAL:
        return (one if EULER else 1.0 / A_r), one
    elif EULER:
        return 2.0 * one, 0.0 * one
    else:
        inv_r, inv_i = inverse(A_r, A_i)
        return 2.0 * inv_r, 2.0 * inv_i


@triton.jit
def weighed(C_r, C_i, inv_r, inv_i, REAL: tl.constexpr):
    """conj(C) times a factor: W of an input-dependent C."""
    if REAL:
        return C_r * inv_r, C_r
    else:
        return times(C_r, -C_i, inv_r, inv_i)


@triton.jit
def scaled(h_r, h_i, A_r, A_i, REAL: tl.constexpr, EULER: tl.constexpr):
    """The state of the loop, from the textbook's."""
    if EULER:
        return h_r, h_i
    elif REAL:
        return A_r * h_r, h_i
    else:
        return times(A_r, A_i, h_r, h_i)


@triton.jit
def unscaled(c_r, c_i, A_r, A_i, REAL: tl.constexpr, EULER: tl.constexpr):
    """The inverse of `scaled`."""
    if EULER:
        return c_r, c_i
    elif REAL:
        return c_r / A_r, c_i
    else:
        inv = 1.0 / (A_r * A_r + A_i * A_i)
        return times(c_r, c_i, A_r * inv, -A_i * inv)


@triton.jit
def weights_at(
    p,
    stride,
    i_c,
    o_c,
    o_n,
    mask,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Where B or C of these channels lie, GROUP channels to a row; a column where all share one row."""
    if GROUP % BLOCK_C == 0:
        return p + (i_c // GROUP).to(tl.int64) * stride + o_n * PLANES, o_n < N
    else:
        return p + (o_c // GROUP).to(tl.int64) * stride + o_n * PLANES, mask
