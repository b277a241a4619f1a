"""Time `chunk_gated_delta_rule` on the CPU against the PyTorch fallback of transformers.

    python -m benchmarks.gated_delta_rule_vs_transformers --out benchmarks/results/gated_delta_rule_cpu.json

B = 2, T = 2048, H = 8, K = V = 64, float32. Results are compared first; then both run in alternation in one
process, forward alone and forward with backward, and medians are taken.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_kernels import chunk_gated_delta_rule

B, T, H, K, V = 2, 2048, 8, 64, 64
TOLERANCE = 1e-4  # relative to the largest entry, float32 against float32


def main() -> int:
    """Run the comparison; 0 if results agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each function")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    theirs = fallback()
    tensors, weight = draw()
    gap = largest_gap(theirs, tensors, weight)
    if not gap < TOLERANCE:
        print(f"results differ by {gap:.1e} of the largest entry (limit {TOLERANCE:.0e})")
        return 1
    print(f"largest difference of outputs and gradients: {gap:.1e} of the largest entry")
    print(f"{'':<20}{'transformers, ms':>18}{'ours, ms':>10}{'ratio':>8}")
    rows = []
    for name, run in (("forward", forward), ("forward + backward", forward_backward)):
        row = compare(name, lambda f, run=run: run(f, tensors, weight), theirs, args.repeats)
        print(f"{name:<20}{row['transformers_ms']:>18.1f}{row['ours_ms']:>10.1f}{row['ratio']:>8.2f}")
        rows.append(row)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**setting(args), "largest_gap": gap, "rows": rows}, indent=2) + "\n")
    return 0


def fallback() -> Callable:
    """The fallback, kept from saying at every import that it is one."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule


def draw() -> tuple[list[Tensor], Tensor]:
    """Keys and queries of length one, decays to -0.1 a token, strengths to 1; and a weight for the output."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=generator) for D in (K, K, V))
    g, beta = -0.1 * torch.rand(B, T, H, generator=generator), torch.rand(B, T, H, generator=generator)
    tensors = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta]
    return [x.requires_grad_() for x in tensors], torch.randn(B, T, H, V, generator=generator)


def forward(function: Callable, tensors: list[Tensor], weight: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [function(*tensors)[0]]


def forward_backward(function: Callable, tensors: list[Tensor], weight: Tensor) -> list[Tensor]:
    o = function(*tensors)[0]
    return [o.detach(), *torch.autograd.grad(o, tensors, weight)]


def largest_gap(theirs: Callable, tensors: list[Tensor], weight: Tensor) -> float:
    pairs = zip(
        forward_backward(theirs, tensors, weight),
        forward_backward(chunk_gated_delta_rule, tensors, weight),
        strict=True,
    )
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def compare(name: str, run: Callable, theirs: Callable, repeats: int) -> dict:
    """Medians of `repeats` alternating runs, in milliseconds."""
    times: dict[Callable, list[float]] = {theirs: [], chunk_gated_delta_rule: []}
    for function in times:
        run(function)
    for _ in range(repeats):
        for function, measured in times.items():
            start = time.perf_counter()
            run(function)
            measured.append(1e3 * (time.perf_counter() - start))
    t, o = (statistics.median(x) for x in times.values())
    raw = {"transformers_all_ms": times[theirs], "ours_all_ms": times[chunk_gated_delta_rule]}
    return {"name": name, "transformers_ms": t, "ours_ms": o, "ratio": t / o, **raw}


def setting(args: argparse.Namespace) -> dict:
    """What the figures depend on."""
    import transformers

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "kind": "published",
        "command": "python -m benchmarks.gated_delta_rule_vs_transformers " + " ".join(sys.argv[1:]),
        "shape": {"B": B, "T": T, "H": H, "K": K, "V": V, "dtype": "float32"},
        "repeats": args.repeats,
        "threads": args.threads,
        "cpu": names[0] if names else platform.processor(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
