"""A block of time, discretised at once; its states follow one after the other. Any shape of B and C.

States at bounds and their gradients are [H,B,P,N], as in `dual.py`; inside, states are [c,B,H,P,N].
"""

import torch
from torch import Tensor

from .discrete import Params, ScanGradients, conj, discretise, flat, rate_gradients, unflat


def forward(u: Tensor, dt: Tensor, p: Params, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B,c,H,P] of a block that starts from states[0], and two empty tensors; write states[1]."""
    _, _, h = run(u, dt, p, states[0].transpose(0, 1))
    states[1] = h[-1].transpose(0, 1)
    y = readout(h[1:], per_token(p.C, u.shape[2]), p.kappa).transpose(0, 1)
    return y, dt.new_empty(0), dt.new_empty(0)


def backward(g: Tensor, u: Tensor, dt: Tensor, p: Params, kept: list[Tensor], eta: Tensor) -> ScanGradients:
    """Gradients of a block from g = dL/dy and eta = dL/d(its end state)."""
    states, H = kept[0], u.shape[2]
    a_conj, w_conj, h = run(u, dt, p, states[0].transpose(0, 1))
    B, C = per_token(p.B, H), per_token(p.C, H)
    g_t, u_t = g.transpose(0, 1)[..., None], u.transpose(0, 1)[..., None]
    adjoint = g_t * (p.kappa * C)
    adjoint[-1] += eta.transpose(0, 1)
    for t in range(len(adjoint) - 2, -1, -1):
        torch.addcmul(adjoint[t], a_conj[t + 1], adjoint[t + 1], out=adjoint[t])
    du = (flat(adjoint) * flat(conj(w_conj)[..., None, :] * B)).sum(-1).transpose(0, 1)
    driven = adjoint * u_t  # the gradient of w B
    if B.shape[-2] == 1:
        driven = driven.sum(-2, keepdim=True)
    end = (a_conj[0] * adjoint[0]).transpose(0, 1)
    dB = fold(driven * w_conj[..., None, :], p.B)
    dw = (driven * conj(B)).sum(-2)
    dC = fold(p.kappa * (g_t * h[1:] if p.C.ndim == 3 else over_channels(g_t, h[1:])), p.C)
    dtheta = (adjoint * conj(h[:-1])).sum(-2) * a_conj.squeeze(-2)
    dtheta, dw, a_conj, w_conj = (x.permute(1, 2, 0, 3) for x in (dtheta, dw, a_conj.squeeze(-2), w_conj))
    ddt, dA = rate_gradients(dtheta, dw, a_conj, w_conj, dt.transpose(1, 2).contiguous(), p)
    return ScanGradients(du, ddt.transpose(1, 2), dA, dB, dC, end)


def run(u: Tensor, dt: Tensor, p: Params, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return conj(a) [c,B,H,1,N], conj(w) [c,B,H,N] and all states [c+1,B,H,P,N], h0 first."""
    a_conj, w_conj = discretise(dt.transpose(0, 1).contiguous()[..., None], p.A, p.euler)
    a_conj = a_conj[..., None, :]
    a = conj(a_conj)
    h = h0.new_empty(len(w_conj) + 1, *h0.shape)
    h[0] = h0
    torch.mul(
        conj(w_conj)[..., None, :] * per_token(p.B, u.shape[2]), u.transpose(0, 1)[..., None], out=h[1:]
    )
    for t in range(len(w_conj)):
        torch.addcmul(h[t + 1], a[t], h[t], out=h[t + 1])
    return a_conj, w_conj, h


def readout(h: Tensor, C: Tensor, kappa: int) -> Tensor:
    """kappa Re sum_n conj(C) h."""
    return (flat(h) * flat(C)).sum(-1).mul_(kappa)


def over_channels(x: Tensor, h: Tensor) -> Tensor:
    """sum_p x h as [..., 1, N], for real x [..., P, 1]."""
    if h.shape[-2] == 1:
        return x * h
    return unflat(x.transpose(-1, -2) @ flat(h), h)


def per_token(x: Tensor, H: int) -> Tensor:
    """Static [H,N] or [H,P,N], or dependent [B,c,G,N], as [c|1,B|1,H,P|1,N]."""
    if x.ndim == 4:
        return x.transpose(0, 1).repeat_interleave(H // x.shape[2], 2)[..., None, :]
    return (x[:, None] if x.ndim == 2 else x)[None, None]


def fold(d: Tensor, like: Tensor) -> Tensor:
    """The gradient d [c,B,H,P|1,N] summed to the shape of `like`."""
    if like.ndim == 4:
        return d.squeeze(-2).unflatten(2, (like.shape[2], -1)).sum(3).transpose(0, 1)
    return d.sum((0, 1)).reshape(like.shape)
