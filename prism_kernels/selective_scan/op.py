"""The opaque custom ops: forward and backward of the whole selective scan, on either fast path.

Complex tensors enter as real pairs with a last axis of 2; `A.ndim == 3` says that they do. The forward
returns (y, final_state) and four residuals. Each is empty where the path, or a call without gradients, has no
use for it. The backward takes them, and the final state after them.
"""

import torch
from torch import Tensor

from .._core import checks
from .._core.autograd import first_order_only
from .._core.runtime import accumulate_dtype, without_autocast
from . import frame

OP = "selective_scan"
RESIDUALS = 4


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
    accurate: bool,
    growing: bool,
    save: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward of the whole op."""
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    with without_autocast(u.device):
        if checks.values_are_checked(u):
            frame.check_values(OP, u, dt, dt_bias, A, cu_seqlens, dt_softplus, growing)
        if impl == "triton":
            from . import launch

            y, final_state, kept = launch.forward(*tensors, dt_softplus, reverse, euler, accurate, save)
        else:
            y, final_state, kept = frame.forward(*tensors, dt_softplus, reverse, euler, save)
        return y, final_state, *kept, *(y.new_empty(0) for _ in range(RESIDUALS - len(kept)))


@selective_scan_fwd.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, softplus, reverse, euler, *options):
    save, impl = options[-2:]
    wide = accumulate_dtype(u.dtype)
    (batch, _T, H, P), N, pair = u.shape, B.shape[1 - A.ndim], tuple(A.shape[2:])
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not save:
        kept = []
    elif impl == "triton":
        from . import launch

        kept = launch.residuals(u, A, B, C, cu_seqlens)
    else:
        kept = frame.residuals(u, A, B, C, z, cu_seqlens, euler)
    kept += [((0,), wide)] * (RESIDUALS - len(kept))
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        u.new_empty((rows, H, P, N, *pair), dtype=wide),
        *(u.new_empty(shape, dtype=dtype) for shape, dtype in kept),
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
    accurate: bool,
    growing: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, dt, A, B, C, D, z, dt_bias, initial_state; empty where there is no input."""
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    options = (dt_softplus, reverse, euler)
    with without_autocast(u.device):
        if residuals[0].ndim == 1 and (impl == "triton" or cu_seqlens is None):
            final_state, *kept = selective_scan_fwd(*tensors, *options, accurate, growing, True, impl)[1:]
            residuals = [*kept, final_state]
        if impl == "triton":
            from . import launch

            return launch.backward(dy, dfinal, residuals, *tensors, *options, accurate)
        return frame.backward(dy, dfinal, residuals, *tensors, *options)


@selective_scan_bwd.register_fake
def _(dy, dfinal, residuals, u, dt, A, B, C, D, z, dt_bias, initial_state, *options):
    return tuple(
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (u, dt, A, B, C, D, z, dt_bias, initial_state)
    )


def _save(ctx, inputs, output):
    *tensors, dt_softplus, reverse, euler, accurate, growing, _save, impl = inputs
    ctx.save_for_backward(*tensors, *output[2:], output[1])
    ctx.options = dt_softplus, reverse, euler, accurate, growing, impl
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, *_):
    tensors, residuals = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = selective_scan_bwd(dy, dfinal, list(residuals), *tensors, *ctx.options)
    given = (x is not None for x in tensors[:9])
    return *(d if here else None for d, here in zip(grads, given, strict=True)), *(None,) * 8


selective_scan_fwd.register_autograd(_backward, setup_context=_save)
first_order_only(selective_scan_bwd, OP)
