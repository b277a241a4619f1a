"""Tensors as rows: what kernels over the last axis need to know of a layout."""

from collections.abc import Sequence

from torch import Tensor


def as_rows(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor | None], int, list[int]]:
    """See tensors of one shape [..., D] as [outer, inner, D], without a copy wherever strides allow.

    `inner` is 1 if the rows of every tensor have one stride, else the axis before the last (heads cut
    from one projection). The last axis is contiguous. Returns the views, `inner`, and for each tensor
    its strides of outer and inner (0, 0 for None).
    """
    given = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]
    shape = next(t.shape for t in given if t is not None)
    even = len(shape) < 3 or all(t is None or _evenly_spaced(t) for t in given)
    inner = 1 if even else shape[-2]
    views = [None if t is None else t.reshape(-1, inner, shape[-1]) for t in given]
    return views, inner, [s for t in views for s in ((0, 0) if t is None else t.stride()[:2])]


def _evenly_spaced(t: Tensor) -> bool:
    axes = [(n, s) for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n != 1]
    return all(outer == n * s for (_, outer), (n, s) in zip(axes, axes[1:], strict=False))
