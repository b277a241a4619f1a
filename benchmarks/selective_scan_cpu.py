"""Time the selective scan's pure-PyTorch path against a vectorised eager time loop with autograd.

python -m benchmarks.selective_scan_cpu --repeats 7 --out benchmarks/results/selective_scan_cpu.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prism_kernels import selective_scan

SHAPES = {  # B, T, H, P, N
    "channelwise, B2 T512 D256 N16": (2, 512, 256, 1, 16),
    "per head, B16 T128 H8 P32 N64": (16, 128, 8, 32, 64),
}


def eager_loop(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What one writes without an op: decay and input of all tokens at once, then a loop over time."""
    z = dt[..., None] * A
    a = torch.exp(z)[:, :, :, None]
    weight = torch.where(z.abs() < 1e-3, dt[..., None] * (1 + z / 2 + z * z / 6), torch.expm1(z) / A)
    x = (weight * B)[:, :, :, None] * u[..., None]
    h, states = torch.zeros_like(x[:, 0]), []
    for a_t, x_t in zip(a.unbind(1), x.unbind(1), strict=True):
        h = a_t * h + x_t
        states.append(h)
    return 2 * torch.einsum("bthpn,hn->bthp", torch.stack(states, 1), C.conj()).real


def ours(*inputs: Tensor) -> Tensor:
    return selective_scan(*inputs, impl="torch").y


def inputs(B: int, T: int, H: int, P: int, N: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    poles = torch.complex(torch.full((H, N), -0.5), torch.pi * torch.arange(N).float().expand(H, N))
    weights = torch.randn(2, H, N, dtype=torch.complex64, generator=generator)
    dt = 0.001 + 0.1 * torch.rand(B, T, H, generator=generator)
    return [torch.randn(B, T, H, P, generator=generator), dt, poles, *weights]


def forward_backward(scan: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = scan(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def check_equal(tensors: list[Tensor]) -> float:
    """Largest relative distance of our output and gradients from the loop's."""
    pairs = zip(forward_backward(ours, tensors), forward_backward(eager_loop, tensors), strict=True)
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    if worst > 1e-4:
        raise SystemExit(f"results differ by {worst:.1e}: nothing is timed")
    return worst


def compare(tensors: list[Tensor], repeats: int, backward: bool) -> dict[str, float | list[float]]:
    """Medians in milliseconds of alternating runs, and their ratio."""
    times: dict[str, list[float]] = {"eager": [], "ours": []}
    for i in range(repeats + 1):
        for name, scan in (("eager", eager_loop), ("ours", ours)):
            start = time.perf_counter()
            if backward:
                forward_backward(scan, tensors)
            else:
                with torch.no_grad():
                    scan(*tensors)
            if i:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    return {**{f"{n}_ms": m for n, m in medians.items()}, "ratio": medians["eager"] / medians["ours"]} | {
        f"{n}_all_ms": ms for n, ms in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = {
        "torch": torch.__version__,
        "threads": options.threads,
        "repeats": options.repeats,
        "shapes": {},
    }
    for name, shape in SHAPES.items():
        tensors = inputs(*shape)
        rows = {"largest_difference": check_equal(tensors)}
        for label, backward in (("forward", False), ("forward+backward", True)):
            row = rows[label] = compare(tensors, options.repeats, backward)
            print(
                f"{name}: {label}: eager {row['eager_ms']:.1f} ms, ours {row['ours_ms']:.1f} ms, "
                f"{row['ratio']:.2f} times faster"
            )
        report["shapes"][name] = rows
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
