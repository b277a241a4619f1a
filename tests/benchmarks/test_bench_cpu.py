"""pytest-benchmark: the PyTorch paths, and what a call costs before any arithmetic.

    pytest tests/benchmarks/test_bench_cpu.py --benchmark-enable -p no:xdist

Continuous integration runs each of these once, for errors only: `--benchmark-disable` is the default of
pyproject.toml.
"""

import pytest
import torch

from benchmarks.judge import values
from benchmarks.registry import benches

SMALLEST = {
    "chunk_gated_delta_rule": "B1_T1_H1_D8",
    "fused_recurrent_gated_delta_rule": "B1_T1_H1_D8",
    "gated_delta_rule_step": "B1_T1_H1_D8",
    "selective_scan": "B1_T1_H1_P8_N4",
    "selective_scan_step": "B1_H1_P8_N4",
    "causal_conv1d": "B1_T1_D8_W4",
    "rms_norm": "B1_T1_D8",
    "swiglu": "B1_T1_F8",
}
SMALL = {
    "chunk_gated_delta_rule": "B2_T128_H2_D32",
    "fused_recurrent_gated_delta_rule": "B4_T1_H2_D32",
    "gated_delta_rule_step": "B4_T1_H2_D32",
    "selective_scan": "B2_T64_H2_P16_N16",
    "selective_scan_step": "B4_H2_P16_N16",
    "causal_conv1d": "B2_T128_D64_W4",
    "rms_norm": "B2_T128_D64",
    "swiglu": "B2_T128_F64",
}


def prepared(op, shape):
    """The PyTorch path of an op and its inputs."""
    bench = benches()[op]
    setting = bench.setting(shape, torch.float32, "cpu")
    return bench, bench.providers["torch"].factory(setting), bench.draw(setting)


@pytest.mark.parametrize("op", SMALLEST)
def test_overhead_of_a_call(benchmark, op):
    bench, call, tensors = prepared(op, SMALLEST[op])
    with torch.no_grad():
        outputs = benchmark(call, tensors)
    assert set(outputs) == set(bench.outputs)


@pytest.mark.parametrize("op", SMALL)
def test_forward(benchmark, op):
    _, call, tensors = prepared(op, SMALL[op])
    with torch.no_grad():
        outputs = benchmark(call, tensors)
    assert all(torch.isfinite(y).all() for y in outputs.values())


@pytest.mark.parametrize("op", [op for op in SMALL if not op.endswith("_step")])
def test_forward_and_backward(benchmark, op):
    bench, call, tensors = prepared(op, SMALL[op])
    with torch.no_grad():
        weights = {name: torch.ones_like(y) for name, y in call(tensors).items()}
    grads = benchmark(values, bench, call, tensors, weights)
    assert {f"d{name}" for name in tensors} <= set(grads)
