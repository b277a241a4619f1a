"""Triton kernels of the depthwise causal convolution: forward, backward, and the update of a decoder's state.

Forward and backward run over rows: the tokens, with W-1 rows more before each sequence that stand for its
initial state at positions -(W-1)..-1. A dense batch is one sequence for each i_b; packed sequences share one
row of x, and each row of a block finds its own sequence. States are r[B or S,W-1,D] here, channels last as x.
"""

import triton
import triton.language as tl

from .._core.tl_math import narrow


@triton.jit
def locate(cu_ptr, i_b, o_r, T, S, STEPS, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """Sequence of each row o_r, where it starts, its length, and the row's position in it.

    Padding after the last sequence has positions past that sequence's end. STEPS halvings search S sequences.
    """
    o_s = tl.zeros_like(o_r)
    if PACKED:
        o_last = o_s + (S - 1)
        for _ in range(STEPS):
            o_mid = (o_s + o_last) // 2
            o_end = tl.load(cu_ptr + o_mid + 1).to(tl.int32) + (o_mid + 1) * (WIDTH - 1)
            m_after = (o_s < o_last) & (o_end <= o_r)
            o_s, o_last = tl.where(m_after, o_mid + 1, o_s), tl.where(m_after, o_last, o_mid)
        o_start = tl.load(cu_ptr + o_s).to(tl.int32)
        o_len = tl.load(cu_ptr + o_s + 1).to(tl.int32) - o_start
        return o_s.to(tl.int64), o_start, o_len, o_r - o_start - (o_s + 1) * (WIDTH - 1)
    else:
        return o_s + i_b, o_s, o_s + T, o_r - (WIDTH - 1)


@triton.jit
def block(row_blocks, CHANNEL_BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows and channels of this program, its batch entry, and its place among all blocks of rows.

    One axis of the grid holds all three, since the others end at 65,535. Channels are innermost and time is
    next: programs that run together read whole tokens, and share those where their blocks of rows meet.
    """
    i_d, i_block = tl.program_id(0) % CHANNEL_BLOCKS, tl.program_id(0) // CHANNEL_BLOCKS
    o_r = i_block % row_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    return o_r, o_d, (i_block // row_blocks).to(tl.int64), i_block.to(tl.int64)


@triton.jit
def document_of(ids_ptr, o_p, T, HAS_IDS: tl.constexpr):
    """Document of the tokens at o_p, negative outside any; 0 where documents are not marked."""
    if HAS_IDS:
        return tl.load(ids_ptr + o_p, mask=(o_p >= 0) & (o_p < T), other=-1)
    else:
        return tl.zeros_like(o_p)


@triton.jit
def load_input(
    x_ptr, state_ptr, ids_ptr, o_s, o_start, o_len, o_p, o_id, o_d, T, D, stride_xt, stride_xd,
    WIDTH: tl.constexpr, HAS_STATE: tl.constexpr, HAS_IDS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Input at positions o_p: x inside sequence and document, the initial state before, zero elsewhere."""
    m_d = (o_d < D)[None, :]
    m_x = (o_p >= 0) & (o_p < o_len)
    if HAS_IDS:
        m_x = m_x & (document_of(ids_ptr, o_p, T, HAS_IDS) == o_id) & (o_id >= 0)
    o_t = (o_start + o_p).to(tl.int64)
    p_x = x_ptr + o_t[:, None] * stride_xt + o_d.to(tl.int64)[None, :] * stride_xd
    b_x = tl.load(p_x, mask=m_x[:, None] & m_d, other=0.0).to(ACC)
    if HAS_STATE:
        m_s = ((o_p < 0) & (o_p > -WIDTH))[:, None] & m_d
        p_s = state_ptr + ((o_s + 1) * (WIDTH - 1) + o_p)[:, None] * D + o_d[None, :]
        b_x += tl.load(p_s, mask=m_s, other=0.0).to(ACC)
    return b_x


@triton.jit
def preactivation(
    x_ptr, weight_ptr, bias_ptr, state_ptr, ids_ptr, o_s, o_start, o_len, o_p, o_id, o_d, T, D,
    stride_xt, stride_xd, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_IDS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """bias + sum_j weight[:, j] x_{p-W+1+j} at positions o_p; and the input at o_p."""
    b_z = tl.zeros([o_p.shape[0], o_d.shape[0]], dtype=ACC)
    if HAS_BIAS:
        b_z += tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0).to(ACC)[None, :]
    for j in tl.static_range(WIDTH):
        b_w = tl.load(weight_ptr + o_d * WIDTH + j, mask=o_d < D, other=0.0).to(ACC)
        b_x = load_input(
            x_ptr, state_ptr, ids_ptr, o_s, o_start, o_len, o_p - (WIDTH - 1 - j), o_id, o_d, T, D,
            stride_xt, stride_xd, WIDTH, HAS_STATE, HAS_IDS, ACC,
        )  # fmt: skip
        b_z += b_x * b_w[None, :]
    return b_z, b_x


@triton.jit(do_not_specialize=["T", "S", "STEPS", "row_blocks"])
def causal_conv1d_fwd_kernel(
    y_ptr, final_ptr,
    x_ptr, weight_ptr, bias_ptr, state_ptr, cu_ptr, ids_ptr,
    T, D, S, STEPS, row_blocks, stride_xb, stride_xt, stride_xd,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr, HAS_IDS: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y r[B,T,D] and final r[B or S,W-1,D], contiguous. Grid: (B x blocks of rows x channel blocks,)."""
    o_r, o_d, i_b, _ = block(row_blocks, CHANNEL_BLOCKS, BLOCK_T, BLOCK_D)
    m_d = (o_d < D)[None, :]
    o_s, o_start, o_len, o_p = locate(cu_ptr, i_b, o_r, T, S, STEPS, WIDTH, PACKED)
    x_ptr += i_b * stride_xb
    if HAS_IDS:
        ids_ptr += i_b * T
    o_id = document_of(ids_ptr, o_p, T, HAS_IDS)
    b_z, b_x = preactivation(
        x_ptr, weight_ptr, bias_ptr, state_ptr, ids_ptr, o_s, o_start, o_len, o_p, o_id, o_d, T, D,
        stride_xt, stride_xd, WIDTH, HAS_BIAS, HAS_STATE, HAS_IDS, ACC,
    )  # fmt: skip
    if SILU:
        b_z = b_z / (1.0 + tl.exp(-b_z))
    if PACKED or HAS_IDS:
        b_z = tl.where(((o_p < o_len) & (o_id >= 0))[:, None], b_z, 0.0)
    o_t = o_start + o_p
    p_y = y_ptr + (i_b * T + o_t.to(tl.int64)[:, None]) * D + o_d[None, :]
    tl.store(p_y, narrow(b_z, y_ptr.dtype.element_ty), mask=((o_p >= 0) & (o_t < T))[:, None] & m_d)
    o_f = o_p - o_len + (WIDTH - 1)
    m_f = (o_f >= 0) & (o_p < o_len)
    p_f = final_ptr + (o_s * (WIDTH - 1) + o_f)[:, None] * D + o_d[None, :]
    tl.store(p_f, narrow(b_x, final_ptr.dtype.element_ty), mask=m_f[:, None] & m_d)


@triton.jit(do_not_specialize=["T", "S", "STEPS", "row_blocks"])
def causal_conv1d_bwd_kernel(
    dx_ptr, dweight_ptr, dbias_ptr, dstate_ptr,
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr, cu_ptr, ids_ptr,
    T, D, S, STEPS, row_blocks, stride_xb, stride_xt, stride_xd, stride_yb, stride_yt, stride_yd,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr, HAS_IDS: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx r[B,T,D], dstate r[B or S,W-1,D], and dweight r[blocks,D,W], dbias r[blocks,D] in parts.

    Grid: (B x blocks of rows x channel blocks,). dz at positions p..p+W-1 is recomputed, not stored.
    """
    o_r, o_d, i_b, i_part = block(row_blocks, CHANNEL_BLOCKS, BLOCK_T, BLOCK_D)
    m_d = o_d < D
    o_s, o_start, o_len, o_p = locate(cu_ptr, i_b, o_r, T, S, STEPS, WIDTH, PACKED)
    x_ptr += i_b * stride_xb
    if HAS_IDS:
        ids_ptr += i_b * T
    o_id = document_of(ids_ptr, o_p, T, HAS_IDS)
    b_dx = tl.zeros([BLOCK_T, BLOCK_D], dtype=ACC)
    for d in tl.static_range(WIDTH):
        o_q = o_p + d
        m_q = (o_q >= 0) & (o_q < o_len)
        if HAS_IDS:
            m_q = m_q & (document_of(ids_ptr, o_q, T, HAS_IDS) == o_id) & (o_id >= 0)
        m_q = m_q[:, None] & m_d[None, :]
        o_t = (o_start + o_q).to(tl.int64)
        p_dy = dy_ptr + i_b * stride_yb + o_t[:, None] * stride_yt + o_d.to(tl.int64)[None, :] * stride_yd
        b_dz = tl.load(p_dy, mask=m_q, other=0.0).to(ACC)
        if SILU:
            b_z, _ = preactivation(
                x_ptr, weight_ptr, bias_ptr, state_ptr, ids_ptr, o_s, o_start, o_len, o_q, o_id, o_d, T, D,
                stride_xt, stride_xd, WIDTH, HAS_BIAS, HAS_STATE, HAS_IDS, ACC,
            )  # fmt: skip
            b_sig = 1.0 / (1.0 + tl.exp(-b_z))
            b_dz = tl.where(m_q, b_dz * b_sig * (1.0 + b_z * (1.0 - b_sig)), 0.0)
        b_w = tl.load(weight_ptr + o_d * WIDTH + (WIDTH - 1 - d), mask=m_d, other=0.0).to(ACC)
        b_dx += b_dz * b_w[None, :]
        if d == 0:
            tl.store(dbias_ptr + i_part * D + o_d, tl.sum(b_dz, 0), mask=m_d)
            for j in tl.static_range(WIDTH):
                b_x = load_input(
                    x_ptr, state_ptr, ids_ptr, o_s, o_start, o_len, o_p - (WIDTH - 1 - j), o_id, o_d, T, D,
                    stride_xt, stride_xd, WIDTH, HAS_STATE, HAS_IDS, ACC,
                )  # fmt: skip
                tl.store(dweight_ptr + (i_part * D + o_d) * WIDTH + j, tl.sum(b_dz * b_x, 0), mask=m_d)
    o_f = o_p - o_len + (WIDTH - 1)
    m_f = ((o_f >= 0) & (o_p < o_len))[:, None] & m_d[None, :]
    p_f = dfinal_ptr + (o_s * (WIDTH - 1) + o_f)[:, None] * D + o_d[None, :]
    b_dx += tl.load(p_f, mask=m_f, other=0.0).to(ACC)
    o_t = o_start + o_p
    m_x = ((o_p >= 0) & (o_t < T))[:, None] & m_d[None, :]
    p_dx = dx_ptr + (i_b * T + o_t.to(tl.int64)[:, None]) * D + o_d[None, :]
    tl.store(p_dx, narrow(b_dx, dx_ptr.dtype.element_ty), mask=m_x)
    p_ds = dstate_ptr + ((o_s + 1) * (WIDTH - 1) + o_p)[:, None] * D + o_d[None, :]
    tl.store(p_ds, b_dx, mask=(o_p < 0)[:, None] & m_d[None, :])


@triton.jit
def load_recent(
    x_ptr, state_ptr, i_from, o_q, o_d, T, D, L, stride_xd, stride_xt, stride_sd, stride_sl,
    CIRCULAR: tl.constexpr,
):  # fmt: skip
    """Token o_q of x, or for o_q < 0 the entry that many before the state's end, r[BLOCK_D, len(o_q)]."""
    m_d, o_wide = (o_d < D)[:, None], o_d.to(tl.int64)[:, None]
    o_l = o_q + L
    if CIRCULAR:
        o_l = (i_from + o_l) % L
    p_x = x_ptr + o_wide * stride_xd + o_q.to(tl.int64)[None, :] * stride_xt
    p_s = state_ptr + o_wide * stride_sd + o_l.to(tl.int64)[None, :] * stride_sl
    b_x = tl.load(p_x, mask=m_d & ((o_q >= 0) & (o_q < T))[None, :], other=0.0)
    b_s = tl.load(p_s, mask=m_d & ((o_q < 0) & (o_q >= -L))[None, :], other=0.0)
    return tl.where((o_q >= 0)[None, :], b_x, b_s)


@triton.jit(do_not_specialize=["T"])
def causal_conv1d_update_kernel(
    y_ptr, state_ptr, x_ptr, weight_ptr, bias_ptr, seqlens_ptr, rows_ptr,
    T, D, L, stride_xb, stride_xd, stride_xt, stride_sb, stride_sd, stride_sl,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr,
    CIRCULAR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """y r[B,D,T] (contiguous); x enters state r[rows,D,L] in place. Grid: (B, channel blocks).

    A program owns its entries of the state and has read all it needs of them before it writes.
    """
    i_b, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_s, i_from = i_b, 0
    if HAS_ROWS:
        i_s = tl.load(rows_ptr + i_b).to(tl.int64)
    if CIRCULAR:
        i_from = (tl.load(seqlens_ptr + i_b) % L).to(tl.int32)
    o_l, o_d = tl.arange(0, BLOCK_L), i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[:, None]
    x_ptr += i_b * stride_xb
    state_ptr += tl.maximum(i_s, 0) * stride_sb
    for i_t in range(0, T, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        b_z = tl.zeros([BLOCK_D, BLOCK_T], dtype=ACC)
        if HAS_BIAS:
            b_z += tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0).to(ACC)[:, None]
        for j in tl.static_range(WIDTH):
            b_w = tl.load(weight_ptr + o_d * WIDTH + j, mask=o_d < D, other=0.0).to(ACC)
            b_x = load_recent(
                x_ptr, state_ptr, i_from, o_t - (WIDTH - 1 - j), o_d, T, D, L,
                stride_xd, stride_xt, stride_sd, stride_sl, CIRCULAR,
            )  # fmt: skip
            b_z += b_x.to(ACC) * b_w[:, None]
        if SILU:
            b_z = b_z / (1.0 + tl.exp(-b_z))
        b_z = tl.where(i_s >= 0, b_z, 0.0)
        p_y = y_ptr + (i_b * D + o_d[:, None]) * T + o_t[None, :]
        tl.store(p_y, narrow(b_z, y_ptr.dtype.element_ty), mask=m_d & (o_t < T)[None, :])
    # Token o_q goes to entry o_w; a circular state keeps the entries that no token replaces.
    o_q, o_w = o_l + (T - L), o_l
    m_s = (o_l < L) & (i_s >= 0)
    if CIRCULAR:
        o_w, m_s = (i_from + T + o_l) % L, m_s & (o_q >= 0)
    b_s = load_recent(
        x_ptr, state_ptr, i_from, o_q, o_d, T, D, L,
        stride_xd, stride_xt, stride_sd, stride_sl, CIRCULAR,
    )  # fmt: skip
    tl.debug_barrier()
    p_s = state_ptr + o_d.to(tl.int64)[:, None] * stride_sd + o_w.to(tl.int64)[None, :] * stride_sl
    tl.store(p_s, b_s, mask=m_d & m_s[None, :])
