"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn

from prism_kernels import rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics in float32.

    Args:
        dim: Width D.
        eps: Added to the mean square.

    Example:
        >>> RMSNorm(8)(torch.randn(2, 10, 8)).shape
        torch.Size([2, 10, 8])
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x r[...,D]."""
        return rms_norm(x, self.weight, eps=self.eps).y

    def extra_repr(self) -> str:
        """Show the width."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
