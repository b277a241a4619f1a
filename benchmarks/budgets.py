"""`python -m benchmarks.budgets`: hold `budgets.toml` against the committed compile report, and tighten it.

The file has a table per kernel and case, with a line per target:

    [scan_forward."P1 N16 bf16"]
    sm_90 = { regs = 120, spill = 0, spill_in_loops = 0, smem = 32, per_element = 107, mufu_per_element = 0 }
    gfx942 = { compiles = true }
    reason = "why a number is higher than it was, or than the house allows"

A measured value may not exceed its budget. Budgets hold for the Triton that `constraints.txt` pins. Lowering
one is a normal change: `--write` does it. A number that goes up, breaks a limit of the house (`LIMITS`), or a
kernel that does not compile or fit (`compiles = false`, or `except = [Tritons on which it does not]`) needs a
reason: `--write --reason "..."`.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compile_report import Entry

ROOT = Path(__file__).parent.parent
FILE = Path(__file__).parent / "budgets.toml"
REPORT = Path(__file__).parent / "results" / "compile_report.json"
PINNED = re.findall(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)[0]
MEASURES = ("regs", "spill", "spill_in_loops", "smem", "per_element", "mufu_per_element")
LIMITS = {"spill": 48, "spill_in_loops": 0}  # of the house; more needs a reason
COMPILED_ONLY = ("gfx942",)  # targets whose budget is that they compile

Budgets = dict[str, dict[str, dict]]


def load(text: str | None = None) -> Budgets:
    """Kernel -> case -> target -> numbers, and `reason`."""
    return tomllib.loads(FILE.read_text(encoding="utf-8") if text is None and FILE.exists() else text or "")


def complaints(entries: Iterable["Entry"], budgets: Budgets) -> list[str]:
    """What breaks a budget: kernel, measured and allowed, in words."""
    broken = []
    for e in entries:
        name, cases = f"{e.kernel} [{e.case}] {e.target}", budgets.get(e.kernel, {})
        budget = cases.get(e.case, {}).get(e.target)
        if budget is None:
            broken.append(f"{name}: has no budget. Add it to benchmarks/budgets.toml.")
        elif bool(e.error) and budget.get("compiles", True):
            broken.append(f"{name}: {e.error}")
        elif not e.error and not budget.get("compiles", True):
            broken.append(f"{name}: compiles now. Give it a budget.")
        elif not e.error:
            broken += [
                f"{name}: {m} {getattr(e, m)}, allowed {budget[m]}"
                for m in MEASURES
                if m in budget and getattr(e, m) is not None and getattr(e, m) > budget[m]
            ]
    return broken


def judge(entries: Iterable["Entry"], budgets: Budgets, version: str) -> list[str]:
    """What is wrong: any broken budget on the pinned Triton; on others, only what does not compile or fit."""
    if version == PINNED:
        return complaints(entries, budgets)
    failed = [e for e in entries if e.error]
    known = {
        (kernel, case, target)
        for kernel, case, target, n in lines(budgets)
        if not n.get("compiles", True) or version in n.get("except", ())
    }
    return complaints([e for e in failed if (e.kernel, e.case, e.target) not in known], budgets)


def unexplained(budgets: Budgets) -> list[str]:
    """Budgets above a limit of the house, and known failures, that give no reason."""
    return [
        f"{kernel} [{case}] {target}: {what} needs a reason"
        for kernel, case, target, numbers in lines(budgets)
        if not budgets[kernel][case].get("reason")
        for what in above_limits(numbers)
    ]


def above_limits(numbers: dict) -> list[str]:
    """Which limits of the house a budget breaks."""
    above = [f"{m} {numbers[m]} above {limit}" for m, limit in LIMITS.items() if numbers.get(m, 0) > limit]
    known = not numbers.get("compiles", True) or "except" in numbers
    return above + (["a kernel that does not compile or fit"] if known else [])


def raised(old: Budgets, new: Budgets) -> list[str]:
    """Numbers of `new` above those of `old` whose entry's reason is missing or the old one."""
    found = []
    for kernel, case, target, numbers in lines(new):
        before, reason = old.get(kernel, {}).get(case, {}), new[kernel][case].get("reason")
        was = before.get(target, {})
        higher = [
            f"{m} {was[m]} -> {numbers[m]}"
            for m in MEASURES
            if m in was and numbers.get(m, math.inf) > was[m]
        ]
        if higher and (not reason or reason == before.get("reason")):
            found.append(f"{kernel} [{case}] {target}: raised without a new reason: {', '.join(higher)}")
    return found


def lines(budgets: Budgets) -> Iterable[tuple[str, str, str, dict]]:
    """Every (kernel, case, target, numbers)."""
    for kernel, cases in budgets.items():
        for case, targets in cases.items():
            yield from ((kernel, case, target, n) for target, n in targets.items() if target != "reason")


def history(most: int = 20) -> list[Budgets]:
    """The committed versions of the file, newest first; none where git or its history is missing."""
    revisions = _git("log", f"-{most}", "--format=%H", "--", str(FILE)).split()
    return [load(_git("show", f"{revision}:benchmarks/{FILE.name}")) for revision in revisions]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def measured(entry: "Entry") -> dict:
    """The tightest budget an entry meets: registers in units of 8, as the hardware hands them out."""
    if entry.error or entry.target in COMPILED_ONLY:
        return {"compiles": not entry.error}
    values = {m: v for m in MEASURES if (v := getattr(entry, m)) is not None}
    whole = {m: math.ceil(v) for m, v in values.items()}
    return whole | {"regs": min(255, -(-entry.regs // 8) * 8)}


def update(budgets: Budgets, entries: Iterable["Entry"], reason: str) -> Budgets:
    """Budgets as tight as `entries`; what would rise, or break a limit, stays unless there is a reason."""
    tight: Budgets = {}
    for e in entries:
        numbers = tight.setdefault(e.kernel, {}).setdefault(e.case, {})
        now, other = measured(e), numbers.get(e.target, {})
        if "compiles" in now or "compiles" in other:  # of several launches in one case, the worst counts
            numbers[e.target] = min(now, other or now, key=lambda n: n.get("compiles", True))
        else:
            numbers[e.target] = {m: max(v, other.get(m, v)) for m, v in now.items()}
    for kernel, cases in tight.items():
        for case, targets in cases.items():
            old = budgets.get(kernel, {}).get(case, {})
            for target, numbers in targets.items():
                numbers |= {k: v for k, v in old.get(target, {}).items() if k == "except"}
            higher = raised({kernel: {case: old}}, {kernel: {case: targets}})
            above = any(above_limits(numbers) for numbers in targets.values())
            if higher and not reason:
                for target, was in old.items():
                    now = targets.get(target)
                    if target != "reason" and now and now.keys() == was.keys():
                        targets[target] = {m: min(v, was[m]) for m, v in now.items()}
            if new := reason if higher or (above and not old.get("reason")) else "":
                targets["reason"] = new
            elif old.get("reason"):
                targets["reason"] = old["reason"]
    return tight


def dump(budgets: Budgets) -> str:
    """The file's text."""
    text = [f"# {line}".rstrip() for line in (__doc__ or "").strip().splitlines()]
    for kernel, cases in budgets.items():
        for case, targets in cases.items():
            text += ["", f"[{kernel}.{json.dumps(case)}]"]
            for target, value in targets.items():
                pairs = (
                    ", ".join(f"{m} = {json.dumps(v)}" for m, v in value.items())
                    if target != "reason"
                    else ""
                )
                text.append(f"{target} = {{ {pairs} }}" if pairs else f"{target} = {json.dumps(value)}")
    return "\n".join(text) + "\n"


def rows(report: dict, version: str = PINNED) -> list["Entry"]:
    """What one Triton made, of the committed report."""
    from .compile_report import Entry

    kernels = (row for row in report["kernels"] if row["triton"] == version)
    return [Entry(**{k: v for k, v in row.items() if k != "triton"}) for row in kernels]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.budgets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="tighten the budgets to the committed report")
    parser.add_argument("--reason", default="", help="with --write: why numbers may rise or break a limit")
    parser.add_argument("--kernel", default="", help="with --write: only kernels whose name contains this")
    args = parser.parse_args()
    entries, budgets = rows(json.loads(REPORT.read_text(encoding="utf-8"))), load()
    if args.write:
        chosen = [e for e in entries if args.kernel in e.kernel]
        kept = {k: v for k, v in budgets.items() if args.kernel not in k}
        budgets = kept | update(budgets, chosen, args.reason)
        FILE.write_text(dump(dict(sorted(budgets.items()))), encoding="utf-8")
    wrong = complaints(entries, budgets) + unexplained(budgets)
    print("\n".join(wrong) or f"{sum(map(len, budgets.values()))} kernels and cases within their budgets")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
