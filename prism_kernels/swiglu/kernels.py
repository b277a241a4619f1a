"""Triton kernels of the activation: one forward, one backward, over tiles of rows and columns."""

import triton
import triton.language as tl

from .._core.tl_math import narrow


@triton.jit
def tile(rows, F, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """Rows [BLOCK_R, 1] and columns [1, BLOCK_F] of this program in 64 bits, and their mask."""
    i_tile, columns = tl.program_id(0), (F - 1) // BLOCK_F + 1  # tl.cdiv overflows just below 2^31
    o_r = ((i_tile // columns).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    o_f = ((i_tile % columns).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    return o_r, o_f, (o_r < rows) & (o_f < F)


@triton.jit(do_not_specialize=["rows"])
def swiglu_fwd_kernel(
    y_ptr, gate_ptr, up_ptr,
    rows, F, stride_y, stride_gate, stride_up,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y r[rows,F]. Grid: (row blocks x column blocks,)."""
    o_r, o_f, m = tile(rows, F, BLOCK_R, BLOCK_F)
    b_z = tl.load(gate_ptr + o_r * stride_gate + o_f, mask=m, other=0.0).to(ACC)
    b_up = tl.load(up_ptr + o_r * stride_up + o_f, mask=m, other=0.0).to(ACC)
    b_y = b_z / (1.0 + tl.exp(-b_z)) * b_up
    tl.store(y_ptr + o_r * stride_y + o_f, narrow(b_y, y_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows"])
def swiglu_bwd_kernel(
    dgate_ptr, dup_ptr,
    dy_ptr, gate_ptr, up_ptr,
    rows, F, stride_dgate, stride_dup, stride_dy, stride_gate, stride_up,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dgate and dup r[rows,F], two tensors or halves of one. Grid: (row blocks x column blocks,)."""
    o_r, o_f, m = tile(rows, F, BLOCK_R, BLOCK_F)
    b_dy = tl.load(dy_ptr + o_r * stride_dy + o_f, mask=m, other=0.0).to(ACC)
    b_z = tl.load(gate_ptr + o_r * stride_gate + o_f, mask=m, other=0.0).to(ACC)
    b_up = tl.load(up_ptr + o_r * stride_up + o_f, mask=m, other=0.0).to(ACC)
    b_sigmoid = 1.0 / (1.0 + tl.exp(-b_z))
    b_dgate = b_dy * b_up * b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
    b_dup = b_dy * b_z * b_sigmoid
    tl.store(dgate_ptr + o_r * stride_dgate + o_f, narrow(b_dgate, dgate_ptr.dtype.element_ty), mask=m)
    tl.store(dup_ptr + o_r * stride_dup + o_f, narrow(b_dup, dup_ptr.dtype.element_ty), mask=m)
