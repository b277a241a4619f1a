"""The public functions: check, choose a path, call."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._core import checks
from .._core.impl import choose_impl
from .._core.runtime import accumulate_dtype, interpreting
from . import op as ops
from .reference import gated_delta_rule_reference

LARGEST = 256
LARGEST_TRITON = 128


class GatedDeltaRuleOutput(NamedTuple):
    """What the gated delta rule returns; unpacks like a pair."""

    o: Tensor
    final_state: Tensor | None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    impl: str | None = None,
) -> GatedDeltaRuleOutput:
    """Run the gated delta rule over a sequence, chunk by chunk; for training and prefill.

    Per head, with M r[K,V] the state: decay the state, erase what it holds under the key, write the value::

        M_t = exp(g_t) (M_{t-1} - beta_t k_t (k_t^T M_{t-1})) + beta_t k_t v_t^T
        o_t = scale q_t^T M_t

    Numerics: states, decays and sums in float32 (float64 for float64 inputs, which keep it throughout);
    the 'triton' path rounds operands of products to the dtype of `q`. Finite for every g <= 0 and for
    |k|^2 beta <= 2. Deterministic bit for bit, forward and backward; first-order gradients only.

    Args:
        q: Queries, r[B,T,H,K], K at most 256.
        k: Keys, r[B,T,H,K]; length one each, or see `use_qk_l2norm_in_kernel`.
        v: Values, r[B,T,HV,V], V at most 256, HV a multiple of H: value head j reads key head j // (HV // H).
            q, k and v share a dtype: float32, bfloat16, float16 or float64.
        g: Log decay (natural logarithm), r[B,T,HV], <= 0 and finite. None: no decay.
        beta: Write strength, r[B,T,HV], in [0, 2]. None: 1.
        scale: Factor of the output. None: K ** -0.5.
        initial_state: State before the first token, r[B,HV,K,V]; r[S,HV,K,V] with `cu_seqlens`. None: zero.
        output_final_state: Return the state after the last token too.
        use_qk_l2norm_in_kernel: Replace q and k by x rsqrt(sum x^2 + 1e-6) first.
        cu_seqlens: Boundaries of S sequences packed into one row, i[S+1] from 0; B must be 1. Sequences may
            be empty. Tokens after the last boundary are padding: their output is 0.
        chunk_size: Tokens handled by matrix products at once: 16, 32 or 64. Changes rounding only.
        impl: 'triton', 'torch' or 'reference'. None: 'triton' for CUDA tensors, 'torch' for others.

    Returns:
        `(o, final_state)`: o r[B,T,HV,V] in the dtype of v; final_state like `initial_state` in float32
        (float64 for float64 inputs), or None unless asked for.

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
    return _call(
        op,
        (q, k, v, g, beta),
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        chunk_size,
        impl,
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: str | None = None,
) -> GatedDeltaRuleOutput:
    """Run the gated delta rule token by token: for decoding and short sequences; has a backward.

    Arguments, results, numerics and errors are those of `chunk_gated_delta_rule`, which is faster on long
    sequences; all arithmetic here is in float32 (float64 for float64 inputs).

    Example:
        >>> q, k = torch.randn(2, 1, 1, 4, 32)
        >>> v, state = torch.randn(1, 1, 4, 64), torch.zeros(1, 4, 32, 64)
        >>> o, state = fused_recurrent_gated_delta_rule(
        ...     q, k, v, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 1, 4, 64])

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", ICLR 2025 (arXiv 2412.06464), equation 10.
    """
    return _call(
        "fused_recurrent_gated_delta_rule",
        (q, k, v, g, beta),
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        None,
        impl,
    )


def _call(
    op: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    l2norm: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    impl: str | None,
) -> GatedDeltaRuleOutput:
    """Either function; `chunk_size` None is token by token."""
    q, k, v, g, beta = tensors
    _check(op, q, k, v, g, beta, initial_state, cu_seqlens)
    impl = choose_impl(op, impl, q.device, triton_lacks=_triton_lacks(k, v, cu_seqlens))
    wide = accumulate_dtype(q.dtype)
    g = v.new_zeros(v.shape[:3], dtype=wide) if g is None else g.to(wide)
    beta = v.new_ones(v.shape[:3], dtype=wide) if beta is None else beta.to(wide)
    state = None if initial_state is None else initial_state.to(wide)
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    if impl == "reference":
        if checks.values_are_checked(q):
            ops.check_values(op, g, cu_seqlens, q.shape[1])
        o, final = gated_delta_rule_reference(q, k, v, g, beta, scale, state, l2norm, cu_seqlens)
        return GatedDeltaRuleOutput(o, final if output_final_state else None)

    given = [x for x in (q, k, v, g, beta, state) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if chunk_size is None:
        o, final, *_ = ops.recurrent_fwd(q, k, v, g, beta, state, cu_seqlens, scale, l2norm, save, impl)
    else:
        o, final, *_ = ops.chunk_fwd(
            q, k, v, g, beta, state, cu_seqlens, scale, l2norm, chunk_size, save, impl
        )
    return GatedDeltaRuleOutput(o, final if output_final_state else None)


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Metadata only."""
    for name, x, width in (("q", q, "H, K"), ("k", k, "H, K"), ("v", v, "HV, V")):
        checks.check_rank(op, name, x, f"[B, T, {width}]")
        checks.check_dtype(op, name, x, checks.FLOATS)
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    checks.check_time(op, "k", T)
    checks.check_shape(op, "q", q, k.shape, "[B, T, H, K]")
    checks.check_shape(op, "v", v, (B, T, HV, V), "[B, T, HV, V]")
    checks.check_same(op, q=q, k=k, v=v)
    checks.check_device(op, q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, cu_seqlens=cu_seqlens)
    if H == 0 or HV == 0 or HV % H:
        advice = "Value head j reads key head j // (HV // H); inputs are [B, T, H, ...], time before heads."
        checks.fail(op, "HV a positive multiple of H", f"H = {H} and HV = {HV}", advice)
    for name, size in (("K", K), ("V", V)):
        if not 1 <= size <= LARGEST:
            checks.fail(op, f"{name} from 1 to {LARGEST}", f"{name} = {size}", "Split it over more heads.")
    for name, gate in (("g", g), ("beta", beta)):
        if gate is not None:
            checks.check_dtype(op, name, gate, checks.FLOATS)
            checks.check_shape(op, name, gate, (B, T, HV), "[B, T, HV]")
    S = B
    if cu_seqlens is not None:
        checks.check_cu_seqlens(op, cu_seqlens, B)
        S = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        checks.check_dtype(op, "initial_state", initial_state, checks.FLOATS)
        advice = "One state per sequence and value head, keys before values."
        checks.check_shape(op, "initial_state", initial_state, (S, HV, K, V), "[B or S, HV, K, V]", advice)


def _triton_lacks(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[str]:
    """What this call asks for beyond the kernels, in words."""
    H, K = k.shape[2:]
    HV, V = v.shape[2:]
    lacks = []
    if cu_seqlens is not None:
        lacks.append("packed sequences (`cu_seqlens`)")
    if HV != H:
        lacks.append(f"grouped heads (HV = {HV}, H = {H})")
    if max(K, V) > LARGEST_TRITON:
        lacks.append(f"K or V above {LARGEST_TRITON} (K = {K}, V = {V})")
    if k.dtype == torch.float64 and not interpreting():
        lacks.append("float64")
    return lacks
