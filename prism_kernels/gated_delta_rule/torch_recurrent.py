"""Fast pure PyTorch, token by token, with a hand-written backward that replays segments of tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._core.runtime import accumulate_dtype
from .layout import Layout
from .unit_rows import normalise, unnormalise

CHECKPOINT = 32  # tokens between saved states


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
    checkpoints = checkpoints.view(-(-T // CHECKPOINT), *dstate.shape)
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
