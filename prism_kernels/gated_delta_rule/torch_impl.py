"""Fast pure PyTorch: chunked, batched over chunks, with a hand-written backward.

Everything but the recurrence of the state runs on all chunks of a segment at once; a segment is as many
chunk steps as keep its temporaries in cache. Symbols and derivations: README.md.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.runtime import accumulate_dtype
from .._core.scratch import Scratch
from .layout import Layout
from .torch_recurrent import CHECKPOINT, recurrent_backward, recurrent_forward
from .unit_rows import inverse_lengths

__all__ = ["CHECKPOINT", "Saved", "backward", "forward", "inner_chunk", "recurrent_backward"]
__all__ += ["recurrent_forward"]

# Elements of one operand of a segment, by measurement: fewer cost calls, more leave the cache.
ELEMENTS = 1 << 17


class Factors(NamedTuple):
    """What is one number per token, of all chunks at once or of one segment: r[n,C,1], `last` r[n,1,1]."""

    beta: Tensor
    G: Tensor  # running sum of g within the chunk, in float64
    gamma: Tensor  # decay from the start of the chunk
    tail: Tensor  # decay to its end
    last: Tensor  # decay of the whole chunk
    q_norm: Tensor | None  # 1 / length of the rows of q
    k_norm: Tensor | None


class Saved(NamedTuple):
    """What backward needs beside the inputs; rows are matrices in the order of `Layout`."""

    N: Tensor  # r[M,C,C], coupling of the tokens of a chunk
    E: Tensor  # r[M,C,V], error that each token corrects
    states: Tensor  # r[M,K,V], state at the start of each chunk


class Substitution(NamedTuple):
    """Room for `coupling` of small blocks, and its steps as views of it, made once for many segments."""

    inner: Tensor  # r[h,h,...]: row, column, and the batch as the innermost axes
    step: Tensor
    columns: list[tuple[Tensor, Tensor, Tensor]]  # what column j adds to, by what it is multiplied, itself

    @staticmethod
    def of(n: int, C: int, like: Tensor) -> "Substitution":
        """For n matrices r[C,C]: blocks of 16 on their diagonals."""
        h = min(C, 16)
        inner, step = (like.new_empty(h, h, C // h, n) for _ in range(2))
        columns = [(inner[j + 1 :, :j], step[j + 1 :, j, None], inner[j, :j]) for j in range(1, h - 1)]
        return Substitution(inner, step, columns)


class Parts(NamedTuple):
    """What gradients of log decays and strengths are made of, for all chunks; symbols: README.md."""

    r: Tensor  # r[M,C,1], float64
    w: Tensor  # r[M,C,1], float64
    Z: Tensor  # r[M,C,1], sum of Z_ab over b < i <= a
    states: Tensor  # r[M,1,1], <S, dS>
    dbeta: Tensor  # r[M,C,1]

    def dg(self, last: Tensor) -> Tensor:
        """Add up: what tokens from i on read of those before, without differences of sums."""
        after, before = self.r.flip(1).cumsum(1).flip(1), self.w.cumsum(1) - self.w
        return (after + before).add_(self.Z).add_(last * self.states)


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
    checkpoints: Tensor | None = None,
    every: int = 0,
) -> tuple[Tensor, Tensor, Saved]:
    """Return o, the final state and, if `save`, what backward needs; fill the checkpoints."""
    B, T, HV, V = v.shape
    K = k.shape[3]
    C = inner_chunk(chunk_size, K, V)
    layout = Layout.of(B, T, C, cu_seqlens)
    saved = empty_saved(layout, HV, K, V, g) if save else None
    (q_rows, k_rows, v_rows), tokens = map(layout.rows, (q, k, v)), factors(layout, q, k, g, beta, l2norm)
    state = layout.first_states(initial_state, (HV, K, V), g)
    o, o_rows = layout.new_rows(v)
    marked = layout.checkpoints(T, every, cu_seqlens)
    scratch, small = Scratch(), lru_cache(1)(partial(Substitution.of, C=C, like=state))
    for c0, c1 in segments(layout, ELEMENTS // (HV * C * max(K, V))):
        n, sizes = layout.matrices(c0, c1, HV), layout.sizes(c0, c1, HV)
        x, D = segment(tokens, n, scratch)
        qk = load(layout, c0, c1, q_rows, k_rows, HV, x, scratch)
        M = len(qk)
        R = layout.take_into(scratch("R", (M, C, V), g), v_rows, c0, c1, HV)
        E, N = (saved.E[n], saved.N[n]) if saved else (scratch("E", R.shape, g), scratch("N", D.shape, g))
        P, N = coupled_products(qk, D, x.beta, N, small(M), scratch)
        writer = torch.mul(qk[:, C:], x.tail * x.beta, out=scratch("writer", (M, C, K), g)).mT
        reads = scratch("reads", (M, 2 * C, V), g)
        operands = (qk, reads, reads[:, C:], R, x.gamma, N, E, writer, x.last)
        steps = zip(*(t.split(sizes) for t in operands), strict=True)
        starts = saved.states[n].split(sizes) if saved else [state[:size] for size in sizes]
        for c, start, left, (rows_qk, both, read, error, gamma, couple, corrected, write, last) in zip(
            range(c0, c1), starts, handed_on(starts, state), steps, strict=True
        ):
            torch.bmm(rows_qk, start, out=both)
            error.addcmul_(gamma, read, value=-1)
            torch.baddbmm(error, couple, error, out=corrected)
            torch.mul(start, last, out=left).baddbmm_(write, corrected)
            if checkpoints is not None and (at := marked.get(c)) is not None:
                kept = left[: len(at) * HV].unflatten(0, (-1, HV))
                checkpoints.flatten(0, 1)[at] = kept.to(checkpoints.dtype)
        out = torch.mul(reads[:, :C], x.gamma, out=R).baddbmm_(P, E, beta=scale, alpha=scale)
        layout.store(o_rows, c0, c1, out, HV)
    empty = (g.new_empty(0) for _ in range(3))
    return layout.tokens(o, o_rows, T), layout.final_states(state, HV), saved or Saved(*empty)


def coupled_products(
    qk: Tensor, D: Tensor, beta: Tensor, N: Tensor, small: Substitution, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Both matrices that act on errors: P diag(beta) / scale and N diag(beta); fill `N`; uses up `D`."""
    C = D.shape[1]
    P, W = products_of_rows(qk, scratch).split(C, 1)
    coupling(torch.mul(W, D, out=N), beta, small)
    P.mul_(D.mul_(beta.mT))
    return P, torch.mul(N, beta.mT, out=D)


def products_of_rows(qk: Tensor, scratch: Scratch) -> Tensor:
    """Q K^T over K K^T."""
    M, C = len(qk), qk.shape[1] // 2
    return torch.bmm(qk, qk[:, C:].mT, out=scratch("products", (M, 2 * C, C), qk))


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
    dcheckpoints: Tensor | None = None,
    every: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, g, beta and the initial state."""
    B, T, HV, V = v.shape
    K = k.shape[3]
    C = inner_chunk(chunk_size, K, V)
    layout = Layout.of(B, T, C, cu_seqlens)
    (q_rows, k_rows, do_rows), tokens = map(layout.rows, (q, k, do)), factors(layout, q, k, g, beta, l2norm)
    grads = [layout.new_rows(x) for x in (q, k, v, g[..., None], beta[..., None])]
    dq_rows, dk_rows, dv_rows, dg_rows, dbeta_rows = (out for _, out in grads)
    parts = Parts(*(torch.empty_like(x) for x in (tokens.G, tokens.G, tokens.beta, tokens.last, tokens.beta)))
    dstate = layout.first_states(dfinal, (HV, K, V), g)
    marked, scratch = layout.checkpoints(T, every, cu_seqlens), Scratch()
    for c0, c1 in reversed(list(segments(layout, ELEMENTS // (HV * C * max(K, V))))):
        n, sizes = layout.matrices(c0, c1, HV), layout.sizes(c0, c1, HV)
        x, D = segment(tokens, n, scratch)
        qk = load(layout, c0, c1, q_rows, k_rows, HV, x, scratch)
        N, E, S = saved.N[n], saved.E[n], saved.states[n]
        dOR = scratch("dOR", (len(E), 2 * C, V), qk)  # gradients of O over those of R
        layout.take_into(dOR[:, :C], do_rows, c0, c1, HV, scale)
        products = products_of_rows(qk, scratch)
        decayed = torch.mul(products[:, :C], D, out=scratch("decayed", D.shape, qk))
        dU = torch.bmm(decayed.mT, dOR[:, :C], out=scratch("dU", E.shape, qk))
        dS, decay = scratch("dS", S.shape, qk), torch.cat((x.gamma, -x.beta * x.gamma), 1)
        N = torch.mul(N, x.beta, out=decayed).mT
        reader = torch.mul(qk, decay, out=scratch("rows of qk", qk.shape, qk)).mT
        tailed = torch.mul(qk[:, C:], x.tail, out=scratch("rows of k", (len(E), C, K), qk))
        operands = (dU, tailed, N, dOR[:, C:], dOR, reader, x.last)
        steps, ends = list(zip(*(t.split(sizes) for t in operands), strict=True)), dS.split(sizes)[::-1]
        for c, end, left, (write, tail, couple, error, both, read, last) in zip(
            reversed(range(c0, c1)), ends, handed_on(ends, dstate), reversed(steps), strict=True
        ):
            if dcheckpoints is not None and (at := marked.get(c)) is not None:
                end[: len(at) * HV] += dcheckpoints.flatten(0, 1)[at].flatten(0, 1)
            write.baddbmm_(tail, end)
            error.copy_(torch.baddbmm(write, couple, write, out=scratch("step", write.shape, write)))
            torch.mul(end, last, out=left).baddbmm_(read, both)
        dqk = gradients(x, D, qk, products, decay, E, S, dOR, dS, Parts(*(t[n] for t in parts)), scratch)
        layout.store(dq_rows, c0, c1, dqk[:, :C], HV, x.q_norm)
        layout.store(dk_rows, c0, c1, dqk[:, C:], HV, x.k_norm)
        layout.store(dv_rows, c0, c1, dOR[:, C:], HV, x.beta)
    layout.store(dg_rows, 0, len(layout.offsets) - 1, parts.dg(tokens.last), HV)
    layout.store(dbeta_rows, 0, len(layout.offsets) - 1, parts.dbeta, HV)
    dq, dk, dv, dg, dbeta = (layout.tokens(base, out, T) for base, out in grads)
    return dq, dk, dv, dg[..., 0], dbeta[..., 0], layout.final_states(dstate, HV)


def handed_on(rows: Sequence[Tensor], running: Tensor) -> Iterator[Tensor]:
    """Where each step leaves its state: in the rows of the next one, or, where the number of sequences
    changes, in `running`, from which the next rows are filled.
    """
    rows[0].copy_(running[: len(rows[0])])
    for here, there in pairwise(rows):
        same = len(here) == len(there)
        yield there if same else running[: len(here)]
        if not same:
            there.copy_(running[: len(there)])
    yield running[: len(rows[-1])]


def gradients(
    x: Factors,
    D: Tensor,
    qk: Tensor,
    products: Tensor,
    decay: Tensor,
    E: Tensor,
    S: Tensor,
    dOR: Tensor,
    dS: Tensor,
    parts: Parts,
    scratch: Scratch,
) -> Tensor:
    """Gradients of qk, of length one where asked for, of a segment from both recurrences; fill `parts`.

    Uses up `products` and `D`, and the recurrence's "rows of qk" and "rows of k".
    """
    C = E.shape[1]
    k = qk[:, C:]

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.mul(a, b, out=scratch("product", a.shape, qk))

    # gradients of Q K^T over those of K K^T
    inner = torch.bmm(dOR, E.mT, out=scratch("inner", products.shape, qk))
    parts.dbeta.copy_(inner[:, C:].diagonal(dim1=1, dim2=2)[..., None])
    inner[:, :C].mul_(D.mul_(x.beta.mT))
    inner[:, C:].mul_(D.mul_(-x.beta).tril_(-1))
    products.mul_(inner)

    dqk = torch.bmm(dOR, S.mT, out=scratch("rows of qk", qk.shape, qk)).mul_(decay)
    to_state = torch.bmm(E, dS.mT, out=scratch("rows of k", k.shape, qk)).mul_(x.tail * x.beta)
    by_row, kept = (product(a, b).sum(-1, keepdim=True) for a, b in ((qk, dqk), (k, to_state)))
    torch.add(by_row[:, :C], by_row[:, C:], out=parts.r)
    parts.w.copy_(kept)
    torch.sum(product(S, dS), (-1, -2), keepdim=True, out=parts.states)
    if x.q_norm is not None:  # gradients of rows along these rows, of which each product knows its part
        along = by_row.add_(products.sum(2, keepdim=True))
        along[:, C:] += kept + products.sum(1).unsqueeze(2)
    within = products[:, :C].add_(products[:, C:]).tril_(-1)
    up_to = torch.ones_like(within[:1]).triu_().expand_as(within)
    after = torch.bmm(up_to, within, out=scratch("decayed", within.shape, qk)).tril_(-1)
    torch.sum(after, -1, keepdim=True, out=parts.Z)

    dqk.baddbmm_(inner, k)
    dqk[:, C:].add_(to_state.baddbmm_(inner.mT, qk))
    return dqk if x.q_norm is None else dqk.addcmul_(qk, along, value=-1)


def inner_chunk(chunk_size: int, K: int, V: int) -> int:
    """Chunk used here: shorter ones cost fewer operations, and more stored states."""
    return min(chunk_size, 32 if max(K, V) <= 64 else 64)


def segments(layout: Layout, rows: int) -> Iterator[tuple[int, int]]:
    """Cut the chunk steps into runs c0:c1 of up to `rows` rows, one step at least."""
    offsets, c0 = layout.offsets, 0
    for c1 in range(1, len(offsets)):
        if c1 == len(offsets) - 1 or (offsets[c1 + 1] - offsets[c0]) * layout.width > rows:
            yield c0, c1
            c0 = c1


def factors(layout: Layout, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, l2norm: bool) -> Factors:
    """Everything that is one number per token and head, of all chunks, in the order of `Layout`."""
    HV, steps, wide = g.shape[2], len(layout.offsets) - 1, accumulate_dtype(q.dtype)

    def of(x: Tensor, dtype: torch.dtype) -> Tensor:
        return layout.take(layout.rows(x), 0, steps, HV, dtype)

    # Differences of G must be exact to the last bit of what they decay, however far G has fallen.
    G = of(g[..., None], torch.float64).cumsum(1)
    last = G[:, -1:]
    gamma, tail, last = (x.exp().to(wide) for x in (G, last - G, last))
    q_norm, k_norm = (of(inverse_lengths(x, wide), wide) if l2norm else None for x in (q, k))
    return Factors(of(beta[..., None], wide), G, gamma, tail, last, q_norm, k_norm)


def segment(x: Factors, n: slice, scratch: Scratch) -> tuple[Factors, Tensor]:
    """The matrices `n`, and decays from token j to token i >= j, r[n,C,C]."""
    norms = (None if t is None else t[n] for t in (x.q_norm, x.k_norm))
    x = Factors(x.beta[n], x.G[n], x.gamma[n], x.tail[n], x.last[n], *norms)
    shape = (len(x.G), x.G.shape[1], x.G.shape[1])
    ago = torch.sub(x.G, x.G.mT, out=scratch("differences of G", shape, x.G))
    # Above the diagonal the difference is >= 0 and its exponential may be infinite: both are cleared.
    return x, scratch("D", shape, x.beta).copy_(ago).exp_().tril_()


def load(
    layout: Layout, c0: int, c1: int, q: Tensor, k: Tensor, heads: int, x: Factors, scratch: Scratch
) -> Tensor:
    """Queries over keys of one segment, r[n,2C,K], widened, and normalised on request."""
    n, C, _ = x.beta.shape
    qk = scratch("qk", (n, 2 * C, q.shape[-1]), x.beta)
    layout.take_into(qk[:, :C], q, c0, c1, heads, x.q_norm)
    layout.take_into(qk[:, C:], k, c0, c1, heads, x.k_norm)
    return qk


def coupling(N: Tensor, beta: Tensor, small: Substitution) -> None:
    """Turn W r[n,C,C], C a power of two, into -W (I + diag(beta) W)^-1 in place; clear its diagonal.

    Blocks of 16 by substitution, then the corner between two halves: -(I + N2 beta2) W21 (I + beta1 N1).
    """
    n, C, _ = N.shape
    h = len(small.inner)
    blocks = N.unflatten(2, (-1, h)).unflatten(1, (-1, h)).diagonal(dim1=1, dim2=3).permute(1, 2, 3, 0)
    torch.neg(blocks, out=small.inner)
    small.inner.diagonal().zero_()
    torch.mul(small.inner, beta.view(n, C // h, h).permute(2, 1, 0), out=small.step)
    for rest, step, column in small.columns:
        rest.addcmul_(step, column)
    blocks.copy_(small.inner)
    while h < C:
        for a in range(0, C, 2 * h):
            first, second = slice(a, a + h), slice(a + h, a + 2 * h)
            corner = N[:, second, first]
            left = torch.baddbmm(corner, N[:, second, second] * beta[:, second].mT, corner)
            corner.copy_(torch.baddbmm(left, left, N[:, first, first] * beta[:, first]).neg_())
        h *= 2
