"""Backward of the scan, channelwise: states and channels c = h P + p in the lanes, time as the loop.

A program walks one sequence x channel block from its last segment to its first, with tiles
[BLOCK_N, BLOCK_C]. What is elementwise in tokens and channels (step size, gate, skip) is done a segment at a
time before and after the walk, in the program's scratch. README.md has the algebra, section "The channelwise
backward".
"""

import triton
import triton.language as tl

from ..._core.tl_math import exp2_approx, opaque
from .channels import channels_of, rows_of
from .channels_adjoint import adjoint_after
from .exponential import (
    ACCURATE,
    LOG2E,
    MUFU,
    TURN,
    decay,
    decay_and_inverse,
    pole,
    rates,
    reciprocal,
    weight_slope,
)
from .numbers import (
    load_number,
    minus,
    over,
    pick,
    plus,
    product,
    product_conj,
    real_dot,
    scaled,
    store_number,
    total,
    zero_like,
    zeros,
)
from .streams import finish, prepare

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def discretised(dt, A, inv, EULER: tl.constexpr, FAST: tl.constexpr):
    """a = exp(dt A), E = a - 1 and the weight w = E / A of a step, each to rounding. Euler: E = w = dt, and
    in a fast call a real a is one instruction's.
    """
    if EULER and FAST != ACCURATE and len(A) == 1:
        a = (exp2_approx(dt * (A[0] * LOG2E), FAST == MUFU),)
        E = a
    else:
        a, E = decay(dt, A)
    if EULER:
        w = zero_like(A)
        if len(A) == 1:
            w = (dt + w[0],)
        else:
            w = dt + w[0], w[1]
        return a, w, w
    else:
        return a, E, product(E, inv)


@triton.jit
def rerun(
    h, A, inv, B, p_B, B_stride, k_u, k_dt, p_rows, tokens, mask, EULER: tl.constexpr, FAST: tl.constexpr,
    TOKEN_B: tl.constexpr, BLOCK_C: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Run the tokens of a segment forward from state h; the state before each goes to scratch."""
    for j in range(tokens):
        store_number(p_rows + j * ROW, h, mask)
        u = tl.load(k_u + j * BLOCK_C)[None, :]
        dt = tl.load(k_dt + j * BLOCK_C)[None, :]
        if TOKEN_B:
            B = load_number(p_B + j * B_stride, mask, A[0].dtype, len(A) == 1)
        a, _, w = discretised(dt, A, inv, EULER, FAST)
        h = plus(product(a, h), scaled(product(w, B), u))


@triton.jit
def state_after(ends, o_state, mask, ACC: tl.constexpr, REAL: tl.constexpr):
    """The state that a segment ends in: the start of the next, or the last of all. Masks choose between the
    two, for a pointer chosen by a branch does not compile for AMD on Triton 3.6.
    """
    p_next, p_last, is_last = ends
    after = load_number(p_next + o_state, mask & (is_last == 0), ACC, REAL)
    return pick(is_last, load_number(p_last + o_state, mask & is_last, ACC, REAL), after)


@triton.jit
def walk(
    p_numbers, places, B_stride, C_stride, part_stride, kept, p_rows, D, tokens, stored, m_c, N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, REAL: tl.constexpr,
    EULER: tl.constexpr, TOKEN_B: tl.constexpr, TOKEN_C: tl.constexpr, GATED: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Walk back through a segment by the recurrence as it stands, right for any pole and step size.

    The state before a token is read where states are to be `stored` (ALWAYS in accurate calls, and where to
    run a segment again costs no more than to divide by decays): the segment is run again for that. Otherwise
    it is (h_t - w_t B_t u_t) / a_t. The states are done in PARTS, one after another: a part has a register
    for everything. The adjoint and the sums over time come and go by memory.
    """
    p_A, p_B, p_C, p_dB, p_dC, p_start, ends = places
    k_u, k_dt, k_g, k_du, k_ddt, k_y = kept
    ACC: tl.constexpr = k_u.dtype.element_ty
    PLANES: tl.constexpr = 1 if REAL else 2
    KAPPA: tl.constexpr = 1.0 if REAL else 2.0
    ALWAYS: tl.constexpr = FAST == ACCURATE or (REAL and EULER)
    ROWS_N: tl.constexpr = BLOCK_N // PARTS
    ROW: tl.constexpr = ROWS_N * BLOCK_C * PLANES
    TILE: tl.constexpr = BLOCK_N * BLOCK_C * PLANES
    o_tile = (tl.arange(0, ROWS_N)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]) * PLANES
    p_row = p_rows + o_tile
    for part in range(PARTS):
        o_n = part * ROWS_N + tl.arange(0, ROWS_N)
        m_n = o_n < N
        mask = m_n[:, None] & m_c[None, :]
        o_state = o_n[:, None] * PLANES
        A = pole(load_number(p_A + o_state, mask, ACC, REAL))
        inv = reciprocal(A)
        B = load_number(p_B + o_state, mask, ACC, REAL)
        C = load_number(p_C + o_state, mask, ACC, REAL)
        p_number = p_numbers + part * ROW + o_tile
        m = load_number(p_number, mask, ACC, REAL)
        dA = load_number(p_number + TILE, mask, ACC, REAL)
        dB = load_number(p_number + 2 * TILE, mask, ACC, REAL)
        dC = load_number(p_number + 3 * TILE, mask, ACC, REAL)
        if ALWAYS or stored:
            h = load_number(p_start + o_state, mask, ACC, REAL)
            rerun(
                h, A, inv, B, p_B + o_state, B_stride, k_u, k_dt, p_row, tokens, mask, EULER, FAST,
                TOKEN_B, BLOCK_C, ROW,
            )  # fmt: skip
            tl.debug_barrier()
        h = state_after(ends, o_state, mask, ACC, REAL)
        for j_back in range(tokens):
            j = tokens - 1 - j_back
            u = tl.load(k_u + j * BLOCK_C)
            dt = tl.load(k_dt + j * BLOCK_C)[None, :]
            g = tl.load(k_g + j * BLOCK_C)
            if TOKEN_B:
                B = load_number(p_B + o_state + j * B_stride, mask, ACC, REAL)
            if TOKEN_C:
                C = load_number(p_C + o_state + j * C_stride, mask, ACC, REAL)
            a, E, w = discretised(dt, A, inv, EULER, FAST)
            wB = product(w, B)
            x = scaled(wB, u[None, :])
            # the state before, and what is left of it; a branch would keep all of this in registers
            if ALWAYS:
                old = product(a, load_number(p_row + j * ROW, mask, ACC, REAL))
            else:
                row = load_number(p_row + j * ROW, mask & stored, ACC, REAL)
                old = pick(stored, product(a, row), minus(h, x))
                h = pick(stored, row, over(old, a))
            l = plus(m, scaled(C, g[None, :]))
            ul = scaled(l, u[None, :])
            dw = product_conj(ul, B)
            q = product_conj(l, old)
            dA = plus(dA, scaled(q, dt))
            if EULER:
                ddt = real_dot(q, A, 0) + tl.sum(dw[0], axis=0)
            else:
                ddt = real_dot(q, A, 0) + real_dot(dw, a, 0)
                dA = plus(dA, product_conj(dw, weight_slope(dt, A, inv, a, w)))
            if TOKEN_B:
                p_part = p_dB + o_n * PLANES + j * part_stride
                store_number(p_part, total(product_conj(ul, w), 1), m_n)
            else:
                dB = plus(dB, product_conj(ul, E))
            after = scaled(plus(old, x), g[None, :])
            if TOKEN_C:
                store_number(p_dC + o_n * PLANES + j * part_stride, total(after, 1), m_n)
            else:
                dC = plus(dC, after)
            m = product_conj(l, a)
            du = real_dot(l, wB, 0) + tl.where(part == 0, D * g * (1 / KAPPA), 0.0)
            du += tl.load(k_du + j * BLOCK_C, mask=m_c & (part > 0), other=0.0)
            ddt += tl.load(k_ddt + j * BLOCK_C, mask=m_c & (part > 0), other=0.0)
            tl.store(k_du + j * BLOCK_C, du)
            tl.store(k_ddt + j * BLOCK_C, ddt)
            if GATED:
                y = KAPPA * real_dot(plus(old, x), C, 0) + tl.where(part == 0, D * u, 0.0)
                y += tl.load(k_y + j * BLOCK_C, mask=m_c & (part > 0), other=0.0)
                tl.store(k_y + j * BLOCK_C, y)
        store_number(p_number, m, mask)
        store_number(p_number + TILE, dA, mask)
        store_number(p_number + 2 * TILE, dB, mask)
        store_number(p_number + 3 * TILE, dC, mask)


@triton.jit
def walk_by_differences(
    m, sums, p_A, p_B, p_C, ends, o_n, mask, D, k_u, tokens, driven, BLOCK_C: tl.constexpr,
    AREA: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Walk back through a segment with v = h + B u / A: for complex poles, static B and C, and calls that are
    fast or have 16-bit inputs.

    No weight, no slope and no stored state; the caller knows that the segment decays little and turns enough.
    """
    ACC: tl.constexpr = k_u.dtype.element_ty
    KAPPA: tl.constexpr = 2.0
    h = state_after(ends, o_n * 2, mask, ACC, False)
    A = pole(load_number(p_A + o_n * 2, mask, ACC, False))
    B = load_number(p_B + o_n * 2, mask, ACC, False)
    C = load_number(p_C + o_n * 2, mask, ACC, False)
    rate = rates(A, FAST)
    shift = over(B, A)
    skip = D * (1 / KAPPA) - real_dot(shift, C, 0)
    dA, dB, dC = sums
    k_j = k_u + (tokens - 1) * BLOCK_C
    u = tl.load(k_j)
    v = plus(h, scaled(shift, u[None, :]))
    dA = plus(dA, product_conj(dB, over(shift, A)))
    dB = minus(dB, scaled(m, u[None, :]))
    drawn = real_dot(shift, m, 0)
    for _ in range(tokens):
        u_before = tl.load(k_j - BLOCK_C)
        dt = tl.load(k_j + AREA)[None, :]
        g = tl.load(k_j + 2 * AREA)
        if GATED:
            tl.store(k_j + 5 * AREA, KAPPA * (real_dot(v, C, 0) + skip * u))
        a, back = decay_and_inverse(dt, rate, FAST)
        l = plus(m, scaled(C, g[None, :]))
        dC = plus(dC, scaled(v, g[None, :]))
        q = product_conj(l, v)
        dA = plus(dA, scaled(q, dt))
        if FAST == ACCURATE:
            ddt = real_dot(q, rate, 0)
        else:
            ddt = LN2 * tl.sum(q[0] * rate[0], axis=0) + TURN * tl.sum(q[1] * rate[1], axis=0)
        m = product_conj(l, a)
        du = skip * g - drawn
        drawn = real_dot(shift, m, 0)
        tl.store(k_j + 3 * AREA, du + drawn)
        tl.store(k_j + 4 * AREA, ddt)
        rise = (u - u_before)[None, :]
        dB = plus(dB, scaled(m, rise))
        v = minus(product(v, back), scaled(shift, rise))
        u = u_before
        k_j -= BLOCK_C
    dC = minus(dC, scaled(shift, driven[None, :]))
    dB = minus(dB, scaled(C, driven[None, :]))
    A = pole(load_number(p_A + o_n * 2, mask, ACC, False))  # not kept meanwhile
    dA = minus(dA, product_conj(dB, over(shift, A)))
    return m, dA, dB, dC


@triton.jit(do_not_specialize=["T", "SPAN"])
def scan_backward(
    # inputs
    dy_ptr, u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, bounds_ptr, states_ptr, last_ptr,
    dlast_ptr, ends_ptr, totals_ptr,
    # outputs
    du_ptr, ddt_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, dh0_ptr, scratch_ptr,
    # sizes and strides
    T, SPAN,
    u_stride_b, u_stride_h, u_stride_p, dt_stride_b, dt_stride_h, z_stride_b, z_stride_h, z_stride_p,
    B_stride_b, B_stride_g, B_stride_p, C_stride_b, C_stride_g, C_stride_p,
    U_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr, B_STRIDE: tl.constexpr,
    C_STRIDE: tl.constexpr, H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENT: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, REAL: tl.constexpr, EULER: tl.constexpr, TOKEN_B: tl.constexpr, TOKEN_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SHIFTED: tl.constexpr, FAST: tl.constexpr,
    MOST_DECAY: tl.constexpr, LEAST_ANGLE: tl.constexpr, SPLITS: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """All gradients; those of A, B, C, D and the bias per part of a sequence and channel, ddt per channel.

    Of a B or C along time: per token and channel block. With SPLITS > 1, SPAN tokens each, a part finds the
    adjoint it starts from in what `scan_adjoint` left. Grid: (sequences x SPLITS x groups x channel blocks,).
    """
    ACC: tl.constexpr = states_ptr.dtype.element_ty
    PLANES: tl.constexpr = 1 if REAL else 2
    KAPPA: tl.constexpr = 1.0 if REAL else 2.0
    GATED: tl.constexpr = z_ptr is not None
    BIASED: tl.constexpr = bias_ptr is not None
    CHANNELS: tl.constexpr = H * P
    STATES: tl.constexpr = CHANNELS * N * PLANES
    OF_GROUP: tl.constexpr = CHANNELS // G
    BLOCKS: tl.constexpr = (OF_GROUP + BLOCK_C - 1) // BLOCK_C
    TILE: tl.constexpr = BLOCK_C * BLOCK_N * PLANES
    AREA: tl.constexpr = SEGMENT * BLOCK_C
    KEPT: tl.constexpr = 6 * AREA + 3 * BLOCK_C
    SCRATCH: tl.constexpr = KEPT + 4 * TILE + SEGMENT * (TILE // PARTS)
    SIGN: tl.constexpr = -1 if REVERSE else 1
    PART: tl.constexpr = G * BLOCKS * N * PLANES

    # sequence, group of heads, channels and states of this program
    i_s = (tl.program_id(0) // (SPLITS * G * BLOCKS)).to(tl.int64)
    i_split = tl.program_id(0) // (G * BLOCKS) % SPLITS
    i_g = tl.program_id(0) // BLOCKS % G
    i_c = tl.program_id(0) % BLOCKS
    i_b, start, length, row = rows_of(bounds_ptr, i_s, T, SEGMENT, bounds_ptr is not None)
    origin = start + length - 1 if REVERSE else start
    o_n = tl.arange(0, BLOCK_N)[:, None]
    o_tile = (o_n * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]) * PLANES
    p_scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * SCRATCH
    tl.store(p_scratch + tl.arange(0, BLOCK_C), tl.zeros([BLOCK_C], ACC))  # no token before a segment's first

    # adjoint of the state, and sums over time
    m_c, o_c, head, lane = channels_of(i_g, i_c, OF_GROUP, P, BLOCK_C)
    m = zeros(BLOCK_N, BLOCK_C, ACC, REAL)
    if dlast_ptr is not None:
        p_last = dlast_ptr + i_s * STATES + (o_c[None, :] * N + o_n) * PLANES
        m = load_number(p_last, m_c[None, :] & (o_n < N), ACC, REAL)
    before = 0  # segments
    part = length
    if SPLITS > 1:
        before = i_split * SPAN // SEGMENT
        part = tl.maximum(tl.minimum(length - i_split * SPAN, SPAN), 0)
        mask = m_c[None, :] & (o_n < N)
        A = pole(load_number(A_ptr + (head[None, :] * N + o_n) * PLANES, mask, ACC, REAL))
        m = adjoint_after(
            m, A, ends_ptr, totals_ptr, i_s * SPLITS, SPLITS - 1, i_split, o_c, o_n, m_c, mask, N, CHANNELS,
            REAL,
        )  # fmt: skip
    sums = zero_like(m), zero_like(m), zero_like(m)
    dD = tl.zeros([BLOCK_C], ACC)
    dbias = tl.zeros([BLOCK_C], ACC)

    segments = tl.cdiv(part, SEGMENT)
    for i in range(segments):
        # places of the segment's first token in the scan's direction; the block's number is hidden from the
        # compiler, since it would keep a register for every address from one segment to the next
        number = before + segments - 1 - i
        tokens = opaque(tl.minimum(SEGMENT, length - number * SEGMENT), NVIDIA)
        first = origin + SIGN * number * SEGMENT
        m_c, o_c, head, lane = channels_of(i_g, opaque(i_c, NVIDIA), OF_GROUP, P, BLOCK_C)
        mask = m_c[None, :] & (o_n < N)
        o_out = (i_b * T + first) * CHANNELS + o_c
        inputs = (
            u_ptr + i_b * u_stride_b + first * U_STRIDE + head * u_stride_h + lane * u_stride_p,
            dt_ptr + i_b * dt_stride_b + first * DT_STRIDE + head * dt_stride_h,
            dy_ptr + o_out,
            dy_ptr + o_out,
        )
        outputs = du_ptr + o_out, ddt_ptr + o_out, du_ptr + o_out
        if GATED:
            p_z = z_ptr + i_b * z_stride_b + first * Z_STRIDE + head * z_stride_h + lane * z_stride_p
            inputs = inputs[0], inputs[1], inputs[2], p_z
            outputs = outputs[0], outputs[1], dz_ptr + o_out
        p_bias = (bias_ptr if BIASED else dt_ptr) + head
        p_A = A_ptr + head[None, :] * (N * PLANES)
        if TOKEN_B:
            p_B = B_ptr + i_b * B_stride_b + first * B_STRIDE + i_g * B_stride_g + 0 * head[None, :]
        else:
            p_B = B_ptr + (head * B_stride_g + lane * B_stride_p)[None, :]
        if TOKEN_C:
            p_C = C_ptr + i_b * C_stride_b + first * C_STRIDE + i_g * C_stride_g + 0 * head[None, :]
        else:
            p_C = C_ptr + (head * C_stride_g + lane * C_stride_p)[None, :]
        o_part = (((i_b * T + first) * G + i_g) * BLOCKS + i_c) * (N * PLANES)
        o_state = o_c[None, :] * (N * PLANES)
        p_start = states_ptr + (row + number) * STATES + o_state
        is_last = (number + 1) * SEGMENT >= length
        ends = p_start + STATES, last_ptr + i_s * STATES + o_state, is_last

        k_u = p_scratch + BLOCK_C
        kept = k_u, k_u + AREA, k_u + 2 * AREA, k_u + 6 * AREA
        STRIDES: tl.constexpr = (SIGN * U_STRIDE, SIGN * DT_STRIDE, SIGN * CHANNELS, SIGN * Z_STRIDE)
        prepare(
            inputs, STRIDES, kept, p_bias, tokens, m_c, KAPPA, BLOCK_C, SOFTPLUS, GATED, BIASED, FAST, ROWS
        )  # fmt: skip
        tl.debug_barrier()
        k_u = k_u + tl.arange(0, BLOCK_C)
        time = tl.load(k_u + 6 * AREA)
        driven = tl.load(k_u + 6 * AREA + BLOCK_C)
        dD += driven
        D = tl.zeros([BLOCK_C], ACC)
        if D_ptr is not None:
            D += tl.load(D_ptr + o_c, mask=m_c, other=0.0).to(ACC)
        A = pole(load_number(p_A + o_n * PLANES, mask, ACC, REAL))
        decayed = tl.max(tl.max(tl.where(mask, -A[0], 0.0) * time[None, :], axis=0), axis=0)
        stored = (decayed <= MOST_DECAY) == 0
        difference = stored != stored
        if SHIFTED:
            angle = tl.maximum(tl.abs(A[0]), tl.abs(A[1])) * time[None, :]
            angle = tl.min(tl.min(tl.where(mask, angle, float("inf")), axis=0), axis=0)
            difference = (stored == 0) & (angle >= LEAST_ANGLE * tokens)
        if difference:
            if SHIFTED:
                m, dA, dB, dC = walk_by_differences(
                    m, sums, p_A, p_B, p_C, ends, o_n, mask, D, k_u, tokens, driven, BLOCK_C, AREA,
                    GATED, FAST,
                )  # fmt: skip
                sums = dA, dB, dC
        else:
            p_numbers = p_scratch + KEPT
            store_number(p_numbers + o_tile, m, mask)
            store_number(p_numbers + TILE + o_tile, sums[0], mask)
            store_number(p_numbers + 2 * TILE + o_tile, sums[1], mask)
            store_number(p_numbers + 3 * TILE + o_tile, sums[2], mask)
            tl.debug_barrier()
            places = p_A, p_B, p_C, dB_ptr + o_part, dC_ptr + o_part, p_start, ends
            areas = k_u, k_u + AREA, k_u + 2 * AREA, k_u + 3 * AREA, k_u + 4 * AREA, k_u + 5 * AREA
            walk(
                p_numbers, places, SIGN * B_STRIDE, SIGN * C_STRIDE, SIGN * PART, areas, p_numbers + 4 * TILE,
                D, tokens, stored, m_c, N, BLOCK_C, BLOCK_N, PARTS, REAL, EULER, TOKEN_B, TOKEN_C,
                GATED, FAST,
            )  # fmt: skip
            tl.debug_barrier()
            m = load_number(p_numbers + o_tile, mask, ACC, REAL)
            dA = load_number(p_numbers + TILE + o_tile, mask, ACC, REAL)
            dB = load_number(p_numbers + 2 * TILE + o_tile, mask, ACC, REAL)
            dC = load_number(p_numbers + 3 * TILE + o_tile, mask, ACC, REAL)
            sums = dA, dB, dC
        tl.debug_barrier()
        k_done = p_scratch + BLOCK_C + 3 * AREA
        done = k_done, k_done + AREA, k_done + 2 * AREA
        dbias += finish(
            inputs, STRIDES, done, outputs, p_bias, tokens, m_c, BLOCK_C, SOFTPLUS, GATED, BIASED, FAST, ROWS
        )  # fmt: skip
        tl.debug_barrier()

    m_c, o_c, head, lane = channels_of(i_g, opaque(i_c, NVIDIA), OF_GROUP, P, BLOCK_C)
    mask = m_c[None, :] & (o_n < N)
    o_state = (o_c[None, :] * N + o_n) * PLANES
    o_sum = (i_s * SPLITS + i_split) * STATES + o_state
    dA, dB, dC = sums
    store_number(dA_ptr + o_sum, dA, mask)
    if not TOKEN_B:
        if not EULER:
            A = pole(load_number(A_ptr + (head[None, :] * N + o_n) * PLANES, mask, ACC, REAL))
            dB = product_conj(dB, reciprocal(A))
        store_number(dB_ptr + o_sum, dB, mask)
    if not TOKEN_C:
        store_number(dC_ptr + o_sum, dC, mask)
    store_number(dh0_ptr + i_s * STATES + o_state, m, mask & (i_split == 0))
    o_sum = (i_s * SPLITS + i_split) * CHANNELS + o_c
    tl.store(dD_ptr + o_sum, dD * (1 / KAPPA), mask=m_c)
    tl.store(dbias_ptr + o_sum, dbias, mask=m_c)
