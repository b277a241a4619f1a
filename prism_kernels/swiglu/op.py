"""Custom ops of the activation: fakes, gradients. Without `up`, `gate` holds both halves."""

from typing import Any

import torch
from torch import Tensor

from .._core.autograd import first_order_only
from .._core.runtime import without_autocast
from . import torch_impl

NAME = "swiglu"


@torch.library.custom_op("prism_kernels::swiglu_fwd", mutates_args=())
def swiglu_fwd(gate: Tensor, up: Tensor | None) -> Tensor:
    """silu(gate) * up."""
    with without_autocast(gate.device):
        return torch_impl.forward(gate, up)


@swiglu_fwd.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


@torch.library.custom_op("prism_kernels::swiglu_bwd", mutates_args=())
def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up (empty without `up`)."""
    with without_autocast(gate.device):
        return torch_impl.backward(dy, gate, up)


@swiglu_bwd.register_fake
def _(dy, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty((0,) if up is None else up.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    gate, up = ctx.saved_tensors
    dgate, dup = swiglu_bwd(dy, gate, up)
    return dgate, None if up is None else dup


swiglu_fwd.register_autograd(_backward, setup_context=_setup_context)
first_order_only(swiglu_bwd, NAME)
