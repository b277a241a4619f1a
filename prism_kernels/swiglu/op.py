"""Custom ops of the activation: launchers, fakes, gradients. Without `up`, `gate` holds both halves."""

from typing import Any

import torch
from torch import Tensor

from .._core.autograd import first_order_only
from .._core.runtime import launch, without_autocast
from . import torch_impl

NAME = "swiglu"
TILE, WARPS = 2048, 4  # 16 elements a thread: two 16-byte loads of 16-bit values from each input


def _rows(t: Tensor) -> Tensor:
    """`t` as [rows, F] with the last axis contiguous; a copy only where strides allow no view."""
    t = t if t.ndim and t.stride(-1) == 1 else t.contiguous()
    return t.reshape(-1, t.shape[-1] if t.ndim else 1)


def _blocks(rows: int, F: int) -> dict[str, int]:
    """A tile of 2048: the widest row block of which little hangs over the edge of a row."""
    widths = (TILE,) if rows == 1 else (1024, 512, 256)
    width = next((w for w in widths if -F % w <= F // 8), widths[-1])
    width = min(width, 1 << (F - 1).bit_length())
    return {"BLOCK_R": 1 if rows == 1 else TILE // width, "BLOCK_F": width}


def _launch(kernel: Any, *tensors: Tensor) -> None:
    """Launch over outputs and inputs, as one single row where all are contiguous."""
    import triton.language as tl

    views = [_rows(t) for t in tensors]
    if all(t.is_contiguous() for t in views):
        views = [t.view(1, -1) for t in views]
    rows, F = views[0].shape
    blocks = _blocks(rows, F)
    grid = (-(-rows // blocks["BLOCK_R"]) * -(-F // blocks["BLOCK_F"]),)
    acc = tl.float64 if tensors[0].dtype == torch.float64 else tl.float32
    strides = [t.stride(0) for t in views]
    launch(kernel, grid, *views, rows, F, *strides, **blocks, ACC=acc, num_warps=WARPS)


def _launch_fwd(gate: Tensor, up: Tensor) -> Tensor:
    from .kernels import swiglu_fwd_kernel

    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        _launch(swiglu_fwd_kernel, y, gate, up)
    return y


def _launch_bwd(dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor) -> None:
    from .kernels import swiglu_bwd_kernel

    if gate.numel():
        _launch(swiglu_bwd_kernel, dgate, dup, dy, gate, up)


@torch.library.custom_op("prism_kernels::swiglu_fwd", mutates_args=())
def swiglu_fwd(gate: Tensor, up: Tensor | None, impl: str) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    with without_autocast(gate.device):
        return (_launch_fwd if impl == "triton" else torch_impl.forward)(gate, up)


@swiglu_fwd.register_fake
def _(gate, up, impl):
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


@torch.library.custom_op("prism_kernels::swiglu_bwd", mutates_args=())
def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up (empty without `up`)."""
    dgate, dup = (gate.new_empty((0,) if t is None else t.shape) for t in (gate, up))
    of_gate, of_up = dgate.chunk(2, -1) if up is None else (dgate, dup)
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    with without_autocast(gate.device):
        (_launch_bwd if impl == "triton" else torch_impl.backward)(of_gate, of_up, dy, gate, up)
    return dgate, dup


@swiglu_bwd.register_fake
def _(dy, gate, up, impl):
    return gate.new_empty(gate.shape), gate.new_empty((0,) if up is None else up.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
    gate, up = ctx.saved_tensors
    dgate, dup = swiglu_bwd(dy, gate, up, ctx.impl)
    return dgate, None if up is None else dup, None


swiglu_fwd.register_autograd(_backward, setup_context=_setup_context)
first_order_only(swiglu_bwd, NAME)
