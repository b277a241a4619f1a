"""Pooling over time that can be continued: the features of all tokens become one vector."""

import torch
from torch import Tensor

from ..layers._numerics import valid_tokens, wide
from .state import PoolState


def init_pool(features: Tensor) -> PoolState:
    """The state before the first token; features r[B,...,D] give size, dtype and device."""
    value = wide(features.new_zeros(features.shape[0], features.shape[-1]))
    return PoolState(value, torch.zeros(len(value), dtype=torch.int64, device=value.device))


def pool(
    features: Tensor, pool_type: str, state: PoolState | None, lengths: Tensor | None
) -> tuple[Tensor, PoolState]:
    """Pool features r[B,T,D] of these and all earlier tokens to r[B,D].

    "mean" divides the running sum by the running count, "last" keeps the latest valid token. Both
    states are float32 (float64 for float64 features).
    """
    B, T, _ = features.shape
    value, tokens = init_pool(features) if state is None else state
    new = tokens + (T if lengths is None else lengths)
    if pool_type == "mean":
        if lengths is not None:
            features = features.masked_fill(~valid_tokens(lengths, T)[..., None], 0.0)
        value = value + wide(features).sum(1)
        pooled = value / new.clamp(min=1)[:, None]
    else:
        last = features[:, -1] if lengths is None else features[torch.arange(B), (lengths - 1).clamp(min=0)]
        value = wide(last) if lengths is None else torch.where(lengths[:, None] > 0, wide(last), value)
        pooled = value
    return pooled.to(features.dtype), PoolState(value, new)
