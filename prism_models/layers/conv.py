"""The short causal convolution that precedes a mixer."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from prism_kernels import causal_conv1d
from prism_kernels._core.checks import check_choice

from ._checks import check_input, check_lengths, check_token


class ShortCausalConv1d(nn.Module):
    """Each channel convolved with its own filter over the last W tokens; no activation by default.

    The state is the last W-1 inputs, r[B,D,W-1], oldest first.

    Args:
        dim: Channels D.
        kernel_size: Width W, from 2 to 4.
        activation: None or "silu".

    Example:
        >>> y, state = ShortCausalConv1d(8)(torch.randn(2, 10, 8))
        >>> y.shape, state.shape
        (torch.Size([2, 10, 8]), torch.Size([2, 8, 3]))
    """

    def __init__(self, dim: int, kernel_size: int = 4, activation: str | None = None) -> None:
        super().__init__()
        check_choice("ShortCausalConv1d", "kernel_size", kernel_size, (2, 3, 4))
        check_choice("ShortCausalConv1d", "activation", activation, (None, "silu"))
        self.dim, self.kernel_size, self.activation = dim, kernel_size, activation
        bound = 1 / math.sqrt(kernel_size)
        self.weight = nn.Parameter(torch.empty(dim, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve x r[B,T,D] and return y r[B,T,D] and the state after the last valid token.

        Args:
            x: r[B,T,D].
            state: r[B,D,W-1] to continue from; None for the start of a sequence.
            lengths: i[B], valid tokens of each right-padded row; None if all are valid.
        """
        check_input("ShortCausalConv1d", x, self.dim)
        check_lengths("ShortCausalConv1d", lengths, x.shape[0])
        y, final = causal_conv1d(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            initial_state=state,
            output_final_state=True,
        )
        return y, cast(Tensor, final) if lengths is None else self._tail(x, state, lengths)

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token x_t r[B,D]: return y_t r[B,D] and the new state."""
        check_token("ShortCausalConv1d", x_t, self.dim)
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def init_state(self, batch_size: int) -> Tensor:
        """Zeros r[B,D,W-1], on the device and in the dtype of the weights."""
        return self.weight.new_zeros(batch_size, self.dim, self.kernel_size - 1)

    def _tail(self, x: Tensor, state: Tensor | None, lengths: Tensor) -> Tensor:
        """The last W-1 inputs before the padding of each row."""
        W = self.kernel_size
        past = self.init_state(x.shape[0]).to(x.dtype) if state is None else state.to(x.dtype)
        known = torch.cat([past.transpose(1, 2), x], dim=1)
        index = lengths.to(x.device, torch.int64)[:, None] + torch.arange(W - 1, device=x.device)
        return known.gather(1, index[..., None].expand(-1, -1, self.dim)).transpose(1, 2).contiguous()
