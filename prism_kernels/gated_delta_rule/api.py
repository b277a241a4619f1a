"""The public functions: check, choose a path, call."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .._core import checks
from .._core.impl import choose_impl
from .._core.runtime import accumulate_dtype, interpreting
from . import op as ops
from .reference import gated_delta_rule_reference

LARGEST = 256


class GatedDeltaRuleOutput(NamedTuple):
    """What the gated delta rule returns; unpacks like a pair."""

    o: Tensor
    final_state: Tensor | None


class Inputs(NamedTuple):
    """Tensors of a call, in the order of the custom ops."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None


class Options(NamedTuple):
    """What else a call says; flags may be None, for False."""

    scale: float | None
    output_final_state: bool | None
    use_qk_l2norm_in_kernel: bool | None
    use_gate_in_kernel: bool | None
    use_beta_sigmoid_in_kernel: bool | None
    allow_neg_eigval: bool | None
    state_v_first: bool | None
    chunk_size: int | None  # None is token by token
    impl: str | None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    impl: str | None = None,
) -> GatedDeltaRuleOutput:
    """Run the gated delta rule over a sequence, chunk by chunk; for training and prefill.

    Per head, with M r[K,V] the state: decay the state, erase what it holds under the key, write the value::

        M_t = exp(g_t) (M_{t-1} - beta_t k_t (k_t^T M_{t-1})) + beta_t k_t v_t^T
        o_t = scale q_t^T M_t

    Names, order and meaning of the arguments are those of flash-linear-attention 0.6, so that swapping the
    import changes nothing; `chunk_size` beside its flags, and `impl`, are by keyword only.

    Numerics: states, gates, decays and sums in float32 (float64 for float64 inputs, all the way through); the
    'triton' path rounds operands of products to the dtype of `q`. Finite for every g <= 0 and for
    |k|^2 beta <= 2. Deterministic bit for bit, forward and backward; first-order gradients only.

    Args:
        q: Queries, r[B,T,H,K], K at most 256.
        k: Keys, r[B,T,H,K]; length one each, or see `use_qk_l2norm_in_kernel`.
        v: Values, r[B,T,HV,V], V at most 256, HV a multiple of H: value head j reads key head j // (HV // H).
            q, k and v share a dtype: float32, bfloat16, float16 or float64.
        g: Log decay (natural logarithm), r[B,T,HV], <= 0 and finite. None: no decay.
        beta: Write strength, r[B,T,HV], in [0, 2]. None: 1. Where beta |k|^2 passes 2 the state grows without
            bound; PRISM_CHECK=1 in the environment warns of it.
        scale: Factor of the output. None: K ** -0.5.
        initial_state: State before the first token, r[B,HV,K,V]; r[S,HV,K,V] with `cu_seqlens`. None: zero.
        output_final_state: Return the state after the last token too.
        use_qk_l2norm_in_kernel: Replace q and k by x rsqrt(sum x^2 + 1e-6) first.
        use_beta_sigmoid_in_kernel: Take beta as logits: the strength is sigmoid(beta).
        allow_neg_eigval: With the flag before, the strength is 2 sigmoid(beta).
        state_v_first: States, and their gradients, have values before keys: r[B or S,HV,V,K].
        cu_seqlens: Boundaries of S sequences packed into one row, i[S+1] from 0; B must be 1. Sequences may
            be empty. Tokens after the last boundary are padding: their output is 0.
        cu_seqlens_cpu: A copy of `cu_seqlens` on the host. Taken for the sake of a swap; nothing needs it.
        chunk_indices: Where each chunk lies, i[chunks,2], as flash-linear-attention prepares it. As before.
        cp_context: None; one sequence over several devices is not covered.
        use_gate_in_kernel: Take any g: the log decay is -exp(A_log) softplus(g + dt_bias).
        A_log: Logarithm of the gate's rate, r[HV]; its exponential is finite.
        dt_bias: Bias of the gate, r[HV], finite. None: 0.
        chunk_size: Tokens handled by matrix products at once: 16, 32 or 64. Changes rounding only.
        impl: 'triton', 'torch' or 'reference'. None: 'triton' for CUDA tensors, 'torch' for others.

    Returns:
        `(o, final_state)`: o r[B,T,HV,V] in the dtype of v; final_state like `initial_state` in float32
        (float64 for float64 inputs), or None unless asked for. First-order gradients of all floating inputs.

    Raises:
        ValueError: A shape, value, size or device that does not fit.
        TypeError: A dtype that does not fit.
        NotImplementedError: A valid call that the 'triton' path does not cover.

    Example:
        >>> q, k = torch.randn(2, 1, 100, 4, 32)
        >>> v, g, beta = torch.randn(1, 100, 4, 64), -torch.rand(1, 100, 4), torch.rand(1, 100, 4)
        >>> o, state = chunk_gated_delta_rule(
        ...     q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4, 32, 64]))

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", ICLR 2025 (arXiv 2412.06464), section 3.
    """
    op = "chunk_gated_delta_rule"
    if type(chunk_size) is not int or chunk_size not in (16, 32, 64):
        checks.check_choice(op, "chunk_size", chunk_size, [16, 32, 64])
    _check_unneeded(op, "cu_seqlens_cpu", cu_seqlens_cpu, cu_seqlens)
    _check_unneeded(op, "chunk_indices", chunk_indices, cu_seqlens)
    _refuse(op, "cp_context", cp_context, "one sequence over several devices")
    options = Options(
        scale,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        state_v_first,
        chunk_size,
        impl,
    )
    return _call(op, Inputs(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias), options)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    impl: str | None = None,
) -> GatedDeltaRuleOutput:
    """Run the gated delta rule token by token: for decoding and short sequences; has a backward.

    Arguments, results, numerics and errors are those of `chunk_gated_delta_rule`, which is faster on long
    sequences; all arithmetic here is in float32 (float64 for float64 inputs). The order of the arguments is
    that of flash-linear-attention here too: pass `beta` by name. `gk` and `gv`, decays per key and per value
    channel, must be None.

    Example:
        >>> q, k = torch.randn(2, 1, 1, 4, 32)
        >>> v, state = torch.randn(1, 1, 4, 64), torch.zeros(1, 4, 32, 64)
        >>> o, state = fused_recurrent_gated_delta_rule(
        ...     q, k, v, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 1, 4, 64])

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", ICLR 2025 (arXiv 2412.06464), equation 10.
    """
    op = "fused_recurrent_gated_delta_rule"
    _refuse(op, "gk", gk, "decays per key channel", "If it is the write strength, pass it as `beta=`.")
    _refuse(op, "gv", gv, "decays per value channel")
    options = Options(
        scale,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        state_v_first,
        None,
        impl,
    )
    return _call(op, Inputs(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias), options)


class Call(NamedTuple):
    """A checked call with its defaults filled in."""

    inputs: Inputs
    scale: float
    l2norm: bool
    beta_top: int
    v_first: bool
    save: bool
    impl: str


def prepare(op: str, x: Inputs, options: Options) -> Call:
    """Check, choose a path, fill in defaults."""
    check(op, x, options)
    impl = choose_impl(op, options.impl, x.q.device, triton_lacks=_triton_lacks(x.k))
    wide, per_token = accumulate_dtype(x.q.dtype), x.v.shape[:3]
    x = x._replace(
        g=x.v.new_zeros(per_token, dtype=wide) if x.g is None else x.g,
        beta=x.v.new_ones(per_token, dtype=wide) if x.beta is None else x.beta,
        initial_state=None if x.initial_state is None else x.initial_state.to(wide),
    )
    scale = x.k.shape[-1] ** -0.5 if options.scale is None else float(options.scale)
    l2norm, v_first = bool(options.use_qk_l2norm_in_kernel), bool(options.state_v_first)
    beta_top = (2 if options.allow_neg_eigval else 1) if options.use_beta_sigmoid_in_kernel else 0
    save = torch.is_grad_enabled() and any(t.requires_grad for t in x if t is not None)
    return Call(x, scale, l2norm, beta_top, v_first, save, impl)


def _call(op: str, x: Inputs, options: Options) -> GatedDeltaRuleOutput:
    """Either function."""
    call = prepare(op, x, options)
    x, *how, save, impl = call
    if impl == "reference":
        o, final = reference(op, call)
    elif options.chunk_size is None:
        o, final, *_ = ops.recurrent_fwd(*x, *how, save, impl)
    else:
        o, final, *_ = ops.chunk_fwd(*x, *how, options.chunk_size, save, impl)
    return GatedDeltaRuleOutput(o, final if options.output_final_state else None)


def reference(
    op: str, call: Call, every: int = 0, kept: dict[tuple[int, int], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, called directly so that it can be differentiated any number of times."""
    q, k, v, _, _, state, cu_seqlens, A_log, dt_bias = x = call.inputs
    scale, l2norm, beta_top, v_first = call[1:5]
    g, beta = cast(Tensor, x.g), cast(Tensor, x.beta)
    if checks.values_are_checked(q):
        ops.check_values(op, k, g, beta, cu_seqlens, A_log, dt_bias, l2norm, beta_top)
    return gated_delta_rule_reference(
        q,
        k,
        v,
        g,
        beta,
        scale,
        state,
        l2norm,
        cu_seqlens,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=beta_top > 0,
        allow_neg_eigval=beta_top == 2,
        state_v_first=v_first,
        every=every,
        kept=kept,
    )


def check(op: str, x: Inputs, options: Options) -> None:
    """Metadata only."""
    _check_flags(op, options)
    for name, t, width in (("q", x.q, "H, K"), ("k", x.k, "H, K"), ("v", x.v, "HV, V")):
        checks.check_rank(op, name, t, f"[B, T, {width}]")
        checks.check_dtype(op, name, t, checks.FLOATS)
    B, T, H, K = x.k.shape
    HV, V = x.v.shape[2:]
    checks.check_time(op, "k", T)
    checks.check_shape(op, "q", x.q, x.k.shape, "[B, T, H, K]")
    checks.check_shape(op, "v", x.v, (B, T, HV, V), "[B, T, HV, V]")
    checks.check_same(op, q=x.q, k=x.k, v=x.v)
    checks.check_device(op, **x._asdict())
    if H == 0 or HV == 0 or HV % H:
        advice = "Value head j reads key head j // (HV // H); inputs are [B, T, H, ...], time before heads."
        checks.fail(op, "HV a positive multiple of H", f"H = {H} and HV = {HV}", advice)
    for name, size in (("K", K), ("V", V)):
        if not 1 <= size <= LARGEST:
            checks.fail(op, f"{name} from 1 to {LARGEST}", f"{name} = {size}", "Split it over more heads.")
    _check_gates(op, x, options)
    S = B
    if x.cu_seqlens is not None:
        checks.check_cu_seqlens(op, x.cu_seqlens, B)
        S = x.cu_seqlens.shape[0] - 1
    if x.initial_state is not None:
        checks.check_dtype(op, "initial_state", x.initial_state, checks.FLOATS)
        shape, layout = (S, HV, K, V), "[B or S, HV, K, V]"
        advice = "One state per sequence and value head, keys before values unless state_v_first=True."
        if options.state_v_first:
            shape, layout = (S, HV, V, K), "[B or S, HV, V, K]"
            advice = "One state per sequence and value head, values before keys with state_v_first=True."
        checks.check_shape(op, "initial_state", x.initial_state, shape, layout, advice)


def _check_gates(op: str, x: Inputs, options: Options) -> None:
    """g, beta and what makes them."""
    B, T, HV = x.v.shape[:3]
    for name, t, shape, layout in (
        ("g", x.g, (B, T, HV), "[B, T, HV]"),
        ("beta", x.beta, (B, T, HV), "[B, T, HV]"),
        ("A_log", x.A_log, (HV,), "[HV]"),
        ("dt_bias", x.dt_bias, (HV,), "[HV]"),
    ):
        if t is not None:
            checks.check_dtype(op, name, t, checks.FLOATS)
            advice = "" if len(shape) > 1 else "One number per value head."
            checks.check_shape(op, name, t, shape, layout, advice)
    if options.use_gate_in_kernel:
        for name in ("g", "A_log"):
            if getattr(x, name) is None:
                advice = "The log decay is -exp(A_log) softplus(g + dt_bias)."
                checks.fail(op, f"`{name}` with use_gate_in_kernel=True", "None", advice)
    for name in ("A_log", "dt_bias"):
        if getattr(x, name) is not None and not options.use_gate_in_kernel:
            advice = f"Leave `{name}` out if `g` is the log decay already."
            checks.fail(op, f"use_gate_in_kernel=True with `{name}`", "False", advice)
    if options.use_beta_sigmoid_in_kernel and x.beta is None:
        checks.fail(op, "`beta` with use_beta_sigmoid_in_kernel=True", "None", "Pass its logits.")
    if options.allow_neg_eigval and not options.use_beta_sigmoid_in_kernel:
        advice = "Pass beta as logits, or from 0 to 2 and without allow_neg_eigval."
        checks.fail(op, "use_beta_sigmoid_in_kernel=True with allow_neg_eigval=True", "False", advice)


def _check_flags(op: str, options: Options) -> None:
    """A tensor where a flag belongs is an argument in the wrong place."""
    for name, value in options._asdict().items():
        if isinstance(value, Tensor):
            advice = "Pass optional arguments by name."
            checks.fail(
                op, f"no tensor for `{name}`", f"one of shape {tuple(value.shape)}", advice, TypeError
            )


def _check_unneeded(op: str, name: str, given: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """What flash-linear-attention takes to spare itself a wait, and nothing here needs."""
    if given is None:
        return
    checks.check_dtype(op, name, given, (torch.int32, torch.int64))
    if cu_seqlens is None:
        checks.fail(op, f"`cu_seqlens` with `{name}`", "None", "It describes packed sequences.")


def _refuse(op: str, name: str, value: object, what: str, advice: str = "") -> None:
    """Raise unless an argument that flash-linear-attention has, and this op does not cover, is None."""
    if value is not None:
        got = f"a {type(value).__name__}"
        advice = advice or "flash-linear-attention has it."
        checks.fail(op, f"`{name}` None ({what}: not covered)", got, advice, NotImplementedError)


def _triton_lacks(k: Tensor) -> list[str]:
    """What this call asks for beyond the kernels, in words."""
    lacks = []
    if k.dtype == torch.float64 and not interpreting():
        lacks.append("float64")
    return lacks
