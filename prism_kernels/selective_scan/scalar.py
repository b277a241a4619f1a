"""A run of chunks as matrix products where a head has one real pole for all modes, by Euler's rule.

The decay from s to t then multiplies C_t . B_s, which no head repeats: y = M u with
M[t,s] = L[t,s] (C_t . B_s) dt_s and L[t,s] the exponential of the sum of dt A over s < i <= t. Nothing
is divided, so any step size will do.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.scratch import Scratch
from .discrete import Params, ScanGradients
from .dual import add_product, from_chunks, to_chunks


class Decays(NamedTuple):
    """Of each chunk, [m,H,B,...]: from s to t [c,c], from its start to t [c], from s to its end [c]."""

    between: Tensor
    since: Tensor
    until: Tensor


def forward(
    u: Tensor, dt: Tensor, p: Params, states: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B,T,H,P] of m chunks that start from states[0], and two empty tensors; write states[1:]."""
    u_c, dt_c, B, C = (to_chunks(x) for x in (u, dt, p.B, p.C))
    B, C = in_common_groups(B, C, u_c)
    d = decays(dt_c, p.A, scratch)
    product(u_c.mul((d.until * dt_c)[..., None]).mT, B, out=states[1:])
    for k in range(len(u_c)):
        states[k + 1].addcmul_(d.since[k, ..., -1, None, None], states[k])
    y = product(C, states[:-1].mT).mul_(d.since[..., None])
    M = d.between.mul_(dt_c[..., None, :]).mul_(by_head(C @ B.mT, u_c))
    return from_chunks(add_product(y, M, u_c), u.shape[1]), dt.new_empty(0), dt.new_empty(0)


def backward(
    g: Tensor, u: Tensor, dt: Tensor, p: Params, kept: list[Tensor], eta: Tensor, scratch: Scratch
) -> ScanGradients:
    """Gradients of m chunks from g = dL/dy and eta = dL/d(the end state)."""
    g_c, u_c, dt_c, given_B, given_C = (to_chunks(x) for x in (g, u, dt, p.B, p.C))
    B, C = in_common_groups(given_B, given_C, u_c)
    d, before = decays(dt_c, p.A, scratch), kept[0][:-1]
    ends = product((g_c * d.since[..., None]).mT, C)  # dL/d(states), then that of the end of each chunk
    for k in reversed(range(len(ends))):
        at_start = torch.addcmul(ends[k], d.since[k, ..., -1, None, None], eta)
        ends[k], eta = eta, at_start

    to_end = (d.until * dt_c)[..., None]
    CB = by_head(C @ B.mT, u_c)
    dM = (g_c @ u_c.mT).mul_(d.between)  # decayed
    M = d.between.mul_(CB).mul_(dt_c[..., None, :])
    du = add_product(product(B, ends.mT).mul_(to_end), M.mT, g_c)
    read, written = product(g_c, before), product(u_c, ends)
    exponent = over_modes(read, C).mul_(d.since)
    slope = over_modes(written, B).mul_(d.until)
    dCB = by_group(dM * dt_c[..., None, :], B)
    dC = by_group(read.mul_(d.since[..., None]), C).add_(dCB @ B)
    dB = by_group(written.mul_(to_end), B).add_(dCB.mT @ C)

    # Gradients of the exponents dt A: what spans token i from the chunk's start, to its end, over all of it,
    # and from one token to another. Each is summed by itself; together they would cancel.
    X = dM.mul_(CB)
    theta = exponent.flip(-1).cumsum(-1).flip(-1)
    theta += before_each(slope * dt_c)
    theta += (ends * before).sum((-2, -1))[..., None] * d.since[..., -1:]
    theta += before_each((X * dt_c[..., None, :]).tril_(-1)).tril_().sum(-2)
    ddt = slope.add_(X.sum(-2)).add_(theta * p.A[:, :, None])
    dA = (theta * dt_c).sum((0, 2, 3))[:, None]
    dB, dC = by_group(dB, given_B), by_group(dC, given_C)
    du, ddt, dB, dC = (from_chunks(x, u.shape[1]) for x in (du, ddt, dB, dC))
    return ScanGradients(du, ddt, dA, dB, dC, eta)


def decays(dt_c: Tensor, A: Tensor, scratch: Scratch) -> Decays:
    """The decays of chunks from dt [m,H,B,c] and A [H,1], each from a sum of its own."""
    theta = dt_c * A[:, :, None]
    c = theta.shape[-1]
    later = torch.ones(c, c, dtype=torch.bool, device=theta.device).tril()
    spans = scratch("spans", (*theta.shape, c), theta)
    torch.cumsum(theta[..., None].expand_as(spans).tril(-1), -2, out=spans)
    between = spans.masked_fill_(~later, -torch.inf).exp_()
    return Decays(between, theta.cumsum(-1).exp_(), between[..., -1, :].clone())


def in_common_groups(B: Tensor, C: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are where their groups are as many, else for every head of `like`."""
    return (B, C) if B.shape[1] == C.shape[1] else (by_head(B, like), by_head(C, like))


def before_each(x: Tensor) -> Tensor:
    """The sum of what comes before each entry of the last axis."""
    return F.pad(x[..., :-1].cumsum(-1), (1, 0))


def product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x y over the last two axes, one of them [m,H,B,...], the other of that or [m,G,B,...]."""
    heads, groups = max(x.shape[1], y.shape[1]), min(x.shape[1], y.shape[1])
    if heads != groups:
        x, y = (z.repeat_interleave(heads // z.shape[1], 1) for z in (x, y))
    return torch.matmul(x, y, out=out)


def by_head(x: Tensor, like: Tensor) -> Tensor:
    """[m,G,B,...] repeated for the heads of `like` [m,H,B,...]."""
    return x.repeat_interleave(like.shape[1] // x.shape[1], 1)


def by_group(x: Tensor, like: Tensor) -> Tensor:
    """[m,H,B,...] summed over the heads of each group of `like` [m,G,B,...]."""
    return x if x.shape[1] == like.shape[1] else x.unflatten(1, (like.shape[1], -1)).sum(2)


def over_modes(x: Tensor, y: Tensor) -> Tensor:
    """sum_n x y for x [m,H,B,c,N] and y [m,G,B,c,N]: [m,H,B,c]."""
    x = x.unflatten(1, (y.shape[1], -1))
    return (x * y[:, :, None]).sum(-1).flatten(1, 2)
