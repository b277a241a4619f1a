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

SEGMENT_ELEMENTS = 1 << 18  # of one operand of a segment: 1 MiB in float32
CHECKPOINT = 32  # tokens between saved states, token by token
NORM_EPS = 1e-6


class Operands(NamedTuple):
    """What forward and backward share: one segment, as n matrices of one chunk and head each."""

    qk: Tensor  # r[n,2C,K], queries over keys, normalised on request
    v: Tensor
    beta: Tensor  # r[n,C,1]
    gamma: Tensor  # r[n,C,1], decay from the start of the chunk
    tail: Tensor  # r[n,C,1], decay to its end
    last: Tensor  # r[n,1,1], decay of the whole chunk
    D: Tensor  # r[n,C,C], decay from token j to token i >= j
    norm: Tensor | None  # r[n,2C,1], 1 / length of the rows of qk


class Saved(NamedTuple):
    """What backward needs beside the inputs; rows are matrices in the order of `Layout`."""

    N: Tensor  # r[M,C,C], coupling of the tokens of a chunk
    E: Tensor  # r[M,C,V], error that each token corrects
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
    C = inner_chunk(chunk_size, K, V)
    layout = Layout.of(B, T, C, cu_seqlens)
    saved = empty_saved(layout, HV, K, V, g) if save else None
    rows = [layout.rows(x) for x in (q, k, v, g[..., None], beta[..., None])]
    state = layout.first_states(initial_state, (HV, K, V), g)
    o, o_rows = layout.new_rows(v)
    for c0, c1 in segments(layout, HV * C * max(K, V)):
        x = load(layout, c0, c1, rows, HV, wide, l2norm)
        n = layout.matrices(c0, c1, HV)
        P, kk = torch.bmm(x.qk, x.qk[:, C:].mT).split(C, 1)
        P.mul_(x.D)
        N = coupling(kk.mul_(x.D), x.beta)
        writer, reads = x.qk[:, C:] * (x.tail * x.beta), x.v.new_empty(x.v.shape[0], 2 * C, V)
        E = torch.empty_like(x.v) if saved is None else saved.E[n]
        for m in layout.steps(c0, c1, HV):
            running = state[: m.stop - m.start]
            if saved is not None:
                saved.states[n][m] = running
            read = torch.bmm(x.qk[m], running, out=reads[m])
            error = x.v[m].addcmul_(x.gamma[m], read[:, C:], value=-1)
            torch.baddbmm(error, N[m], error * x.beta[m], out=E[m])
            running.mul_(x.last[m]).baddbmm_(writer[m].mT, E[m])
        out = (reads[:, :C] * x.gamma).baddbmm_(P, E * x.beta, beta=scale, alpha=scale)
        layout.store(o_rows, c0, c1, out, HV)
        if saved is not None:
            saved.N[n] = N
    empty = (g.new_empty(0) for _ in range(3))
    return layout.tokens(o, o_rows, T), layout.final_states(state, HV), saved or Saved(*empty)


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
    C = inner_chunk(chunk_size, K, V)
    layout = Layout.of(B, T, C, cu_seqlens)
    inputs = (q, k, v, g[..., None], beta[..., None])
    rows, do_rows = [layout.rows(x) for x in inputs], layout.rows(do)
    grads = [layout.new_rows(x) for x in inputs]
    dstate = layout.first_states(dfinal, (HV, K, V), g)
    for c0, c1 in reversed(list(segments(layout, HV * C * max(K, V)))):
        x = load(layout, c0, c1, rows, HV, wide, l2norm)
        n = layout.matrices(c0, c1, HV)
        N, E, S = saved.N[n], saved.E[n], saved.states[n]
        dOR = E.new_empty(E.shape[0], 2 * C, V)  # gradients of O over those of R
        layout.take_into(dOR[:, :C], do_rows, c0, c1, HV).mul_(scale)
        products = torch.bmm(x.qk, x.qk[:, C:].mT)
        dU, dS = torch.bmm((products[:, :C] * x.D).mT, dOR[:, :C]), torch.empty_like(S)
        decay = torch.cat((x.gamma, -x.beta * x.gamma), 1)
        reader, tailed = x.qk * decay, x.qk[:, C:] * x.tail
        for m in reversed(list(layout.steps(c0, c1, HV))):
            running = dstate[: m.stop - m.start]
            dS[m] = running
            dU[m].baddbmm_(tailed[m], running)
            dOR[m, C:] = torch.baddbmm(dU[m], N[m].mT, dU[m] * x.beta[m])
            running.mul_(x.last[m]).baddbmm_(reader[m].mT, dOR[m])
        dqk, *others = gradients(x, products, decay, E, S, dOR, dS)
        for (_, out), grad in zip(grads, (dqk[:, :C], dqk[:, C:], *others), strict=True):
            layout.store(out, c0, c1, grad, HV)
    dq, dk, dv, dg, dbeta = (layout.tokens(base, out, T) for base, out in grads)
    return dq, dk, dv, dg[..., 0], dbeta[..., 0], layout.final_states(dstate, HV)


def gradients(
    x: Operands, products: Tensor, decay: Tensor, E: Tensor, S: Tensor, dOR: Tensor, dS: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qk, v, g, beta of one segment from both recurrences; uses up `products` and x.D."""
    C = E.shape[1]
    k, dR, U = x.qk[:, C:], dOR[:, C:], E * x.beta
    dbeta = dot(dR, E)
    inner = torch.bmm(dOR, U.mT)  # gradients of Q K^T over those of K K^T
    inner[:, :C].mul_(x.D)
    inner[:, C:].mul_(x.D.tril_(-1)).mul_(-x.beta)
    of_q, of_k = products.mul_(inner).split(C, 1)
    within = of_q.tril_(-1).add_(of_k)

    dqk = torch.bmm(dOR, S.mT)
    to_state = torch.bmm(U, dS.mT).mul_(x.tail)
    by_row, kept = dot(x.qk, dqk), dot(k, to_state)
    by_row.mul_(decay)
    dG = within.sum(-1, keepdim=True) - within.sum(-2).unsqueeze(-1)
    dG += by_row[:, :C] + by_row[:, C:] - kept
    dG[:, -1:] += x.last * (S * dS).sum((-1, -2), keepdim=True) + kept.sum(1, keepdim=True)
    dg = dG.flip(1).cumsum(1).flip(1)

    dqk.mul_(decay).baddbmm_(inner, k)
    dqk[:, C:] += to_state.baddbmm_(inner.mT, x.qk)
    return unnormalise(dqk, x.qk, x.norm), dR * x.beta, dg, dbeta


def inner_chunk(chunk_size: int, K: int, V: int) -> int:
    """Chunk used here: shorter ones cost fewer operations, and more stored states."""
    return min(chunk_size, 32 if max(K, V) <= 64 else 64)


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
    v, beta = (layout.take(x, c0, c1, heads, wide) for x in (rows[2], rows[4]))
    # Differences of G must be exact to the last bit of what they decay, however far G has fallen.
    G = layout.take(rows[3], c0, c1, heads, torch.float64).cumsum(1)
    n, C, _ = v.shape
    qk = v.new_empty(n, 2 * C, rows[0].shape[-1])
    layout.take_into(qk[:, :C], rows[0], c0, c1, heads)
    layout.take_into(qk[:, C:], rows[1], c0, c1, heads)
    norm = normalise(qk) if l2norm else None
    last = G[:, -1:]
    # Above the diagonal the difference is >= 0: clamped before exp, then cleared.
    D = (G - G.mT).clamp_(max=0).to(wide).exp_().tril_()
    gamma, tail, last = (x.exp().to(wide) for x in (G, last - G, last))
    return Operands(qk, v, beta, gamma, tail, last, D, norm)


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


def coupling(W: Tensor, beta: Tensor) -> Tensor:
    """N = -W (I + diag(beta) W)^-1 of the strictly lower part of W r[n,C,C], C a power of two.

    Halves first, then the corner between them, -(I + N22 beta2) W21 (I + beta1 N11).
    """
    n, C, _ = W.shape
    if C <= 16:
        return _coupling_by_substitution(W, beta)
    h = C // 2
    halves = torch.stack((W[:, :h, :h], W[:, h:, h:]), 1).view(2 * n, h, h)
    N1, N2 = coupling(halves, beta.reshape(2 * n, h, 1)).view(n, 2, h, h).unbind(1)
    N, W21 = W.new_zeros(n, C, C), W[:, h:, :h]
    N[:, :h, :h] = N1
    N[:, h:, h:] = N2
    left = torch.baddbmm(W21, N2 * beta[:, h:].mT, W21)
    N[:, h:, :h] = torch.baddbmm(left, left, N1 * beta[:, :h]).neg_()
    return N


def _coupling_by_substitution(W: Tensor, beta: Tensor) -> Tensor:
    """The same on small matrices, row after row, with the batch as the innermost axis."""
    n, C, _ = W.shape
    W = -W.permute(1, 2, 0).contiguous()
    step, N = W * beta.permute(2, 1, 0), W.new_zeros(C, C, n)
    for i in range(1, C):
        torch.sum(step[i, :i, None] * N[:i, :i], 0, out=N[i, :i]).add_(W[i, :i])
    return N.permute(2, 0, 1).contiguous()


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
    return layout.tokens(o, o_rows, T), layout.final_states(state, HV), checkpoints.flatten(0, 1)


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
    checkpoints = checkpoints.view(-1, *dstate.shape)
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
