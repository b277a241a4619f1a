"""Clocks and meters: samples, peak memory, and what the machine does at best."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.autograd import DeviceType

from prism_models.layers.linear import Linear

from .results import Roofline

LEAST = 3  # samples of anything
SLOW_MS = 500.0  # longer calls are warm from their check
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
PRODUCT = {"cpu": 1024, "cuda": 8192}  # side of the matrices


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """20, 50 and 80 %."""
    values = torch.tensor(sorted(samples), dtype=torch.float64)
    low, mid, high = torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return low, mid, high


def timed(call: Callable, device: str) -> float:
    """Milliseconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    calls: dict[str, Callable], seconds: float, repeats: int, device: str
) -> dict[str, list[float] | Exception]:
    """Samples of every call, spread evenly over one stretch of time, so that drift hits all alike.

    Each call warms up once, a slow one in its check, and gets an equal share of `seconds`: between `LEAST`
    and `repeats` samples. A call that raises has its exception instead, and is not called again.
    """
    share = 1e3 * seconds / len(calls)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    raised: dict[str, Exception] = {}
    turns = []
    for name, call in calls.items():
        try:
            first = timed(call, device)
            slow = first > SLOW_MS
            samples[name] = [first] if slow else []
            count = int(min(repeats, max(LEAST, share / (first if slow else timed(call, device)))))
            turns += [((j + 0.5) / count, name) for j in range(len(samples[name]), count)]
        except Exception as error:
            raised[name] = error
    for _, name in sorted(turns):
        if name not in raised:
            try:
                samples[name].append(timed(calls[name], device))
            except Exception as error:
                raised[name] = error
    return samples | raised


def on_gpu(call: Callable, seconds: float, repeats: int) -> list[float]:
    """Samples by `triton.testing.do_bench`, which clears the cache before each; slow calls one by one."""
    if timed(call, "cuda") > SLOW_MS:
        return [timed(call, "cuda") for _ in range(LEAST)]
    from triton.testing import do_bench

    milliseconds = min(1e3 * seconds, 5.0 * repeats)
    return do_bench(call, warmup=milliseconds / 4, rep=milliseconds, return_mode="all")


def peak_bytes(call: Callable, device: str) -> int | None:
    """The most memory that a call holds beyond what was there before it.

    On a GPU, of torch's caching allocator. On a CPU, the running sum of the allocations and releases that
    torch's profiler records in one call of its own; memory that libraries take for themselves (oneDNN's
    scratch, NumPy) is not seen. None where the profiler recorded nothing.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak if events else None


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """The profiler's library says on stderr that it starts and stops; no Python switch stops it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def roofline(device: str, dtypes: list[torch.dtype]) -> Roofline:
    """The fastest of several large copies, and of several matrix products per dtype.

    On a CPU a product is PyTorch's or that of our linear layer, which may be another library's.
    """
    n = COPY_BYTES[device]
    source, target = (torch.ones(n // 4, device=device) for _ in range(2))
    copy = _best(lambda: target.copy_(source), device)
    rates = {}
    for dtype in dtypes:
        side = PRODUCT[device]
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        layer = Linear(side, side).to(device, dtype).requires_grad_(False)
        fastest = min(_best(call, device) for call in (partial(torch.matmul, a, b), partial(layer, a)))
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / fastest / 1e9
    return Roofline(copy_gb_s=2 * n / copy / 1e6, tflop_s=rates)


def _best(call: Callable, device: str) -> float:
    """Milliseconds of the fastest of ten calls or more, within about two seconds."""
    first = min(timed(call, device) for _ in range(2))
    return min(timed(call, device) for _ in range(max(10, min(100, int(2e3 / first)))))
