"""What surrounds the recurrence on the torch path: packing, direction, step size, skip and gate.

The recurrence itself then sees whole sequences, forward in time, with step sizes that are final.
Packed sequences become rows [S, Tmax]; a token of padding has a step size of 0, which keeps the state.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.runtime import accumulate_dtype
from . import blocks, torch_impl
from .discrete import Params, Poles, ScanGradients

DECAY = (
    "Parametrise it, for example `A = -exp(log_rate) + 1j * freq`; or have growing states, on the 'torch' "
    "and 'reference' paths, by `allow_growth=True`."
)


@dataclass(frozen=True)
class Layout:
    """How the caller's rows [B, T, ...] become rows of whole sequences, and back."""

    reverse: bool
    T: int
    total: int
    valid: Tensor | None  # bool [S, Tmax], packed input only

    @staticmethod
    def of(T: int, cu_seqlens: Tensor | None, reverse: bool) -> "Layout":
        if cu_seqlens is None:
            return Layout(reverse, T, T, None)
        lengths = cu_seqlens.diff()
        longest = max(1, int(lengths.max()))
        valid = torch.arange(longest, device=cu_seqlens.device) < lengths[:, None]
        return Layout(reverse, T, int(cu_seqlens[-1]), valid)

    def arrange(self, x: Tensor) -> Tensor:
        """Rows of whole sequences, forward in the scan's time, zero where there is no token."""
        if self.valid is not None:
            rows = x.new_zeros(*self.valid.shape, *x.shape[2:])
            rows[self.valid] = x[0, : self.total]
            x = rows
        return x.flip(1) if self.reverse else x

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `arrange`, zero after the last packed token."""
        x = x.flip(1) if self.reverse else x
        if self.valid is None:
            return x
        packed = x.new_zeros(1, self.T, *x.shape[2:])
        packed[0, : self.total] = x[self.valid]
        return packed


@dataclass(frozen=True)
class Scan:
    """The recurrence alone: inputs arranged and widened, pairs turned into complex numbers."""

    layout: Layout
    u: Tensor
    dt: Tensor
    params: Params
    h0: Tensor

    @staticmethod
    def of(
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        reverse: bool,
        euler: bool,
    ) -> "Scan":
        wide = accumulate_dtype(u.dtype)
        layout = Layout.of(u.shape[1], cu_seqlens, reverse)
        dt = layout.arrange(step_size(dt[:, : layout.total], dt_bias, dt_softplus, wide))
        u = layout.arrange(u).to(wide)
        static_rank = 3 + (A.ndim == 3)
        B, C = (layout.arrange(x) if x.ndim > static_rank else x for x in (B, C))
        poles, B, C = (as_numbers(x.to(wide), A) for x in (A, B, C))
        params = Params(Poles(poles), B, C, euler)
        if initial_state is None:
            state_shape = (u.shape[0], *u.shape[2:], params.modes)
            h0 = u.new_zeros(state_shape, dtype=params.A.dtype)
        else:
            h0 = as_numbers(initial_state.to(wide), A)
        return Scan(layout, u, dt, params, h0)


def as_numbers(x: Tensor, A: Tensor) -> Tensor:
    """Pairs as complex numbers where `A` [H,N,2] says that these are pairs; else `x`."""
    return torch.view_as_complex(x.contiguous()) if A.ndim == 3 else x


def as_pairs(x: Tensor) -> Tensor:
    """Complex numbers as real pairs, real numbers as they are."""
    return torch.view_as_real(x) if x.is_complex() else x


def step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, wide: torch.dtype) -> Tensor:
    """The step size after bias and softplus."""
    dt = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    return F.softplus(dt) if dt_softplus else dt


def skip(D: Tensor, wide: torch.dtype) -> Tensor:
    """D r[H] or r[H,P] so that it broadcasts over [B,T,H,P]."""
    return D.to(wide) if D.ndim == 2 else D.to(wide)[:, None]


def padded(x: Tensor, T: int) -> Tensor:
    """`x` [B,t,H,P] with zeros after its last token, up to T tokens."""
    return x if x.shape[1] == T else F.pad(x, (0, 0, 0, 0, 0, T - x.shape[1]))


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    euler: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y, the final state, and four residuals: three of the recurrence, and y before the gate."""
    wide = accumulate_dtype(u.dtype)
    scan = Scan.of(u, dt, A, B, C, dt_bias, initial_state, cu_seqlens, dt_softplus, reverse, euler)
    if scan.u.shape[1] == 1 and not save:
        (y, final_state), kept = blocks.step(scan.u, scan.dt, scan.params, scan.h0), [u.new_empty(0)] * 3
    else:
        y, final_state, kept = torch_impl.forward(scan.u, scan.dt, scan.params, scan.h0)
    if D is not None:
        y = torch.addcmul(y, skip(D, wide), scan.u)
    y = scan.layout.restore(y)
    ungated = y.new_empty(0)
    if z is not None:
        gate = F.silu(z[:, : scan.layout.total].to(wide))
        ungated, y = y, padded(y[:, : scan.layout.total] * gate, y.shape[1])
    # With cu_seqlens the sizes depend on the data.
    kept = [as_pairs(x) if save and cu_seqlens is None else y.new_empty(0) for x in kept]
    ungated = ungated.contiguous() if save else y.new_empty(0)
    return y.to(u.dtype).contiguous(), as_pairs(final_state), [*kept, ungated]


def residuals(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, cu_seqlens: Tensor | None, euler: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `forward` keeps for a backward."""
    wide, rank = accumulate_dtype(u.dtype), A.ndim + 1  # of B and C with a value per channel
    (batch, T, H, P), pair = u.shape, tuple(A.shape[2:])
    N, by_channel = B.shape[1 - A.ndim], rank in (B.ndim, C.ndim)
    kept = torch_impl.residual_shapes(batch, T, H, P, N, by_channel, euler, A.shape[1] < N)
    kept = [(*x, *pair) if cu_seqlens is None and len(x) > 1 else (0,) for x in kept]
    return [(shape, wide) for shape in (*kept, (0,) if z is None else tuple(u.shape))]


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    residuals: list[Tensor],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    euler: bool,
) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and initial_state; empty where there is no input."""
    wide = accumulate_dtype(u.dtype)
    scan = Scan.of(u, dt, A, B, C, dt_bias, initial_state, cu_seqlens, dt_softplus, reverse, euler)
    *kept, ungated = residuals[:4]
    layout, total = scan.layout, scan.layout.total
    g, dz = dy.to(wide), None
    if z is not None:
        gate, g = z[:, :total].to(wide), g[:, :total]
        dz = padded(torch.ops.aten.silu_backward(g * ungated[:, :total], gate), z.shape[1])
        g = g * F.silu(gate)
    g = layout.arrange(g)
    if cu_seqlens is None:
        kept = [as_numbers(x, A) if x.ndim > 1 else x for x in kept]
    else:
        kept = torch_impl.forward(scan.u, scan.dt, scan.params, scan.h0)[2]
    eta = torch.zeros_like(scan.h0) if dfinal is None else as_numbers(dfinal.to(wide), A)
    d: ScanGradients = torch_impl.backward(g, scan.u, scan.dt, scan.params, kept, eta)
    du, dD = d.u, None
    if D is not None:
        du = torch.addcmul(du, g, skip(D, wide))
        dD = (g * scan.u).sum((0, 1), dtype=torch.float64)
        dD = dD if D.ndim == 2 else dD.sum(-1)
    ddt = d.dt * -torch.expm1(-scan.dt) if dt_softplus else d.dt
    ddt = layout.restore(ddt)
    dB, dC = (layout.restore(x) if x.ndim == 4 else x for x in (d.B, d.C))
    return (
        like(u, layout.restore(du), u),
        like(dt, ddt, u),
        like(A, d.A, u),
        like(B, dB, u),
        like(C, dC, u),
        like(D, dD, u),
        like(z, dz, u),
        like(dt_bias, ddt.sum((0, 1)), u),
        like(initial_state, d.initial_state, u),
    )


def like(x: Tensor | None, gradient: Tensor | None, u: Tensor) -> Tensor:
    """The gradient in the dtype of `x`, contiguous; empty where there is no input `x`."""
    if x is None or gradient is None:
        return u.new_empty(0)
    return as_pairs(gradient).to(x.dtype).contiguous()


def check_values(
    op: str,
    u: Tensor,
    dt: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    allow_growth: bool,
) -> None:
    """The checks that read data; `A` is real, complex, or pairs [H,N,2]."""
    T = u.shape[1]
    if cu_seqlens is not None:
        checks.check_cu_seqlens_values(op, cu_seqlens, T)
    if not allow_growth:
        real = A.real if A.is_complex() else (A[..., 0] if A.ndim == 3 else A)
        checks.check_not_positive(op, "Re A", real, DECAY)
    if dt_softplus:
        return
    used = dt if cu_seqlens is None else dt[:, : int(cu_seqlens[-1])]
    if used.numel() == 0:
        return
    least = step_size(used.detach(), dt_bias, False, torch.float64).amin()
    if least < 0:
        advice = "Step sizes are not negative; pass dt_softplus=True if `dt` is the raw value."
        checks.fail(op, "`dt` >= 0 everywhere", f"a smallest value of {least.item():.6g}", advice)
