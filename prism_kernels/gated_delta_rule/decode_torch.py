"""Decoding in pure PyTorch: products of all rows and heads at once, token by token."""

from typing import Any

import torch
from torch import Tensor

from .._core.runtime import accumulate_dtype
from . import gates


def step(
    state: Tensor,
    new: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    snapshots: bool,
) -> tuple[Tensor, Tensor]:
    """As in launch_decode.py."""
    (B, T, HV, V), (H, K), wide = v.shape, q.shape[2:], accumulate_dtype(q.dtype)
    o = v.new_zeros(v.shape)
    taken = state.new_zeros((B, T, HV, *state.shape[2:]) if snapshots else (0,))
    if v_first:
        state, new = state.mT, new.mT
    live: Any = slice(None)
    at: Any = slice(None)
    if indices is not None:
        live = (indices >= 0).nonzero()[:, 0]
        at = indices[live].long()
    g = torch.zeros((), device=v.device) if g is None else g[live]
    beta = torch.ones((), device=v.device) if beta is None else beta[live]
    g, beta = gates.effective(g, beta, A_log, dt_bias, beta_top, wide)
    q, k, v = (x[live].to(wide) for x in (q, k, v))
    if l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(HV // H, 2).movedim(1, 0).flatten(1, 2) for x in (q * scale, k))
    n = v.shape[0]
    v, decay, beta = (
        x.expand(*v.shape[:3], -1).movedim(1, 0).flatten(1, 2)[:, :, None]
        for x in (v, g.exp()[..., None], beta[..., None])
    )
    inside = indices is None and new.dtype == wide and new.is_contiguous()  # no other room is needed
    states = new if inside else torch.empty(n, HV, K, V, dtype=wide, device=v.device)
    torch.mul(state[at], decay[0].view(n, HV, 1, 1), out=states)
    M = states.view(n * HV, K, V)
    for t in range(T):
        if t > 0:
            M.mul_(decay[t])
        write = torch.baddbmm(v[t], k[t, :, None], M, alpha=-1).mul_(beta[t])
        M.addcmul_(k[t, :, :, None], write)
        o[live, t] = torch.bmm(q[t, :, None], M).view(n, HV, V).to(o.dtype)
        if snapshots:
            after = states.to(taken.dtype)
            taken[live, t] = after.mT if v_first else after
    if not inside:
        new[at] = states.to(new.dtype)
    return o, taken
