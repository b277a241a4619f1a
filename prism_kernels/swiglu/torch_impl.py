"""Pure-PyTorch path with its own backward: saves its inputs alone, recomputes the sigmoid."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.runtime import accumulate_dtype


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in gate's dtype."""
    wide = accumulate_dtype(gate.dtype)
    return F.silu(gate.to(wide)).mul_(up.to(wide)).to(gate.dtype).contiguous()


def backward(dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor) -> None:
    """Write the gradients of gate and up."""
    z = gate.to(accumulate_dtype(gate.dtype))
    dy = dy.to(z.dtype)
    torch.mul(F.silu(z), dy, out=dup)
    if dgate.dtype == z.dtype:
        torch.ops.aten.silu_backward.grad_input(dy * up, z, grad_input=dgate)
    else:
        dgate.copy_(torch.ops.aten.silu_backward(dy * up, z))
