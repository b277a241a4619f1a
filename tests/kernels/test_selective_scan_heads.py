"""The per-head kernels of the selective scan, called through their launchers; and which calls take them."""

import pytest
import torch

from prism_kernels import selective_scan, selective_scan_step
from prism_kernels._core.runtime import record_launches
from prism_kernels.selective_scan import launch_channels
from prism_kernels.selective_scan.reference import scan_reference
from prism_kernels.testing.budgets import LIMIT, errors
from prism_kernels.testing.inputs import Draw

pytest.importorskip("triton")

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
OPTIONS = {"dt_softplus": False, "reverse": False, "euler": False}


def pairs(x):
    return torch.view_as_real(x.resolve_conj()) if x is not None and x.is_complex() else x


def draw(
    dtype=torch.float32,
    T=18,
    H=1,
    P=8,
    N=5,
    *,
    tied=False,
    real=False,
    rates=(0.2, 1.5),
    turns=4.0,
    steps=(1e-2, 0.5),
    weights="head",
    bare=False,
    bounds=None,
    seed=1,
):
    """Tensors of a call by name, complex ones as such."""
    d = Draw(seed, dtype)
    batch, S = (1, 1 if bounds is None else len(bounds) - 1)
    number = d.wide_normal if real else d.complex_normal
    shape = {"head": (H, N), "token": (batch, T, 1, N)}[weights]
    rate = -d.gate(H, 1 if tied else N, low=rates[0], high=rates[1]).expand(H, N).contiguous()
    A = rate if real else torch.complex(rate, turns * d.wide_normal(H, N))
    tensors = {
        "u": d.normal(batch, T, H, P),
        "dt": d.log_uniform(batch, T, H, low=steps[0], high=steps[1]),
        "A": A,
        "B": number(*shape),
        "C": number(*shape),
        "D": d.wide_normal(H, P),
        "z": d.normal(batch, T, H, P),
        "dt_bias": d.gate(H, low=0.05, high=0.1),
        "initial_state": number(S, H, P, N),
    }
    if bare:
        tensors |= dict.fromkeys(("D", "z", "dt_bias", "initial_state"))
    return tensors | {"cu_seqlens": None if bounds is None else torch.tensor(bounds)}


def launcher():
    from prism_kernels.selective_scan import launch_heads

    return launch_heads


def forward(tensors, **options):
    """y, the final state, the residuals, and the arguments of the launcher."""
    arguments = [pairs(tensors[n]) for n in (*NAMES, "cu_seqlens")] + list((OPTIONS | options).values())
    return *launcher().forward(*arguments, True, True), arguments


def forward_backward(tensors, dy, dfinal, **options):
    """Outputs and gradients by name."""
    y, final, residuals, arguments = forward(tensors, **options)
    assert [(tuple(r.shape), r.dtype) for r in residuals] == launcher().residuals(
        arguments[0], arguments[2], arguments[9]
    )
    grads = launcher().backward(dy, dfinal, residuals, *arguments, True)
    given = {"d" + n: g for n, g in zip(NAMES, grads, strict=True) if tensors[n] is not None}
    return {"y": y, "final_state": final} | given


def by_definition(tensors, dy, dfinal, product_dtype=None, **options):
    """The same from the reference, through autograd."""
    options = OPTIONS | options
    inputs = {n: None if tensors[n] is None else tensors[n].detach().requires_grad_() for n in NAMES}
    y, final = scan_reference(
        **inputs,
        cu_seqlens=tensors["cu_seqlens"],
        dt_softplus=options["dt_softplus"],
        reverse=options["reverse"],
        discretization="euler" if options["euler"] else "zoh",
        product_dtype=product_dtype,
    )
    loss = (y * dy.to(y.dtype)).sum() + (pairs(final) * dfinal.to(pairs(final).dtype)).sum()
    given = {n: x for n, x in inputs.items() if x is not None}
    grads = torch.autograd.grad(loss, list(given.values()), allow_unused=True, materialize_grads=True)
    named = {"d" + n: pairs(g) for n, g in zip(given, grads, strict=True)}
    return {"y": y.detach(), "final_state": pairs(final.detach())} | named


def wide(x):
    if x is None or not (x.is_floating_point() or x.is_complex()):
        return x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def cotangents(tensors):
    d = Draw(7, tensors["u"].dtype)
    S = 1 if tensors["cu_seqlens"] is None else len(tensors["cu_seqlens"]) - 1
    A = pairs(tensors["A"])
    return d.normal(*tensors["u"].shape), d.wide_normal(S, *tensors["u"].shape[2:], *A.shape[1:])


def case(reverse=False, euler=False, dt_softplus=False, **drawn):
    return drawn, {"reverse": reverse, "euler": euler, "dt_softplus": dt_softplus}


CASES = {
    "one real part in the head": case(tied=True),
    "real parts of their own": case(dt_softplus=True),
    "per token, two blocks of channels": case(weights="token", P=35, N=18, T=3),
    "backward in time": case(T=17, reverse=True),
    "packed, with an empty sequence": case(bounds=[0, 0, 3, 20], T=22),
    "poles decay far apart": case(steps=(10.0, 30.0), rates=(0.1, 8.0), T=6),
    "poles decay far apart by turns": case(steps=(1e-4, 30.0), rates=(0.1, 8.0), seed=3),
    "one fast decay": case(tied=True, steps=(10.0, 30.0), rates=(8.0, 8.0), bare=True, T=6),
    "tiny steps": case(steps=(1e-5, 1e-5), bare=True),
    "fast turns": case(turns=100.0, bare=True),
    "undamped": case(rates=(0.0, 0.0), T=9),
    "poles beside zero": case(rates=(0.0, 1e-7), turns=1e-7, T=9),
    "real": case(real=True),
    "one real pole, Euler, per token": case(real=True, tied=True, weights="token", euler=True),
    "Euler": case(euler=True, T=9),
}


LONG = {
    "in parts": case(T=64),
    "in parts, backward in time": case(T=73, reverse=True, dt_softplus=True),
    "in parts, packed": case(T=64, bounds=[0, 0, 17, 18, 60], weights="token"),
    "in parts, poles decay far apart by turns": case(T=64, steps=(1e-4, 30.0), rates=(0.1, 8.0), seed=3),
    "in parts, undamped": case(T=73, rates=(0.0, 0.0)),
    "in parts, one real pole, Euler": case(T=64, real=True, tied=True, weights="token", euler=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_errors_are_at_most_twice_those_of_plain_pytorch(name, dtype):
    """A gradient that is a sum over all tokens is allowed some roundings more: plain PyTorch may be lucky."""
    drawn, options = CASES[name]
    stays_within_budget(draw(dtype, **drawn), options)


def stays_within_budget(tensors, options):
    dtype, (dy, dfinal) = tensors["u"].dtype, cotangents(tensors)
    got = forward_backward(tensors, dy, dfinal, **options)
    oracle = by_definition({n: wide(x) for n, x in tensors.items()}, dy, dfinal, **options)
    low = dtype if dtype == torch.bfloat16 else None
    plain = by_definition(tensors, dy, dfinal, low, **options)
    for key, x in got.items():
        e, p = errors(x, oracle[key]), errors(plain[key], oracle[key])
        slack = torch.finfo(x.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps * (key != "y")
        if key == "ddt_bias" and low:
            slack += torch.finfo(low).eps / 2
        ratios = [a / (b + slack) for a, b in zip(e.relative, p.relative, strict=True)]
        assert max(ratios) <= LIMIT, (key, ratios, e.relative, p.relative)


@pytest.mark.parametrize("name, dtype", [*((n, torch.float32) for n in LONG), ("in parts", torch.bfloat16)])
def test_sequences_cut_in_time_are_as_exact(monkeypatch, name, dtype):
    monkeypatch.setattr(launch_channels, "SEGMENT", 16)
    monkeypatch.setattr(launch_channels, "LEAST_SPAN", 16)
    drawn, options = LONG[name]
    tensors = draw(dtype, **drawn)
    found = cuts(tensors)
    assert found.keys() == {"heads_forward_kernel", "heads_adjoint_kernel"}
    assert all(len(splits) == 2 and min(splits) >= 3 for splits in found.values())
    stays_within_budget(tensors, options)


def cuts(tensors):
    """Into how many parts the launches of each kernel cut sequences."""
    dy, dfinal = cotangents(tensors)
    with record_launches() as launches:
        forward_backward(tensors, dy, dfinal)
    found = [(x.kernel.__name__, x.constexprs["SPLITS"]) for x in launches if "SPLITS" in x.constexprs]
    return {name: [splits for n, splits in found if n == name] for name, _ in found}


def test_a_part_of_a_sequence_is_whole_chunks():
    assert launch_channels.SEGMENT % launcher().CHUNK == 0


@pytest.mark.parametrize(
    "H, T, splits", [(1, 767, 1), (1, 768, 3), (1, 4096, 16), (8, 100_000, 16), (66, 4096, 4), (89, 4096, 1)]
)
def test_only_long_sequences_of_few_heads_are_cut(H, T, splits):
    assert set(cuts(draw(T=T, H=H, P=32, N=1))["heads_forward_kernel"]) == {splits}


@pytest.mark.parametrize("steps", [(1e-2, 0.5), (1e-3, 30.0)], ids=["mild", "stiff"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_causal_bit_for_bit(dtype, steps):
    tensors = draw(dtype, rates=(0.1, 8.0), steps=steps, weights="token")
    later = dict(tensors)
    for name in ("u", "dt", "z", "B", "C"):
        later[name] = tensors[name].clone()
        later[name][:, 9:] = 3 * later[name][:, 9:].roll(1, 1) + 1
    a, b = forward(tensors)[0], forward(later)[0]
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.equal(a[:, 9:], b[:, 9:])


@pytest.mark.parametrize("steps", [(1e-6, 1e6), (1e6, 1e12), (1e20, 1e31)], ids=lambda s: f"to {s[1]:.0e}")
@pytest.mark.parametrize("real", [False, True], ids=["complex", "real"])
def test_a_step_of_any_size_gives_finite_numbers_of_the_right_size(real, steps):
    """The phase of so long a step is not known to float32, but that its turn has modulus 1 is."""
    tensors = draw(rates=(1e-3, 1e4), steps=steps, turns=100.0, T=35, real=real)
    dy, dfinal = cotangents(tensors)
    found = forward_backward(tensors, dy, dfinal)
    assert all(x.isfinite().all() for x in found.values())
    right = by_definition({n: wide(x) for n, x in tensors.items()}, dy, dfinal)
    for key in ("y", "final_state", "du", "dA"):
        assert found[key].abs().max() <= 1.5 * right[key].abs().max(), key


@pytest.mark.parametrize(
    "steps", [(1.0, 1e5), (1e5, 1e6), (1e6, 1e12), (1e35, 1e36)], ids=lambda s: f"to {s[1]:.0e}"
)
def test_an_undamped_state_keeps_its_size_however_fast_it_turns(steps):
    tensors = draw(rates=(0.0, 0.0), steps=steps, turns=100.0, T=768)
    tensors["u"] = torch.zeros_like(tensors["u"])
    final = forward(tensors)[1]
    before = pairs(tensors["initial_state"])
    assert (final.norm(dim=-1) / before.norm(dim=-1) - 1).abs().max() <= 3e-4


def test_the_same_bits_twice():
    tensors = draw(torch.bfloat16, rates=(0.1, 8.0))
    dy, dfinal = cotangents(tensors)
    first, second = (forward_backward(tensors, dy, dfinal) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_padding_reaches_nothing():
    tensors = draw(bounds=[0, 5, 5, 9], T=12, weights="token")
    dy, dfinal = cotangents(tensors)
    poisoned = dict(tensors)
    for name in ("u", "dt", "z", "B", "C"):
        poisoned[name] = tensors[name].clone()
        poisoned[name][:, 9:] = float("nan")
    noise = dy.clone()
    noise[:, 9:] = float("nan")
    clean, dirty = forward_backward(tensors, dy, dfinal), forward_backward(poisoned, noise, dfinal)
    for key, x in clean.items():
        assert torch.equal(x, dirty[key]), key
        if key in ("y", "du", "ddt", "dz", "dB", "dC"):
            assert not x[:, 9:].any(), key
    assert torch.equal(clean["final_state"][1], pairs(tensors["initial_state"])[1])


def test_split_is_whole():
    tensors = draw(torch.float32, T=21)
    whole, final, *_ = forward(tensors)
    parts = []
    state = tensors["initial_state"]
    for time in (slice(0, 16), slice(16, 21)):
        part = tensors | {n: tensors[n][:, time] for n in ("u", "dt", "z")} | {"initial_state": state}
        y, last, *_ = forward(part)
        parts.append(y)
        state = torch.view_as_complex(last)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(last, final, rtol=2e-6, atol=2e-6)


def test_strides_change_nothing():
    tensors = draw(weights="token", P=8)
    strided = dict(tensors)
    for name in ("u", "dt", "z", "B", "C"):
        x = tensors[name]
        strided[name] = torch.stack([x, x], 1)[:, 0] if name != "u" else torch.cat([x, x], -1)[..., :8]
    assert torch.equal(forward(tensors)[0], forward(strided)[0])


def launched(dtype=torch.bfloat16, T=18, P=32, N=32, grad=True, **drawn):
    """Names of the kernels that the public function launches, forward and backward."""
    options = {n: drawn.pop(n) for n in ("accuracy", "discretization") if n in drawn}
    tensors = draw(dtype, T=T, P=P, N=N, **drawn)
    inputs = {
        n: x if x is None else x.detach().requires_grad_(grad) for n, x in tensors.items() if n in NAMES
    }
    with record_launches() as launches:
        y, state = selective_scan(
            **inputs,
            cu_seqlens=tensors["cu_seqlens"],
            output_final_state=True,
            impl="triton",
            **options,
        )
        if grad:
            y.backward(torch.ones_like(y))
    return {launch.kernel.__name__ for launch in launches}


HEADS = {"heads_forward_kernel", "heads_adjoint_kernel", "heads_backward_kernel"}
CHANNELWISE = {"scan_forward", "scan_backward"}
MAMBA2 = {"real": True, "tied": True, "weights": "token", "discretization": "euler"}


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"accuracy": "fast"},
        {"dtype": torch.float16, "N": 64},
        {"weights": "token"},
        {"T": 2},
        {"bounds": [0, 0, 3, 18]},
        MAMBA2,
        MAMBA2 | {"N": 128, "P": 64},
        MAMBA2 | {"dtype": torch.float32, "N": 64, "P": 64},
    ],
    ids=str,
)
def test_calls_that_fill_the_blocks_take_these_kernels(call):
    assert launched(**call) == HEADS


@pytest.mark.parametrize(
    "call",
    [
        {"T": 1},
        {"P": 8},
        {"P": 16, "N": 17},
        {"N": 16},
        {"N": 65},
        {"dtype": torch.float32},
        {"dtype": torch.float64},
        MAMBA2 | {"dtype": torch.float32, "N": 65},
    ],
    ids=str,
)
def test_what_is_left_to_the_channel_kernels(call):
    assert launched(**call) == CHANNELWISE


def test_a_call_without_gradients_takes_the_same_kernel_as_one_with():
    assert launched(grad=False) == {"heads_forward_kernel"}


def test_weights_per_channel_are_left_to_the_channel_kernels():
    supports, A = launcher().supports, torch.zeros(2, 32, 2)
    u, by_channel = torch.zeros(1, 3, 2, 32, dtype=torch.bfloat16), torch.zeros(2, 32, 32, 2)
    assert supports(u, A, A, A)
    assert not supports(u, A, A, by_channel)


def test_a_step_is_a_scan_of_one_token():
    """bfloat16: the state in float32 by one way, of 16 bits in its products by the other."""
    tensors = draw(torch.bfloat16, T=4, P=32, N=32, bare=True)
    given = {n: tensors[n] for n in NAMES if tensors[n] is not None}
    whole, final = selective_scan(**given, output_final_state=True, impl="triton")
    state = torch.zeros_like(final)
    for t in range(4):
        token = {n: given[n][:, t] for n in ("u", "dt")}
        rest = {n: given[n] for n in ("A", "B", "C")}
        y, state = selective_scan_step(state, **token, **rest, impl="triton")
        torch.testing.assert_close(y, whole[:, t], rtol=2e-2, atol=2e-2 * whole.abs().max().item())
    torch.testing.assert_close(state, final, rtol=1e-3, atol=1e-4)
