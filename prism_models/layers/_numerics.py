"""Two small things that every layer with a state needs."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64: the precision of gates and states."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def valid_tokens(lengths: Tensor, T: int) -> Tensor:
    """b[B,T]: True where the token of a right-padded batch lies before the end of its row."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]
