"""The diagonal complex state-space mixer with an input-dependent step size."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prism_kernels import selective_scan, selective_scan_step

from ._checks import check_heads, check_input, check_lengths, check_token
from ._numerics import valid_tokens, wide
from .linear import Linear


class S4DComplex(nn.Module):
    """Every channel of every head runs through N complex modes that its head shares.

        u_t  = W_in x_t,   dt_t = softplus(W_dt x_t + b)          u [H,P], dt [H]
        h_t  = exp(dt A) h_{t-1} + (expm1(dt A) / A) B u_t        h c[H,P,N], A, B c[H,N]
        y_t  = 2 Re sum_n(conj(C) h_t) + D u_t                    C c[H,N] or c[H,P,N]
        out  = W_out(y_t * silu(W_gate x_t))

    The N modes stand for 2N: conjugates are implied. A starts as S4D-Lin, -1/2 + i pi n; dt starts
    log-uniform over the heads. B and C start such that for white noise of variance 1 the state path
    of each head settles at variance 1, the scale of its skip path. Parameters are real; complex ones
    are pairs on a last axis of 2. States are float32.

    Args:
        dim: Width D = H * P.
        num_heads: Heads H.
        state_dim: Complex modes N of a head.
        dt_min, dt_max: Range of the step size at the start, in units of time per token.
        c_per_channel: Whether every channel has its own C.
        state_path: False zeroes the state path and keeps the skip and the gate: a control for
            experiments. The state then never moves.

    Example:
        >>> y, state = S4DComplex(32, num_heads=4, state_dim=8)(torch.randn(2, 10, 32))
        >>> y.shape, state.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 4, 8, 8, 2]))

    Source: S4D (Gu et al. 2022, section 4), with a step size per token as in Mamba-2 (Dao and Gu 2024).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        state_dim: int = 32,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        c_per_channel: bool = False,
        state_path: bool = True,
    ) -> None:
        super().__init__()
        check_heads("S4DComplex", dim, num_heads)
        H, P, N = num_heads, dim // num_heads, state_dim
        self.dim, self.num_heads, self.head_dim, self.state_dim = dim, H, P, N
        self.state_path = state_path
        # One product for W_in (D rows), W_gate (D) and W_dt (H).
        self.in_proj = Linear(dim, 2 * dim + H)
        self.out_proj = Linear(dim, dim)
        nn.init.zeros_(self.in_proj.weight[2 * dim :])

        # A random log-uniform draw from each of H equal slots: all time scales, whatever the seed.
        slots = (torch.arange(H) + torch.rand(H)) / H
        dt = dt_min * (dt_max / dt_min) ** slots
        A = torch.complex(torch.full((N,), -0.5), math.pi * torch.arange(N)).expand(H, N)
        scale = unit_gain(dt, A)[:, None]
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(-A.real))
        self.A_imag = nn.Parameter(A.imag.clone())
        self.B = nn.Parameter(torch.stack([scale.expand(H, N), torch.zeros(H, N)], dim=-1))
        rows = (H, P, N, 2) if c_per_channel else (H, N, 2)
        self.C = nn.Parameter(torch.randn(rows) * scale.view(H, *[1] * (len(rows) - 1)) / math.sqrt(2))
        self.D = nn.Parameter(torch.ones(H, P))

    @property
    def A(self) -> Tensor:
        """The modes as real pairs r[H,N,2]; Re A < 0 whatever the parameters."""
        return torch.stack([-wide(self.A_log).exp(), wide(self.A_imag)], dim=-1)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix x r[B,T,D] over time and return y r[B,T,D] and the state after the last valid token.

        Args:
            x: r[B,T,D].
            state: r[B,H,P,N,2] to continue from; None for the start of a sequence.
            lengths: i[B], valid tokens of each right-padded row; None if all are valid.
        """
        check_input("S4DComplex", x, self.dim)
        check_lengths("S4DComplex", lengths, x.shape[0])
        u, gate, dt = self._project(x)
        if not self.state_path:
            return self._skip(u, gate), self.init_state(x.shape[0]) if state is None else state
        dt_bias: Tensor | None = self.dt_bias
        if lengths is not None:
            # dt = 0 is the identity on the state, exactly.
            dt = F.softplus(wide(dt) + wide(self.dt_bias))
            dt, dt_bias = dt.masked_fill(~valid_tokens(lengths, x.shape[1])[..., None], 0.0), None
        y, final = selective_scan(
            u,
            dt,
            self.A,
            self.B,
            self.C,
            self.D,
            gate,
            dt_bias=dt_bias,
            dt_softplus=lengths is None,
            initial_state=state,
            output_final_state=True,
        )
        return self.out_proj(y.flatten(-2)), cast(Tensor, final)

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token x_t r[B,D]: return y_t r[B,D] and the new state."""
        check_token("S4DComplex", x_t, self.dim)
        u, gate, dt = self._project(x_t)
        if not self.state_path:
            return self._skip(u, gate), state
        # [1,H,P,N] says that C is static where [H,P,N] could also be per row.
        C = self.C if self.C.ndim == 3 else self.C[None]
        y, state = selective_scan_step(
            state, u, dt, self.A, self.B, C, self.D, gate, dt_bias=self.dt_bias, dt_softplus=True
        )
        return self.out_proj(y.flatten(-2)), state

    def init_state(self, batch_size: int) -> Tensor:
        """Zeros r[B,H,P,N,2] in float32."""
        return wide(self.D.new_zeros(batch_size, self.num_heads, self.head_dim, self.state_dim, 2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input and gate [...,H,P], raw step size [...,H]."""
        u, gate, dt = self.in_proj(x).split([self.dim, self.dim, self.num_heads], dim=-1)
        heads = (self.num_heads, self.head_dim)
        return u.unflatten(-1, heads), gate.unflatten(-1, heads), dt

    def _skip(self, u: Tensor, gate: Tensor) -> Tensor:
        """The layer with its state path zeroed."""
        return self.out_proj((self.D.to(u.dtype) * u * F.silu(gate)).flatten(-2))


def unit_gain(dt: Tensor, A: Tensor) -> Tensor:
    """Scale s[H] for |B| = s and E|C|^2 = s^2 that gives the state path variance 1.

    For white noise of variance 1 the output has the variance of the impulse response
    2 Re sum_n conj(C_n) w_n exp(l dt A_n), w = expm1(dt A) / A * B, summed over lags l; with C of random
    phase that is 2 s^4 sum_n |expm1(dt A_n) / A_n|^2 / (1 - exp(2 dt Re A_n)).
    """
    dA = dt[:, None] * A
    power = (torch.expm1(dA) / A).abs().square() / -torch.expm1(2 * dA.real)
    return (2 * power.sum(-1)) ** -0.25
