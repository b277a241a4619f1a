"""The definition, differentiable by autograd."""

from torch import Tensor
from torch.nn import functional as F

from .._core.runtime import accumulate_dtype, without_autocast


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) * up, element by element."""
    with without_autocast(gate.device):
        wide = accumulate_dtype(gate.dtype)
        return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
