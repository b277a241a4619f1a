"""Backward of the chunked form: both recurrences at once, then all chunks in parallel."""

import triton
import triton.language as tl

from ..._core.tl_math import dot, narrow
from .common import (
    decays,
    dot_parts,
    load_norm,
    load_parts,
    load_square,
    load_sum,
    load_tokens,
    load_tokens_across,
    split,
    store_parts,
)


@triton.jit(do_not_specialize=["T"])
def states_kernel(
    p_q, p_k, p_v, p_do, p_N, p_N_low, p_P, p_P_low, p_G, p_b, p_norm_q, p_norm_k,
    p_first, p_dfinal,
    p_E, p_E_low, p_S, p_S_low, p_dR, p_dR_low, p_dS, p_dS_low, p_dfirst,
    T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SCALE: tl.constexpr, L2: tl.constexpr, FIRST: tl.constexpr, DFINAL: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Half 0 runs the state forward and keeps E and S at chunk starts; half 1, which does not depend on it,
    runs the gradient of the state backward and keeps dR and dS at chunk ends. Grid (V / BV, B * H, 2).
    """
    i_v, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    steps = tl.cdiv(T, C)
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    o_cc = o_c[:, None] * C + o_c[None, :]
    o_cv, m_v = o_c[:, None] * V + o_v[None, :], (o_v < V)[None, :]
    o_kv, m_kv = o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]

    if tl.program_id(2) == 0:
        S = tl.zeros([BK, BV], ACC)
        if FIRST:
            S += tl.load(p_first + i_bh * K * V + o_kv, mask=m_kv, other=0.0)
        for i_c in range(0, steps):
            rest = T - i_c * C
            rows = (i_bh * steps + i_c) * C
            tokens = (i_b * T + i_c * C) * H + i_h
            k = load_tokens(p_k + tokens * K, o_c, o_k, rest, H, K)
            v = load_tokens(p_v + tokens * V, o_c, o_v, rest, H, V)
            N, N_low = load_square(p_N, p_N_low, rows * C + o_cc, DTYPE, ACC)
            G = tl.load(p_G + rows + o_c)
            beta = tl.load(p_b + rows + o_c)
            G_end = tl.load(p_G + rows + C - 1)
            norm_k = load_norm(p_norm_k + rows, o_c, L2, ACC)
            tail = tl.exp2(G_end - G).to(ACC) * norm_k
            held, held_low = split(S, DTYPE, ACC)
            start = (i_bh * steps + i_c) * K * V
            store_parts(p_S + start, p_S_low + start, o_kv, held, held_low, m_kv, DTYPE, ACC)
            gamma = tl.exp2(G).to(ACC) * norm_k
            error = v.to(ACC) - dot(k, held, DTYPE, PRECISION, ACC) * gamma[:, None]
            error += dot_parts(N, N_low, narrow(error * beta[:, None], DTYPE), None, DTYPE, PRECISION, ACC)
            E, E_low = split(error, DTYPE, ACC)
            store_parts(p_E + rows * V, p_E_low + rows * V, o_cv, E, E_low, m_v, DTYPE, ACC)
            U, U_low = split(error * (beta * tail)[:, None], DTYPE, ACC)
            S = S * tl.exp2(G_end).to(ACC) + dot_parts(tl.trans(k), None, U, U_low, DTYPE, PRECISION, ACC)
    else:
        dS = tl.zeros([BK, BV], ACC)
        if DFINAL:
            dS += tl.load(p_dfinal + i_bh * K * V + o_kv, mask=m_kv, other=0.0)
        for i_r in range(0, steps):
            i_c = steps - 1 - i_r
            rest = T - i_c * C
            rows = (i_bh * steps + i_c) * C
            tokens = (i_b * T + i_c * C) * H + i_h
            k = load_tokens(p_k + tokens * K, o_c, o_k, rest, H, K)
            q = load_tokens(p_q + tokens * K, o_c, o_k, rest, H, K)
            do = load_tokens(p_do + tokens * V, o_c, o_v, rest, H, V)
            N, N_low = load_square(p_N, p_N_low, rows * C + o_cc, DTYPE, ACC)
            P, P_low = load_square(p_P, p_P_low, rows * C + o_cc, DTYPE, ACC)
            G = tl.load(p_G + rows + o_c)
            beta = tl.load(p_b + rows + o_c)
            G_first, G_end = tl.load(p_G + rows), tl.load(p_G + rows + C - 1)
            norm_k = load_norm(p_norm_k + rows, o_c, L2, ACC)
            norm_q = load_norm(p_norm_q + rows, o_c, L2, ACC)
            # From the first token on: its share must not vanish in 16 bits under a strong decay before it.
            gamma, tail = tl.exp2(G - G_first).to(ACC), tl.exp2(G_end - G).to(ACC) * norm_k
            held, held_low = split(dS, DTYPE, ACC)
            start = (i_bh * steps + i_c) * K * V
            store_parts(p_dS + start, p_dS_low + start, o_kv, held, held_low, m_kv, DTYPE, ACC)
            dU = dot_parts(k, None, held, held_low, DTYPE, PRECISION, ACC) * tail[:, None]
            dU += dot_parts(tl.trans(P), tl.trans(P_low), do, None, DTYPE, PRECISION, ACC)
            x, x_low = split(dU * beta[:, None], DTYPE, ACC)
            dR = dU + dot_parts(tl.trans(N), tl.trans(N_low), x, x_low, DTYPE, PRECISION, ACC)
            high, low = split(dR, DTYPE, ACC)
            store_parts(p_dR + rows * V, p_dR_low + rows * V, o_cv, high, low, m_v, DTYPE, ACC)
            dS *= tl.exp2(G_end - G_first).to(ACC)
            dS += dot(tl.trans(q), do.to(ACC) * (gamma * norm_q * SCALE)[:, None], DTYPE, PRECISION, ACC)
            dS -= dot(tl.trans(k), dR * (gamma * norm_k * beta)[:, None], DTYPE, PRECISION, ACC)
            dS *= tl.exp2(G_first).to(ACC)
        tl.store(p_dfirst + i_bh * K * V + o_kv, dS, mask=m_kv)


@triton.jit(do_not_specialize=["T"])
def inputs_kernel(
    p_q, p_k, p_do, p_G, p_b, p_norm_q, p_norm_k,
    p_E, p_E_low, p_S, p_S_low, p_dR, p_dR_low, p_dS, p_dS_low,
    p_dq, p_dk, p_dv, p_dg_q, p_dg_k, p_dbeta,
    T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SCALE: tl.constexpr, L2: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk, given E, dR and both boundary states: role 0 dq, role 1 dk, dv, dbeta; each
    role has its share of dg. Keys go by in blocks of BK, gradients are held across ([BK, C]), so that no
    accumulator is transposed or fed to a product from registers. Grid (N, B * H, 2).
    """
    i_c, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    steps = tl.cdiv(T, C)
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    o_c, o_v = tl.arange(0, C), tl.arange(0, BV)
    rest = T - i_c * C
    rows = (i_bh * steps + i_c) * C
    tokens = (i_b * T + i_c * C) * H + i_h
    m_t = o_c < rest
    start = (i_bh * steps + i_c) * K * V
    p_S += start
    p_dS += start
    o_cv = rows * V + o_c[:, None] * V + o_v[None, :]
    m_v = (o_v < V)[None, :]
    G = tl.load(p_G + rows + o_c)
    beta = tl.load(p_b + rows + o_c)
    gamma = tl.exp2(G).to(ACC)
    norm_k, norm_q = load_norm(p_norm_k + rows, o_c, L2, ACC), load_norm(p_norm_q + rows, o_c, L2, ACC)
    do = load_tokens(p_do + tokens * V, o_c, o_v, rest, H, V)
    error, error_low = load_parts(p_E, p_E_low, o_cv, m_v, DTYPE, ACC)  # the write is U = beta E
    dG = tl.zeros([C], ACC)

    if tl.program_id(2) == 0:
        E_across = dot_parts(error, error_low, tl.trans(do), None, DTYPE, PRECISION, ACC)
        E_across *= (beta * norm_k * SCALE)[:, None]
        E_across *= decays(G[None, :], G[:, None], o_c[None, :] >= o_c[:, None], ACC)
        kq = tl.zeros([C, C], ACC)
        for i_k in range(0, tl.cdiv(K, BK)):
            o_k = i_k * BK + tl.arange(0, BK)
            q = load_tokens_across(p_q + tokens * K, o_c, o_k, rest, H, K)
            k = load_tokens_across(p_k + tokens * K, o_c, o_k, rest, H, K)
            o_kv, m_kv = o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & m_v
            S, S_low = load_parts(p_S, p_S_low + start, o_kv, m_kv, DTYPE, ACC)
            dq = dot_parts(S, S_low, tl.trans(do), None, DTYPE, PRECISION, ACC) * (gamma * SCALE)[None, :]
            dG += tl.sum(q.to(ACC) * dq, 0) * norm_q
            kq += dot(tl.trans(k), q, DTYPE, PRECISION, ACC)
            dq += dot(k, E_across, DTYPE, PRECISION, ACC)
            m = (o_k < K)[:, None] & m_t[None, :]
            p = p_dq + tokens * K + o_c[None, :] * (H * K) + o_k[:, None]
            tl.store(p, narrow(dq, p_dq.dtype.element_ty), mask=m)
        kq = tl.where(o_c[None, :] > o_c[:, None], kq * E_across * norm_q[None, :], 0.0)
        dG += tl.sum(kq, 0) - tl.sum(kq, 1)
        tl.store(p_dg_q + tokens + o_c * H, tl.cumsum(dG, 0, reverse=True), mask=m_t)
    else:
        lower, upper = o_c[:, None] > o_c[None, :], o_c[:, None] < o_c[None, :]
        G_end = tl.load(p_G + rows + C - 1)
        tail = tl.exp2(G_end - G).to(ACC) * beta
        dR, dR_low = load_parts(p_dR, p_dR_low, o_cv, m_v, DTYPE, ACC)
        E = dot(do, tl.trans(error), DTYPE, PRECISION, ACC) * (norm_q * SCALE)[:, None] * beta[None, :]
        E = narrow(E * decays(G[:, None], G[None, :], o_c[:, None] >= o_c[None, :], ACC), DTYPE)
        M = -dot_parts(dR, dR_low, tl.trans(error), tl.trans(error_low), DTYPE, PRECISION, ACC)
        M *= beta[:, None] * beta[None, :]
        M *= decays(G[:, None], G[None, :], lower, ACC)
        M_across = -dot(error, tl.trans(dR), DTYPE, PRECISION, ACC) * beta[:, None] * beta[None, :]
        M_across *= decays(G[None, :], G[:, None], upper, ACC)
        Z = narrow((M + M_across) * norm_k[:, None], DTYPE)
        kk = tl.zeros([C, C], ACC)
        kept, end = tl.zeros([C], ACC), tl.zeros([BK], ACC)
        for i_k in range(0, tl.cdiv(K, BK)):
            o_k = i_k * BK + tl.arange(0, BK)
            q = load_tokens_across(p_q + tokens * K, o_c, o_k, rest, H, K)
            k = load_tokens_across(p_k + tokens * K, o_c, o_k, rest, H, K)
            o_kv, m_kv = o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & m_v
            S = tl.load(p_S + o_kv, mask=m_kv, other=0.0)
            dS, dS_low = load_parts(p_dS, p_dS_low + start, o_kv, m_kv, DTYPE, ACC)
            kk += dot(tl.trans(k), k, DTYPE, PRECISION, ACC)
            from_r = dot(S, tl.trans(dR), DTYPE, PRECISION, ACC) * (gamma * beta)[None, :]
            to_state = dot_parts(dS, dS_low, tl.trans(error), tl.trans(error_low), DTYPE, PRECISION, ACC)
            to_state *= tail[None, :]
            ks = tl.sum(k.to(ACC) * to_state, 0) * norm_k
            dG -= tl.sum(k.to(ACC) * from_r, 0) * norm_k + ks
            kept += ks
            dk = to_state - from_r
            dk += dot(q, E, DTYPE, PRECISION, ACC)
            dk += dot(k, Z, DTYPE, PRECISION, ACC)
            p = p_dk + tokens * K + o_c[None, :] * (H * K) + o_k[:, None]
            tl.store(p, narrow(dk, p_dk.dtype.element_ty), mask=(o_k < K)[:, None] & m_t[None, :])
        for i_k in range(0, tl.cdiv(K, BK)):
            o_k = i_k * BK + tl.arange(0, BK)
            o_kv, m_kv = o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & m_v
            S_all = load_sum(p_S, p_S_low + start, o_kv, m_kv, DTYPE, ACC)
            end += tl.sum(S_all * load_sum(p_dS, p_dS_low + start, o_kv, m_kv, DTYPE, ACC), 1)
        M *= kk * norm_k[:, None] * norm_k[None, :]
        dG += tl.where(o_c == C - 1, tl.sum(end, 0) * tl.exp2(G_end).to(ACC) + tl.sum(kept, 0), 0.0)
        dG += tl.sum(M, 1) - tl.sum(M, 0)
        dR_all = load_sum(p_dR, p_dR_low, o_cv, m_v, DTYPE, ACC)
        E_all = load_sum(p_E, p_E_low, o_cv, m_v, DTYPE, ACC)
        p = p_dv + tokens * V + o_c[:, None] * (H * V) + o_v[None, :]
        tl.store(p, narrow(dR_all * beta[:, None], DTYPE), mask=m_t[:, None] & m_v)
        tl.store(p_dbeta + tokens + o_c * H, tl.sum(dR_all * E_all, 1), mask=m_t)
        tl.store(p_dg_k + tokens + o_c * H, tl.cumsum(dG, 0, reverse=True), mask=m_t)


@triton.jit(do_not_specialize=["R"])
def unnormalise_kernel(
    p_x, p_dy, p_dx,
    R,
    K: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Through y = x rsqrt(sum x^2 + 1e-6): dx from dy, for R rows of K. Grid (R / BR)."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    m = (o_r < R)[:, None] & (o_k < K)[None, :]
    x = tl.load(p_x + o_r[:, None] * K + o_k[None, :], mask=m, other=0.0).to(ACC)
    dy = tl.load(p_dy + o_r[:, None] * K + o_k[None, :], mask=m, other=0.0)
    norm = 1.0 / tl.sqrt(tl.sum(x * x, 1) + 1e-6)
    y = x * norm[:, None]
    dx = (dy - y * tl.sum(y * dy, 1)[:, None]) * norm[:, None]
    tl.store(p_dx + o_r[:, None] * K + o_k[None, :], narrow(dx, p_dx.dtype.element_ty), mask=m)
