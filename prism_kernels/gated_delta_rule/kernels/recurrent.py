"""Token by token, forward and backward, in the accumulator's dtype throughout.

A unit of work is a block of values of one head of one sequence. The first axis of the grid counts units: the
others end at 65,535. Sequences are rows of a batch, or lie between bounds that are read here (PACKED). Tokens
are counted over the whole batch.
"""

import triton
import triton.language as tl

from ..._core.chunk_rows import span
from ..._core.tl_math import narrow


@triton.jit
def unit(x, L2: tl.constexpr):
    """A row, of length one if L2."""
    if L2:
        return x * (1.0 / tl.sqrt(tl.sum(x * x, 0) + 1e-6))
    else:
        return x


@triton.jit
def load_token(p, o, D: tl.constexpr, L2: tl.constexpr, ACC: tl.constexpr):
    """One row of a head, widened, of length one if L2."""
    return unit(tl.load(p + o, mask=o < D, other=0.0).to(ACC), L2)


@triton.jit(do_not_specialize=["T"])
def recurrent_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_first, p_bounds,
    p_o, p_final, p_checkpoints,
    T,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2: tl.constexpr, PACKED: tl.constexpr, FIRST: tl.constexpr, SAVE: tl.constexpr,
    EVERY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Outputs, final state and, if SAVE, the state before every EVERY-th token. Grid (S * HV * V / BV)."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_sh = tl.program_id(0) % NV, (tl.program_id(0) // NV).to(tl.int64)
    i_s, i_hv = i_sh // HV, i_sh % HV
    i_h = i_hv // (HV // H)
    start, length, row = span(p_bounds, i_s, T, EVERY, PACKED)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v, m_kv = o_k < K, o_v < V, (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    M = tl.zeros([BK, BV], ACC)
    if FIRST:
        M += tl.load(p_first + i_sh * K * V + o_kv, mask=m_kv, other=0.0)
    for t in range(0, length):
        if SAVE and t % EVERY == 0:
            tl.store(p_checkpoints + ((row + t // EVERY) * HV + i_hv) * K * V + o_kv, M, mask=m_kv)
        of_key, of_value = (start + t) * H + i_h, (start + t) * HV + i_hv
        # All loads of a token before the first use of one: they wait together.
        k = tl.load(p_k + of_key * K + o_k, mask=m_k, other=0.0).to(ACC)
        q = tl.load(p_q + of_key * K + o_k, mask=m_k, other=0.0).to(ACC)
        v = tl.load(p_v + of_value * V + o_v, mask=m_v, other=0.0).to(ACC)
        g, beta = tl.load(p_g + of_value), tl.load(p_beta + of_value)
        k, q = unit(k, L2), unit(q, L2)
        M *= tl.exp(g)
        u = (v - tl.sum(k[:, None] * M, 0)) * beta
        M += k[:, None] * u[None, :]
        o = tl.sum(q[:, None] * M, 0) * SCALE
        tl.store(p_o + of_value * V + o_v, narrow(o, p_o.dtype.element_ty), mask=m_v)
    tl.store(p_final + i_sh * K * V + o_kv, M, mask=m_kv)


@triton.jit(do_not_specialize=["T", "TOKENS", "UNITS"])
def recurrent_backward_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_do, p_dfinal, p_bounds, p_checkpoints, p_scratch,
    p_dq, p_dk, p_dv, p_dg, p_dbeta, p_dfirst,
    T, TOKENS, UNITS,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2: tl.constexpr, PACKED: tl.constexpr, DFINAL: tl.constexpr,
    EVERY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of every token. EVERY decayed states are regenerated from a checkpoint into the program's own
    scratch, then walked backward. A program does one unit after another, so that scratch does not grow with
    them. dq, dk, dg and dbeta are parts, by value head and block of values, to be added up. Grid (programs).
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    o_k = tl.arange(0, BK)
    p_scratch += tl.program_id(0).to(tl.int64) * EVERY * BK * BV
    p_scratch += o_k[:, None] * BV + tl.arange(0, BV)[None, :]
    i_u = tl.program_id(0).to(tl.int64)
    while i_u < UNITS:
        i_v, i_sh = (i_u % NV).to(tl.int32), i_u // NV
        i_s, i_hv = i_sh // HV, i_sh % HV
        i_h = i_hv // (HV // H)
        start, length, row = span(p_bounds, i_s, T, EVERY, PACKED)
        o_v = i_v * BV + tl.arange(0, BV)
        m_k, m_v, m_kv = o_k < K, o_v < V, (o_k < K)[:, None] & (o_v < V)[None, :]
        o_kv = o_k[:, None] * V + o_v[None, :]
        part = i_u % NV * TOKENS * HV
        dM = tl.zeros([BK, BV], ACC)
        if DFINAL:
            dM += tl.load(p_dfinal + i_sh * K * V + o_kv, mask=m_kv, other=0.0)
        for i_r in range(0, tl.cdiv(length, EVERY)):
            i_c = tl.cdiv(length, EVERY) - 1 - i_r
            first = start + i_c * EVERY
            count = tl.minimum(EVERY, length - i_c * EVERY)
            M = tl.load(p_checkpoints + ((row + i_c) * HV + i_hv) * K * V + o_kv, mask=m_kv, other=0.0)
            for s in range(0, count):
                of_key, of_value = (first + s) * H + i_h, (first + s) * HV + i_hv
                k = load_token(p_k + of_key * K, o_k, K, L2, ACC)
                v = tl.load(p_v + of_value * V + o_v, mask=m_v, other=0.0).to(ACC)
                M *= tl.exp(tl.load(p_g + of_value))
                tl.store(p_scratch + s * (BK * BV), M)
                M += k[:, None] * ((v - tl.sum(k[:, None] * M, 0)) * tl.load(p_beta + of_value))[None, :]
            tl.debug_barrier()
            for s_r in range(0, count):
                s = count - 1 - s_r
                of_key, of_value = (first + s) * H + i_h, (first + s) * HV + i_hv
                k = load_token(p_k + of_key * K, o_k, K, L2, ACC)
                q = load_token(p_q + of_key * K, o_k, K, L2, ACC)
                v = tl.load(p_v + of_value * V + o_v, mask=m_v, other=0.0).to(ACC)
                do = tl.load(p_do + of_value * V + o_v, mask=m_v, other=0.0).to(ACC) * SCALE
                beta = tl.load(p_beta + of_value)
                M = tl.load(p_scratch + s * (BK * BV))
                error = v - tl.sum(k[:, None] * M, 0)
                u = error * beta
                dq = tl.sum((M + k[:, None] * u[None, :]) * do[None, :], 1)
                dM += q[:, None] * do[None, :]
                du = tl.sum(k[:, None] * dM, 0)
                dv = du * beta
                dk = tl.sum(dM * u[None, :] - M * dv[None, :], 1)
                dM -= k[:, None] * dv[None, :]
                tl.store(p_dq + (part + of_value) * K + o_k, dq, mask=m_k)
                tl.store(p_dk + (part + of_value) * K + o_k, dk, mask=m_k)
                tl.store(p_dv + of_value * V + o_v, narrow(dv, p_dv.dtype.element_ty), mask=m_v)
                tl.store(p_dbeta + part + of_value, tl.sum(du * error, 0))
                tl.store(p_dg + part + of_value, tl.sum(tl.sum(dM * M, 1), 0))
                dM *= tl.exp(tl.load(p_g + of_value))
            tl.debug_barrier()
        tl.store(p_dfirst + i_sh * K * V + o_kv, dM, mask=m_kv)
        i_u += tl.num_programs(0)


@triton.jit(do_not_specialize=["TOKENS", "S"])
def sum_kernel(
    p_parts, p_x, p_bounds, p_dx,
    TOKENS, S,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    PARTS: tl.constexpr, L2: tl.constexpr, PACKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of q or k from its parts [PARTS, TOKENS, HV, K], added in a fixed order; 0 in padding.
    If L2, that of rows before they were given length one. Grid (TOKENS * H / BR).
    """
    r: tl.constexpr = HV // H
    o_k, o_r = tl.arange(0, BK), tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < TOKENS * H
    if PACKED:
        m_r &= o_r // H < tl.load(p_bounds + S)
    m = m_r[:, None] & (o_k < K)[None, :]
    dx = tl.zeros([BR, BK], ACC)
    for i in range(0, PARTS * r):
        o_part = (i // r * TOKENS + o_r // H) * HV + o_r % H * r + i % r
        dx += tl.load(p_parts + o_part[:, None] * K + o_k[None, :], mask=m, other=0.0)
    o = o_r[:, None] * K + o_k[None, :]
    if L2:
        x = tl.load(p_x + o, mask=m, other=0.0).to(ACC)
        norm = (1.0 / tl.sqrt(tl.sum(x * x, 1) + 1e-6))[:, None]
        x *= norm
        dx = norm * (dx - x * tl.sum(x * dx, 1)[:, None])
    inside = (o_r < TOKENS * H)[:, None] & (o_k < K)[None, :]
    tl.store(p_dx + o, narrow(dx, p_dx.dtype.element_ty), mask=inside)
