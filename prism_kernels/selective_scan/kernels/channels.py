"""Device functions of the channelwise kernels: where sequences and their tokens lie, and one step.

Tiles are [states, channels] with channels along the lanes first, so that a thread holds several states of
one channel and the sum over states is mostly within threads.
"""

import triton
import triton.language as tl

from .exponential import ACCURATE, decay_rise
from .numbers import plus, plus_product, product, scaled


@triton.jit
def rows_of(p_bounds, i_s, T, SEGMENT: tl.constexpr, PACKED: tl.constexpr):
    """Batch row of a sequence, its first token there, how many it has, and its first row of stored states."""
    if PACKED:
        start = tl.load(p_bounds + i_s).to(tl.int64)
        length = (tl.load(p_bounds + i_s + 1) - start).to(tl.int32)
        return i_s * 0, start, length, start // SEGMENT + i_s
    else:
        return i_s, i_s * 0, T, i_s * tl.cdiv(T, SEGMENT)


@triton.jit
def channels_of(i_g, i_c, OF_GROUP: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels of block `i_c` of group `i_g`: which exist, their number, head, and place in the head."""
    o_group = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_c = i_g * OF_GROUP + o_group
    return o_group < OF_GROUP, o_c.to(tl.int64), (o_c // P).to(tl.int64), (o_c % P).to(tl.int64)


@triton.jit
def load_tokens(p, stride: tl.constexpr, first, end, mask, COUNT: tl.constexpr):
    """COUNT tokens from number `first` on, where `p` points, as a tuple; those from `end` on are zero."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(p + i * stride, mask=mask & (first + i < end), other=0.0),)
    return values


@triton.jit
def advance(c, u, dt, rate, B, EULER: tl.constexpr, FAST: tl.constexpr):
    """The state of the loop after one token: c = A h, or h itself under Euler's rule."""
    E = decay_rise(dt, rate, FAST)
    if EULER:
        return plus(plus_product(c, E, c), scaled(B, dt * u))
    elif FAST == ACCURATE:  # one rounding of a long memory, not two
        return plus(c, product(E, plus(c, scaled(B, u))))
    else:
        return plus_product(c, E, plus(c, scaled(B, u)))
