"""The opaque custom ops: forward and backward of the whole selective scan, on either fast path.

Complex tensors enter as real pairs with a last axis of 2; `A.ndim == 3` says that they do. The forward
returns (y, final_state) and four residuals: three of the recurrence, and y before the gate. Each is empty
where the path, or a call without gradients, has no use for it.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.autograd import first_order_only
from .._core.runtime import accumulate_dtype, without_autocast
from . import blocks, frame, torch_impl
from .discrete import ScanGradients
from .frame import Scan, as_numbers, as_pairs

OP = "selective_scan"


def path(impl: str) -> ModuleType:
    """The module that runs the recurrence; Triton is imported on first use."""
    if impl == "torch":
        return torch_impl
    from . import triton_impl

    return triton_impl


@torch.library.custom_op("prism_kernels::selective_scan_fwd", mutates_args=())
def selective_scan_fwd(
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward of the whole op."""
    with without_autocast(u.device):
        if checks.values_are_checked(u):
            frame.check_values(OP, u, dt, dt_bias, A, cu_seqlens, dt_softplus)
        wide = accumulate_dtype(u.dtype)
        scan = Scan.of(u, dt, A, B, C, dt_bias, initial_state, cu_seqlens, dt_softplus, reverse, euler)
        if impl == "torch" and scan.u.shape[1] == 1 and not save:
            (y, final_state), kept = blocks.step(scan.u, scan.dt, scan.params, scan.h0), [u.new_empty(0)] * 3
        else:
            y, final_state, kept = path(impl).forward(scan.u, scan.dt, scan.params, scan.h0)
        if D is not None:
            y = torch.addcmul(y, frame.skip(D, u.shape[2], wide), scan.u)
        y = scan.layout.restore(y)
        ungated = y.new_empty(0)
        if z is not None:
            gate = F.silu(z[:, : scan.layout.total].to(wide))
            ungated, y = y, frame.padded(y[:, : scan.layout.total] * gate, y.shape[1])
        # With cu_seqlens the sizes depend on the data.
        kept = [as_pairs(x) if save and cu_seqlens is None else y.new_empty(0) for x in kept]
        ungated = ungated.contiguous() if save else y.new_empty(0)
        return y.to(u.dtype).contiguous(), as_pairs(final_state), *kept, ungated


@selective_scan_fwd.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, reverse, euler, save, impl):
    wide = accumulate_dtype(u.dtype)
    (batch, T, H, P), N, pair = u.shape, B.shape[1 - A.ndim], tuple(A.shape[2:])
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rank = A.ndim + 1  # of B and C with a value per channel
    by_channel, one_pole = rank in (B.ndim, C.ndim), A.shape[1] < N
    kept = path(impl).residual_shapes(batch, T, H, P, N, by_channel, euler, one_pole)
    kept = [(*x, *pair) if save and cu_seqlens is None and len(x) > 1 else (0,) for x in kept]
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        u.new_empty((rows, H, P, N, *pair), dtype=wide),
        *(u.new_empty(shape, dtype=wide) for shape in kept),
        u.new_empty((0,) if z is None or not save else u.shape, dtype=wide),
    )


@torch.library.custom_op("prism_kernels::selective_scan_bwd", mutates_args=())
def selective_scan_bwd(
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, dt, A, B, C, D, z, dt_bias, initial_state; empty where there is no input."""
    with without_autocast(u.device):
        wide = accumulate_dtype(u.dtype)
        scan = Scan.of(u, dt, A, B, C, dt_bias, initial_state, cu_seqlens, dt_softplus, reverse, euler)
        if cu_seqlens is None and residuals[0].ndim == 1:
            tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
            residuals = selective_scan_fwd(*tensors, dt_softplus, reverse, euler, True, impl)[2:]
        *kept, ungated = residuals
        layout, total = scan.layout, scan.layout.total
        g, dz = dy.to(wide), None
        if z is not None:
            gate, g = z[:, :total].to(wide), g[:, :total]
            dz = frame.padded(torch.ops.aten.silu_backward(g * ungated[:, :total], gate), z.shape[1])
            g = g * F.silu(gate)
        g = layout.arrange(g)
        if cu_seqlens is None:
            kept = [as_numbers(x, A) if x.ndim > 1 else x for x in kept]
        else:
            kept = path(impl).forward(scan.u, scan.dt, scan.params, scan.h0)[2]
        eta = torch.zeros_like(scan.h0) if dfinal is None else as_numbers(dfinal.to(wide), A)
        d: ScanGradients = path(impl).backward(g, scan.u, scan.dt, scan.params, kept, eta)
        du, dD = d.u, None
        if D is not None:
            du = torch.addcmul(du, g, frame.skip(D, u.shape[2], wide))
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


@selective_scan_bwd.register_fake
def _(dy, dfinal, residuals, u, dt, A, B, C, D, z, dt_bias, initial_state, *options):
    return tuple(
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (u, dt, A, B, C, D, z, dt_bias, initial_state)
    )


def _save(ctx, inputs, output):
    *tensors, dt_softplus, reverse, euler, _save, impl = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.options = dt_softplus, reverse, euler, impl
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, *_):
    tensors, residuals = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = selective_scan_bwd(dy, dfinal, list(residuals), *tensors, *ctx.options)
    given = (x is not None for x in tensors[:9])
    return *(d if here else None for d, here in zip(grads, given, strict=True)), *(None,) * 6


selective_scan_fwd.register_autograd(_backward, setup_context=_save)
first_order_only(selective_scan_bwd, OP)
