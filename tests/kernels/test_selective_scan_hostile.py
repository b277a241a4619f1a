"""Sizes and values at the edges: lengths around chunks, many modes, no token at all, poles near zero."""

import pytest
import torch

from prism_kernels import selective_scan, selective_scan_step
from prism_kernels.testing.inputs import Draw

from .test_selective_scan import FAST, WIDE, assert_close, gradients, inputs

NARROW = {WIDE: torch.float32, torch.complex128: torch.complex64}
LENGTHS = (1, 2, 15, 17, 64, 65)
MODES = (1, 3, 16, 17, 64, 300, 512)
pytestmark = pytest.mark.usefixtures("poisoned")


def rounded(tensors):
    """The tensors in float32, and the same numbers in float64."""
    narrow = {n: t.to(NARROW[t.dtype]) for n, t in tensors.items()}
    return narrow, {n: t.to(tensors[n].dtype) for n, t in narrow.items()}


def outputs(tensors, impl, **options):
    y, state = selective_scan(**tensors, output_final_state=True, impl=impl, **options)
    return {"y": y, "final_state": state}


@pytest.mark.parametrize("P, forms", [(1, "sd"), (4, "ds")])
@pytest.mark.parametrize("T", LENGTHS)
def test_lengths_around_chunks_and_blocks(T, P, forms):
    tensors = inputs(2, T, 2, P, 3, forms=forms, steps=(1e-5, 10.0))
    for reverse in (False, True):
        got, expected = (gradients(tensors, path, reverse=reverse) for path in ("torch", "reference"))
        assert_close(got, expected)


@pytest.mark.parametrize("T", LENGTHS)
def test_lengths_around_segments_of_the_kernels(T):
    tensors = inputs(1, T, 2, 1, 3, forms="sd", steps=(1e-5, 10.0))
    assert_close(outputs(tensors, "triton", reverse=True), outputs(tensors, "reference", reverse=True))


@pytest.mark.parametrize("P", [1, 4])
@pytest.mark.parametrize("N", MODES)
def test_any_number_of_modes(N, P):
    tensors = inputs(1, 5, 2, P, N, forms="ds")
    assert_close(gradients(tensors, "torch"), gradients(tensors, "reference"))
    tensors = {n: t[:, :2] if n in ("u", "dt", "z", "B") else t for n, t in tensors.items()}
    assert_close(outputs(tensors, "triton"), outputs(tensors, "reference"))


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("P", [1, 4])
def test_nothing_but_empty_sequences_and_padding(impl, P):
    tensors = inputs(1, 3, 2, P, 3)
    tensors |= {n: torch.full_like(tensors[n], float("nan")) for n in ("u", "dt", "z")}
    tensors["initial_state"] = Draw(2, WIDE).complex_normal(2, 2, P, 3)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    got = outputs(leaves | {"cu_seqlens": torch.zeros(3).int()}, impl)
    assert torch.equal(got["final_state"], tensors["initial_state"]) and not got["y"].any()
    loss = got["y"].sum() + got["final_state"].real.sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    *rest, last = (0 if g is None else g for g in grads)
    assert not any(torch.as_tensor(g).any() for g in rest)
    assert torch.equal(last, torch.ones_like(last))


@pytest.mark.parametrize("P", [1, 4])
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-5, 1e-8, 1e-12, 0.0])
def test_poles_that_go_to_zero_are_right_in_float32(size, P):
    tensors = inputs(1, 20, 3, P, 4)
    unit = tensors["A"] / tensors["A"].abs()
    narrow, wide = rounded(tensors | {"A": size * unit})
    assert_close(outputs(narrow, "torch"), outputs(wide, "reference"), 1e-6)
    assert_close(gradients(narrow, "torch"), gradients(wide, "reference"), 3e-6)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("P", [1, 4])
def test_float32_steps_with_the_state_carried_equal_the_scan(impl, P):
    tensors, wide = rounded(inputs(2, 9, 2, P, 3, steps=(1e-4, 1.0)))
    expected, whole = outputs(wide, "reference"), outputs(tensors, impl)
    state, ys = tensors.pop("initial_state"), []
    for t in range(9):
        token = {n: tensors[n][:, t] for n in ("u", "dt", "z")}
        y, state = selective_scan_step(state, **tensors | token, impl=impl)
        ys.append(y)
    stepped = {"y": torch.stack(ys, 1), "final_state": state}
    for got in (stepped, whole):
        assert_close(got, expected, 2e-6)


@pytest.mark.parametrize("P", [1, 4])
@pytest.mark.parametrize("cuts", [(1,), (16,), (64,), (15, 17, 64)], ids=str)
def test_any_split_with_the_state_handed_over_is_the_whole(cuts, P):
    tensors = inputs(1, 65, 2, P, 3, forms="dd")
    whole, ys, state = outputs(tensors, "torch"), [], tensors["initial_state"]
    for start, end in zip((0, *cuts), (*cuts, 65), strict=True):
        part = {n: tensors[n][:, start:end] for n in ("u", "dt", "z", "B", "C")}
        y, state = selective_scan(
            **tensors | part | {"initial_state": state}, output_final_state=True, impl="torch"
        )
        ys.append(y)
    assert_close({"y": torch.cat(ys, 1), "final_state": state}, whole, 1e-12)
