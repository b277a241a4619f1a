"""Functions of mamba_ssm under their own names: channels before time, Euler's rule, states in place.

Swapping the import changes no number; what the package restricts (CUDA, real A in a step, layouts in
memory) is free here.
"""

import torch
from torch import Tensor

from .._core import checks
from .api import choose_path, selective_scan, selective_scan_step, to_pairs

SCAN, UPDATE = "selective_scan_fn", "selective_state_update"
BEFORE_TIME = "Inputs are [B, D, L]: channels before time."
SHARED = "Channels (or heads) share B and C in G equal groups."


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba's selective scan, channels before time.

        delta_t <- softplus(delta_t + delta_bias)                  (bias and softplus as asked for)
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
        y_t = (sum_n C_t h_t + D u_t) * silu(z_t)                  (complex A: 2 Re sum_n C_t h_t)

    Signature and meaning of mamba_ssm.ops.selective_scan_interface.selective_scan_fn. It is
    `selective_scan` with one channel per head and discretization="euler"; there a complex C is
    conjugated, here it is not. Numerics, ranges and determinism are as there, with accuracy="fast" for a
    real A and 16-bit u, as mamba_ssm has it for all. Gradients flow through the last state too. Re A > 0 is
    for the "torch" and "reference" paths.

    Args:
        u: Input, r[B,D,L], float16, bfloat16, float32 or float64; any strides.
        delta: Step size per channel, r[B,D,L], >= 0 after bias and softplus.
        A: Diagonal, r[D,N] or c[D,N]; a complex one stands for N conjugate pairs.
        B: Input weights, static [D,N] in the form of A, or real and input-dependent [B,N,L] or
            [B,G,N,L], D a multiple of G. With a complex A these end in 2L: real and imaginary parts
            take turns.
        C: Read-out weights, like B; one may be static and the other not.
        D: Skip weights, r[D].
        z: Gate, like u.
        delta_bias: r[D], added to delta first.
        delta_softplus: Whether softplus makes the step size.
        return_last_state: Whether to return the state after the last token.
        impl: None chooses by device; "triton", "torch" or "reference" forces a path.

    Returns:
        y r[B,D,L] in the dtype of u, which lies in memory with channels last; with return_last_state the
        pair of y and the state [B,D,N], float32 or complex64 (float64 or complex128 for float64 u).

    Raises:
        ValueError: A wrong rank, shape, device or value; L = 0. TypeError: A wrong dtype.

    Example:
        >>> u, delta, A = torch.randn(2, 8, 50), torch.rand(2, 8, 50), -torch.rand(8, 16)
        >>> B, C = torch.randn(2, 2, 16, 50)
        >>> y, state = selective_scan_fn(u, delta, A, B, C, D=torch.ones(8), return_last_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 8, 50]), torch.Size([2, 8, 16]))

    Source: Gu and Dao, Mamba (arXiv:2312.00752), section 3; interface of mamba_ssm 2.3.
    """
    checks.check_rank(SCAN, "u", u, "[B, D, L]")
    checks.check_rank(SCAN, "A", A, "[D, N]")
    for name, x in {"delta": delta, "z": z}.items():
        if x is not None:
            checks.check_shape(SCAN, name, x, u.shape, "[B, D, L], like `u`", BEFORE_TIME)
    for name, x in {"B": B, "C": C}.items():
        _check_weights(name, x, u, A)
    for name, x in {"D": D, "delta_bias": delta_bias}.items():
        if x is not None:
            checks.check_shape(SCAN, name, x, u.shape[1:2], "[D]", "One per channel.")
    y, state = selective_scan(
        u.mT[..., None],
        delta.mT,
        to_pairs(A, A),
        _tokens_first(B, A),
        _conjugate(_tokens_first(C, A), A),
        D,
        None if z is None else z.mT[..., None],
        dt_bias=delta_bias,
        dt_softplus=delta_softplus,
        output_final_state=return_last_state,
        discretization="euler",
        accuracy="fast" if u.element_size() == 2 and not A.is_complex() else "accurate",
        allow_growth=may_grow(SCAN, impl, u),
        impl=impl,
    )
    if state is None:
        return y[..., 0].mT
    return y[..., 0].mT, (torch.view_as_complex(state) if A.is_complex() else state)[:, :, 0]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Advance Mamba's selective scan by one token, the state in place.

        dt <- softplus(dt + dt_bias)                               (bias and softplus as asked for)
        state <- exp(dt A) state + dt B x
        y = (sum_n C state + D x) * silu(z)

    Signature and meaning of mamba_ssm.ops.triton.selective_state_update.selective_state_update, on
    `selective_scan_step`: numerics are as there; a state of 16 bits is rounded when it is stored, and y
    comes from the one before. Gradients flow, through a state that requires one too. Mamba-2's form,
    where dt, dt_bias and A are expanded over the channels of a head (stride 0), is recognised, and then
    costs one exponential per head and mode.

    Args:
        state: r[B,D,N] or, with heads, r[B,H,D,N]; any float dtype. Written to. With
            state_batch_indices the pool r[S,D,N] or r[S,H,D,N].
        x: Input, r[B,D] or r[B,H,D].
        dt: Step size, like x.
        A: Diagonal, r[D,N] or r[H,D,N]; one > 0 is for the "torch" and "reference" paths.
        B, C: Weights of the token, r[B,N] or r[B,G,N], H a multiple of G.
        D, dt_bias: r[D] or r[H,D].
        z: Gate, like x.
        dt_softplus: Whether softplus makes the step size.
        state_batch_indices: i[B], which state each row continues, all different. A row with a negative
            one is left out: it gives 0 and moves no state.
        impl: None chooses by device; "triton", "torch" or "reference" forces a path.

    Returns:
        y of the shape and dtype of x.

    Raises:
        ValueError: A wrong rank, shape, device or value; a state whose entries overlap; an index given
            twice or beyond the pool (found on the CPU and under PRISM_CHECK=1).
        TypeError: A wrong dtype; a complex A (`selective_scan_step` takes it).

    Example:
        >>> state, A, B, C = torch.zeros(2, 8, 16), -torch.rand(8, 16), torch.randn(2, 16), torch.randn(2, 16)
        >>> y = selective_state_update(state, torch.randn(2, 8), torch.rand(2, 8), A, B, C)
        >>> y.shape, state.any().item()
        (torch.Size([2, 8]), True)

    Source: decoding in Mamba (arXiv:2312.00752), section 3; interface of mamba_ssm 2.3.
    """
    heads = state.ndim == 4
    _check_token(state, x, dt, A, B, C, D, z, dt_bias, heads)
    B, C = (w[:, None] if w.ndim == 3 else w[:, None, None] for w in (B, C))  # [B,1,G,N]
    pool = state if heads else state[:, :, None]
    tied = heads and A.stride(1) == 0 and dt.stride(2) == 0 and (dt_bias is None or dt_bias.stride(1) == 0)
    if tied:
        dt, A, dt_bias = dt[..., 0], A[:, 0], None if dt_bias is None else dt_bias[:, 0]
    elif heads:  # every channel is a head of its own
        pool = state.flatten(1, 2)[:, :, None]
        dt, A = dt.flatten(1), A.flatten(0, 1)
        D, dt_bias = (None if w is None else w.flatten() for w in (D, dt_bias))
    sizes = (*dt.shape, x.shape[2] if tied else 1)
    follows = torch.is_grad_enabled() and state.requires_grad
    y, new = selective_scan_step(
        pool.clone() if follows else pool,
        x.reshape(sizes),
        dt,
        A,
        B,
        C,
        D,
        None if z is None else z.reshape(sizes),
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        discretization="euler",
        allow_growth=may_grow(UPDATE, impl, x),
        state_indices=state_batch_indices,
        inplace=not follows,
        impl=impl,
    )
    if follows or pool.data_ptr() != state.data_ptr():  # a copy, where heads and channels do not merge
        state.copy_(new.view(state.shape))
    return y.reshape(x.shape)


def may_grow(name: str, impl: str | None, x: Tensor) -> bool:
    """Whether the path for tensors like `x` has growing states, which mamba_ssm takes unasked."""
    return choose_path(name, impl, x, allow_growth=False) != "triton"


def _tokens_first(x: Tensor, A: Tensor) -> Tensor:
    """B or C as `selective_scan` takes them: static [D,N], or [B,L,G,N]; in pairs where A is complex."""
    if x.ndim == 2:
        return to_pairs(x, A)
    x = x[:, None] if x.ndim == 3 else x
    return x.unflatten(-1, (-1, 2)).permute(0, 3, 1, 2, 4) if A.is_complex() else x.permute(0, 3, 1, 2)


def _conjugate(x: Tensor, A: Tensor) -> Tensor:
    """The conjugate of what is in pairs where A is complex."""
    return torch.cat([x[..., :1], -x[..., 1:]], -1) if A.is_complex() else x


def _check_weights(name: str, x: Tensor, u: Tensor, A: Tensor) -> None:
    (batch, D, L), N = u.shape, A.shape[1]
    if x.ndim == 2:
        checks.check_shape(SCAN, name, x, (D, N), "[D, N]", "Static weights are per channel and mode.")
        return
    checks.check_dtype(SCAN, name, x, checks.FLOATS, "Input-dependent weights are real: [B, G, N, 2L].")
    columns, end = (2 * L, "2L") if A.is_complex() else (L, "L")
    groups, layout = (x.shape[1:2], f"[B, G, N, {end}]") if x.ndim == 4 else ((), f"[B, N, {end}]")
    if groups and (groups[0] == 0 or D % groups[0]):
        checks.fail(SCAN, f"`{name}` {layout} with G dividing D = {D}", f"{tuple(x.shape)}", SHARED)
    checks.check_shape(SCAN, name, x, (batch, *groups, N, columns), layout, BEFORE_TIME)


def _check_token(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    heads: bool,
) -> None:
    axes = "H, D" if heads else "D"
    if not heads:
        checks.check_rank(UPDATE, "state", state, "[B, D, N]")
    checks.check_dtype(UPDATE, "A", A, checks.FLOATS, "`selective_scan_step` takes a complex A.")
    channels, N = tuple(state.shape[1:-1]), state.shape[-1]
    checks.check_shape(UPDATE, "x", x, (*x.shape[:1], *channels), f"[B, {axes}]", "One token per row.")
    checks.check_shape(UPDATE, "A", A, (*channels, N), f"[{axes}, N]", "`state` gives the sizes.")
    for name, w in {"dt": dt, "z": z}.items():
        if w is not None:
            checks.check_shape(UPDATE, name, w, x.shape, f"[B, {axes}], like `x`", "One token per row.")
    for name, w in {"D": D, "dt_bias": dt_bias}.items():
        if w is not None:
            checks.check_shape(UPDATE, name, w, channels, f"[{axes}]", "`state` gives the sizes.")
    for name, w in {"B": B, "C": C}.items():
        groups = w.shape[1:2] if w.ndim == 3 else ()
        layout = "[B, G, N]" if groups else "[B, N]"
        checks.check_shape(UPDATE, name, w, (*x.shape[:1], *groups, N), layout, SHARED)
        H = channels[0] if heads else 1
        if groups and (groups[0] == 0 or H % groups[0]):
            checks.fail(UPDATE, f"`{name}` [B, G, N] with G dividing H = {H}", f"{tuple(w.shape)}", SHARED)
