"""The scan channel by channel, forward: channels c = h P + p and states in the lanes, time as the loop.

UNROLL tokens are loaded at once, while the UNROLL before them are computed with. A token beyond the end has
dt = 0 and u = 0, which changes no state. The state of the loop is c = A h, or h itself under Euler's rule.
"""

import triton
import triton.language as tl

from ..._core.tl_math import narrow
from .channels import (
    advance,
    load_pair,
    load_tokens,
    read,
    read_out_factor,
    scaled,
    silu,
    span,
    step_size,
    store_pair,
    unscaled,
    weighed,
    weights_at,
)
from .exponential import ACCURATE, LEAST_POLE, decay_of_span, fast_is_right, off_zero, rates, times


@triton.jit
def walk(
    c_r, c_i, A_r, A_i, B_r, B_i, W_r, W_i, skip, bias, mask, m_c, m_B, m_C,
    p_u, p_dt, p_B, p_C, p_z, p_y, p_states, length,
    U_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr, B_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, STATE_STRIDE: tl.constexpr, SEGMENT: tl.constexpr,
    UNROLL: tl.constexpr, REAL: tl.constexpr, EULER: tl.constexpr, SOFTPLUS: tl.constexpr,
    FAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Run over the tokens of one sequence: y, and the state before every SEGMENT of them.

    None stands for what a call lacks: skip, bias, p_z, p_states; p_B and p_C are None for static weights, and
    p_y where only the last state is asked for. Then the sum of the step sizes comes back too.
    """
    if REAL:
        rate, frequency = A_r, A_i
    else:
        rate, frequency = rates(A_r, A_i, FAST)
    total = tl.zeros(m_c.shape, tl.float64)
    us = load_tokens(p_u, U_STRIDE, 0, length, m_c, UNROLL)
    dts = load_tokens(p_dt, DT_STRIDE, 0, length, m_c, UNROLL)
    for s in range(tl.cdiv(length, SEGMENT)):
        if p_states is not None:
            h_r, h_i = unscaled(c_r, c_i, A_r, A_i, REAL, EULER)
            store_pair(p_states, h_r, h_i, mask, REAL)
            p_states += STATE_STRIDE
        for t in range(s * SEGMENT, tl.minimum((s + 1) * SEGMENT, length), UNROLL):
            u_next = load_tokens(p_u + UNROLL * U_STRIDE, U_STRIDE, t + UNROLL, length, m_c, UNROLL)
            dt_next = load_tokens(p_dt + UNROLL * DT_STRIDE, DT_STRIDE, t + UNROLL, length, m_c, UNROLL)
            for i in tl.static_range(UNROLL):
                here = m_c & (t + i < length)
                u = us[i].to(WIDE)
                dt = step_size(dts[i].to(WIDE), here, bias, SOFTPLUS, FAST)
                if p_B is None:
                    c_r, c_i = advance(c_r, c_i, u, dt, rate, frequency, B_r, B_i, REAL, EULER, FAST)
                else:
                    b_r, b_i = load_pair(p_B + i * B_STRIDE, m_B & (t + i < length), REAL, WIDE)
                    c_r, c_i = advance(c_r, c_i, u, dt, rate, frequency, b_r, b_i, REAL, EULER, FAST)
                if p_y is None:
                    total += dt
                else:
                    if p_C is not None:
                        C_r, C_i = load_pair(p_C + i * C_STRIDE, m_C & (t + i < length), REAL, WIDE)
                        V_r, V_i = weighed(C_r, C_i, W_r, W_i, REAL)
                        y = read(V_r, V_i, c_r, c_i, REAL)
                    else:
                        y = read(W_r, W_i, c_r, c_i, REAL)
                    if skip is not None:
                        y += skip * u
                    if p_z is not None:
                        y *= silu(tl.load(p_z + i * Z_STRIDE, mask=here, other=0.0).to(WIDE), FAST)
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
    return c_r, c_i, total


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

    i_b, start, length, row = span(bounds_ptr, i_s, T, SEGMENT, bounds_ptr is not None)
    into = i_split * SPAN
    first = start + (length - 1 - into if REVERSE else into)
    sign: tl.constexpr = -1 if REVERSE else 1
    tokens = tl.maximum(tl.minimum(length - into, SPAN), 0) if SPLITS > 1 else length

    A_r, A_i = load_pair(A_ptr + (head * N + o_n) * PLANES, mask, REAL, WIDE)
    if REAL:
        A_r = tl.where(A_r > -LEAST_POLE, -LEAST_POLE, A_r)
    else:
        A_r, A_i = off_zero(A_r, A_i)
    W_r, W_i = read_out_factor(A_r, A_i, REAL, EULER)
    p_B, m_B = weights_at(
        B_ptr + i_b * B_stride_b, B_stride_g, i_c, o_c, o_n, mask, B_GROUP, N, BLOCK_C, PLANES
    )
    p_C, m_C = weights_at(
        C_ptr + i_b * C_stride_b, C_stride_g, i_c, o_c, o_n, mask, C_GROUP, N, BLOCK_C, PLANES
    )
    B_r, B_i = A_r, A_i
    if B_STRIDE == 0:
        B_r, B_i = load_pair(p_B, m_B, REAL, WIDE)
    if C_STRIDE == 0:
        C_r, C_i = load_pair(p_C, m_C, REAL, WIDE)
        W_r, W_i = weighed(C_r, C_i, W_r, W_i, REAL)

    c_r = tl.zeros(mask.shape, WIDE)
    c_i = c_r
    if y_ptr is not None:
        if h0_ptr is not None:
            c_r, c_i = load_pair(h0_ptr + i_s * (CHANNELS * N * PLANES) + o_state, mask, REAL, WIDE)
            c_r, c_i = scaled(c_r, c_i, A_r, A_i, REAL, EULER)
        if SPLITS > 1:
            for i in range(i_split):
                i_part = i_s * SPLITS + i
                total = tl.load(totals_ptr + i_part * CHANNELS + o_c, mask=m_c, other=0.0)
                a_r, a_i = decay_of_span(total, A_r, A_i, REAL)
                e_r, e_i = load_pair(ends_ptr + i_part * (CHANNELS * N * PLANES) + o_state, mask, REAL, WIDE)
                if REAL:
                    c_r = a_r * c_r + e_r
                else:
                    c_r, c_i = times(a_r, a_i, c_r, c_i)
                    c_r, c_i = c_r + e_r, c_i + e_i

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
        p_states = states_ptr + (row + into // SEGMENT) * (CHANNELS * N * PLANES) + o_state
    if fast_is_right(A_r, A_i, mask, REAL or EULER, FAST):
        c_r, c_i, total = walk(
            c_r, c_i, A_r, A_i, B_r, B_i, W_r, W_i, skip, bias, mask, m_c, m_B, m_C,
            p_u, p_dt, p_B, p_C, p_z, p_y, p_states, tokens,
            sign * U_STRIDE, sign * DT_STRIDE, sign * B_STRIDE, sign * C_STRIDE, sign * Z_STRIDE,
            sign * CHANNELS, CHANNELS * N * PLANES, SEGMENT, UNROLL, REAL, EULER, SOFTPLUS, FAST, WIDE,
        )  # fmt: skip
    else:  # rare, and short
        c_r, c_i, total = walk(
            c_r, c_i, A_r, A_i, B_r, B_i, W_r, W_i, skip, bias, mask, m_c, m_B, m_C,
            p_u, p_dt, p_B, p_C, p_z, p_y, p_states, tokens,
            sign * U_STRIDE, sign * DT_STRIDE, sign * B_STRIDE, sign * C_STRIDE, sign * Z_STRIDE,
            sign * CHANNELS, CHANNELS * N * PLANES, SEGMENT, 1, REAL, EULER, SOFTPLUS, ACCURATE, WIDE,
        )  # fmt: skip

    if y_ptr is None:
        i_part = i_s * SPLITS + i_split
        store_pair(hT_ptr + i_part * (CHANNELS * N * PLANES) + o_state, c_r, c_i, mask, REAL)
        tl.store(totals_ptr + i_part * CHANNELS + o_c, total, mask=m_c)
    else:
        last = (tokens > 0) & (into + tokens == length) if SPLITS > 1 else tokens > 0
        h_r, h_i = unscaled(c_r, c_i, A_r, A_i, REAL, EULER)
        p_last = hT_ptr + i_s * (CHANNELS * N * PLANES) + o_state
        store_pair(p_last, h_r, h_i, mask & last, REAL)
        if h0_ptr is not None:  # the state of an empty sequence keeps its bits
            h_r, h_i = load_pair(h0_ptr + i_s * (CHANNELS * N * PLANES) + o_state, mask, REAL, WIDE)
        store_pair(p_last, h_r, h_i, mask & (length == 0), REAL)
