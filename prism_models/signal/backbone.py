"""The backbone that all modalities share."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from .blocks import Block, DeltaBlock, S4Block
from .config import PRISMConfig
from .state import BlockState


class PRISMBackbone(nn.Module):
    """S4 and delta blocks in the order of `config.layer_pattern()`. Causal; knows no modality."""

    def __init__(self, config: PRISMConfig) -> None:
        super().__init__()
        kinds = {"s4": S4Block, "delta": DeltaBlock}
        self.blocks = nn.ModuleList(kinds[kind](config) for kind in config.layer_pattern())

    def forward(
        self, x: Tensor, states: Sequence[BlockState] | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[BlockState, ...]]:
        """Map x r[B,T,D] to r[B,T,D], and return the states after the last valid token of each row."""
        new: list[BlockState] = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[i], lengths=lengths)
            new.append(state)
        return x, tuple(new)

    def step(self, x_t: Tensor, states: Sequence[BlockState]) -> tuple[Tensor, tuple[BlockState, ...]]:
        """One token x_t r[B,D]."""
        new: list[BlockState] = []
        for block, state in zip(self.blocks, states, strict=True):
            x_t, state = cast(Block, block).step(x_t, state)
            new.append(state)
        return x_t, tuple(new)

    def init_state(self, batch_size: int) -> tuple[BlockState, ...]:
        """The states before the first token."""
        return tuple(cast(Block, block).init_state(batch_size) for block in self.blocks)
