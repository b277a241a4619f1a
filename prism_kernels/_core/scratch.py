"""Memory for the temporaries of a loop in PyTorch."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class Scratch:
    """Tensors by name and dtype, each the same memory whenever it is asked for.

    A fresh tensor of more than 128 KiB may come straight from the system, which clears it page by page; that
    can take several times as long as the operation which fills it.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Room for `shape` numbers as those of `like`, contiguous; what was last written there is lost."""
        size, held = prod(shape), self.held.get((name, like.dtype))
        if held is None or held.numel() < size:
            held = self.held[name, like.dtype] = like.new_empty(size)
        return held[:size].view(tuple(shape))
