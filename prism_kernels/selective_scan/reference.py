"""The definition of the selective scan, one token at a time."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.runtime import accumulate_dtype, without_autocast


def phi1(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, by its series near 0, so that the value and the gradient hold at z = 0 too."""
    near = z.detach().abs() < 0.5
    small, large = torch.where(near, z, 0.0), torch.where(near, 1.0, z)
    series = torch.ones_like(z)
    for k in range(17, 1, -1):
        series = 1 + small * series / k
    return torch.where(near, series, (torch.exp(large) - 1) / large)


def scan_reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    discretization: str = "zoh",
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y r[B,T,H,P] and the final state; arguments as in `selective_scan`, A, B, C complex or real.

    `product_dtype` rounds the operands of the products B u and conj(C) h: plain PyTorch in that precision.
    """
    with without_autocast(u.device):
        wide, out_dtype = accumulate_dtype(u.dtype), u.dtype
        deep = wide.to_complex() if A.is_complex() else wide
        (batch, T, H, P), N = u.shape, B.shape[-1]
        bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
        end = bounds[-1]
        u, dt, A = u[:, :end].to(wide), dt[:, :end].to(wide), A.to(deep)[:, None]
        dt = dt if dt_bias is None else dt + dt_bias.to(wide)
        dt = F.softplus(dt) if dt_softplus else dt
        Bs, Cs, us, dts = tokens(B.to(deep), H, end), tokens(C.to(deep), H, end), u.unbind(1), dt.unbind(1)
        rows: list[Tensor] = []
        finals: list[Tensor] = []
        for s, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            h = u.new_zeros(batch, H, P, N, dtype=deep)
            if initial_state is not None:
                h = (initial_state if cu_seqlens is None else initial_state[s : s + 1]).to(deep)
            row = []
            for t in reversed(range(first, last)) if reverse else range(first, last):
                step = dts[t][..., None, None]
                w = step * phi1(step * A) if discretization == "zoh" else step
                Bu = rounded(Bs[t], product_dtype) * rounded(us[t][..., None], product_dtype)
                h = torch.exp(step * A) * h + w * Bu
                y = (torch.conj_physical(rounded(Cs[t], product_dtype)) * rounded(h, product_dtype)).sum(-1)
                row.append(2 * y.real if A.is_complex() else y)
            rows += reversed(row) if reverse else row
            finals.append(h)
        y = torch.stack(rows, 1) if rows else u
        y = y if D is None else y + D.to(wide).reshape(H, -1) * u
        y = y if z is None else y * F.silu(z[:, :end].to(wide))
        return F.pad(y, (0, 0, 0, 0, 0, T - end)).to(out_dtype), torch.cat(finals)


def tokens(x: Tensor, H: int, T: int) -> Sequence[Tensor]:
    """Static [H,N] or [H,P,N], or dependent [B,T,G,N], as T tensors [B|1,H,P|1,N]."""
    if x.ndim == 4:
        return x[:, :T].repeat_interleave(H // x.shape[2], 2).unsqueeze(3).unbind(1)
    return [(x[:, None] if x.ndim == 2 else x)[None]] * T


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`x` rounded to `dtype` (real and imaginary parts) and widened again."""
    if dtype is None:
        return x
    if x.is_complex():
        return torch.view_as_complex(torch.view_as_real(x).to(dtype).to(x.real.dtype))
    return x.to(dtype).to(x.dtype)
