"""The definition, differentiable by autograd."""

from torch import Tensor
from torch.nn import functional as F

from .._core.runtime import accumulate_dtype, without_autocast


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """y = silu(gate) * up, element by element; without `up`, of the two halves of gate."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    with without_autocast(gate.device):
        wide = accumulate_dtype(gate.dtype)
        return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
