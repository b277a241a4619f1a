"""`python -m benchmarks.traffic`: bytes and FLOPs per token and head of the chunked gated delta rule.

Each launch of a forward and a backward is recorded, then run in Triton's interpreter, and every `tl.load`,
`tl.store` and `tl.dot` counted, without lanes that a mask turns off. From the counts of one sequence of 128
tokens those of one of 64 are taken off, and the rest is divided by 64 tokens and their value heads: whole
chunks, and nothing of what a sequence pays once (its final state, the gradient of its first). Counted are

read, written   distinct addresses in a launch: what memory must move if programs of a launch that use the
                same bytes meet in the second-level cache
issued          all loads and stores of all programs, rereads included
FLOPs           of matrix products, a multiply-add as two; a product in three tf32 passes counts once

Nothing depends on values, so inputs are zero. Writes `results/traffic.json` and the table in the op's README.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

import prism_kernels as pk
from prism_kernels._core.runtime import interpreting

from .compile_report import record
from .report import ROOT, fill, number, table
from .results import RESULTS, environment

COMMAND = "python -m benchmarks.traffic"
REPORT = RESULTS / "traffic.json"
PAGE = ROOT / "prism_kernels" / "gated_delta_rule" / "README.md"
TOKENS = 64  # whole chunks at every width
DIRECTIONS = {
    "forward": ("prepare_kernel", "scan_kernel"),
    "backward": ("states_kernel", "inputs_kernel"),
}
OUTSIDE = {"forward": 0, "backward": 12}  # PyTorch reads two shares of dg and writes their sum


@dataclass(frozen=True)
class Case:
    """A shape: width of keys and values, value heads per key head, rows of q and k made unit or not."""

    width: int
    group: int = 1
    l2norm: bool = False

    def __str__(self) -> str:
        heads = f", {self.group} value heads per key head" if self.group > 1 else ""
        return f"K = V = {self.width}{heads}{', unit rows' if self.l2norm else ''}"

    def floor(self, direction: str) -> float:
        """Bytes if each input is read and each output written once: 16-bit data, float32 g and beta."""
        keys, values, gates = {"forward": (4, 4, 8), "backward": (8, 6, 16)}[direction]
        return self.width * (keys / self.group + values) + gates


CASES = (Case(128), Case(128, l2norm=True), Case(128, group=4), Case(64), Case(32))
# Fewest known in chunks of 64, by width, counted by hand: with the inverse, and the state's recomputation.
FLOOR_FLOPS = {"forward": {128: 183e3, 64: 76e3, 32: 41e3}, "backward": {128: 475e3, 64: 164e3, 32: 63e3}}
# flash-linear-attention (fla-core 0.6.0), by hand from its loads, stores and products, within 10 %.
FLA_BYTES = {("forward", Case(128)): 4700, ("forward", Case(64)): 2300, ("backward", Case(128)): 11600}
FLA_FLOPS = {("backward", Case(128)): 508e3}


@dataclass
class Moved:
    """Addresses of one direction, by the size of what lies there."""

    addresses: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def add(self, pointers: Any, mask: Any) -> None:
        """The lanes of one load or store that the mask leaves on."""
        lanes = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.addresses.setdefault(size, []).append(lanes.ravel())

    def distinct(self) -> int:
        """Bytes, each address once."""
        return sum(size * np.unique(np.concatenate(lanes)).size for size, lanes in self.addresses.items())

    def issued(self) -> int:
        """Bytes, every lane."""
        return sum(size * sum(a.size for a in lanes) for size, lanes in self.addresses.items())


@dataclass
class Meter:
    """What the programs of one launch load, store and multiply."""

    loads: Moved = field(default_factory=Moved)
    stores: Moved = field(default_factory=Moved)
    flops: int = 0

    def counts(self) -> dict[str, float]:
        """Bytes and FLOPs, by name."""
        return {
            "read": self.loads.distinct(),
            "written": self.stores.distinct(),
            "issued": self.loads.issued() + self.stores.issued(),
            "flops": self.flops,
        }


def interpreter() -> Any:
    """What performs the operations of interpreted kernels; to be asked for before a kernel is imported."""
    if not interpreting():
        expected = "traffic: expected Triton's interpreter, got its compiler"
        raise RuntimeError(f"{expected}. Set TRITON_INTERPRET=1 before Triton is imported.")
    from triton.runtime.interpreter import interpreter_builder

    return interpreter_builder


@contextmanager
def metered() -> Iterator[Meter]:
    """Count what kernels do in Triton's interpreter. Its unmasked loads and stores end in the masked ones."""
    meter, builder = Meter(), interpreter()
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def counted_load(pointers, mask, *rest):
        meter.loads.add(pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        meter.stores.add(pointers, mask)
        return store(pointers, value, mask, *rest)

    def counted_dot(a, b, *rest):
        meter.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, *rest)

    hooks = {"masked_load": counted_load, "masked_store": counted_store, "dot": counted_dot}
    with mock.patch.multiple(builder, **{f"create_{name}": hook for name, hook in hooks.items()}):
        yield meter


def of_sequence(case: Case, tokens: int) -> dict[str, dict[str, float]]:
    """Counts of every launch of a forward and backward of one key head, by kernel."""

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(1, tokens, *shape, dtype=dtype, requires_grad=True)

    q, k, v = (leaf(heads, case.width, dtype=torch.bfloat16) for heads in (1, 1, case.group))
    gates, options = [leaf(case.group) for _ in range(2)], {"use_qk_l2norm_in_kernel": case.l2norm}
    found = {}
    for launch in record(lambda: pk.chunk_gated_delta_rule(q, k, v, *gates, **options, impl="triton")):
        with metered() as meter:
            launch.kernel[launch.grid](*launch.args, **launch.constexprs)
        found[launch.kernel.__name__] = meter.counts()
    return found


def rows(case: Case) -> list[dict]:
    """Per token and value head: one row per launch."""
    interpreter()
    one, two = of_sequence(case, TOKENS), of_sequence(case, 2 * TOKENS)
    found = []
    for kernel, counts in one.items():
        per = {name: (two[kernel][name] - n) / (TOKENS * case.group) for name, n in counts.items()}
        found.append({**asdict(case), "kernel": kernel, **per})
    return found


def of_case(report: dict, case: Case) -> list[dict]:
    """The rows of one shape."""
    return [row for row in report["rows"] if row.items() >= asdict(case).items()]


def total(report: dict, case: Case, direction: str) -> dict[str, float]:
    """Bytes, bytes issued and FLOPs of a direction, with what PyTorch moves beside its launches."""
    launches = [row for row in of_case(report, case) if row["kernel"] in DIRECTIONS[direction]]
    extra = OUTSIDE[direction]
    return {
        "bytes": sum(row["read"] + row["written"] for row in launches) + extra,
        "issued": sum(row["issued"] for row in launches) + extra,
        "flops": sum(row["flops"] for row in launches),
    }


def markdown(report: dict) -> str:
    """Both tables, launches at the first shape and totals of all shapes, and where they are from."""
    lines = []
    for row in of_case(report, CASES[0]):
        moved = (row["read"], row["written"], row["read"] + row["written"], row["issued"])
        lines.append([f"`{row['kernel']}`", *map(whole, moved), whole(row["flops"] / 1e3)])
    launches = table(["launch", "read", "written", "together", "issued", "kFLOP"], lines)
    moved_head = ["bytes", "floor", "over floor", "fla-core", "issued"]
    head = ["shape", "direction", *moved_head, "kFLOP", "kFLOP, floor", "kFLOP, fla-core"]
    totals = [total_cells(report, case, direction) for case in CASES for direction in DIRECTIONS]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    where = f"`{report['command']}`, {versions}."
    return f"{CASES[0]}:\n\n{launches}\n\n{table(head, totals, text=(0, 1))}\n\n{where}"


def total_cells(report: dict, case: Case, direction: str) -> list[str]:
    """A line of the second table."""
    ours, floor = total(report, case, direction), case.floor(direction)
    bytes_of_fla, flops_of_fla = FLA_BYTES.get((direction, case)), FLA_FLOPS.get((direction, case))
    flops = (ours["flops"], FLOOR_FLOPS[direction][case.width], flops_of_fla)
    return [
        str(case), direction, whole(ours["bytes"]), whole(floor), number(ours["bytes"] / floor),
        whole(bytes_of_fla), whole(ours["issued"]), *(whole(n and n / 1e3) for n in flops),
    ]  # fmt: skip


def whole(value: float | None) -> str:
    """A whole number with commas, or nothing."""
    return "" if value is None else f"{value:,.0f}"


def count() -> dict:
    """The report of all shapes."""
    here = environment("cpu", {})
    return {
        "kind": "traffic",
        "schema": 1,
        "command": COMMAND,
        "versions": {"torch": here.torch, "triton": here.triton},
        "rows": [row for case in CASES for row in rows(case)],
    }


def page(text: str, report: dict) -> str:
    """The op's README with the tables between their markers replaced."""
    return fill(text, {"traffic": markdown}, report)


def save(report: dict) -> None:
    """The result file, a line per launch."""
    head = json.dumps({k: v for k, v in report.items() if k != "rows"}, indent=1)[:-2]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in report["rows"])
    REPORT.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def main() -> int:
    """Command line."""
    argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if "triton" not in sys.modules:  # later it has decided
        os.environ["TRITON_INTERPRET"] = "1"
    report = count()
    save(report)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
