"""What is particular to the gated delta rule: peers, hostile inputs, every chunk size, wide heads."""

import math

import pytest
import torch

from prism_kernels import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from prism_kernels.gated_delta_rule import torch_impl
from prism_kernels.gated_delta_rule.reference import gated_delta_rule_reference
from prism_kernels.testing.inputs import Draw

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="float64 kernels are for the interpreter")


def inputs(seed, B, T, H, K, V, dtype=torch.float64, groups=1, decay=-1.0, strength=1.0):
    draw, HV = Draw(seed, dtype), groups * H
    q, k, v = draw.normal(B, T, H, K), draw.unit(B, T, H, K), draw.normal(B, T, HV, V)
    return [q, k, v, draw.gate(B, T, HV, low=decay, high=0.0), draw.gate(B, T, HV, high=strength)]


def with_gradients(call, tensors, seed=1):
    leaves = [t.clone().requires_grad_() for t in tensors]
    o, state = call(*leaves)
    draw = Draw(seed, o.dtype)
    loss = (o * draw.normal(*o.shape)).sum() + (state * draw.normal(*state.shape)).sum()
    return [o.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def assert_all_close(got, expected, tolerance=1e-11):
    for name, a, b in zip(("o", "state", "dq", "dk", "dv", "dg", "dbeta"), got, expected, strict=True):
        assert torch.isfinite(a).all(), name
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), name


def by_name(function, impl):
    """The two functions differ in the place of beta."""
    return lambda q, k, v, g, beta: function(q, k, v, g, beta=beta, output_final_state=True, impl=impl)


def reference(*tensors, **options):
    return gated_delta_rule_reference(*tensors, tensors[0].shape[-1] ** -0.5, **options)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_equals_transformers(name, unit):
    module = "transformers.models.qwen3_next.modeling_qwen3_next"
    peer = getattr(pytest.importorskip(module, reason="transformers is not installed"), name)
    q, k, v, g, beta = inputs(0, 2, 70, 2, 16, 8, torch.float32, groups=2)
    state = Draw(1).wide_normal(2, 4, 16, 8)
    given = (q, k, v) if "chunk" in name else (*(x.repeat_interleave(2, 2) for x in (q, k)), v)
    expected, final = peer(
        *given, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=unit
    )
    for function in (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule):
        got = function(
            q, k, v, g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=unit
        )
        torch.testing.assert_close(got.o, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(got.final_state, final, rtol=2e-5, atol=2e-5)


@CPU_ONLY
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_for_every_chunk_size(impl, chunk_size, unit, monkeypatch):
    from prism_kernels.gated_delta_rule import launch

    # Wide inputs use shorter chunks than asked for; here the algorithm is tested at the size named.
    monkeypatch.setattr(launch, "inner_chunk", lambda C, K, V, dtype: C)
    monkeypatch.setattr(torch_impl, "inner_chunk", lambda C, K, V: C)
    tensors = inputs(2, 1, 69, 1, 8, 5)

    def call(*x):
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": unit}
        return chunk_gated_delta_rule(*x, **options, chunk_size=chunk_size, impl=impl)

    expected = with_gradients(lambda *x: reference(*x, use_qk_l2norm_in_kernel=unit), tensors)
    assert_all_close(with_gradients(call, tensors), expected)


@CPU_ONLY
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
def test_identical_keys_with_strengths_up_to_two(function, impl):
    q, k, v, g, beta = inputs(3, 1, 40, 1, 8, 4, decay=0.0, strength=2.0)
    tensors = [q, k[:, :1].expand_as(k).contiguous(), v, g, beta]
    got = with_gradients(by_name(function, impl), tensors)
    assert_all_close(got, with_gradients(reference, tensors), 1e-10)


@CPU_ONLY
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
def test_strong_decay_in_every_step(function, impl):
    q, k, v, g, beta = inputs(4, 1, 37, 1, 8, 4)
    tensors = [q, k, v, torch.full_like(g, -30.0), beta]
    got = with_gradients(by_name(function, impl), tensors)
    assert_all_close(got, with_gradients(reference, tensors))


def test_a_decay_that_underflows_stays_finite():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, g, beta = inputs(5, 1, 50, 1, 8, 8, dtype)
        for impl in ("torch", "triton") if not torch.cuda.is_available() else ("torch",):
            got = chunk_gated_delta_rule(q, k, v, g - 1e4, beta, output_final_state=True, impl=impl)
            assert torch.isfinite(got.o).all() and torch.isfinite(got.final_state).all()


@pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
def test_zero_length_sequences_pass_their_state_on(function):
    q, k, v, g, beta = inputs(6, 1, 30, 1, 8, 4, groups=2)
    bounds = torch.tensor([0, 0, 11, 11, 28])
    state = Draw(7, torch.float64).wide_normal(4, 2, 8, 4)
    got = function(q, k, v, g, beta=beta, initial_state=state, output_final_state=True, cu_seqlens=bounds)
    assert torch.equal(got.final_state[[0, 2]], state[[0, 2]])
    assert not got.o[:, 28:].any()
    for s, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if a < b:
            part = [x[:, a:b] for x in (q, k, v, g, beta)]
            o, final = reference(*part, initial_state=state[s : s + 1])
            torch.testing.assert_close(got.o[:, a:b], o, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(got.final_state[s : s + 1], final, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
def test_sequences_may_all_be_empty(function):
    q, k, v, g, beta = inputs(8, 1, 3, 1, 4, 4)
    state = torch.ones(2, 1, 4, 4, dtype=torch.float64)
    bounds = torch.tensor([0, 0, 0])
    got = function(q, k, v, g, beta=beta, initial_state=state, output_final_state=True, cu_seqlens=bounds)
    assert torch.equal(got.final_state, state) and not got.o.any()


@pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
def test_a_batch_may_be_empty_on_the_torch_path(function, monkeypatch):
    monkeypatch.setenv("PRISM_CHECK", "1")
    q, k, v, g, beta = (x[:0].requires_grad_() for x in inputs(8, 1, 3, 1, 4, 4))
    got = function(q, k, v, g, beta=beta, output_final_state=True, impl="torch")
    assert got.o.shape == v.shape and got.final_state.shape == (0, 1, 4, 4)
    assert torch.autograd.grad(got.o.sum(), q)[0].shape == q.shape


def test_scale_none_and_defaults_are_those_of_the_original():
    q, k, v, _, _ = inputs(9, 1, 20, 1, 16, 4)
    ones = torch.ones(1, 20, 1, dtype=torch.float64)
    explicit = chunk_gated_delta_rule(q, k, v, 0 * ones, ones, scale=1 / math.sqrt(16))
    got = chunk_gated_delta_rule(q, k, v)
    assert torch.equal(got.o, explicit.o) and got.final_state is None


def test_heads_as_wide_as_256_run_on_the_torch_path():
    tensors = inputs(10, 1, 70, 1, 256, 256)
    got = with_gradients(
        lambda *x: chunk_gated_delta_rule(*x, output_final_state=True, impl="torch"), tensors
    )
    assert_all_close(got, with_gradients(reference, tensors))


@CPU_ONLY
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-4, 1e-2])
def test_keys_of_almost_no_length_stay_finite_in_float16(size):
    # Their factor, rsqrt(sum + 1e-6), is up to 1000: it must not carry products beyond float16.
    q, k, v, g, beta = inputs(11, 1, 40, 1, 16, 8, torch.float16)
    q[:, ::3] *= size
    k[:, ::2] *= size

    def call(*x):
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return chunk_gated_delta_rule(*x, **options, impl="triton")

    for got in with_gradients(call, [q, k, v, g, beta]):
        assert torch.isfinite(got).all()


def test_the_torch_path_asks_for_temporaries_once_not_for_every_segment():
    def asked_for(T):
        q, k, v, g, beta = inputs(12, 1, T, 4, 32, 32, torch.float32)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            chunk_gated_delta_rule(*leaves, g, beta, impl="torch").o.backward(torch.ones_like(v))
        events = profile.profiler.kineto_results.events()
        return sum(max(0, e.nbytes()) for e in events if e.name() == "[memory]")

    per_token_head = (asked_for(4096) - asked_for(2048)) / 2048 / 4
    results = 4 * (2 * 32 + 3 * 32)  # o, the gradients of q, k and v, and that of o
    kept = 4 * (32 + 32 + 32)  # N, E, and a state for every 32 tokens
    assert per_token_head <= 2.5 * (results + kept)
