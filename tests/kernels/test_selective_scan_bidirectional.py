"""The scan in both directions: it is two scans, whatever the form of the call."""

import pytest
import torch

from prism_kernels import selective_scan, selective_scan_bidirectional
from prism_kernels.testing.inputs import Draw

from .test_selective_scan import WIDE, inputs

OWN = ("dt", "A", "B", "C", "dt_bias")
pytestmark = pytest.mark.usefixtures("poisoned")


def both(B, T, H, P, N, **options):
    """Arguments of a call in which the reverse direction has everything of its own."""
    tensors, other = (inputs(B, T, H, P, N, seed=seed, **options) for seed in (0, 1))
    return tensors | {f"{n}_reverse": other[n] for n in (*OWN, "initial_state")}


def two_calls(tensors, impl, **options):
    """y and both states by two calls of `selective_scan`."""
    forward = {n: t for n, t in tensors.items() if not n.endswith("_reverse")}
    other = {n.removesuffix("_reverse"): t for n, t in tensors.items() if n.endswith("_reverse")}
    reverse = {**forward, "initial_state": None, **other, "D": None}
    options = options | {"output_final_state": True, "impl": impl}
    f, r = selective_scan(**forward, **options), selective_scan(**reverse, **options, reverse=True)
    return f.y + r.y, f.final_state, r.final_state


def results(function, tensors, impl, **options):
    """Outputs, and the gradients of one fixed weighted sum of them."""
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    outputs = function(leaves, impl, **options)
    weigh = Draw(9, WIDE)
    numbers = [torch.view_as_real(x) if x.is_complex() else x for x in outputs]
    loss = sum((x * weigh.wide_normal(*x.shape)).sum() for x in numbers)
    return [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]


def bidirectional(tensors, impl, **options):
    return selective_scan_bidirectional(**tensors, output_final_state=True, impl=impl, **options)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("forms, P", [("ss", 4), ("dd", 1)])
def test_it_is_two_scans_and_so_are_its_gradients(impl, forms, P):
    tensors = both(2, 6, 2, P, 3, forms=forms)
    for options in ({}, {"dt_softplus": True, "discretization": "euler"}):
        got, expected = (results(f, tensors, impl, **options) for f in (bidirectional, two_calls))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("own", [(), ("A_reverse",), ("B_reverse", "C_reverse"), ("dt_reverse",)], ids=str)
def test_what_is_not_given_is_shared_but_for_the_state(own):
    tensors = both(2, 9, 2, 4, 3)
    given = {n: t for n, t in tensors.items() if not n.endswith("_reverse") or n in own}
    got, expected = (results(f, given, "torch") for f in (bidirectional, two_calls))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_packed_sequences_do_not_meet_in_either_direction(impl):
    bounds = [0, 4, 4, 9]
    tensors = both(1, 11, 2, 4, 3, forms="dd")
    for name in ("initial_state", "initial_state_reverse"):
        tensors[name] = Draw(5, WIDE).complex_normal(3, 2, 4, 3)
    got = bidirectional(tensors | {"cu_seqlens": torch.tensor(bounds)}, impl)
    assert not got.y[:, 9:].any()
    assert torch.equal(got.final_state_reverse[1], tensors["initial_state_reverse"][1])
    timed = [n for n, t in tensors.items() if n[:2] in ("u", "z", "dt", "B", "B_", "C", "C_") and t.ndim > 2]
    for s in (0, 2):
        part = {n: tensors[n][:, bounds[s] : bounds[s + 1]] for n in timed}
        part |= {n: tensors[n][s : s + 1] for n in ("initial_state", "initial_state_reverse")}
        alone = bidirectional(tensors | part, impl)
        torch.testing.assert_close(got.y[:, bounds[s] : bounds[s + 1]], alone.y)
        torch.testing.assert_close(got.final_state_reverse[s : s + 1], alone.final_state_reverse)


def test_shared_parameters_and_a_mirrored_input_give_a_mirrored_output():
    tensors = inputs(2, 7, 2, 4, 3)
    for name in ("dt_bias", "initial_state"):
        del tensors[name]
    mirrored = tensors | {n: tensors[n].flip(1) for n in ("u", "dt", "z")}
    y, *states = selective_scan_bidirectional(**tensors)
    assert states == [None, None]
    torch.testing.assert_close(y.flip(1), selective_scan_bidirectional(**mirrored).y)


def test_growth_is_for_both_directions():
    tensors = both(1, 5, 2, 4, 3)
    tensors["A_reverse"] = -tensors["A_reverse"]
    with pytest.raises(ValueError, match="`Re A` <= 0 everywhere"):
        selective_scan_bidirectional(**tensors)
    got = bidirectional(tensors, "torch", allow_growth=True)
    torch.testing.assert_close(got, bidirectional(tensors, "reference", allow_growth=True))


@pytest.mark.parametrize("name", OWN)
def test_what_is_unlike_the_forward_direction_is_refused(name):
    tensors = both(1, 5, 2, 4, 3)
    short = tensors[f"{name}_reverse"][..., :1]
    with pytest.raises(ValueError, match=f"expected `{name}_reverse` like `{name}`, of shape .*same tokens"):
        selective_scan_bidirectional(**tensors | {f"{name}_reverse": short})
    cast = tensors[f"{name}_reverse"].to(torch.float16 if name[0] == "d" else torch.complex64)
    with pytest.raises(TypeError, match=f"selective_scan_bidirectional: expected `{name}_reverse` of dtype"):
        selective_scan_bidirectional(**tensors | {f"{name}_reverse": cast})
