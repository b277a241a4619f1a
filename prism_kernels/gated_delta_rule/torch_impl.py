"""Fast pure PyTorch: chunked, batched over chunks, with a hand-written backward.

Everything but the recurrence of the state runs on all chunks of a segment at once; a segment is as many
chunk steps as keep its temporaries in cache. Symbols and derivations: README.md.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.runtime import accumulate_dtype
from .layout import Layout

SEGMENT_ELEMENTS = 1 << 19  # of one [C, K] operand per segment: 2 MiB in float32
CHECKPOINT = 32  # tokens between saved states, token by token
NORM_EPS = 1e-6


class Operands(NamedTuple):
    """What forward and backward share: one segment, as n matrices of one chunk and head each."""

    q: Tensor  # r[n,C,K], normalised on request
    k: Tensor
    v: Tensor
    beta: Tensor  # r[n,C,1]
    gamma: Tensor  # r[n,C,1], decay from the start of the chunk
    tail: Tensor  # r[n,C,1], decay to its end
    last: Tensor  # r[n,1,1], decay of the whole chunk
    D: Tensor  # r[n,C,C], decay from token j to token i >= j
    q_norm: Tensor | None  # r[n,C,1], 1 / length
    k_norm: Tensor | None


class Saved(NamedTuple):
    """What backward needs beside the inputs; rows are matrices in the order of `Layout`."""

    A: Tensor  # r[M,C,C], inverse of I + L
    U: Tensor  # r[M,C,V], what each token writes
    states: Tensor  # r[M,K,V], state at the start of each chunk


def empty_saved(layout: Layout, heads: int, K: int, V: int, like: Tensor) -> Saved:
    """Room for `Saved`; zero where a packed batch has fewer rows than its bound."""
    M, C = layout.bound * heads, layout.C
    new = like.new_empty if layout.index is None else like.new_zeros
    return Saved(new(M, C, C), new(M, C, V), new(M, K, V))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    chunk_size: int,
    save: bool,
) -> tuple[Tensor, Tensor, Saved]:
    """Return o, the final state and, if `save`, what backward needs."""
    B, T, HV, V = v.shape
    K, wide = k.shape[3], accumulate_dtype(q.dtype)
    layout = Layout.of(B, T, chunk_size, cu_seqlens)
    saved = empty_saved(layout, HV, K, V, g) if save else Saved(*(g.new_empty(0) for _ in range(3)))
    rows = [layout.rows(x) for x in (q, k, v, g[..., None], beta[..., None])]
    state = layout.first_states(initial_state, (HV, K, V), g)
    o, o_rows = layout.new_rows(v)
    for c0, c1 in segments(layout, HV * chunk_size * max(K, V)):
        x = load(layout, c0, c1, rows, HV, wide, l2norm)
        n = slice(layout.offsets[c0] * HV * layout.width, layout.offsets[c1] * HV * layout.width)
        L = torch.bmm(x.k, x.k.mT).mul_(x.D).mul_(x.beta)
        A = unit_lower_inverse(L)
        W = torch.bmm(A, x.k * (x.beta * x.gamma))
        U = torch.bmm(A, x.v.mul_(x.beta))
        S = saved.states[n] if save else g.new_empty(A.shape[0], K, V)
        tailed = x.k * x.tail
        for m in layout.steps(c0, c1, HV):
            running = state[: m.stop - m.start]
            S[m] = running
            U[m].baddbmm_(W[m], running, alpha=-1)
            running.mul_(x.last[m]).baddbmm_(tailed[m].mT, U[m])
        P = torch.bmm(x.q, x.k.mT).mul_(x.D)
        out = torch.bmm(x.q.mul_(x.gamma), S).baddbmm_(P, U, beta=scale, alpha=scale)
        layout.store(o_rows, c0, c1, out, HV)
        if save:
            saved.A[n], saved.U[n] = A, U
    return layout.tokens(o, o_rows, T), layout.final_states(state, HV), saved


def backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    saved: Saved,
    scale: float,
    l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, g, beta and the initial state."""
    B, T, HV, V = v.shape
    K, wide = k.shape[3], accumulate_dtype(q.dtype)
    layout = Layout.of(B, T, chunk_size, cu_seqlens)
    inputs = (q, k, v, g[..., None], beta[..., None])
    rows = [layout.rows(x) for x in inputs]
    do_rows = layout.rows(do)
    grads = [layout.new_rows(x) for x in inputs]
    dstate = layout.first_states(dfinal, (HV, K, V), g)
    for c0, c1 in reversed(list(segments(layout, HV * chunk_size * max(K, V)))):
        x = load(layout, c0, c1, rows, HV, wide, l2norm)
        n = slice(layout.offsets[c0] * HV * layout.width, layout.offsets[c1] * HV * layout.width)
        A, U, S = saved.A[n], saved.U[n], saved.states[n]
        dO = layout.take(do_rows, c0, c1, HV, wide).mul_(scale)
        qk, kk = torch.bmm(x.q, x.k.mT), torch.bmm(x.k, x.k.mT)
        dU, dS = torch.bmm((qk * x.D).mT, dO), torch.empty_like(S)
        read = torch.bmm((x.q * x.gamma).mT, dO)
        W, tailed = torch.bmm(A, x.k * (x.beta * x.gamma)), x.k * x.tail
        for m in reversed(list(layout.steps(c0, c1, HV))):
            running = dstate[: m.stop - m.start]
            dS[m] = running
            dU[m].baddbmm_(tailed[m], running)
            running.mul_(x.last[m]).add_(read[m]).baddbmm_(W[m].mT, dU[m], alpha=-1)
        for (_, out), grad in zip(grads, gradients(x, qk, kk, A, U, S, dO, dU, dS), strict=True):
            layout.store(out, c0, c1, grad, HV)
    dq, dk, dv, dg, dbeta = (layout.tokens(base, out, T) for base, out in grads)
    return dq, dk, dv, dg[..., 0], dbeta[..., 0], layout.final_states(dstate, HV)


def gradients(
    x: Operands,
    qk: Tensor,
    kk: Tensor,
    A: Tensor,
    U: Tensor,
    S: Tensor,
    dO: Tensor,
    dU: Tensor,
    dS: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta of one segment from both recurrences; uses up qk, kk and x.D."""
    dR = torch.bmm(A.mT, dU)
    E = torch.bmm(dO, U.mT).mul_(x.D)  # gradient of Q K^T
    M = torch.bmm(dR, U.mT).mul_(x.D.tril_(-1)).neg_()
    kk.mul_(M)
    dbeta = kk.sum(-1, keepdim=True)
    within = qk.mul_(E).tril_(-1).addcmul_(kk, x.beta)
    M.mul_(x.beta)

    from_q = torch.bmm(dO, S.mT).mul_(x.gamma)
    from_r = torch.bmm(dR, S.mT).mul_(x.gamma)
    from_s = torch.bmm(U, dS.mT).mul_(x.tail)
    kr, ks = dot(x.k, from_r), dot(x.k, from_s)
    dbeta += dot(dR, x.v) - kr
    dG = within.sum(-1, keepdim=True) - within.sum(-2).unsqueeze(-1)
    dG += dot(x.q, from_q) - x.beta * kr - ks
    dG[:, -1:] += x.last * (S * dS).sum((-1, -2), keepdim=True) + ks.sum(1, keepdim=True)
    dg = dG.flip(1).cumsum(1).flip(1)

    dk = from_s.addcmul_(from_r, x.beta, value=-1).baddbmm_(E.mT, x.q)
    dk.baddbmm_(M.add_(M.mT.clone()), x.k)
    dq = from_q.baddbmm_(E, x.k)
    dv = dR.mul_(x.beta)
    return unnormalise(dq, x.q, x.q_norm), unnormalise(dk, x.k, x.k_norm), dv, dg, dbeta


def segments(layout: Layout, elements: int) -> Iterator[tuple[int, int]]:
    """Cut the chunk steps into runs c0:c1 whose operands stay in cache; `elements` is one row's."""
    rows = max(1, SEGMENT_ELEMENTS // elements)
    offsets, c0 = layout.offsets, 0
    for c1 in range(1, len(offsets)):
        if c1 == len(offsets) - 1 or (offsets[c1 + 1] - offsets[c0]) * layout.width > rows:
            yield c0, c1
            c0 = c1


def load(
    layout: Layout, c0: int, c1: int, rows: list[Tensor], heads: int, wide: torch.dtype, l2norm: bool
) -> Operands:
    """Copy one segment into [n, C, width], widened, and derive the decays."""
    q, k, v, g, beta = (layout.take(x, c0, c1, heads, wide) for x in rows)
    q_norm, k_norm = (normalise(q), normalise(k)) if l2norm else (None, None)
    G = g.cumsum(1)
    last = G[:, -1:]
    # At or above the diagonal the difference is >= 0: clamped before exp, then cleared.
    D = (G - G.mT).clamp_(max=0).exp_().tril_()
    return Operands(q, k, v, beta, G.exp(), (last - G).exp_(), last.exp(), D, q_norm, k_norm)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row products, r[n,C,1]."""
    return (a * b).sum(-1, keepdim=True)


def normalise(x: Tensor) -> Tensor:
    """Scale the rows of `x` to length one in place; return the factors."""
    norm = dot(x, x).add_(NORM_EPS).rsqrt_()
    x.mul_(norm)
    return norm


def unnormalise(grad: Tensor, y: Tensor, norm: Tensor | None) -> Tensor:
    """Gradient before `normalise` from the one after it, in place; `y` is the normalised row."""
    return grad if norm is None else grad.addcmul_(y, dot(grad, y), value=-1).mul_(norm)


def unit_lower_inverse(L: Tensor) -> Tensor:
    """(I + strict lower part of L)^-1 for r[n,C,C], C a power of two: halves first, then the corner.

    [[X, 0], [-Y L21 X, Y]] with X, Y the inverses of the halves; log2(C) levels, each a batched product.
    """
    n, C, _ = L.shape
    if C <= 16:
        return _inverse_by_doubling(L)
    h = C // 2
    halves = torch.stack((L[:, :h, :h], L[:, h:, h:]), 1)
    X, Y = unit_lower_inverse(halves.view(2 * n, h, h)).view(n, 2, h, h).unbind(1)
    A = L.new_zeros(n, C, C)
    A[:, :h, :h] = X
    A[:, h:, h:] = Y
    A[:, h:, :h] = torch.bmm(torch.bmm(Y, L[:, h:, :h]), X).neg_()
    return A


def _inverse_by_doubling(L: Tensor) -> Tensor:
    """The same on small matrices, all blocks of a level at once under a mask."""
    C = L.shape[-1]
    i = torch.arange(C, device=L.device)
    X = torch.eye(C, dtype=L.dtype, device=L.device).expand_as(L).contiguous()
    for level in range(C.bit_length() - 1):
        half = i >> level
        corner = (half[:, None] % 2 == 1) & (half[:, None] - 1 == half[None, :])
        step = L * corner
        X -= step if level == 0 else torch.bmm(torch.bmm(X, step), X)
    return X


class Tokens(NamedTuple):
    """Operands of the token-by-token path: n matrices of one token and head each."""

    q: Tensor  # r[n,1,K], normalised on request
    k: Tensor
    v: Tensor
    beta: Tensor  # r[n,1,1]
    decay: Tensor  # r[n,1,1]
    q_norm: Tensor | None
    k_norm: Tensor | None


def load_tokens(
    layout: Layout, c0: int, c1: int, rows: list[Tensor], heads: int, wide: torch.dtype, l2norm: bool
) -> Tokens:
    """Copy one segment of tokens into [n, 1, width], widened."""
    q, k, v, g, beta = (layout.take(x, c0, c1, heads, wide) for x in rows)
    q_norm, k_norm = (normalise(q), normalise(k)) if l2norm else (None, None)
    return Tokens(q, k, v, beta, g.exp_(), q_norm, k_norm)


def advance(M: Tensor, x: Tokens, m: slice) -> tuple[Tensor, Tensor]:
    """One token of every live sequence: decay `M` in place and write; return the error and the write."""
    M.mul_(x.decay[m])
    error = torch.baddbmm(x.v[m], x.k[m], M, alpha=-1)
    write = error * x.beta[m]
    M.baddbmm_(x.k[m].mT, write)
    return error, write


def recurrent_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, the final state and, if `save`, the state at the start of every segment of tokens."""
    B, T, HV, V = v.shape
    layout = Layout.of(B, T, 1, cu_seqlens)
    rows = [layout.rows(x) for x in (q, k, v, g[..., None], beta[..., None])]
    state = layout.first_states(initial_state, (HV, k.shape[3], V), g)
    o, o_rows = layout.new_rows(v)
    checkpoints = g.new_zeros(-(-T // CHECKPOINT) if save else 0, *state.shape)
    for i, (c0, c1) in enumerate(checkpoint_segments(layout)):
        if save:
            checkpoints[i] = state
        x = load_tokens(layout, c0, c1, rows, HV, accumulate_dtype(q.dtype), l2norm)
        out = torch.empty_like(x.v)
        for m in layout.steps(c0, c1, HV):
            M = state[: m.stop - m.start]
            advance(M, x, m)
            torch.bmm(x.q[m], M, out=out[m])
        layout.store(o_rows, c0, c1, out.mul_(scale), HV)
    return layout.tokens(o, o_rows, T), layout.final_states(state, HV), checkpoints


def recurrent_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, g, beta and the initial state: segments replayed, then reversed."""
    B, T, HV, V = v.shape
    wide = accumulate_dtype(q.dtype)
    layout = Layout.of(B, T, 1, cu_seqlens)
    inputs = (q, k, v, g[..., None], beta[..., None])
    rows, do_rows = [layout.rows(x) for x in inputs], layout.rows(do)
    grads = [layout.new_rows(x) for x in inputs]
    dstate = layout.first_states(dfinal, (HV, k.shape[3], V), g)
    for i, (c0, c1) in reversed(list(enumerate(checkpoint_segments(layout)))):
        x = load_tokens(layout, c0, c1, rows, HV, wide, l2norm)
        dO = layout.take(do_rows, c0, c1, HV, wide).mul_(scale)
        state, steps, trace = checkpoints[i].clone(), list(layout.steps(c0, c1, HV)), []
        for m in steps:
            M = state[: m.stop - m.start]
            before = M.clone()
            trace.append((before, *advance(M, x, m), M.clone()))
        out = [torch.empty_like(t) for t in (x.q, x.k, x.v, x.decay, x.beta)]
        for m, token in zip(reversed(steps), reversed(trace), strict=True):
            token_gradients(dstate[: m.stop - m.start], x, m, dO[m], token, out)
        unnormalise(out[0], x.q, x.q_norm)
        unnormalise(out[1], x.k, x.k_norm)
        for (_, to), grad in zip(grads, out, strict=True):
            layout.store(to, c0, c1, grad, HV)
    dq, dk, dv, dg, dbeta = (layout.tokens(base, to, T) for base, to in grads)
    return dq, dk, dv, dg[..., 0], dbeta[..., 0], layout.final_states(dstate, HV)


def token_gradients(
    dM: Tensor, x: Tokens, m: slice, dO: Tensor, token: tuple[Tensor, ...], out: list[Tensor]
) -> None:
    """Take `dM` from after a token to before it; write the token's gradients into `out`."""
    before, error, write, after = token
    dq, dk, dv, dg, dbeta = (t[m] for t in out)
    torch.bmm(dO, after.mT, out=dq)
    dM.baddbmm_(x.q[m].mT, dO)
    dwrite = torch.bmm(x.k[m], dM)
    torch.sum(dwrite * error, -1, keepdim=True, out=dbeta)
    torch.mul(dwrite, x.beta[m], out=dv)
    decayed = before.mul_(x.decay[m])
    torch.bmm(write, dM.mT, out=dk).baddbmm_(dv, decayed.mT, alpha=-1)
    dM.baddbmm_(x.k[m].mT, dv, alpha=-1)
    torch.sum((dM * decayed).flatten(1), -1, out=dg.view(-1))
    dM.mul_(x.decay[m])


def checkpoint_segments(layout: Layout) -> list[tuple[int, int]]:
    """Runs of CHECKPOINT tokens."""
    steps = len(layout.offsets) - 1
    return [(c, min(c + CHECKPOINT, steps)) for c in range(0, steps, CHECKPOINT)]
