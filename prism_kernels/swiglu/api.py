"""Public function of the activation."""

from torch import Tensor

from .._core import checks
from .._core.impl import choose_impl
from .op import NAME, swiglu_fwd
from .reference import swiglu_reference


def swiglu(gate: Tensor, up: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """Gate one projection by the SiLU of another.

        y = silu(gate) * up

    Numerics: float32 inside (float64 for float64 inputs), one rounding at the end. Deterministic.
    First-order gradients only on the "triton" and "torch" paths.

    Args:
        gate: r[...], float16, bfloat16, float32 or float64.
        up: like gate. None: `gate` r[...,2F] is both, gate in the first half of its last axis; its
            gradient then needs no concatenation.
        impl: "triton", "torch", "reference", or None to choose by device.

    Returns:
        A tensor like gate, or r[...,F] of one r[...,2F].

    Raises:
        ValueError: Shapes or devices differ, or the last axis of both in one is odd.
        TypeError: A dtype does not fit, or the two differ.

    Example:
        >>> swiglu(torch.randn(2, 10, 16)).shape
        torch.Size([2, 10, 8])

    Source: Shazeer 2020, equation 6 (without the projections).
    """
    checks.check_dtype(NAME, "gate", gate, checks.FLOATS)
    if up is None:
        if gate.ndim == 0 or gate.shape[-1] % 2:
            shape = tuple(gate.shape)
            checks.fail(
                NAME, "`gate` [..., 2F] where there is no `up`", f"shape {shape}", "Pass both halves."
            )
    else:
        checks.check_same(NAME, gate=gate, up=up)
        checks.check_device(NAME, gate=gate, up=up)
        checks.check_shape(NAME, "up", up, gate.shape, "[...]", "`gate` and `up` must have one shape.")
    path = choose_impl(NAME, impl, gate.device)
    return swiglu_reference(gate, up) if path == "reference" else swiglu_fwd(gate, up, path)
