"""Token by token, forward and backward, in the accumulator's dtype throughout."""

import triton
import triton.language as tl

from ..._core.tl_math import narrow


@triton.jit
def load_token(p, o, D: tl.constexpr, L2: tl.constexpr, ACC: tl.constexpr):
    """One row of a head, widened, of length one if L2."""
    x = tl.load(p + o, mask=o < D, other=0.0).to(ACC)
    if L2:
        return x * (1.0 / tl.sqrt(tl.sum(x * x, 0) + 1e-6))
    else:
        return x


@triton.jit(do_not_specialize=["T"])
def recurrent_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_first,
    p_o, p_final, p_checkpoints,
    T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2: tl.constexpr, FIRST: tl.constexpr, SAVE: tl.constexpr, EVERY: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Outputs, final state and, if SAVE, the state before every EVERY-th token. Grid (V / BV, B * H)."""
    i_v, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_v, m_kv = o_v < V, (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    M = tl.zeros([BK, BV], ACC)
    if FIRST:
        M += tl.load(p_first + i_bh * K * V + o_kv, mask=m_kv, other=0.0)
    for t in range(0, T):
        if SAVE and t % EVERY == 0:
            row = i_bh * tl.cdiv(T, EVERY) + t // EVERY
            tl.store(p_checkpoints + row * K * V + o_kv, M, mask=m_kv)
        token = (i_b * T + t) * H + i_h
        k = load_token(p_k + token * K, o_k, K, L2, ACC)
        q = load_token(p_q + token * K, o_k, K, L2, ACC)
        v = tl.load(p_v + token * V + o_v, mask=m_v, other=0.0).to(ACC)
        M *= tl.exp(tl.load(p_g + token))
        u = (v - tl.sum(k[:, None] * M, 0)) * tl.load(p_beta + token)
        M += k[:, None] * u[None, :]
        o = tl.sum(q[:, None] * M, 0) * SCALE
        tl.store(p_o + token * V + o_v, narrow(o, p_o.dtype.element_ty), mask=m_v)
    tl.store(p_final + i_bh * K * V + o_kv, M, mask=m_kv)


@triton.jit(do_not_specialize=["T"])
def recurrent_backward_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_do, p_dfinal, p_checkpoints, p_scratch,
    p_dq, p_dk, p_dv, p_dg, p_dbeta, p_dfirst,
    T, B,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2: tl.constexpr, DFINAL: tl.constexpr, EVERY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of every token. EVERY decayed states are regenerated from a checkpoint into the program's own
    scratch, then walked backward. dq, dk, dg and dbeta are partial sums, one per block of values: the caller
    adds them up in a fixed order. Grid (V / BV, B * H).
    """
    i_v, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v, m_kv = o_k < K, o_v < V, (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    N = tl.cdiv(T, EVERY)
    p_scratch += (i_bh * tl.num_programs(0) + i_v) * EVERY * BK * BV
    p_scratch += tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]
    partial = i_v.to(tl.int64) * B * T * H
    dM = tl.zeros([BK, BV], ACC)
    if DFINAL:
        dM += tl.load(p_dfinal + i_bh * K * V + o_kv, mask=m_kv, other=0.0)
    for i_r in range(0, N):
        i_c = N - 1 - i_r
        start = i_c * EVERY
        count = tl.minimum(EVERY, T - start)
        M = tl.load(p_checkpoints + (i_bh * N + i_c) * K * V + o_kv, mask=m_kv, other=0.0)
        for s in range(0, count):
            token = (i_b * T + start + s) * H + i_h
            k = load_token(p_k + token * K, o_k, K, L2, ACC)
            v = tl.load(p_v + token * V + o_v, mask=m_v, other=0.0).to(ACC)
            M *= tl.exp(tl.load(p_g + token))
            tl.store(p_scratch + s * (BK * BV), M)
            M += k[:, None] * ((v - tl.sum(k[:, None] * M, 0)) * tl.load(p_beta + token))[None, :]
        tl.debug_barrier()
        for s_r in range(0, count):
            s = count - 1 - s_r
            token = (i_b * T + start + s) * H + i_h
            k = load_token(p_k + token * K, o_k, K, L2, ACC)
            q = load_token(p_q + token * K, o_k, K, L2, ACC)
            v = tl.load(p_v + token * V + o_v, mask=m_v, other=0.0).to(ACC)
            do = tl.load(p_do + token * V + o_v, mask=m_v, other=0.0).to(ACC) * SCALE
            beta = tl.load(p_beta + token)
            M = tl.load(p_scratch + s * (BK * BV))
            error = v - tl.sum(k[:, None] * M, 0)
            u = error * beta
            dq = tl.sum((M + k[:, None] * u[None, :]) * do[None, :], 1)
            dM += q[:, None] * do[None, :]
            du = tl.sum(k[:, None] * dM, 0)
            dv = du * beta
            dk = tl.sum(dM * u[None, :] - M * dv[None, :], 1)
            dM -= k[:, None] * dv[None, :]
            tl.store(p_dq + (partial + token) * K + o_k, dq, mask=m_k)
            tl.store(p_dk + (partial + token) * K + o_k, dk, mask=m_k)
            tl.store(p_dv + token * V + o_v, narrow(dv, p_dv.dtype.element_ty), mask=m_v)
            tl.store(p_dbeta + partial + token, tl.sum(du * error, 0))
            tl.store(p_dg + partial + token, tl.sum(tl.sum(dM * M, 1), 0))
            dM *= tl.exp(tl.load(p_g + token))
        tl.debug_barrier()
    tl.store(p_dfirst + i_bh * K * V + o_kv, dM, mask=m_kv)
