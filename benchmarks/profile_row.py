"""`python -m benchmarks.profile_row`: where the time of one row goes, kernel by kernel.

    python -m benchmarks.profile_row --slowest-of bench.json
    python -m benchmarks.profile_row --row OP SHAPE DTYPE DIRECTION PROVIDER [--device cpu]

The slowest is our row that is furthest from its floor. With Nsight Compute (`ncu`) on the path each kernel of
one call is read there, clocks left as they are; otherwise, or where it fails, torch's profiler lists them.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .ranking import OURS
from .registry import Adapter, benches
from .results import Key, ResultError, Row, load
from .run import call_of as timed_call

WARM_UP = 3
NCU = ["--clock-control", "none", "--profile-from-start", "off", "--set", "full", "--launch-count", "40"]


def slowest(rows: list[Row]) -> Row | None:
    """Our row with the lowest percentage of the roofline; kernels before other paths."""
    ours = [r for r in rows if r.status == "ok" and r.provider in OURS]
    ours = [r for r in ours if r.provider == OURS[0]] or ours
    return min(ours, key=lambda r: (r.roofline_percent or 100.0, -(r.ms_p50 or 0.0)), default=None)


def call_of(key: Key, device: str) -> Callable[[], object]:
    """The call that the bench times."""
    op, shape, dtype, direction, provider = key
    if op not in benches() or provider not in benches()[op].providers:
        raise SystemExit(f"profile_row: no {op!r} by {provider!r}. `python -m benchmarks list` prints all.")
    bench = benches()[op]
    setting = bench.setting(shape, getattr(torch, dtype), device)
    made = bench.providers[provider].factory(setting)
    tensors = {n: t.to(device) for n, t in bench.draw(setting).items()}
    return timed_call(made if isinstance(made, Adapter) else Adapter(made), tensors, direction != "forward")


def by_torch(call: Callable[[], object], device: str) -> str:
    """Table of torch's profiler over one call."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    return profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=40)


def by_ncu(key: Key) -> bool:
    """Print what Nsight Compute says of each kernel; False where it is missing or fails."""
    ncu = shutil.which("ncu")
    if not ncu:
        print("no ncu on the path: torch's profiler instead")
        return False
    command = [ncu, *NCU, sys.executable, "-m", "benchmarks.profile_row", "--row", *key, "--bare"]
    print("$ " + " ".join(command), flush=True)
    return subprocess.run(command).returncode == 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_row", description=__doc__.splitlines()[0]
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--slowest-of", type=Path, metavar="FILE", help="result file to take the row from")
    names = ("OP", "SHAPE", "DTYPE", "DIRECTION", "PROVIDER")
    which.add_argument("--row", nargs=5, metavar=names, help="the row")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--bare", action="store_true", help="call once between the marks of an outer profiler"
    )
    args = parser.parse_args()
    key, device = args.row, args.device
    if args.slowest_of:
        try:
            result = load(args.slowest_of)
        except ResultError as error:
            parser.error(str(error))
        row, device = slowest(result.rows), result.environment.device
        if row is None:
            parser.error(f"expected a row of ours that is ok in {args.slowest_of}, got none")
        key = row.key
        figures = f"{row.ms_p50:.4g} ms, {row.roofline_percent or 0:.3g} % of the roofline"
        print(f"furthest from its floor: {' '.join(key)}, {figures}")
        if device == "cuda" and by_ncu(key):
            return 0
    call = call_of(tuple(key), device)
    for _ in range(WARM_UP):
        call()
    if not args.bare:
        print(by_torch(call, device))
        return 0
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
