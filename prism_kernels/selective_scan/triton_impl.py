"""Launchers of the kernels, as `torch_impl` is called: static B and C, complex A, zero-order hold."""

import torch
from torch import Tensor

from .._core.runtime import launch
from . import kernels
from .discrete import Params, ScanGradients
from .frame import as_pairs

SEGMENT = 64  # tokens between two stored states
TILE = 128  # states of one warp: four per lane
MOST_WARPS = 8


def forward(u: Tensor, dt: Tensor, p: Params, h0: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y [B,T,H,P], the final state, and the states [B,segments,H,P,N] before each segment."""
    batch, T, H, P = u.shape
    N = p.A.shape[1]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    last = torch.empty_like(h0, memory_format=torch.contiguous_format)
    states = h0.new_empty(states_shape(batch, T, H, P, N))
    A, B, C, start = (as_pairs(x).contiguous() for x in (p.A, p.B, p.C, h0))
    grid, sizes, num_warps = tiling(batch, H, P, N, u.dtype)
    launch(
        kernels.scan_forward,
        grid,
        *(u, dt, A, B, C, start, y, as_pairs(last), as_pairs(states)),
        *(T, *u.stride(), *dt.stride(), channel_stride(B), channel_stride(C)),
        num_warps=num_warps,
        **sizes,
    )
    return y, last, [states, u.new_empty(0), u.new_empty(0)]


def backward(
    g: Tensor, u: Tensor, dt: Tensor, p: Params, residuals: list[Tensor], eta: Tensor
) -> ScanGradients:
    """Gradients from g = dL/dy and eta = dL/d(final state)."""
    batch, T, H, P = u.shape
    N = p.A.shape[1]
    grid, sizes, num_warps = tiling(batch, H, P, N, u.dtype)
    du, ddt = u.new_empty(batch, T, H, P), u.new_empty(batch, T, H, P)
    dA, dB, dC, dh0 = (torch.empty(batch, H, P, N, dtype=p.A.dtype, device=u.device) for _ in range(4))
    scratch = u.new_empty(grid[0], SEGMENT, sizes["BLOCK_C"] * sizes["BLOCK_N"], 2)
    A, B, C, kept, end = (as_pairs(x).contiguous() for x in (p.A, p.B, p.C, residuals[0], eta))
    launch(
        kernels.scan_backward,
        grid,
        *(g.contiguous(), u, dt, A, B, C, kept, end),
        *(du, ddt, as_pairs(dA), as_pairs(dB), as_pairs(dC), as_pairs(dh0), scratch),
        *(T, *u.stride(), *dt.stride(), channel_stride(B), channel_stride(C)),
        num_warps=num_warps,
        **sizes,
        SLOPE_TERMS=12 if u.dtype == torch.float64 else 6,
    )
    dB, dC = (d.sum(0) if x.ndim == 3 else d.sum((0, 2)) for d, x in ((dB, p.B), (dC, p.C)))
    return ScanGradients(du, ddt.sum(-1), dA.sum((0, 2)), dB, dC, dh0)


def residual_shapes(
    batch: int, T: int, H: int, P: int, N: int, by_channel: bool, euler: bool, one_pole: bool
) -> list[tuple[int, ...]]:
    """Shapes of what `forward` keeps."""
    return [states_shape(batch, T, H, P, N), (0,), (0,)]


def states_shape(batch: int, T: int, H: int, P: int, N: int) -> tuple[int, ...]:
    """Shape of the stored states."""
    return batch, (T + SEGMENT - 1) // SEGMENT, H, P, N


def tiling(batch: int, H: int, P: int, N: int, dtype: torch.dtype) -> tuple[tuple[int], dict[str, int], int]:
    """Return the grid, the constants of both kernels, and the warps: four states per lane where N allows."""
    block_n = 1 << (N - 1).bit_length()
    block_c = max(1, TILE // block_n)
    sizes = {
        "CHANNELS": H * P,
        "P": P,
        "N": N,
        "BLOCK_C": block_c,
        "BLOCK_N": block_n,
        "SEGMENT": SEGMENT,
        "EXPM1_TERMS": 14 if dtype == torch.float64 else 8,
    }
    warps = min(MOST_WARPS, max(1, block_c * block_n // TILE))
    return (batch * -(-H * P // block_c),), sizes, warps


def channel_stride(pairs: Tensor) -> int:
    """Step from channel to channel of B or C: [H,N,2] has none, [H,P,N,2] has one."""
    return pairs.stride(1) if pairs.ndim == 4 else 0
