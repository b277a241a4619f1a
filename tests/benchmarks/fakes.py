"""Results of a machine that does not exist, with what a real one brings: sweeps, wrong providers."""

from dataclasses import replace
from pathlib import Path

from benchmarks.results import Environment, Result, Roofline, Row, load

PROVIDERS = {
    "torch": 1.0,
    "torch.compile": 1.5,
    "transformers": 2.6,
    "eager time loop": 24.0,
    "mamba-ssm": None,
}


def row(**changes) -> Row:
    """A row that came out right; `changes` replace its fields."""
    ms = changes.pop("ms", 10.0)
    given = {
        "op": "selective_scan",
        "shape": "B8_T512_D64_N16",
        "dtype": "float32",
        "direction": "forward",
        "provider": "torch",
        "status": "ok",
        "error_ratio": 0.9,
        "error_in": "y",
        "ms_p20": 0.98 * ms,
        "ms_p50": ms,
        "ms_p80": 1.02 * ms,
        "samples": 25,
        "peak_bytes": 64 * 2**20,
        "floor_bytes": 2**21,
        "floor_flops": 10**8,
        "gb_s": 12.5,
        "tflop_s": 0.031,
        "roofline_percent": 41.0,
    }
    return Row(**given | changes)


def failed(status: str, reason: str, **changes) -> Row:
    """A row that is not ranked."""
    key = dict(zip(("op", "shape", "dtype", "direction", "provider"), row().key, strict=True))
    return Row(**key | {"status": status, "reason": reason} | changes)


def rows() -> list[Row]:
    """Two ops; one with a sweep over T, both directions, a wrong provider and a missing one."""
    found = []
    for direction, weight in (("forward", 1.0), ("forward+backward", 3.5)):
        for T in (512, 1024, 2048, 4096):
            shape = {"shape": f"B8_T{T}_D64_N16", "direction": direction}
            floor = {"floor_bytes": 4096 * T, "floor_flops": 200_000 * T, "peak_bytes": 131_072 * T}
            for provider, times in PROVIDERS.items():
                if times is None:
                    found.append(failed("skipped", "mamba_ssm is not installed", provider=provider, **shape))
                else:
                    extra = {"peak_bytes": int(floor["peak_bytes"] * (1 + times / 4))}
                    found.append(
                        row(provider=provider, ms=times * weight * T / 100, **shape, **floor | extra)
                    )
        conv = {"op": "causal_conv1d", "shape": "B2_T1024_D512_W4", "direction": direction}
        found += [
            row(provider="torch", ms=2 * weight, **conv),
            row(provider="transformers", ms=1.6 * weight, **conv),
        ]
        found += [row(provider="torch.nn", ms=9 * weight, **conv)]
        found.append(
            failed("wrong", "y: error 31 times plain PyTorch's | limit 2", provider="liger-kernel", **conv)
        )
    return found


def result(device: str = "cpu", **changes) -> Result:
    """A result file's contents."""
    on_gpu = device == "cuda"
    where = Environment(
        device=device,
        device_name="NVIDIA H100 80GB HBM3" if on_gpu else "AMD EPYC 7763",
        driver="580.1" if on_gpu else "",
        platform="Linux",
        python="3.12.3",
        torch="2.11.0",
        triton="3.6.0",
        threads=2,
        commit="0123456789abcdef",
        dirty=False,
        peers={"transformers": "5.23.0"},
    )
    given = {
        "command": f"python -m benchmarks run --device {device}",
        "started": "2026-01-02T03:04:05+00:00",
        "environment": where,
        "roofline": Roofline(copy_gb_s=21.0, tflop_s={"float32": 0.11}),
        "rows": rows(),
    }
    return Result(**given | changes)


def rows_of(path: Path) -> list[Row]:
    """Rows of a file, but for the percentages, which a later and higher roofline lowers."""
    return [replace(row, roofline_percent=None) for row in load(path).rows]
