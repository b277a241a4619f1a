"""Pure-PyTorch path with its own backward: saves its inputs alone, recomputes the sigmoid."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.runtime import accumulate_dtype


def forward(gate: Tensor, up: Tensor | None) -> Tensor:
    """silu(gate) * up in gate's dtype; without `up`, of the two halves of gate."""
    wide = accumulate_dtype(gate.dtype)
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate.to(wide)).mul_(up.to(wide)).to(gate.dtype).contiguous()


def backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; without `up`, of the whole of gate, and an empty tensor."""
    if up is None:
        dx = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dgate, dup = dx.chunk(2, -1)
        gate, up = gate.chunk(2, -1)
        returned = dx, dx.new_empty(0)
    else:
        dgate, dup = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        returned = dgate, dup
    z = gate.to(accumulate_dtype(gate.dtype))
    dy = dy.to(z.dtype)
    torch.mul(F.silu(z), dy, out=dup)
    if dgate.dtype == z.dtype:
        torch.ops.aten.silu_backward.grad_input(dy * up, z, grad_input=dgate)
    else:
        dgate.copy_(torch.ops.aten.silu_backward(dy * up, z))
    return returned
