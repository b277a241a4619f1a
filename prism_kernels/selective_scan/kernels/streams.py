"""What is elementwise in tokens and channels: step size, gate; around the backward's walk, in scratch."""

import triton
import triton.language as tl

from ..._core.tl_math import exp2_approx, narrow
from .exponential import ACCURATE, LOG2E, MUFU, growth


@triton.jit
def unit_exp(x, FAST: tl.constexpr):
    """exp(x) for x <= 0."""
    if FAST == ACCURATE or x.dtype == tl.float64:
        return growth(x)[0]
    else:
        return exp2_approx(x * LOG2E, FAST == MUFU)


@triton.jit
def step_size(raw, SOFTPLUS: tl.constexpr, FAST: tl.constexpr):
    """The step size and its derivative: softplus, or `raw` itself.

    With t = e / (2 + e) <= 1/3, log(1 + e) = 2 artanh(t) = e - t (e - 2 t^2 (1/3 + t^2/5 + ...)): the small
    last term takes the errors of the division and the series, and little but that of e is left.
    """
    if SOFTPLUS:
        TERMS: tl.constexpr = 16 if raw.dtype == tl.float64 else 7
        e = unit_exp(-tl.abs(raw), FAST)
        t = e / (2.0 + e)
        square = t * t
        series = tl.full(raw.shape, 2 / (2 * TERMS + 1), raw.dtype)
        for k in tl.static_range(TERMS - 1, 0, -1):
            series = 2 / (2 * k + 1) + square * series
        rise = e - t * (e - square * series)
        return tl.maximum(raw, 0.0) + rise, tl.where(raw > 0.0, 1.0, e) / (1.0 + e)
    else:
        return raw, tl.full(raw.shape, 1.0, raw.dtype)


@triton.jit
def gate(z, FAST: tl.constexpr):
    """silu(z) and its derivative."""
    e = unit_exp(-tl.abs(z), FAST)
    norm = 1.0 / (1.0 + e)
    sigmoid = tl.where(z > 0.0, 1.0, e) * norm
    return z * sigmoid, sigmoid * (1.0 + z * (tl.where(z > 0.0, e, 1.0) * norm))


@triton.jit
def prepare(
    inputs, strides, kept, p_bias, tokens, m_c, KAPPA: tl.constexpr, BLOCK_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keep u, the step size and g = kappa dL/dy before the gate of a segment, in scratch.

    Then the sums over its tokens of the step size and of g u. (They leave by memory, so that the tiles here
    and the tiles of states are laid out over the lanes each as suits them.)
    """
    p_u, p_dt, p_dy, p_z = inputs
    k_u, k_dt, k_g, k_sums = kept
    ACC: tl.constexpr = k_u.dtype.element_ty
    o_c = tl.arange(0, BLOCK_C)
    bias = tl.zeros([BLOCK_C], ACC)
    if BIASED:
        bias += tl.load(p_bias, mask=m_c, other=0.0).to(ACC)
    time = tl.zeros([BLOCK_C, ROWS], ACC)
    driven = tl.zeros([BLOCK_C, ROWS], ACC)
    for i in range(tl.cdiv(tokens, ROWS)):
        o_t = i * ROWS + tl.arange(0, ROWS)
        inside = (o_t < tokens)[None, :]
        mask = inside & m_c[:, None]
        o_kept = o_t[None, :] * BLOCK_C + o_c[:, None]
        t = o_t.to(tl.int64)[None, :]
        u = tl.load(p_u[:, None] + t * strides[0], mask=mask, other=0.0).to(ACC)
        raw = tl.load(p_dt[:, None] + t * strides[1], mask=mask, other=0.0).to(ACC)
        g = KAPPA * tl.load(p_dy[:, None] + t * strides[2], mask=mask, other=0.0).to(ACC)
        if GATED:
            z = tl.load(p_z[:, None] + t * strides[3], mask=mask, other=0.0).to(ACC)
            g *= gate(z, FAST)[0]
        dt = tl.where(mask, step_size(raw + bias[:, None], SOFTPLUS, FAST)[0], 0.0)
        tl.store(k_u + o_kept, u, mask=inside)
        tl.store(k_dt + o_kept, dt, mask=inside)
        tl.store(k_g + o_kept, g, mask=inside)
        time += dt
        driven += g * u
    tl.store(k_sums + o_c, tl.sum(time, axis=1))
    tl.store(k_sums + BLOCK_C + o_c, tl.sum(driven, axis=1))


@triton.jit
def finish(
    inputs, strides, kept, outputs, p_bias, tokens, m_c, BLOCK_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr, BIASED: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of u, dt and z of a segment, whose parts the walk kept; return the sum of dt's."""
    p_u, p_dt, p_dy, p_z = inputs
    k_du, k_ddt, k_y = kept
    p_du, p_ddt, p_dz = outputs
    ACC: tl.constexpr = k_du.dtype.element_ty
    o_c = tl.arange(0, BLOCK_C)
    bias = tl.zeros([BLOCK_C], ACC)
    if BIASED:
        bias += tl.load(p_bias, mask=m_c, other=0.0).to(ACC)
    summed = tl.zeros([BLOCK_C, ROWS], ACC)
    for i in range(tl.cdiv(tokens, ROWS)):
        o_t = i * ROWS + tl.arange(0, ROWS)
        mask = (o_t < tokens)[None, :] & m_c[:, None]
        o_kept = o_t[None, :] * BLOCK_C + o_c[:, None]
        t = o_t.to(tl.int64)[None, :]
        o_out = t * strides[2]
        du = tl.load(k_du + o_kept, mask=mask, other=0.0)
        ddt = tl.load(k_ddt + o_kept, mask=mask, other=0.0)
        if SOFTPLUS:
            raw = tl.load(p_dt[:, None] + t * strides[1], mask=mask, other=0.0).to(ACC)
            ddt *= step_size(raw + bias[:, None], SOFTPLUS, FAST)[1]
        tl.store(p_du[:, None] + o_out, narrow(du, p_du.dtype.element_ty), mask=mask)
        tl.store(p_ddt[:, None] + o_out, narrow(ddt, p_ddt.dtype.element_ty), mask=mask)
        summed += ddt
        if GATED:
            y = tl.load(k_y + o_kept, mask=mask, other=0.0)
            dy = tl.load(p_dy[:, None] + t * strides[2], mask=mask, other=0.0).to(ACC)
            z = tl.load(p_z[:, None] + t * strides[3], mask=mask, other=0.0).to(ACC)
            dz = dy * y * gate(z, FAST)[1]
            tl.store(p_dz[:, None] + o_out, narrow(dz, p_dz.dtype.element_ty), mask=mask)
    return tl.sum(summed, axis=1)
