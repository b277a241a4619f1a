"""The recurrence in pure PyTorch, forward and backward, without a tensor [B,T,H,P,N].

Two ways, chosen by shape. With a step size per head and B, C shared by its channels, `dual.py`
turns chunks of time into matrix products. Otherwise `blocks.py` discretises a block of time at once
and lets its states follow one by one. Both keep the states at the start of each chunk or block.
"""

import torch
from torch import Tensor

from . import blocks, dual
from .discrete import Params, ScanGradients

DUAL_CHANNELS = 4  # fewer channels per head do not repay building the matrices
DUAL_TOKENS = 4
SLAB = 2**18  # elements [B,time,H,N] of one run of chunks: larger ones leave the cache


def forward(u: Tensor, dt: Tensor, p: Params, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B,T,H,P], the final state, and the states [n+1,B,H,P,N] at the bounds of n chunks."""
    way, c, m = plan(u.shape, p)
    (batch, T, H, P), N = u.shape, p.A.shape[-1]
    states = h0.new_empty(-(-T // c) + 1, batch, H, P, N)
    states[0] = h0
    y = torch.empty_like(u)
    for k in range(0, len(states) - 1, m):
        time = slice(k * c, (k + m) * c)
        y[:, time] = way.forward(u[:, time], dt[:, time], p.token_slice(time), states[k : k + m + 1])
    return y, states[-1].clone(), states


def backward(g: Tensor, u: Tensor, dt: Tensor, p: Params, states: Tensor, eta: Tensor) -> ScanGradients:
    """Gradients from g = dL/dy and eta = dL/d(final state)."""
    batch, (way, c, m) = u.shape[0], plan(u.shape, p)
    du, ddt, dA = torch.empty_like(u), torch.empty_like(dt), torch.zeros_like(p.A)
    dB, dC = torch.zeros_like(p.B), torch.zeros_like(p.C)
    for k in reversed(range(0, len(states) - 1, m)) if batch else ():
        time = slice(k * c, (k + m) * c)
        part = way.backward(
            g[:, time], u[:, time], dt[:, time], p.token_slice(time), states[k : k + m + 1], eta
        )
        du[:, time], ddt[:, time], eta = part.u, part.dt, part.initial_state
        dA += part.A
        for whole, piece in ((dB, part.B), (dC, part.C)):
            (whole[:, time] if whole.ndim == 4 else whole).add_(piece)
    return ScanGradients(du, ddt, dA, dB, dC, eta)


def plan(shape: torch.Size, p: Params):
    """Return the way, the tokens per chunk, and the chunks per call."""
    batch, T, H, P = shape
    N = p.A.shape[-1]
    c = chunk_length(H, P, N, p.B.ndim == 3, p.C.ndim == 3)
    if is_dual(P, p.B.ndim == 3, p.C.ndim == 3) and T >= DUAL_TOKENS:
        return dual, c, max(1, SLAB // max(1, batch * c * H * N))
    return blocks, c, 1


def is_dual(P: int, B_by_channel: bool, C_by_channel: bool) -> bool:
    """Whether a call of more than a few tokens is computed in the chunked dual form."""
    return P >= DUAL_CHANNELS and not B_by_channel and not C_by_channel


def chunk_length(H: int, P: int, N: int, B_by_channel: bool, C_by_channel: bool) -> int:
    """Tokens between two stored states: fewer for larger ones, since a block holds all its states."""
    if is_dual(P, B_by_channel, C_by_channel):
        return dual.CHUNK
    return 64 if H * P * N <= 2**12 else 32 if H * P * N <= 2**14 else 16


def states_shape(
    batch: int, T: int, H: int, P: int, N: int, B_by_channel: bool, C_by_channel: bool
) -> tuple[int, ...]:
    """Shape of the states that `forward` keeps."""
    c = chunk_length(H, P, N, B_by_channel, C_by_channel)
    return (T + c - 1) // c + 1, batch, H, P, N
