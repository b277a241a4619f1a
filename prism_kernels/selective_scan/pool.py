"""A pool of states that the rows of a step name by index: read, write in place, or copy with changes."""

import torch
from torch import Tensor

from .._core import checks

OP = "selective_scan_step"


@torch.library.custom_op("prism_kernels::selective_scan_slots", mutates_args=())
def slots(indices: Tensor, size: int) -> Tensor:
    """The state that each row continues, int64; `size` for rows without one.

    An index beyond the pool is an error where values are checked, and elsewhere a row without a state.
    """
    if checks.values_are_checked(indices):
        named = indices[indices >= 0]
        if named.numel() and named.max() >= size:
            advice = "Pass -1 for rows of the batch that have no state."
            expected = f"`state_indices` below {size}, the number of states"
            checks.fail(OP, expected, str(named.max().item()), advice)
        if named.unique().numel() < named.numel():
            advice = "Two rows cannot move one state. Pass -1 for rows of the batch that have no state."
            checks.fail(OP, "`state_indices` that differ", str(indices.tolist()), advice)
    return torch.where((indices >= 0) & (indices < size), indices, size).long()


@slots.register_fake
def _(indices, size):
    return torch.empty_like(indices, dtype=torch.int64)


def read(pool: Tensor, slot: Tensor) -> Tensor:
    """The states of the rows; 0 for a row without."""
    return where_live(slot < pool.shape[0], pool.index_select(0, slot.clamp(max=pool.shape[0] - 1)))


def where_live(live: Tensor, x: Tensor, other: Tensor | int = 0) -> Tensor:
    """Rows of a batch that have a state; `other` in those that have none, whatever they hold."""
    return torch.where(live.view(-1, *[1] * (x.ndim - 1)), x, other)


def of_live(
    live: Tensor,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Inputs of one token, harmless in rows without a state: 0, and a step size that is not negative."""
    dt = where_live(live, dt, 0 if dt_bias is None else dt_bias.detach().abs())
    B, C = (where_live(live, x) if x.ndim == 4 + (A.ndim == 3) else x for x in (B, C))
    return where_live(live, u), dt, B, C, None if z is None else where_live(live, z)


def write(pool: Tensor, slot: Tensor, new: Tensor) -> Tensor:
    """Store the states of the rows in place; rows without one repeat what another stores: nobody waits."""
    if not len(slot):
        return pool
    live = slot < pool.shape[0]
    some, one = live.any(), live.byte().argmax()[None]
    place = torch.where(some, slot.index_select(0, one), 0)
    value = torch.where(some, new.index_select(0, one).to(pool.dtype), pool[:1])
    return pool.index_copy_(0, torch.where(live, slot, place), where_live(live, new.to(pool.dtype), value))


def replaced(pool: Tensor, slot: Tensor, new: Tensor) -> Tensor:
    """The pool with the states of the rows; rows without one write to a state that is then cut off."""
    return torch.cat([pool, pool[:1]]).index_copy(0, slot, new.to(pool.dtype))[: pool.shape[0]]
