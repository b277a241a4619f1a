"""Ways to hold the same values that make a careless kernel fail."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that reading before writing shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def permuted(x: Tensor) -> Tensor:
    """The same values with the axes laid out in reverse order."""
    axes = list(reversed(range(x.ndim)))
    return x.permute(axes).contiguous().permute(axes)


def sliced(x: Tensor) -> Tensor:
    """The same values as every second entry of the last axis of a NaN-filled tensor."""
    if x.ndim == 0:
        return x
    wide = _nan(x, (*x.shape[:-1], 2 * x.shape[-1]))
    wide[..., ::2] = x
    return wide[..., ::2]


def interior(x: Tensor) -> Tensor:
    """The same values with a margin of NaN on every side."""
    wide = _nan(x, [n + 2 for n in x.shape])
    inner = wide[tuple(slice(1, n + 1) for n in x.shape)]
    inner.copy_(x)
    return inner


def _nan(x: Tensor, shape) -> Tensor:
    fill = float("nan") if x.is_floating_point() or x.is_complex() else torch.iinfo(x.dtype).max
    return torch.full(tuple(shape), fill, dtype=x.dtype, device=x.device)


LAYOUTS = {"permuted": permuted, "sliced": sliced, "interior": interior}
