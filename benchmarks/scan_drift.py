"""`python -m benchmarks.scan_drift`: which accuracy of the selective scan holds over 65,536 tokens.

The kernels' recurrence c <- c + E (c + u) in float32, with E = exp(dt A) - 1 computed in three ways: as
accuracy="accurate" does; as accuracy="fast" does with exact functions (what rounding alone costs); and as
"fast" does with special functions as far off as NVIDIA documents: ex2.approx by 2**-22.5 relative, half of it
always to one side, sin.approx and cos.approx by 2**-20.9 absolute. An error depends on the argument alone, so
equal step sizes repeat it. Beside them, plain PyTorch: h <- exp(dt A) h + w u in float32. The figures are
relative L2 errors of y against float64, in the last 1,024 tokens, S4D-Lin poles. Writes
`results/scan_drift.json` and the table in the op's README.
"""

import argparse
import json

import numpy as np

from .report import ROOT, fill, table
from .results import RESULTS

COMMAND = "python -m benchmarks.scan_drift"
REPORT = RESULTS / "scan_drift.json"
PAGE = ROOT / "prism_kernels" / "selective_scan" / "README.md"
T, N, CHANNELS, LAST = 65_536, 16, 4, 1024
RISE, TRIG = 2.0**-22.5, 2.0**-20.9
FLOAT = np.float32
BAR = {"float32": 1e-5, "bfloat16": 2.0**-9}  # what accuracy="fast" may add, by the dtype of u and y


def noise(x: np.ndarray, seed: int) -> np.ndarray:
    """Numbers in [-1, 1) that depend on the bits of float32 numbers alone."""
    bits = x.astype(FLOAT).view(np.uint32).astype(np.uint64) + np.uint64(seed)
    bits = (bits * np.uint64(0x9E3779B97F4A7C15)) ^ (bits >> np.uint64(7))
    bits = (bits * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(40)
    return bits.astype(np.float64) / 2**23 - 1


def fast_rise(dt: np.ndarray, A: np.ndarray, off: float) -> np.ndarray:
    """E as accuracy="fast" computes it, with special functions `off` times the documented error."""
    x = dt * (A.real * np.log2(np.e)).astype(FLOAT)
    frequency = (A.imag / (2 * np.pi)).astype(FLOAT)
    exact = dt.astype(np.float64) * frequency
    y = ((exact - np.rint(exact)).astype(FLOAT) * FLOAT(2 * np.pi)).astype(FLOAT)
    gain = (np.exp2(x.astype(np.float64)) * (1 + off * RISE * (0.5 + 0.5 * noise(x, 1)))).astype(FLOAT)
    sin = (np.sin(y.astype(np.float64)) + off * TRIG * noise(y, 2)).astype(FLOAT)
    cos = (np.cos(y.astype(np.float64)) + off * TRIG * noise(y, 3)).astype(FLOAT)
    real = (gain.astype(np.float64) * cos - 1).astype(FLOAT)  # one rounding, as a fused multiply-add has
    return real + 1j * (gain * sin)


def errors(dt: np.ndarray, u: np.ndarray, A: np.ndarray) -> dict[str, float]:
    """Relative L2 error of y over the last tokens, by way of computing."""
    step, z = dt[:, :, None], dt.astype(np.float64)[:, :, None] * A
    E = np.expm1(z)
    ways = {
        "accurate": E.astype(np.complex64),
        "fast": fast_rise(step, A, 0.0),
        "special": fast_rise(step, A, 1.0),
    }
    rises = np.stack(list(ways.values()), 1).astype(np.complex64)
    a, w = np.exp(z).astype(np.complex64), (E / A).astype(np.complex64)
    W = 1 / A
    c, plain = np.zeros(rises.shape[1:], np.complex64), np.zeros(A.shape, np.complex64)
    exact = np.zeros(A.shape, np.complex128)
    out = {name: np.zeros((LAST, CHANNELS)) for name in (*ways, "plain PyTorch", "exact")}
    for t in range(T):
        x = u[t][:, None]
        c = c + rises[t] * (c + x)
        plain = a[t] * plain + w[t] * x
        exact = exact + E[t] * (exact + x)
        if (i := t - T + LAST) >= 0:
            for name, state in zip(ways, c, strict=True):
                out[name][i] = 2 * (state * W).sum(-1).real
            out["plain PyTorch"][i] = 2 * plain.sum(-1).real
            out["exact"][i] = 2 * (exact * W).sum(-1).real
    truth = out.pop("exact")
    return {name: float(np.linalg.norm(y - truth) / np.linalg.norm(truth)) for name, y in out.items()}


def measure() -> dict:
    """Errors for steps and poles fast and slow."""
    draw = np.random.default_rng(0)
    A = np.tile(-0.5 + 1j * np.pi * np.arange(N), (CHANNELS, 1))
    u = draw.standard_normal((T, CHANNELS)).astype(FLOAT)
    steps = {
        "0.001": np.full((T, CHANNELS), 1e-3, FLOAT),
        "log-uniform in 0.001 to 0.1": np.exp(draw.uniform(np.log(1e-3), np.log(0.1), (T, CHANNELS))).astype(
            FLOAT
        ),
    }
    rows = []
    for name, dt in steps.items():
        for real in (-0.5, -0.01):
            rows.append({"step": name, "pole": real, **errors(dt, u, 1j * A.imag + real)})
    return {
        "kind": "drift",
        "schema": 1,
        "command": COMMAND,
        "versions": {"numpy": np.__version__},
        "tokens": T,
        "rows": rows,
    }


def markdown(report: dict) -> str:
    """The table of the op's README."""
    ways = ("accurate", "fast", "special", "plain PyTorch")
    head = ["step sizes", "Re A", "accurate", "fast, exact functions", "special", "plain PyTorch"]
    rows = [[r["step"], str(r["pole"]), *(f"{r[way]:.1e}" for way in ways)] for r in report["rows"]]
    return table(head, rows) + f"\n\n`{report['command']}`; numpy {report['versions']['numpy']}."


def verdict(report: dict) -> list[str]:
    """Whether accuracy="fast" stays below what may be added, by dtype."""
    worst = max(row["special"] for row in report["rows"])
    return [
        f"{dtype}: fast {'holds' if worst <= bar else 'does not hold'} (worst {worst:.1e}, bar {bar:.1e})"
        for dtype, bar in BAR.items()
    ]


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    report = measure()
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(fill(text, {"drift": markdown}, report), encoding="utf-8")
    print("\n".join([markdown(report), *verdict(report)]))


if __name__ == "__main__":
    main()
