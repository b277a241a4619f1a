"""The public function of decoding: check, choose a path, call."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._core import checks
from .._core.impl import choose_impl
from .._core.runtime import interpreting
from . import decode_op
from .api import Inputs, Options, check
from .reference import gated_delta_rule_step_reference

OP = decode_op.NAME


class GatedDeltaRuleStepOutput(NamedTuple):
    """What a step returns; `snapshots` is None unless asked for."""

    o: Tensor
    state: Tensor
    snapshots: Tensor | None


def gated_delta_rule_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    state_indices: Tensor | None = None,
    output_snapshots: bool = False,
    inplace: bool = False,
    impl: str | None = None,
) -> GatedDeltaRuleStepOutput:
    """Advance the gated delta rule by one token or a few, against a pool of states: for serving.

        M <- exp(g_t) (M - beta_t k_t (k_t^T M)) + beta_t k_t v_t^T,    o_t = scale q_t^T M

    T calls of one token equal one of T tokens, and `fused_recurrent_gated_delta_rule`. On the 'triton' path
    one kernel reads each state once and writes it once, gates and norms included. Nothing waits for the
    device: a CUDA graph can hold it.

    Numerics: arithmetic in float32 (float64 for float64 inputs), also between the tokens of a call; a state
    of 16 bits is rounded when it is stored. Finite for every g <= 0 and |k|^2 beta <= 2. Deterministic bit
    for bit. First-order gradients with inplace=False, except of `snapshots`.

    Args:
        state: The pool, r[S,HV,K,V]; without `state_indices` S = B. float32, bfloat16, float16 or float64.
        q: Queries, r[B,T,H,K], K at most 256; T is 1, or the number of draft tokens.
        k: Keys, r[B,T,H,K].
        v: Values, r[B,T,HV,V], V at most 256, HV a multiple of H. q, k and v share a dtype.
        g, beta: Log decay and write strength, r[B,T,HV]. None: no decay; 1.
        scale: Factor of the output. None: K ** -0.5.
        use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel,
            allow_neg_eigval: As in `chunk_gated_delta_rule`.
        state_v_first: States and snapshots have values before keys: r[S,HV,V,K].
        state_indices: Which state each row of the batch continues, i[B]; all different. A negative one is
            padding: it moves no state, and gives 0. None: row b has state b.
        output_snapshots: Return the state after every token, to go back to where draft tokens were refused:
            `state[state_indices] = snapshots[rows, accepted - 1]`.
        inplace: Write the new states into `state`, of any strides; other states are not touched. Without it a
            new pool is returned, which with `state_indices` costs a copy of the whole. No gradients in place.
        impl: 'triton', 'torch' or 'reference'. None: 'triton' for CUDA tensors, 'torch' for others.

    Returns:
        `(o, state, snapshots)`: o r[B,T,HV,V] in the dtype of v; the pool after the tokens, with `inplace`
        the tensor given; the states after each token r[B,T,HV,K,V] in the dtype of `state`, or None.

    Raises:
        ValueError: A shape, value, size or device that does not fit; an index beyond the pool or given twice
            (found on the CPU and under PRISM_CHECK=1; else one beyond the pool counts as padding); in place,
            a gradient asked for or a `state` that overlaps itself.
        TypeError: A dtype that does not fit.
        NotImplementedError: float64 on the 'triton' path of a GPU.

    Example:
        >>> pool, slots = torch.zeros(8, 4, 32, 64), torch.tensor([5, -1])
        >>> (q, k), v = torch.randn(2, 2, 1, 4, 32), torch.randn(2, 1, 4, 64)
        >>> o, *_ = gated_delta_rule_step(pool, q, k, v, state_indices=slots, inplace=True)
        >>> o.shape, pool[5].any().item(), o[1].any().item()
        (torch.Size([2, 1, 4, 64]), True, False)

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", ICLR 2025 (arXiv 2412.06464), equation 10.
    """
    options = Options(
        scale,
        False,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        state_v_first,
        None,
        impl,
    )
    x = Inputs(q, k, v, g, beta, None, None, A_log, dt_bias)
    check(OP, x, options)
    check_pool(state, x, state_indices, bool(state_v_first))
    if inplace:
        check_inplace(state, x)
    lacks = ["float64"] if q.dtype == torch.float64 and not interpreting() else []
    path = choose_impl(OP, impl, q.device, triton_lacks=lacks)
    factor = k.shape[-1] ** -0.5 if scale is None else float(scale)
    l2norm, v_first = bool(use_qk_l2norm_in_kernel), bool(state_v_first)
    beta_top = (2 if allow_neg_eigval else 1) if use_beta_sigmoid_in_kernel else 0
    if path == "reference":
        o, new, snapshots = reference(state, x, state_indices, factor, l2norm, beta_top, v_first)
        new = state.copy_(new) if inplace else new
        return GatedDeltaRuleStepOutput(o, new, snapshots.detach() if output_snapshots else None)
    given = (q, k, v, g, beta, A_log, dt_bias, state_indices)
    how = (factor, l2norm, beta_top, v_first, bool(output_snapshots), path)
    if inplace:
        o, snapshots = decode_op.step_inplace(state, *given, *how)
        new = state
    else:
        o, new, snapshots = decode_op.step(state, *given, *how)
    return GatedDeltaRuleStepOutput(o, new, snapshots.detach() if output_snapshots else None)


def reference(
    state: Tensor,
    x: Inputs,
    indices: Tensor | None,
    scale: float,
    l2norm: bool,
    beta_top: int,
    v_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, called directly so that it can be differentiated any number of times."""
    if checks.values_are_checked(x.q):
        gate = (x.g, x.beta, x.A_log, x.dt_bias)
        decode_op.check_step_values(state, x.k, x.v, *gate, indices, l2norm, beta_top)
    g, beta = decode_op.given_gates(x.v, x.g, x.beta)
    return gated_delta_rule_step_reference(
        state,
        x.q,
        x.k,
        x.v,
        g,
        beta,
        scale,
        l2norm,
        state_indices=indices,
        A_log=x.A_log,
        dt_bias=x.dt_bias,
        use_beta_sigmoid_in_kernel=beta_top > 0,
        allow_neg_eigval=beta_top == 2,
        state_v_first=v_first,
    )


def check_pool(state: Tensor, x: Inputs, indices: Tensor | None, v_first: bool) -> None:
    """The states, and which of them the rows name; metadata only."""
    (B, _, HV, V), K = x.v.shape, x.k.shape[3]
    layout, widths = ("[S, HV, V, K]", (V, K)) if v_first else ("[S, HV, K, V]", (K, V))
    checks.check_rank(OP, "state", state, layout)
    checks.check_dtype(OP, "state", state, checks.FLOATS)
    order = "values before keys with state_v_first=True" if v_first else "keys before values"
    advice = f"One state per value head, {order}; S = B unless state_indices names one for each row."
    S = B if indices is None else state.shape[0]
    checks.check_shape(OP, "state", state, (S, HV, *widths), layout, advice)
    checks.check_device(OP, q=x.q, state=state, state_indices=indices)
    if indices is not None:
        checks.check_dtype(
            OP, "state_indices", indices, (torch.int32, torch.int64), "Use `.to(torch.int32)`."
        )
        checks.check_shape(
            OP, "state_indices", indices, (B,), "[B]", "One per row of the batch, -1 for none."
        )
        if S == 0:
            checks.fail(OP, "at least one state in `state`", "S = 0", "Leave room for one state.")


def check_inplace(state: Tensor, x: Inputs) -> None:
    """Nothing asks for a gradient, and no two entries of the pool are one."""
    given = {"state": state, **x._asdict()}
    asking = [n for n, t in given.items() if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and asking:
        advice = (
            "Call it under torch.no_grad(), or use fused_recurrent_gated_delta_rule, which has a backward."
        )
        checks.fail(OP, "no gradient for inplace=True", f"`{asking[0]}` that requires one", advice)
    checks.check_separate(OP, "state", state)
