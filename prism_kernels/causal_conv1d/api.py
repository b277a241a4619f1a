"""Public function of the short convolution."""

from typing import NamedTuple

import torch
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
    seq_idx: Tensor | None = None,
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
            boundary are padding and give 0.
        seq_idx: i[B,T] document of each token: tokens of other documents count as 0. Tokens with a
            negative index are padding and give 0. Without a state, and not with cu_seqlens.
        impl: "triton", "torch", "reference", or None to choose by device.

    Returns:
        CausalConv1dOutput(y, final_state).

    Raises:
        ValueError: A shape, device, activation, or boundary does not fit; T = 0; seq_idx is given
            together with a state or cu_seqlens.
        TypeError: A dtype does not fit.

    Example:
        >>> x = torch.randn(2, 10, 8)
        >>> w = torch.randn(8, 4)
        >>> y, state = causal_conv1d(x, w, activation="silu", output_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 10, 8]), torch.Size([2, 8, 3]))

    Source: the short convolution of H3 (Fu et al. 2023, section 3) and Mamba (Gu and Dao 2023, section 3.4).
    """
    check_convolution(NAME, x, weight, bias, activation, initial_state, cu_seqlens)
    if seq_idx is not None:
        _check_documents(x, seq_idx, initial_state, cu_seqlens, output_final_state)
    path = choose_impl(NAME, impl, x.device)
    if path == "reference":
        if cu_seqlens is not None:
            checks.check_cu_seqlens_values(NAME, cu_seqlens, x.shape[1])
        y, final = causal_conv1d_reference(
            x,
            weight,
            bias,
            activation=activation,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            seq_idx=seq_idx,
        )
    else:
        args = (x, weight, bias, initial_state, cu_seqlens, seq_idx, activation or "none", path)
        y, final = causal_conv1d_fwd(*args)
    return CausalConv1dOutput(y, final if output_final_state else None)


def check_convolution(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise in the name of `op` unless x r[B,T,D] and the rest fit together."""
    checks.check_rank(op, "x", x, "[B, T, D]")
    checks.check_rank(op, "weight", weight, "[D, W]")
    checks.check_time(op, "x", x.shape[1])
    checks.check_choice(op, "activation", activation, (None, "silu"))
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "initial_state": state}.items():
        if tensor is not None:
            checks.check_dtype(op, name, tensor, checks.FLOATS)
    checks.check_device(op, x=x, weight=weight, bias=bias, initial_state=state, cu_seqlens=cu_seqlens)
    D, W = weight.shape
    if not 2 <= W <= 4:
        checks.fail(op, "`weight` [D, W] with W from 2 to 4", f"W = {W}", "Use torch.nn.functional.conv1d.")
    checks.check_shape(op, "x", x, (*x.shape[:2], D), "[B, T, D]", "Inputs are [B, T, D]: channels last.")
    if bias is not None:
        checks.check_shape(op, "bias", bias, (D,), "[D]", "One bias per channel.")
    if cu_seqlens is not None:
        checks.check_cu_seqlens(op, cu_seqlens, x.shape[0])
    if state is not None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        advice = "The state is the last W - 1 inputs of each sequence, channels before time."
        checks.check_shape(op, "initial_state", state, (rows, D, W - 1), "[B, D, W-1]", advice)


def _check_documents(
    x: Tensor, seq_idx: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, output_final_state: bool
) -> None:
    checks.check_dtype(NAME, "seq_idx", seq_idx, (torch.int32, torch.int64), "Use `.to(torch.int32)`.")
    checks.check_shape(NAME, "seq_idx", seq_idx, x.shape[:2], "[B, T]", "One document index per token.")
    checks.check_device(NAME, x=x, seq_idx=seq_idx)
    others = {
        "initial_state": state,
        "cu_seqlens": cu_seqlens,
        "output_final_state": output_final_state or None,
    }
    for name, other in others.items():
        if other is not None:
            advice = "cu_seqlens alone marks sequences that have a state each."
            checks.fail(NAME, "`seq_idx` alone", f"`{name}` beside it", advice)
