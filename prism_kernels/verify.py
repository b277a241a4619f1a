"""`python -m prism_kernels.verify`: is every op right on this machine?

Prints a row for every op, path, dtype and output or gradient: the worst error over the op's cases, as a
ratio to the error of plain PyTorch in the same precision, both against the float64 reference (see
`prism_kernels/testing/budgets.py`). Ratios up to 2 are within budget. Exits with 1 if a row is above,
not finite, or missing. Without a GPU the Triton rows run under Triton's interpreter, in a process of
their own, since the interpreter must be switched on before any kernel is imported.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import torch

from ._core.runtime import interpreting
from .testing import OpSpec, budget_rows, registry
from .testing.budgets import LIMIT, differentiable

HEADER = f"{'op':<34}{'path':<9}{'dtype':<10}{'tensor':<18}{'ratio':>7}  {'max error':>10}  worst case"
Key = tuple[str, str, str, str]


def expected_rows(paths: tuple[str, ...]) -> set[Key]:
    """The rows that must be there: every output and gradient of every op on every path and dtype."""
    keys = set()
    for spec, path in ((s, p) for s in registry() for p in s.paths if p in paths):
        for dtype in spec.dtypes:
            names = set(spec.hand()[1])
            for case in _cases(spec, path, dtype):
                names |= {f"d{n}" for n, t in case.tensors.items() if differentiable(t)}
            keys |= {(spec.name, path, _short(dtype), n) for n in names}
    return keys


def measure(paths: tuple[str, ...]) -> Iterator[dict]:
    """Yield one dictionary a row: the worst case of each output and gradient."""
    for spec, path in ((s, p) for s in registry() for p in s.paths if p in paths):
        device = "cuda" if path == "triton" and not interpreting() else "cpu"
        for dtype in spec.dtypes:
            worst: dict[str, dict] = {}
            for case in _cases(spec, path, dtype):
                for row in budget_rows(spec, case.to(device), path):
                    best = worst.get(row.tensor)
                    if best is None or not row.ratio <= best["ratio"]:
                        worst[row.tensor] = {
                            "op": spec.name,
                            "path": path,
                            "dtype": _short(dtype),
                            "tensor": row.tensor,
                            "ratio": row.ratio,
                            "max_error": row.max_error,
                            "case": case.name,
                        }
            yield from worst.values()


def interpreted() -> Iterator[dict]:
    """The Triton rows from a process with the interpreter on; ends early if that process fails."""
    command = [sys.executable, "-m", "prism_kernels.verify", "--worker", "triton"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout or ():
            yield json.loads(line)
    if process.returncode != 0:
        print(f"the process of the Triton rows ended with exit code {process.returncode}", file=sys.stderr)


def report() -> int:
    """Print all rows and a verdict; return the exit code."""
    on_gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if on_gpu else "Triton's interpreter, on the CPU"
    print(f"torch {torch.__version__}; torch path on the CPU; Triton path on {where}\n\n{HEADER}")
    sources = [measure(("torch", "triton"))] if on_gpu else [measure(("torch",)), interpreted()]
    seen, bad = set(), 0
    for row in (r for source in sources for r in source):
        seen.add((row["op"], row["path"], row["dtype"], row["tensor"]))
        ok = row["ratio"] <= LIMIT
        bad += not ok
        left = f"{row['op']:<34}{row['path']:<9}{row['dtype']:<10}{row['tensor']:<18}"
        mark = "" if ok else "   ABOVE THE LIMIT"
        print(f"{left}{row['ratio']:>7.3f}  {row['max_error']:>10.2e}  {row['case']}{mark}", flush=True)
    missing = sorted(expected_rows(("torch", "triton")) - seen)
    for key in missing:
        print("MISSING  " + "  ".join(key))
    verdict = (
        "all within budget" if not bad and not missing else f"{bad} above the limit, {len(missing)} missing"
    )
    print(f"\n{len(seen)} rows, limit {LIMIT:g} times plain PyTorch's error: {verdict}")
    return int(bool(bad or missing))


def _cases(spec: OpSpec, path: str, dtype: torch.dtype) -> list:
    return [c for c in spec.cases(dtype) if path != "triton" or spec.on_triton(c)]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m prism_kernels.verify", description=__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is None:
        return report()
    for row in measure((args.worker,)):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
