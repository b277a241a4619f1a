"""Public function of the normalisation."""

from typing import NamedTuple

from torch import Tensor

from .._core import checks
from .._core.impl import choose_impl
from .op import NAME, rms_norm_fwd
from .reference import rms_norm_reference


class RMSNormOutput(NamedTuple):
    """y like x, and the sum x + residual that was normalised (None without a residual)."""

    y: Tensor
    residual: Tensor | None


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    impl: str | None = None,
) -> RMSNormOutput:
    """Normalise the last axis by its root mean square, after an optional residual add.

        s = x + residual
        y = s / sqrt(mean(s^2) + eps) * weight * silu(gate)

    Numerics: the sum and the statistics in float32 (float64 for float64 x). Deterministic.
    First-order gradients only on the "triton" and "torch" paths.

    Args:
        x: r[...,D], float16, bfloat16, float32 or float64.
        weight: r[D], any float dtype, or None for 1.
        residual: like x in shape, any float dtype. The sum comes back in this dtype.
        gate: like x in shape, any float dtype. Applied after the normalisation.
        eps: Added to the mean square; >= 0.
        impl: "triton", "torch", "reference", or None to choose by device.

    Returns:
        RMSNormOutput(y, residual).

    Raises:
        ValueError: A shape or device does not fit, D = 0, or eps < 0.
        TypeError: A dtype does not fit.

    Example:
        >>> x = torch.randn(2, 10, 8)
        >>> y, _ = rms_norm(x, torch.ones(8))
        >>> y.square().mean(-1).allclose(torch.ones(2, 10), atol=1e-4)
        True

    Source: Zhang and Sennrich 2019, equation 4; the gate as in Mamba-2 (Dao and Gu 2024), applied last.
    """
    for name, tensor in {"x": x, "weight": weight, "residual": residual, "gate": gate}.items():
        if tensor is not None:
            checks.check_dtype(NAME, name, tensor, checks.FLOATS)
    checks.check_device(NAME, x=x, weight=weight, residual=residual, gate=gate)
    if x.ndim == 0 or x.shape[-1] == 0:
        checks.fail(NAME, "`x` [..., D] with D >= 1", f"shape {tuple(x.shape)}", "Give it a channel axis.")
    if eps < 0:
        checks.fail(NAME, "`eps` >= 0", str(eps), "Use 1e-6.")
    if weight is not None:
        checks.check_shape(NAME, "weight", weight, x.shape[-1:], "[D]", "One weight per channel.")
    for name, tensor in {"residual": residual, "gate": gate}.items():
        if tensor is not None:
            checks.check_shape(NAME, name, tensor, x.shape, "[..., D]", "It must have x's shape.")
    path = choose_impl(NAME, impl, x.device)
    if path == "reference":
        return RMSNormOutput(*rms_norm_reference(x, weight, residual=residual, gate=gate, eps=eps))
    y, total, _ = rms_norm_fwd(x, weight, residual, gate, eps, path)
    return RMSNormOutput(y, None if residual is None else total)
