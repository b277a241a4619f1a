"""Triton kernels of the depthwise causal convolution: one forward, one backward."""

import triton
import triton.language as tl

from .._core.tl_math import narrow


@triton.jit
def load_input(
    x_ptr, state_ptr, i_b, o_t, o_d, T, D,
    stride_xb, stride_xt, stride_xd,
    WIDTH: tl.constexpr, HAS_STATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Input at times o_t: x inside [0, T), the initial state [B, D, W-1] before 0, zero elsewhere."""
    m_d = (o_d < D)[None, :]
    m_x = ((o_t >= 0) & (o_t < T))[:, None] & m_d
    p_x = (
        x_ptr
        + i_b * stride_xb
        + o_t.to(tl.int64)[:, None] * stride_xt
        + o_d.to(tl.int64)[None, :] * stride_xd
    )
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(ACC)
    if HAS_STATE:
        m_s = ((o_t < 0) & (o_t > -WIDTH))[:, None] & m_d
        p_s = state_ptr + (i_b * D + o_d.to(tl.int64)[None, :]) * (WIDTH - 1) + (o_t + WIDTH - 1)[:, None]
        b_x += tl.load(p_s, mask=m_s, other=0.0).to(ACC)
    return b_x


@triton.jit
def preactivation(
    x_ptr, weight_ptr, bias_ptr, state_ptr, i_b, o_t, o_d, T, D,
    stride_xb, stride_xt, stride_xd,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """bias + sum_j weight[:, j] x_{t-W+1+j} at times o_t."""
    b_z = tl.zeros([o_t.shape[0], o_d.shape[0]], dtype=ACC)
    if HAS_BIAS:
        b_z += tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0).to(ACC)[None, :]
    for j in tl.static_range(WIDTH):
        b_w = tl.load(weight_ptr + o_d * WIDTH + j, mask=o_d < D, other=0.0).to(ACC)
        b_x = load_input(
            x_ptr, state_ptr, i_b, o_t - (WIDTH - 1 - j), o_d, T, D,
            stride_xb, stride_xt, stride_xd, WIDTH, HAS_STATE, ACC,
        )  # fmt: skip
        b_z += b_x * b_w[None, :]
    return b_z


@triton.jit(do_not_specialize=["T"])
def causal_conv1d_fwd_kernel(
    y_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr,
    T, D, stride_xb, stride_xt, stride_xd,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y r[B,T,D] (contiguous). Grid: (time blocks, channel blocks, B)."""
    i_t, i_d, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    b_z = preactivation(
        x_ptr, weight_ptr, bias_ptr, state_ptr, i_b, o_t, o_d, T, D,
        stride_xb, stride_xt, stride_xd, WIDTH, HAS_BIAS, HAS_STATE, ACC,
    )  # fmt: skip
    if SILU:
        b_z = b_z / (1.0 + tl.exp(-b_z))
    p_y = y_ptr + (i_b * T + o_t.to(tl.int64)[:, None]) * D + o_d[None, :]
    tl.store(p_y, narrow(b_z, y_ptr.dtype.element_ty), mask=(o_t < T)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["T"])
def causal_conv1d_bwd_kernel(
    dx_ptr, dweight_ptr, dbias_ptr, dstate_ptr,
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr,
    T, D, stride_xb, stride_xt, stride_xd, stride_yb, stride_yt, stride_yd,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx r[B,T,D], dstate r[B,D,W-1], and dweight r[blocks,D,W], dbias r[blocks,D] to be summed over blocks.

    Grid: (time blocks over [-(W-1), T), channel blocks, B). dz at t..t+W-1 is recomputed, not stored.
    """
    i_t, i_d, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T) - (WIDTH - 1)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_dx = tl.zeros([BLOCK_T, BLOCK_D], dtype=ACC)
    i_part = i_b * tl.num_programs(0) + i_t
    for d in tl.static_range(WIDTH):
        o_s = o_t + d
        m_s = ((o_s >= 0) & (o_s < T))[:, None] & m_d[None, :]
        p_dy = (
            dy_ptr
            + i_b * stride_yb
            + o_s.to(tl.int64)[:, None] * stride_yt
            + o_d.to(tl.int64)[None, :] * stride_yd
        )
        b_dz = tl.load(p_dy, mask=m_s, other=0.0).to(ACC)
        if SILU:
            b_z = preactivation(
                x_ptr, weight_ptr, bias_ptr, state_ptr, i_b, o_s, o_d, T, D,
                stride_xb, stride_xt, stride_xd, WIDTH, HAS_BIAS, HAS_STATE, ACC,
            )  # fmt: skip
            b_sig = 1.0 / (1.0 + tl.exp(-b_z))
            b_dz = tl.where(m_s, b_dz * b_sig * (1.0 + b_z * (1.0 - b_sig)), 0.0)
        b_w = tl.load(weight_ptr + o_d * WIDTH + (WIDTH - 1 - d), mask=m_d, other=0.0).to(ACC)
        b_dx += b_dz * b_w[None, :]
        if d == 0:
            tl.store(dbias_ptr + i_part * D + o_d, tl.sum(b_dz, 0), mask=m_d)
            for j in tl.static_range(WIDTH):
                b_x = load_input(
                    x_ptr, state_ptr, i_b, o_t - (WIDTH - 1 - j), o_d, T, D,
                    stride_xb, stride_xt, stride_xd, WIDTH, HAS_STATE, ACC,
                )  # fmt: skip
                tl.store(dweight_ptr + (i_part * D + o_d) * WIDTH + j, tl.sum(b_dz * b_x, 0), mask=m_d)
    o_f = o_t - (T - (WIDTH - 1))
    m_f = ((o_f >= 0) & (o_t < T))[:, None] & m_d[None, :]
    p_f = dfinal_ptr + (i_b * D + o_d.to(tl.int64)[None, :]) * (WIDTH - 1) + o_f[:, None]
    b_dx += tl.load(p_f, mask=m_f, other=0.0).to(ACC)
    p_dx = dx_ptr + (i_b * T + o_t.to(tl.int64)[:, None]) * D + o_d[None, :]
    tl.store(
        p_dx, narrow(b_dx, dx_ptr.dtype.element_ty), mask=((o_t >= 0) & (o_t < T))[:, None] & m_d[None, :]
    )
    p_ds = dstate_ptr + (i_b * D + o_d.to(tl.int64)[None, :]) * (WIDTH - 1) + (o_t + WIDTH - 1)[:, None]
    tl.store(p_ds, b_dx, mask=(o_t < 0)[:, None] & m_d[None, :])
