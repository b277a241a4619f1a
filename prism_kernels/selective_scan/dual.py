"""A run of chunks as matrix products: step size per head, B and C shared by the head's channels.

Inside a chunk y = M u with M[t,s] = Re sum_n conj(G_t) K_s. G carries the decay from the start of
the chunk to t and K undoes the one up to s, so their product is the decay from s to t; K grows, and
is used only in rows whose decay since the start of the chunk is at most `LIMIT` log-units. That
criterion looks at the past alone. The other rows are taken from `blocks`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import blocks
from .discrete import Params, ScanGradients, conj, discretise, flat, rate_gradients, unflat

CHUNK = 16
LIMIT = {torch.float32: 40.0, torch.float64: 300.0}


@dataclass(frozen=True)
class Factors:
    """What a chunk needs, each [m,B,H,c,N] (m chunks of c tokens); Q, L and a conjugated."""

    a: Tensor
    w: Tensor
    Q: Tensor  # decay from the start of the chunk through t
    Q_inverse: Tensor
    L: Tensor  # decay from after t to the end of the chunk
    W: Tensor  # conj(w B)
    G: Tensor
    K: Tensor
    F: Tensor
    B: Tensor
    C: Tensor


def forward(u: Tensor, dt: Tensor, p: Params, states: Tensor) -> Tensor:
    """Return y [B,T,H,P] of m chunks that start from states[0], and write states[1:]."""
    T = u.shape[1]
    u_c, dt_c, f = to_chunks(u), to_chunks(dt), factors(dt, p)
    states[1:] = unflat(u_c.transpose(-1, -2) @ flat(f.F), states)
    for k, decay in enumerate(conj(f.Q[..., -1:, :])):
        states[k + 1].addcmul_(decay, states[k])
    y = mixing(f) @ u_c + flat(f.G) @ flat(states[:-1]).transpose(-1, -2)
    stiff = is_stiff(dt_c, p)
    if stiff.any():
        y = torch.where(stiff[..., None], forward_by_blocks(u, dt, p, states, y), y)
    return from_chunks(y, T)


def backward(g: Tensor, u: Tensor, dt: Tensor, p: Params, states: Tensor, eta: Tensor) -> ScanGradients:
    """Gradients of m chunks from g = dL/dy and eta = dL/d(the end state)."""
    u_c, g_c, dt_c = to_chunks(u), to_chunks(g), to_chunks(dt)
    if is_stiff(dt_c, p).any():
        return backward_by_blocks(g, u, dt, p, states, eta)
    f = factors(dt, p)
    etas = torch.empty_like(states)
    etas[:-1] = unflat(g_c.transpose(-1, -2) @ flat(f.G), states)
    etas[-1] = eta
    carried = torch.empty_like(states[:-1])  # dL/d(start state) through the end state alone
    for k in reversed(range(len(carried))):
        torch.mul(f.Q[k, ..., -1:, :], etas[k + 1], out=carried[k])
        etas[k] += carried[k]

    du = mixing(f).transpose(-1, -2) @ g_c + flat(f.F) @ flat(etas[1:]).transpose(-1, -2)
    # the diagonal of M does not depend on the decay: kept apart, it cannot spoil small gradients of it
    dM = g_c @ u_c.transpose(-1, -2)
    own = dM.diagonal(0, -2, -1)[..., None] * p.kappa
    dM = dM.tril(-1)
    dG = unflat(dM @ flat(f.K) + g_c @ flat(states[:-1]), f.G)
    dK = unflat(dM.transpose(-1, -2) @ flat(f.G), f.G)
    dF = unflat(u_c @ flat(etas[1:]), f.G)

    dC = dG.mul_(conj(f.Q)).mul_(p.kappa)
    since = f.C * conj(dC)
    dC += own * conj(f.W)
    dW_inside, dW_end = dK.mul_(f.Q_inverse), dF.mul_(f.L)
    dW = (dW_inside + dW_end).add_(own * f.C)
    since -= dW_inside.mul_(f.W)
    until = dW_end.mul_(f.W)
    at_start = (carried * conj(states[:-1])).sum(-2)[..., None, :]
    ones = dt.new_ones(CHUNK, CHUNK)
    dtheta = unflat(ones.triu() @ flat(since) + ones.tril(-1) @ flat(until), f.G).add_(at_start)
    dB = fold(dW * conj(f.w), p.B, u.shape[1])
    ddt, dA = rate_gradients(dtheta, dW.mul_(conj(f.B)), f.a, f.w, dt_c, p)
    T = u.shape[1]
    return ScanGradients(from_chunks(du, T), from_chunks(ddt, T), dA, dB, fold(dC, p.C, T), etas[0])


def factors(dt: Tensor, p: Params) -> Factors:
    """Everything of a run of chunks that does not depend on u."""
    H = dt.shape[2]
    a, w = discretise(to_chunks(dt)[..., None], p.A[:, None], p.euler)
    w = w.expand(a.shape)
    Q, L = a.clone(), torch.ones_like(a)
    for t in range(1, CHUNK):
        Q[..., t, :] *= Q[..., t - 1, :]
        torch.mul(L[..., CHUNK - t, :], a[..., CHUNK - t, :], out=L[..., CHUNK - t - 1, :])
    B, C = per_token(p.B, H), per_token(p.C, H)
    Q_inverse, W = Q.reciprocal(), conj(w * B)
    G = (Q * C).mul_(p.kappa)
    return Factors(a, w, Q, Q_inverse, L, W, G, conj(W * Q_inverse), conj(W * L), B, C)


def mixing(f: Factors) -> Tensor:
    """M [m,B,H,c,c], zero above the diagonal."""
    return (flat(f.G) @ flat(f.K).transpose(-1, -2)).tril_()


def is_stiff(dt: Tensor, p: Params) -> Tensor:
    """[m,B,H,c]: whether some state has decayed by more than LIMIT since the start of the chunk."""
    rate = (p.A.real if p.A.is_complex() else p.A).abs().amax(-1)
    return dt.cumsum(-1) * rate[:, None] > LIMIT[dt.dtype]


def forward_by_blocks(u: Tensor, dt: Tensor, p: Params, states: Tensor, y: Tensor) -> Tensor:
    """The outputs of every chunk, token by token, from the states at its start."""
    runs = [
        blocks.forward(u[:, time], dt[:, time], p.token_slice(time), states[k : k + 2].clone())
        for k, time in enumerate(chunk_slices(u.shape[1]))
    ]
    return to_chunks(torch.cat(runs, 1))


def backward_by_blocks(
    g: Tensor, u: Tensor, dt: Tensor, p: Params, states: Tensor, eta: Tensor
) -> ScanGradients:
    """The gradients of every chunk, token by token, last chunk first."""
    runs = []
    for k, time in reversed(list(enumerate(chunk_slices(u.shape[1])))):
        p_k = p.token_slice(time)
        runs.append(blocks.backward(g[:, time], u[:, time], dt[:, time], p_k, states[k : k + 2], eta))
        eta = runs[-1].initial_state
    du, ddt, dA, dBs, dCs, _ = zip(*reversed(runs), strict=True)
    dB, dC = (torch.cat(d, 1) if x.ndim == 4 else torch.stack(d).sum(0) for d, x in ((dBs, p.B), (dCs, p.C)))
    return ScanGradients(torch.cat(du, 1), torch.cat(ddt, 1), torch.stack(dA).sum(0), dB, dC, eta)


def chunk_slices(T: int) -> list[slice]:
    """The time slices of the chunks, the last one perhaps shorter."""
    return [slice(t, min(t + CHUNK, T)) for t in range(0, T, CHUNK)]


def to_chunks(x: Tensor) -> Tensor:
    """[B,T,H,...] as [m,B,H,c,...], padded with zeros at the end."""
    missing = -x.shape[1] % CHUNK
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    x = x.unflatten(1, (-1, CHUNK))
    return x.permute(1, 0, 3, 2, *range(4, x.ndim)).contiguous()


def from_chunks(x: Tensor, T: int) -> Tensor:
    """The inverse of `to_chunks`, cut to T tokens."""
    return x.permute(1, 0, 3, 2, *range(4, x.ndim)).flatten(1, 2)[:, :T]


def per_token(x: Tensor, H: int) -> Tensor:
    """Static [H,N] as [H,1,N], dependent [B,T,G,N] as [m,B,H,c,N]."""
    if x.ndim == 2:
        return x[:, None]
    return unflat(to_chunks(flat(x)), x).repeat_interleave(H // x.shape[2], 2)


def fold(d: Tensor, like: Tensor, T: int) -> Tensor:
    """The gradient d [m,B,H,c,N] summed to the shape of `like`."""
    if like.ndim == 2:
        return d.sum((0, 1, 3))
    return from_chunks(d.unflatten(2, (like.shape[2], -1)).sum(3), T)
