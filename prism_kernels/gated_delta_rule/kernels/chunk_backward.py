"""Backward of the chunked form: both recurrences at once, then all chunks in parallel."""

import triton
import triton.language as tl

from ..._core.chunk_rows import chunk_at, span
from ..._core.tl_math import dot, narrow, opaque
from .common import (
    checkpoint_at,
    checkpoint_row,
    decays,
    dot_parts,
    errors_of,
    errors_of_back,
    largest,
    load_fixed,
    load_norm,
    load_square,
    load_tokens,
    load_tokens_across,
    segment_at,
    split,
    store_fixed,
    written,
    written_back,
)


@triton.jit(do_not_specialize=["T", "S", "L"])
def states_kernel(
    p_q, p_k, p_v, p_do, p_N, p_P, p_G, p_b, p_top, p_norm_q, p_norm_k, p_first, p_dfinal, p_dkept,
    p_bounds, p_E, p_E_top, p_S, p_S_top, p_dR, p_dR_top, p_dS, p_dS_top, p_dfirst,
    T, S, L,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SCALE: tl.constexpr, L2: tl.constexpr, PACKED: tl.constexpr, FIRST: tl.constexpr, DFINAL: tl.constexpr,
    EVERY: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Half 0 runs the state forward and keeps E and S at chunk starts; half 1, which does not depend on it,
    runs the gradient of the state backward and keeps dR and dS at chunk ends, those of checkpoints (unless
    EVERY is 0) included. Grid (S * HV * V / BV * 2), or with segments of L tokens, which have a state and a
    gradient to start from, (rows of them * ...).
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    half, i_v = tl.program_id(0) % 2, tl.program_id(0) // 2 % NV
    i_sh = (tl.program_id(0) // (2 * NV)).to(tl.int64)
    i_s, i_hv = i_sh // HV, i_sh % HV
    i_h = i_hv // (HV // H)
    if SEGMENTED:
        start, follow, row, i_s, number = segment_at(p_bounds, i_s, T, S, L, C, PACKED)
        if (follow <= 0) & (number > 0):
            return
        length = tl.minimum(follow, L)
    else:
        start, length, row = span(p_bounds, i_s, T, C, PACKED)
    steps = tl.cdiv(length, C)
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    o_cc = o_c[:, None] * C + o_c[None, :]
    o_cv, m_v = o_c[:, None] * V + o_v[None, :], (o_v < V)[None, :]
    o_kv, m_k = o_k[:, None] * V + o_v[None, :], o_k < K
    m_kv = m_k[:, None] & m_v
    o_all = i_sh * K * V + o_kv

    if half == 0:
        state = tl.zeros([BK, BV], ACC)
        if FIRST:
            state += tl.load(p_first + o_all, mask=m_kv, other=0.0)
        for i_c in range(0, steps):
            rest = length - i_c * C
            i_rh = (row + i_c) * HV + i_hv
            rows = i_rh * C
            of_key, of_value = (start + i_c * C) * H + i_h, (start + i_c * C) * HV + i_hv
            k = load_tokens(p_k + of_key * K, o_c, o_k, rest, H, K)
            v = load_tokens(p_v + of_value * V, o_c, o_v, rest, HV, V)
            N, N_low, N_row = load_square(p_N + rows * C, o_cc, tl.load(p_top + rows + o_c), DTYPE, ACC)
            G = tl.load(p_G + rows + o_c)
            beta = tl.load(p_b + rows + o_c)
            G_end = tl.load(p_G + rows + C - 1)
            norm_k = load_norm(p_norm_k + rows, o_c, L2, ACC)
            gamma, tail = tl.exp2(G).to(ACC) * norm_k, tl.exp2(G_end - G).to(ACC) * norm_k
            top = largest(state)
            tl.store(p_S_top + (i_rh * NV + i_v) * K + o_k, top, mask=m_k)
            store_fixed(p_S + i_rh * K * V, o_kv, state, top, m_kv, ACC)
            error = errors_of(state, k, v, N, N_low, N_row, gamma, beta, DTYPE, PRECISION, ACC)
            top = largest(error)
            tl.store(p_E_top + (i_rh * NV + i_v) * C + o_c, top)
            store_fixed(p_E + rows * V, o_cv, error, top, m_v, ACC)
            state = written(state, k, error, beta * tail, G_end, DTYPE, PRECISION, ACC)
    else:
        dstate = tl.zeros([BK, BV], ACC)
        if DFINAL:
            dstate += tl.load(p_dfinal + o_all, mask=m_kv, other=0.0)
        if EVERY > 0:
            of_kept = checkpoint_row(p_bounds, i_s, T, EVERY, PACKED)
        for i_back in range(0, steps):
            i_c = steps - 1 - i_back
            rest = length - i_c * C
            i_rh = (row + i_c) * HV + i_hv
            rows = i_rh * C
            of_key, of_value = (start + i_c * C) * H + i_h, (start + i_c * C) * HV + i_hv
            k = load_tokens(p_k + of_key * K, o_c, o_k, rest, H, K)
            q = load_tokens(p_q + of_key * K, o_c, o_k, rest, H, K)
            do = load_tokens(p_do + of_value * V, o_c, o_v, rest, HV, V)
            N, N_low, N_row = load_square(p_N + rows * C, o_cc, tl.load(p_top + rows + o_c), DTYPE, ACC)
            P = tl.load(p_P + rows * C + o_cc)
            G = tl.load(p_G + rows + o_c)
            beta = tl.load(p_b + rows + o_c)
            G_first, G_end = tl.load(p_G + rows), tl.load(p_G + rows + C - 1)
            norm_k = load_norm(p_norm_k + rows, o_c, L2, ACC)
            norm_q = load_norm(p_norm_q + rows, o_c, L2, ACC)
            gamma, tail = tl.exp2(G - G_first).to(ACC), tl.exp2(G_end - G).to(ACC) * norm_k
            if EVERY > 0:
                tokens = (i_c + 1) * C + (number * L if SEGMENTED else 0)
                here, before = checkpoint_at(of_kept, tokens, rest, HV, C, EVERY)
                if here:
                    p = p_dkept + (before + i_hv) * (K * V) + o_kv
                    dstate += tl.load(p, mask=m_kv, other=0.0).to(ACC)
            top = largest(dstate)
            tl.store(p_dS_top + (i_rh * NV + i_v) * K + o_k, top, mask=m_k)
            store_fixed(p_dS + i_rh * K * V, o_kv, dstate, top, m_kv, ACC)
            dR = errors_of_back(dstate, k, do, N, N_low, N_row, P, tail, beta, DTYPE, PRECISION, ACC)
            top = largest(dR)
            tl.store(p_dR_top + (i_rh * NV + i_v) * C + o_c, top)
            store_fixed(p_dR + rows * V, o_cv, dR, top, m_v, ACC)
            of_q, of_k = gamma * norm_q * SCALE, gamma * norm_k * beta
            dstate = written_back(dstate, q, k, do, dR, of_q, of_k, G_first, G_end, DTYPE, PRECISION, ACC)
        if SEGMENTED:
            o_all += (i_s * HV + i_hv - i_sh) * K * V
            m_kv &= number == 0
        tl.store(p_dfirst + o_all, dstate, mask=m_kv)


@triton.jit
def across_cut(X, C: tl.constexpr):
    """For each i, the sum of X[b, a] over b < i <= a: what tokens from i on read of those before."""
    o = tl.arange(0, C)
    return tl.sum(tl.where(o[:, None] < o[None, :], tl.cumsum(X, 1, reverse=True), 0.0), 0)


@triton.jit
def unnormalised(
    dx, p_x, o_c, o_k, rest, norm, H: tl.constexpr, K: tl.constexpr, L2: tl.constexpr, ACC: tl.constexpr
):
    """Gradient of columns of q or k from that of the same at length one."""
    if L2:
        x = load_tokens_across(p_x, o_c, o_k, rest, H, K).to(ACC) * norm[None, :]
        return (dx - x * tl.sum(x * dx, 0)[None, :]) * norm[None, :]
    else:
        return dx


@triton.jit(do_not_specialize=["T", "S"])
def inputs_kernel(
    p_q, p_k, p_do, p_G, p_b, p_norm_q, p_norm_k, p_bounds,
    p_E, p_E_top, p_S, p_S_top, p_dR, p_dR_top, p_dS, p_dS_top,
    p_dq, p_dk, p_dv, p_dg_q, p_dg_k, p_dbeta,
    T, S,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SCALE: tl.constexpr, L2: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk of one key head, summed over its value heads, given E, dR and both boundary
    states: role 0 dq, role 1 dk, dv, dbeta; each has its share of dg. Values go by in the blocks of
    `states_kernel`; gradients of q and k are held across ([BK, C]), so that no accumulator is transposed or
    fed to a product from registers. Grid (R * H * 2).
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    role, i_h = tl.program_id(0) % 2, tl.program_id(0) // 2 % H
    i_r = (tl.program_id(0) // (2 * H)).to(tl.int64)
    first, rest = chunk_at(p_bounds, i_r, T, S, C, PACKED)
    if rest <= 0:
        return
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    # Passes of role 1 over the values: all sums at once would spill; what is read again is in the cache.
    PARTS: tl.constexpr = (3 if DTYPE == ACC else 4) if HV > H else 2 if BK > 32 else 1
    PAIRS: tl.constexpr = min(PARTS - 1, 2)  # the pass for M
    AGAIN: tl.constexpr = HV > H and DTYPE != ACC and PTX  # loads of G and beta in each are not merged
    GACC: tl.constexpr = p_G.dtype.element_ty  # sums of dg cancel: in float32 they need more
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    m_t, m_k = o_c < rest, o_k < K
    i, j = o_c[:, None], o_c[None, :]
    of_key = (first * H + i_h) * K
    dx = tl.zeros([BK, C], ACC)

    for i_g in tl.range(0, HV // H, disable_licm=True):
        i_rh = i_r * HV + i_h * (HV // H) + i_g
        rows, of_value = i_rh * C, first * HV + i_h * (HV // H) + i_g
        if role == 0:
            A, read = tl.zeros([C, C], ACC), tl.zeros([BK, C], ACC)  # A is that of P, across
            for i_v in tl.range(0, NV, disable_licm=True):
                o_v = i_v * BV + tl.arange(0, BV)
                m_v = (o_v < V)[None, :]
                o_cv, o_kv = o_c[:, None] * V + o_v[None, :], o_k[:, None] * V + o_v[None, :]
                do = load_tokens(p_do + of_value * V, o_c, o_v, rest, HV, V)
                top = tl.load(p_E_top + (i_rh * NV + i_v) * C + o_c)
                E, E_low = split(load_fixed(p_E + rows * V, o_cv, top, m_v, ACC), DTYPE, ACC)
                A += dot_parts(E, E_low, tl.trans(do), None, DTYPE, PRECISION, ACC)
                top = tl.load(p_S_top + (i_rh * NV + i_v) * K + o_k, mask=m_k, other=0.0)
                held = load_fixed(p_S + i_rh * K * V, o_kv, top, m_k[:, None] & m_v, ACC)
                held, held_low = split(held, DTYPE, ACC)
                read += dot_parts(held, held_low, tl.trans(do), None, DTYPE, PRECISION, ACC)
            G, beta = tl.load(p_G + rows + o_c), tl.load(p_b + rows + o_c)
            gamma = tl.exp2(G).to(ACC)
            norm_k, norm_q = (
                load_norm(p_norm_k + rows, o_c, L2, ACC),
                load_norm(p_norm_q + rows, o_c, L2, ACC),
            )
            q = load_tokens_across(p_q + of_key, o_c, o_k, rest, H, K)
            k = load_tokens_across(p_k + of_key, o_c, o_k, rest, H, K)
            A *= (beta * norm_k * SCALE)[:, None] * decays(G[None, :], G[:, None], i <= j, ACC)
            read *= (gamma * SCALE)[None, :]
            by_row = tl.sum(q.to(GACC) * read, 0) * norm_q
            dx += read + dot(k, A, DTYPE, PRECISION, ACC)
            kq = dot(tl.trans(k), q, DTYPE, PRECISION, ACC) * norm_q[None, :]
            dg = tl.cumsum(by_row, 0, reverse=True) + across_cut(tl.where(i < j, kq * A, 0.0).to(GACC), C)
            tl.store(p_dg_q + of_value + o_c * HV, dg, mask=m_t)
        else:
            A, M, M_across = tl.zeros([C, C], ACC), tl.zeros([C, C], ACC), tl.zeros([C, C], ACC)
            erased, kept = tl.zeros([BK, C], ACC), tl.zeros([BK, C], ACC)
            dbeta, end = tl.zeros([C], ACC), tl.zeros([BK], GACC)
            dg = tl.zeros([C], GACC)
            for part in tl.static_range(PARTS):
                for i_v in tl.range(0, NV, disable_licm=True):
                    o_v = i_v * BV + tl.arange(0, BV)
                    m_v = (o_v < V)[None, :]
                    o_cv, o_kv = o_c[:, None] * V + o_v[None, :], o_k[:, None] * V + o_v[None, :]
                    do = load_tokens(p_do + of_value * V, o_c, o_v, rest, HV, V)
                    top = tl.load(p_dR_top + (i_rh * NV + i_v) * C + o_c)
                    dR = load_fixed(p_dR + rows * V, o_cv, top, m_v, ACC)
                    top = tl.load(p_E_top + (i_rh * NV + i_v) * C + o_c)
                    E = load_fixed(p_E + rows * V, o_cv, top, m_v, ACC)
                    if part == 0:
                        dbeta += tl.sum(dR * E, 1)
                        beta = tl.load(p_b + rows + o_c)
                        p = p_dv + of_value * V + o_c[:, None] * (HV * V) + o_v[None, :]
                        tl.store(p, narrow(dR * beta[:, None], DTYPE), mask=m_t[:, None] & m_v)
                    dR, dR_low = split(dR, DTYPE, ACC)
                    E, E_low = split(E, DTYPE, ACC)
                    if part == PARTS - 1:
                        A += dot(do, tl.trans(E), DTYPE, PRECISION, ACC)
                    if part == PAIRS:
                        M += dot(dR, tl.trans(E), DTYPE, PRECISION, ACC)
                        M_across += dot_parts(E, E_low, tl.trans(dR), None, DTYPE, PRECISION, ACC)
                    if part == 0:
                        o_row, m_kv = (i_rh * NV + i_v) * K + o_k, m_k[:, None] & m_v
                        top = tl.load(p_S_top + o_row, mask=m_k, other=0.0)
                        state = load_fixed(p_S + i_rh * K * V, o_kv, top, m_kv, ACC)
                        held = narrow(state, DTYPE)
                        erased += dot_parts(held, None, tl.trans(dR), tl.trans(dR_low), DTYPE, PRECISION, ACC)
                        top = tl.load(p_dS_top + o_row, mask=m_k, other=0.0)
                        dstate = load_fixed(p_dS + i_rh * K * V, o_kv, top, m_kv, ACC)
                        end += tl.sum(state.to(GACC) * dstate, 1)
                    if part == PARTS // 3:
                        m_kv = m_k[:, None] & m_v
                        top = tl.load(p_dS_top + (i_rh * NV + i_v) * K + o_k, mask=m_k, other=0.0)
                        dstate = load_fixed(p_dS + i_rh * K * V, o_kv, top, m_kv, ACC)
                        held, held_low = split(dstate, DTYPE, ACC)
                        kept += dot_parts(held, held_low, tl.trans(E), tl.trans(E_low), DTYPE, PRECISION, ACC)
                zero = tl.multiple_of(opaque(i_g * 0, AGAIN), 16)
                G, beta = tl.load(p_G + rows + zero + o_c), tl.load(p_b + rows + zero + o_c)
                gamma = tl.exp2(G).to(ACC)
                norm_k, norm_q = (
                    load_norm(p_norm_k + rows, o_c, L2, ACC),
                    load_norm(p_norm_q + rows, o_c, L2, ACC),
                )
                k = load_tokens_across(p_k + of_key, o_c, o_k, rest, H, K)
                if part == PARTS - 1:
                    q = load_tokens_across(p_q + of_key, o_c, o_k, rest, H, K)
                    A *= (
                        (norm_q * SCALE)[:, None]
                        * beta[None, :]
                        * decays(G[:, None], G[None, :], i >= j, ACC)
                    )
                if part == PAIRS:
                    D = decays(G[:, None], G[None, :], i >= j, ACC)
                    M *= beta[:, None] * beta[None, :] * tl.where(i > j, D, 0.0)
                    M_across *= beta[:, None] * beta[None, :] * decays(G[None, :], G[:, None], i < j, ACC)
                if part == 0:
                    tl.store(p_dbeta + of_value + o_c * HV, dbeta, mask=m_t)
                    erased *= (gamma * beta)[None, :]
                    by_row = tl.sum(k.to(GACC) * erased, 0) * norm_k
                    dx -= erased
                if part == PARTS // 3:
                    G_end = tl.load(p_G + rows + C - 1)
                    kept *= (tl.exp2(G_end - G).to(ACC) * beta)[None, :]
                    left = tl.sum(k.to(GACC) * kept, 0) * norm_k
                    dx += kept
                if part == PARTS - 1:
                    dx += dot(q, A, DTYPE, PRECISION, ACC)
                if part == PAIRS:
                    if DTYPE != ACC:  # before or after: whichever does not spill
                        dx -= dot(k, (M + M_across) * norm_k[:, None], DTYPE, PRECISION, ACC)
                    kk = dot(tl.trans(k), k, DTYPE, PRECISION, ACC) * norm_k[:, None] * norm_k[None, :]
                    dg -= across_cut((kk * M_across).to(GACC), C)
                    if DTYPE == ACC:
                        dx -= dot(k, (M + M_across) * norm_k[:, None], DTYPE, PRECISION, ACC)
                if part == PARTS // 3:
                    dg += tl.cumsum(left, 0) - left - tl.cumsum(by_row, 0, reverse=True)
                    dg += tl.sum(end, 0) * tl.exp2(G_end)
            tl.store(p_dg_k + of_value + o_c * HV, dg, mask=m_t)
    norms = (i_r * HV + i_h * (HV // H)) * C  # of the first head: all of a group have the same
    norm_k, norm_q = load_norm(p_norm_k + norms, o_c, L2, ACC), load_norm(p_norm_q + norms, o_c, L2, ACC)
    o_ck, m_ck = o_c[None, :] * (H * K) + o_k[:, None], m_k[:, None] & m_t[None, :]
    if role == 0:
        dx = unnormalised(dx, p_q + of_key, o_c, o_k, rest, norm_q, H, K, L2, ACC)
        tl.store(p_dq + of_key + o_ck, narrow(dx, DTYPE), mask=m_ck)
    else:
        dx = unnormalised(dx, p_k + of_key, o_c, o_k, rest, norm_k, H, K, L2, ACC)
        tl.store(p_dk + of_key + o_ck, narrow(dx, DTYPE), mask=m_ck)
