"""The scan channel by channel, forward: channels c = h P + p and states in the lanes, time as the loop.

UNROLL tokens are loaded at once, while the UNROLL before them are computed with. A token beyond the end has
dt = 0 and u = 0, which changes no state. The state of the loop is c = A h, or h itself under Euler's rule.
"""

import triton
import triton.language as tl

from ..._core.tl_math import narrow
from .channels import advance, load_tokens, rows_of
from .exponential import ACCURATE, decay_of_span, fast_is_right, pole, rates, reciprocal
from .numbers import conj, load_number, over, plus_product, product, real_sum, scaled, store_number, zeros
from .streams import gate, step_size


@triton.jit
def walk(
    c, A, B, W, skip, bias, mask, m_c, m_B, m_C, p_u, p_dt, p_B, p_C, p_z, p_y, p_states, length,
    U_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr, B_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, STATE_STRIDE: tl.constexpr, SEGMENT: tl.constexpr,
    UNROLL: tl.constexpr, REAL: tl.constexpr, EULER: tl.constexpr, SOFTPLUS: tl.constexpr,
    FAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Run over the tokens of one sequence: y, and the state before every SEGMENT of them.

    None stands for what a call lacks: skip, bias, p_z, p_states; p_B and p_C are None for static weights, and
    p_y where only the last state is asked for. Then the sum of the step sizes comes back too.
    """
    rate = rates(A, FAST)
    time = tl.zeros(m_c.shape, tl.float64)
    us = load_tokens(p_u, U_STRIDE, 0, length, m_c, UNROLL)
    dts = load_tokens(p_dt, DT_STRIDE, 0, length, m_c, UNROLL)
    for s in range(tl.cdiv(length, SEGMENT)):
        if p_states is not None:
            store_number(p_states, c if EULER else over(c, A), mask)
            p_states += STATE_STRIDE
        for t in range(s * SEGMENT, tl.minimum((s + 1) * SEGMENT, length), UNROLL):
            u_next = load_tokens(p_u + UNROLL * U_STRIDE, U_STRIDE, t + UNROLL, length, m_c, UNROLL)
            dt_next = load_tokens(p_dt + UNROLL * DT_STRIDE, DT_STRIDE, t + UNROLL, length, m_c, UNROLL)
            for i in tl.static_range(UNROLL):
                here = m_c & (t + i < length)
                u = us[i].to(WIDE)
                dt = dts[i].to(WIDE)
                if bias is not None:
                    dt += bias
                if SOFTPLUS:
                    dt, _ = step_size(dt, SOFTPLUS, FAST)
                if SOFTPLUS or bias is not None:
                    dt = tl.where(here, dt, 0.0)
                if p_B is None:
                    c = advance(c, u, dt, rate, B, EULER, FAST)
                else:
                    b = load_number(p_B + i * B_STRIDE, m_B & (t + i < length), WIDE, REAL)
                    c = advance(c, u, dt, rate, b, EULER, FAST)
                if p_y is None:
                    time += dt
                else:
                    V = W
                    if p_C is not None:
                        V = load_number(p_C + i * C_STRIDE, m_C & (t + i < length), WIDE, REAL)
                        V = product(conj(V), W)
                    y = real_sum(V, c)[None, :]
                    if skip is not None:
                        y += skip * u
                    if p_z is not None:
                        z = tl.load(p_z + i * Z_STRIDE, mask=here, other=0.0).to(WIDE)
                        y *= gate(z, FAST)[0]
                    tl.store(p_y + i * Y_STRIDE, narrow(y, p_y.dtype.element_ty), mask=here)
            us, dts = u_next, dt_next
            p_u += UNROLL * U_STRIDE
            p_dt += UNROLL * DT_STRIDE
            if p_B is not None:
                p_B += UNROLL * B_STRIDE
            if p_C is not None:
                p_C += UNROLL * C_STRIDE
            if p_z is not None:
                p_z += UNROLL * Z_STRIDE
            if p_y is not None:
                p_y += UNROLL * Y_STRIDE
    return c, time


@triton.jit
def weights_at(p, stride, i_c, o_c, o_n, mask, GROUP: tl.constexpr, N: tl.constexpr, BLOCK_C: tl.constexpr,
               PLANES: tl.constexpr):  # fmt: skip
    """Where B or C of these channels lie, GROUP channels to a row; a column where all share one row."""
    if GROUP % BLOCK_C == 0:
        return p + (i_c // GROUP).to(tl.int64) * stride + o_n * PLANES, o_n < N
    else:
        return p + (o_c // GROUP).to(tl.int64) * stride + o_n * PLANES, mask


@triton.jit
def read_out_factor(A, EULER: tl.constexpr):
    """The factor that makes W of conj(C), with y = Re sum W c: kappa / A, or kappa under Euler's rule."""
    if EULER:
        one = tl.full(A[0].shape, 1.0, A[0].dtype)
        if len(A) == 1:
            return (one,)
        else:
            return 2.0 * one, 0.0 * one
    elif len(A) == 1:
        return reciprocal(A)
    else:
        return scaled(reciprocal(A), 2.0)


@triton.jit
def state_before(c, A, ends_ptr, totals_ptr, i_first, parts, o_c, o_state, m_c, mask, STATES: tl.constexpr,
                 CHANNELS: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    """The state that a part of a sequence starts from: c, led through the parts before it."""
    for i in range(parts):
        time = tl.load(totals_ptr + (i_first + i) * CHANNELS + o_c, mask=m_c, other=0.0)
        end = load_number(ends_ptr + (i_first + i) * STATES + o_state, mask, c[0].dtype, REAL)
        c = plus_product(end, decay_of_span(time, A), c)
    return c


@triton.jit(do_not_specialize=["T", "SPAN"])
def scan_forward(
    # inputs
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, bounds_ptr, ends_ptr, totals_ptr,
    # outputs
    y_ptr, hT_ptr, states_ptr,
    # sizes and strides
    T, SPAN,
    u_stride_b, u_stride_h, u_stride_p, dt_stride_b, dt_stride_h, z_stride_b, z_stride_h, z_stride_p,
    B_stride_b, B_stride_g, C_stride_b, C_stride_g,
    U_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr, B_GROUP: tl.constexpr, C_GROUP: tl.constexpr,
    D_GROUP: tl.constexpr, CHANNELS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr,
    SPLITS: tl.constexpr, REAL: tl.constexpr, EULER: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y, the final state and the state before every SEGMENT tokens.

    Grid: (sequences x SPLITS x channel blocks,). With SPLITS > 1, SPAN tokens each, a first launch without
    y_ptr leaves the state that each part ends in, from zero, in hT, and the sum of its step sizes in totals;
    the second finds the state its part starts from.
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    PLANES: tl.constexpr = 1 if REAL else 2
    STATES: tl.constexpr = CHANNELS * N * PLANES
    WIDE: tl.constexpr = tl.float64 if u_ptr.dtype.element_ty == tl.float64 else tl.float32
    i_s = (tl.program_id(0) // (blocks * SPLITS)).to(tl.int64)
    i_split = tl.program_id(0) // blocks % SPLITS
    i_c = (tl.program_id(0) % blocks) * BLOCK_C
    o_c = i_c + tl.arange(0, BLOCK_C)[None, :]
    o_n = tl.arange(0, BLOCK_N)[:, None]
    m_c = o_c < CHANNELS
    mask = m_c & (o_n < N)
    head = (o_c // P).to(tl.int64)
    lane = o_c % P
    o_state = (o_c.to(tl.int64) * N + o_n) * PLANES

    i_b, start, length, row = rows_of(bounds_ptr, i_s, T, SEGMENT, bounds_ptr is not None)
    into = i_split * SPAN
    first = start + (length - 1 - into if REVERSE else into)
    sign: tl.constexpr = -1 if REVERSE else 1
    tokens = tl.maximum(tl.minimum(length - into, SPAN), 0) if SPLITS > 1 else length

    A = pole(load_number(A_ptr + (head * N + o_n) * PLANES, mask, WIDE, REAL))
    W = read_out_factor(A, EULER)
    p_B, m_B = weights_at(
        B_ptr + i_b * B_stride_b, B_stride_g, i_c, o_c, o_n, mask, B_GROUP, N, BLOCK_C, PLANES
    )
    p_C, m_C = weights_at(
        C_ptr + i_b * C_stride_b, C_stride_g, i_c, o_c, o_n, mask, C_GROUP, N, BLOCK_C, PLANES
    )
    B = A
    if B_STRIDE == 0:
        B = load_number(p_B, m_B, WIDE, REAL)
    if C_STRIDE == 0:
        W = product(conj(load_number(p_C, m_C, WIDE, REAL)), W)

    c = zeros(BLOCK_N, BLOCK_C, WIDE, REAL)
    if y_ptr is not None:
        if h0_ptr is not None:
            c = load_number(h0_ptr + i_s * STATES + o_state, mask, WIDE, REAL)
            if not EULER:
                c = product(A, c)
        if SPLITS > 1:
            c = state_before(
                c, A, ends_ptr, totals_ptr, i_s * SPLITS, i_split, o_c, o_state, m_c, mask, STATES, CHANNELS,
                REAL,
            )  # fmt: skip

    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + head, mask=m_c, other=0.0).to(WIDE)
    skip = None
    if D_ptr is not None:
        skip = tl.load(D_ptr + o_c // D_GROUP, mask=m_c, other=0.0).to(WIDE)
    p_u = u_ptr + i_b * u_stride_b + first * U_STRIDE + head * u_stride_h + lane * u_stride_p
    p_dt = dt_ptr + i_b * dt_stride_b + first * DT_STRIDE + head * dt_stride_h
    p_z = None
    if z_ptr is not None:
        p_z = z_ptr + i_b * z_stride_b + first * Z_STRIDE + head * z_stride_h + lane * z_stride_p
    if B_STRIDE == 0:
        p_B = None
    else:
        p_B += first * B_STRIDE
    if C_STRIDE == 0:
        p_C = None
    else:
        p_C += first * C_STRIDE
    p_y = None
    if y_ptr is not None:
        p_y = y_ptr + (i_b * T + first) * CHANNELS + o_c
    p_states = None
    if states_ptr is not None:
        p_states = states_ptr + (row + into // SEGMENT) * STATES + o_state
    if fast_is_right(A, mask, EULER, FAST):
        c, time = walk(
            c, A, B, W, skip, bias, mask, m_c, m_B, m_C, p_u, p_dt, p_B, p_C, p_z, p_y, p_states, tokens,
            sign * U_STRIDE, sign * DT_STRIDE, sign * B_STRIDE, sign * C_STRIDE, sign * Z_STRIDE,
            sign * CHANNELS, STATES, SEGMENT, UNROLL, REAL, EULER, SOFTPLUS, FAST, WIDE,
        )  # fmt: skip
    else:  # rare, and short
        c, time = walk(
            c, A, B, W, skip, bias, mask, m_c, m_B, m_C, p_u, p_dt, p_B, p_C, p_z, p_y, p_states, tokens,
            sign * U_STRIDE, sign * DT_STRIDE, sign * B_STRIDE, sign * C_STRIDE, sign * Z_STRIDE,
            sign * CHANNELS, STATES, SEGMENT, 1, REAL, EULER, SOFTPLUS, ACCURATE, WIDE,
        )  # fmt: skip

    if y_ptr is None:
        i_part = i_s * SPLITS + i_split
        store_number(hT_ptr + i_part * STATES + o_state, c, mask)
        tl.store(totals_ptr + i_part * CHANNELS + o_c, time, mask=m_c)
    else:
        last = (tokens > 0) & (into + tokens == length) if SPLITS > 1 else tokens > 0
        h = c if EULER else over(c, A)
        p_last = hT_ptr + i_s * STATES + o_state
        store_number(p_last, h, mask & last)
        if h0_ptr is not None:  # the state of an empty sequence keeps its bits
            h = load_number(h0_ptr + i_s * STATES + o_state, mask, WIDE, REAL)
        store_number(p_last, h, mask & (length == 0))
