"""Pure-PyTorch path with its own backward: saves its inputs alone, recomputes the sigmoid."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.runtime import accumulate_dtype


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in gate's dtype."""
    wide = accumulate_dtype(gate.dtype)
    return F.silu(gate.to(wide)).mul_(up.to(wide)).to(gate.dtype).contiguous()


def backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    z = gate.to(accumulate_dtype(gate.dtype))
    dy = dy.to(z.dtype)
    sigmoid = torch.sigmoid(z)
    silu = z * sigmoid
    dup = dy * silu
    dgate = (1 + z - silu).mul_(sigmoid).mul_(dy).mul_(up.to(z.dtype))
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()
