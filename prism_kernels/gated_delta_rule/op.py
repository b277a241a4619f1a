"""Opaque custom ops, one pair (forward, backward) per public function; launchers are in launch.py.

Every path other than the reference is one node to autograd, torch.compile and export. A forward op returns
(o, final_state) and four residuals, empty where the path or an inference call has no use for them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .._core import checks
from .._core.autograd import first_order_only
from .._core.runtime import accumulate_dtype, without_autocast
from . import torch_impl

Shape = tuple[tuple[int, ...], torch.dtype]
Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def check_values(op: str, g: Tensor, cu_seqlens: Tensor | None, T: int) -> None:
    """Checks that read data; see `checks.values_are_checked`."""
    checks.check_not_positive(op, "g", g, "It is the natural logarithm of the decay: `g = alpha.log()`.")
    if cu_seqlens is not None:
        checks.check_cu_seqlens_values(op, cu_seqlens, T)


def state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """[B or S, HV, K, V]."""
    S = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (S, v.shape[2], q.shape[3], v.shape[3])


def chunk_residuals(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, l2norm: bool, C: int, impl: str
) -> list[Shape]:
    """Shapes and dtypes of what the chunked forward keeps for its backward."""
    (B, T, HV, V), K, wide = v.shape, q.shape[3], accumulate_dtype(q.dtype)
    none = ((0,), wide)
    if impl == "triton":
        from .launch import inner_chunk

        C = inner_chunk(C, K, V, q.dtype)
        padded = (T + C - 1) // C * C
        square = ((2 if q.dtype.itemsize == 2 else 1, B, HV, padded, C), q.dtype)
        # Differences of G must be exact to the last bit of what they decay.
        G = ((B, HV, padded), torch.float64 if q.dtype.itemsize > 2 else torch.float32)
        return [square, square, G, ((3 if l2norm else 1, B, HV, padded), wide)]
    C = torch_impl.inner_chunk(C, K, V)
    steps = (T + C - 1) // C
    M = B * HV * steps if cu_seqlens is None else HV * (T // C + cu_seqlens.shape[0] - 1)
    return [((M, C, C), wide), ((M, C, V), wide), ((M, K, V), wide), none]


def recurrent_residuals(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, impl: str) -> list[Shape]:
    """Shapes and dtypes of what the token-by-token forward keeps for its backward."""
    (S, HV, K, V), wide = state_shape(q, v, cu_seqlens), accumulate_dtype(q.dtype)
    none = ((0,), wide)
    if impl == "triton":
        from .launch import EVERY

        return [((S * HV * ((v.shape[1] + EVERY - 1) // EVERY), K, V), wide), none, none, none]
    every = torch_impl.CHECKPOINT
    return [((S * HV * ((v.shape[1] + every - 1) // every), K, V), wide), none, none, none]


def empty_residuals(like: Tensor, shapes: list[Shape], save: bool) -> list[Tensor]:
    """Room for residuals, or as many empty tensors."""
    return [like.new_empty(shape if save else (0,), dtype=dtype) for shape, dtype in shapes]


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The kernels' strides are constants."""
    return [None if x is None else x.contiguous() for x in tensors]


@torch.library.custom_op("prism_kernels::chunk_gated_delta_rule_fwd", mutates_args=())
def chunk_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    chunk_size: int,
    save: bool,
    impl: str,
) -> Forward:
    """Chunked forward."""
    if checks.values_are_checked(g):
        check_values("chunk_gated_delta_rule", g, cu_seqlens, q.shape[1])
    with without_autocast(q.device):
        if impl == "triton":
            from . import launch

            q, k, v, g, beta, initial_state = contiguous(q, k, v, g, beta, initial_state)
            # What the kernels pass on to each other is needed here even when it is not kept.
            kept = empty_residuals(g, chunk_residuals(q, v, None, l2norm, chunk_size, impl), True)
            C = kept[0].shape[-1]
            o, final = launch.chunk_forward(q, k, v, g, beta, initial_state, kept, scale, l2norm, C)
            return o, final, *(kept if save else [g.new_empty(0) for _ in kept])
        o, final, saved = torch_impl.forward(
            q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm, chunk_size, save
        )
        return o, final, *saved, g.new_empty(0)


@chunk_fwd.register_fake
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm, chunk_size, save, impl):
    residuals = empty_residuals(g, chunk_residuals(q, v, cu_seqlens, l2norm, chunk_size, impl), save)
    return v.new_empty(v.shape), g.new_empty(state_shape(q, v, cu_seqlens)), *residuals


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
    residuals: list[Tensor],
    scale: float,
    l2norm: bool,
    chunk_size: int,
    impl: str,
) -> Backward:
    """Gradients of q, k, v, g, beta and the initial state."""
    if residuals[0].numel() == 0:
        residuals = chunk_fwd(
            q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm, chunk_size, True, impl
        )[2:]
    with without_autocast(q.device):
        if impl == "triton":
            from . import launch

            do, dfinal, q, k, v, initial_state = contiguous(do, dfinal, q, k, v, initial_state)
            C = residuals[0].shape[-1]
            return launch.chunk_backward(do, dfinal, q, k, v, g, initial_state, residuals, scale, l2norm, C)
        saved = torch_impl.Saved(*residuals[:3])
        return torch_impl.backward(do, dfinal, q, k, v, g, beta, cu_seqlens, saved, scale, l2norm, chunk_size)


@chunk_bwd.register_fake
def _(do, dfinal, q, k, v, g, beta, initial_state, cu_seqlens, residuals, scale, l2norm, chunk_size, impl):
    return fake_gradients(q, k, v, g, beta, cu_seqlens)


@torch.library.custom_op("prism_kernels::fused_recurrent_gated_delta_rule_fwd", mutates_args=())
def recurrent_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    save: bool,
    impl: str,
) -> Forward:
    """Forward, token by token."""
    if checks.values_are_checked(g):
        check_values("fused_recurrent_gated_delta_rule", g, cu_seqlens, q.shape[1])
    with without_autocast(q.device):
        if impl == "triton":
            from . import launch

            q, k, v, g, beta, initial_state = contiguous(q, k, v, g, beta, initial_state)
            kept = empty_residuals(g, recurrent_residuals(q, v, None, impl), save)
            o, final = launch.recurrent_forward(q, k, v, g, beta, initial_state, kept[0], scale, l2norm)
            return o, final, *kept
        o, final, checkpoints = torch_impl.recurrent_forward(
            q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm, save
        )
        return o, final, checkpoints, *(g.new_empty(0) for _ in range(3))


@recurrent_fwd.register_fake
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm, save, impl):
    residuals = empty_residuals(g, recurrent_residuals(q, v, cu_seqlens, impl), save)
    return v.new_empty(v.shape), g.new_empty(state_shape(q, v, cu_seqlens)), *residuals


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
    residuals: list[Tensor],
    scale: float,
    l2norm: bool,
    impl: str,
) -> Backward:
    """Gradients of q, k, v, g, beta and the initial state."""
    if residuals[0].numel() == 0:
        residuals = recurrent_fwd(q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm, True, impl)[2:]
    with without_autocast(q.device):
        if impl == "triton":
            from . import launch

            do, dfinal, q, k, v, g, beta = contiguous(do, dfinal, q, k, v, g, beta)
            return launch.recurrent_backward(do, dfinal, q, k, v, g, beta, residuals[0], scale, l2norm)
        return torch_impl.recurrent_backward(
            do, dfinal, q, k, v, g, beta, cu_seqlens, residuals[0], scale, l2norm
        )


@recurrent_bwd.register_fake
def _(do, dfinal, q, k, v, g, beta, initial_state, cu_seqlens, residuals, scale, l2norm, impl):
    return fake_gradients(q, k, v, g, beta, cu_seqlens)


def fake_gradients(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None):
    """Contiguous gradients of all six inputs."""
    like = [x.new_empty(x.shape) for x in (q, k, v, g, beta)]
    return *like, g.new_empty(state_shape(q, v, cu_seqlens))


def _setup_context(ctx, inputs, output):
    q, k, v, g, beta, initial_state, cu_seqlens, *options = inputs
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens, *output[2:])
    ctx.options = options  # scale, l2norm, (chunk_size), save, impl
    ctx.set_materialize_grads(False)


def _autograd(backward: Callable) -> Callable:
    """The autograd formula of a forward op from its backward op."""

    def gradients(ctx, do, dfinal, *_):
        q, k, v, g, beta, initial_state, cu_seqlens, *residuals = ctx.saved_tensors
        *options, _save, impl = ctx.options
        if do is None:
            do = torch.zeros_like(v)
        grads = backward(
            do, dfinal, q, k, v, g, beta, initial_state, cu_seqlens, list(residuals), *options, impl
        )
        *grads, dstate = grads
        return *grads, None if initial_state is None else dstate, *[None] * (1 + len(ctx.options))

    return gradients


chunk_fwd.register_autograd(_autograd(chunk_bwd), setup_context=_setup_context)
recurrent_fwd.register_autograd(_autograd(recurrent_bwd), setup_context=_setup_context)
first_order_only(chunk_bwd, "chunk_gated_delta_rule")
first_order_only(recurrent_bwd, "fused_recurrent_gated_delta_rule")
