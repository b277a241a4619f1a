"""`python -m prism_kernels.doctor`: versions, devices, each op's path and why, known problems, a verdict.

Ends with a line of verdict: ok, works with limits, or broken; exits with 1 if broken. A probe that fails is
reported in place of its result. `--json` prints the same as JSON.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ._core.impl import choose_impl
from ._core.known import Facts, numbers, problems
from ._core.runtime import interpreting, triton_is_installed

EXTRAS = {
    "train": ("lightning", "torchmetrics", "jsonargparse", "safetensors", "rich"),
    "data": ("scikit-learn", "aeon"),
    "plot": ("matplotlib",),
    "hf": ("transformers", "safetensors"),
    "dev": ("pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "mypy"),
}
PEERS = ("flash-linear-attention", "mamba-ssm", "causal-conv1d")


class Failed(str):
    """Why a probe has no result."""


def probe(function: Callable[[], Any]) -> Any:
    """The result, or a `Failed` with the reason: a doctor does not fall ill."""
    try:
        return function()
    except Exception as error:
        return Failed(f"probe failed: {type(error).__name__}: {error}".splitlines()[0])


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Versions of all that the ops stand on."""
    from . import __version__

    return {
        "prism_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": probe(triton_version),
        "numpy": probe(lambda: version("numpy")),
        "einops": probe(lambda: version("einops")),
        "cuda of torch": torch.version.cuda,
        "rocm of torch": torch.version.hip,
        "driver": probe(driver),
        "ptxas": probe(ptxas),
    }


def triton_version() -> str | None:
    """The version of the Triton that imports, or None."""
    return importlib.import_module("triton").__version__ if triton_is_installed() else None


def driver() -> str | None:
    """The NVIDIA driver's version, or None without a GPU."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]


def ptxas() -> str | None:
    """The version of the assembler that Triton calls for this GPU (for Hopper, where there is none)."""
    if not triton_is_installed():
        return None
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    path = os.environ.get("TRITON_PTXAS_PATH")
    if path is None:
        compiler = importlib.import_module("triton.backends.nvidia.compiler")
        path = compiler.get_ptxas(10 * major + minor).path
    output = subprocess.run(
        [path, "--version"], capture_output=True, text=True, timeout=20, check=True
    ).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", output)
    return found.group(1) if found else None


def triton_for_torch() -> str | None:
    """The triton that this build of torch requires, if it names one."""
    for line in importlib.metadata.requires("torch") or ():
        found = re.match(r"triton\s*\(?==\s*([\d.]+)", line)
        if found:
            return found.group(1)
    return None


def devices() -> list[dict[str, Any]]:
    """The CPU, and every GPU with its capability and memory."""
    found: list[dict[str, Any]] = [{"device": "cpu", "name": platform.processor() or platform.machine(),
                                    "threads": torch.get_num_threads()}]  # fmt: skip
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


# Functions that bear another library's name, and the op they run on.
OF_OTHERS = {"selective_state_update": "selective_scan", "mamba_chunk_scan_combined": "selective_scan"}


def paths(device: str) -> list[dict[str, Any]]:
    """For every public op: the path for tensors on `device`, why not Triton's, and whether it ran."""
    from .testing import registry

    specs, public = registry(), importlib.import_module(__package__).__all__
    rows = []
    for name in (n for n in public if n[0].islower()):
        op = OF_OTHERS.get(name, name)
        own = [s for s in specs if s.name == op] or [s for s in specs if op.startswith(s.name)]
        if not own:
            rows.append({"op": name, "device": device, "path": None, "why": "not described in the catalogue"})
            continue
        have = (*own[0].paths, "reference")
        path = probe(partial(_chosen, name, None, device, have))
        forced = probe(partial(_chosen, name, "triton", device, have))
        refusal = str(forced).removeprefix("probe failed: ValueError: ").removeprefix(f"{name}: ")
        why = "kernels are for this device" if path == "triton" else refusal
        why = "taken only when asked for" if path != forced == "triton" else why
        ran = probe(partial(_try, own[0], device)) if own[0].name == name else None
        rows.append({"op": name, "device": device, "path": path, "why": why, "ran": ran})
    return rows


def _chosen(name: str, impl: str | None, device: str, have: tuple[str, ...]) -> str:
    return choose_impl(name, impl, torch.device(device), paths=have)


def _try(spec: Any, device: str) -> str:
    """Run the op's smallest case forward."""
    cases = [c for c in spec.cases(torch.float32) if not c.hostile and spec.on_triton(c)]
    case = min(cases, key=lambda c: sum(t.numel() for t in c.tensors.values()))
    outputs = spec.run(case.to(device), None)
    finite = all(
        torch.isfinite(torch.view_as_real(y) if y.is_complex() else y).all() for y in outputs.values()
    )
    if not finite:
        raise ArithmeticError("results are not finite")
    return "ran"


def extras() -> list[dict[str, Any]]:
    """Optional packages, their versions, and what brings them."""
    rows = [
        {"package": package, "version": version(package), "brings": f'pip install "prism-kernels[{extra}]"'}
        for extra, packages in EXTRAS.items()
        for package in packages
    ]
    peers = ({"package": p, "version": version(p), "brings": f"pip install {p}"} for p in PEERS)
    return [*{row["package"]: row for row in reversed(rows)}.values()][::-1] + list(peers)


def facts(found: dict[str, Any], present: list[dict[str, Any]]) -> Facts:
    """What the table of known problems is judged on."""

    def known(name: str) -> str | None:
        return None if isinstance(found[name], Failed) else found[name]

    gpus = [d for d in present if d["device"] != "cpu"]
    nvidia = [] if found["rocm of torch"] else gpus
    required = probe(triton_for_torch)
    return Facts(
        python=known("python"),
        torch=known("torch"),
        triton=known("triton"),
        numpy=known("numpy"),
        einops=known("einops"),
        ptxas=known("ptxas"),
        triton_for_torch=None if isinstance(required, Failed) else required,
        capabilities=tuple(numbers(d["capability"])[:2] for d in nvidia),  # type: ignore[misc]
        gpus=len(gpus),
        interpreting=interpreting(),
    )


def examine() -> dict[str, Any]:
    """Everything, as one dictionary."""
    found = versions()
    present = probe(devices)
    listed = [{"device": "cpu", "name": str(present)}] if isinstance(present, Failed) else present
    rows = [probe(partial(paths, d["device"])) for d in listed]
    taken = [r for part in rows for r in (part if isinstance(part, list) else [{"op": "all", "ran": part}])]
    wrong = problems(facts(found, listed))
    known = [{k: v for k, v in asdict(p).items() if k != "holds"} for p in wrong]
    return {
        "versions": found,
        "devices": present,
        "interpreter": {"on": interpreting(), "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET")},
        "paths": taken,
        "extras": probe(extras),
        "problems": known,
        **verdict(found, taken, known),
    }


def verdict(found: dict[str, Any], taken: list[dict], known: list[dict]) -> dict[str, str]:
    """Broken if an op fails or the table says so; limits if a probe failed or the table says so."""
    failed = [f"{r['op']} failed on {r.get('device')}" for r in taken if isinstance(r.get("ran"), Failed)]
    broken = failed + [p["name"] for p in known if p["level"] == "broken"]
    limits = [p["name"] for p in known if p["level"] == "limit"]
    limits += [f"{name}: {value}" for name, value in found.items() if isinstance(value, Failed)]
    state = "broken" if broken else "works with limits" if limits else "ok"
    return {"state": state, "because": "; ".join(broken or limits)}


def lines(report: dict[str, Any]) -> list[str]:
    """The report in words."""
    out = ["versions"]
    out += [f"  {name:<16}{_shown(value)}" for name, value in report["versions"].items()]
    out += ["", "devices"]
    if isinstance(report["devices"], Failed):
        out += [f"  {_shown(report['devices'])}"]
    else:
        out += ["  " + ", ".join(f"{k} {v}" if i else str(v) for i, (k, v) in enumerate(d.items()))
                for d in report["devices"]]  # fmt: skip
    on = "on: kernels run on the CPU" if report["interpreter"]["on"] else "off"
    out += [
        "",
        f"interpreter  {on} (TRITON_INTERPRET={report['interpreter']['TRITON_INTERPRET']})",
        "",
        "paths",
    ]
    for row in report["paths"]:
        ran = row.get("ran")
        state = f"; FAILED, {ran}" if isinstance(ran, Failed) else "; a small case ran" if ran else ""
        out += [
            f"  {row['op']:<34}{row.get('device', ''):<8}{row.get('path') or '-':<10}{state.lstrip('; ')}"
        ]
    reasons = {(r.get("device"), r.get("why")) for r in report["paths"] if r.get("path") != "triton"}
    out += [f"  not 'triton' on {device}: {why}" for device, why in sorted(reasons, key=str) if why]
    out += ["", "optional packages"]
    if isinstance(report["extras"], Failed):
        out += [f"  {_shown(report['extras'])}"]
    else:
        out += [f"  {r['package']:<26}{r['version'] or 'missing: ' + r['brings']}" for r in report["extras"]]
    out += (
        ["", "known problems that apply here"]
        if report["problems"]
        else ["", "no known problem applies here"]
    )
    for p in report["problems"]:
        out += [f"  {p['level']}: {p['name']}", f"    {p['reason']}", f"    remedy: {p['remedy']}"]
    because = f" ({report['because']})" if report["because"] else ""
    return [*out, "", f"verdict: {report['state']}{because}"]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m prism_kernels.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(arguments)
    report = examine()
    print(json.dumps(report, indent=1) if args.json else "\n".join(lines(report)))
    return int(report["state"] == "broken")


if __name__ == "__main__":
    sys.exit(main())
