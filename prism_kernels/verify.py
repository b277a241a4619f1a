"""`python -m prism_kernels.verify`: is every op right on this machine?

Prints a row for every op, path, dtype and output or gradient: the worst error over the op's cases, as a
ratio to the error of plain PyTorch in the same precision, both against the float64 reference (see
`prism_kernels/testing/budgets.py`). Ratios up to 2 are within budget. Exits with 1 if a row is above,
not finite, or missing, and prints a small program that shows the worst. Without a GPU the Triton rows run
under Triton's interpreter, in a process of their own, since the interpreter must be switched on before any
kernel is imported.
"""

import argparse
import difflib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch

from .testing import registry
from .testing.budgets import LIMIT
from .testing.measure import PATHS, Job, expected_rows, measure
from .testing.peers import PEERS


def interpreted(arguments: Sequence[str]) -> Iterator[dict]:
    """The Triton rows from a process with the interpreter on; ends early if that process fails."""
    command = [sys.executable, "-m", "prism_kernels.verify", *arguments, "--worker", "triton"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout or ():
            yield json.loads(line)
    if process.returncode != 0:
        print(f"the process of the Triton rows ended with exit code {process.returncode}", file=sys.stderr)


def sources(job: Job, arguments: Sequence[str]) -> Iterator[dict]:
    """All rows: Triton's from a process of their own where there is no GPU for them."""
    apart = job.against is None and "triton" in job.paths and not _kernels_on_gpu(job)
    here = tuple(p for p in job.paths if p != "triton") if apart else job.paths
    if here:
        yield from measure(replace(job, paths=here))
    if apart:
        yield from interpreted(arguments)


def report(job: Job, arguments: Sequence[str], table: TextIO) -> tuple[int, list[dict]]:
    """Print all rows and a verdict to `table`; return the exit code and the rows."""

    def say(text: str = "") -> None:
        print(text, file=table, flush=True)

    width = max([34, *(len(spec.name) + 2 for spec in job.specs)])

    def left(op: str, path: str, dtype: str) -> str:
        return f"{op:<{width}}{path:<{9 if job.against is None else 15}}{dtype:<10}"

    numbers = f"{'tensor':<18}{'ratio':>7}  {'max error':>10}  worst case"
    say(f"torch {torch.__version__}; {_where(job)}\n\n{left('op', 'path', 'dtype')}{numbers}")
    rows, measured = [], []
    for row in sources(job, arguments):
        rows.append(row)
        if "skipped" in row:
            say(f"{left(row['op'], row['path'], row['dtype'])}skipped: {row['skipped']}")
            continue
        measured.append(row)
        mark = "" if row["ok"] else f"   {row.get('error', 'ABOVE THE LIMIT')}"
        numbers = f"{row['tensor']:<18}{row['ratio']:>7.3f}  {row['max_error']:>10.2e}  {row['case']}{mark}"
        say(left(row["op"], row["path"], row["dtype"]) + numbers)
    for row in (r for r in measured if "snippet" in r):
        say(
            f"\n# {row['op']}, {row['path']}, {row['dtype']}, {row['tensor']}: a small case\n{row['snippet']}"
        )
    seen = {(r["op"], r["path"], r["dtype"], r["tensor"]) for r in measured}
    missing = sorted(expected_rows(job) - seen)
    for key in missing:
        say("MISSING  " + "  ".join(key))
    bad = sum(not row["ok"] for row in measured)
    faults = f"{bad} above the limit, {len(missing)} missing"
    verdict = faults if bad or missing else "all within budget" if measured else "nothing was measured"
    say(f"\n{len(measured)} rows, limit {LIMIT:g} times plain PyTorch's error: {verdict}")
    return int(bool(bad or missing or not measured)), rows


def write_json(target: str, job: Job, rows: list[dict], code: int) -> None:
    """The rows and what they were measured on; numbers that JSON has not become null."""
    from .doctor import versions

    device = {path: job.device_of(path) for path in ([job.against] if job.against else job.paths)}
    data = {
        "environment": versions() | {"devices": device},
        "limit": LIMIT,
        "exit_code": code,
        "rows": [{k: None if _not_a_number(v) else v for k, v in row.items()} for row in rows],
    }
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m prism_kernels.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--op", nargs="+", action="extend", metavar="OP", help="these ops only, their variants included")
    add("--path", nargs="+", action="extend", metavar="PATH", help="these paths only: torch, triton")
    add("--dtype", nargs="+", action="extend", metavar="DTYPE", help="these dtypes only")
    device = "cpu, cuda or cuda:N for all paths (on cpu, kernels are interpreted); "
    add("--device", help=device + "default: kernels and peers on a GPU if there is one, the rest on the CPU")
    add("--cases", type=int, metavar="N", help="N random cases an op in place of the catalogue")
    add("--seed", type=int, help="seed of the first random case, default 0; alone it means --cases 8")
    add("--against", metavar="PEER", help=f"another library in place of our paths: {', '.join(PEERS)}")
    file = "write all rows as JSON; without a FILE to stdout, and the table to stderr"
    add("--json", nargs="?", const="-", metavar="FILE", help=file)
    add("--worker", help=argparse.SUPPRESS)
    return parser


def job_of(args: argparse.Namespace, refuse) -> Job:
    """Check the arguments; `refuse(message)` does not return."""
    specs = registry()
    functions = dict.fromkeys(spec.name.split(" ")[0] for spec in specs)
    names = [*dict.fromkeys([*functions, *(spec.name for spec in specs)])]
    for name in args.op or ():
        _known("op", name, names, refuse)
    dtypes = {str(d).removeprefix("torch."): d for spec in specs for d in spec.dtypes}
    for name in args.dtype or ():
        _known("dtype", name, list(dtypes), refuse)
    for name in args.path or ():
        _known("path", name, PATHS, refuse)
    if args.device is not None:
        _check_device(args.device, refuse)
    if args.against is not None:
        _known("peer", args.against, list(PEERS), refuse)
        peer = PEERS[args.against]
        if not peer.installed():
            refuse(f"{args.against} is not installed. `pip install {peer.package}` brings it.")
    if args.cases is not None and args.cases < 1:
        refuse(f"--cases must be at least 1, got {args.cases}")
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        refuse(f"--json {args.json}: there is no folder {Path(args.json).absolute().parent}")
    chosen = [s for s in specs if args.op is None or s.name in args.op or s.name.split(" ")[0] in args.op]
    paths = tuple(args.path or PATHS)
    return Job(
        specs=tuple(chosen),
        paths=(args.worker,) if args.worker else paths,
        dtypes=tuple(dtypes[n] for n in args.dtype or dtypes),
        device=args.device,
        cases=8 if args.cases is None and args.seed is not None else args.cases,
        seed=args.seed or 0,
        against=args.against,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = parser()
    args = command.parse_args(given)
    job = job_of(args, command.error)
    if args.worker is not None:
        for row in measure(job):
            print(json.dumps(row), flush=True)
        return 0
    code, rows = report(job, given, sys.stderr if args.json == "-" else sys.stdout)
    if args.json is not None:
        write_json(args.json, job, rows, code)
    return code


def _known(kind: str, name: str, names: Sequence[str], refuse) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        advice = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(names)}."
        refuse(f"unknown {kind} {name!r}. {advice}")


def _check_device(name: str, refuse) -> None:
    kind, _, index = name.partition(":")
    _known("device", kind, ("cpu", "cuda"), refuse)
    count = torch.cuda.device_count()
    if index and (kind == "cpu" or not index.isdigit()):
        refuse(f"unknown device {name!r}. Did you mean {kind}?")
    if kind == "cuda" and int(index or 0) >= count:
        refuse(f"device {name} is not there: PyTorch sees {count} GPU(s). Leave --device out, or use cpu.")


def _kernels_on_gpu(job: Job) -> bool:
    return job.device.startswith("cuda") if job.device else torch.cuda.is_available()


def _where(job: Job) -> str:
    if job.against is not None:
        return f"{job.against} on {job.device_of(job.against)}"
    gpu = torch.cuda.get_device_name() if _kernels_on_gpu(job) else "Triton's interpreter, on the CPU"
    elsewhere = "the CPU" if job.device_of("torch") == "cpu" else job.device_of("torch")
    parts = {"torch": f"torch path on {elsewhere}", "triton": f"Triton path on {gpu}"}
    return "; ".join(parts[path] for path in job.paths)


def _not_a_number(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


if __name__ == "__main__":
    sys.exit(main())
