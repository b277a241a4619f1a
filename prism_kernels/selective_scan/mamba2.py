"""Mamba-2's scan under its own name: one real pole per head, documents in a row, on `selective_scan`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.runtime import accumulate_dtype
from .api import selective_scan
from .mamba import may_grow

OP = "mamba_chunk_scan_combined"
NO_LIMIT = (0.0, float("inf"))
INDICES = (torch.int32, torch.int64)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
    *,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Run Mamba-2's scan: one step size and one real pole per head.

        dt_t <- clamp(softplus(dt_t + dt_bias), *dt_limit)         (bias and softplus as asked for)
        h_t  = exp(dt_t A) h_{t-1} + dt_t B_t x_t
        y_t  = (sum_n C_t h_t + D x_t) * silu(z_t)

    Signature and meaning of mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined, on
    `selective_scan`: numerics and determinism are as there, and states stay in float32 between chunks.
    Gradients flow through every state returned. Finding documents in `seq_idx` makes a GPU wait.

    Args:
        x: Input, r[B,T,H,P], float16, bfloat16, float32 or float64; any strides.
        dt: Step size per head, r[B,T,H].
        A: One pole per head, r[H]; one > 0 is for the "torch" and "reference" paths.
        B, C: Weights, r[B,T,G,N], H a multiple of G.
        chunk_size: At least 1. Ours is chosen by shape; no result depends on it.
        D: Skip weights, r[H] or r[H,P].
        z: Gate, like x.
        dt_bias: r[H], added to dt first.
        initial_states: r[B,H,P,N]. None: zeros. With `seq_idx`, of documents of index 0 that open a row;
            with `return_varlen_states`, of the first sequence.
        seq_idx: i[B,T]. Where it changes, a document begins, and the state starts from zero.
        cu_seqlens: i[S+1], bounds of sequences packed in one row, for `return_varlen_states` only; they
            then are the documents, and `seq_idx`, if given, must say the same.
        dt_softplus: Whether softplus makes the step size.
        dt_limit: Bounds of the step size, after softplus; its gradient is zero beyond.
        return_final_states: Whether to return the state after the last token of each row.
        return_varlen_states: Whether to return the states after the sequences of `cu_seqlens`.
        state_dtype: Dtype of the states of sequences. None: that of C.
        impl: None chooses by device; "triton", "torch" or "reference" forces a path.

    Returns:
        y r[B,T,H,P] in the dtype of x; or a tuple of it, the final states r[B,H,P,N] in float32 (float64
        for float64 x) if asked for, and the states of sequences r[S,H,P,N] if asked for.

    Raises:
        ValueError: A wrong rank, shape, device or value; sequences without their bounds, or other than
            the documents of `seq_idx` (found on the CPU and under PRISM_CHECK=1).
        TypeError: A wrong dtype.

    Example:
        >>> x, dt, A = torch.randn(2, 50, 4, 8), torch.rand(2, 50, 4), -torch.rand(4)
        >>> B, C = torch.randn(2, 50, 2, 16), torch.randn(2, 50, 2, 16)
        >>> mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=64, D=torch.ones(4)).shape
        torch.Size([2, 50, 4, 8])

    Source: Dao and Gu, Transformers are SSMs (arXiv:2405.21060), section 6; interface of mamba_ssm 2.3.
    """
    _check(x, dt, A, B, C, chunk_size, initial_states, seq_idx)
    checks.check_rank(OP, "A", A, "[H]")
    if not dt_softplus or tuple(dt_limit) != NO_LIMIT:
        dt = _step_size(x, dt, dt_bias, dt_softplus).clamp(*dt_limit)
        dt_bias, dt_softplus = None, False
    u, states, bounds, last = x, initial_states, None, None
    if return_varlen_states:
        bounds = _sequences(x, seq_idx, cu_seqlens)
        states = _of_first(initial_states, bounds)
    elif seq_idx is not None:
        u, dt, B, C = (r.flatten(0, 1)[None] for r in (u, dt, B, C))
        z = None if z is None else z.flatten(0, 1)[None]
        bounds, first, last = _documents(seq_idx)
        states = _of_documents(initial_states, seq_idx, bounds, first)
    y, final = selective_scan(
        u,
        dt,
        A[:, None],
        B,
        C,
        D,
        z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        initial_state=states,
        output_final_state=return_final_states or return_varlen_states,
        cu_seqlens=bounds,
        discretization="euler",
        allow_growth=may_grow(OP, impl, x),
        impl=impl,
    )
    results = [y.view(x.shape)]
    if final is None:
        return results[0]
    if return_final_states:
        ends = final if last is None else final.index_select(0, last)
        results.append(final[-1:] if return_varlen_states else ends)
    if return_varlen_states:
        results.append(final.to(C.dtype if state_dtype is None else state_dtype))
    return tuple(results)


def _step_size(x: Tensor, dt: Tensor, dt_bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt.to(accumulate_dtype(x.dtype))
    dt = dt if dt_bias is None else dt + dt_bias
    return F.softplus(dt) if softplus else dt


def _documents(seq_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of all documents, rows joined, and which are the first and the last of each row."""
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    begins = begins.flatten()
    number = (begins.cumsum(0) - 1).view(seq_idx.shape)
    starts = begins.nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([seq_idx.numel()])])
    return bounds, number[:, 0], number[:, -1]


def _of_documents(states: Tensor | None, seq_idx: Tensor, bounds: Tensor, first: Tensor) -> Tensor | None:
    """States before documents: those given, where a row opens with index 0, else zeros."""
    if states is None:
        return None
    given = torch.where((seq_idx[:, 0] == 0)[:, None, None, None], states, 0)
    return states.new_zeros(bounds.shape[0] - 1, *states.shape[1:]).index_copy(0, first, given)


def _of_first(states: Tensor | None, bounds: Tensor) -> Tensor | None:
    """States before the sequences of one row: the one given, then zeros."""
    if states is None:
        return None
    return torch.cat([states, states.new_zeros(bounds.shape[0] - 2, *states.shape[1:])])


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """What the scan itself cannot see; the rest it checks."""
    checks.check_rank(OP, "x", x, "[B, T, H, P]")
    checks.check_shape(OP, "dt", dt, x.shape[:3], "[B, T, H]")
    checks.check_shape(OP, "A", A, x.shape[2:3], "[H]", "One pole per head.")
    checks.check_dtype(OP, "A", A, checks.FLOATS, "`selective_scan` takes complex poles.")
    for name, w in {"B": B, "C": C}.items():
        checks.check_rank(OP, name, w, "[B, T, G, N]")
        checks.check_shape(OP, name, w, (*x.shape[:2], *w.shape[2:3], B.shape[3]), "[B, T, G, N]")
    if chunk_size < 1:
        checks.fail(OP, "`chunk_size` of at least 1", str(chunk_size), "Any will do.")
    if initial_states is not None:
        shape = (x.shape[0], *x.shape[2:], B.shape[3])
        checks.check_shape(OP, "initial_states", initial_states, shape, "[B, H, P, N]", "One per row.")
    if seq_idx is not None:
        checks.check_dtype(OP, "seq_idx", seq_idx, INDICES, "Use `.to(torch.int32)`.")
        checks.check_shape(OP, "seq_idx", seq_idx, x.shape[:2], "[B, T]", "One index per token.")
        checks.check_device(OP, x=x, seq_idx=seq_idx)


def _sequences(x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The bounds of return_varlen_states, checked."""
    if cu_seqlens is None:
        advice = "Give the bounds of the sequences."
        checks.fail(OP, "`cu_seqlens` for return_varlen_states=True", "None", advice)
    checks.check_cu_seqlens(OP, cu_seqlens, x.shape[0])
    if seq_idx is not None and checks.values_are_checked(x):
        bounds = _documents(seq_idx[:, : int(cu_seqlens[-1])])[0].tolist()
        if bounds != cu_seqlens.unique().tolist():
            advice = "A document begins where `seq_idx` changes, and at each bound."
            got = str(cu_seqlens.tolist())
            checks.fail(OP, f"`cu_seqlens` that agrees with `seq_idx`, {bounds}", got, advice)
    return cu_seqlens
