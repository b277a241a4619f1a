"""Backward with a step size per head: the adjoint of the state over chunks, then all chunks in parallel.

X is the gradient of the matrix of a chunk times its scalar decay, `since` the times between two tokens, `own`
what a token's output takes of its input; G and K are without decays, whose parts by state are `fall`, `rise`
and `to_end`.
"""

import triton
import triton.language as tl

from ..._core.chunk_rows import sequence_at, span
from ..._core.tl_math import narrow, opaque
from .exponential import growth
from .heads_common import (
    STIFF,
    across,
    chunks_of_part,
    decays,
    led,
    load_planes,
    parts,
    poles,
    product,
    real_times,
    row_of,
    rows_of_weights,
    slowest,
    split,
    state_offsets,
    step_sizes,
    store_planes,
    times,
    times_conj,
    turned,
    turned_back,
    unturned,
    weight_slope,
    weights,
)


@triton.jit
def across_cut(Z, C: tl.constexpr):
    """For each i, the sum of Z[t, s] over s < i <= t."""
    o = tl.arange(0, C)
    return tl.sum(tl.where(o[:, None] > o[None, :], tl.cumsum(Z, 0, reverse=True), 0.0), 1)


@triton.jit
def read_pairs(G_r, G_i, K_r, K_i, Xs, Ts, A_r, A_i, fall, rise, TWO: tl.constexpr, REAL: tl.constexpr):
    """What tokens read of earlier ones in a chunk, but for the scalar decay: M; A M, that is with A in its
    sum; dG; and dA of each reading token. Xs and Ts are X and X since, split.
    """
    G_r, G_i, K_r, K_i = G_r * fall, G_i * fall, K_r * rise, K_i * rise
    Ks_r = split(K_r, TWO)
    AG_r, AG_i = times_conj(G_r, G_i, A_r[None, :], A_i[None, :], REAL)
    M = product(split(G_r, TWO), across(Ks_r, TWO), TWO, TWO)
    AM = product(split(AG_r, TWO), across(Ks_r, TWO), TWO, TWO)
    dG_r, dA_r = product(Xs, Ks_r, TWO, TWO), product(Ts, Ks_r, TWO, TWO)
    if REAL:
        dG_i, dA_i = dG_r, dA_r
    else:
        Ks_i = split(K_i, TWO)
        M += product(split(G_i, TWO), across(Ks_i, TWO), TWO, TWO)
        AM += product(split(AG_i, TWO), across(Ks_i, TWO), TWO, TWO)
        dG_i, dA_i = product(Xs, Ks_i, TWO, TWO), product(Ts, Ks_i, TWO, TWO)
    dA_r, dA_i = times_conj(G_r, G_i, dA_r, dA_i, REAL)
    return M, AM, dG_r * fall, dG_i * fall, dA_r, dA_i


@triton.jit
def read_by_token(G_r, G_i, K_r, K_i, X, since, A_r, A_i, faster, steps, C: tl.constexpr, REAL: tl.constexpr):
    """The same without a factor that grows: the tokens that are read one by one."""
    o_c = tl.arange(0, C)
    M, AM = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dG_r, dG_i, dA_r, dA_i = G_r * 0.0, G_r * 0.0, G_r * 0.0, G_r * 0.0
    for s in tl.range(0, steps, disable_licm=True):
        column = o_c[None, :] == s
        ago = tl.sum(tl.where(column, since, 0.0), 1)[:, None]
        x = tl.sum(tl.where(column, X, 0.0), 1)[:, None]
        decay = tl.where((o_c > s)[:, None], tl.exp2(ago * faster[None, :]), 0.0)
        k_r, k_i = row_of(K_r, o_c, s)[None, :], row_of(K_i, o_c, s)[None, :]
        z_r, z_i = times_conj(k_r * decay, k_i * decay, G_r, G_i, REAL)
        a_r, a_i = times(A_r[None, :], A_i[None, :], z_r, z_i, REAL)
        M = tl.where(column, tl.sum(z_r, 1)[:, None], M)
        AM = tl.where(column, tl.sum(a_r, 1)[:, None], AM)
        dG_r += x * decay * k_r
        dG_i += x * decay * k_i
        dA_r += x * ago * z_r
        dA_i -= x * ago * z_i
    return M, AM, dG_r, dG_i, dA_r, dA_i


@triton.jit
def written_pairs(G_r, G_i, K_r, K_i, Xs, fall, rise, TWO: tl.constexpr, REAL: tl.constexpr):
    """What tokens are read by later ones in a chunk, but for the scalar decay: M and dK."""
    Gs_r = split(G_r * fall, TWO)
    M = product(Gs_r, across(split(K_r * rise, TWO), TWO), TWO, TWO)
    dK_r = product(across(Xs, TWO), Gs_r, TWO, TWO)
    if REAL:
        dK_i = dK_r
    else:
        Gs_i = split(G_i * fall, TWO)
        M += product(Gs_i, across(split(K_i * rise, TWO), TWO), TWO, TWO)
        dK_i = product(across(Xs, TWO), Gs_i, TWO, TWO)
    return M, dK_r * rise, dK_i * rise


@triton.jit
def written_by_token(G_r, G_i, K_r, K_i, X, since, faster, steps, C: tl.constexpr, REAL: tl.constexpr):
    """The same without a factor that grows, token by token."""
    o_c = tl.arange(0, C)
    M, dK_r, dK_i = tl.zeros([C, C], tl.float32), G_r * 0.0, G_r * 0.0
    for s in tl.range(0, steps, disable_licm=True):
        column = o_c[None, :] == s
        ago = tl.sum(tl.where(column, since, 0.0), 1)[:, None]
        x = tl.sum(tl.where(column, X, 0.0), 1)[:, None]
        decay = tl.where((o_c > s)[:, None], tl.exp2(ago * faster[None, :]), 0.0)
        k_r, k_i = row_of(K_r, o_c, s)[None, :], row_of(K_i, o_c, s)[None, :]
        M = tl.where(column, tl.sum(decay * real_times(G_r, G_i, k_r, k_i, REAL), 1)[:, None], M)
        dK_r = tl.where((o_c == s)[:, None], tl.sum(x * decay * G_r, 0)[None, :], dK_r)
        dK_i = tl.where((o_c == s)[:, None], tl.sum(x * decay * G_i, 0)[None, :], dK_i)
    return M, dK_r, dK_i


@triton.jit
def chunk_within(p_bounds, i_r, T, S, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of the sequence of a row of chunks, the chunk's first token in it, and its length."""
    if PACKED:
        start, length, row = span(p_bounds, sequence_at(p_bounds, i_r, S, C), T, C, PACKED)
        return start, ((i_r - row) * C).to(tl.int32), length
    else:
        steps = tl.cdiv(T, C)
        return (i_r // steps) * T, ((i_r % steps) * C).to(tl.int32), T


@triton.jit
def gated(p_dy, p_z, o_y, o_z, m, GATED: tl.constexpr):
    """The gradient before the gate."""
    g = tl.load(p_dy + o_y, mask=m, other=0.0).to(tl.float32)
    if GATED:
        z = tl.load(p_z + o_z, mask=m, other=0.0).to(tl.float32)
        g *= z / (1.0 + tl.exp(-z))
    return g


@triton.jit(do_not_specialize=["T", "SPAN"])
def heads_adjoint_kernel(
    p_u, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_dfinal, p_bounds, p_dy,
    p_parts, p_totals, p_ends, p_dfirst,
    T, SPAN, u_b, u_t, u_h, dt_b, dt_t, dt_h, z_b, z_t, z_h, B_b, B_t, B_g, C_b, C_t, C_g,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    C: tl.constexpr,
    B_HEADS: tl.constexpr, C_HEADS: tl.constexpr, REAL: tl.constexpr, EULER: tl.constexpr,
    SKIP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    DFINAL: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ONE: tl.constexpr, TWO: tl.constexpr, PTX: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """For every chunk the gradient of the state at its end, turned back to its start, and that of the initial
    state. With SPLITS > 1 a first launch without p_ends leaves that at the start of each part, from zero, in
    p_dfirst, as in `heads_forward_kernel`. Grid (sequences * SPLITS * H * blocks of P * blocks of BJ states).
    """
    NP: tl.constexpr = (P + BP - 1) // BP
    NJ: tl.constexpr = (N + BJ - 1) // BJ
    PLANES: tl.constexpr = 1 if REAL else 2
    i_j, i_p = tl.program_id(0) % NJ, tl.program_id(0) // NJ % NP
    i_h = (tl.program_id(0) // (NJ * NP) % H).to(tl.int64)
    i_part = (tl.program_id(0) // (NJ * NP * H)).to(tl.int64)
    i_s, i_split = i_part // SPLITS, i_part % SPLITS
    start, length, row = span(p_bounds, i_s, T, C, PACKED)
    i_b, first = (i_s * 0, start) if PACKED else (i_s, i_s * 0)
    o_c, o_n, o_p = tl.arange(0, C), i_j * BJ + tl.arange(0, BJ), i_p * BP + tl.arange(0, BP)
    m_p, m_state = (o_p < P)[None, :], (o_n < N)[:, None] & (o_p < P)[None, :]
    p_dt += i_b * dt_b + i_h * dt_h
    p_z += i_b * z_b + i_h * z_h
    p_dy += ((start - first) * H + i_h) * P
    if C_HEADS > 0:
        p_C += i_b * C_b + i_h // max(C_HEADS, 1) * C_g
    slow, apart = slowest(p_A, i_h, N, BN, REAL)
    _, _, faster, turns, inverse = poles(p_A, i_h, slow, o_n, N, REAL)
    bias = tl.load(p_bias + i_h).to(tl.float32) if BIAS else 0.0
    STATES: tl.constexpr = H * P * N * PLANES
    o_state = state_offsets(i_h, o_n, o_p, P, N, REAL)
    e_r, e_i = tl.zeros([BJ, BP], tl.float32), tl.zeros([BJ, BP], tl.float32)
    if DFINAL:
        e_r, e_i = load_planes(p_dfinal + i_s * STATES, o_state, m_state, 1, REAL)
    chunk, chunks = chunks_of_part(i_split, length, SPAN, C, SPLITS)
    if SPLITS > 1 and p_ends is not None:
        e_r, e_i = led(
            e_r, e_i, p_parts, p_totals + i_h, i_s * SPLITS + SPLITS - 1, SPLITS - 1 - i_split, o_state,
            m_state, slow, faster, turns, -1, H, STATES, REAL,
        )  # fmt: skip
    total = tl.sum(tl.zeros([C], tl.float64), 0)

    for i in tl.range(0, chunks - chunk, disable_licm=True):
        t = (chunks - 1 - i) * C + o_c
        m_t = t < length
        o_t = first + ((length - 1 - t) if REVERSE else t)
        m_tp, o_p_row = m_t[:, None] & m_p, o_p[None, :]
        dt = step_sizes(p_dt, o_t * dt_t, m_t, bias, SOFTPLUS)
        time, whole = tl.cumsum(dt.to(tl.float64), 0), tl.sum(dt.to(tl.float64), 0)
        S_high, S_low = parts(time)
        end_high, end_low = parts(whole)
        g = gated(p_dy, p_z, o_t[:, None] * (H * P) + o_p_row, o_t[:, None] * z_t + o_p_row, m_tp, GATED)
        C_r, C_i = rows_of_weights(p_C, o_t, o_n, i_h, C_t, m_t, N, REAL, C_HEADS > 0)
        sin, cos = turned(S_high[:, None], S_low[:, None], turns[0][None, :], turns[1][None, :], REAL)
        sin_end, cos_end = turned(end_high, end_low, turns[0], turns[1], REAL)
        G_r, G_i = tl.zeros([C, BJ], tl.float32) + C_r * PLANES, tl.zeros([C, BJ], tl.float32) + C_i * PLANES
        G_r, G_i = unturned(G_r, G_i, cos, sin, REAL)
        kept = tl.full([BJ], 1.0, tl.float32)
        if apart > 0.0:
            fall, rise = decays(S_high[:, None], S_low[:, None], faster[0][None, :], faster[1][None, :])
            G_r, G_i = G_r * fall, G_i * fall
            kept, grown = decays(end_high, end_low, faster[0], faster[1])
        kept *= tl.exp2(slow * whole.to(tl.float32))
        v = split(g * tl.exp2(slow * time.to(tl.float32))[:, None], TWO)

        e_r, e_i = (e_r, e_i) if REAL else unturned(e_r, e_i, cos_end[:, None], sin_end[:, None], REAL)
        if p_ends is None:
            total += whole
        else:
            o_row = (((row + chunks - 1 - i) * H + i_h) * (PLANES * N) + o_n[:, None]) * P + o_p[None, :]
            store_planes(p_ends, o_row, e_r, e_i, m_state, N * P, REAL)
        e_r = e_r * kept[:, None] + product(across(split(G_r, TWO), TWO), v, TWO, TWO)
        if not REAL:
            e_i = e_i * kept[:, None] + product(across(split(G_i, TWO), TWO), v, TWO, TWO)
    if p_ends is None:
        store_planes(p_dfirst + i_part * STATES, o_state, e_r, e_i, m_state, 1, REAL)
        tl.store(p_totals + i_part * H + i_h, total, mask=(i_p == 0) & (i_j == 0))
    else:
        store_planes(p_dfirst + i_s * STATES, o_state, e_r, e_i, m_state & (i_split == 0), 1, REAL)


@triton.jit
def gradients_of_chunk(
    p_u, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_bounds, p_dy,
    p_states, p_ends, p_du, p_ddt, p_dA, p_dB, p_dC, p_dD, p_dz,
    T, S, R, u_b, u_t, u_h, dt_b, dt_t, dt_h, z_b, z_t, z_h, B_b, B_t, B_g, C_b, C_t, C_g,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    C: tl.constexpr,
    B_HEADS: tl.constexpr, C_HEADS: tl.constexpr, REAL: tl.constexpr, EULER: tl.constexpr,
    SKIP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ONE: tl.constexpr, TWO: tl.constexpr, PTX: tl.constexpr, ROLE: tl.constexpr,
):  # fmt: skip
    """One role of `heads_backward_kernel`."""
    NP: tl.constexpr = (P + BP - 1) // BP
    PLANES: tl.constexpr = 1 if REAL else 2
    GRAD: tl.constexpr = TWO if GATED else ONE
    i_p, i_h = tl.program_id(0) // 2 % NP, (tl.program_id(0) // (2 * NP) % H).to(tl.int64)
    i_r = (tl.program_id(0) // (2 * NP * H)).to(tl.int64)
    sequences = 1 if PACKED else S
    tokens = sequences * T.to(tl.int64)
    start, into, length = chunk_within(p_bounds, i_r, T, S, C, PACKED)
    if into >= length:
        return  # a row that is not used
    i_b, first = (start * 0, start) if PACKED else (start // T, start * 0)
    o_c, o_p = tl.arange(0, C), i_p * BP + tl.arange(0, BP)
    t = into + o_c
    m_t, m_p = t < length, (o_p < P)[None, :]
    m_tp = m_t[:, None] & m_p
    o_t = first + ((length - 1 - t) if REVERSE else t)
    p_u += i_b * u_b + i_h * u_h
    p_dt += i_b * dt_b + i_h * dt_h
    p_z += i_b * z_b + i_h * z_h
    p_B += i_b * B_b + i_h // max(B_HEADS, 1) * B_g
    p_C += i_b * C_b + i_h // max(C_HEADS, 1) * C_g
    steps = tl.minimum(length - into, C)
    flat = start - first + o_t  # tokens of dense tensors
    o_y = (flat[:, None] * H + i_h) * P + o_p[None, :]
    o_w = (i_p * tokens + flat) * H + i_h

    bias = tl.load(p_bias + i_h).to(tl.float32) if BIAS else 0.0
    slow, apart = slowest(p_A, i_h, N, BN, REAL)
    dt = step_sizes(p_dt, o_t * dt_t, m_t, bias, SOFTPLUS)
    time, whole = tl.cumsum(dt.to(tl.float64), 0), tl.sum(dt.to(tl.float64), 0)
    S_time, rest, end = time.to(tl.float32), (whole - time).to(tl.float32), whole.to(tl.float32)
    since = tl.maximum((time[:, None] - time[None, :]).to(tl.float32), 0.0)
    later, same = o_c[:, None] > o_c[None, :], o_c[:, None] == o_c[None, :]
    D = tl.where(later, tl.exp2(slow * since), 0.0)
    decay, tail = tl.exp2(slow * S_time)[:, None], tl.exp2(slow * rest)[:, None]

    u = tl.load(p_u + o_t[:, None] * u_t + o_p[None, :], mask=m_tp, other=0.0)
    us, wide = split(u, ONE), u.to(tl.float32)
    g = gated(p_dy, p_z, o_y, o_t[:, None] * z_t + o_p[None, :], m_tp, GATED)
    gs = split(g, GRAD)
    own = tl.sum(g * wide, 1)[:, None]
    X = product(gs, across(us, ONE), GRAD, ONE) * D
    Xs, Ts = split(X, TWO), split(X * since, TWO)
    skip = 0.0
    if SKIP > 0:
        o_D = i_h * P + o_p if SKIP > 1 else i_h + 0 * o_p
        skip = tl.load(p_D + o_D, mask=o_p < P, other=0.0).to(tl.float32)[None, :]
        if ROLE == 1:
            tl.store(p_dD + (i_r * H + i_h) * P + o_p, tl.sum(g * wide, 0), mask=o_p < P)
    M, through = tl.zeros([C, C], tl.float32), tl.zeros([C, BP], tl.float32)
    of_self, ddt = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    S_high, S_low = parts(time)
    for i_j in tl.range(0, (N + BJ - 1) // BJ, disable_licm=True):
        o_n = i_j * BJ + tl.arange(0, BJ)
        m_n = o_n < N
        A_r, A_i, faster, turns, inverse = poles(p_A, i_h, slow, o_n, N, REAL)
        C_r, C_i = rows_of_weights(p_C, o_t, o_n, i_h, C_t, m_t, N, REAL, C_HEADS > 0)
        B_r, B_i = rows_of_weights(p_B, o_t, o_n, i_h, B_t, m_t, N, REAL, B_HEADS > 0)
        C_r, C_i = C_r * PLANES, C_i * PLANES
        a_r, a_i, w_r, w_i = weights(dt, A_r, A_i, inverse, REAL, EULER)
        V_r, V_i = times(w_r, w_i, B_r, B_i, REAL)
        of_self += tl.sum(real_times(C_r, C_i, V_r, V_i, REAL), 1)
        sin, cos = turned(S_high[:, None], S_low[:, None], turns[0][None, :], turns[1][None, :], REAL)
        K_r, K_i = unturned(V_r, V_i, cos, sin, REAL)
        G_r, G_i = unturned(C_r + tl.zeros_like(K_r), C_i + tl.zeros_like(K_r), cos, sin, REAL)
        fall, rise = tl.full([C, BJ], 1.0, tl.float32), tl.full([C, BJ], 1.0, tl.float32)
        if apart > 0.0:
            fall, rise = decays(S_high[:, None], S_low[:, None], faster[0][None, :], faster[1][None, :])
        rate = faster[0] + faster[1]
        o_row = ((i_r * H + i_h) * (PLANES * N) + o_n[:, None]) * P + o_p[None, :]
        o_sum = ((i_r * H + i_h) * NP + i_p) * (N * PLANES) + o_n * PLANES
        o_rows, m_rows = o_w[:, None] * (N * PLANES) + o_n[None, :] * PLANES, m_t[:, None] & m_n[None, :]
        if ROLE == 0:
            if apart * end > STIFF:
                M_j, AM, dG_r, dG_i, x_r, x_i = read_by_token(
                    G_r, G_i, K_r, K_i, X, since, A_r, A_i, rate, steps, C, REAL
                )
            else:
                M_j, AM, dG_r, dG_i, x_r, x_i = read_pairs(
                    G_r, G_i, K_r, K_i, Xs, Ts, A_r, A_i, fall, rise, TWO, REAL
                )
            ddt += across_cut(X * AM, C)
            # the state at the start
            h_r, h_i = load_planes(p_states, o_row, m_n[:, None] & m_p, N * P, REAL)
            hs_r, hs_i = split(h_r, TWO), split(h_i, TWO)
            if GATED:
                M += M_j
                through += product(split(G_r * fall, TWO), hs_r, TWO, TWO)
                if not REAL:
                    through += product(split(G_i * fall, TWO), hs_i, TWO, TWO)
            q_r = product(gs, across(hs_r, TWO), GRAD, TWO) * decay * fall
            q_i = q_r if REAL else product(gs, across(hs_i, TWO), GRAD, TWO) * decay * fall
            dG_r, dG_i = turned_back(dG_r + q_r, dG_i + q_i, cos, sin, REAL)
            q_r, q_i = times_conj(G_r, G_i, q_r, q_i, REAL)
            by_start = tl.sum(real_times(q_r, q_i, A_r[None, :], A_i[None, :], REAL), 1)
            ddt += tl.cumsum(by_start, 0, reverse=True)
            dA_r, dA_i = tl.sum(x_r + S_time[:, None] * q_r, 0), tl.sum(x_i + S_time[:, None] * q_i, 0)
            dG_r, dG_i = (dG_r + own * V_r) * PLANES, (dG_i + own * V_i) * PLANES
            if C_HEADS > 0:
                store_planes(p_dC, o_rows, dG_r, dG_i, m_rows, 1, REAL)
            else:
                store_planes(p_dC, o_sum, tl.sum(dG_r, 0), tl.sum(dG_i, 0), m_n, 1, REAL)
        else:
            if apart * end > STIFF:
                M_j, dK_r, dK_i = written_by_token(G_r, G_i, K_r, K_i, X, since, rate, steps, C, REAL)
            else:
                M_j, dK_r, dK_i = written_pairs(G_r, G_i, K_r, K_i, Xs, fall, rise, TWO, REAL)
            M += M_j
            # the state at the end, and of it what was there at the start
            to_end, kept = tl.full([C, BJ], 1.0, tl.float32), tl.full([BJ], 1.0, tl.float32)
            if apart > 0.0:
                high, low = parts(whole - time)
                to_end, risen = decays(high[:, None], low[:, None], faster[0][None, :], faster[1][None, :])
                high, low = parts(whole)
                kept, grown = decays(high, low, faster[0], faster[1])
            kept *= tl.exp2(slow * end)
            e_r, e_i = load_planes(p_ends, o_row, m_n[:, None] & m_p, N * P, REAL)
            h_r, h_i = load_planes(p_states, o_row, m_n[:, None] & m_p, N * P, REAL)
            x_r, x_i = times_conj(e_r, e_i, h_r, h_i, REAL)
            x_r, x_i = kept * tl.sum(x_r, 1), kept * tl.sum(x_i, 1)
            ddt += tl.sum(real_times(x_r, x_i, A_r, A_i, REAL), 0)
            es_r, es_i = split(e_r, TWO), split(e_i, TWO)
            through += product(split(K_r * to_end, TWO), es_r, TWO, TWO)
            if not REAL:
                through += product(split(K_i * to_end, TWO), es_i, TWO, TWO)
            q_r = product(us, across(es_r, TWO), ONE, TWO) * tail * to_end
            q_i = q_r if REAL else product(us, across(es_i, TWO), ONE, TWO) * tail * to_end
            dK_r, dK_i = turned_back(dK_r + q_r, dK_i + q_i, cos, sin, REAL)
            q_r, q_i = times_conj(q_r, q_i, K_r, K_i, REAL)
            by_end = tl.sum(real_times(q_r, q_i, A_r[None, :], A_i[None, :], REAL), 1)
            dA_r, dA_i = (
                tl.sum(rest[:, None] * q_r, 0) + end * x_r,
                tl.sum(rest[:, None] * q_i, 0) + end * x_i,
            )
            # Not as a running sum less its own: that of the last tokens would drown the earlier ones.
            ddt += tl.sum(tl.where(later, by_end[None, :], 0.0), 1)
            # the weights of the tokens themselves
            dK_r, dK_i = dK_r + own * C_r, dK_i + own * C_i
            q_r, q_i = times_conj(dK_r, dK_i, w_r, w_i, REAL)
            if B_HEADS > 0:
                store_planes(p_dB, o_rows, q_r, q_i, m_rows, 1, REAL)
            else:
                store_planes(p_dB, o_sum, tl.sum(q_r, 0), tl.sum(q_i, 0), m_n, 1, REAL)
            dK_r, dK_i = times_conj(dK_r, dK_i, B_r, B_i, REAL)
            if EULER:
                ddt += tl.sum(dK_r, 1)
            else:
                ddt += tl.sum(real_times(dK_r, dK_i, a_r, a_i, REAL), 1)
                q_r, q_i = weight_slope(
                    dt[:, None], A_r[None, :], A_i[None, :], inverse, a_r, a_i, w_r, w_i, REAL
                )
                q_r, q_i = times_conj(dK_r, dK_i, q_r, q_i, REAL)
                dA_r, dA_i = dA_r + tl.sum(q_r, 0), dA_i + tl.sum(q_i, 0)
        store_planes(p_dA + ROLE * R.to(tl.int64) * (H * NP * N * PLANES), o_sum, dA_r, dA_i, m_n, 1, REAL)

    # Tokens are found and read again: kept through the loop, they would take the registers that it needs.
    t, o_p = opaque(into, PTX) + o_c, opaque(i_p, PTX) * BP + tl.arange(0, BP)
    m_tp = (t < length)[:, None] & (o_p < P)[None, :]
    o_t = first + ((length - 1 - t) if REVERSE else t)
    flat = start - first + o_t
    o_y, o_z = (flat[:, None] * H + i_h) * P + o_p[None, :], o_t[:, None] * z_t + o_p[None, :]
    M = split(tl.where(same, of_self[:, None], M * tl.where(later, tl.exp2(slow * since), 0.0)), TWO)
    wide = tl.load(p_u + o_t[:, None] * u_t + o_p[None, :], mask=m_tp, other=0.0).to(tl.float32)
    if ROLE == 1:
        g = gated(p_dy, p_z, o_y, o_z, m_tp, GATED)
        du = through * tail + product(across(M, TWO), split(g, GRAD), TWO, GRAD) + skip * g
        tl.store(p_du + o_y, narrow(du, p_du.dtype.element_ty), mask=m_tp)
    elif GATED:
        y = through * decay + product(M, split(wide, ONE), TWO, ONE) + skip * wide
        z = tl.load(p_z + o_z, mask=m_tp, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + o_y, mask=m_tp, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dz = dy * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
        tl.store(p_dz + o_y, narrow(dz, p_dz.dtype.element_ty), mask=m_tp)
    if SOFTPLUS:
        gone, fell = growth(-dt)
        ddt *= -fell
    o_w = (i_p * tokens + flat) * H + i_h
    tl.store(p_ddt + ROLE * NP * tokens * H + o_w, ddt, mask=t < length)


@triton.jit(do_not_specialize=["T", "S", "R"])
def heads_backward_kernel(
    p_u, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_dfinal, p_bounds, p_dy,
    p_states, p_ends, p_du, p_ddt, p_dA, p_dB, p_dC, p_dD, p_dz,
    T, S, R, u_b, u_t, u_h, dt_b, dt_t, dt_h, z_b, z_t, z_h, B_b, B_t, B_g, C_b, C_t, C_g,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    C: tl.constexpr,
    B_HEADS: tl.constexpr, C_HEADS: tl.constexpr, REAL: tl.constexpr, EULER: tl.constexpr,
    SKIP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ONE: tl.constexpr, TWO: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """All other gradients of one chunk. Even programs take what tokens read (C, z), odd ones what they write
    (B, u, D); both have a share of those of dt and A. Those of dt, and of B and C per token, leave per head
    and block of channels; those of A, D and static B, C per chunk too.
    Grid (rows of chunks * H * blocks of P * 2).
    """
    if tl.program_id(0) % 2 == 0:
        gradients_of_chunk(
            p_u, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_bounds, p_dy,
            p_states, p_ends, p_du, p_ddt, p_dA, p_dB, p_dC, p_dD, p_dz,
            T, S, R, u_b, u_t, u_h, dt_b, dt_t, dt_h, z_b, z_t, z_h, B_b, B_t, B_g, C_b, C_t, C_g,
            H, P, N, BP, BN, BJ, C, B_HEADS, C_HEADS, REAL, EULER, SKIP, GATED, BIAS, SOFTPLUS,
            PACKED, REVERSE, ONE, TWO, PTX, 0,
        )  # fmt: skip
    else:
        gradients_of_chunk(
            p_u, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_bounds, p_dy,
            p_states, p_ends, p_du, p_ddt, p_dA, p_dB, p_dC, p_dD, p_dz,
            T, S, R, u_b, u_t, u_h, dt_b, dt_t, dt_h, z_b, z_t, z_h, B_b, B_t, B_g, C_b, C_t, C_g,
            H, P, N, BP, BN, BJ, C, B_HEADS, C_HEADS, REAL, EULER, SKIP, GATED, BIAS, SOFTPLUS,
            PACKED, REVERSE, ONE, TWO, PTX, 1,
        )  # fmt: skip
