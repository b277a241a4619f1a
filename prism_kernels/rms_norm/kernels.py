"""Triton kernels of the normalisation: one forward, one backward, over tiles of whole rows.

A row up to BLOCK_D wide stays in registers: the second pass over it asks for what the first has
loaded, and the compiler sees that, as long as nothing is stored in between. A wider one is walked in
blocks, twice, the second time from a cache.
"""

import triton
import triton.language as tl

from .._core.tl_math import narrow


@triton.jit
def row_offsets(o_r, inner, stride_outer, stride_inner):
    """Offsets [R, 1] of rows of a tensor [outer, inner, D]."""
    return (o_r // inner) * stride_outer + (o_r % inner) * stride_inner


@triton.jit
def load_sum(x_ptr, residual_ptr, o_x, o_residual, m, ACC: tl.constexpr):
    """x + residual."""
    b_s = tl.load(x_ptr + o_x, mask=m, other=0.0).to(ACC)
    if residual_ptr is not None:
        b_s += tl.load(residual_ptr + o_residual, mask=m, other=0.0).to(ACC)
    return b_s


@triton.jit
def load_weight(weight_ptr, o_d, D: tl.constexpr, ACC: tl.constexpr):
    """The weights [1, BLOCK_D] of channels o_d, or ones."""
    if weight_ptr is None:
        return tl.full([1, o_d.shape[0]], 1.0, ACC)
    else:
        return tl.load(weight_ptr + o_d, mask=o_d < D, other=0.0).to(ACC)[None, :]


@triton.jit(do_not_specialize=["rows"])
def rms_norm_fwd_kernel(
    y_ptr, total_ptr, rstd_ptr,
    x_ptr, weight_ptr, residual_ptr, gate_ptr,
    rows, inner, stride_xo, stride_xi, stride_ro, stride_ri, stride_go, stride_gi,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y and total r[rows,D] (contiguous), rstd r[rows]. Grid: (row blocks,)."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r, p_r = (o_r < rows)[:, None], o_r[:, None]
    p_x = row_offsets(p_r, inner, stride_xo, stride_xi)
    p_residual = row_offsets(p_r, inner, stride_ro, stride_ri)
    p_gate = row_offsets(p_r, inner, stride_go, stride_gi)
    b_square = tl.zeros([BLOCK_R, BLOCK_D], dtype=ACC)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m = m_r & (o_d < D)[None, :]
        b_s = load_sum(x_ptr, residual_ptr, p_x + o_d[None, :], p_residual + o_d[None, :], m, ACC)
        b_square += b_s * b_s
    b_rstd = tl.rsqrt(tl.sum(b_square, 1) / D + EPS)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m = m_r & (o_d < D)[None, :]
        b_s = load_sum(x_ptr, residual_ptr, p_x + o_d[None, :], p_residual + o_d[None, :], m, ACC)
        b_y = b_s * b_rstd[:, None] * load_weight(weight_ptr, o_d, D, ACC)
        if gate_ptr is not None:
            b_z = tl.load(gate_ptr + p_gate + o_d[None, :], mask=m, other=0.0).to(ACC)
            b_y = b_y * (b_z / (1.0 + tl.exp(-b_z)))
        p_y = p_r * D + o_d[None, :]
        if total_ptr is not None:
            tl.store(total_ptr + p_y, narrow(b_s, total_ptr.dtype.element_ty), mask=m)
        tl.store(y_ptr + p_y, narrow(b_y, y_ptr.dtype.element_ty), mask=m)
    tl.store(rstd_ptr + o_r, b_rstd, mask=o_r < rows)


@triton.jit
def load_adjoint(
    dy_ptr, x_ptr, residual_ptr, gate_ptr, o_dy, o_x, o_residual, o_gate, b_rstd, m, ACC: tl.constexpr
):
    """Unit row n = s * rstd, dy, and the gate's z, silu(z): what both passes of the backward start from."""
    b_unit = load_sum(x_ptr, residual_ptr, o_x, o_residual, m, ACC) * b_rstd
    b_dy = tl.load(dy_ptr + o_dy, mask=m, other=0.0).to(ACC)
    if gate_ptr is not None:
        b_z = tl.load(gate_ptr + o_gate, mask=m, other=0.0).to(ACC)
        b_sigmoid = 1.0 / (1.0 + tl.exp(-b_z))
        return b_unit, b_dy, b_z, b_sigmoid
    else:
        return b_unit, b_dy, b_dy, b_dy


@triton.jit(do_not_specialize=["rows"])
def rms_norm_bwd_kernel(
    ds_ptr, dresidual_ptr, dgate_ptr, dweight_ptr,
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, residual_ptr, gate_ptr, rstd_ptr,
    rows, inner, stride_yo, stride_yi, stride_to, stride_ti,
    stride_xo, stride_xi, stride_ro, stride_ri, stride_go, stride_gi,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ds, dresidual (the same in another dtype, or None), dgate r[rows,D], dweight r[programs,D].

    Grid: (programs,); each walks every programs-th row block and sums its own dweight.
    """
    i_program, programs = tl.program_id(0), tl.num_programs(0)
    b_dweight = tl.zeros([BLOCK_R, BLOCK_D], dtype=ACC)
    for i_block in range(i_program, (rows - 1) // BLOCK_R + 1, programs):
        o_r = i_block * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        m_r, p_r = (o_r < rows)[:, None], o_r[:, None]
        p_dy = row_offsets(p_r, inner, stride_yo, stride_yi)
        p_dtotal = row_offsets(p_r, inner, stride_to, stride_ti)
        p_x = row_offsets(p_r, inner, stride_xo, stride_xi)
        p_residual = row_offsets(p_r, inner, stride_ro, stride_ri)
        p_gate = row_offsets(p_r, inner, stride_go, stride_gi)
        b_rstd = tl.load(rstd_ptr + o_r, mask=o_r < rows, other=0.0)[:, None]
        b_along = tl.zeros([BLOCK_R, BLOCK_D], dtype=ACC)
        for d in range(0, D, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            p_d, m = o_d[None, :], m_r & (o_d < D)[None, :]
            b_unit, b_dy, b_z, b_sigmoid = load_adjoint(
                dy_ptr, x_ptr, residual_ptr, gate_ptr,
                p_dy + p_d, p_x + p_d, p_residual + p_d, p_gate + p_d, b_rstd, m, ACC,
            )  # fmt: skip
            b_e = b_dy * load_weight(weight_ptr, o_d, D, ACC)
            if gate_ptr is not None:
                b_e = b_e * (b_z * b_sigmoid)
            b_along += b_e * b_unit
        b_share = tl.sum(b_along, 1)[:, None] / D
        for d in range(0, D, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            p_d, m = o_d[None, :], m_r & (o_d < D)[None, :]
            b_unit, b_dy, b_z, b_sigmoid = load_adjoint(
                dy_ptr, x_ptr, residual_ptr, gate_ptr,
                p_dy + p_d, p_x + p_d, p_residual + p_d, p_gate + p_d, b_rstd, m, ACC,
            )  # fmt: skip
            b_e = b_dy * load_weight(weight_ptr, o_d, D, ACC)
            p_out = p_r * D + p_d
            if gate_ptr is not None:
                b_dgate = b_e * b_unit * (b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid)))
                tl.store(dgate_ptr + p_out, narrow(b_dgate, dgate_ptr.dtype.element_ty), mask=m)
                b_e = b_e * (b_z * b_sigmoid)
                b_dy = b_dy * (b_z * b_sigmoid)
            b_ds = (b_e - b_unit * b_share) * b_rstd
            if dtotal_ptr is not None:
                b_ds += tl.load(dtotal_ptr + p_dtotal + p_d, mask=m, other=0.0).to(ACC)
            tl.store(ds_ptr + p_out, narrow(b_ds, ds_ptr.dtype.element_ty), mask=m)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + p_out, narrow(b_ds, dresidual_ptr.dtype.element_ty), mask=m)
            if dweight_ptr is not None and D <= BLOCK_D:
                b_dweight += b_dy * b_unit
            elif dweight_ptr is not None:
                p_dweight = dweight_ptr + i_program.to(tl.int64) * D + o_d
                b_old = tl.load(p_dweight, mask=(o_d < D) & (i_block > i_program), other=0.0)
                tl.store(p_dweight, b_old + tl.sum(b_dy * b_unit, 0), mask=o_d < D)
    if dweight_ptr is not None and D <= BLOCK_D:
        o_d = tl.arange(0, BLOCK_D)
        p_dweight = dweight_ptr + i_program.to(tl.int64) * D + o_d
        tl.store(p_dweight, tl.sum(b_dweight, 0), mask=o_d < D)
