"""Backward with a step size per head: the adjoint of the state over chunks, then all chunks in parallel.

X is the gradient of the matrix of a chunk times its scalar decay, `since` the times between two tokens, `own`
what a token's output takes of its input; G and K are without decays, whose parts by state are `fall`, `rise`
and `to_end`.
"""

import triton
import triton.language as tl

from ..._core.chunk_rows import sequence_at, span
from ..._core.tl_math import narrow, opaque
from .exponential import growth, weight_slope
from .heads_common import (
    STIFF,
    across,
    chunks_of_part,
    decays,
    led,
    matmul,
    number_of_row,
    parts,
    poles,
    rows_of_weights,
    single,
    slowest,
    split,
    state_offsets,
    step_sizes,
    turn,
    turned,
    unturned,
    weights,
)
from .numbers import (
    as_column,
    as_row,
    conj,
    load_number,
    pick,
    plus,
    product,
    product_conj,
    real_product_conj,
    scaled,
    store_number,
    total,
    zero_like,
    zeros,
)


@triton.jit
def across_cut(Z, C: tl.constexpr):
    """For each i, the sum of Z[t, s] over s < i <= t."""
    o = tl.arange(0, C)
    return tl.sum(tl.where(o[:, None] > o[None, :], tl.cumsum(Z, 0, reverse=True), 0.0), 1)


@triton.jit
def read_pairs(G, K, Xs, Ts, A, fall, rise, C: tl.constexpr, TWO: tl.constexpr):
    """What tokens read of earlier ones in a chunk, but for the scalar decay: M; A M, that is with A in its
    sum; dG; and dA of each reading token. Xs and Ts are X and X since, split.
    """
    G = scaled(G, fall)
    AG = product_conj(G, as_row(A))
    M, AM = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dG, dA = (), ()
    for i in tl.static_range(len(G)):  # one plane after the other: less is kept at once
        Ks = split(K[i] * rise, TWO)
        M += matmul(split(G[i], TWO), across(Ks, TWO), TWO, TWO)
        AM += matmul(split(AG[i], TWO), across(Ks, TWO), TWO, TWO)
        dG = dG + (matmul(Xs, Ks, TWO, TWO) * fall,)
        dA = dA + (matmul(Ts, Ks, TWO, TWO),)
    return M, AM, dG, product_conj(G, dA)


@triton.jit
def read_by_token(G, K, X, since, A, faster, steps, C: tl.constexpr):
    """The same without a factor that grows: the tokens that are read one by one."""
    o_c = tl.arange(0, C)
    M, AM = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dG, dA = zero_like(G), zero_like(G)
    for s in tl.range(0, steps, disable_licm=True):
        column = o_c[None, :] == s
        ago = tl.sum(tl.where(column, since, 0.0), 1)[:, None]
        x = tl.sum(tl.where(column, X, 0.0), 1)[:, None]
        decay = tl.where((o_c > s)[:, None], tl.exp2(ago * faster[None, :]), 0.0)
        k = scaled(number_of_row(K, o_c, s), decay)
        z = product_conj(k, G)
        M = tl.where(column, tl.sum(z[0], 1)[:, None], M)
        AM = tl.where(column, tl.sum(product(as_row(A), z)[0], 1)[:, None], AM)
        dG = plus(dG, scaled(k, x))
        dA = plus(dA, scaled(conj(z), x * ago))
    return M, AM, dG, dA


@triton.jit
def written_pairs(G, K, Xs, fall, rise, C: tl.constexpr, TWO: tl.constexpr):
    """What tokens are read by later ones in a chunk, but for the scalar decay: M and dK."""
    M = tl.zeros([C, C], tl.float32)
    Xs, dK = across(Xs, TWO), ()
    for i in tl.static_range(len(G)):
        Gs = split(G[i] * fall, TWO)
        M += matmul(Gs, across(split(K[i] * rise, TWO), TWO), TWO, TWO)
        dK = dK + (matmul(Xs, Gs, TWO, TWO) * rise,)
    return M, dK


@triton.jit
def written_by_token(G, K, X, since, faster, steps, C: tl.constexpr):
    """The same without a factor that grows, token by token."""
    o_c = tl.arange(0, C)
    M, dK = tl.zeros([C, C], tl.float32), zero_like(G)
    for s in tl.range(0, steps, disable_licm=True):
        column = o_c[None, :] == s
        ago = tl.sum(tl.where(column, since, 0.0), 1)[:, None]
        x = tl.sum(tl.where(column, X, 0.0), 1)[:, None]
        decay = tl.where((o_c > s)[:, None], tl.exp2(ago * faster[None, :]), 0.0)
        read = scaled(G, decay)
        M = tl.where(column, tl.sum(real_product_conj(read, number_of_row(K, o_c, s)), 1)[:, None], M)
        dK = pick((o_c == s)[:, None], as_row(total(scaled(read, x), 0)), dK)
    return M, dK


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
    _, faster, turns, _ = poles(p_A, i_h, slow, o_n, N, REAL)
    bias = tl.load(p_bias + i_h).to(tl.float32) if BIAS else 0.0
    STATES: tl.constexpr = H * P * N * PLANES
    o_state = state_offsets(i_h, o_n, o_p, P, N, REAL)
    e = zeros(BJ, BP, tl.float32, REAL)
    if DFINAL:
        e = load_number(p_dfinal + i_s * STATES + o_state, m_state, tl.float32, REAL)
    chunk, chunks = chunks_of_part(i_split, length, SPAN, C, SPLITS)
    if SPLITS > 1 and p_ends is not None:
        e = led(
            e, p_parts, p_totals + i_h, i_s * SPLITS + SPLITS - 1, SPLITS - 1 - i_split, o_state, m_state,
            slow, faster, turns, -1, H, STATES, REAL,
        )  # fmt: skip
    all_time = tl.sum(tl.zeros([C], tl.float64), 0)

    for i in tl.range(0, chunks - chunk, disable_licm=True):
        t = (chunks - 1 - i) * C + o_c
        m_t = t < length
        o_t = first + ((length - 1 - t) if REVERSE else t)
        m_tp, o_p_row = m_t[:, None] & m_p, o_p[None, :]
        dt = step_sizes(p_dt, o_t * dt_t, m_t, bias, SOFTPLUS)
        time, whole = tl.cumsum(dt.to(tl.float64), 0), tl.sum(dt.to(tl.float64), 0)
        S, S_end = parts(time), parts(whole)
        g = gated(p_dy, p_z, o_t[:, None] * (H * P) + o_p_row, o_t[:, None] * z_t + o_p_row, m_tp, GATED)
        c = rows_of_weights(p_C, o_t, o_n, i_h, C_t, m_t, N, REAL, C_HEADS > 0)
        G = plus(scaled(c, PLANES), zeros(C, BJ, tl.float32, REAL))
        G = unturned(G, turn(as_column(S), as_row(turns), REAL))
        kept = tl.full([BJ], 1.0, tl.float32)
        if apart > 0.0:
            fall = decays(as_column(S), as_row(faster))[0]
            G = scaled(G, fall)
            kept = decays(S_end, faster)[0]
        kept *= tl.exp2(slow * single(whole))
        v = split(g * tl.exp2(slow * single(time))[:, None], TWO)

        e = unturned(e, as_column(turn(S_end, turns, REAL)))
        if p_ends is None:
            all_time += whole
        else:
            o_row = (((row + chunks - 1 - i) * H + i_h) * (PLANES * N) + o_n[:, None]) * P + o_p[None, :]
            store_number(p_ends + o_row, e, m_state, N * P)
        led_back = ()
        for j in tl.static_range(len(e)):
            driven = matmul(across(split(G[j], TWO), TWO), v, TWO, TWO)
            led_back = led_back + (e[j] * kept[:, None] + driven,)
        e = led_back
    if p_ends is None:
        store_number(p_dfirst + i_part * STATES + o_state, e, m_state)
        tl.store(p_totals + i_part * H + i_h, all_time, mask=(i_p == 0) & (i_j == 0))
    else:
        store_number(p_dfirst + i_s * STATES + o_state, e, m_state & (i_split == 0))


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
    S_time, rest, end = single(time), single(whole - time), single(whole)
    since = single(time[:, None] - time[None, :])
    later, same = o_c[:, None] > o_c[None, :], o_c[:, None] == o_c[None, :]
    D = tl.where(later, tl.exp2(slow * since), 0.0)
    decay, tail = tl.exp2(slow * S_time)[:, None], tl.exp2(slow * rest)[:, None]

    u = tl.load(p_u + o_t[:, None] * u_t + o_p[None, :], mask=m_tp, other=0.0)
    us, wide = split(u, ONE), u.to(tl.float32)
    g = gated(p_dy, p_z, o_y, o_t[:, None] * z_t + o_p[None, :], m_tp, GATED)
    gs = split(g, GRAD)
    own = tl.sum(g * wide, 1)[:, None]
    X = matmul(gs, across(us, ONE), GRAD, ONE) * D
    Xs, Ts = split(X, TWO), split(X * since, TWO)
    skip = 0.0
    if SKIP > 0:
        o_D = i_h * P + o_p if SKIP > 1 else i_h + 0 * o_p
        skip = tl.load(p_D + o_D, mask=o_p < P, other=0.0).to(tl.float32)[None, :]
        if ROLE == 1:
            tl.store(p_dD + (i_r * H + i_h) * P + o_p, tl.sum(g * wide, 0), mask=o_p < P)
    M, through = tl.zeros([C, C], tl.float32), tl.zeros([C, BP], tl.float32)
    of_self, ddt = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    S = parts(time)
    for i_j in tl.range(0, (N + BJ - 1) // BJ, disable_licm=True):
        o_n = i_j * BJ + tl.arange(0, BJ)
        m_n = o_n < N
        A, faster, turns, inv = poles(p_A, i_h, slow, o_n, N, REAL)
        c = scaled(rows_of_weights(p_C, o_t, o_n, i_h, C_t, m_t, N, REAL, C_HEADS > 0), PLANES)
        b = rows_of_weights(p_B, o_t, o_n, i_h, B_t, m_t, N, REAL, B_HEADS > 0)
        a, w = weights(dt, A, inv, EULER)
        V = product(w, b)
        of_self += tl.sum(real_product_conj(c, V), 1)
        by = turn(as_column(S), as_row(turns), REAL)
        K = unturned(V, by)
        G = unturned(plus(c, zero_like(K)), by)
        fall, rise = tl.full([C, BJ], 1.0, tl.float32), tl.full([C, BJ], 1.0, tl.float32)
        if apart > 0.0:
            fall, rise = decays(as_column(S), as_row(faster))
        rate = faster[0] + faster[1]
        o_row = ((i_r * H + i_h) * (PLANES * N) + o_n[:, None]) * P + o_p[None, :]
        o_sum = ((i_r * H + i_h) * NP + i_p) * (N * PLANES) + o_n * PLANES
        o_rows, m_rows = o_w[:, None] * (N * PLANES) + o_n[None, :] * PLANES, m_t[:, None] & m_n[None, :]
        m_state = m_n[:, None] & m_p
        if ROLE == 0:
            if apart * end > STIFF:
                M_j, AM, dG, dA_t = read_by_token(G, K, X, since, A, rate, steps, C)
            else:
                M_j, AM, dG, dA_t = read_pairs(G, K, Xs, Ts, A, fall, rise, C, TWO)
            ddt += across_cut(X * AM, C)
            # the state at the start
            h, q = load_number(p_states + o_row, m_state, tl.float32, REAL, N * P), ()
            if GATED:
                M += M_j
            for i in tl.static_range(len(h)):
                hs = split(h[i], TWO)
                if GATED:
                    through += matmul(split(G[i] * fall, TWO), hs, TWO, TWO)
                q = q + (matmul(gs, across(hs, TWO), GRAD, TWO) * decay * fall,)
            dG = turned(plus(dG, q), by)
            q = product_conj(G, q)
            ddt += tl.cumsum(tl.sum(real_product_conj(q, as_row(A)), 1), 0, reverse=True)
            dA = total(plus(dA_t, scaled(q, S_time[:, None])), 0)
            dC = scaled(plus(dG, scaled(V, own)), PLANES)
            if C_HEADS > 0:
                store_number(p_dC + o_rows, dC, m_rows)
            else:
                store_number(p_dC + o_sum, total(dC, 0), m_n)
        else:
            if apart * end > STIFF:
                M_j, dK = written_by_token(G, K, X, since, rate, steps, C)
            else:
                M_j, dK = written_pairs(G, K, Xs, fall, rise, C, TWO)
            M += M_j
            # the state at the end, and of it what was there at the start
            to_end, kept = tl.full([C, BJ], 1.0, tl.float32), tl.full([BJ], 1.0, tl.float32)
            if apart > 0.0:
                to_end = decays(as_column(parts(tl.maximum(whole - time, 0.0))), as_row(faster))[0]
                kept = decays(parts(whole), faster)[0]
            kept *= tl.exp2(slow * end)
            e = load_number(p_ends + o_row, m_state, tl.float32, REAL, N * P)
            h = load_number(p_states + o_row, m_state, tl.float32, REAL, N * P)
            held = scaled(total(product_conj(e, h), 1), kept)
            ddt += tl.sum(real_product_conj(held, A), 0)
            q = ()
            for i in tl.static_range(len(e)):
                es = split(e[i], TWO)
                through += matmul(split(K[i] * to_end, TWO), es, TWO, TWO)
                q = q + (matmul(us, across(es, TWO), ONE, TWO) * tail * to_end,)
            dK = turned(plus(dK, q), by)
            q = product_conj(q, K)
            by_end = tl.sum(real_product_conj(q, as_row(A)), 1)
            dA = plus(total(scaled(q, rest[:, None]), 0), scaled(held, end))
            # Not as a running sum less its own: that of the last tokens would drown the earlier ones.
            ddt += tl.sum(tl.where(later, by_end[None, :], 0.0), 1)
            # the weights of the tokens themselves
            dK = plus(dK, scaled(c, own))
            dB = product_conj(dK, w)
            if B_HEADS > 0:
                store_number(p_dB + o_rows, dB, m_rows)
            else:
                store_number(p_dB + o_sum, total(dB, 0), m_n)
            dw = product_conj(dK, b)
            if EULER:
                ddt += tl.sum(dw[0], 1)
            else:
                slope = weight_slope(dt[:, None], as_row(A), as_row(inv), a, w)
                dA = plus(dA, total(product_conj(dw, slope), 0))
                ddt += tl.sum(real_product_conj(dw, a), 1)
        store_number(p_dA + ROLE * R.to(tl.int64) * (H * NP * N * PLANES) + o_sum, dA, m_n)

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
        du = through * tail + matmul(across(M, TWO), split(g, GRAD), TWO, GRAD) + skip * g
        tl.store(p_du + o_y, narrow(du, p_du.dtype.element_ty), mask=m_tp)
    elif GATED:
        y = through * decay + matmul(M, split(wide, ONE), TWO, ONE) + skip * wide
        z = tl.load(p_z + o_z, mask=m_tp, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + o_y, mask=m_tp, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dz = dy * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
        tl.store(p_dz + o_y, narrow(dz, p_dz.dtype.element_ty), mask=m_tp)
    if SOFTPLUS:
        ddt *= -growth(-dt)[1]
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
