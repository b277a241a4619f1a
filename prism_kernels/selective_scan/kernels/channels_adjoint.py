"""The adjoint of the state at the start of every part of a sequence that is cut in time.

Parts are independent here: each starts from zero. The backward leads its adjoint through the parts after it.
"""

import triton
import triton.language as tl

from .channels import channels_of, load_tokens, rows_of
from .exponential import ACCURATE, decay_of_span, decay_rise, fast_is_right, pole, rates
from .numbers import conj, load_number, plus, plus_product, product, scaled, store_number, zeros
from .streams import gate, step_size


@triton.jit
def adjoint_after(
    m, A, ends_ptr, totals_ptr, i_first, last, i_split, o_c, o_n, m_c, mask, N: tl.constexpr,
    CHANNELS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """The adjoint that a part ends in: m, that of the whole sequence's end, led back through later parts."""
    PLANES: tl.constexpr = 1 if REAL else 2
    for i in range(last - i_split):
        i_part = i_first + last - i
        time = tl.load(totals_ptr + i_part * CHANNELS + o_c, mask=m_c, other=0.0)[None, :]
        p_end = ends_ptr + ((i_part * CHANNELS + o_c)[None, :] * N + o_n) * PLANES
        end = load_number(p_end, mask, m[0].dtype, REAL)
        m = plus_product(end, conj(decay_of_span(time, A)), m)
    return m


@triton.jit
def walk_back(
    A, C, bias, m_c, mask, p_dy, p_dt, p_C, p_z, tokens, DY_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr,
    C_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr, UNROLL: tl.constexpr, KAPPA: tl.constexpr,
    REAL: tl.constexpr, SOFTPLUS: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """m <- conj(a_t) (m + kappa g_t C_t) from the last token, where pointers point, to the first; sum dt."""
    rate = rates(conj(A), FAST)
    m = zeros(mask.shape[0], mask.shape[1], ACC, REAL)
    time = tl.zeros(m_c.shape, tl.float64)
    gs = load_tokens(p_dy, DY_STRIDE, 0, tokens, m_c, UNROLL)
    dts = load_tokens(p_dt, DT_STRIDE, 0, tokens, m_c, UNROLL)
    for t in range(0, tokens, UNROLL):
        g_next = load_tokens(p_dy + UNROLL * DY_STRIDE, DY_STRIDE, t + UNROLL, tokens, m_c, UNROLL)
        dt_next = load_tokens(p_dt + UNROLL * DT_STRIDE, DT_STRIDE, t + UNROLL, tokens, m_c, UNROLL)
        for i in tl.static_range(UNROLL):
            here = m_c & (t + i < tokens)
            g = KAPPA * gs[i].to(ACC)
            if p_z is not None:
                g *= gate(tl.load(p_z + i * Z_STRIDE, mask=here, other=0.0).to(ACC), FAST)[0]
            dt = dts[i].to(ACC)
            if bias is not None:
                dt += bias
            dt = tl.where(here, step_size(dt, SOFTPLUS, FAST)[0], 0.0)
            if p_C is not None:
                C = load_number(p_C + i * C_STRIDE, mask & (t + i < tokens), ACC, REAL)
            m = plus(m, scaled(C, g))
            E = decay_rise(dt, rate, FAST)
            if FAST == ACCURATE:
                m = plus(m, product(E, m))
            else:
                m = plus_product(m, E, m)
            time += dt
        gs, dts = g_next, dt_next
        p_dy += UNROLL * DY_STRIDE
        p_dt += UNROLL * DT_STRIDE
        if p_C is not None:
            p_C += UNROLL * C_STRIDE
        if p_z is not None:
            p_z += UNROLL * Z_STRIDE
    return m, time


@triton.jit(do_not_specialize=["T", "SPAN"])
def scan_adjoint(
    # inputs
    dy_ptr, dt_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, bounds_ptr,
    # outputs
    ends_ptr, totals_ptr,
    # sizes and strides
    T, SPAN, dt_stride_b, dt_stride_h, z_stride_b, z_stride_h, z_stride_p, C_stride_b, C_stride_g, C_stride_p,
    DT_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    G: tl.constexpr, N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
    REAL: tl.constexpr, EULER: tl.constexpr, TOKEN_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, FAST: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The adjoint before the first token of every part, and the sum of its step sizes, in float64.

    Grid: (sequences x SPLITS x groups x channel blocks,); parts have SPAN tokens.
    """
    ACC: tl.constexpr = ends_ptr.dtype.element_ty
    PLANES: tl.constexpr = 1 if REAL else 2
    KAPPA: tl.constexpr = 1.0 if REAL else 2.0
    CHANNELS: tl.constexpr = H * P
    OF_GROUP: tl.constexpr = CHANNELS // G
    BLOCKS: tl.constexpr = (OF_GROUP + BLOCK_C - 1) // BLOCK_C
    SIGN: tl.constexpr = -1 if REVERSE else 1
    i_s = (tl.program_id(0) // (SPLITS * G * BLOCKS)).to(tl.int64)
    i_split = tl.program_id(0) // (G * BLOCKS) % SPLITS
    i_g = tl.program_id(0) // BLOCKS % G
    i_b, start, length, _ = rows_of(bounds_ptr, i_s, T, 1, bounds_ptr is not None)
    origin = start + length - 1 if REVERSE else start
    tokens = tl.maximum(tl.minimum(length - i_split * SPAN, SPAN), 0)
    last = origin + SIGN * (i_split * SPAN + tokens - 1)
    o_n = tl.arange(0, BLOCK_N)[:, None]
    m_c, o_c, head, lane = channels_of(i_g, tl.program_id(0) % BLOCKS, OF_GROUP, P, BLOCK_C)
    m_c, o_c, head, lane = m_c[None, :], o_c[None, :], head[None, :], lane[None, :]
    mask = m_c & (o_n < N)

    A = pole(load_number(A_ptr + (head * N + o_n) * PLANES, mask, ACC, REAL))
    p_C = None
    C = A
    if TOKEN_C:
        p_C = C_ptr + i_b * C_stride_b + last * C_STRIDE + i_g * C_stride_g + o_n * PLANES + 0 * o_c
    else:
        C = load_number(C_ptr + head * C_stride_g + lane * C_stride_p + o_n * PLANES, mask, ACC, REAL)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + head, mask=m_c, other=0.0).to(ACC)
    p_dy = dy_ptr + (i_b * T + last) * CHANNELS + o_c
    p_dt = dt_ptr + i_b * dt_stride_b + last * DT_STRIDE + head * dt_stride_h
    p_z = None
    if z_ptr is not None:
        p_z = z_ptr + i_b * z_stride_b + last * Z_STRIDE + head * z_stride_h + lane * z_stride_p
    if fast_is_right(A, mask, EULER, FAST):
        m, time = walk_back(
            A, C, bias, m_c, mask, p_dy, p_dt, p_C, p_z, tokens, -SIGN * CHANNELS, -SIGN * DT_STRIDE,
            -SIGN * C_STRIDE, -SIGN * Z_STRIDE, UNROLL, KAPPA, REAL, SOFTPLUS, FAST, ACC,
        )  # fmt: skip
    else:  # rare, and short
        m, time = walk_back(
            A, C, bias, m_c, mask, p_dy, p_dt, p_C, p_z, tokens, -SIGN * CHANNELS, -SIGN * DT_STRIDE,
            -SIGN * C_STRIDE, -SIGN * Z_STRIDE, 1, KAPPA, REAL, SOFTPLUS, ACCURATE, ACC,
        )  # fmt: skip
    i_part = i_s * SPLITS + i_split
    store_number(ends_ptr + ((i_part * CHANNELS + o_c) * N + o_n) * PLANES, m, mask)
    tl.store(totals_ptr + i_part * CHANNELS + o_c, time, mask=m_c)
