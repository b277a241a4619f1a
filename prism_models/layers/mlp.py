"""The gated feed-forward layer."""

from torch import Tensor, nn

from prism_kernels import swiglu

from .linear import Linear


class SwiGLU(nn.Module):
    """y = W_down(silu(W_gate x) * W_up x), without biases.

    Args:
        dim: Width D of input and output.
        expand: Hidden width as a multiple of D.

    Example:
        >>> SwiGLU(8)(torch.randn(2, 10, 8)).shape
        torch.Size([2, 10, 8])
    """

    def __init__(self, dim: int, expand: int = 2) -> None:
        super().__init__()
        # One product for W_gate (first half of the rows) and W_up.
        self.in_proj = Linear(dim, 2 * expand * dim)
        self.out_proj = Linear(expand * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x r[...,D] to r[...,D], each token alone."""
        return self.out_proj(swiglu(self.in_proj(x)))
