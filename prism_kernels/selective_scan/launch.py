"""What the op calls on the Triton path: picks the kernels by shape."""

import torch
from torch import Tensor

from . import launch_channels, launch_channels_backward, launch_heads


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
    accurate: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y in the dtype of u, the final state, and what `residuals` describes (none without `save`)."""
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    run = launch_heads.forward if launch_heads.supports(u, A, B, C) else launch_channels.forward
    return run(*tensors, dt_softplus, reverse, euler, accurate, save)


def residuals(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `forward` keeps for `backward`."""
    kernels = launch_heads if launch_heads.supports(u, A, B, C) else launch_channels
    return kernels.residuals(u, A, cu_seqlens)


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
    accurate: bool,
) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and initial_state; empty where there is no input.

    `residuals` are those of `forward`, empties, and the final state.
    """
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    kept = [residuals[0], residuals[-1]]
    run = launch_heads.backward if launch_heads.supports(u, A, B, C) else launch_channels_backward.backward
    return run(dy, dfinal, kept, *tensors, dt_softplus, reverse, euler, accurate)
