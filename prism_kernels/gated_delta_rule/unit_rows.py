"""Rows of length one, and row products, for the torch path."""

import torch
from torch import Tensor

NORM_EPS = 1e-6


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row products, r[n,C,1]."""
    return (a * b).sum(-1, keepdim=True)


def inverse_lengths(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors that scale the rows of `x` to length one."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_().add_(NORM_EPS).rsqrt_()


def normalise(x: Tensor) -> Tensor:
    """Scale the rows of `x` to length one in place; return the factors."""
    norm = dot(x, x).add_(NORM_EPS).rsqrt_()
    x.mul_(norm)
    return norm


def unnormalise(grad: Tensor, y: Tensor, norm: Tensor | None) -> Tensor:
    """Gradient before `normalise` from the one after it, in place; `y` is the normalised row."""
    return grad if norm is None else grad.addcmul_(y, dot(grad, y), value=-1).mul_(norm)
