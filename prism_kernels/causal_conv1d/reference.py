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
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,  # i[B,T]
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_j weight[:, j] x_{t-W+1+j}); returns (y, the last W-1 inputs).

    With seq_idx, tokens of other documents count as 0, and so do outputs where it is negative.
    """
    with without_autocast(x.device):
        wide = accumulate_dtype(x.dtype)
        inputs, taps = (t.to(product_dtype or wide).to(wide) for t in (x, weight))
        bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        ids = torch.zeros_like(x[..., 0], dtype=torch.int64) if seq_idx is None else seq_idx
        seen = F.pad(ids, (taps.shape[1], 0)).unfold(1, taps.shape[1], 1)[:, 1:]  # [B, T, W]
        own = (seen == ids[..., None]) & (ids[..., None] >= 0)
        rows = x.shape[0] if cu_seqlens is None else len(bounds) - 1
        windows = inputs.new_zeros(rows, *weight.shape)
        if initial_state is not None:
            state = initial_state.to(product_dtype or wide).to(wide)
            windows = torch.cat([windows[..., :1], state], dim=-1)
        ys, finals = [], []
        for s, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            window = windows if cu_seqlens is None else windows[s : s + 1]
            for t in range(start, end):
                window = torch.cat([window[..., 1:], inputs[:, t, :, None]], dim=-1)  # [B, D, W]
                y = (window.where(own[:, t, None], 0) * taps).sum(-1)
                y = y if bias is None else y + bias.to(wide)
                y = F.silu(y) if activation == "silu" else y
                ys.append(y.where(own[:, t, -1:], 0))
            finals.append(window[..., 1:])
        y = torch.stack(ys, dim=1) if ys else inputs[:, :0]
        y = F.pad(y, (0, 0, 0, x.shape[1] - y.shape[1]))  # padding after the last sequence
        return y.to(x.dtype), torch.cat(finals).to(x.dtype)
