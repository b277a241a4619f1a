"""Where the chunks of sequences lie, and the rows of what kernels keep per chunk.

A packed sequence that starts at token t has its chunks from row t // C plus its number on. That never
overlaps the next sequence, needs no table and no sum over sequences, and leaves some rows unused.
"""

import triton
import triton.language as tl


@triton.jit
def span(p_bounds, i_s, T, C, PACKED: tl.constexpr):
    """First token of a sequence, how many it has, and its first row of chunks of C tokens (or segments)."""
    if PACKED:
        start = tl.load(p_bounds + i_s).to(tl.int64)
        length = (tl.load(p_bounds + i_s + 1) - start).to(tl.int32)
        return start, length, start // C + i_s
    else:
        return i_s * T, T, i_s * tl.cdiv(T, C)


@triton.jit
def sequence_at(p_bounds, i_r, S, C):
    """The last of S packed sequences whose first row is not after `i_r`."""
    i_s, end = i_r * 0, i_r * 0 + S
    while end - i_s > 1:
        middle = (i_s + end) // 2
        before = tl.load(p_bounds + middle).to(tl.int64) // C + middle <= i_r
        i_s, end = tl.where(before, middle, i_s), tl.where(before, end, middle)
    return i_s


@triton.jit
def chunk_at(p_bounds, i_r, T, S, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of the chunk in row `i_r`, and how many tokens follow in its sequence; none if unused."""
    if PACKED:
        start, length, row = span(p_bounds, sequence_at(p_bounds, i_r, S, C), T, C, PACKED)
        into = (i_r - row) * C
        return start + into, (length - into).to(tl.int32)
    else:
        steps = tl.cdiv(T, C)
        into = (i_r % steps) * C
        return (i_r // steps) * T + into, (T - into).to(tl.int32)
