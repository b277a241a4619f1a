"""Custom ops of decoding: `step` returns new states, `step_inplace` writes them where they are.

Only the first has gradients: those of the form token by token, on the states that the rows of the batch name.
"""

from typing import Any

import torch
from torch import Tensor

from .._core import checks
from .._core.runtime import accumulate_dtype, without_autocast
from .op import check_values, recurrent_bwd

NAME = "gated_delta_rule_step"


def check_step_values(
    state: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    l2norm: bool,
    beta_top: int,
) -> None:
    """Checks that read data; see `checks.values_are_checked`. Rows without a state may hold anything."""
    g, beta = given_gates(v, g, beta)
    if indices is not None:
        live = indices >= 0
        named = indices[live]
        if named.numel() and named.max() >= state.shape[0]:
            expected = f"`state_indices` below {state.shape[0]}, the number of states"
            advice = "Pass -1 for rows of the batch that have no state."
            checks.fail(NAME, expected, str(named.max().item()), advice)
        if named.unique().numel() < named.numel():
            advice = "Two rows cannot move one state. Pass -1 for rows of the batch that have no state."
            checks.fail(NAME, "`state_indices` that differ", str(indices.tolist()), advice)
        k, g, beta = k[live], g[live], beta[live]
    check_values(NAME, k, g, beta, None, A_log, dt_bias, l2norm, beta_top)


def given_gates(v: Tensor, g: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both, where None is no decay and a strength of 1."""
    wide = accumulate_dtype(v.dtype)
    g = v.new_zeros(v.shape[:3], dtype=wide) if g is None else g
    return g, v.new_ones(v.shape[:3], dtype=wide) if beta is None else beta


def advance(
    state: Tensor,
    new: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    snapshots: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Write states after the tokens into `new`, which may be `state`; return o and snapshots (or empty)."""
    gate = (g, beta, A_log, dt_bias)
    if checks.values_are_checked(k):
        check_step_values(state, k, v, *gate, indices, l2norm, beta_top)
    with without_autocast(q.device):
        if impl == "triton":
            from .launch_decode import step as run
        else:
            from .decode_torch import step as run
        given = (state, new, q, k, v, *gate, indices)
        return run(*given, scale, l2norm, beta_top, v_first, snapshots)


@torch.library.custom_op("prism_kernels::gated_delta_rule_step", mutates_args=())
def step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    snapshots: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, all states, and the states after each token (or an empty tensor)."""
    contiguous = torch.contiguous_format
    new = torch.empty_like(state, memory_format=contiguous)
    if indices is not None:
        new.copy_(state)
    given = (q, k, v, g, beta, A_log, dt_bias, indices, scale, l2norm, beta_top, v_first, snapshots, impl)
    o, taken = advance(state, new, *given)
    return o, new, taken


@torch.library.custom_op("prism_kernels::gated_delta_rule_step_inplace", mutates_args={"state"})
def step_inplace(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
    snapshots: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return o, and the states after each token (or an empty tensor). No gradients."""
    given = (q, k, v, g, beta, A_log, dt_bias, indices, scale, l2norm, beta_top, v_first, snapshots, impl)
    return advance(state, state, *given)


def fake_outputs(state: Tensor, v: Tensor, snapshots: bool) -> tuple[Tensor, Tensor]:
    """o and snapshots."""
    taken = (*v.shape[:3], *state.shape[2:]) if snapshots else (0,)
    return v.new_empty(v.shape), state.new_empty(taken)


@step.register_fake
def _(
    state, q, k, v, g, beta, A_log, dt_bias, indices, scale, l2norm, beta_top, v_first, snapshots, impl
):  # fmt: skip
    o, taken = fake_outputs(state, v, snapshots)
    return o, state.new_empty(state.shape), taken


@step_inplace.register_fake
def _(
    state, q, k, v, g, beta, A_log, dt_bias, indices, scale, l2norm, beta_top, v_first, snapshots, impl
):  # fmt: skip
    return fake_outputs(state, v, snapshots)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.scale, ctx.l2norm, ctx.beta_top, ctx.v_first, _, ctx.impl = inputs[9:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dnew: Tensor | None, _snapshots: Tensor | None) -> tuple:
    state, q, k, v, g, beta, A_log, dt_bias, indices = ctx.saved_tensors
    no_g, no_beta, S = g is None, beta is None, state.shape[0]
    g, beta = given_gates(v, g, beta)
    do = torch.zeros_like(v) if do is None else do
    dnew = torch.zeros_like(state) if dnew is None else dnew
    first, dfinal, wide = state, dnew, accumulate_dtype(q.dtype)
    if indices is not None:
        live, at = indices >= 0, indices.clamp(min=0).long()
        first, dfinal = state[at], of_live(live, dnew[at])
        do, q, k, v, g, beta = (of_live(live, x) for x in (do, q, k, v, g, beta))
    dq, dk, dv, dg, dbeta, dfirst, dA_log, ddt_bias = recurrent_bwd(
        do, dfinal.to(wide), q, k, v, g, beta, first.to(wide), None, A_log, dt_bias,
        [v.new_empty(0, dtype=wide)],
        ctx.scale, ctx.l2norm, ctx.beta_top, ctx.v_first, ctx.impl,
    )  # fmt: skip
    dstate = dfirst.to(state.dtype)
    if indices is not None:  # rows without a state write to one that is then cut off
        slot = torch.where(live, at, S)
        dstate = torch.cat([dnew, dnew[:1]]).index_copy(0, slot, dstate)[:S]
    gates_in = (None if no_g else dg, None if no_beta else dbeta)
    rates = (None if A_log is None else dA_log, None if dt_bias is None else ddt_bias)
    return dstate, dq, dk, dv, *gates_in, *rates, *[None] * 7


def of_live(live: Tensor, x: Tensor) -> Tensor:
    """Rows of a batch that have a state; 0 in the others."""
    return torch.where(live.view(-1, *[1] * (x.ndim - 1)), x, 0)


step.register_autograd(_backward, setup_context=_setup_context)
