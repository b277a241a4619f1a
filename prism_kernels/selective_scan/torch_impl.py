"""The recurrence in pure PyTorch, forward and backward, without a tensor [B,T,H,P,N].

Three ways, chosen by shape. With a step size per head and B, C shared by its channels, `dual.py`
turns chunks of time into matrix products, and `scalar.py` does where one real pole serves all modes
of a head. Otherwise `blocks.py` discretises a block of time at once and lets its states follow one by
one. All keep the states at the start of each chunk or block.
"""

from types import ModuleType

import torch
from torch import Tensor

from .._core.scratch import Scratch
from . import blocks, dual, scalar
from .discrete import Params, ScanGradients, concatenated, joined

DUAL_CHANNELS = 4  # fewer channels per head do not repay building the matrices
NOTHING = (0,)
SLAB = 2**18  # numbers of a factor of `dual` in a call
BLOCK = 2**18  # states of a block: more leave the cache, fewer cost calls


def forward(u: Tensor, dt: Tensor, p: Params, h0: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y [B,T,H,P], the final state, and what the backward wants.

    That is the states [n+1,H,B,P,N] at the bounds of n chunks of c tokens, and from `dual` its decays
    and weights [n,H,B,c,N].
    """
    way, c, m = plan(u.shape, p.modes, p.by_channel, p.one_pole)
    (batch, T, H, P), N = u.shape, p.modes
    states = h0.new_empty(-(-T // c) + 1, H, batch, P, N)
    states[0] = h0.transpose(0, 1)
    runs, scratch = [], Scratch()
    for k in range(0, len(states) - 1, m):
        time = slice(k * c, (k + m) * c)
        bounds = states[k : k + m + 1]
        runs.append(way.forward(u[:, time], dt[:, time], p.token_slice(time), bounds, scratch))
    final = states[-1].transpose(0, 1).clone(memory_format=torch.contiguous_format)
    y, decay, weight = zip(*runs, strict=True)
    return concatenated(y, 1), final, [states, concatenated(decay, 0), concatenated(weight, 0)]


def backward(g: Tensor, u: Tensor, dt: Tensor, p: Params, kept: list[Tensor], eta: Tensor) -> ScanGradients:
    """Gradients from g = dL/dy and eta = dL/d(final state)."""
    way, c, m = plan(u.shape, p.modes, p.by_channel, p.one_pole)
    if not u.numel():
        return ScanGradients(*(torch.zeros_like(x) for x in (u, dt, p.A, p.B, p.C, eta)))
    (states, *factors), runs, scratch = kept, [], Scratch()
    eta = eta.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    for k in reversed(range(0, len(states) - 1, m)):
        time = slice(k * c, (k + m) * c)
        run = [states[k : k + m + 1], *(x[k : k + m] for x in factors)]
        p_k = p.token_slice(time)
        runs.append(way.backward(g[:, time], u[:, time], dt[:, time], p_k, run, eta, scratch))
        eta = runs[-1].initial_state
    return joined(runs[::-1], p)._replace(initial_state=eta.transpose(0, 1))


def takes_one_pole(u: Tensor, A: Tensor, B: Tensor, C: Tensor, euler: bool) -> bool:
    """Whether A may stay [H,1] beside more modes of B and C: the case of `scalar.py`."""
    dependent = not A.is_complex() and A.ndim == 2 and B.ndim == C.ndim == 4
    return euler and dependent and u.shape[3] >= DUAL_CHANNELS


def plan(
    shape: torch.Size | tuple[int, ...], N: int, by_channel: bool, one_pole: bool
) -> tuple[ModuleType, int, int]:
    """Return the way, the tokens per chunk, and the chunks per call.

    Chunks of `blocks` are shorter for larger states, since a block holds all of its own. T decides nothing:
    a compiled graph serves any.
    """
    batch, _, H, P = shape
    if one_pole or P >= DUAL_CHANNELS and not by_channel:
        return scalar if one_pole else dual, dual.CHUNK, max(1, SLAB // max(1, batch * dual.CHUNK * H * N))
    return blocks, min(64, max(16, BLOCK // max(1, batch * H * P * N))), 1


def residual_shapes(
    batch: int, T: int, H: int, P: int, N: int, by_channel: bool, euler: bool, one_pole: bool
) -> list[tuple[int, ...]]:
    """Shapes of what `forward` keeps."""
    way, c, _ = plan((batch, T, H, P), N, by_channel, one_pole)
    n = -(-T // c)
    factor = (n, H, batch, c, N) if way is dual else NOTHING
    return [(n + 1, H, batch, P, N), factor, NOTHING if euler else factor]
