"""What one writes without an op: eager PyTorch, a loop over time with autograd, all rows and heads at once.

These are the plainest competitors, and stand in for the mixers' ops inside a layer or a model.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_kernels import GatedDeltaRuleOutput, SelectiveScanOutput

Step = tuple[Tensor, Tensor]


def delta_step(M: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, beta: Tensor) -> Step:
    """One token of the gated delta rule: M r[B,H,K,V], q and k r[B,H,K], a and beta r[B,H]; q is scaled."""
    M = a[..., None, None] * M
    error = v - (k[..., None] * M).sum(-2)
    M = M + k[..., None] * (beta[..., None] * error)[..., None, :]
    return M, (q[..., None] * M).sum(-2)


def delta_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    chunk_size: int = 64,
    step=delta_step,
) -> GatedDeltaRuleOutput:
    """The gated delta rule with the signature of ours; float32 inside, or float64."""
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    q, k, v, g, beta = (x.to(wide) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    M = v.new_zeros(v.shape[0], *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    out = []
    for x in zip(*(t.unbind(1) for t in (q, k, v, g.exp(), beta)), strict=True):
        M, o = step(M, *x)
        out.append(o)
    return GatedDeltaRuleOutput(torch.stack(out, 1).to(dtype), M)


def scan_inputs(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, euler: bool = False) -> Step:
    """Decay c[B,T,H,1,N] and weighted input c[B,T,H,P,N] of every token, as a plain program has them."""
    z = dt[..., None] * A
    if euler:
        weight = dt[..., None] * B
    else:
        series = dt[..., None] * (1 + z / 2 + z * z / 6)  # expm1(z) / A loses A near 0
        small = z.abs() < 1e-3
        weight = torch.where(small, series, torch.expm1(z) / torch.where(small, torch.ones_like(A), A)) * B
    return torch.exp(z)[:, :, :, None], weight[:, :, :, None] * u[..., None]


def scan_loop(
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
    output_final_state: bool = False,
    discretization: str = "zoh",
) -> SelectiveScanOutput:
    """The selective scan with the signature of ours; float32 inside, or float64."""
    dtype, wide = u.dtype, torch.promote_types(u.dtype, torch.float32)
    u, dt = u.to(wide), dt.to(wide)
    A, B, C = (x if x.is_complex() else torch.view_as_complex(x.to(wide)) for x in (A, B, C))
    dt = dt if dt_bias is None else dt + dt_bias.to(wide)
    a, x = scan_inputs(u, F.softplus(dt) if dt_softplus else dt, A, B, discretization == "euler")
    h, states = torch.zeros_like(x[:, 0]), []
    for a_t, x_t in zip(a.unbind(1), x.unbind(1), strict=True):
        h = a_t * h + x_t
        states.append(h)
    C = C.conj() if C.ndim == 3 else C.conj()[:, None].expand(-1, u.shape[3], -1)
    y = 2 * torch.einsum("bthpn,hpn->bthp", torch.stack(states, 1), C).real
    y = y if D is None else y + D.to(wide).reshape(u.shape[2], -1) * u
    y = y if z is None else y * F.silu(z.to(wide))
    return SelectiveScanOutput(y.to(dtype), torch.view_as_real(h))


def mamba_step(h: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Step:
    """One token of Mamba's scan, real: h r[B,D,N], u and dt r[B,D], B and C r[B,N]."""
    h = torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None]
    return h, (h * C[:, None]).sum(-1)


def mamba_loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    step: Callable[..., Step] = mamba_step,
) -> Tensor:
    """Mamba's scan with weights per token, channels before time; float32 inside, or float64."""
    dtype, wide = u.dtype, torch.promote_types(u.dtype, torch.float32)
    u, delta, B, C, z = (x.to(wide) for x in (u, delta, B, C, z))
    dt = F.softplus(delta + delta_bias[:, None])
    h, out = u.new_zeros(u.shape[0], *A.shape), []
    for x in zip(*(t.unbind(2) for t in (u, dt, B, C)), strict=True):
        h, y = step(h, *x[:2], A, *x[2:])
        out.append(y)
    return ((torch.stack(out, 2) + D[:, None] * u) * F.silu(z)).to(dtype)


def scan_step(state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Step:
    """One token of the selective scan in real arithmetic, which compilers take: complex ones as pairs.

    expm1(x + iy) = (expm1(x) cos y - 2 sin^2(y/2)) + i exp(x) sin y loses nothing near 0.
    """
    (a, b), (h, k), (p, q), (c, d) = (t.unbind(-1) for t in (A[:, None], state, B, C))
    step = dt[..., None, None]
    x, y = step * a, step * b
    decay, turn = x.exp(), y.sin()
    real, imag = x.expm1() * y.cos() - 2 * (y / 2).sin().square(), decay * turn
    size = a * a + b * b
    real, imag = (real * a + imag * b) / size, (imag * a - real * b) / size
    wide = u[..., None].to(h.dtype)
    real, imag = (real * p - imag * q) * wide, (real * q + imag * p) * wide
    cosine = decay * y.cos()
    h, k = cosine * h - decay * turn * k + real, decay * turn * h + cosine * k + imag
    return 2 * (h * c + k * d).sum(-1).to(u.dtype), torch.stack([h, k], -1)


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A short causal convolution and SiLU, one shifted product per tap."""
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    y = sum(padded[:, j : j + x.shape[1]] * weight[:, j] for j in range(weight.shape[1]))
    return F.silu(y + bias)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS normalisation, statistics in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU."""
    return F.silu(gate) * up


def feed_forward(x: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """The layer around SwiGLU: gate and up projection are the halves of one weight's rows."""
    return F.linear(gated(*F.linear(x, inside).chunk(2, -1)), outside)
