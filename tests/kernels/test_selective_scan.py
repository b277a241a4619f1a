"""What is particular to the selective scan: peers, limits of the recurrence, forms of its inputs."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from prism_kernels import selective_scan, selective_scan_step
from prism_kernels._core.runtime import interpreting, watch_launches
from prism_kernels.selective_scan import dual, launch_channels, launch_channels_backward, torch_impl
from prism_kernels.selective_scan.kernels import exponential, streams
from prism_kernels.selective_scan.reference import phi1
from prism_kernels.testing.inputs import Draw

WIDE = torch.float64
FAST = ("torch", "triton")
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(B, T, H, P, N, *, forms="ss", real=False, G=1, steps=(0.01, 0.5), dtype=WIDE, seed=0):
    """All tensors of a call; `forms` names B's and C's: s [H,N], c [H,P,N], d [B,T,G,N]."""
    draw = Draw(seed, dtype)
    number = draw.wide_normal if real else draw.complex_normal
    shape = {"s": (H, N), "c": (H, P, N), "d": (B, T, G, N)}
    A = -draw.gate(H, N, low=0.1, high=1.0)
    return {
        "u": draw.normal(B, T, H, P),
        "dt": draw.log_uniform(B, T, H, low=steps[0], high=steps[1]),
        "A": A if real else torch.complex(A, 5 * draw.wide_normal(H, N)),
        "B": number(*shape[forms[0]]),
        "C": number(*shape[forms[1]]),
        "D": draw.wide_normal(H, P),
        "z": draw.normal(B, T, H, P),
        "dt_bias": draw.gate(H, low=0.0, high=0.1),
        "initial_state": number(B, H, P, N),
    }


def gradients(tensors, impl, **options):
    """y, the final state and every gradient of one fixed weighted sum of both."""
    leaves = {
        n: t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex())
        for n, t in tensors.items()
    }
    y, state = selective_scan(**leaves, output_final_state=True, impl=impl, **options)
    numbers = torch.view_as_real(state) if state.is_complex() else state
    weigh = torch.Generator().manual_seed(3)
    loss = sum((x * torch.randn(x.shape, generator=weigh, dtype=WIDE)).sum() for x in (y, numbers))
    wrt = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(loss, list(wrt.values()))
    return {"y": y, "final_state": state, **{f"d{n}": g for n, g in zip(wrt, grads, strict=True)}}


def assert_close(got, expected, bound=1e-10):
    for name, e in expected.items():
        gap = (got[name] - e).detach().abs().max() / e.detach().abs().max().clamp_min(1e-30)
        assert gap < bound, f"{name} is {gap:.1e} away"


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("P", [1, 4])
def test_equal_steps_are_the_convolution_of_s4d(impl, P):
    T, H, N, dt = 21, 2, 8, 0.05
    draw = Draw(0, WIDE)
    u = draw.normal(2, T, H, P)
    A = torch.complex(
        torch.full((H, N), -0.5, dtype=WIDE), torch.pi * torch.arange(N, dtype=WIDE).expand(H, N)
    )
    B, C = draw.complex_normal(H, N), draw.complex_normal(H, N)
    weight = C.conj() * B * (torch.exp(dt * A) - 1) / A
    vandermonde = torch.exp(dt * A[..., None] * torch.arange(T))
    kernel = 2 * torch.einsum("hn,hnl->hl", weight, vandermonde).real
    spectrum = torch.fft.rfft(u, 2 * T, dim=1) * torch.fft.rfft(kernel.T, 2 * T, dim=0)[None, :, :, None]
    expected = torch.fft.irfft(spectrum, 2 * T, dim=1)[:, :T]
    y = selective_scan(u, torch.full((2, T, H), dt, dtype=WIDE), A, B, C, impl=impl).y
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_channelwise_euler_with_real_poles_is_mamba(impl):
    """The recurrence of mamba's selective scan, in its layout [B,D,L], written out here."""
    batch, width, length, N = 2, 6, 13, 4
    draw = Draw(1, WIDE)
    u, delta, z = (draw.normal(batch, width, length) for _ in range(3))
    A, B, C = -draw.gate(width, N, high=2.0), draw.normal(batch, N, length), draw.normal(batch, N, length)
    D, bias = draw.normal(width), draw.normal(width)
    step, h, ys = F.softplus(delta + bias[:, None]), torch.zeros(batch, width, N, dtype=WIDE), []
    for t in range(length):
        h = torch.exp(step[:, :, t, None] * A) * h
        h = h + step[:, :, t, None] * B[:, None, :, t] * u[:, :, t, None]
        ys.append((h * C[:, None, :, t]).sum(-1))
    expected = (torch.stack(ys, 2) + u * D[:, None]) * F.silu(z)

    def ours(x):
        return x.transpose(1, 2)

    y, state = selective_scan(
        ours(u)[..., None],
        ours(delta),
        A,
        ours(B)[:, :, None],
        ours(C)[:, :, None],
        D,
        ours(z)[..., None],
        dt_bias=bias,
        dt_softplus=True,
        discretization="euler",
        output_final_state=True,
        impl=impl,
    )
    torch.testing.assert_close(ours(y[..., 0]), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state[:, :, 0], h, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("P", [1, 4])
def test_a_pole_that_goes_to_zero_becomes_an_integrator(impl, P):
    tensors = inputs(1, 6, 2, P, 3)
    tensors["A"] = torch.zeros_like(tensors["A"])
    at_zero = gradients(tensors, impl)
    dt = tensors["dt"] + tensors["dt_bias"]
    driven = (dt[..., None] * tensors["u"])[..., None] * tensors["B"][:, None]
    h = tensors["initial_state"][:, None] + driven.cumsum(1)
    torch.testing.assert_close(at_zero["final_state"], h[:, -1], rtol=1e-12, atol=1e-12)
    assert all(torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).all() for x in at_zero.values())
    for tiny in (1e-30, 1e-12, 1e-7):
        near = gradients({**tensors, "A": tensors["A"] + tiny * (-1 + 1j)}, impl)
        assert_close(near, at_zero, 2e-6)
    assert_close(at_zero, gradients(tensors, "reference"), 1e-11)


def test_phi1_is_accurate_everywhere():
    z = torch.logspace(-12, 1.2, 200, dtype=WIDE) * torch.exp(1j * torch.linspace(1.6, 3.1, 200, dtype=WIDE))
    half = z / 2  # exp(z) - 1 = 2 exp(z/2) sinh(z/2), with a sinh that is its series near 0
    sinh = torch.where(
        z.abs() < 0.1, half * (1 + half**2 / 6 * (1 + half**2 / 20 * (1 + half**2 / 42))), torch.sinh(half)
    )
    torch.testing.assert_close(phi1(z), torch.exp(half) * sinh / half, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "impl, P, N, G, poles",
    [("torch", P, 3, G, n) for P in (1, 5) for G in ((1, 2), (2, 3), (6, 1)) for n in ("one", "each")]
    + [("triton", 1, 3, (2, 3), "one"), ("triton", 32, 17, (2, 3), "each")],
)
def test_b_and_c_may_have_groups_of_their_own(impl, P, N, G, poles):
    H, dtype = 6, WIDE if impl == "torch" else torch.float32
    sizes = {"real": True, "dtype": dtype}
    tensors = inputs(1, 17, H, P, N, forms="dd", G=G[0], **sizes)
    tensors["C"] = inputs(1, 17, H, P, N, forms="dd", G=G[1], **sizes)["C"]
    tensors["A"] = tensors["A"][:, :1] if poles == "one" else tensors["A"]
    expected = gradients(tensors, "reference", discretization="euler")
    got = gradients(tensors, impl, discretization="euler")
    assert_close(got, expected, 1e-10 if impl == "torch" else 1e-5)


@pytest.mark.parametrize("forms", ["ss", "dd", "cc"])
@pytest.mark.parametrize("B, H, P", [(0, 2, 2), (2, 0, 2), (2, 2, 0)])
def test_no_channel_has_no_gradient(B, H, P, forms):
    tensors = inputs(B, 5, H, P, 3, forms=forms)
    for name, gradient in gradients(tensors, "torch").items():
        assert not gradient.any(), name


@pytest.mark.parametrize("forms", ["ss", "dd", "cc"])
@pytest.mark.parametrize("P", [1, 2, 8])
def test_gradients_summed_over_many_tokens_keep_their_digits(forms, P):
    """Terms of one sign, steps of all sizes: sums in one order and differences of sums lose a digit here."""
    tensors = inputs(64, 64, 2, P, 2, forms=forms, real=True, steps=(1e-4, 0.3))
    tensors = {n: tensors[n].abs() for n in ("u", "dt", "A", "B", "C")}
    tensors["A"] = -torch.ones_like(tensors["A"])

    def summed(dtype):
        leaves = {n: t.to(dtype, copy=True).requires_grad_() for n, t in tensors.items()}
        selective_scan(**leaves, impl="torch").y.square().sum().backward()
        return {f"d{n}": leaves[n].grad for n in "ABC"}

    got = summed(torch.float32)
    for name, e in summed(WIDE).items():
        assert (got[name] - e).norm() < 7e-7 * e.norm(), name


@pytest.mark.parametrize("impl", FAST)
def test_decay_beyond_float32_stays_finite_and_right(impl):
    tensors = inputs(1, 18, 2, 4, 3, steps=(1e-3, 1e4))
    tensors["A"] = tensors["A"] * torch.tensor([1.0, 30.0, 900.0])
    expected = gradients(tensors, "reference")
    cast = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    narrow = {n: t.to(cast[t.dtype]) for n, t in tensors.items()}
    got = gradients(narrow, impl)
    for name, x in got.items():
        assert torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).all(), name
    assert_close(
        {n: got[n] for n in ("y", "du", "dC", "dD")}, {n: expected[n] for n in ("y", "du", "dC", "dD")}, 2e-2
    )


@pytest.mark.parametrize("forms", ["ss", "sc", "cs", "cc", "dd", "sd", "dc"])
@pytest.mark.parametrize("real", [False, True], ids=["complex", "real"])
@pytest.mark.parametrize("P", [1, 5])
def test_torch_gradients_equal_autograd_through_the_definition(forms, real, P):
    tensors = inputs(2, 19, 4, P, 3, forms=forms, real=real, G=2)
    for options in ({}, {"discretization": "euler", "reverse": True}, {"dt_softplus": True}):
        assert_close(gradients(tensors, "torch", **options), gradients(tensors, "reference", **options))


@pytest.mark.parametrize("forms, P, N", [("ss", 3, 17), ("cs", 1, 3), ("sc", 2, 1), ("cc", 5, 130)])
def test_triton_gradients_equal_autograd_through_the_definition(forms, P, N):
    tensors = inputs(2, 4, 2, P, N, forms=forms)
    assert_close(gradients(tensors, "triton"), gradients(tensors, "reference"))


def test_segments_of_the_kernels_join(monkeypatch):
    monkeypatch.setattr(launch_channels, "SEGMENT", 4)
    for T in (3, 4, 5, 9):
        tensors = inputs(1, T, 2, 2, 3)
        assert_close(gradients(tensors, "triton"), gradients(tensors, "reference"))


@pytest.mark.parametrize("scale", [1.0, 1000.0], ids=["matrices", "token by token"])
def test_runs_of_chunks_join(monkeypatch, scale):
    monkeypatch.setattr(torch_impl, "SLAB", 1)
    tensors = inputs(2, 3 * dual.CHUNK + 5, 2, 4, 3, forms="sd")
    tensors["A"] = tensors["A"] * scale
    got, expected = gradients(tensors, "torch"), gradients(tensors, "reference")
    steps = {n: expected.pop(n) for n in ("ddt", "ddt_bias")}
    assert_close(got, expected)
    assert_close(got, steps, 1e-10 if scale == 1 else 1e-6)  # the reference itself cancels there


def test_matrix_form_is_causal_to_the_bit_where_it_gives_way():
    """A huge step later on moves rows to the other way of computing; rows before it keep their bits."""
    tensors = inputs(1, 16, 2, 4, 3, dtype=torch.float32)
    before = selective_scan(**tensors, impl="torch").y
    for t in (3, 8, 15):
        dt = tensors["dt"].clone()
        dt[:, t] = 1e4
        after = selective_scan(**{**tensors, "dt": dt}, impl="torch").y
        assert torch.equal(before[:, :t], after[:, :t])
        expected = selective_scan(**{**tensors, "dt": dt}, impl="reference").y
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("P", [1, 4])
def test_reverse_is_a_flip_on_both_sides(P):
    tensors = inputs(2, 20, 2, P, 3, forms="dd")
    flipped = {n: t.flip(1) if n in ("u", "dt", "z", "B", "C") else t for n, t in tensors.items()}
    got, expected = (
        gradients(tensors, "torch", reverse=True),
        selective_scan(**flipped, output_final_state=True),
    )
    torch.testing.assert_close(got["y"], expected.y.flip(1), rtol=0, atol=0)
    torch.testing.assert_close(got["final_state"], expected.final_state, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("P", [1, 4])
def test_packed_sequences_equal_a_loop_over_them(impl, reverse, P):
    bounds = [0, 0, 7, 24, 24, 25]
    tensors = inputs(1, 28, 2, P, 3, forms="dd")
    tensors["initial_state"] = Draw(5, WIDE).complex_normal(5, 2, P, 3)
    timed = ("u", "dt", "z", "B", "C")
    poisoned = {n: t.clone() for n, t in tensors.items()}
    for name in timed:
        poisoned[name][:, bounds[-1] :] = float("nan")
    got = gradients({**poisoned, "cu_seqlens": torch.tensor(bounds)}, impl, reverse=reverse, dt_softplus=True)
    assert all(torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).all() for x in got.values())
    assert not got["y"][:, bounds[-1] :].any()
    for s, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = tensors["initial_state"][s : s + 1]
        if start == end:
            assert torch.equal(got["final_state"][s : s + 1], state)
            continue
        alone = {n: t[:, start:end] if n in timed else t for n, t in tensors.items()} | {
            "initial_state": state
        }
        y, final = selective_scan(
            **alone, output_final_state=True, reverse=reverse, dt_softplus=True, impl=impl
        )
        torch.testing.assert_close(got["y"][:, start:end], y)
        torch.testing.assert_close(got["final_state"][s : s + 1], final)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_steps_in_place_equal_the_scan(impl):
    tensors = inputs(3, 5, 2, 4, 3, forms="sc")
    y, final = selective_scan(**tensors, output_final_state=True, impl=impl)
    state = tensors.pop("initial_state").clone()
    where = state.data_ptr()
    for t in range(5):
        token = {n: tensors[n][:, t] for n in ("u", "dt", "z")}
        out, new = selective_scan_step(state, **{**tensors, **token}, inplace=True, impl=impl)
        assert new is state and state.data_ptr() == where
        torch.testing.assert_close(out, y[:, t], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


def test_a_step_in_place_still_differentiates_by_the_rest():
    tensors = inputs(2, 1, 2, 4, 3)
    state = tensors.pop("initial_state")
    token = {**tensors, **{n: tensors[n][:, 0] for n in ("u", "dt", "z")}}
    token["u"].requires_grad_()
    kept = state.clone()
    expected = torch.autograd.grad(selective_scan_step(kept, **token).y.sum(), token["u"])[0]
    y = selective_scan_step(state, **token, inplace=True).y
    torch.testing.assert_close(torch.autograd.grad(y.sum(), token["u"])[0], expected, rtol=0, atol=0)
    assert not state.equal(kept) and not state.requires_grad


def test_a_step_takes_dependent_weights_with_and_without_a_time_axis():
    tensors = inputs(3, 2, 4, 2, 5, forms="dd", G=2)
    expected = selective_scan(**tensors).y
    state = tensors.pop("initial_state")
    for t in range(2):
        token = {n: tensors[n][:, t] for n in ("u", "dt", "z", "B", "C")}
        y, new = selective_scan_step(state, **{**tensors, **token})
        with_time = {n: tensors[n][:, t : t + 1] for n in ("B", "C")}
        assert torch.equal(y, selective_scan_step(state, **{**tensors, **token, **with_time}).y)
        torch.testing.assert_close(y, expected[:, t], rtol=1e-12, atol=1e-12)
        state = new


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_pairs_and_a_real_b_are_the_same_numbers(impl):
    tensors = inputs(2, 4, 2, 4, 3, forms="cs")
    tensors["B"] = tensors["B"].real.clone()
    y, state = selective_scan(**tensors, output_final_state=True, impl=impl)
    promoted = {**tensors, "B": tensors["B"] + 0j}
    pairs = {n: torch.view_as_real(promoted[n]) for n in ("A", "B", "C", "initial_state")}
    y_pairs, state_pairs = selective_scan(**{**tensors, **pairs}, output_final_state=True, impl=impl)
    assert state_pairs.shape == (*state.shape, 2) and state_pairs.dtype == WIDE
    torch.testing.assert_close(y_pairs, y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.view_as_complex(state_pairs), state, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", FAST)
def test_conjugate_views_are_read_as_conjugates(impl):
    tensors = inputs(1, 5, 2, 4, 3)
    lazy = {**tensors, "B": tensors["B"].conj(), "C": tensors["C"].conj()}
    exact = {**lazy, "B": lazy["B"].resolve_conj(), "C": lazy["C"].resolve_conj()}
    assert_close(gradients(lazy, impl), gradients(exact, impl), 1e-14)


@triton.jit
def evaluate(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    gain, rise = exponential.growth(tl.load(x_ptr + i))
    sin, cos = exponential.half_turned(tl.load(y_ptr + i))
    tl.store(out_ptr + i, gain)
    tl.store(out_ptr + SIZE + i, rise)
    tl.store(out_ptr + 2 * SIZE + i, sin * cos)
    tl.store(out_ptr + 3 * SIZE + i, sin * sin)
    tl.store(
        out_ptr + 4 * SIZE + i, streams.step_size(tl.load(y_ptr + i) - 50.0, True, exponential.ACCURATE)[0]
    )


@triton.jit
def rise_of(dt_ptr, A_r_ptr, A_i_ptr, out_ptr, SIZE: tl.constexpr, FAST: tl.constexpr):
    i = tl.arange(0, SIZE)
    dt, A_r, A_i = tl.load(dt_ptr + i), tl.load(A_r_ptr + i), tl.load(A_i_ptr + i)
    E = exponential.decay_rise(dt, exponential.rates((A_r, A_i), FAST), FAST)
    tl.store(out_ptr + i, E[0])
    tl.store(out_ptr + SIZE + i, E[1])
    tl.store(out_ptr + 2 * SIZE + i, exponential.decay_rise(dt, (A_r,), FAST)[0])


def test_device_functions_round_as_well_as_pytorch():
    """exp, expm1, sin cos, sin^2 and softplus of the kernels, relative to float64."""
    if not interpreting():
        pytest.skip("reads device functions through the interpreter")
    x, y = -torch.logspace(-8, 1.93, 4096), torch.logspace(-6, 2, 4096)
    out = torch.empty(5, 4096)
    evaluate[(1,)](x, y, out, SIZE=4096)
    X, Y = x.double(), y.double()
    exact = (X.exp(), X.expm1(), Y.sin() * Y.cos(), Y.sin() ** 2, F.softplus((y - 50).double()))
    for got, e, least in zip(out, exact, (0, 0, 1, 1, 0), strict=True):
        error = (got - e).abs() / e.abs().clamp_min(least)
        assert error.max() < 6 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("fast", [0, 1])
def test_rise_is_right_relative_to_its_size(fast):
    """exp(dt A) - 1 to rounding: relative to |dt A| if accurate or if A is real, else absolute."""
    if not interpreting():
        pytest.skip("reads device functions through the interpreter")
    draw = Draw(0, torch.float32)
    dt = draw.log_uniform(4096, low=1e-7, high=1.0)
    A_r, A_i, out = -draw.log_uniform(4096, low=1e-3, high=10.0), draw.normal(4096), torch.empty(3, 4096)
    rise_of[(1,)](dt, A_r, A_i, out, SIZE=4096, FAST=fast)
    z = dt.double() * torch.complex(A_r.double(), A_i.double())
    error = (torch.complex(out[0].double(), out[1].double()) - z * phi1(z)).abs()
    eps = torch.finfo(torch.float32).eps
    assert (error / (z.abs().clamp(max=1) if fast == 0 else 1)).max() < 4 * eps
    assert ((out[2] - z.real.expm1()) / z.real.expm1()).abs().max() < 4 * eps


@pytest.mark.parametrize(
    "forms, options, real",
    [("ss", {}, False), ("dd", {"reverse": True}, True)],
    ids=["complex", "real, per token, backward in time"],
)
def test_sequences_cut_in_time_equal_whole_ones(monkeypatch, forms, options, real):
    """y, the final state and every gradient; sequences shorter than a part, and empty ones, among them."""
    tensors = inputs(1, 27, 2, 1, 5, forms=forms, real=real)
    packed = tensors | {"cu_seqlens": torch.tensor([0, 0, 17, 18, 25])}
    packed["initial_state"] = tensors["initial_state"].expand(4, 2, 1, 5)
    expected = [gradients(t, "triton", **options) for t in (tensors, packed)]
    for module in (launch_channels, launch_channels_backward):
        monkeypatch.setattr(module, "SEGMENT", 8)
    monkeypatch.setattr(launch_channels, "LEAST_SPAN", 8)
    for t, whole in zip((tensors, packed), expected, strict=True):
        with watch_launches() as launches:
            got = gradients(t, "triton", **options)
        names = [name for name, _ in launches]
        assert names == ["scan_forward", "scan_forward", "scan_adjoint", "scan_backward"]
        assert_close(got, whole, 1e-12)


def test_poles_going_to_zero_are_right():
    tensors = inputs(1, 6, 3, 1, 4, dtype=torch.float32)
    for size in (1e-2, 1e-5, 1e-9, 1e-20, 0.0):
        for accuracy in ("accurate", "fast"):
            small = tensors | {"A": tensors["A"] * size}
            wide = {n: t.to(torch.complex128 if t.is_complex() else WIDE) for n, t in small.items()}
            got = selective_scan(**small, accuracy=accuracy, impl="triton").y
            assert_close({"y": got}, {"y": selective_scan(**wide, impl="reference").y}, 1e-6)


def test_a_zero_step_and_an_empty_sequence_keep_the_state():
    tensors = inputs(1, 3, 2, 2, 3, dtype=torch.float32)
    start = torch.randn(2, 2, 2, 3, dtype=torch.cfloat)
    tensors |= {"cu_seqlens": torch.tensor([0, 0, 3]), "initial_state": start}
    state = selective_scan(**tensors, output_final_state=True, impl="triton").final_state
    assert torch.equal(state[0], start[0])
    del tensors["dt_bias"]
    tensors["dt"] = torch.zeros_like(tensors["dt"])
    state = selective_scan(**tensors, output_final_state=True, impl="triton").final_state
    torch.testing.assert_close(state, start, rtol=1e-6, atol=0)
