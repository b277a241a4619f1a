"""Forward of the chunked form: all chunks in parallel, then the recurrence of the state over chunks."""

import triton
import triton.language as tl

from ..._core.chunk_rows import chunk_at, span
from ..._core.tl_math import dot, narrow
from .common import (
    LOG2E,
    checkpoint_at,
    checkpoint_row,
    coupling,
    coupling_step,
    decays,
    dot_parts,
    largest,
    load_norm,
    load_square,
    load_tokens,
    segment_at,
    split,
    store_fixed,
)


@triton.jit
def load_rows(p, o_t, o_k, rest, H: tl.constexpr, K: tl.constexpr, L2: tl.constexpr, ACC: tl.constexpr):
    """Rows and, if L2, the factors that give them length one (else ones)."""
    x = load_tokens(p, o_t, o_k, rest, H, K)
    if L2:
        wide = x.to(ACC)
        return x, 1.0 / tl.sqrt(tl.sum(wide * wide, 1) + 1e-6)
    else:
        return x, tl.full([o_t.shape[0]], 1.0, ACC)


@triton.jit
def block_pair(q, k_to, k_from, D, norm_q, norm_k, norm_from, DTYPE: tl.constexpr,
               PRECISION: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """One block of W (with a diagonal that its user masks) and of P."""
    D *= norm_from[None, :]
    W = dot(k_to, tl.trans(k_from), DTYPE, PRECISION, ACC) * D * norm_k[:, None]
    P = dot(q, tl.trans(k_from), DTYPE, PRECISION, ACC) * D * norm_q[:, None]
    return W, P


@triton.jit
def store_tokens(p_G, p_b, p_norm_q, p_norm_k, o, G, beta, norm_q, norm_k, L2: tl.constexpr):
    """Per-token numbers of one head, laid out per head."""
    tl.store(p_G + o, G)
    tl.store(p_b + o, beta)
    if L2:
        tl.store(p_norm_q + o, norm_q)
        tl.store(p_norm_k + o, norm_k)


@triton.jit(do_not_specialize=["T", "S"])
def prepare_kernel(
    p_q, p_k, p_g, p_beta, p_bounds,
    p_N, p_P, p_G, p_b, p_top, p_norm_q, p_norm_k,
    T, S,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    HALF: tl.constexpr, LOG_HALF: tl.constexpr, SCALE: tl.constexpr, L2: tl.constexpr, PACKED: tl.constexpr,
    INVERSE: tl.constexpr, INVERSE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Per chunk: N = -W (I + diag(beta) W)^-1 with W = stril(K K^T * D), P = scale tril(Q K^T * D), and G,
    beta and norms per head. A chunk of 64 is two halves and the corner between them, for shorter products;
    others are one block. Grid (R * HV).
    """
    i_r, i_hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    i_h = i_hv // (HV // H)
    first, rest = chunk_at(p_bounds, i_r, T, S, C, PACKED)
    if rest <= 0:
        return
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    GACC: tl.constexpr = p_G.dtype.element_ty
    o_c, o_k = tl.arange(0, HALF), tl.arange(0, BK)
    rows = (i_r * HV + i_hv) * C
    p_k += (first * H + i_h) * K
    p_q += (first * H + i_h) * K
    p_g += first * HV + i_hv
    p_beta += first * HV + i_hv
    m_read = o_c[:, None] >= o_c[None, :]
    o_cc = rows * C + o_c[:, None] * C + o_c[None, :]

    k1, norm_k1 = load_rows(p_k, o_c, o_k, rest, H, K, L2, ACC)
    q1, norm_q1 = load_rows(p_q, o_c, o_k, rest, H, K, L2, ACC)
    beta1 = tl.load(p_beta + o_c * HV, mask=o_c < rest, other=0.0)
    G1 = tl.cumsum(tl.load(p_g + o_c * HV, mask=o_c < rest, other=0.0).to(GACC) * LOG2E, 0)
    D = decays(G1[:, None], G1[None, :], m_read, ACC)
    W11, P11 = block_pair(q1, k1, k1, D, norm_q1 * SCALE, norm_k1, norm_k1, DTYPE, PRECISION, ACC)
    tl.store(p_P + o_cc, narrow(P11, DTYPE))
    store_tokens(p_G, p_b, p_norm_q, p_norm_k, rows + o_c, G1, beta1, norm_q1, norm_k1, L2)
    if HALF < C:
        o_d = o_c + HALF
        k2, norm_k2 = load_rows(p_k, o_d, o_k, rest, H, K, L2, ACC)
        q2, norm_q2 = load_rows(p_q, o_d, o_k, rest, H, K, L2, ACC)
        beta2 = tl.load(p_beta + o_d * HV, mask=o_d < rest, other=0.0)
        g2 = tl.load(p_g + o_d * HV, mask=o_d < rest, other=0.0).to(GACC) * LOG2E
        G2 = tl.cumsum(g2, 0) + tl.min(G1, 0)
        D = decays(G2[:, None], G1[None, :], m_read | (o_c[None, :] >= 0), ACC)
        W21, P21 = block_pair(q2, k2, k1, D, norm_q2 * SCALE, norm_k2, norm_k1, DTYPE, PRECISION, ACC)
        D = decays(G2[:, None], G2[None, :], m_read, ACC)
        W22, P22 = block_pair(q2, k2, k2, D, norm_q2 * SCALE, norm_k2, norm_k2, DTYPE, PRECISION, ACC)
        tl.store(p_P + o_cc + HALF, tl.zeros([HALF, HALF], DTYPE))
        tl.store(p_P + o_cc + HALF * C, narrow(P21, DTYPE))
        tl.store(p_P + o_cc + HALF * C + HALF, narrow(P22, DTYPE))
        store_tokens(p_G, p_b, p_norm_q, p_norm_k, rows + o_d, G2, beta2, norm_q2, norm_k2, L2)

    N11 = coupling(W11, beta1, HALF, LOG_HALF, INVERSE, INVERSE_PRECISION, ACC)
    top = largest(N11)
    tl.store(p_top + rows + o_c, top)
    store_fixed(p_N, o_cc, N11, top, None, ACC)
    if HALF < C:
        N22 = coupling(W22, beta2, HALF, LOG_HALF, INVERSE, INVERSE_PRECISION, ACC)
        N21 = coupling_step(N22, W21, N11, beta2, beta1, HALF, INVERSE, INVERSE_PRECISION, ACC)
        top = tl.maximum(largest(N21), largest(N22), propagate_nan=tl.PropagateNan.ALL)
        tl.store(p_top + rows + o_d, top)
        store_fixed(p_N, o_cc + HALF, tl.zeros([HALF, HALF], ACC), top, None, ACC)
        store_fixed(p_N, o_cc + HALF * C, N21, top, None, ACC)
        store_fixed(p_N, o_cc + HALF * C + HALF, N22, top, None, ACC)


@triton.jit(do_not_specialize=["T", "S", "L"])
def scan_kernel(
    p_q, p_k, p_v, p_N, p_P, p_G, p_b, p_top, p_norm_q, p_norm_k, p_first, p_bounds,
    p_o, p_final, p_kept,
    T, S, L,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SCALE: tl.constexpr, L2: tl.constexpr, PACKED: tl.constexpr, FIRST: tl.constexpr,
    EVERY: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Outputs, final state and, unless EVERY is 0, the state after each EVERY tokens of a sequence; the state
    [BK, BV] stays in registers. Grid (S * HV * V / BV),
    or with segments of L tokens, which have a state to start from, (rows of them * HV * V / BV).
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_sh = tl.program_id(0) % NV, (tl.program_id(0) // NV).to(tl.int64)
    i_s, i_hv = i_sh // HV, i_sh % HV
    i_h = i_hv // (HV // H)
    if SEGMENTED:
        start, follow, row, i_s, number = segment_at(p_bounds, i_s, T, S, L, C, PACKED)
        if (follow <= 0) & (number > 0):
            return
        length = tl.minimum(follow, L)
    else:
        start, length, row = span(p_bounds, i_s, T, C, PACKED)
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    o_cc = o_c[:, None] * C + o_c[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    o_state = i_sh * K * V + o_kv
    m_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    state = tl.zeros([BK, BV], ACC)
    if FIRST:
        state += tl.load(p_first + o_state, mask=m_state, other=0.0)
    if EVERY > 0:
        of_kept = checkpoint_row(p_bounds, i_s, T, EVERY, PACKED)

    for i_c in range(0, tl.cdiv(length, C)):
        rest = length - i_c * C
        rows = ((row + i_c) * HV + i_hv) * C
        of_key, of_value = (start + i_c * C) * H + i_h, (start + i_c * C) * HV + i_hv
        k = load_tokens(p_k + of_key * K, o_c, o_k, rest, H, K)
        q = load_tokens(p_q + of_key * K, o_c, o_k, rest, H, K)
        v = load_tokens(p_v + of_value * V, o_c, o_v, rest, HV, V)
        N, N_low, N_row = load_square(p_N + rows * C, o_cc, tl.load(p_top + rows + o_c), DTYPE, ACC)
        P = tl.load(p_P + rows * C + o_cc)
        G = tl.load(p_G + rows + o_c)
        beta = tl.load(p_b + rows + o_c)
        G_end = tl.load(p_G + rows + C - 1)
        norm_k, norm_q = load_norm(p_norm_k + rows, o_c, L2, ACC), load_norm(p_norm_q + rows, o_c, L2, ACC)
        gamma, tail = tl.exp2(G).to(ACC), tl.exp2(G_end - G).to(ACC) * norm_k
        held = narrow(state, DTYPE)
        error = v.to(ACC) - (gamma * norm_k)[:, None] * dot(k, held, DTYPE, PRECISION, ACC)
        o = dot(q, held, DTYPE, PRECISION, ACC) * (gamma * norm_q * SCALE)[:, None]
        R = narrow(error * beta[:, None], DTYPE)
        error += dot_parts(N, N_low, R, None, DTYPE, PRECISION, ACC) * N_row[:, None]
        o += dot(P, error * beta[:, None], DTYPE, PRECISION, ACC)
        U, U_low = split(error * (beta * tail)[:, None], DTYPE, ACC)
        state *= tl.exp2(G_end).to(ACC)
        state += dot_parts(tl.trans(k), None, U, U_low, DTYPE, PRECISION, ACC)
        m_o = (o_c < rest)[:, None] & (o_v < V)[None, :]
        tl.store(p_o + of_value * V + o_c[:, None] * (HV * V) + o_v[None, :], narrow(o, DTYPE), mask=m_o)
        if EVERY > 0:
            tokens = (i_c + 1) * C + (number * L if SEGMENTED else 0)
            here, before = checkpoint_at(of_kept, tokens, rest, HV, C, EVERY)
            if here:
                kept = narrow(state, p_kept.dtype.element_ty)
                tl.store(p_kept + (before + i_hv) * (K * V) + o_kv, kept, mask=m_state)
    if SEGMENTED:
        o_state += (i_s * HV + i_hv - i_sh) * K * V
        m_state &= follow <= L  # the last of its sequence
    tl.store(p_final + o_state, state, mask=m_state)
