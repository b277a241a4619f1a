"""Argument checks that all speak alike: `<op>: expected <what>, got <actual>. <What to do.>`

Checks of shape, dtype and device look at metadata only and run in the public functions. Checks of
*values* (`check_log_decay` and friends) read the data; ops run them inside their opaque custom op,
and only where `values_are_checked` says so, because on a GPU they would make the host wait.
"""

import os
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)


def fail(op: str, expected: str, got: str, advice: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` in the house's form."""
    raise error(f"{op}: expected {expected}, got {got}. {advice}") from None


def check_rank(op: str, name: str, tensor: Tensor, layout: str) -> None:
    """Raise unless `tensor` has the rank of `layout`, for example "[B, T, H, K]"."""
    rank = layout.count(",") + 1
    if tensor.ndim != rank:
        fail(op, f"`{name}` of rank {rank}, {layout}", f"shape {tuple(tensor.shape)}", "Reshape it.")


def check_shape(
    op: str, name: str, tensor: Tensor, shape: Sequence[int], layout: str, advice: str = ""
) -> None:
    """Raise unless `tensor.shape == shape`; `layout` names the axes in the message."""
    if tuple(tensor.shape) == tuple(shape):
        return
    advice = advice or "Inputs are [B, T, H, ...]; did you pass heads before time?"
    fail(op, f"`{name}` {layout} of shape {tuple(shape)}", f"{tuple(tensor.shape)}", advice)


def check_time(op: str, name: str, T: int) -> None:
    """Raise on a sequence without a token."""
    if T == 0:
        fail(op, f"at least one time step in `{name}`", "T = 0", "Skip the call for an empty sequence.")


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype], advice: str = "") -> None:
    """Raise TypeError unless `tensor.dtype` is one of `allowed`."""
    if tensor.dtype in allowed:
        return
    names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
    got = str(tensor.dtype).removeprefix("torch.")
    fail(
        op, f"`{name}` of dtype {names}", got, advice or f"Cast it, for example `{name}.float()`.", TypeError
    )


def check_same(op: str, **tensors: Tensor | None) -> None:
    """Raise unless all the tensors given share the dtype of the first."""
    given = [(n, t) for n, t in tensors.items() if t is not None]
    first, like = given[0]
    for name, tensor in given[1:]:
        if tensor.dtype != like.dtype:
            check_dtype(op, name, tensor, [like.dtype], f"`{name}` and `{first}` must share a dtype.")


def check_device(op: str, **tensors: Tensor | None) -> None:
    """Raise unless all that is given is tensors, on the device of the first."""
    given = [(n, t) for n, t in tensors.items() if t is not None]
    for name, tensor in given:
        if not isinstance(tensor, Tensor):
            got = f"a {type(tensor).__name__}"
            fail(op, f"`{name}` to be a tensor", got, "Make it one: torch.as_tensor.", TypeError)
    first, like = given[0]
    for name, tensor in given[1:]:
        if tensor.device != like.device:
            advice = f"Move it: `{name}.to({first}.device)`."
            fail(op, f"`{name}` on {like.device}, where `{first}` is", str(tensor.device), advice)


def check_separate(op: str, name: str, tensor: Tensor) -> None:
    """Raise if two entries of a tensor that is written in place are one in memory."""
    end = 0  # of the part of memory that smaller strides cover
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= end:
            advice = (
                f"Entries of an expanded tensor are one in memory: pass `{name}.contiguous()`, and keep it."
            )
            fail(op, f"a `{name}` of separate entries", f"strides {tensor.stride()}", advice)
        end += stride * (size - 1)


def check_choice(op: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless `value` is one of `choices`, which are no floats: 64.0 is not 64."""
    if value not in choices or isinstance(value, float):
        fail(op, f"`{name}` to be one of {', '.join(map(repr, choices))}", repr(value), "Pick one of these.")


def check_cu_seqlens(op: str, cu_seqlens: Tensor, B: int) -> None:
    """Metadata of packed boundaries: i[S+1], integer, and one packed row (B = 1)."""
    check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64), "Use `.to(torch.int32)`.")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        advice = "Give the boundaries of S sequences as S + 1 integers, from 0."
        fail(op, "`cu_seqlens` of shape [S + 1] with S >= 1", f"shape {tuple(cu_seqlens.shape)}", advice)
    if B != 1:
        advice = "Flatten the batch into one row: `x.reshape(1, -1, ...)`."
        fail(op, "packed inputs of batch size 1 with `cu_seqlens`", f"batch size {B}", advice)


def debugging() -> bool:
    """Whether PRISM_CHECK=1 asks for every check, those that cost a pass over the data too."""
    return os.environ.get("PRISM_CHECK", "0") == "1"


def values_are_checked(tensor: Tensor) -> bool:
    """Whether checks that read data run: always on the CPU, elsewhere under PRISM_CHECK=1."""
    return tensor.device.type == "cpu" or debugging()


def check_cu_seqlens_values(op: str, cu_seqlens: Tensor, T: int) -> None:
    """Boundaries start at 0, never decrease and end at or before T (tokens after the last are padding)."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > T:
        advice = "Boundaries are the running sum of the lengths, with a leading 0."
        fail(op, f"`cu_seqlens` from 0 to at most T = {T}", f"{bounds[0]} to {bounds[-1]}", advice)
    if any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
        fail(op, "`cu_seqlens` that never decreases", str(bounds), "Sort it, or sum the lengths again.")


def check_not_positive(op: str, name: str, tensor: Tensor, advice: str) -> None:
    """Raise if any value is above 0. NaN passes: ops propagate it, they do not hide it."""
    largest = tensor.detach().amax() if tensor.numel() else None
    if largest is not None and largest > 0:
        fail(op, f"`{name}` <= 0 everywhere", f"a largest value of {largest.item():.6g}", advice)
