"""Gates from raw inputs, and back to the gradients of those; small tensors r[B,T,HV]. README.md, "Options".

`effective` is where raw gates become what the recurrence takes, `raw_gradients` where its gradients go back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def effective(
    g: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, beta_top: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log decay and write strength in `dtype`.

    With `A_log` r[HV] the log decay is -exp(A_log) softplus(g + dt_bias). With `beta_top` 1 or 2 the strength
    is beta_top sigmoid(beta); 0 takes `beta` as it is.
    """
    g = g.to(dtype)
    if A_log is not None:
        g = A_log.to(dtype).exp() * F.logsigmoid(-_biased(g, dt_bias))
    return g, strength(beta, beta_top, dtype)


def strength(beta: Tensor, beta_top: int, dtype: torch.dtype) -> Tensor:
    """The second of `effective`."""
    beta = beta.to(dtype)
    return beta_top * torch.sigmoid(beta) if beta_top else beta


def raw_gradients(
    dg: Tensor,
    dbeta: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    beta_top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of g, beta, A_log and dt_bias from those of log decay and strength; empty for what is None.

    Where a gradient is exactly 0 the raw input is left out, so that NaN in padding stays there.
    """
    wide = dg.dtype
    dA_log, ddt_bias = dg.new_empty(0), dg.new_empty(0)
    if A_log is not None:
        x, rate = _biased(g.to(wide), dt_bias), A_log.to(wide).exp()
        dA_log = _times(dg, rate * F.logsigmoid(-x)).sum((0, 1)).to(A_log.dtype)
        dg = _times(dg, -rate * torch.sigmoid(x))
        if dt_bias is not None:
            ddt_bias = dg.sum((0, 1)).to(dt_bias.dtype)
    if beta_top:
        x = beta.to(wide)
        # 1 - sigmoid(x) as sigmoid(-x): exact for large x too.
        dbeta = _times(dbeta, beta_top * torch.sigmoid(x) * torch.sigmoid(-x))
    return dg.to(g.dtype), dbeta.to(beta.dtype), dA_log, ddt_bias


def _biased(g: Tensor, dt_bias: Tensor | None) -> Tensor:
    return g if dt_bias is None else g + dt_bias.to(g.dtype)


def _times(gradient: Tensor, slope: Tensor) -> Tensor:
    """The product, and 0 wherever the gradient is."""
    return torch.where(gradient == 0, 0.0, gradient * slope)
