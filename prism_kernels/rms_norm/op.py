"""Custom ops of the normalisation: launchers, fakes and gradients, forward then backward."""

from typing import Any

import torch
from torch import Tensor

from .._core.autograd import first_order_only
from .._core.rows import as_rows
from .._core.runtime import accumulate_dtype, launch, without_autocast
from . import torch_impl

NAME = "rms_norm"
VALUES = 16  # of a tile in each thread: two 16-byte loads of 16-bit values from each input
WIDEST = 8192  # a row up to here stays in registers; a wider one is walked in blocks of half of it
PROCESSORS, RESIDENT = 132, 16  # the backward's programs: as many as 16 warps on each of 132 processors hold


def _blocks(D: int) -> dict[str, int]:
    """The tile and its warps, by width alone: a row's bits do not depend on how many rows there are."""
    width = 1 << (D - 1).bit_length() if D <= WIDEST else WIDEST // 2
    warps = max(4, width // (32 * VALUES))
    height = min(32, warps * 32 * VALUES // width)
    return {"BLOCK_R": height, "BLOCK_D": width, "num_warps": warps}


def _acc(x: Tensor) -> Any:
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _launch_fwd(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels import rms_norm_fwd_kernel

    D = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=accumulate_dtype(x.dtype), device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    if y.numel():
        (x, residual, gate), inner, strides = as_rows((x, residual, gate))
        weight = None if weight is None else weight.contiguous()
        flags = _blocks(D)
        grid = (-(-rstd.numel() // flags["BLOCK_R"]),)
        args = (y, total, rstd, x, weight, residual, gate, rstd.numel(), inner, *strides)
        launch(rms_norm_fwd_kernel, grid, *args, D=D, EPS=eps, ACC=_acc(x), **flags)
    return y, y.new_empty(0) if total is None else total, rstd


def _launch_bwd(
    dy: Tensor,
    dtotal: Tensor,
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight, residual (None where it is x's) and gate."""
    from .kernels import rms_norm_bwd_kernel

    D, rows, flags = x.shape[-1], rstd.numel(), _blocks(x.shape[-1])
    programs = min(-(-rows // flags["BLOCK_R"]), PROCESSORS * RESIDENT // flags["num_warps"])
    own = residual if _has_own_gradient(residual, x) else None
    ds, dresidual, dgate = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, own, gate)
    )
    parts = None if weight is None else torch.empty(programs, D, dtype=rstd.dtype, device=x.device)
    if rows:
        inputs = (dy, None if residual is None else dtotal, x, residual, gate)
        (dy, dtotal, x, residual, gate), inner, strides = as_rows(inputs)
        weight = None if weight is None else weight.contiguous()
        args = (ds, dresidual, dgate, parts, dy, dtotal, x, weight, residual, gate, rstd)
        launch(rms_norm_bwd_kernel, (programs,), *args, rows, inner, *strides, D=D, ACC=_acc(x), **flags)
    return ds, None if parts is None else parts.sum(0), dresidual, dgate


def _torch_bwd(
    dy: Tensor,
    dtotal: Tensor,
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    ds, dweight, dgate = torch_impl.backward(dy, dtotal, x, weight, residual, gate, rstd)
    return ds, dweight, ds if _has_own_gradient(residual, x) else None, dgate


def _has_own_gradient(residual: Tensor | None, x: Tensor) -> bool:
    """Whether the residual's gradient is another tensor than x's: only where its dtype is."""
    return residual is not None and residual.dtype != x.dtype


@torch.library.custom_op("prism_kernels::rms_norm_fwd", mutates_args=())
def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y like x, x + residual or an empty tensor, rstd r[...,1])."""
    with without_autocast(x.device):
        return (_launch_fwd if impl == "triton" else torch_impl.forward)(x, weight, residual, gate, eps)


@rms_norm_fwd.register_fake
def _(x, weight, residual, gate, eps, impl):
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape), total, x.new_empty(*x.shape[:-1], 1, dtype=accumulate_dtype(x.dtype))


@torch.library.custom_op("prism_kernels::rms_norm_bwd", mutates_args=())
def rms_norm_bwd(
    dy: Tensor,
    dtotal: Tensor,
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, residual and gate (empty where there is none).

    That of a residual of x's dtype is empty too: it is the gradient of x.
    """
    inputs, args = (x, weight, residual, gate), (dy, dtotal, x, weight, residual, gate, rstd)
    with without_autocast(x.device):
        grads = (_launch_bwd if impl == "triton" else _torch_bwd)(*args)
        return tuple(
            rstd.new_empty(0) if t is None or g is None else g.to(t.dtype)
            for t, g in zip(inputs, grads, strict=True)
        )


@rms_norm_bwd.register_fake
def _(dy, dtotal, x, weight, residual, gate, rstd, impl):
    own = residual if _has_own_gradient(residual, x) else None
    return tuple(rstd.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, own, gate))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.impl = inputs[-1]


def _backward(ctx: Any, dy: Tensor, dtotal: Tensor, _: Any) -> tuple:
    x, weight, residual, gate, rstd = ctx.saved_tensors
    dx, dweight, dresidual, dgate = rms_norm_bwd(dy, dtotal, x, weight, residual, gate, rstd, ctx.impl)
    dresidual = dresidual if _has_own_gradient(residual, x) else dx
    given = zip((x, weight, residual, gate), (dx, dweight, dresidual, dgate), strict=True)
    return *(None if t is None else g for t, g in given), None, None


rms_norm_fwd.register_autograd(_backward, setup_context=_setup_context)
first_order_only(rms_norm_bwd, NAME)
