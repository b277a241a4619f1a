"""Discretisation and its gradients, shared by the pure-PyTorch ways of running the recurrence.

Tensors are complex or real, in the dtype of the state. The derivations are in README.md.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.scratch import Scratch

VANISHING = 1e-20  # |A| under which the weight is dt itself
SERIES_BELOW = 0.25  # |dt A| under which psi comes from its series
SERIES_TERMS = {torch.float32: 6, torch.float64: 12}


class ScanGradients(NamedTuple):
    """Gradients of `(u, dt, A, B, C, initial_state)`."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor


@dataclass(frozen=True)
class Params:
    """A [H,N], or [H,1] for one pole; B and C static [H,N] or [H,P,N], or dependent [B,T,G,N]; the method."""

    A: Tensor
    B: Tensor
    C: Tensor
    euler: bool

    @property
    def kappa(self) -> int:
        """2 where conjugate states are implied."""
        return 2 if self.A.is_complex() else 1

    @property
    def modes(self) -> int:
        """N."""
        return self.B.shape[-1]

    @property
    def one_pole(self) -> bool:
        """Whether all modes of a head share its pole."""
        return self.A.shape[-1] < self.modes

    @property
    def by_channel(self) -> bool:
        """Whether B or C has a value per channel."""
        return self.B.ndim == 3 or self.C.ndim == 3

    def token_slice(self, time: slice) -> "Params":
        """The same with dependent B and C cut to some tokens."""
        B, C = (x[:, time] if x.ndim == 4 else x for x in (self.B, self.C))
        return Params(self.A, B, C, self.euler)


def joined(runs: list[ScanGradients], p: Params) -> ScanGradients:
    """The gradients of consecutive runs of time as one, with the initial state's of the first."""
    du, ddt, dA, dB, dC, dinitial = zip(*runs, strict=True)
    return ScanGradients(
        concatenated(du, 1),
        concatenated(ddt, 1),
        added(dA),
        concatenated(dB, 1) if p.B.ndim == 4 else added(dB),
        concatenated(dC, 1) if p.C.ndim == 4 else added(dC),
        dinitial[0],
    )


def concatenated(xs: tuple[Tensor, ...], dim: int) -> Tensor:
    """`torch.cat` that copies nothing when there is one."""
    return xs[0] if len(xs) == 1 else torch.cat(xs, dim)


def added(xs: tuple[Tensor, ...]) -> Tensor:
    """The sum of tensors of one shape."""
    return xs[0] if len(xs) == 1 else torch.stack(xs).sum(0)


def flat(x: Tensor) -> Tensor:
    """[..., N] complex as [..., 2N] real (flat(x) . flat(y) = Re sum conj(x) y); real ones as they are."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def unflat(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `flat`."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2))) if like.is_complex() else x


def conj(x: Tensor) -> Tensor:
    """The conjugate in memory (a lazy one makes PyTorch's CPU products ten times slower)."""
    return torch.conj_physical(x) if x.is_complex() else x


def discretise(dt: Tensor, A: Tensor, euler: bool, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Return exp(dt A) and the weight w, both conjugated, where dt [..., 1] and A [..., N] broadcast.

    They lie in `scratch`; under Euler w is dt itself.

    w = (exp(dt A) - 1) / A with a numerator that is exact to rounding in norm: its real part is
    expm1(x) cos(y) - 2 sin(y/2)^2. Where A vanishes, w = dt.
    """
    shape = tuple(torch.broadcast_shapes(dt.shape, A.shape))
    x, gain, y, cos, turn = (scratch(name, shape, dt) for name in ("x", "gain", "y", "cos", "turn"))
    torch.exp(torch.mul(dt, real(A), out=x), out=gain)
    if not euler:
        x.expm1_()
    if not A.is_complex():
        a, rise = gain, x
    else:
        torch.mul(dt, -A.imag, out=y)  # the other way round: what is wanted is conjugated
        torch.sin(y, out=turn).mul_(gain)
        a = torch.complex(gain.mul_(torch.cos(y, out=cos)), turn, out=scratch("a", shape, A))
        if not euler:
            half = y.mul_(0.5).sin_().square_()
            rise = torch.complex(x.mul_(cos).sub_(half, alpha=2), turn, out=scratch("w", shape, A))
    if euler:
        return a, dt
    w, vanishing = rise.mul_(conj(inverse(A))), A.abs() < VANISHING
    return a, w.add_(dt * vanishing) if vanishing.any() else w


def real(x: Tensor) -> Tensor:
    """The real part; a real one as it is."""
    return x.real if x.is_complex() else x


def over_time(rate: Tensor, x: Tensor) -> Tensor:
    """sum rate x over time and what leads, for rate [...,H,t] and x [...,H,t,N]: [H,N]."""
    sums = (rate[..., None, :] @ flat(x)).squeeze(-2)
    return unflat(sums.sum(tuple(range(sums.ndim - 2))), x)


def inverse(A: Tensor) -> Tensor:
    """1 / A, and 0 where A vanishes. Computed in float64, since its error meets every token alike."""
    vanishing = A.abs() < VANISHING
    deep = A.to(torch.complex128 if A.is_complex() else torch.float64)
    return deep.masked_fill(vanishing, 1).reciprocal().masked_fill(vanishing, 0).to(A.dtype)


def rate_gradients(
    dtheta: Tensor, dw: Tensor, a_conj: Tensor, w_conj: Tensor, dt: Tensor, p: Params
) -> tuple[Tensor, Tensor]:
    """Gradients of dt [...,H,c] and A [H,N] from those of theta = dt A (through exp alone) and of w.

    ddt = Re sum_n dtheta conj(A) + dw conj(a) and dA = sum_t dt dtheta + dw conj(chi), chi = dw/dA.
    """
    slope = dw if p.euler else dw * a_conj
    ddt = (flat(dtheta) @ flat(p.A)[:, :, None]).squeeze(-1) + real(slope).sum(-1)
    dA = over_time(dt, dtheta)
    if p.euler:
        return ddt, dA
    return ddt, dA + weight_gradient(slope, dw * w_conj, dt, p.A)


def weight_gradient(slope: Tensor, weighted: Tensor, dt: Tensor, A: Tensor) -> Tensor:
    """sum_t dw conj(dw/dA), r or c[H,N], from slope = dw conj(a) and weighted = dw conj(w), [...,H,c,N].

    dw/dA = chi = (dt a - w) / A. Near dt A = 0, where that cancels, chi / a is a power series in dt,
    so its sum over time is a product with powers of dt. Which of the two holds for a mode, its largest
    step tells: the cancellation in its smaller steps is small beside that one.
    """
    far = dt.amax((*range(dt.ndim - 2), -1))[:, None] * A.abs() >= SERIES_BELOW
    away = unflat(dt[..., None] * flat(slope), slope).sub_(weighted)
    return torch.where(far, over_time(torch.ones_like(dt), away) * conj(inverse(A)), near_zero(slope, dt, A))


def near_zero(slope: Tensor, dt: Tensor, A: Tensor) -> Tensor:
    """sum_t slope conj(chi / a), chi / a = dt^2 sum_k (-dt A)^k / (k + 2)!, small sums in float64."""
    largest = dt.amax().clamp_min(torch.finfo(dt.dtype).tiny)
    step = dt / largest
    powers = [step.square()]
    for _ in range(SERIES_TERMS[dt.dtype] - 1):
        powers.append(powers[-1] * step)
    moments = unflat((torch.stack(powers, -2) @ flat(slope)).sum(tuple(range(dt.ndim - 2))), slope)
    # (-dt A)^k / (k + 2)! is a product of k factors, the first of them 1/2.
    over = 1 / torch.arange(2, 2 + len(powers), dtype=torch.float64, device=dt.device)[:, None]
    factors = -conj(A.to(torch.complex128 if A.is_complex() else torch.float64))[:, None] * (largest * over)
    factors[:, 0] = 0.5
    return ((factors.cumprod(1) * moments).sum(1) * largest.double() ** 2).to(slope.dtype)
