"""Checks that the layers share, in the words of prism_kernels."""

from torch import Tensor

from prism_kernels._core.checks import check_shape, check_time, fail


def check_input(layer: str, x: Tensor, dim: int) -> None:
    """Raise unless x is [B, T, D] with D = dim and T >= 1."""
    if x.ndim != 3 or x.shape[-1] != dim:
        advice = "Project it to the layer's width."
        fail(layer, f"`x` [B, T, D] with D = {dim}", f"shape {tuple(x.shape)}", advice)
    check_time(layer, "x", x.shape[1])


def check_token(layer: str, x_t: Tensor, dim: int) -> None:
    """Raise unless x_t is [B, D] with D = dim: one token per row."""
    if x_t.ndim != 2 or x_t.shape[-1] != dim:
        fail(
            layer,
            f"`x_t` [B, D] with D = {dim}",
            f"shape {tuple(x_t.shape)}",
            "Give `step` one token per row.",
        )


def check_lengths(layer: str, lengths: Tensor | None, B: int) -> None:
    """Raise unless lengths is None or [B]."""
    if lengths is not None:
        check_shape(layer, "lengths", lengths, (B,), "[B]", "Give one length per row of the batch.")


def check_heads(layer: str, dim: int, num_heads: int) -> None:
    """Raise unless num_heads divides dim."""
    if num_heads < 1 or dim % num_heads:
        advice = "Change one of them so that every head has the same width."
        fail(layer, "`dim` divisible by `num_heads`", f"{dim} and {num_heads}", advice)
