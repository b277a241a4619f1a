"""The two blocks of the backbone: pre-norm, short convolution, mixer; pre-norm, feed-forward."""

from torch import Tensor, nn

from ..layers import GatedDelta, RMSNorm, S4DComplex, ShortCausalConv1d, SwiGLU
from .config import PRISMConfig
from .state import BlockState


class Block(nn.Module):
    """x + mixer(conv(norm(x))), then x + ffn(norm(x)).

    Args:
        config: The model's configuration.
        mixer: The layer that mixes over time; the only difference between the blocks.
    """

    def __init__(self, config: PRISMConfig, mixer: S4DComplex | GatedDelta) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_dim)
        self.conv = ShortCausalConv1d(config.hidden_dim, config.conv_kernel_size)
        self.mixer = mixer
        self.norm2 = RMSNorm(config.hidden_dim)
        self.ffn = SwiGLU(config.hidden_dim, config.ffn_expand)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self, x: Tensor, state: BlockState | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, BlockState]:
        """Map x r[B,T,D] to r[B,T,D], and return the state after the last valid token."""
        conv, mixer = (None, None) if state is None else state
        y, conv = self.conv(self.norm1(x), conv, lengths=lengths)
        y, mixer = self.mixer(y, mixer, lengths=lengths)
        return self._residual(x, y), BlockState(conv, mixer)

    def step(self, x_t: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """One token x_t r[B,D]."""
        y, conv = self.conv.step(self.norm1(x_t), state.conv)
        y, mixer = self.mixer.step(y, state.mixer)
        return self._residual(x_t, y), BlockState(conv, mixer)

    def init_state(self, batch_size: int) -> BlockState:
        """The state before the first token."""
        return BlockState(self.conv.init_state(batch_size), self.mixer.init_state(batch_size))

    def _residual(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(mixed)
        return x + self.dropout(self.ffn(self.norm2(x)))


class S4Block(Block):
    """A block that mixes with S4DComplex."""

    def __init__(self, config: PRISMConfig) -> None:
        mixer = S4DComplex(
            config.hidden_dim,
            config.num_heads,
            config.s4_state_dim // 2,
            dt_min=config.s4_dt_min,
            dt_max=config.s4_dt_max,
            c_per_channel=config.s4_c_per_channel,
            state_path=config.ablate != "state",
        )
        super().__init__(config, mixer)


class DeltaBlock(Block):
    """A block that mixes with GatedDelta."""

    def __init__(self, config: PRISMConfig) -> None:
        mixer = GatedDelta(
            config.hidden_dim,
            config.num_heads,
            qk_norm=config.qk_norm,
            gate_bias_init=config.gate_bias_init,
            chunk_size=config.delta_chunk_size,
            output_norm=config.delta_output_norm,
            state_path=config.ablate == "none",
        )
        super().__init__(config, mixer)
