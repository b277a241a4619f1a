"""What the model carries from one chunk of a stream to the next, and what it returns."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class BlockState(NamedTuple):
    """conv r[B,D,W-1]: the last inputs of the short convolution; mixer: the state of the mixer."""

    conv: Tensor
    mixer: Tensor


class PoolState(NamedTuple):
    """value r[B,D]: the sum ("mean") or the latest ("last") of the features; tokens i[B]: how many."""

    value: Tensor
    tokens: Tensor


class PRISMState(NamedTuple):
    """All that a stream needs; its size does not grow with the tokens seen."""

    blocks: tuple[BlockState, ...]
    pool: PoolState

    def map(self, fn: Callable[[Tensor], Tensor]) -> "PRISMState":
        """Apply `fn` to every tensor, for example `state.map(lambda t: t[rows])`."""
        blocks = tuple(BlockState(fn(b.conv), fn(b.mixer)) for b in self.blocks)
        return PRISMState(blocks, PoolState(fn(self.pool.value), fn(self.pool.tokens)))

    def detach(self) -> "PRISMState":
        """The same values, cut from the graph."""
        return self.map(lambda t: t.detach())

    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        tensors = [t for block in self.blocks for t in block] + list(self.pool)
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class PRISMOutput:
    """logits r[B,classes], the states to continue from, and the loss where labels were given.

    Fields are read as attributes or, like a dictionary, by name; a field that is None is absent.
    """

    logits: Tensor
    states: PRISMState
    loss: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor | PRISMState:
        if name not in self:
            raise KeyError(f"PRISMOutput: expected one of {list(self)}, got {name!r}. A loss needs labels.")
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in ("logits", "states") or (name == "loss" and self.loss is not None)

    def __iter__(self) -> Iterator[str]:
        return (name for name in ("logits", "states", "loss") if name in self)

    def keys(self) -> list[str]:
        """Names of the fields present."""
        return list(self)
