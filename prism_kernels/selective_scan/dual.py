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

from .._core.scratch import Scratch
from . import blocks
from .discrete import (
    Params,
    Poles,
    ScanGradients,
    conj,
    discretise,
    flat,
    joined,
    over_time,
    real,
    step_powers,
    unflat,
    weight_gradient,
)

CHUNK = 16
HALVES = (1, 2, 4, 8)
LIMIT = {torch.float32: 40.0, torch.float64: 300.0}


@dataclass(frozen=True)
class Factors:
    """What a chunk needs, each [m,H,B,c,N] (m chunks of c tokens); all but G and K conjugated."""

    w: Tensor
    Q: Tensor  # decay from the start of the chunk through t
    growth: Tensor  # [m,H,B,c+1,N]: 1, then the inverse of Q
    R: Tensor  # w over Q
    G: Tensor
    K: Tensor
    K_conj: Tensor


def forward(
    u: Tensor, dt: Tensor, p: Params, states: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B,T,H,P] of m chunks that start from states[0], Q and w; write states[1:]."""
    T = u.shape[1]
    u_c, dt_c = to_chunks(u), to_chunks(dt)
    Q, w = decays(dt_c, p)
    f, stiff = factors(Q, w, dt_c, p), is_stiff(dt_c, p)
    entered = states[1:]  # the input of a chunk, as if it came before the chunk
    torch.bmm(u_c.mT.flatten(0, 2), flat(f.K).flatten(0, 2), out=flat(entered).flatten(0, 2))
    exact = {}
    for k, is_exact in enumerate(stiff.flatten(1).any(1).tolist()):
        if is_exact:
            time = slice(k * CHUNK, min((k + 1) * CHUNK, T))
            bounds = states[k : k + 2]
            exact[k], *_ = blocks.forward(u[:, time], dt[:, time], p.token_slice(time), bounds, scratch)
        else:
            entered[k].add_(states[k]).mul_(conj(f.Q[k, ..., -1:, :]))
    y = add_product(mixing(f) @ u_c, flat(f.G), flat(states[:-1]).mT)
    for k, rows in exact.items():
        y[k] = torch.where(stiff[k][..., None], to_chunks(rows)[0], y[k])
    return from_chunks(y, T), Q, w


def backward(
    g: Tensor, u: Tensor, dt: Tensor, p: Params, kept: list[Tensor], eta: Tensor, scratch: Scratch
) -> ScanGradients:
    """Gradients of m chunks from g = dL/dy and eta = dL/d(the end state)."""
    (states, Q, w), T = kept, u.shape[1]
    u_c, g_c, dt_c = to_chunks(u), to_chunks(g), to_chunks(dt)
    if is_stiff(dt_c, p).any():
        return backward_by_blocks(g, u, dt, p, states, eta, scratch)
    f = factors(Q, w, dt_c, p)
    entered, whole, dinitial = through_states(f, unflat(g_c.mT @ flat(f.G), states), states, eta)

    du = add_product(mixing(f).mT @ g_c, flat(f.K), flat(entered).mT)
    dM = g_c @ u_c.mT
    own = torch.diagonal(dM, dim1=-2, dim2=-1)[..., None].clone()  # what a token does to its own output
    dM.tril_(-1)
    dG = unflat(add_product(dM @ flat(f.K), g_c, flat(states[:-1])), f.G)
    dK, dK_end = (unflat(x, f.G) for x in (dM.mT @ flat(f.G), u_c @ flat(entered)))
    read = conj_(dG).mul_(f.Q)  # conj(dC) / kappa, but for each token's own output
    B_conj, C = conj(per_token(p.B, p)), p.kappa * per_token(p.C, p)
    dC = p.kappa * conj(fold(read, p.C, T) + own_read(own, f.w, B_conj, p, T))

    # Gradients of exponents of A: from s to t inside the chunk, from s to its end, over all of it. Each
    # is summed by itself; together they would cancel. A token's own share has no decay in it.
    S = dt_c.cumsum(-1)
    inside, dA_inside = exponents(read.mul_(on_chunks(C)).addcmul_(dK, f.K_conj, value=-1), S, p)
    to_end, dA_to_end = exponents(dK_end * f.K_conj, S[..., -1:] - S, p)
    over_all, dA_over_all = exponents(whole[..., None, :], S[..., -1:], p)
    ddt = inside.flip(-1).cumsum(-1).flip(-1) + to_end.cumsum(-1).sub_(to_end) + over_all
    dA = dA_inside + dA_to_end + dA_over_all

    flat(dK.add_(dK_end)).addcmul_(own, flat(f.G))
    driven = torch.mul(dK, f.R, out=dK_end)
    dB = fold(driven, p.B, T)
    # dK over Q is the gradient of w B; over the Q of the token before, that times conj(a).
    slope, scale = dK.mul_(f.growth[..., p.euler : CHUNK + p.euler, :]), B_conj
    if p.B.ndim == 4:
        slope, driven, scale = slope.mul_(B_conj), driven.mul_(B_conj), torch.ones_like(p.A)
    ddt += over_modes(slope, scale)
    if not p.euler:
        powers, largest = step_powers(dt_c.flatten(2))
        moments = unflat((powers @ flat(slope.flatten(2, 3))).sum(0), slope)
        away = unflat(dt_c[..., None] * flat(slope), slope).sub_(driven)  # the numerator of chi
        dA += scale * weight_gradient(moments, fold(away, p.A, T), largest, p.poles)
    return ScanGradients(from_chunks(du, T), from_chunks(ddt, T), dA, dB, dC, dinitial)


def through_states(f: Factors, outputs: Tensor, states: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of the states, last chunk first.

    From dL/d(states) [m,H,B,P,N] through the outputs and `eta` for the last state, return dL/d(what
    enters a chunk at its start) through its end [m,H,B,P,N], its product with the state there
    [m,H,B,N], and dL/d(states[0]).
    """
    entered, whole = torch.empty_like(outputs), torch.empty_like(outputs[..., 0, :])
    product = torch.empty_like(eta)
    for k in reversed(range(len(entered))):
        torch.mul(f.Q[k, ..., -1:, :], eta, out=entered[k])
        torch.sum(conj_(product.copy_(states[k])).mul_(entered[k]), -2, out=whole[k])
        eta = outputs[k].add_(entered[k])
    return entered, whole, eta


def decays(dt_c: Tensor, p: Params) -> tuple[Tensor, Tensor]:
    """Q and w [m,H,B,c,N], conjugated, from step sizes [m,H,B,c]; under Euler w is dt and comes out empty."""
    Q, w = discretise(dt_c[..., None], Poles(on_chunks(p.A)), p.euler, Scratch())
    for half in HALVES:  # from a to its running product: the last of a first half times each of the second
        pairs = Q.unflatten(-2, (-1, 2, half))
        pairs[..., 1, :, :].mul_(pairs[..., 0, -1:, :])
    return Q, dt_c.new_empty(0) if p.euler else w


def factors(Q: Tensor, w: Tensor, dt_c: Tensor, p: Params) -> Factors:
    """Everything of a run of chunks that does not depend on u."""
    if p.euler:
        w = dt_c[..., None].to(Q.dtype).expand(Q.shape)
    growth = Q.new_ones(*Q.shape[:-2], CHUNK + 1, Q.shape[-1])
    R = torch.reciprocal(Q, out=growth[..., 1:, :]) * w
    G = Q * on_chunks(p.kappa * per_token(p.C, p))
    K_conj = R * on_chunks(conj(per_token(p.B, p)))
    return Factors(w, Q, growth, R, G, conj(K_conj), K_conj)


def mixing(f: Factors) -> Tensor:
    """M [m,H,B,c,c], zero above the diagonal."""
    return (flat(f.G) @ flat(f.K).mT).tril_()


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b, in place of x."""
    x.view(-1, *x.shape[-2:]).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
    return x


def own_read(own: Tensor, w: Tensor, B_conj: Tensor, p: Params, T: int) -> Tensor:
    """What reading its own input adds to conj(dC) / kappa, for own [m,H,B,c,1]: own w B, conjugated."""
    if p.B.ndim == p.C.ndim == 2:
        return B_conj * over_time(own.flatten(2), w.flatten(2, 3))
    return fold(unflat(own * flat(w), w) * on_chunks(B_conj), p.C, T)


def exponents(x: Tensor, rate: Tensor, p: Params) -> tuple[Tensor, Tensor]:
    """Gradients of times [m,H,B,c] and of A [H,N] from those of exponents, x [m,H,B,c,N].

    `rate` [m,H,B,c] is the time that multiplies A in the exponent.
    """
    return over_modes(x, conj(p.A)), over_time(rate.flatten(2), x.flatten(2, 3))


def over_modes(x: Tensor, y: Tensor) -> Tensor:
    """Re sum_n x y for x [m,H,B,c,N] and y [H,N]: [m,H,B,c]."""
    return (flat(conj(y))[:, None] @ flat(x).flatten(2, 3).mT).view(x.shape[:-1])


def on_chunks(x: Tensor) -> Tensor:
    """A static [H,N] so that it broadcasts over [m,H,B,c,N]."""
    return x[:, None, None] if x.ndim == 2 else x


def conj_(x: Tensor) -> Tensor:
    """The conjugate, in place of x."""
    return x.conj_physical_() if x.is_complex() else x


def is_stiff(dt_c: Tensor, p: Params) -> Tensor:
    """[m,H,B,c]: whether some state has decayed by more than LIMIT since the start of the chunk."""
    rate = (p.A.real if p.A.is_complex() else p.A).abs().amax(-1)
    return dt_c.cumsum(-1) * rate[:, None, None] > LIMIT[dt_c.dtype]


def backward_by_blocks(
    g: Tensor, u: Tensor, dt: Tensor, p: Params, states: Tensor, eta: Tensor, scratch: Scratch
) -> ScanGradients:
    """The gradients of every chunk, token by token, last chunk first."""
    runs = []
    for k, time in reversed(list(enumerate(chunk_slices(u.shape[1])))):
        p_k = p.token_slice(time)
        bounds = [states[k : k + 2]]
        runs.append(blocks.backward(g[:, time], u[:, time], dt[:, time], p_k, bounds, eta, scratch))
        eta = runs[-1].initial_state
    return joined(runs[::-1], p)


def chunk_slices(T: int) -> list[slice]:
    """The time slices of the chunks, the last one perhaps shorter."""
    return [slice(t, min(t + CHUNK, T)) for t in range(0, T, CHUNK)]


def to_chunks(x: Tensor) -> Tensor:
    """[B,T,H,...] as [m,H,B,c,...], padded with zeros at the end."""
    missing = -x.shape[1] % CHUNK
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    x = x.unflatten(1, (-1, CHUNK))
    return x.permute(1, 3, 0, 2, *range(4, x.ndim)).contiguous()


def from_chunks(x: Tensor, T: int) -> Tensor:
    """The inverse of `to_chunks`, cut to T tokens."""
    return x.permute(2, 0, 3, 1, *range(4, x.ndim)).flatten(1, 2)[:, :T]


def per_token(x: Tensor, p: Params) -> Tensor:
    """Static [H,N] as it is, dependent [B,T,G,N] as [m,H,B,c,N]."""
    if x.ndim == 2:
        return x
    return unflat(to_chunks(flat(x)), x).repeat_interleave(len(p.A) // x.shape[2], 1)


def fold(d: Tensor, like: Tensor, T: int) -> Tensor:
    """The gradient d [m,H,B,c,N] summed to the shape of `like`."""
    if like.ndim == 2:
        d = d.flatten(2, 3)
        return over_time(torch.ones_like(real(d[..., 0])), d)
    return from_chunks(d.unflatten(1, (like.shape[2], -1)).sum(2), T)
