"""The public function that keeps states on the way: check, choose a path, call."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._core import checks
from .._core.runtime import accumulate_dtype
from . import checkpoints_op
from .api import Inputs, Options, prepare, reference
from .reference import placed

OP = checkpoints_op.NAME


class GatedDeltaRuleCheckpointsOutput(NamedTuple):
    """What the gated delta rule returns with checkpoints; `first_checkpoints` is None unless packed."""

    o: Tensor
    final_state: Tensor
    checkpoints: Tensor
    first_checkpoints: Tensor | None


def chunk_gated_delta_rule_with_checkpoints(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    every: int,
    checkpoint_dtype: torch.dtype | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: str | None = None,
) -> GatedDeltaRuleCheckpointsOutput:
    """Run the gated delta rule over a sequence and keep its state every so many tokens; for prefix caching.

    What `chunk_gated_delta_rule` computes, and the states on the way, which it has on chip anyway::

        checkpoints[:, j] = M after (j + 1) every tokens,    j < T // every

    A run over the tokens that follow, with a checkpoint as `initial_state`, continues this one. Where a
    sequence ends within an interval, there is no checkpoint at its end: that is `final_state`.

    Numerics: as `chunk_gated_delta_rule`, `o` and `final_state` bit for bit with the `chunk_size` that is
    used here, the largest of 16, 32 and 64 that divides `every`. First-order gradients flow back from `o`,
    `final_state` and `checkpoints`.

    Args:
        q, k, v, g, beta: As in `chunk_gated_delta_rule`: r[B,T,H,K] twice, r[B,T,HV,V], r[B,T,HV] twice.
        every: Tokens from one checkpoint to the next, a multiple of 16; multiples of 64 are fastest.
        checkpoint_dtype: Floating dtype to round the checkpoints to. None: float32 (float64 for float64
            inputs), from which a run continues exactly.
        scale, initial_state, use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias,
            use_beta_sigmoid_in_kernel, allow_neg_eigval: As in `chunk_gated_delta_rule`.
        state_v_first: States, checkpoints among them, have values before keys.
        cu_seqlens: Boundaries of S sequences packed into one row, i[S+1] from 0; B must be 1.
        impl: 'triton', 'torch' or 'reference'. None: 'triton' for CUDA tensors, 'torch' for others.

    Returns:
        `(o, final_state, checkpoints, first_checkpoints)`: o r[B,T,HV,V] in the dtype of v; final_state
        r[B or S,HV,K,V]; checkpoints r[B,T//every,HV,K,V]. Packed, those of sequence s are
        `checkpoints[0, first_checkpoints[s]:]`, one for each `every` tokens that it has in full:
        `cu_seqlens.diff() // every`. first_checkpoints i[S] is `cu_seqlens[:-1] // every`, so nothing waits
        for the device; entries between the sequences' are 0. None unless packed.

    Raises:
        ValueError: A shape, value, size or device that does not fit.
        TypeError: A dtype that does not fit.
        NotImplementedError: A valid call that the 'triton' path does not cover.

    Example:
        >>> q, k = torch.randn(2, 1, 100, 4, 32)
        >>> v, new = torch.randn(1, 100, 4, 64), torch.randn(1, 36, 4, 64)
        >>> run = chunk_gated_delta_rule_with_checkpoints(q, k, v, every=32, use_qk_l2norm_in_kernel=True)
        >>> again = chunk_gated_delta_rule_with_checkpoints(  # from token 64 on, with other values
        ...     q[:, 64:], k[:, 64:], new, every=32, initial_state=run.checkpoints[:, 1],
        ...     use_qk_l2norm_in_kernel=True)
        >>> run.checkpoints.shape, again.checkpoints.shape
        (torch.Size([1, 3, 4, 32, 64]), torch.Size([1, 1, 4, 32, 64]))

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", ICLR 2025 (arXiv 2412.06464), section 3.
    """
    check_every(every)
    if checkpoint_dtype not in (None, *checks.FLOATS):
        names = ", ".join(str(d).removeprefix("torch.") for d in checks.FLOATS)
        advice = "None is the dtype that states are computed in."
        checks.fail(OP, f"`checkpoint_dtype` {names} or None", repr(checkpoint_dtype), advice, TypeError)
    options = Options(
        scale,
        True,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        state_v_first,
        checkpoints_op.chunk_of(every),
        impl,
    )
    call = prepare(OP, Inputs(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias), options)
    dtype = checkpoint_dtype or accumulate_dtype(q.dtype)
    first = None if cu_seqlens is None else cu_seqlens[:-1] // every
    x, *how, save, path = call
    if path == "reference":
        kept: dict[tuple[int, int], Tensor] = {}
        o, final = reference(OP, call, every, kept)
        checkpoints = placed(kept, v.shape[0], v.shape[1], final, every, call.v_first).to(dtype)
        return GatedDeltaRuleCheckpointsOutput(o, final, checkpoints, first)
    o, final, checkpoints, *_ = checkpoints_op.forward(*x, *how, every, save, dtype, path)
    return GatedDeltaRuleCheckpointsOutput(o, final, checkpoints, first)


def check_every(every: object) -> None:
    """States are kept at ends of chunks, of 16 tokens at least."""
    if type(every) is not int or every < 1 or every % checkpoints_op.SHORTEST:
        advice = "For states after every single token: gated_delta_rule_step with output_snapshots=True."
        expected = f"`every` a positive multiple of {checkpoints_op.SHORTEST}"
        got = f"one of shape {tuple(every.shape)}" if isinstance(every, Tensor) else repr(every)
        wrong = TypeError if type(every) is not int else ValueError
        checks.fail(OP, expected, got, advice, wrong)
