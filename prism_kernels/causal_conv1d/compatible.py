"""Functions of the causal-conv1d package under their own names: channels before time, states in place.

Swapping the import changes no number; what the package restricts (CUDA, widths divisible by 8, layouts in
memory) is free here.
"""

import torch
from torch import Tensor

from .._core import checks
from .._core.impl import choose_impl
from .api import check_convolution
from .op import UPDATE, causal_conv1d_fwd, causal_conv1d_state_update

FN = "causal_conv1d_fn"
ACTIVATIONS = (None, "silu", "swish")
INDICES = (torch.int32, torch.int64)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own short causal filter, channels before time.

        y[..., t] = act(bias + sum_j weight[:, j] * x[..., t-W+1+j]),   j = 0..W-1

    Signature and meaning of causal_conv1d.causal_conv1d_fn; `causal_conv1d` is the same convolution for
    channels last. Numerics: products and sums in float32 (float64 for float64 x), rounded once.
    Deterministic. First-order gradients for x, weight, bias and initial_states. The result lies in memory
    with channels last.

    Args:
        x: r[B,D,T], float16, bfloat16, float32 or float64; any strides.
        weight: r[D,W], W from 2 to 4, any float dtype. weight[:, -1] meets the present token.
        bias: r[D] or None.
        seq_idx: i[B,T] document of each token: tokens of other documents count as 0. Tokens with a
            negative index give 0 and no gradient.
        initial_states: r[B,D,W-1] inputs before the first, oldest first; not with seq_idx.
        return_final_states: Whether to return the last W-1 inputs; not with seq_idx.
        final_states_out: r[B,D,W-1], written to and returned as the final states, if these are asked for.
        activation: None, "silu" or "swish" (the same).

    Returns:
        y r[B,D,T], or with return_final_states the pair of y and final states r[B,D,W-1].

    Raises:
        ValueError: A shape, device or activation does not fit; T = 0; a state together with seq_idx.
        TypeError: A dtype does not fit.

    Example:
        >>> x, w = torch.randn(2, 8, 10), torch.randn(8, 4)
        >>> documents = torch.tensor([[0] * 6 + [1] * 4, [0] * 10], dtype=torch.int32)
        >>> causal_conv1d_fn(x, w, seq_idx=documents, activation="silu").shape
        torch.Size([2, 8, 10])

    Source: the short convolution of Mamba (Gu and Dao 2023, section 3.4); interface of causal-conv1d 1.6.
    """
    _check_layout(FN, x, weight)
    B, D, T = x.shape
    checks.check_choice(FN, "activation", activation, ACTIVATIONS)
    shape, axes = (B, D, weight.shape[1] - 1), "[B, D, W-1]"
    for name, states in {"initial_states": initial_states, "final_states_out": final_states_out}.items():
        if states is not None:
            checks.check_shape(FN, name, states, shape, axes, "Channels before time, the last W - 1 inputs.")
    if seq_idx is not None:
        _check_index(FN, "seq_idx", seq_idx, x, (B, T), "[B, T]")
        if initial_states is not None or return_final_states:
            advice = "Use causal_conv1d with cu_seqlens, where each sequence has a state."
            checks.fail(FN, "`seq_idx` without states", "initial_states or return_final_states", advice)
    check_convolution(FN, x.mT, weight, bias, activation and "silu", initial_states, None)
    path = choose_impl(FN, None, x.device)
    args = (x.mT, weight, bias, initial_states, None, seq_idx, "silu" if activation else "none", path)
    y, final = causal_conv1d_fwd(*args)
    if not return_final_states:
        return y.mT
    return y.mT, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next tokens of a decoder, and move them into its state in place.

    The state holds the last L >= W-1 inputs, the newest last; with cache_seqlens it is a ring, in which
    token number n of a sequence has entry n % L. Signature and meaning of
    causal_conv1d.causal_conv1d_update. Numerics as in causal_conv1d_fn; no gradients. Nothing waits for
    the device.

    Args:
        x: r[B,D] or r[B,D,T], float16, bfloat16, float32 or float64. The next tokens.
        conv_state: r[B,D,L], or r[rows,D,L] with conv_state_indices, L >= W-1, dtype of x; any strides.
            Written to.
        weight: r[D,W], W from 2 to 4, any float dtype.
        bias: r[D] or None.
        activation: None, "silu" or "swish" (the same).
        cache_seqlens: i[B], tokens that each sequence has had, >= 0: the state is a ring.
        conv_state_indices: i[B], row of conv_state for each entry of the batch, each row once. An entry
            with a negative index is left out: it gives 0 and changes no state.

    Returns:
        y of the shape of x.

    Raises:
        ValueError: A shape, device or activation does not fit; T = 0; an index beyond the state's rows or
            given twice (checked on the CPU and under PRISM_CHECK=1).
        TypeError: A dtype does not fit.

    Example:
        >>> state, w = torch.zeros(2, 8, 3), torch.randn(8, 4)
        >>> y = causal_conv1d_update(torch.ones(2, 8), state, w, activation="silu")
        >>> y.shape, state[0, 0]
        (torch.Size([2, 8]), tensor([0., 0., 1.]))

    Source: decoding in Mamba (Gu and Dao 2023, section 3.4); interface of causal-conv1d 1.6.
    """
    tokens = x[..., None] if x.ndim == 2 else x
    _check_layout(UPDATE, tokens, weight)
    checks.check_choice(UPDATE, "activation", activation, ACTIVATIONS)
    check_convolution(UPDATE, tokens.mT, weight, bias, activation and "silu", None, None)
    _check_state(tokens, conv_state, weight, conv_state_indices)
    for name, index in {"cache_seqlens": cache_seqlens, "conv_state_indices": conv_state_indices}.items():
        if index is not None:
            _check_index(UPDATE, name, index, x, (x.shape[0],), "[B]")
    args = (tokens, conv_state, weight, bias, cache_seqlens, conv_state_indices)
    path = choose_impl(UPDATE, None, x.device)
    y = causal_conv1d_state_update(*args, "silu" if activation else "none", path)
    return y[..., 0] if x.ndim == 2 else y


def _check_layout(op: str, x: Tensor, weight: Tensor) -> None:
    checks.check_rank(op, "x", x, "[B, D, T]")
    checks.check_rank(op, "weight", weight, "[D, W]")
    shape, advice = (x.shape[0], weight.shape[0], x.shape[2]), "Inputs are [B, D, T]: channels before time."
    checks.check_shape(op, "x", x, shape, "[B, D, T]", advice)


def _check_index(op: str, name: str, index: Tensor, x: Tensor, shape: tuple[int, ...], axes: str) -> None:
    checks.check_dtype(op, name, index, INDICES, "Use `.to(torch.int32)`.")
    checks.check_shape(op, name, index, shape, axes, "One index each.")
    checks.check_device(op, **{"x": x, name: index})


def _check_state(x: Tensor, conv_state: Tensor, weight: Tensor, rows: Tensor | None) -> None:
    checks.check_rank(UPDATE, "conv_state", conv_state, "[B, D, L]")
    checks.check_same(UPDATE, x=x, conv_state=conv_state)
    checks.check_device(UPDATE, x=x, conv_state=conv_state)
    count, _, L = conv_state.shape
    shape = (x.shape[0] if rows is None else count, x.shape[1], L)
    advice = "Name the rows of a larger state in conv_state_indices."
    checks.check_shape(UPDATE, "conv_state", conv_state, shape, "[B, D, L]", advice)
    if weight.shape[1] - 1 > L:
        expected, advice = f"`conv_state` with L >= W - 1 = {weight.shape[1] - 1}", "Keep more inputs."
        checks.fail(UPDATE, expected, f"L = {L}", advice)
