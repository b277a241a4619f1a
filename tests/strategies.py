"""Hypothesis strategies: shapes, cut points and packed lengths around the seeded input factories."""

import torch
from hypothesis import strategies as st

from prism_kernels.testing import Case
from prism_kernels.testing.inputs import Draw

SEEDS = st.integers(0, 2**16)
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)


def delta_rule(draw: Draw, B: int, T: int, H: int, K: int, V: int) -> Case:
    """Inputs of the gated delta rule: unit keys, decays down to -2 a step, write strengths up to 1."""
    HV = 2 * H
    return Case(
        "drawn",
        {
            "q": draw.normal(B, T, H, K),
            "k": draw.unit(B, T, H, K),
            "v": draw.normal(B, T, HV, V),
            "g": draw.gate(B, T, HV, low=-2.0, high=0.0),
            "beta": draw.gate(B, T, HV),
            "initial_state": draw.wide_normal(B, HV, K, V),
        },
    )


def scan(draw: Draw, B: int, T: int, H: int, P: int, N: int) -> Case:
    """Inputs of the selective scan: decaying complex modes, step sizes from 1e-3 to 1."""
    rates = torch.complex(-draw.log_uniform(H, N, low=0.1, high=4.0), draw.wide_normal(H, N, scale=3.0))
    return Case(
        "drawn",
        {
            "u": draw.normal(B, T, H, P),
            "dt": draw.log_uniform(B, T, H, low=1e-3, high=1.0),
            "A": rates,
            "B": draw.complex_normal(H, N),
            "C": draw.complex_normal(H, N),
            "initial_state": draw.complex_normal(B, H, P, N),
        },
    )


def convolution(draw: Draw, B: int, T: int, D: int, W: int, _: int) -> Case:
    """Inputs of the short convolution."""
    tensors = {"x": draw.normal(B, T, 2 * D), "weight": draw.wide_normal(2 * D, 2 + W % 3)}
    tensors["initial_state"] = draw.normal(B, 2 * D, 1 + W % 3)
    return Case("drawn", tensors)


FACTORIES = {
    "chunk_gated_delta_rule": delta_rule,
    "fused_recurrent_gated_delta_rule": delta_rule,
    "selective_scan": scan,
    "causal_conv1d": convolution,
}


@st.composite
def cases(draw, op: str, batch: int | None = None, min_time: int = 1, max_time: int = 70) -> Case:
    """A float64 case of `op` with drawn shapes."""
    B = batch or draw(st.integers(1, 3))
    T = draw(st.integers(min_time, max_time))
    sizes = [draw(st.integers(1, n)) for n in (3, 9, 9)]
    return FACTORIES[op](Draw(draw(SEEDS), torch.float64), B, T, *sizes)
