"""Memory for the temporaries of a loop in PyTorch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace:
    """Tensors by name, each the same memory whenever it is asked for.

    A fresh tensor of more than 128 KiB may come straight from the system, which clears it page by page; that
    can take several times as long as the operation which fills it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: dict[str, Tensor] = {}
        self.views: dict[tuple, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised and contiguous; what had this name before is overwritten."""
        key = (name, *shape)
        found = self.views.get(key)
        if found is None:
            kept, count = self.kept.get(name), math.prod(shape)
            if kept is None or len(kept) < count:
                self.kept[name] = kept = torch.empty(count, dtype=dtype, device=self.device)
            self.views[key] = found = kept[:count].view(*shape)
        return found
