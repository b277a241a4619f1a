"""Discretisation and its gradients, shared by the pure-PyTorch ways of running the recurrence.

Tensors are complex or real, in the dtype of the state. The derivations are in README.md.
"""

from dataclasses import dataclass
from functools import cached_property
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
class Poles:
    """A [...,N], and what every block of time wants of it, computed once."""

    A: Tensor

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor | None]:
        """The real part and, of complex ones, the imaginary one of the conjugate."""
        return (self.A.real.contiguous(), -self.A.imag) if self.A.is_complex() else (self.A, None)

    @cached_property
    def vanishing(self) -> Tensor | None:
        """Where A vanishes, or None."""
        where = self.A.abs() < VANISHING
        return where if where.any() else None

    @cached_property
    def inverse_conj(self) -> Tensor:
        """1 / conj(A), and 0 where A vanishes. From float64, since its error meets every token alike."""
        inverse = conj(deep(self.A)).reciprocal()
        if self.vanishing is not None:
            inverse = inverse.masked_fill(self.vanishing, 0)
        return inverse.to(self.A.dtype)


@dataclass(frozen=True)
class Params:
    """Poles [H,N], or [H,1] for one; B and C static [H,N] or [H,P,N], or dependent [B,T,G,N]; the method."""

    poles: Poles
    B: Tensor
    C: Tensor
    euler: bool

    @property
    def A(self) -> Tensor:
        """The poles as a tensor."""
        return self.poles.A

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
        return Params(self.poles, B, C, self.euler)


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


def discretise(dt: Tensor, poles: Poles, euler: bool, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Return exp(dt A) and the weight w, both conjugated, where dt [..., 1] and A [..., N] broadcast.

    They lie in `scratch`; under Euler w is dt itself.

    w = (exp(dt A) - 1) / A with a numerator that is exact to rounding in norm: its real part is
    expm1(x) cos(y) - 2 sin(y/2)^2. Where A vanishes, w = dt.
    """
    shape, (rate, turning) = tuple(torch.broadcast_shapes(dt.shape, poles.A.shape)), poles.parts
    x, gain = scratch("x", shape, dt), scratch("gain", shape, dt)
    torch.exp(torch.mul(dt, rate, out=x), out=gain)
    if not euler:
        x.expm1_()
    if turning is None:
        a, rise = gain, x
    else:
        turn = scratch("turn", shape, dt)
        y, cos = (x, x) if euler else (scratch("y", shape, dt), scratch("cos", shape, dt))
        torch.sin(torch.mul(dt, turning, out=y), out=turn).mul_(gain)
        a = torch.complex(gain.mul_(torch.cos(y, out=cos)), turn, out=scratch("a", shape, poles.A))
        if not euler:
            half = y.mul_(0.5).sin_().square_()
            rise = torch.complex(x.mul_(cos).sub_(half, alpha=2), turn, out=scratch("w", shape, poles.A))
    if euler:
        return a, dt
    w = rise.mul_(poles.inverse_conj)
    return a, w if poles.vanishing is None else w.add_(dt * poles.vanishing)


def deep(x: Tensor) -> Tensor:
    """`x` in float64, or complex128."""
    return x.to(torch.promote_types(x.dtype, torch.float64))


def real(x: Tensor) -> Tensor:
    """The real part; a real one as it is."""
    return x.real if x.is_complex() else x


def over_time(rate: Tensor, x: Tensor) -> Tensor:
    """sum rate x over time and what leads, for rate [...,H,t] and x [...,H,t,N]: [H,N]."""
    sums = (rate[..., None, :] @ flat(x)).squeeze(-2)
    return unflat(sums.sum(tuple(range(sums.ndim - 2))), x)


def step_powers(dt: Tensor) -> tuple[Tensor, Tensor]:
    """Powers 2, 3, ... of dt [...,H,t] over the largest of each head, [...,H,k,t], and these largest [H].

    They are the rows that `weight_gradient` wants to be summed with, over time.
    """
    largest = dt.amax((*range(dt.ndim - 2), -1)).clamp_min(torch.finfo(dt.dtype).tiny)
    step = dt / largest[:, None]
    powers = [step.square()]
    for _ in range(SERIES_TERMS[dt.dtype] - 1):
        powers.append(powers[-1] * step)
    return torch.stack(powers, -2), largest


def weight_gradient(moments: Tensor, away: Tensor, largest: Tensor, poles: Poles) -> Tensor:
    """sum_t dw conj(dw/dA), r or c[H,N], from two kinds of sums over time of slope = dw conj(a).

    dw/dA = chi = (dt a - w) / A. Near dt A = 0, where that cancels, chi / a is a power series in dt,
    dt^2 sum_k (-dt A)^k / (k + 2)!: `moments` [H,k,N] are the sums with powers of steps over their `largest`
    [H]. `away` [H,N] is sum_t dt slope - dw conj(w), each token's difference for itself. Which of the two
    holds for a mode, its largest step tells: the cancellation in its smaller steps is small beside that one.
    """
    A, largest = poles.A, largest[:, None].double()
    far = largest * A.abs() >= SERIES_BELOW
    # (-dt A)^k / (k + 2)! is a product of k factors, the first of them 1/2. Small sums in float64.
    over = 1 / torch.arange(2, 2 + moments.shape[1], dtype=torch.float64, device=A.device)[:, None]
    factors = -conj(deep(A))[:, None] * largest[:, None] * over
    factors[:, 0] = 0.5
    near = (factors.cumprod(1) * moments).sum(1) * largest.square()
    return torch.where(far, away * poles.inverse_conj, near.to(A.dtype))
