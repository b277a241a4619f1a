"""Public function of the short convolution."""

from typing import NamedTuple

from torch import Tensor

from .._core import checks
from .._core.impl import choose_impl
from .op import NAME, causal_conv1d_fwd
from .reference import causal_conv1d_reference


class CausalConv1dOutput(NamedTuple):
    """y like x, and the last W-1 inputs r[B or S, D, W-1] (None unless asked for)."""

    y: Tensor
    final_state: Tensor | None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: str | None = None,
) -> CausalConv1dOutput:
    """Convolve each channel with its own short causal filter.

        y_t = act(bias + sum_j weight[:, j] * x_{t-W+1+j}),   j = 0..W-1

    Inputs before a sequence are the initial state, or zero. One token at a time with the state
    carried gives the same as the whole sequence at once.

    Numerics: products and sums in float32 (float64 for float64 x), rounded once to x's dtype.
    Deterministic. First-order gradients only on the "triton" and "torch" paths.

    Args:
        x: r[B,T,D], float16, bfloat16, float32 or float64. Input.
        weight: r[D,W], W from 2 to 4, any float dtype. weight[:, -1] meets the present token.
        bias: r[D] or None.
        activation: None or "silu".
        initial_state: r[B,D,W-1], oldest input first; r[S,D,W-1] with cu_seqlens.
        output_final_state: Whether to return the last W-1 inputs.
        cu_seqlens: i[S+1] boundaries of S sequences packed into one row (B = 1); tokens after the last
            boundary are padding and give 0. Paths "torch" and "reference" only.
        impl: "triton", "torch", "reference", or None to choose by device.

    Returns:
        CausalConv1dOutput(y, final_state).

    Raises:
        ValueError: A shape, device, activation, or boundary does not fit; T = 0.
        TypeError: A dtype does not fit.
        NotImplementedError: The Triton path is asked for packed sequences.

    Example:
        >>> x = torch.randn(2, 10, 8)
        >>> w = torch.randn(8, 4)
        >>> y, state = causal_conv1d(x, w, activation="silu", output_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 10, 8]), torch.Size([2, 8, 3]))

    Source: the short convolution of H3 (Fu et al. 2023, section 3) and Mamba (Gu and Dao 2023, section 3.4).
    """
    _check(x, weight, bias, activation, initial_state, cu_seqlens)
    lacks = [] if cu_seqlens is None else ["packed sequences (cu_seqlens)"]
    path = choose_impl(NAME, impl, x.device, triton_lacks=lacks)
    if path == "reference":
        if cu_seqlens is not None:
            checks.check_cu_seqlens_values(NAME, cu_seqlens, x.shape[1])
        y, final = causal_conv1d_reference(
            x, weight, bias, activation=activation, initial_state=initial_state, cu_seqlens=cu_seqlens
        )
    else:
        y, final = causal_conv1d_fwd(x, weight, bias, initial_state, cu_seqlens, activation or "none", path)
    return CausalConv1dOutput(y, final if output_final_state else None)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    checks.check_rank(NAME, "x", x, "[B, T, D]")
    checks.check_rank(NAME, "weight", weight, "[D, W]")
    checks.check_time(NAME, "x", x.shape[1])
    checks.check_choice(NAME, "activation", activation, (None, "silu"))
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "initial_state": state}.items():
        if tensor is not None:
            checks.check_dtype(NAME, name, tensor, checks.FLOATS)
    checks.check_device(NAME, x=x, weight=weight, bias=bias, initial_state=state, cu_seqlens=cu_seqlens)
    D, W = weight.shape
    if not 2 <= W <= 4:
        checks.fail(NAME, "`weight` [D, W] with W from 2 to 4", f"W = {W}", "Use torch.nn.functional.conv1d.")
    checks.check_shape(NAME, "x", x, (*x.shape[:2], D), "[B, T, D]", "Inputs are [B, T, D]: channels last.")
    if bias is not None:
        checks.check_shape(NAME, "bias", bias, (D,), "[D]", "One bias per channel.")
    if cu_seqlens is not None:
        checks.check_cu_seqlens(NAME, cu_seqlens, x.shape[0])
    if state is not None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        advice = "The state is the last W - 1 inputs of each sequence, channels before time."
        checks.check_shape(NAME, "initial_state", state, (rows, D, W - 1), "[B, D, W-1]", advice)
