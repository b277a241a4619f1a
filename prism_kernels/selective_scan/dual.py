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
from .discrete import Params, ScanGradients, conj, discretise, flat, unflat, weight_gradient

CHUNK = 16
LIMIT = {torch.float32: 40.0, torch.float64: 300.0}


@dataclass(frozen=True)
class Factors:
    """What a chunk needs, each [m,B,H,c,N] (m chunks of c tokens); all but G and K conjugated."""

    a: Tensor
    w: Tensor
    Q: Tensor  # decay from the start of the chunk through t
    growth: Tensor  # its inverse
    G: Tensor
    K: Tensor


def forward(u: Tensor, dt: Tensor, p: Params, states: Tensor) -> Tensor:
    """Return y [B,T,H,P] of m chunks that start from states[0], and write states[1:]."""
    T = u.shape[1]
    u_c, dt_c, f = to_chunks(u), to_chunks(dt), factors(dt, p)
    stiff = is_stiff(dt_c, p)
    entered = unflat(u_c.mT @ flat(f.K), states)  # the input of a chunk, as if it came before the chunk
    exact = {}
    for k, is_exact in enumerate(stiff.flatten(1).any(1).tolist()):
        if is_exact:
            time = slice(k * CHUNK, min((k + 1) * CHUNK, T))
            exact[k] = blocks.forward(u[:, time], dt[:, time], p.token_slice(time), states[k : k + 2])
        else:
            torch.mul(entered[k].add_(states[k]), conj(f.Q[k, ..., -1:, :]), out=states[k + 1])
    y = add_product(mixing(f) @ u_c, flat(f.G), flat(states[:-1]).mT)
    for k, rows in exact.items():
        y[k] = torch.where(stiff[k][..., None], to_chunks(rows)[0], y[k])
    return from_chunks(y, T)


def backward(g: Tensor, u: Tensor, dt: Tensor, p: Params, states: Tensor, eta: Tensor) -> ScanGradients:
    """Gradients of m chunks from g = dL/dy and eta = dL/d(the end state)."""
    T, H = u.shape[1:3]
    u_c, g_c, dt_c = to_chunks(u), to_chunks(g), to_chunks(dt)
    if is_stiff(dt_c, p).any():
        return backward_by_blocks(g, u, dt, p, states, eta)
    f = factors(dt, p)
    etas = torch.empty_like(states)
    etas[:-1] = unflat(g_c.mT @ flat(f.G), states)
    etas[-1] = eta
    entered = torch.empty_like(states[:-1])  # dL/d(what enters a chunk at its start), through its end
    for k in reversed(range(len(entered))):
        torch.mul(f.Q[k, ..., -1:, :], etas[k + 1], out=entered[k])
        etas[k] += entered[k]

    du = add_product(mixing(f).mT @ g_c, flat(f.K), flat(entered).mT)
    dM = g_c @ u_c.mT
    dM_own = torch.diagonal(dM, dim1=-2, dim2=-1).clone()  # a token's own share of its output: no decay in it
    dM.tril_(-1)
    dG = unflat(add_product(dM @ flat(f.K), g_c, flat(states[:-1])), f.G)
    dK_inside, dK_end = (unflat(x, f.G) for x in (dM.mT @ flat(f.G), u_c @ flat(entered)))

    # Gradients of exponents of A: from s to t inside the chunk (theta), from s to its end, over all of it.
    # Each is summed by itself; together they would cancel.
    read, driven = conj_(dG).mul_(f.Q), dK_inside.mul_(f.growth)  # conj(dC) / kappa, and dL/d(w B)
    driven_end = dK_end.mul_(f.growth)
    B_conj, C = conj(per_token(p.B, H)), p.kappa * per_token(p.C, H)
    W_conj = f.w * B_conj
    own = dM_own[..., None]
    dC = p.kappa * conj(fold(unflat(torch.addcmul(flat(read), own, flat(W_conj)), read), p.C, T))
    theta = read.mul_(C).sub_(driven * W_conj)
    to_end = driven_end * W_conj
    whole = (entered * conj(states[:-1])).sum(-2)[..., None, :]
    S = dt_c.cumsum(-1)
    dS, dS_end = over_modes(theta, p.A), over_modes(to_end, p.A)
    ddt = dS.flip(-1).cumsum(-1).flip(-1) + dS_end.cumsum(-1).sub_(dS_end) + over_modes(whole, p.A)
    dA = over_time(S, theta) + over_time(S[..., -1:] - S, to_end) + over_time(S[..., -1:], whole)

    flat(driven.add_(driven_end)).addcmul_(own, flat(C))
    dB = fold(driven * f.w, p.B, T)
    dw = driven.mul_(B_conj)
    ddt += real(dw if p.euler else dw * f.a).sum(-1)
    if not p.euler:
        dA += weight_gradient(dw, f.a, f.w, dt_c, p.A)
    return ScanGradients(from_chunks(du, T), from_chunks(ddt, T), dA, dB, dC, etas[0])


def factors(dt: Tensor, p: Params) -> Factors:
    """Everything of a run of chunks that does not depend on u."""
    H = dt.shape[2]
    a, w = discretise(to_chunks(dt)[..., None], p.A[:, None], p.euler)
    w = w.expand(a.shape)
    Q = a.clone()
    for t in range(1, CHUNK):
        Q[..., t, :] *= Q[..., t - 1, :]
    growth = Q.reciprocal()
    G = Q * (p.kappa * per_token(p.C, H))
    K = (growth * w).mul_(conj(per_token(p.B, H)))
    return Factors(a, w, Q, growth, G, conj_(K))


def mixing(f: Factors) -> Tensor:
    """M [m,B,H,c,c], zero above the diagonal."""
    return (flat(f.G) @ flat(f.K).mT).tril_()


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b, in place of x."""
    x.view(-1, *x.shape[-2:]).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
    return x


def over_time(rate: Tensor, x: Tensor) -> Tensor:
    """Sum of x [m,B,H,c,N] over chunks, batch and tokens, weighted by rate [m,B,H,c]: [H,N]."""
    return unflat((rate[..., None, :] @ flat(x)).squeeze(-2).sum((0, 1)), x)


def over_modes(x: Tensor, y: Tensor) -> Tensor:
    """Re sum_n conj(y) x for x [m,B,H,c,N] and y [H,N]: [m,B,H,c]."""
    return (flat(x) @ flat(y)[:, :, None]).squeeze(-1)


def real(x: Tensor) -> Tensor:
    """The real part; a real one as it is."""
    return x.real if x.is_complex() else x


def conj_(x: Tensor) -> Tensor:
    """The conjugate, in place of x."""
    return x.conj_physical_() if x.is_complex() else x


def is_stiff(dt: Tensor, p: Params) -> Tensor:
    """[m,B,H,c]: whether some state has decayed by more than LIMIT since the start of the chunk."""
    rate = (p.A.real if p.A.is_complex() else p.A).abs().amax(-1)
    return dt.cumsum(-1) * rate[:, None] > LIMIT[dt.dtype]


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
