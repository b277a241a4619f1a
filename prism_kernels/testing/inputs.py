"""Seeded inputs. Drawn in float64 and rounded to the dtype asked for, so all dtypes see one draw."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Choice = TypeVar("Choice")


class Draw:
    """A stream of random tensors and sizes from one seed: `Draw(0).normal(2, 3)`.

    `sizes` overrules drawn sizes by name. After use, `drawn` has every size with the smallest it may be,
    so that a case can be made again, and made smaller.
    """

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, sizes: Mapping[str, int] | None = None):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.sizes = sizes or {}
        self.drawn: dict[str, tuple[int, int]] = {}

    def size(self, name: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`; an overruled one is drawn too, so that others stay."""
        drawn = int(torch.randint(low, high + 1, (), generator=self.generator))
        value = self.sizes.get(name, drawn)
        self.drawn[name] = (value, low)
        return value

    def flag(self, name: str) -> bool:
        """True or False; False counts as smaller."""
        return bool(self.size(name, 0, 1))

    def pick(self, name: str, choices: Sequence[Choice]) -> Choice:
        """One of `choices`, the simplest first."""
        return choices[self.size(name, 0, len(choices) - 1)]

    def bounds(self, sequences: int, T: int) -> Tensor:
        """i[S+1] from 0: sequences packed into T tokens, some empty, padding after. One token at least."""
        cuts = torch.randint(0, T + 1, (sequences,), generator=self.generator).sort().values
        cuts[-1] = cuts[-1].clamp(min=1)
        return torch.cat([cuts.new_zeros(1), cuts])

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
