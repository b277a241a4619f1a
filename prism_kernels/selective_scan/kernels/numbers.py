"""Arithmetic on numbers that are tuples of planes: (real, imaginary), or (real,) where the poles are real."""

import triton
import triton.language as tl


@triton.jit
def zero_like(a):
    """0 in the form of `a`."""
    if len(a) == 1:
        return (tl.zeros_like(a[0]),)
    else:
        return tl.zeros_like(a[0]), tl.zeros_like(a[0])


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, REAL: tl.constexpr):
    """A tile of zeros."""
    if REAL:
        return (tl.zeros([ROWS, COLUMNS], DTYPE),)
    else:
        return tl.zeros([ROWS, COLUMNS], DTYPE), tl.zeros([ROWS, COLUMNS], DTYPE)


@triton.jit
def plus(a, b):
    """a + b."""
    if len(a) == 1:
        return (a[0] + b[0],)
    else:
        return a[0] + b[0], a[1] + b[1]


@triton.jit
def minus(a, b):
    """a - b."""
    if len(a) == 1:
        return (a[0] - b[0],)
    else:
        return a[0] - b[0], a[1] - b[1]


@triton.jit
def scaled(a, s):
    """a s, with s real."""
    if len(a) == 1:
        return (a[0] * s,)
    else:
        return a[0] * s, a[1] * s


@triton.jit
def conj(a):
    """conj(a)."""
    if len(a) == 1:
        return a
    else:
        return a[0], -a[1]


@triton.jit
def product(a, b):
    """a b."""
    if len(a) == 1:
        return (a[0] * b[0],)
    else:
        return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


@triton.jit
def plus_product(c, a, b):
    """c + a b, each product added as it is made."""
    if len(a) == 1:
        return (c[0] + a[0] * b[0],)
    else:
        return c[0] + a[0] * b[0] - a[1] * b[1], c[1] + a[0] * b[1] + a[1] * b[0]


@triton.jit
def product_conj(a, b):
    """a conj(b)."""
    if len(a) == 1:
        return (a[0] * b[0],)
    else:
        return a[0] * b[0] + a[1] * b[1], a[1] * b[0] - a[0] * b[1]


@triton.jit
def real_product_conj(a, b):
    """Re a conj(b)."""
    if len(a) == 1:
        return a[0] * b[0]
    else:
        return a[0] * b[0] + a[1] * b[1]


@triton.jit
def over(a, b):
    """a / b."""
    if len(a) == 1:
        return (a[0] / b[0],)
    else:
        return scaled(product_conj(a, b), 1.0 / (b[0] * b[0] + b[1] * b[1]))


@triton.jit
def pick(which, a, b):
    """a where `which`, else b."""
    if len(a) == 1:
        return (tl.where(which, a[0], b[0]),)
    else:
        return tl.where(which, a[0], b[0]), tl.where(which, a[1], b[1])


@triton.jit
def real_dot(a, b, axis: tl.constexpr):
    """Re sum a conj(b) along an axis; a sum for each plane, so that every product is added as it is made."""
    if len(a) == 1:
        return tl.sum(a[0] * b[0], axis=axis)
    else:
        return tl.sum(a[0] * b[0], axis=axis) + tl.sum(a[1] * b[1], axis=axis)


@triton.jit
def real_sum(a, b):
    """Re sum a b over the states, the first axis."""
    if len(a) == 1:
        return tl.sum(a[0] * b[0], axis=0)
    else:
        return tl.sum(a[0] * b[0] - a[1] * b[1], axis=0)


@triton.jit
def total(a, axis: tl.constexpr):
    """sum a along an axis."""
    if len(a) == 1:
        return (tl.sum(a[0], axis=axis),)
    else:
        return tl.sum(a[0], axis=axis), tl.sum(a[1], axis=axis)


@triton.jit
def as_column(a):
    """`a` with an axis behind."""
    if len(a) == 1:
        return (a[0][:, None],)
    else:
        return a[0][:, None], a[1][:, None]


@triton.jit
def as_row(a):
    """`a` with an axis in front."""
    if len(a) == 1:
        return (a[0][None, :],)
    else:
        return a[0][None, :], a[1][None, :]


@triton.jit
def load_number(p, mask, ACC: tl.constexpr, REAL: tl.constexpr, STEP: tl.constexpr = 1):
    """A number, widened; 0 where `mask` is not. The imaginary part lies STEP behind the real one."""
    if REAL:
        return (tl.load(p, mask=mask, other=0.0).to(ACC),)
    else:
        r = tl.load(p, mask=mask, other=0.0).to(ACC)
        return r, tl.load(p + STEP, mask=mask, other=0.0).to(ACC)


@triton.jit
def store_number(p, a, mask, STEP: tl.constexpr = 1):
    """The inverse of `load_number`."""
    tl.store(p, a[0], mask=mask)
    if len(a) == 2:
        tl.store(p + STEP, a[1], mask=mask)
