"""The whole compile report: every configuration, target and supported Triton (`make compile-report`).

Two Tritons cannot share one environment, so each other one is installed into a folder of its own under
`.tritons/` and put first on the path of a process of its own; a version that cannot be had is a failure with
its name. Compiled kernels are kept there too, by the hash of their source, so that a second run compiles only
what changed; failures are never kept.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version as installed_version
from pathlib import Path

from . import budgets
from .compile_report import TARGETS, Entry
from .results import environment

ROOT = Path(__file__).parent.parent
SIDE = ROOT / ".tritons"
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
PROCESSES = 2
PAGE = Path(__file__).parent / "COMPILE_REPORT.md"
COMMAND = "python -m benchmarks.compile_report --matrix"


class Missing(Exception):
    """A Triton that cannot be had, and why."""


def matrix(only: str) -> int:
    """Compile everything; write the result file and the page. Returns the exit status."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    checkout = environment("cpu", {})
    with ThreadPoolExecutor(PROCESSES) as pool:
        reports = dict(zip(VERSIONS, pool.map(lambda v: one(v, only), VERSIONS), strict=True))
    report = {
        "kind": "compile report",
        "schema": 1,
        "command": COMMAND,
        "started": started,
        "commit": checkout.commit,
        "dirty": checkout.dirty,
        "versions": {
            "python": checkout.python,
            "torch": checkout.torch,
            "triton": {v: r if isinstance(r, str) else "ok" for v, r in reports.items()},
        },
        "kernels": [
            {"triton": v, **e} for v, r in reports.items() if isinstance(r, dict) for e in r["kernels"]
        ],
    }
    failures = [f"triton {v}: {r}" for v, r in reports.items() if isinstance(r, str)]
    if only:  # a look at a few kernels is not the report
        print("\n".join(failures))
        return int(bool(failures))
    save(report)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")
    for version in VERSIONS:
        failures += budgets.judge(budgets.rows(report, version), budgets.load(), version)
    print("\n".join(failures) or "all within their budgets")
    return int(bool(failures))


def one(version: str, only: str) -> dict | str:
    """The report of one Triton, or why there is none."""
    out = SIDE / f"report-{version}.json"
    try:
        folder = side_folder(version)
    except Missing as error:
        return str(error)
    out.unlink(missing_ok=True)
    path = os.pathsep.join(str(p) for p in (folder, ROOT) if p)
    settings = {
        "PYTHONPATH": path,
        "TRITON_CACHE_DIR": str(SIDE / "cache" / version),
        "PYTHONUNBUFFERED": "1",
    }
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", "--triton", version, "--kernel", only]
    with subprocess.Popen(
        [*command, "--target", *TARGETS, "--out", str(out)],
        cwd=ROOT, env=inherited | settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        last = ""
        for last in process.stdout or ():
            print(f"{version}  {last}", end="", flush=True)
    if not out.exists():
        return f"the report ended with status {process.returncode}: {last.strip()}"
    return json.loads(out.read_text(encoding="utf-8"))


def side_folder(version: str) -> Path | None:
    """Where this Triton lies; None for the installed one.

    Raises:
        Missing: pip cannot install it; the message has pip's last line.
    """
    if installed_version("triton") == version:
        SIDE.mkdir(exist_ok=True)
        return None
    folder = SIDE / version
    if not (folder / "triton" / "__init__.py").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*pip, "--target", str(folder), f"triton=={version}"], capture_output=True, text=True
        )
        if done.returncode:
            raise Missing(f"pip could not install it: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return folder


def save(report: dict) -> None:
    """Write the result file, one row a line."""
    head = json.dumps({k: v for k, v in report.items() if k != "kernels"}, indent=1)
    kernels = ",\n".join(f"  {json.dumps(row)}" for row in report["kernels"])
    text = f'{head.removesuffix("}").rstrip()},\n "kernels": [\n{kernels}\n ]\n}}\n'
    budgets.REPORT.write_text(text, encoding="utf-8")


def summary_table(report: dict) -> str:
    """What each Triton and target made of the kernels."""
    allowed = budgets.load()
    text = [
        "| triton | target | compiled and fit | did not | local memory in a loop | most registers"
        " | most shared, KiB | above the budget |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for version, state in report["versions"]["triton"].items():
        if state != "ok":
            text.append(f"| {version} | all | **{state}** | | | | | |")
            continue
        for target in TARGETS:
            found = [e for e in budgets.rows(report, version) if e.target == target]
            fit = [e for e in found if not e.error]
            cells = (
                *(version, target, len(fit), len(found) - len(fit), sum(e.spill_in_loops > 0 for e in fit)),
                *(max(e.regs for e in fit), f"{max(e.smem for e in fit) / 1024:.0f}"),
                len(budgets.complaints(found, allowed)),
            )
            text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text)


def failure_table(report: dict) -> str:
    """Everything that does not compile or fit."""
    text = ["| kernel | case | target | triton | why |", "| --- | --- | --- | --- | --- |"]
    failed: dict[tuple, list[str]] = {}
    for version in report["versions"]["triton"]:
        for e in budgets.rows(report, version):
            if e.error:
                failed.setdefault((e.kernel, e.case, e.target, e.error), []).append(version)
    for (kernel, case, target, why), versions in failed.items():
        text.append(f"| `{kernel}` | {case} | {target} | {', '.join(versions)} | {why.replace('|', '/')} |")
    return "\n".join(text) if failed else "Nothing."


def kernel_table(report: dict) -> str:
    """Registers, local memory in loops, shared memory, matrix instructions, of the pinned Triton."""
    head = "| kernel | case | " + " | ".join(TARGETS) + " |"
    text = [head, "| --- | --- |" + " ---: |" * len(TARGETS)]
    for (kernel, case), found in grouped(budgets.rows(report, budgets.PINNED)):
        cells = [_cell(found[target]) if target in found else "" for target in TARGETS]
        text.append(f"| `{kernel}` | {case} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def _cell(e: Entry) -> str:
    if e.error:
        return "does not fit" if e.smem else "fails"
    mma = f"{e.group_mma}g" if e.group_mma else ""
    mma += f"{'+' if mma and e.warp_mma else ''}{e.warp_mma}w" if e.warp_mma or not mma else ""
    return f"{e.regs} / {e.spill_in_loops} / {e.smem / 1024:.1f} / {mma}"


def scan_table(report: dict) -> str:
    """Instructions per element of the scan kernels, every Triton."""
    targets = [t for t in TARGETS if t.startswith("sm_")]
    text = [
        "| kernel | case | triton | " + " | ".join(targets) + " |",
        "| --- | --- | --- |" + " ---: |" * len(targets),
    ]
    for version in report["versions"]["triton"]:
        for (kernel, case), found in grouped(budgets.rows(report, version)):
            if any(e.per_element is not None for e in found.values()):
                cells = " | ".join(_scan_cell(found.get(t)) for t in targets)
                text.append(f"| `{kernel}` | {case} | {version} | {cells} |")
    return "\n".join(text)


def _scan_cell(e: Entry | None) -> str:
    return "" if e is None or e.per_element is None else f"{e.per_element:.1f} / {e.mufu_per_element:.1f}"


def grouped(entries: list[Entry]) -> Iterator[tuple[tuple[str, str], dict[str, Entry]]]:
    """Kernel and case, with the worst entry of each target."""
    groups: dict[tuple[str, str], dict[str, Entry]] = {}
    for e in entries:
        group = groups.setdefault((e.kernel, e.case), {})
        group[e.target] = max(group.get(e.target, e), e, key=lambda x: (bool(x.error), x.spill, x.regs))
    yield from sorted(groups.items())


def provenance(report: dict) -> str:
    """Command, versions and commit."""
    state = "with uncommitted changes" if report["dirty"] else "clean"
    versions = report["versions"]
    return (
        f"`{report['command']}`, {report['started']}, commit `{report['commit'][:12]}` ({state}), "
        f"torch {versions['torch']}, Python {versions['python']}, triton pinned {budgets.PINNED}."
    )


TABLES = {
    "provenance": provenance,
    "summary": summary_table,
    "failures": failure_table,
    "scans": scan_table,
    "kernels": kernel_table,
}


def fill(text: str, report: dict) -> str:
    """The page with every table between its markers replaced."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table(report)}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    """Write the page anew from the committed result file."""
    report = json.loads(budgets.REPORT.read_text(encoding="utf-8"))
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
