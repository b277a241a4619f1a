"""Forward with a step size per head: one chunk after another, each as matrix products."""

import triton
import triton.language as tl

from ..._core.chunk_rows import span
from ..._core.tl_math import narrow
from .heads_common import (
    STIFF,
    across,
    chunks_of_part,
    decays,
    led,
    matmul,
    number_of_row,
    operands,
    parts,
    poles,
    rows_of_weights,
    single,
    slowest,
    split,
    split_planes,
    state_offsets,
    step_sizes,
    turn,
    turned,
)
from .numbers import as_column, as_row, load_number, real_product_conj, scaled, store_number, zeros


@triton.jit
def mixing_by_token(G, K, since, faster, steps, C: tl.constexpr):
    """The matrix of a chunk without a factor that grows: a column at a time."""
    o_c = tl.arange(0, C)
    M = tl.zeros([C, C], tl.float32)
    for s in tl.range(0, steps, disable_licm=True):
        ago = tl.sum(tl.where(o_c[None, :] == s, since, 0.0), 1)
        decay = tl.exp2(ago[:, None] * faster[None, :])
        read = tl.sum(decay * real_product_conj(G, number_of_row(K, o_c, s)), 1)
        M = tl.where(o_c[None, :] == s, read[:, None], M)
    return M


@triton.jit(do_not_specialize=["T", "SPAN"])
def heads_forward_kernel(
    p_u, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_first, p_bounds,
    p_parts, p_totals, p_y, p_final, p_states,
    T, SPAN, u_b, u_t, u_h, dt_b, dt_t, dt_h, z_b, z_t, z_h, B_b, B_t, B_g, C_b, C_t, C_g,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    B_HEADS: tl.constexpr, C_HEADS: tl.constexpr, REAL: tl.constexpr, EULER: tl.constexpr,
    SKIP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    FIRST: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, SAVE: tl.constexpr,
    ONE: tl.constexpr, TWO: tl.constexpr, PTX: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """y, the final state, and the state before every chunk of C tokens.

    B_HEADS and C_HEADS are the heads of a group, 0 where B or C is static; SKIP the channels of D, or 0. With
    SPLITS > 1, SPAN tokens each, a first launch without p_y leaves the state that each part ends in, from
    zero, in p_final, and the sum of its step sizes in p_totals; the second finds there (p_parts) what its
    part starts from. Grid (sequences * SPLITS * H * blocks of P).
    """
    NP: tl.constexpr = (P + BP - 1) // BP
    i_p, i_h = tl.program_id(0) % NP, (tl.program_id(0) // NP % H).to(tl.int64)
    i_part = (tl.program_id(0) // (NP * H)).to(tl.int64)
    i_s, i_split = i_part // SPLITS, i_part % SPLITS
    start, length, row = span(p_bounds, i_s, T, C, PACKED)
    i_b, first = (i_s * 0, start) if PACKED else (i_s, i_s * 0)
    PLANES: tl.constexpr = 1 if REAL else 2
    o_c, o_n, o_p = tl.arange(0, C), tl.arange(0, BN), i_p * BP + tl.arange(0, BP)
    m_p, m_state = (o_p < P)[None, :], (o_n < N)[:, None] & (o_p < P)[None, :]
    p_u += i_b * u_b + i_h * u_h
    p_dt += i_b * dt_b + i_h * dt_h
    p_z += i_b * z_b + i_h * z_h
    if p_y is not None:
        p_y += (start - first) * (H * P)
    if B_HEADS > 0:
        p_B += i_b * B_b + i_h // max(B_HEADS, 1) * B_g
    if C_HEADS > 0:
        p_C += i_b * C_b + i_h // max(C_HEADS, 1) * C_g

    slow, apart = slowest(p_A, i_h, N, BN, REAL)
    A, faster, turns, inv = poles(p_A, i_h, slow, o_n, N, REAL)
    bias = tl.load(p_bias + i_h).to(tl.float32) if BIAS else 0.0
    STATES: tl.constexpr = H * P * N * PLANES
    o_state = state_offsets(i_h, o_n, o_p, P, N, REAL)
    h = zeros(BN, BP, tl.float32, REAL)
    if FIRST:
        h = load_number(p_first + i_s * STATES + o_state, m_state, tl.float32, REAL)
    chunk, chunks = chunks_of_part(i_split, length, SPAN, C, SPLITS)
    if SPLITS > 1 and p_y is not None:
        h = led(
            h, p_parts, p_totals + i_h, i_s * SPLITS, i_split, o_state, m_state, slow, faster, turns,
            1, H, STATES, REAL,
        )  # fmt: skip
    total = tl.sum(tl.zeros([C], tl.float64), 0)

    for i_c in tl.range(chunk, chunks, disable_licm=True):
        t = i_c * C + o_c
        m_t = t < length
        o_t = first + ((length - 1 - t) if REVERSE else t)
        dt = step_sizes(p_dt, o_t * dt_t, m_t, bias, SOFTPLUS)
        u = tl.load(p_u + o_t[:, None] * u_t + o_p[None, :], mask=m_t[:, None] & m_p, other=0.0)
        if SAVE:
            o_row = (((row + i_c) * H + i_h) * (PLANES * N) + o_n[:, None]) * P + o_p[None, :]
            store_number(p_states + o_row, h, m_state, N * P)

        time = tl.cumsum(dt.to(tl.float64), 0)
        whole = tl.sum(dt.to(tl.float64), 0)
        S, S_end = parts(time), parts(whole)
        c = rows_of_weights(p_C, o_t, o_n, i_h, C_t, m_t, N, REAL, C_HEADS > 0)
        b = rows_of_weights(p_B, o_t, o_n, i_h, B_t, m_t, N, REAL, B_HEADS > 0)
        G, K, own = operands(dt, S, A, turns, inv, b, c, REAL, EULER)
        since = single(time[:, None] - time[None, :])
        if apart > 0.0:
            fall, rise = decays(as_column(S), as_row(faster))
            G, K = scaled(G, fall), scaled(K, rise)
            kept = decays(S_end, faster)[0]
        else:
            kept = tl.full([BN], 1.0, tl.float32)
        driven = kept
        L, R = split_planes(G, ONE), split_planes(K, TWO)
        M, y = tl.zeros([C, C], tl.float32), tl.zeros([C, BP], tl.float32)
        for i in tl.static_range(len(L)):
            M += matmul(L[i], across(R[i], ONE), ONE, ONE)
        if apart * single(whole) > STIFF:
            G, K, _ = operands(dt, S, A, turns, inv, b, c, REAL, EULER)
            rate = faster[0] + faster[1]
            exact = mixing_by_token(G, K, since, rate, tl.minimum(length - i_c * C, C), C)
            M = tl.where((apart * single(time) > STIFF)[:, None], exact, M)
            R = split_planes(scaled(K, tl.exp2(single(whole - time)[:, None] * rate[None, :])), TWO)
            driven = tl.full([BN], 1.0, tl.float32)
        wide = u.to(tl.float32)
        if p_y is None:
            total += whole
        else:
            M = tl.where(o_c[:, None] > o_c[None, :], M * tl.exp2(slow * since), 0.0)
            M = tl.where(o_c[:, None] == o_c[None, :], own[:, None], M)
            for i in tl.static_range(len(L)):
                y += matmul(L[i], split(h[i], ONE), ONE, ONE)
            y = y * tl.exp2(slow * single(time))[:, None] + matmul(split(M, ONE), split(u, ONE), ONE, ONE)
            if SKIP > 0:
                o_D = i_h * P + o_p if SKIP > 1 else i_h + 0 * o_p
                y += tl.load(p_D + o_D, mask=o_p < P, other=0.0).to(tl.float32)[None, :] * wide
            if GATED:
                o_z = o_t[:, None] * z_t + o_p[None, :]
                z = tl.load(p_z + o_z, mask=m_t[:, None] & m_p, other=0.0).to(tl.float32)
                y *= z / (1.0 + tl.exp(-z))
            o_y = (o_t[:, None] * H + i_h) * P + o_p[None, :]
            tl.store(p_y + o_y, narrow(y, p_y.dtype.element_ty), mask=m_t[:, None] & m_p)

        v = split(wide * tl.exp2(slow * single(whole - time))[:, None], TWO)
        kept = (kept * tl.exp2(slow * single(whole)))[:, None]
        led_on = ()
        for i in tl.static_range(len(h)):
            led_on = led_on + (h[i] * kept + matmul(across(R[i], TWO), v, TWO, TWO) * driven[:, None],)
        h = turned(led_on, as_column(turn(S_end, turns, REAL)))
    if p_y is None:
        store_number(p_final + i_part * STATES + o_state, h, m_state)
        tl.store(p_totals + i_part * H + i_h, total, mask=i_p == 0)
    else:
        store_number(p_final + i_s * STATES + o_state, h, m_state & (i_split == SPLITS - 1))
