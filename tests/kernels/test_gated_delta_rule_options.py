"""Options of the gated delta rule: gates made inside the op, layouts of states, other libraries' calls."""

import inspect
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from prism_kernels import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from prism_kernels.gated_delta_rule import gates
from prism_kernels.testing.inputs import Draw

FUNCTIONS = (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule)
IMPLS = ("torch",) if torch.cuda.is_available() else ("torch", "triton")
every_function = pytest.mark.parametrize("function", FUNCTIONS)
RAW = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def inputs(seed, T=20, dtype=torch.float64, groups=1, size=1.0):
    """q, k, v, raw g, raw beta, A_log, dt_bias."""
    draw, HV = Draw(seed, dtype), 2 * groups
    q, k, v = draw.normal(2, T, 2, 8), draw.unit(2, T, 2, 8), draw.normal(2, T, HV, 4)
    g, beta = (draw.normal(2, T, HV, scale=size) for _ in range(2))
    return [q, k, v, g, beta, draw.gate(HV, low=-3.0), draw.wide_normal(HV)]


def gradients(call, leaves, seed=1):
    leaves = [x.clone().requires_grad_() for x in leaves]
    o, state = call(*leaves)
    draw = Draw(seed, o.dtype)
    loss = (o * draw.normal(*o.shape)).sum() + (state * draw.wide_normal(*state.shape)).sum()
    return [o, state, *torch.autograd.grad(loss, leaves)]


def assert_close(got, expected, tolerance=1e-11):
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@every_function
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("top", [1, 2])
def test_gates_inside_equal_gates_outside(function, impl, top):
    def inside(q, k, v, g, beta, A_log, dt_bias):
        options = RAW | {"allow_neg_eigval": top == 2, "A_log": A_log, "dt_bias": dt_bias}
        return function(q, k, v, g, beta=beta, **options, output_final_state=True, impl=impl)

    def outside(q, k, v, g, beta, A_log, dt_bias):
        x = g + dt_bias
        g = -A_log.exp() * torch.where(x > 0, x + torch.log1p((-x).exp()), torch.log1p(x.exp()))
        return function(q, k, v, g, beta=top * beta.sigmoid(), output_final_state=True, impl=impl)

    leaves = inputs(0)
    assert_close(gradients(inside, leaves), gradients(outside, leaves))


@every_function
@pytest.mark.parametrize("impl", IMPLS)
def test_states_with_values_first_are_transposed_states(function, impl):
    q, k, v, g, beta, _, _ = inputs(1)
    given = [q, k, v, -g.abs(), beta.sigmoid(), Draw(2, torch.float64).wide_normal(2, 2, 8, 4)]

    def call(v_first):
        def run(q, k, v, g, beta, state):
            options = {"state_v_first": v_first, "output_final_state": True, "impl": impl}
            o, final = function(
                q, k, v, g, beta=beta, initial_state=state.mT if v_first else state, **options
            )
            if v_first:
                assert final.is_contiguous() and final.shape == (2, 2, 4, 8)
            return o, final.mT if v_first else final

        return run

    for a, b in zip(gradients(call(True), given), gradients(call(False), given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_has_no_threshold(dtype):
    x = torch.tensor([-800.0, -90.0, -20.0, -1.0, 0.0, 19.9, 20.1, 33.0, 800.0], dtype=dtype)
    zero = torch.zeros(1, dtype=dtype)
    g, _ = gates.effective(x.view(1, -1, 1), x.view(1, -1, 1), zero, None, 0, dtype)
    expected = [max(a, 0.0) + math.log1p(math.exp(-abs(a))) for a in x.tolist()]
    got = -g.flatten()
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=dtype), rtol=2 * torch.finfo(dtype).eps, atol=0
    )
    slope = gates.raw_gradients(torch.ones_like(g), torch.ones_like(g), x.view(1, -1, 1), g, zero, None, 0)[0]
    torch.testing.assert_close(-slope.flatten(), x.sigmoid())


def test_gradients_of_saturated_gates_keep_their_digits():
    x = torch.tensor([-40.0, 0.0, 12.0, 40.0, 80.0]).view(1, -1, 1)
    one = torch.ones_like(x)
    _, slope, _, _ = gates.raw_gradients(one, one, x, x, None, None, 2)
    exact = 2 * x.double().sigmoid() * (-x.double()).sigmoid()
    torch.testing.assert_close(slope.double(), exact, rtol=1e-6, atol=0)


@every_function
@pytest.mark.parametrize("impl", IMPLS)
def test_raw_gates_stay_finite_however_large(function, impl):
    q, k, v, g, beta, A_log, dt_bias = inputs(3, dtype=torch.float32, size=1e4)

    def call(*x):
        q, k, v, g, beta, A_log, dt_bias = x
        options = RAW | {"A_log": A_log, "dt_bias": dt_bias, "output_final_state": True, "impl": impl}
        return function(q, k, v, g, beta=beta, **options)

    for x in gradients(call, [q, k, v, g, beta, A_log, dt_bias]):
        assert torch.isfinite(x).all()


@every_function
def test_backward_keeps_gates_as_they_were_given(function):
    q, k, v, g, beta, A_log, dt_bias = (x.requires_grad_() for x in inputs(4, dtype=torch.bfloat16))
    options = RAW | {"A_log": A_log, "dt_bias": dt_bias, "impl": "torch"}
    kept = []

    def pack(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = function(q, k, v, g, beta=beta, **options).o
    per_token = [x for x in kept if x.shape == g.shape]
    assert {x.data_ptr() for x in per_token} == {g.data_ptr(), beta.data_ptr()}
    for x in torch.autograd.grad(o.sum(), (g, beta)):
        assert x.dtype == torch.bfloat16


@every_function
def test_padding_leaves_the_gradients_of_the_gate_alone(function):
    q, k, v, g, beta, A_log, dt_bias = inputs(5)
    row = [x[:1].clone() for x in (q, k, v, g, beta)]
    bounds = torch.tensor([0, 7, 7, 15])

    def call(*x):
        q, k, v, g, beta, A_log, dt_bias = x
        options = RAW | {"A_log": A_log, "dt_bias": dt_bias, "cu_seqlens": bounds, "impl": "torch"}
        return function(q, k, v, g, beta=beta, **options, output_final_state=True)

    expected = gradients(call, [*row, A_log, dt_bias])
    for x in row:
        x[:, 15:] = float("nan")
    assert_close([x.nan_to_num(0.0) for x in gradients(call, [*row, A_log, dt_bias])], expected, 0.0)


@every_function
def test_the_signature_is_flash_linear_attentions(function):
    flags = "output_final_state use_qk_l2norm_in_kernel"
    beta, v_first = "use_beta_sigmoid_in_kernel allow_neg_eigval", "state_v_first cu_seqlens"
    gate = "use_gate_in_kernel A_log dt_bias"
    theirs = (
        f"q k v g beta scale initial_state {flags} {beta} {v_first} cu_seqlens_cpu chunk_indices cp_context"
    )
    own = f"{gate} chunk_size impl"
    if function is fused_recurrent_gated_delta_rule:
        theirs = f"q k v g gk gv beta scale initial_state {flags} {gate} {beta} {v_first}"
        own = "impl"
    parameters = inspect.signature(function).parameters.values()
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert " ".join(by_place) == theirs and " ".join(by_name) == own


def test_calls_written_for_flash_linear_attention():
    q, k, v, g, beta, _, _ = (x[:1] for x in inputs(6, groups=2))
    g, beta, state = -g.abs(), beta.sigmoid(), torch.ones(2, 4, 8, 4, dtype=torch.float64)
    bounds = torch.tensor([0, 9, 20])
    indices = torch.tensor([[0, 0], [1, 0]])
    by_name = {"scale": 0.3, "initial_state": state, "output_final_state": True, "cu_seqlens": bounds}
    expected = chunk_gated_delta_rule(q, k, v, g, beta, **by_name)
    given = (q, k, v, g, beta, 0.3, state, True, False, False, False, False, bounds, bounds, indices, None)
    for a, b in zip(chunk_gated_delta_rule(*given), expected, strict=True):
        assert torch.equal(a, b)
    expected = fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, **by_name)
    given = (q, k, v, g, None, None, beta, 0.3, state, True, False)
    for a, b in zip(fused_recurrent_gated_delta_rule(*given, cu_seqlens=bounds), expected, strict=True):
        assert torch.equal(a, b)
    none = fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, output_final_state=None)
    assert none.final_state is None


@every_function
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_long_keys_are_warned_of_in_debug_mode(function, impl, monkeypatch):
    q, k, v, g, _, _, _ = inputs(7, dtype=torch.float32)
    g, beta = -g.abs(), torch.full(v.shape[:3], 2.0)
    k[0, 3] *= 1.5
    call = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "impl": impl}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(**call)
        monkeypatch.setenv("PRISM_CHECK", "1")
        function(**call | {"k": F.normalize(k, dim=-1)})
        function(**call, use_qk_l2norm_in_kernel=True)
    with pytest.warns(RuntimeWarning, match=r"beta \|k\|\^2 <= 2, got a largest value of 4\.5") as caught:
        function(**call)
    assert len(caught) == 1 and function.__name__ in str(caught[0].message)
    packed = {n: x[:1] for n, x in call.items() if n != "impl"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(**packed, cu_seqlens=torch.tensor([0, 3]))  # the long key is padding
