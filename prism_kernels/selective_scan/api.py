"""The public functions of the selective scan: they validate, explain and dispatch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import checks
from .._core.impl import choose_impl
from . import frame, op, pool, torch_impl
from .reference import scan_reference

OP = "selective_scan"
STEP = "selective_scan_step"
FORMS = "A, B, C and states are real pairs [..., 2] if and only if A is given as [H, N, 2]."


class SelectiveScanOutput(NamedTuple):
    """`y` r[B,T,H,P] in the dtype of u, and the state after the last token (None unless asked for)."""

    y: Tensor
    final_state: Tensor | None


class SelectiveScanStepOutput(NamedTuple):
    """`y` r[B,H,P] in the dtype of u, and the state after the token."""

    y: Tensor
    state: Tensor


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    discretization: str = "zoh",
    accuracy: str = "accurate",
    allow_growth: bool = False,
    impl: str | None = None,
) -> SelectiveScanOutput:
    """Run a selective state-space recurrence with a complex diagonal and zero-order hold.

        dt_t <- softplus(dt_t + dt_bias)                        (bias and softplus as asked for)
        h_t  = exp(dt_t A) h_{t-1} + (exp(dt_t A) - 1) / A * B_t u_t        ("euler": dt_t B_t u_t)
        y_t  = (2 Re sum_n conj(C_t) h_t + D u_t) * silu(z_t)

    Numerics: everything but u, z and y is computed in float32 (float64 for float64 u) and the state is
    kept in it. The weight (exp(dt A) - 1) / A is accurate to rounding as dt A goes to 0, and is dt
    where A = 0 (on the Triton path within dt 2**-41 of it, relative). Any dt >= 0 and Re A <= 0 give
    finite results while dt |A|, and sums of dt over 32 tokens, are below 1e36; so do states that grow
    (`allow_growth`), while they themselves are in the range of that dtype. Deterministic bit for bit,
    causal bit for bit. First-order gradients only, except impl="reference".

    Args:
        u: Input, r[B,T,H,P].
        dt: Step size per head, r[B,T,H], >= 0 after bias and softplus. With P = 1 it is per channel.
        A: Diagonal, c[H,N] with Re A <= 0, standing for N conjugate pairs; or real r[H,N], and then B,
            C and the state are real and there is no factor 2; or pairs r[H,N,2]. [H,1] beside B and C of
            more modes is one pole for all of them.
        B: Input weights, static c[H,N] or c[H,P,N], or input-dependent c[B,T,G,N], H a multiple of G.
            Real ones may go with a complex A. With A in pairs: the same with a last axis of 2.
        C: Read-out weights, like B (B may be static and C dependent, or the reverse).
        D: Skip weights, r[H] or r[H,P].
        z: Gate, like u.
        dt_bias: r[H], added to dt first.
        dt_softplus: Whether softplus makes the step size.
        initial_state: c[B,H,P,N], with `cu_seqlens` c[S,H,P,N]; pairs or real as A is. None: zeros.
        output_final_state: Whether to return the state after the last token.
        cu_seqlens: i[S+1], bounds of S sequences packed in one row (B = 1); tokens after the last
            bound are padding and give 0. Empty sequences pass their state through.
        reverse: Scan each sequence from its last token to its first. The initial state then enters
            after the last token and the final state is the one after the first.
        discretization: "zoh" or "euler".
        accuracy: How the channelwise Triton kernels compute exp(dt A): "accurate", to rounding relative to
            |dt A|, or "fast", by special-function instructions, right to about 1e-6 absolute (README, "Two
            accuracies"). All else is accurate.
        allow_growth: Whether Re A > 0 is meant; else it is an error where values are checked (on the CPU
            and under PRISM_CHECK=1). Growing states are on the "torch" and "reference" paths only.
        impl: None chooses by device; "triton", "torch" or "reference" forces a path.

    Returns:
        `SelectiveScanOutput(y, final_state)`; the state is complex, in pairs or real, as A is.

    Raises:
        ValueError: a wrong rank, shape, device or value. TypeError: a wrong dtype.
        NotImplementedError: the call needs what the path lacks: `allow_growth` on "triton".

    Example:
        >>> u, dt = torch.randn(2, 50, 4, 8), torch.rand(2, 50, 4)
        >>> A = torch.complex(-torch.ones(4, 16) / 2, torch.pi * torch.arange(16.0).expand(4, 16))
        >>> B, C = torch.ones(4, 16), torch.randn(4, 16, dtype=torch.complex64)
        >>> selective_scan(u, dt, A, B, C, D=torch.ones(4)).y.shape
        torch.Size([2, 50, 4, 8])

    Source: Gu and Dao, Mamba (arXiv:2312.00752), section 3; Gu et al., S4D (arXiv:2206.11893),
    equations 3 and 4.
    """
    check_inputs(OP, u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, discretization, accuracy)
    path = choose_path(OP, impl, u, allow_growth)
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    y, state = dispatch(tensors, dt_softplus, reverse, discretization, accuracy, allow_growth, path)
    return SelectiveScanOutput(y, state if output_final_state else None)


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    discretization: str = "zoh",
    accuracy: str = "accurate",
    allow_growth: bool = False,
    state_indices: Tensor | None = None,
    inplace: bool = False,
    impl: str | None = None,
) -> SelectiveScanStepOutput:
    """Advance the recurrence of `selective_scan` by one token, against a pool of states if need be.

    It is a scan of one token: the same recurrence, numerics and kernels. T calls equal one
    `selective_scan` of T tokens. Nothing waits for the device.

    Args:
        state: c[B,H,P,N], in pairs or real as A is. With `state_indices` the pool c[S,H,P,N].
        u: Input, r[B,H,P].
        dt: Step size, r[B,H].
        A, D, dt_bias, dt_softplus, discretization, accuracy, allow_growth, impl: As in `selective_scan`.
        B, C: Static c[H,N] or c[H,P,N], or input-dependent c[B,G,N]. Where [H,P,N] and [B,G,N] are the
            same shape, say which: [1,H,P,N] is static, [B,1,G,N] is input-dependent.
        z: Gate, like u.
        state_indices: Which state each row of the batch continues, i[B]; all different. A negative one is
            padding: it moves no state, and gives 0. None: row b has state b.
        inplace: Also write the new states into `state`, of any strides; other states of a pool are not
            touched. No gradient flows into a state written in place, so it must not require one. Without
            it a new pool is returned, which costs a copy of the whole.

    Returns:
        `SelectiveScanStepOutput(y, state)`; with `inplace`, `state` is the tensor given. A pool keeps its
        dtype.

    Raises:
        ValueError: a wrong rank, shape, device or value; an index beyond the pool or given twice (found on
            the CPU and under PRISM_CHECK=1; else one beyond the pool counts as padding); in place, a
            `state` that requires a gradient or overlaps itself. TypeError: a wrong dtype.
        NotImplementedError: the call needs what the path lacks: `allow_growth` on "triton".

    Example:
        >>> A, B, C = -torch.ones(4, 16), torch.ones(4, 16), torch.ones(4, 16)
        >>> state = torch.zeros(2, 4, 8, 16)
        >>> y, state = selective_scan_step(state, torch.randn(2, 4, 8), torch.rand(2, 4), A, B, C)
        >>> y.shape
        torch.Size([2, 4, 8])

    Source: as `selective_scan`.
    """
    batch, H, P, N = check_step(state, u, dt, A, B, z, inplace)
    B, C = (with_time(name, x, A, (batch, H, P, N)) for name, x in (("B", B), ("C", C)))
    u, dt, z = u[:, None], dt[:, None], None if z is None else z[:, None]
    slot, h0 = None, state
    if state_indices is not None:
        check_pool(state, state_indices, u, A, B)
        slot = pool.slots(state_indices, state.shape[0])
        h0 = pool.read(state, slot)
    elif inplace and torch.is_grad_enabled():
        h0 = state.clone()
    check_inputs(STEP, u, dt, A, B, C, D, z, dt_bias, h0, None, discretization, accuracy)
    path = choose_path(STEP, impl, u, allow_growth)
    if slot is not None:
        u, dt, B, C, z = pool.of_live(slot < state.shape[0], u, dt, B, C, z, dt_bias, A)
    tensors = (u, dt, A, B, C, D, z, dt_bias, h0, None)
    y, new = dispatch(tensors, dt_softplus, False, discretization, accuracy, allow_growth, path)
    if slot is not None:
        y = pool.where_live(slot < state.shape[0], y)
        new = pool.write(state, slot, new.detach()) if inplace else pool.replaced(state, slot, new)
    elif inplace:
        new = state.copy_(new.detach())
    return SelectiveScanStepOutput(y[:, 0], new)


def choose_path(name: str, impl: str | None, u: Tensor, allow_growth: bool) -> str:
    """The path for tensors like `u`. By the option alone: on a GPU nobody looks at the poles."""
    lacks = ["growing states (allow_growth=True)"] if allow_growth else []
    return choose_impl(name, impl, u.device, triton_lacks=lacks)


def dispatch(
    tensors: tuple[Any, ...],
    dt_softplus: bool,
    reverse: bool,
    discretization: str,
    accuracy: str,
    allow_growth: bool,
    path: str,
) -> tuple[Tensor, Tensor]:
    """Run a checked call on one path; the state comes back in the form of `A`.

    `tensors` are u, dt, A, B, C, D, z, dt_bias, initial_state and cu_seqlens.
    """
    u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens = tensors
    euler = discretization == "euler"
    if path != "torch" or not torch_impl.takes_one_pole(u, A, B, C, euler):
        A = A.expand(-1, modes(A, B), *A.shape[2:])
    convert = to_numbers if path == "reference" else to_pairs
    B, C = convert(B, A), convert(C, A)
    initial_state = None if initial_state is None else convert(initial_state, A)
    if path == "reference":
        if checks.values_are_checked(u):
            frame.check_values(OP, u, dt, dt_bias, A, cu_seqlens, dt_softplus, allow_growth)
        y, state = scan_reference(
            u,
            dt,
            to_numbers(A, A),
            B,
            C,
            D,
            z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
            discretization=discretization,
        )
        return y, torch.view_as_real(state) if A.ndim == 3 else state
    given = (u, dt, to_pairs(A, A), B, C, D, z, dt_bias, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    options = (dt_softplus, reverse, euler, accuracy == "accurate", allow_growth, save, path)
    y, state, *_ = op.selective_scan_fwd(*given, cu_seqlens, *options)
    return y, torch.view_as_complex(state) if A.is_complex() else state


def modes(A: Tensor, B: Tensor) -> int:
    """N: the modes of A, or where one pole may serve all those of B."""
    return B.shape[1 - A.ndim] if A.shape[1] == 1 and B.ndim >= A.ndim else A.shape[1]


def to_numbers(x: Tensor, A: Tensor) -> Tensor:
    """Complex numbers where `A` says that `x` is given in pairs."""
    return torch.view_as_complex(x.contiguous()) if A.ndim == 3 else x


def to_pairs(x: Tensor, A: Tensor) -> Tensor:
    """Real pairs where `A` is complex; a real `x` gets an imaginary part of zero."""
    if not A.is_complex():
        return x
    return (
        torch.view_as_real(x.resolve_conj()) if x.is_complex() else torch.stack([x, torch.zeros_like(x)], -1)
    )


def check_inputs(
    name: str,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    discretization: str,
    accuracy: str,
) -> None:
    """Every check that looks at metadata only."""
    checks.check_rank(name, "u", u, "[B, T, H, P]")
    checks.check_dtype(name, "u", u, checks.FLOATS)
    batch, T, H, P = u.shape
    checks.check_time(name, "u", T)
    checks.check_choice(name, "discretization", discretization, ("zoh", "euler"))
    checks.check_choice(name, "accuracy", accuracy, ("accurate", "fast"))
    check_diagonal(name, A, H)
    N = modes(A, B)
    checks.check_shape(name, "dt", dt, (batch, T, H), "[B, T, H]")
    check_weights(name, "B", B, A, (batch, T, H, P, N))
    check_weights(name, "C", C, A, (batch, T, H, P, N))
    if D is not None:
        checks.check_shape(name, "D", D, (H,) if D.ndim == 1 else (H, P), "[H] or [H, P]")
    if z is not None:
        checks.check_shape(name, "z", z, u.shape, "[B, T, H, P], like `u`")
    if dt_bias is not None:
        checks.check_shape(name, "dt_bias", dt_bias, (H,), "[H]")
    for label, x in (("dt", dt), ("D", D), ("z", z), ("dt_bias", dt_bias)):
        if x is not None:
            checks.check_dtype(name, label, x, checks.FLOATS)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(name, cu_seqlens, batch)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_form(name, "initial_state", initial_state, A, real_allowed=False)
        shape = (rows, H, P, N, *A.shape[2:])
        advice = "A state is per sequence, head, channel and mode. " + FORMS
        layout = "[B or S, H, P, N]"
        checks.check_shape(name, "initial_state", initial_state, shape, layout, advice)
    given = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    checks.check_device(name, u=u, **given, initial_state=initial_state, cu_seqlens=cu_seqlens)


def check_diagonal(name: str, A: Tensor, H: int) -> None:
    """A is complex or real [H,N], or real pairs [H,N,2]."""
    pairs = A.ndim == 3 and A.shape[-1] == 2 and not A.is_complex()
    if A.ndim != 2 and not pairs:
        advice = "Static poles: one set of N per head."
        checks.fail(name, "`A` as [H, N], or as real pairs [H, N, 2]", f"shape {tuple(A.shape)}", advice)
    checks.check_dtype(name, "A", A, (*checks.COMPLEX, *checks.FLOATS))
    N = A.shape[1]
    if A.shape[0] != H or N == 0:
        checks.fail(
            name, f"`A` [H, N] with H = {H}, N >= 1", f"{tuple(A.shape)}", "`u` [B, T, H, P] gives the H."
        )


def check_form(name: str, label: str, x: Tensor, A: Tensor, real_allowed: bool) -> None:
    """`x` is complex, real or in pairs, as `A` demands."""
    allowed: tuple[torch.dtype, ...] = checks.FLOATS
    if A.is_complex():
        allowed = (*checks.COMPLEX, *checks.FLOATS) if real_allowed else checks.COMPLEX
    checks.check_dtype(name, label, x, allowed, FORMS)


def check_weights(name: str, label: str, x: Tensor, A: Tensor, sizes: tuple[int, ...]) -> None:
    """B or C: static [H,N] or [H,P,N], or dependent [B,T,G,N], with a last axis of 2 beside pairs."""
    batch, T, H, P, N = sizes
    check_form(name, label, x, A, real_allowed=True)
    pair = tuple(A.shape[2:])
    rank = x.ndim - len(pair)
    if rank == 4:
        G = x.shape[2]
        if G == 0 or H % G:
            advice = "Heads share B and C in G equal groups."
            checks.fail(name, f"`{label}` [B, T, G, N] with G dividing H = {H}", f"{tuple(x.shape)}", advice)
    shapes = {2: (H, N), 3: (H, P, N), 4: (batch, T, *x.shape[2:3], N)}
    if rank not in shapes or tuple(x.shape) != shapes[rank] + pair:
        expected = " or ".join(
            f"{names} = {(*shape, *pair)}"
            for names, shape in (
                ("[H, N]", (H, N)),
                ("[H, P, N]", (H, P, N)),
                ("[B, T, G, N]", (batch, T, "G", N)),
            )
        )
        checks.fail(name, f"`{label}` {expected}", f"{tuple(x.shape)}", FORMS)


def check_step(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, z: Tensor | None, inplace: bool
) -> tuple[int, int, int, int]:
    """What a time axis would hide: ranks of one token. Return B, H, P, N."""
    checks.check_rank(STEP, "u", u, "[B, H, P]")
    checks.check_rank(STEP, "dt", dt, "[B, H]")
    if z is not None:
        checks.check_rank(STEP, "z", z, "[B, H, P]")
    check_diagonal(STEP, A, u.shape[1])
    if inplace and state.requires_grad and torch.is_grad_enabled():
        advice = "Gradients do not flow into a state written in place: use inplace=False, or detach it."
        checks.fail(STEP, "a `state` without gradient for inplace=True", "one that requires it", advice)
    if inplace:
        checks.check_separate(STEP, "state", state)
    return (*u.shape, modes(A, B))


def check_pool(state: Tensor, indices: Tensor, u: Tensor, A: Tensor, B: Tensor) -> None:
    """The states, and which of them the rows name; metadata only."""
    shape, layout = (*state.shape[:1], *u.shape[2:], modes(A, B), *A.shape[2:]), "[S, H, P, N]"
    advice = "A pool has a state per entry, head, channel and mode. " + FORMS
    checks.check_shape(STEP, "state", state, shape, layout, advice)
    if state.shape[0] == 0:
        checks.fail(STEP, "at least one state in `state`", "S = 0", "Leave room for one state.")
    checks.check_dtype(STEP, "state_indices", indices, (torch.int32, torch.int64), "Use `.to(torch.int32)`.")
    advice = "One per row of the batch, -1 for none."
    checks.check_shape(STEP, "state_indices", indices, u.shape[:1], "[B]", advice)
    checks.check_device(STEP, u=u, state=state, state_indices=indices)


def with_time(label: str, x: Tensor, A: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """B or C of one token as `selective_scan` takes them: dependent [B,G,N] becomes [B,1,G,N].

    Rank 3 may be static [H,P,N] or dependent [B,G,N]; the shape decides, and rank 4, [1,H,P,N] or
    [B,1,G,N], says it outright.
    """
    batch, H, P, N = sizes
    pair = tuple(A.shape[2:])
    shape, rank = tuple(x.shape), x.ndim - len(pair)
    if rank == 4 and shape == (1, H, P, N, *pair):
        return x[0]
    if rank != 3:
        return x
    static = shape == (H, P, N, *pair)
    dependent = shape[0] == batch and shape[1] > 0 and H % shape[1] == 0 and shape[2:] == (N, *pair)
    if static and dependent:
        advice = (
            f"Say which: `{label}[None]` for static weights, `{label}[:, None]` for input-dependent ones."
        )
        expected = f"`{label}` that is either [H, P, N] or [B, G, N]"
        checks.fail(STEP, expected, f"{shape}, which is both", advice)
    return x[:, None] if dependent else x
