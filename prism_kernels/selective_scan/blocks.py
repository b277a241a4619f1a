"""A block of time, discretised at once; its states follow one after the other. Any shape of B and C.

States at bounds and their gradients are [H,B,P,N], as in `dual.py`; inside, states are [c,B,H,P,N], in
scratch.
"""

import torch
from torch import Tensor

from .._core.scratch import Scratch
from .discrete import (
    Params,
    ScanGradients,
    conj,
    discretise,
    flat,
    step_powers,
    unflat,
    weight_gradient,
)

SUMMED = 16  # tokens


def forward(
    u: Tensor, dt: Tensor, p: Params, states: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B,c,H,P] of a block that starts from states[0], and two empty tensors; write states[1]."""
    _, _, h_conj = run(u, dt, p, states[0].transpose(0, 1), scratch)
    states[1] = conj(h_conj[-1].transpose(0, 1))
    y = over_states(h_conj[1:], per_token(conj(p.C), u.shape[2]), h_conj[1:]).mul_(p.kappa)
    return y.transpose(0, 1), dt.new_empty(0), dt.new_empty(0)


def backward(
    g: Tensor, u: Tensor, dt: Tensor, p: Params, kept: list[Tensor], eta: Tensor, scratch: Scratch
) -> ScanGradients:
    """Gradients of a block from g = dL/dy and eta = dL/d(its end state)."""
    states, H = kept[0], u.shape[2]
    a_conj, w_conj, h_conj = run(u, dt, p, states[0].transpose(0, 1), scratch)
    g_t, u_t, dt_t = (x.transpose(0, 1).contiguous() for x in (p.kappa * g, u, dt[..., None]))
    B, C = per_token(p.B, H), per_token(p.C, H)
    adjoint = scratch("adjoint", h_conj[1:].shape, h_conj)
    torch.mul(g_t[..., None], flat(C), out=flat(adjoint))
    adjoint[-1] += eta.transpose(0, 1)
    backwards = [x.unbind(0)[::-1] for x in (a_conj, adjoint)]
    for a, after, before in zip(*backwards, backwards[1][1:], strict=False):
        torch.addcmul(before, a, after, out=before)
    end = (a_conj[0] * adjoint[0]).transpose(0, 1)

    dC = conj(fold(g_t, h_conj[1:], p.C))
    slope, product = (scratch(name, adjoint.shape, adjoint) for name in ("slope", "product"))
    torch.mul(adjoint, a_conj, out=slope)
    dtheta = torch.mul(slope, h_conj[:-1], out=h_conj[:-1])  # of the exponents dt A
    ddt = over_states(dtheta, p.A[:, None], product)
    dA = over_tokens(dt_t.expand_as(u_t), dtheta).sum(1)
    if p.euler:
        read = over_states(adjoint, B, product)
        du, dB = dt_t * read, fold(dt_t * u_t, adjoint, p.B)
        ddt += u_t * read
    else:
        weighted = adjoint.mul_(w_conj)
        du, dB = over_states(weighted, B, product), fold(u_t, weighted, p.B)
        ddt += u_t * over_states(slope, B, product)
        dA += through_weights(slope, weighted, u_t, dt_t, p, product)
    return ScanGradients(du.transpose(0, 1), ddt.sum(-1).transpose(0, 1), dA, dB, dC, end)


def through_weights(
    slope: Tensor, weighted: Tensor, u_t: Tensor, dt_t: Tensor, p: Params, product: Tensor
) -> Tensor:
    """The gradient of A [H,N] through w, from that of the states times conj(a) and times conj(w).

    Both are overwritten, and `product`.
    """
    # Minus the numerator of chi, each token's own.
    flat(weighted).addcmul_(flat(slope), dt_t[..., None], value=-1)
    B_conj = conj(p.B)
    if p.B.ndim == 2:
        scale = B_conj
    else:
        scale, each = torch.ones_like(p.A), per_token(B_conj, u_t.shape[2])
        slope, weighted = slope.mul_(each), weighted.mul_(each)
    powers, largest = step_powers(dt_t.squeeze(-1).permute(1, 2, 0))
    moments = products(powers[:, :, None], over_channels(u_t, slope, product)).squeeze(1)
    away = over_tokens(torch.ones_like(dt_t), over_channels(u_t, weighted, product)).squeeze(1).neg_()
    return scale * weight_gradient(moments, away, largest, p.poles)


def step(u: Tensor, dt: Tensor, p: Params, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Return y [B,1,H,P] and the state [B,H,P,N] after one token, by the arithmetic of `forward`."""
    h_conj = run(u, dt, p, h0, Scratch())[2][1:]
    C = per_token(conj(p.C), u.shape[2])
    y = over_states(h_conj, C, torch.empty_like(h_conj)).mul_(p.kappa)
    return y.transpose(0, 1), conj(h_conj[0]) if h_conj.is_complex() else h_conj[0].clone()


def run(u: Tensor, dt: Tensor, p: Params, h0: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Return conj(a), conj(w) [c,B,H,1,N] and all states, conjugated, [c+1,B,H,P,N], h0 first.

    Under Euler w is dt, [c,B,H,1,1].
    """
    step, u_t = dt.transpose(0, 1).contiguous()[..., None], u.transpose(0, 1)[..., None]
    a_conj, w_conj = (x[..., None, :] for x in discretise(step, p.poles, p.euler, scratch))
    h_conj = scratch("states", (len(step) + 1, *h0.shape), h0)
    h_conj[0] = conj(h0)
    B, driven = per_token(conj(p.B), u.shape[2]), flat(h_conj[1:])
    if p.euler:
        torch.mul(step[..., None] * u_t, flat(B), out=driven)
    elif B.shape[-2] == u_t.shape[-2]:
        torch.mul(w_conj, B, out=h_conj[1:])
        driven.mul_(u_t)
    else:
        torch.mul(flat(w_conj * B), u_t, out=driven)
    h_t = h_conj.unbind(0)
    for a, before, after in zip(a_conj.unbind(0), h_t, h_t[1:], strict=False):
        torch.addcmul(after, a, before, out=after)
    return a_conj, w_conj, h_conj


def over_states(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Re sum_n x conj(y), r[c,B,H,P], for x [c,B,H,P,N] and y that broadcasts to it. Writes `out`, as x."""
    return torch.mul(flat(x), flat(y), out=flat(out)).sum(-1)


def over_channels(rate: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    """sum_p rate x, [c,B,H,1,N], for x [c,B,H,P,N] and rate r[c,B,H,P]; of one channel it lies in `out`."""
    if rate.shape[-1] == 1:
        return unflat(torch.mul(flat(x), rate[..., None], out=None if out is None else flat(out)), x)
    return unflat(rate[..., None, :] @ flat(x), x)


def over_tokens(rate: Tensor, x: Tensor) -> Tensor:
    """sum_cB rate x, [H,P,N], for x [c,B,H,P,N] and rate r[c,B,H,P]."""
    return products(rate.permute(1, 2, 3, 0)[..., None, :], x).squeeze(2)


def products(rows: Tensor, x: Tensor) -> Tensor:
    """[H,P,k,N] from rows r[B,H,P,k,c] and x [c,B,H,P,N], which stays where it lies.

    A product of matrices may add one term after the other; few at a time keep their rounding small. On rows
    that do not lie in order it is slow.
    """
    B, H, P, k, c = rows.shape
    rows = rows.reshape(B * H * P, k, c).contiguous()
    pairs = zip(rows.split(SUMMED, -1), x.split(SUMMED), strict=True)
    sums = [torch.bmm(r, flat(y).flatten(1, 3).transpose(0, 1)) for r, y in pairs]
    return unflat(torch.stack(sums).view(len(sums), B, H, P, k, -1).sum((0, 1)), x)


def fold(rate: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """sum rate x in the shape of `like`, B or C, for x [c,B,H,P,N] and rate r[c,B,H,P]."""
    if like.ndim < 4:
        sums = over_tokens(rate, x)
        return sums if like.ndim == 3 else sums.sum(1)
    c, B, H, P, N = x.shape
    G = like.shape[2]
    sums = over_channels(rate.view(c, B, G, H // G * P), x.view(c, B, G, H // G * P, N), None)
    return sums.squeeze(3).transpose(0, 1)


def per_token(x: Tensor, H: int) -> Tensor:
    """Static [H,N] or [H,P,N], or dependent [B,c,G,N], as [c|1,B|1,H,P|1,N]."""
    if x.ndim == 4:
        x = x.transpose(0, 1)
        if x.shape[2] == 1:
            x = x.expand(-1, -1, H, -1)
        elif x.shape[2] < H:
            x = x.repeat_interleave(H // x.shape[2], 2)
        return x[..., None, :]
    return (x[:, None] if x.ndim == 2 else x)[None, None]
