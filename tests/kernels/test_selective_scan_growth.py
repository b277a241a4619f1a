"""Growing states, Re A > 0: refused unless asked for, right on the paths that have them."""

import pytest
import torch

from prism_kernels import mamba_chunk_scan_combined, selective_scan, selective_scan_fn, selective_scan_step
from prism_kernels.selective_scan import dual

from .test_mamba import scan_definition, scan_inputs
from .test_selective_scan import WIDE, assert_close, gradients, inputs

GROWTH = {"allow_growth": True}
pytestmark = pytest.mark.usefixtures("poisoned")


def growing(B, T, H, P, N, **options):
    """Inputs of a call in which every other state grows."""
    tensors = inputs(B, T, H, P, N, **options)
    A = tensors["A"]
    sign = torch.ones(N, dtype=WIDE).index_fill(0, torch.arange(0, N, 2), -1.0)
    tensors["A"] = torch.complex(A.real * sign, A.imag) if A.is_complex() else A * sign
    return tensors


def step_arguments(tensors):
    """The arguments of a step, from those of a scan of one token."""
    token = {n: tensors[n][:, 0] for n in ("u", "dt", "z")}
    return {**{n: t for n, t in tensors.items() if n != "initial_state"}, **token}


@pytest.mark.parametrize("forms", ["ss", "cs", "dd"])
@pytest.mark.parametrize("real", [False, True], ids=["complex", "real"])
@pytest.mark.parametrize("P", [1, 5])
def test_gradients_equal_autograd_through_the_definition(forms, real, P):
    tensors = growing(2, 37, 4, P, 3, forms=forms, real=real, G=2)
    for options in ({}, {"discretization": "euler", "reverse": True}):
        got, expected = (gradients(tensors, path, **options, **GROWTH) for path in ("torch", "reference"))
        assert_close(got, expected)


def test_one_growing_pole_for_all_modes_of_a_head():
    tensors = inputs(2, 37, 4, 5, 3, forms="dd", real=True, G=2)
    tensors["A"] = tensors["A"][:, :1] * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=WIDE)[:, None]
    options = {"discretization": "euler", **GROWTH}
    assert_close(gradients(tensors, "torch", **options), gradients(tensors, "reference", **options))


def test_packed_sequences_that_grow():
    tensors = growing(1, 28, 2, 4, 3, forms="dd")
    tensors["initial_state"] = tensors["initial_state"].expand(4, 2, 4, 3)
    tensors["cu_seqlens"] = torch.tensor([0, 7, 7, 25, 26])
    assert_close(gradients(tensors, "torch", **GROWTH), gradients(tensors, "reference", **GROWTH))


@pytest.mark.parametrize("limit", [0.5, 4.0, 1e3])
def test_matrix_form_gives_way_to_growth_as_to_decay(monkeypatch, limit):
    monkeypatch.setitem(dual.LIMIT, WIDE, limit)
    tensors = growing(2, 37, 2, 4, 3, forms="sd")
    assert_close(gradients(tensors, "torch", **GROWTH), gradients(tensors, "reference", **GROWTH))


@pytest.mark.parametrize("P", [1, 4])
def test_growth_far_beyond_the_exponents_of_the_matrix_form(P):
    """float32, token by token: states grow by e^75, and no token's y is worse for those after it."""
    tensors = growing(1, 16, 2, P, 4, steps=(0.9, 1.1))
    tensors["A"] = torch.complex(4.5 * tensors["A"].real.sign(), tensors["A"].imag)
    cast = {WIDE: torch.float32, torch.complex128: torch.complex64}
    narrow = {n: t.to(cast[t.dtype]) for n, t in tensors.items()}
    wide = {n: t.to(tensors[n].dtype) for n, t in narrow.items()}
    expected = selective_scan(**wide, **GROWTH, impl="reference").y
    assert expected.abs().max() > 1e30
    gap = (selective_scan(**narrow, **GROWTH, impl="torch").y - expected).abs().amax((0, 2, 3))
    assert (gap / expected.abs().amax((0, 2, 3))).max() < 1e-4


@pytest.mark.parametrize("size", [1e-12, 1e-7, 1e-3])
def test_a_pole_beside_zero_on_the_growing_side(size):
    tensors = inputs(1, 6, 2, 4, 3)
    tensors["A"] = -size * tensors["A"]
    assert_close(gradients(tensors, "torch", **GROWTH), gradients(tensors, "reference", **GROWTH), 1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_steps_equal_the_scan(impl):
    tensors = growing(2, 4, 2, 4, 3)
    y, final = selective_scan(**tensors, output_final_state=True, impl=impl, **GROWTH)
    state = tensors["initial_state"]
    for t in range(4):
        token = step_arguments({**tensors, **{n: tensors[n][:, t:] for n in ("u", "dt", "z")}})
        out, state = selective_scan_step(state, **token, impl=impl, **GROWTH)
        torch.testing.assert_close(out, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_growth_is_asked_for():
    tensors = growing(1, 1, 2, 4, 3)
    for impl in ("torch", "triton", "reference"):
        with pytest.raises(ValueError, match="expected `Re A` <= 0 everywhere.*`allow_growth=True`"):
            selective_scan(**tensors, impl=impl)
    with pytest.raises(ValueError, match="expected `Re A` <= 0 everywhere.*`allow_growth=True`"):
        selective_scan_step(tensors["initial_state"], **step_arguments(tensors))


def test_the_option_alone_is_refused_by_the_path_that_lacks_it():
    """Whatever the poles: on a GPU nobody looks at them."""
    tensors = inputs(1, 1, 2, 4, 3)
    refused = r": expected a call that the 'triton' path covers, got .*allow_growth=True.*impl='torch'"
    with pytest.raises(NotImplementedError, match="selective_scan" + refused):
        selective_scan(**tensors, impl="triton", **GROWTH)
    with pytest.raises(NotImplementedError, match="selective_scan_step" + refused):
        selective_scan_step(tensors["initial_state"], **step_arguments(tensors), impl="triton", **GROWTH)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_negative_steps_stay_an_error(impl):
    tensors = growing(1, 3, 2, 4, 3)
    with pytest.raises(ValueError, match="expected `dt` >= 0 everywhere"):
        selective_scan(**tensors | {"dt": -tensors["dt"]}, impl=impl, **GROWTH)


@pytest.mark.parametrize("number", ["real", "complex"])
def test_mambas_functions_take_it_unasked(number):
    given = scan_inputs("variable", number, sizes=(2, 4, 5, 3))
    given["A"] = -given["A"]
    y, state = selective_scan_fn(**given, return_last_state=True)
    expected = scan_definition(**given)
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(state, expected[1])


def test_mamba_2_takes_it_unasked():
    x, dt, A = torch.randn(2, 20, 4, 8), torch.rand(2, 20, 4), torch.rand(4)
    B, C = torch.randn(2, 20, 2, 3), torch.randn(2, 20, 2, 3)
    got, expected = (mamba_chunk_scan_combined(x, dt, A, B, C, 16, impl=i) for i in ("torch", "reference"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
