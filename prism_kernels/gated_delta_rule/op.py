"""Opaque custom ops: a pair (forward, backward) per public function. Launchers are in launch*.py.

Every path other than the reference is one node to autograd, torch.compile and export. A forward op returns
(o, final_state) and four residuals, empty where the path or an inference call has no use for them.

Ops take g and beta as the caller gave them, raw or not, and states in the caller's layout. Each op makes them
what the paths compute with first (`gates.effective`, `inner_state`), and goes back at its end (`outer_*`).
"""

import warnings

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .._core import checks
from .._core.autograd import first_order_only
from .._core.runtime import accumulate_dtype, without_autocast
from . import gates, torch_impl

Shape = tuple[tuple[int, ...], torch.dtype]
Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def check_values(
    op: str,
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    l2norm: bool,
    beta_top: int,
) -> None:
    """Checks that read data; see `checks.values_are_checked`."""
    if cu_seqlens is not None:
        checks.check_cu_seqlens_values(op, cu_seqlens, k.shape[1])
    if A_log is None:
        checks.check_not_positive(op, "g", g, "It is the natural logarithm of the decay: `g = alpha.log()`.")
    else:
        rate = A_log.detach().to(accumulate_dtype(k.dtype)).exp()
        for name, x in (("exp(A_log)", rate), ("dt_bias", dt_bias)):
            if x is not None and x.isinf().any():
                checks.fail(op, f"a finite `{name}`", "an infinite one", "Is it what was trained?")
    if checks.debugging():
        warn_of_growth(op, k, gates.strength(beta, beta_top, accumulate_dtype(k.dtype)), cu_seqlens, l2norm)


def warn_of_growth(op: str, k: Tensor, beta: Tensor, cu_seqlens: Tensor | None, l2norm: bool) -> None:
    """Warn if beta |k|^2 passes 2, beyond which writes overshoot and the state grows from token to token."""
    T = k.shape[1] if cu_seqlens is None else int(cu_seqlens[-1])
    step = beta[:, :T].detach()
    if not l2norm:
        squares = k[:, :T].detach().to(step.dtype).square().sum(-1)
        step = step * squares.repeat_interleave(step.shape[2] // k.shape[2], 2)
    largest = step.nan_to_num(0.0).amax().item() if step.numel() else 0.0
    if largest > 2 + 16 * torch.finfo(k.dtype).eps:  # unit keys, rounded
        advice = "The state grows without bound. Pass keys of length 1, or use_qk_l2norm_in_kernel=True."
        message = f"{op}: expected beta |k|^2 <= 2, got a largest value of {largest:.6g}. {advice}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, v_first: bool = False) -> tuple[int, ...]:
    """[B or S, HV, K, V], or [B or S, HV, V, K]."""
    S = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (S, v.shape[2], *((v.shape[3], q.shape[3]) if v_first else (q.shape[3], v.shape[3])))


def inner_state(state: Tensor | None, v_first: bool) -> Tensor | None:
    """Keys before values; a view."""
    return state.mT if v_first and state is not None else state


def outer_state(state: Tensor, v_first: bool) -> Tensor:
    """The layout that the caller asked for; contiguous and fresh."""
    return state.mT.clone(memory_format=torch.contiguous_format) if v_first else state


def chunk_residuals(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, l2norm: bool, C: int, impl: str
) -> list[Shape]:
    """Shapes and dtypes of what the chunked forward keeps for its backward."""
    (B, T, HV, V), K, wide = v.shape, q.shape[3], accumulate_dtype(q.dtype)
    none = ((0,), wide)
    if impl == "triton":
        from .launch import residuals

        return residuals(q, v, cu_seqlens, l2norm, C)
    C = torch_impl.inner_chunk(C, K, V)
    steps = (T + C - 1) // C
    M = B * HV * steps if cu_seqlens is None else HV * (T // C + cu_seqlens.shape[0] - 1)
    return [((M, C, C), wide), ((M, C, V), wide), ((M, K, V), wide), none]


def recurrent_residuals(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, impl: str) -> list[Shape]:
    """Shapes and dtypes of what the token-by-token forward keeps for its backward."""
    (S, HV, K, V), wide = state_shape(q, v, cu_seqlens), accumulate_dtype(q.dtype)
    none = ((0,), wide)
    if impl == "triton":
        from .launch import rows_of_chunks
        from .launch_recurrent import EVERY

        rows = rows_of_chunks(v.shape[0], v.shape[1], EVERY, cu_seqlens)
        return [((rows * HV, K, V), wide), none, none, none]
    every = torch_impl.CHECKPOINT
    return [((S * HV * ((v.shape[1] + every - 1) // every), K, V), wide), none, none, none]


def empty_residuals(like: Tensor, shapes: list[Shape], save: bool) -> list[Tensor]:
    """Room for residuals, or as many empty tensors."""
    return [like.new_empty(shape if save else (0,), dtype=dtype) for shape, dtype in shapes]


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The kernels' strides are constants."""
    return [None if x is None else x.contiguous() for x in tensors]


def run_chunks(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    chunk_size: int,
    save: bool,
    impl: str,
    checkpoints: Tensor | None = None,
    every: int = 0,
) -> Forward:
    """Chunked forward; fills `checkpoints`, keys before values, with the state after each `every` tokens."""
    if checks.values_are_checked(k):
        check_values(op, k, g, beta, cu_seqlens, A_log, dt_bias, l2norm, beta_top)
    with without_autocast(q.device):
        g, beta = gates.effective(g, beta, A_log, dt_bias, beta_top, accumulate_dtype(q.dtype))
        state, kept_states = inner_state(initial_state, v_first), (checkpoints, every)
        if impl == "triton":
            from . import launch

            q, k, v, g, beta, state = contiguous(q, k, v, g, beta, state)
            # What the kernels pass on to each other is needed here even when it is not kept.
            kept = empty_residuals(g, chunk_residuals(q, v, cu_seqlens, l2norm, chunk_size, impl), True)
            o, final = launch.chunk_forward(
                q, k, v, g, beta, state, cu_seqlens, kept, scale, l2norm, *kept_states
            )
            return o, outer_state(final, v_first), *(kept if save else [g.new_empty(0) for _ in kept])
        o, final, saved = torch_impl.forward(
            q, k, v, g, beta, state, cu_seqlens, scale, l2norm, chunk_size, save, *kept_states
        )
        return o, outer_state(final, v_first), *saved, g.new_empty(0)


@torch.library.custom_op("prism_kernels::chunk_gated_delta_rule_fwd", mutates_args=())
def chunk_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    chunk_size: int,
    save: bool,
    impl: str,
) -> Forward:
    """Chunked forward."""
    given = (q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias)
    how = (scale, l2norm, beta_top, v_first, chunk_size, save, impl)
    return run_chunks("chunk_gated_delta_rule", *given, *how)


@chunk_fwd.register_fake
def _(
    q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias,
    scale, l2norm, beta_top, v_first, chunk_size, save, impl,
):  # fmt: skip
    residuals = chunk_residuals(q, v, cu_seqlens, l2norm, chunk_size, impl)
    return fake_outputs(q, v, cu_seqlens, v_first, residuals, save)


def run_chunks_back(
    do: Tensor,
    dfinal: Tensor | None,
    dcheckpoints: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    residuals: list[Tensor],
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    chunk_size: int,
    impl: str,
    every: int = 0,
) -> Backward:
    """Gradients of all that is differentiable, for a forward with or without checkpoints."""
    raw = (g, beta, A_log, dt_bias, beta_top)
    if residuals[0].numel() == 0:
        again = (scale, l2norm, beta_top, v_first, chunk_size, True, impl)
        residuals = chunk_fwd(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias, *again)[2:]
    with without_autocast(q.device):
        g, beta = gates.effective(*raw, accumulate_dtype(q.dtype))
        state, dfinal, dkept = (inner_state(x, v_first) for x in (initial_state, dfinal, dcheckpoints))
        dkept, every = (None, 0) if dkept is None else (dkept.contiguous(), every)
        if impl == "triton":
            from . import launch

            do, dfinal, q, k, v, state = contiguous(do, dfinal, q, k, v, state)
            inner = launch.chunk_backward(
                do, dfinal, q, k, v, g, state, cu_seqlens, residuals, scale, l2norm, dkept, every
            )
        else:
            saved = torch_impl.Saved(*residuals[:3])
            inner = torch_impl.backward(
                do, dfinal, q, k, v, g, beta, cu_seqlens, saved, scale, l2norm, chunk_size, dkept, every
            )
        return outer_gradients(inner, raw, v_first)


@torch.library.custom_op("prism_kernels::chunk_gated_delta_rule_bwd", mutates_args=())
def chunk_bwd(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    residuals: list[Tensor],
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    chunk_size: int,
    impl: str,
) -> Backward:
    """Gradients of all that is differentiable."""
    given = (q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias)
    how = (residuals, scale, l2norm, beta_top, v_first, chunk_size, impl)
    return run_chunks_back(do, dfinal, None, *given, *how)


@chunk_bwd.register_fake
def _(
    do, dfinal, q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias,
    residuals, scale, l2norm, beta_top, v_first, chunk_size, impl,
):  # fmt: skip
    return fake_gradients(q, k, v, g, beta, cu_seqlens, A_log, dt_bias, v_first)


@torch.library.custom_op("prism_kernels::fused_recurrent_gated_delta_rule_fwd", mutates_args=())
def recurrent_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    save: bool,
    impl: str,
) -> Forward:
    """Forward, token by token."""
    op = "fused_recurrent_gated_delta_rule"
    if checks.values_are_checked(k):
        check_values(op, k, g, beta, cu_seqlens, A_log, dt_bias, l2norm, beta_top)
    with without_autocast(q.device):
        g, beta = gates.effective(g, beta, A_log, dt_bias, beta_top, accumulate_dtype(q.dtype))
        state = inner_state(initial_state, v_first)
        if impl == "triton":
            from . import launch_recurrent

            q, k, v, g, beta, state = contiguous(q, k, v, g, beta, state)
            kept = empty_residuals(g, recurrent_residuals(q, v, cu_seqlens, impl), save)
            o, final = launch_recurrent.forward(q, k, v, g, beta, state, cu_seqlens, kept[0], scale, l2norm)
            return o, outer_state(final, v_first), *kept
        o, final, checkpoints = torch_impl.recurrent_forward(
            q, k, v, g, beta, state, cu_seqlens, scale, l2norm, save
        )
        return o, outer_state(final, v_first), checkpoints, *(g.new_empty(0) for _ in range(3))


@recurrent_fwd.register_fake
def _(
    q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias,
    scale, l2norm, beta_top, v_first, save, impl,
):  # fmt: skip
    return fake_outputs(q, v, cu_seqlens, v_first, recurrent_residuals(q, v, cu_seqlens, impl), save)


@torch.library.custom_op("prism_kernels::fused_recurrent_gated_delta_rule_bwd", mutates_args=())
def recurrent_bwd(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    residuals: list[Tensor],
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    impl: str,
) -> Backward:
    """Gradients of all that is differentiable."""
    raw = (g, beta, A_log, dt_bias, beta_top)
    if residuals[0].numel() == 0:
        again = (scale, l2norm, beta_top, v_first, True, impl)
        residuals = recurrent_fwd(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias, *again)[2:]
    with without_autocast(q.device):
        g, beta = gates.effective(*raw, accumulate_dtype(q.dtype))
        dfinal = inner_state(dfinal, v_first)
        if impl == "triton":
            from . import launch_recurrent

            do, dfinal, q, k, v, g, beta = contiguous(do, dfinal, q, k, v, g, beta)
            inner = launch_recurrent.backward(
                do, dfinal, q, k, v, g, beta, cu_seqlens, residuals[0], scale, l2norm
            )
        else:
            inner = torch_impl.recurrent_backward(
                do, dfinal, q, k, v, g, beta, cu_seqlens, residuals[0], scale, l2norm
            )
        return outer_gradients(inner, raw, v_first)


@recurrent_bwd.register_fake
def _(
    do, dfinal, q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias,
    residuals, scale, l2norm, beta_top, v_first, impl,
):  # fmt: skip
    return fake_gradients(q, k, v, g, beta, cu_seqlens, A_log, dt_bias, v_first)


def outer_gradients(inner: tuple[Tensor, ...], raw: tuple, v_first: bool) -> Backward:
    """Gradients of what the caller gave, from those of what the paths computed with."""
    dq, dk, dv, dg, dbeta, dstate = inner
    dg, dbeta, dA_log, ddt_bias = gates.raw_gradients(dg, dbeta, *raw)
    return dq, dk, dv, dg, dbeta, outer_state(dstate, v_first), dA_log, ddt_bias


def fake_outputs(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, v_first: bool, residuals: list[Shape], save: bool
) -> Forward:
    """Contiguous outputs and residuals."""
    final = q.new_empty(state_shape(q, v, cu_seqlens, v_first), dtype=accumulate_dtype(q.dtype))
    return v.new_empty(v.shape), final, *empty_residuals(q, residuals, save)


def fake_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    v_first: bool,
) -> Backward:
    """Contiguous gradients; empty ones for what is not given."""
    wide = accumulate_dtype(q.dtype)
    like = [x.new_empty(x.shape) for x in (q, k, v, g, beta)]
    dstate = q.new_empty(state_shape(q, v, cu_seqlens, v_first), dtype=wide)
    rest = (q.new_empty(0, dtype=wide) if x is None else x.new_empty(x.shape) for x in (A_log, dt_bias))
    return *like, dstate, *rest


TENSORS = 9  # arguments of a forward op before its options


def register_gradients(
    name: str, forward: CustomOpDef, backward: CustomOpDef, outputs: int = 2, forward_only: int = 1
) -> None:
    """First-order autograd of a forward op, for its first `outputs` results, from its backward op. The last
    option is `impl`; the `forward_only` ones before it (`save`) are not for the backward.
    """

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:TENSORS], *output[outputs:])
        ctx.options = inputs[TENSORS:]
        ctx.set_materialize_grads(False)

    def gradients(ctx, do, *others):
        inputs, residuals = ctx.saved_tensors[:TENSORS], list(ctx.saved_tensors[TENSORS:])
        options = (*ctx.options[: -forward_only - 1], ctx.options[-1])
        if do is None:
            do = torch.zeros_like(inputs[2])
        grads = backward(do, *others[: outputs - 1], *inputs, residuals, *options)
        *grads, dstate, dA_log, ddt_bias = grads
        _, _, _, _, _, initial_state, _, A_log, dt_bias = inputs
        optional = ((initial_state, dstate), (None, None), (A_log, dA_log), (dt_bias, ddt_bias))
        grads += [None if given is None else grad for given, grad in optional]
        return *grads, *[None] * len(ctx.options)

    forward.register_autograd(gradients, setup_context=setup_context)
    first_order_only(backward, name)


register_gradients("chunk_gated_delta_rule", chunk_fwd, chunk_bwd)
register_gradients("fused_recurrent_gated_delta_rule", recurrent_fwd, recurrent_bwd)
