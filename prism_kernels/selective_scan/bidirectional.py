"""The scan in both directions over the same tokens, as vision and audio models have it."""

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from .._core import checks
from .api import selective_scan

OP = "selective_scan_bidirectional"


class SelectiveScanBidirectionalOutput(NamedTuple):
    """`y` r[B,T,H,P] in the dtype of u, and the states that the directions end in (None unless asked for)."""

    y: Tensor
    final_state: Tensor | None
    final_state_reverse: Tensor | None


def selective_scan_bidirectional(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_reverse: Tensor | None = None,
    A_reverse: Tensor | None = None,
    B_reverse: Tensor | None = None,
    C_reverse: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_bias_reverse: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    initial_state_reverse: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    discretization: str = "zoh",
    accuracy: str = "accurate",
    allow_growth: bool = False,
    impl: str | None = None,
) -> SelectiveScanBidirectionalOutput:
    """Run the recurrence of `selective_scan` from both ends of each sequence, and add what they read.

        f_t = exp(dt_t A) f_{t-1} + w_t B_t u_t                (w_t = (exp(dt_t A) - 1) / A; "euler": dt_t)
        r_t = exp(dt'_t A') r_{t+1} + w'_t B'_t u_t            (the dashed: dt_reverse, A_reverse, ...)
        y_t = (2 Re sum_n (conj(C_t) f_t + conj(C'_t) r_t) + D u_t) * silu(z_t)

    Two calls of `selective_scan`: numerics, ranges and determinism are as there, and both calls round
    their y to the dtype of u. Nothing is causal. A token's own input is read by both directions.

    Args:
        u, dt, A, B, C: As in `selective_scan`, for the forward direction.
        D: Skip weights, r[H] or r[H,P], counted once. Where each direction has its own, as in Vision
            Mamba, pass the sum of the two.
        z: Gate of both directions, like u.
        dt_reverse, A_reverse, B_reverse, C_reverse: What the reverse direction has of its own, in the
            order of the tokens and like the forward ones. None: the same as forward.
        dt_bias: r[H], added to dt first, and to `dt_reverse` where that has no bias of its own.
        dt_bias_reverse: r[H]. None: `dt_bias`.
        initial_state: Before the first token, as in `selective_scan`. None: zeros.
        initial_state_reverse: After the last token, alike. None: zeros.
        output_final_state: Whether to return the states that the directions end in.
        dt_softplus, cu_seqlens, discretization, accuracy, allow_growth, impl: As in `selective_scan`.

    Returns:
        `SelectiveScanBidirectionalOutput(y, final_state, final_state_reverse)`: the state after the last
        token, and the reverse one after the first.

    Raises:
        ValueError: a wrong rank, shape, device or value. TypeError: a wrong dtype.
        NotImplementedError: the call needs what the path lacks: `allow_growth` on "triton".

    Example:
        >>> u, dt, A = torch.randn(2, 50, 8, 1), torch.rand(2, 50, 8), -torch.rand(8, 16)
        >>> B, C = torch.randn(2, 50, 1, 16), torch.randn(2, 50, 1, 16)
        >>> y = selective_scan_bidirectional(u, dt, A, B, C, D=torch.ones(8), A_reverse=2 * A).y
        >>> y.shape
        torch.Size([2, 50, 8, 1])

    Source: Zhu et al., Vision Mamba (arXiv:2401.09417), algorithm 1; Gu and Dao, Mamba (arXiv:2312.00752).
    """
    own = {
        "dt": (dt, dt_reverse),
        "A": (A, A_reverse),
        "B": (B, B_reverse),
        "C": (C, C_reverse),
        "dt_bias": (dt_bias, dt_bias_reverse),
    }
    backward: dict[str, Any] = {name: _own_or_shared(name, *pair) for name, pair in own.items()}
    scan = partial(
        selective_scan,
        u,
        z=z,
        dt_softplus=dt_softplus,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        discretization=discretization,
        accuracy=accuracy,
        allow_growth=allow_growth,
        impl=impl,
    )
    y, final = scan(dt, A, B, C, D, dt_bias=dt_bias, initial_state=initial_state)
    y_reverse, final_reverse = scan(**backward, initial_state=initial_state_reverse, reverse=True)
    return SelectiveScanBidirectionalOutput(y + y_reverse, final, final_reverse)


def _own_or_shared(name: str, forward: Tensor | None, reverse: Tensor | None) -> Tensor | None:
    """What the reverse direction takes: its own, which must be like the forward one, or that one."""
    if reverse is None:
        return forward
    if forward is not None:
        advice = "Both directions scan the same tokens, in the same form."
        checks.check_shape(OP, f"{name}_reverse", reverse, forward.shape, f"like `{name}`,", advice)
        checks.check_dtype(OP, f"{name}_reverse", reverse, (forward.dtype,))
    return reverse
