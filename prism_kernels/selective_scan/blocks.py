"""A block of time, discretised at once; its states follow one after the other. Any shape of B and C.

States at bounds and their gradients are [H,B,P,N], as in `dual.py`; inside, states are [c,B,H,P,N].
"""

import torch
from torch import Tensor

from .._core.scratch import Scratch
from .discrete import Params, ScanGradients, conj, discretise, flat, rate_gradients, unflat


def forward(
    u: Tensor, dt: Tensor, p: Params, states: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B,c,H,P] of a block that starts from states[0], and two empty tensors; write states[1]."""
    _, _, h_conj = run(u, dt, p, states[0].transpose(0, 1), scratch)
    states[1] = conj(h_conj[-1].transpose(0, 1))
    read = flat(h_conj[1:]).mul_(flat(conj(per_token(p.C, u.shape[2]))))
    y = read.sum(-1).mul_(p.kappa).transpose(0, 1)
    return y, dt.new_empty(0), dt.new_empty(0)


def backward(
    g: Tensor, u: Tensor, dt: Tensor, p: Params, kept: list[Tensor], eta: Tensor, scratch: Scratch
) -> ScanGradients:
    """Gradients of a block from g = dL/dy and eta = dL/d(its end state)."""
    states, H = kept[0], u.shape[2]
    a_conj, w_conj, h_conj = run(u, dt, p, states[0].transpose(0, 1), scratch)
    B, C = per_token(p.B, H), per_token(p.C, H)
    g_t, u_t = g.transpose(0, 1)[..., None], u.transpose(0, 1)[..., None]
    adjoint = scratch("adjoint", h_conj[1:].shape, h_conj)
    torch.mul(g_t, flat(p.kappa * C), out=flat(adjoint))
    adjoint[-1] += eta.transpose(0, 1)
    for t in range(len(adjoint) - 2, -1, -1):
        torch.addcmul(adjoint[t], a_conj[t + 1], adjoint[t + 1], out=adjoint[t])

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.mul(a, b, out=scratch("product", torch.broadcast_shapes(a.shape, b.shape), a))

    du = product(flat(adjoint), flat(conj(w_conj)[..., None, :] * B)).sum(-1).transpose(0, 1)
    driven = scratch("driven", adjoint.shape, adjoint)  # the gradient of w B
    torch.mul(flat(adjoint), u_t, out=flat(driven))
    if B.shape[-2] == 1:
        driven = driven.sum(-2, keepdim=True)
    end = (a_conj[0] * adjoint[0]).transpose(0, 1)
    dB = fold(product(driven, w_conj[..., None, :]), p.B)
    dw = product(driven, conj(B)).sum(-2)
    read = unflat(product(flat(h_conj[1:]), g_t), h_conj) if p.C.ndim == 3 else over_channels(g_t, h_conj[1:])
    dC = p.kappa * conj(fold(read, p.C))
    dtheta = product(adjoint, h_conj[:-1]).sum(-2) * a_conj.squeeze(-2)
    dtheta, dw, a_conj, w_conj = (x.permute(1, 2, 0, 3) for x in (dtheta, dw, a_conj.squeeze(-2), w_conj))
    ddt, dA = rate_gradients(dtheta, dw, a_conj, w_conj, dt.transpose(1, 2).contiguous(), p)
    return ScanGradients(du, ddt.transpose(1, 2), dA, dB, dC, end)


def step(u: Tensor, dt: Tensor, p: Params, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Return y [B,1,H,P] and the state [B,H,P,N] after one token, by the arithmetic of `forward`."""
    h_conj = run(u, dt, p, h0, Scratch())[2][1]
    y = (flat(h_conj) * flat(conj(per_token(p.C, u.shape[2])))[0]).sum(-1).mul_(p.kappa)
    return y[:, None], conj(h_conj) if h_conj.is_complex() else h_conj.clone()


def run(u: Tensor, dt: Tensor, p: Params, h0: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Return conj(a) [c,B,H,1,N], conj(w) [c,B,H,N] and all states, conjugated, [c+1,B,H,P,N], h0 first."""
    step, u_t = dt.transpose(0, 1).contiguous()[..., None], u.transpose(0, 1)[..., None]
    a_conj, w_conj = discretise(step, p.A, p.euler, scratch)
    h_conj = scratch("states", (len(step) + 1, *h0.shape), h0)
    h_conj[0] = conj(h0)
    B, driven = conj(per_token(p.B, u.shape[2])), flat(h_conj[1:])
    if p.euler:
        torch.mul(step[..., None] * u_t, flat(B), out=driven)
    elif B.shape[-2] == u_t.shape[-2]:
        torch.mul(w_conj[..., None, :], B, out=h_conj[1:])
        driven.mul_(u_t)
    else:
        torch.mul(flat(w_conj[..., None, :] * B), u_t, out=driven)
    a_conj = a_conj[..., None, :]
    h_t = h_conj.unbind(0)
    for a, before, after in zip(a_conj.unbind(0), h_t, h_t[1:], strict=False):
        torch.addcmul(after, a, before, out=after)
    return a_conj, w_conj, h_conj


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
