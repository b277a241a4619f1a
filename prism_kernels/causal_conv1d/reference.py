"""The definition: one token at a time, a window of the last inputs shifted by one each step."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.runtime import accumulate_dtype, without_autocast


def causal_conv1d_reference(
    x: Tensor,  # r[B,T,D]
    weight: Tensor,  # r[D,W]
    bias: Tensor | None = None,  # r[D]
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,  # r[B,D,W-1]
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_j weight[:, j] x_{t-W+1+j}); returns (y, the last W-1 inputs)."""
    with without_autocast(x.device):
        wide = accumulate_dtype(x.dtype)
        inputs, taps = (t.to(product_dtype or wide).to(wide) for t in (x, weight))
        window = inputs.new_zeros(x.shape[0], *weight.shape)
        if initial_state is not None:
            state = initial_state.to(product_dtype or wide).to(wide)
            window = torch.cat([window[..., :1], state], dim=-1)
        ys = []
        for t in range(x.shape[1]):
            window = torch.cat([window[..., 1:], inputs[:, t, :, None]], dim=-1)  # [B, D, W]
            y = (window * taps).sum(-1)
            y = y if bias is None else y + bias.to(wide)
            ys.append(F.silu(y) if activation == "silu" else y)
        return torch.stack(ys, dim=1).to(x.dtype), window[..., 1:].to(x.dtype)
