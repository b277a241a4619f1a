"""Seeded inputs. Drawn in float64 and rounded to the dtype asked for, so all dtypes see one draw."""

import math

import torch
from torch import Tensor


class Draw:
    """A stream of random tensors from one seed: `Draw(0).normal(2, 3)`."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Gaussian data in the dtype of the kernels' products."""
        return (scale * self._normal(shape)).to(self.dtype)

    def unit(self, *shape: int) -> Tensor:
        """Gaussian directions of length one along the last axis (keys)."""
        x = self._normal(shape)
        return (x / x.norm(dim=-1, keepdim=True)).to(self.dtype)

    def gate(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high], in float32 or wider: decays, gates, states are never 16-bit."""
        x = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * x).to(self.wide)

    def log_uniform(self, *shape: int, low: float, high: float) -> Tensor:
        """Log-uniform in [low, high], in float32 or wider: step sizes."""
        x = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return torch.exp(math.log(low) + (math.log(high) - math.log(low)) * x).to(self.wide)

    def wide_normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Gaussian in float32 or wider: parameters and states."""
        return (scale * self._normal(shape)).to(self.wide)

    def complex_normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Complex Gaussian in complex64 or wider: B, C and states."""
        wide = torch.complex128 if self.wide == torch.float64 else torch.complex64
        return torch.complex(scale * self._normal(shape), scale * self._normal(shape)).to(wide)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)
