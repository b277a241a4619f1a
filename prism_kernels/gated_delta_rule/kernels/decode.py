"""Decoding: a few tokens against a pool of states, gates and norms included, in one pass over the state."""

import triton
import triton.language as tl

from ..._core.tl_math import narrow
from .recurrent import unit


@triton.jit
def softplus(x):
    """log(1 + exp(x)), with the digits of a small exponential kept: log(u) y / (u - 1), u = 1 + y rounded."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def load_decay(p_g, p_rate, p_bias, o, i_hv, DECAY: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """Decay of a token: none, from its logarithm, or from raw input."""
    if DECAY == "none":
        return tl.full([], 1.0, ACC)
    else:
        g = tl.load(p_g + o).to(ACC)
        if DECAY == "raw":
            if HAS_BIAS:
                g += tl.load(p_bias + i_hv).to(ACC)
            g = -tl.exp(tl.load(p_rate + i_hv).to(ACC)) * softplus(g)
        return tl.exp(g)


@triton.jit
def load_strength(p_beta, o, STRENGTH: tl.constexpr, TOP: tl.constexpr, ACC: tl.constexpr):
    """Write strength of a token: 1, as given, or TOP times the sigmoid of a logit."""
    if STRENGTH == "none":
        return tl.full([], 1.0, ACC)
    else:
        beta = tl.load(p_beta + o).to(ACC)
        if STRENGTH == "raw":
            beta = TOP / (1.0 + tl.exp(-beta))
        return beta


@triton.jit(do_not_specialize=["T", "S"])
def decode_kernel(
    p_state, p_q, p_k, p_v, p_g, p_beta, p_rate, p_bias, p_indices,
    p_new, p_o, p_snapshots,
    T, S,
    state_s, state_h, state_k, state_v, new_s, new_h, new_k, new_v, snapshot_k, snapshot_v,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, L2: tl.constexpr, DECAY: tl.constexpr, HAS_BIAS: tl.constexpr,
    STRENGTH: tl.constexpr, TOP: tl.constexpr, POOL: tl.constexpr, SNAPSHOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """T tokens of one row and head against a block of values of the state that the row names; rows that name
    none give 0. `p_new` may be `p_state`: nobody else reads or writes that block. Grid (B * HV * V / BV).
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_bh = tl.program_id(0) % NV, (tl.program_id(0) // NV).to(tl.int64)
    i_b, i_hv = i_bh // HV, i_bh % HV
    i_h = i_hv // (HV // H)
    i_s = i_b
    if POOL:
        i_s = tl.load(p_indices + i_b).to(tl.int64)
    live = (i_s >= 0) & (i_s < S)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v, m_kv = o_k < K, o_v < V, (o_k < K)[:, None] & (o_v < V)[None, :]
    p_state += i_s * state_s + i_hv * state_h
    p_new += i_s * new_s + i_hv * new_h
    o_snapshot = o_k[:, None] * snapshot_k + o_v[None, :] * snapshot_v
    if live:
        o_kv = o_k[:, None] * state_k + o_v[None, :] * state_v
        M = tl.load(p_state + o_kv, mask=m_kv, other=0.0).to(ACC)
        for i_bt in range(i_b * T, i_b * T + T):
            t = i_bt - i_b * T
            # All loads of a token before the first use of one: they wait together.
            k = tl.load(p_k + i_b * k_b + t * k_t + i_h * k_h + o_k, mask=m_k, other=0.0).to(ACC)
            q = tl.load(p_q + i_b * q_b + t * q_t + i_h * q_h + o_k, mask=m_k, other=0.0).to(ACC)
            v = tl.load(p_v + i_b * v_b + t * v_t + i_hv * v_h + o_v, mask=m_v, other=0.0).to(ACC)
            o_g, o_beta = i_b * g_b + t * g_t + i_hv * g_h, i_b * beta_b + t * beta_t + i_hv * beta_h
            decay = load_decay(p_g, p_rate, p_bias, o_g, i_hv, DECAY, HAS_BIAS, ACC)
            beta = load_strength(p_beta, o_beta, STRENGTH, TOP, ACC)
            k, q = unit(k, L2), unit(q, L2)
            M *= decay
            u = (v - tl.sum(k[:, None] * M, 0)) * beta
            M += k[:, None] * u[None, :]
            o = tl.sum(q[:, None] * M, 0) * SCALE
            token = i_bt * HV + i_hv
            tl.store(p_o + token * V + o_v, narrow(o, p_o.dtype.element_ty), mask=m_v)
            if SNAPSHOTS:
                snapshot = narrow(M, p_snapshots.dtype.element_ty)
                tl.store(p_snapshots + token * K * V + o_snapshot, snapshot, mask=m_kv)
        o_kv = o_k[:, None] * new_k + o_v[None, :] * new_v
        tl.store(p_new + o_kv, narrow(M, p_new.dtype.element_ty), mask=m_kv)
    else:
        for i_bt in range(i_b * T, i_b * T + T):
            token = i_bt * HV + i_hv
            tl.store(p_o + token * V + o_v, tl.zeros([BV], p_o.dtype.element_ty), mask=m_v)
            if SNAPSHOTS:
                zero = tl.zeros([BK, BV], p_snapshots.dtype.element_ty)
                tl.store(p_snapshots + token * K * V + o_snapshot, zero, mask=m_kv)
