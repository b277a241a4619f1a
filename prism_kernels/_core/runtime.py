"""Launching kernels: interpreter or device, the device guard, and a recorder for tools.

Every kernel launch of the package goes through `launch`, so that one place enters the device of the
inputs, pins the floating-point options, and can hand the launch to a recorder instead (the compile
report compiles exactly what the ops would have launched, on a machine without a GPU).
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def interpreting() -> bool:
    """Whether Triton's CPU interpreter is on. Must be set before the first call into a kernel."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_is_installed() -> bool:
    """Whether `import triton` can be expected to work; does not import it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast off, so that an op gives the same bits inside and outside an autocast region."""
    return torch.autocast(device_type=device.type, enabled=False)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 (and complex128) inputs, float32 for all others."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


@dataclass
class Launch:
    """One recorded launch: the kernel, its grid, its arguments and its options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constexprs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


_recorder: list[Launch] | None = None
_watcher: list[tuple[str, Any]] | None = None


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; outputs stay uninitialised. For tools only."""
    global _recorder
    outer, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = outer


@contextlib.contextmanager
def watch_launches() -> Iterator[list[tuple[str, Any]]]:
    """Run launches, and collect names of kernels and what they were compiled to (None when interpreting)."""
    global _watcher
    outer, _watcher = _watcher, []
    try:
        yield _watcher
    finally:
        _watcher = outer


def recording() -> bool:
    """Whether launches are being collected instead of run."""
    return _recorder is not None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constexprs: Any
) -> None:
    """Run `kernel` over `grid`. Positional arguments are tensors and numbers, keywords constexpr.

    Floating-point fusion is pinned on, since its default differs between Triton versions.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, args, constexprs, options))
        return
    if interpreting():
        compiled = kernel[grid](*args, **constexprs)
    else:
        with device_of(*args):
            compiled = kernel[grid](*args, **constexprs, **options, enable_fp_fusion=True)
    if _watcher is not None:
        _watcher.append((kernel.__name__, compiled))


def device_of(*args: Any) -> contextlib.AbstractContextManager:
    """Make the device of the first tensor among `args` current."""
    tensor = next(a for a in args if isinstance(a, Tensor))
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
