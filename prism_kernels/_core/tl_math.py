"""Device functions shared by the kernels of several ops.

Triton's interpreter stores bfloat16 by cutting bits off and returns garbage for bfloat16 arithmetic.
The helpers below widen before arithmetic and round to nearest even by hand when interpreting, so
that the same kernel source is right on the CPU and costs nothing more on a GPU.
"""

import os

import triton
import triton.language as tl

INTERPRET: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round `x` to nearest even in DTYPE."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        rounded = ((bits + 0x7FFF + even) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x).to(tl.bfloat16)
    else:
        return x.to(DTYPE)


@triton.jit
def operand(x, DTYPE: tl.constexpr):
    """`x` as an operand of `dot` in DTYPE: rounded to it, and widened again when interpreting."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        return narrow(x, DTYPE).to(tl.float32)
    else:
        return x.to(DTYPE)


@triton.jit
def dot(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr = tl.float32):
    """Matrix product of `a` and `b` with operands rounded to DTYPE and sums in ACC.

    PRECISION is the input_precision of float32 operands ("ieee" or "tf32x3"); 16-bit operands ignore it.
    """
    return tl.dot(operand(a, DTYPE), operand(b, DTYPE), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def exp2_approx(x, PTX: tl.constexpr):
    """2**x in float32, within 2**-22.5 of the value; one instruction where PTX says that PTX can be used."""
    if PTX and not INTERPRET:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, False, 1)
    else:
        return tl.exp2(x)


@triton.jit
def sin_approx(x, PTX: tl.constexpr):
    """sin(x) in float32 for |x| <= pi, within 2**-20.9; one instruction as `exp2_approx` is."""
    if PTX and not INTERPRET:
        return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, False, 1)
    else:
        return tl.sin(x)


@triton.jit
def cos_approx(x, PTX: tl.constexpr):
    """cos(x) in float32 for |x| <= pi, within 2**-20.9; one instruction as `exp2_approx` is."""
    if PTX and not INTERPRET:
        return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, False, 1)
    else:
        return tl.cos(x)


@triton.jit
def opaque(x, PTX: tl.constexpr):
    """The 32-bit scalar `x`, which the compiler takes for a new value wherever PTX can be used.

    What is computed from it is computed where it stands, not before a loop that has no registers to spare.
    """
    if PTX and not INTERPRET:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)
    else:
        return x
