"""Launchers of the per-head kernels, and the table of their constants. Imports Triton."""

from functools import partial

import torch
from torch import Tensor

from .._core.configs import is_amd
from .._core.runtime import launch
from .kernels.heads_backward import heads_adjoint_kernel, heads_backward_kernel
from .kernels.heads_forward import heads_forward_kernel
from .launch_channels import cut

CHUNK = 16  # tokens; divides `launch_channels.SEGMENT`, of which parts of a sequence are multiples
CHANNELS = 32  # of a program
STATES = 64  # of a block of the backward, at most
WARPS = 8  # of the backward
MANY_PROGRAMS = 264  # enough to fill a device: with far fewer, sequences are cut
LEAST_STATES = 17  # of a head; narrower blocks repeat products in every warp
LEAST_SHARE = 0.5  # of the blocks of channels and states that a head fills
# Numbers of 8 bits that operands of products are split into: in y, and in states and gradients.
PARTS = {torch.bfloat16: (1, 2), torch.float16: (2, 2), torch.float32: (3, 3)}
# States of a head, real and complex, beyond which the backward spills on sm_90; 0 where it always does.
WIDEST = {torch.bfloat16: (128, 64), torch.float16: (64, 64), torch.float32: (64, 0)}


def supports(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether a call is for these kernels: by shape and dtype alone.

    They are taken where they need fewer instructions than the channelwise ones (README, "Which calls take
    them"). A single token is not: a chunk would do the work of 16 for it, while either way a step moves the
    same bytes, its state in and out.
    """
    (T, _, P), N = u.shape[1:], A.shape[1]
    by_channel = A.ndim + 1 in (B.ndim, C.ndim)
    widest = WIDEST.get(u.dtype, (0, 0))[A.ndim - 2]
    blocks = -(-P // CHANNELS) * CHANNELS * padded(N)
    return T > 1 and not by_channel and LEAST_STATES <= N <= widest and LEAST_SHARE * blocks <= P * N


def padded(width: int) -> int:
    """Width of a block in registers."""
    return max(16, 1 << (width - 1).bit_length())


def blocks_of_backward(u: Tensor, A: Tensor) -> dict[str, int]:
    """Channels and states of a program: the most that its registers hold on sm_90."""
    twice = A.ndim == 2 and u.dtype != torch.float32 and u.shape[3] > CHANNELS
    return {"BP": 2 * CHANNELS if twice else CHANNELS, "BJ": min(STATES, padded(A.shape[1]))}


def rows_of_chunks(batch: int, T: int, cu_seqlens: Tensor | None) -> int:
    """Rows of stored states: exact, or for packed sequences the bound of `_core/chunk_rows.py`."""
    return batch * -(-T // CHUNK) if cu_seqlens is None else T // CHUNK + cu_seqlens.shape[0] - 1


def residuals(u: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what the forward keeps: the state before every chunk, by planes."""
    batch, T, H, P = u.shape
    rows = rows_of_chunks(batch, T, cu_seqlens)
    return [((rows, H, 1 if A.ndim == 2 else 2, A.shape[1], P), torch.float32)]


def ready(x: Tensor, axes: int) -> Tensor:
    """`x` with its last `axes` axes contiguous."""
    dense = torch.empty(x.shape[-axes:], device="meta").stride()
    return x if x.stride()[-axes:] == dense else x.contiguous()


def forward(
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
    dt_softplus: bool,
    reverse: bool,
    euler: bool,
    accurate: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y, the final state and what the backward wants."""
    batch, T, H, P = u.shape
    S = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    new = torch.empty if cu_seqlens is None else torch.zeros
    y = new(u.shape, dtype=u.dtype, device=u.device)
    final = u.new_empty((S, H, P, *A.shape[1:]), dtype=torch.float32)
    shape, dtype = residuals(u, A, cu_seqlens)[0]
    states = u.new_empty(shape if save else 0, dtype=dtype)
    common = constants(u, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus, reverse, euler)
    tensors, strides = arguments(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    blocks, warps = H * -(-P // CHANNELS), 8 if common["ONE"] > 1 or common["BN"] > 64 else 4
    programs, splits, span = cut(S, blocks, T, MANY_PROGRAMS)

    def run(*args: Tensor | None, FIRST: bool, SAVE: bool) -> None:
        launch(
            heads_forward_kernel, (programs,), *tensors, *args, T, span, *strides,
            num_warps=warps, num_stages=1, FIRST=FIRST, SAVE=SAVE, SPLITS=splits, **common,
        )  # fmt: skip

    parts = totals = None
    if splits > 1:
        parts, totals = room_of_parts(final, splits)
        run(None, totals, None, parts, states, FIRST=False, SAVE=False)
    run(parts, totals, y, final, states, FIRST=initial_state is not None, SAVE=save)
    return y, final, [states]


def room_of_parts(states: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Room for what the parts of cut sequences end in, and their sums of step sizes in float64."""
    S, H = states.shape[:2]
    return states.new_empty(S, splits, *states.shape[1:]), states.new_empty(S, splits, H, dtype=torch.float64)


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    residuals: list[Tensor],
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
    dt_softplus: bool,
    reverse: bool,
    euler: bool,
    accurate: bool,
) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state, empty where there is no input."""
    batch, T, H, P = u.shape
    N, pair = A.shape[1], A.shape[2:]
    S = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    common = constants(u, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus, reverse, euler)
    tensors, strides = arguments(u, dt, A, B, C, D, z, dt_bias, dfinal, cu_seqlens)
    common |= blocks_of_backward(u, A)
    NP, NJ = -(-P // common["BP"]), -(-N // common["BJ"])
    dy, states = dy.contiguous(), residuals[0]
    R, ends = states.shape[0], torch.empty_like(states)
    empty = torch.empty if cu_seqlens is None else torch.zeros
    new = partial(empty, device=u.device)
    sums = partial(new, (R, H, NP, N, *pair), dtype=torch.float32)
    per_token = partial(new, (NP, batch, T, H, N, *pair), dtype=torch.float32)
    du, ddt = new(u.shape, dtype=u.dtype), new((2 * NP, batch, T, H), dtype=torch.float32)
    dA, dB, dC = (
        new((2, R, H, NP, N, *pair), dtype=torch.float32),
        *(per_token() if x.ndim == A.ndim + 2 else sums() for x in (B, C)),
    )
    dD = new((R, H, P), dtype=torch.float32)
    dz = new(0 if z is None else z.shape, dtype=u.dtype if z is None else z.dtype)
    dinitial = torch.empty((S, H, P, N, *pair), dtype=torch.float32, device=u.device)
    programs, splits, span = cut(S, H * NP * NJ, T, MANY_PROGRAMS)

    def lead_back(*args: Tensor | None, DFINAL: bool) -> None:
        launch(
            heads_adjoint_kernel, (programs,), *tensors, dy, *args, T, span, *strides,
            num_warps=4, num_stages=1, DFINAL=DFINAL, SPLITS=splits, **common,
        )  # fmt: skip

    parts = totals = None
    if splits > 1:
        parts, totals = room_of_parts(dinitial, splits)
        lead_back(None, totals, None, parts, DFINAL=False)
    lead_back(parts, totals, ends, dinitial, DFINAL=dfinal is not None)
    launch(
        heads_backward_kernel,
        (R * H * NP * 2,),
        *tensors, dy, states, ends, du, ddt, dA, dB, dC, dD, dz, T, S, R, *strides,
        num_warps=WARPS, num_stages=1, **common,
    )  # fmt: skip
    ddt = ddt.sum(0)
    return (
        du,
        ddt.to(dt.dtype),
        dA.sum((0, 1, 3)).to(A.dtype),
        *(folded(d, x, A) for d, x in ((dB, B), (dC, C))),
        u.new_empty(0) if D is None else dD.sum(0 if D.ndim == 2 else (0, 2)).to(D.dtype),
        dz,
        u.new_empty(0) if dt_bias is None else ddt.sum((0, 1)).to(dt_bias.dtype),
        u.new_empty(0) if initial_state is None else dinitial.to(initial_state.dtype),
    )


def folded(d: Tensor, x: Tensor, A: Tensor) -> Tensor:
    """The gradient of B or C from its parts."""
    if x.ndim == A.ndim:
        return d.sum((0, 2)).to(x.dtype)
    return d.unflatten(3, (x.shape[2], -1)).sum((0, 4)).to(x.dtype)


def arguments(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor], list[int]]:
    """Tensors of a call, any in place of one that is not given, and strides of batch, time and head."""
    pair = A.ndim - 2
    u, z = ready(u, 1), u if z is None else ready(z, 1)
    B, C = (ready(x, 1 + pair) if x.ndim == 4 + pair else x.contiguous() for x in (B, C))
    D, dt_bias, state, cu_seqlens = (
        u if x is None else x.contiguous() for x in (D, dt_bias, state, cu_seqlens)
    )
    strides = [s for x in (u, dt, z) for s in x.stride()[:3]]
    strides += [s for x in (B, C) for s in (x.stride()[:3] if x.ndim == 4 + pair else (0, 0, 0))]
    return [u, dt, A.contiguous(), B, C, D, z, dt_bias, state, cu_seqlens], strides


def constants(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    euler: bool,
) -> dict:
    """What all kernels take."""
    (H, P), N = u.shape[2:], A.shape[1]
    return {
        "H": H,
        "P": P,
        "N": N,
        "BP": CHANNELS,
        "BN": padded(N),
        "C": CHUNK,
        "B_HEADS": H // B.shape[2] if B.ndim == A.ndim + 2 else 0,
        "C_HEADS": H // C.shape[2] if C.ndim == A.ndim + 2 else 0,
        "REAL": A.ndim == 2,
        "EULER": euler,
        "SKIP": 0 if D is None else 1 if D.ndim == 1 else P,
        "GATED": z is not None,
        "BIAS": dt_bias is not None,
        "SOFTPLUS": dt_softplus,
        "PACKED": cu_seqlens is not None,
        "REVERSE": reverse,
        "ONE": PARTS[u.dtype][0],
        "TWO": PARTS[u.dtype][1],
        "PTX": not is_amd(u.device),
    }
