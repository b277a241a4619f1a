"""What is particular to decoding: pools in place, snapshots, what surrounds entries named, CUDA graphs."""

import ast
import inspect

import pytest
import torch

from prism_kernels import fused_recurrent_gated_delta_rule, gated_delta_rule_step
from prism_kernels.gated_delta_rule import decode_op, launch_decode
from prism_kernels.testing.inputs import Draw

PATHS = pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
UNIT = {"use_qk_l2norm_in_kernel": True}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE = torch.float32 if torch.cuda.is_available() else torch.float64
TOLERANCE = 1e-5 if torch.cuda.is_available() else 1e-12


def tokens(seed, B, T, H=2, K=8, V=4, groups=2, dtype=WIDE):
    draw, HV = Draw(seed, dtype), groups * H
    q, k, v = draw.normal(B, T, H, K), draw.unit(B, T, H, K), draw.normal(B, T, HV, V)
    gates = {"g": draw.gate(B, T, HV, low=-1.0, high=0.0), "beta": draw.gate(B, T, HV)}
    return {n: x.to(DEVICE) for n, x in {"q": q, "k": k, "v": v, **gates}.items()}


def pool_of(S, HV=4, K=8, V=4, dtype=WIDE):
    return Draw(9, dtype).normal(S, HV, K, V).to(DEVICE)


def cut(given, *where):
    return {n: x[where] for n, x in given.items()}


@PATHS
def test_a_step_of_several_tokens_equals_the_form_token_by_token(impl):
    given, state = tokens(0, 2, 6), pool_of(2)
    expected = fused_recurrent_gated_delta_rule(
        **given, initial_state=state, output_final_state=True, impl="torch", **UNIT
    )
    got = gated_delta_rule_step(state, **given, impl=impl, **UNIT)
    torch.testing.assert_close(got.o, expected.o, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(got.state, expected.final_state, rtol=TOLERANCE, atol=TOLERANCE)
    assert got.snapshots is None


@PATHS
@pytest.mark.parametrize("v_first", [False, True])
def test_snapshots_are_the_states_after_each_token(impl, v_first):
    given, state = tokens(1, 2, 4), pool_of(3)
    rows = torch.tensor([2, 0], device=DEVICE)
    state = state.mT.contiguous() if v_first else state
    options = {"state_indices": rows, "state_v_first": v_first, "impl": impl}
    got = gated_delta_rule_step(state, **given, output_snapshots=True, **options)
    for t in range(4):
        state = gated_delta_rule_step(state, **cut(given, slice(None), slice(t, t + 1)), **options).state
        torch.testing.assert_close(got.snapshots[:, t], state[rows], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(got.state, state, rtol=TOLERANCE, atol=TOLERANCE)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_place_touches_the_entries_named_and_nothing_else(impl, dtype):
    given = tokens(2, 4, 3, dtype=torch.bfloat16)
    memory = torch.full((8, 4, 10, 7), float("nan"), dtype=dtype, device=DEVICE)
    pool = memory[1:7, :, 1:9, 2:6]
    pool.copy_(pool_of(6, dtype=dtype))
    before = memory.clone()
    rows = torch.tensor([5, -1, 0, 3], device=DEVICE)
    expected = gated_delta_rule_step(pool, **given, state_indices=rows, impl=impl, output_snapshots=True)
    assert torch.equal(memory.view(torch.uint8), before.view(torch.uint8)), "not in place, and written"
    given = {n: x.index_fill(0, torch.tensor([1], device=DEVICE), float("nan")) for n, x in given.items()}
    got = gated_delta_rule_step(
        pool, **given, state_indices=rows, impl=impl, output_snapshots=True, inplace=True
    )
    assert got.state is pool
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert not got.o[1].any() and not got.snapshots[1].any()
    assert torch.equal(got.snapshots[[0, 2, 3], -1], pool[[5, 0, 3]])
    before[1:7, :, 1:9, 2:6][[5, 0, 3]] = pool[[5, 0, 3]]
    assert torch.equal(memory.view(torch.uint8), before.view(torch.uint8)), "written beside the entries"


@PATHS
def test_drafts_that_are_refused_leave_no_trace(impl):
    given, pool, rows = tokens(3, 2, 4), pool_of(4), torch.tensor([3, 1], device=DEVICE)
    accepted, expected = torch.tensor([3, 1], device=DEVICE), pool.clone()
    for b, n in enumerate(accepted.tolist()):
        row = cut(given, slice(b, b + 1), slice(0, n))
        gated_delta_rule_step(expected, **row, state_indices=rows[b : b + 1], inplace=True, impl=impl)
    options = {"state_indices": rows, "inplace": True, "output_snapshots": True, "impl": impl}
    snapshots = gated_delta_rule_step(pool, **given, **options).snapshots
    pool[rows] = snapshots[torch.arange(2, device=DEVICE), accepted - 1]
    torch.testing.assert_close(pool, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_16_bit_states_are_rounded_once_when_stored(impl):
    given, state = tokens(4, 2, 5, dtype=torch.bfloat16), pool_of(2, dtype=torch.bfloat16)
    exact = gated_delta_rule_step(state.float(), **given, impl=impl)
    got = gated_delta_rule_step(state, **given, impl=impl)
    assert got.state.dtype == torch.bfloat16 and torch.equal(got.o, exact.o)
    assert torch.equal(got.state, exact.state.bfloat16())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_inputs_cut_from_one_projection_need_no_copy(impl):
    given, state = tokens(5, 2, 3, groups=1), pool_of(2, HV=2)
    packed = torch.cat([given["q"], given["k"], given["v"]], -1)
    q, k, v = packed.split([8, 8, 4], -1)
    gates = torch.stack([given["g"], given["beta"]], -1)
    expected = gated_delta_rule_step(state, **given, impl=impl)
    got = gated_delta_rule_step(state, q, k, v, gates[..., 0], gates[..., 1], impl=impl)
    assert torch.equal(got.o, expected.o) and torch.equal(got.state, expected.state)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_all_rows_may_be_padding(impl):
    given, pool = tokens(6, 2, 2), pool_of(3)
    rows = torch.full((2,), -1, device=DEVICE)
    got = gated_delta_rule_step(pool, **given, state_indices=rows, impl=impl)
    assert torch.equal(got.state, pool) and not got.o.any()


def test_gradients_reach_the_states_named_and_not_padding():
    given, pool = tokens(7, 3, 2), pool_of(4)
    given["q"][1] = float("nan")
    leaves = [pool.requires_grad_(), *(x.requires_grad_() for x in given.values())]
    rows = torch.tensor([2, -1, 0], device=DEVICE)
    o, state, _ = gated_delta_rule_step(pool, **given, state_indices=rows)
    grads = torch.autograd.grad(o.square().sum() + state.sum(), leaves)
    assert all(torch.isfinite(x).all() for x in grads)
    assert (grads[0][[1, 3]] == 1).all() and not any(x[1].any() for x in grads[1:])


def test_in_place_works_without_gradients_and_compiles_whole():
    given, pool = tokens(8, 2, 2), pool_of(3)
    rows = torch.tensor([2, 0], device=DEVICE)
    expected = gated_delta_rule_step(pool, **given, state_indices=rows)
    given = {n: x.requires_grad_() for n, x in given.items()}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(pool):
        return gated_delta_rule_step(pool, **given, state_indices=rows, inplace=True).o

    with torch.no_grad():
        o = call(pool)
    assert torch.equal(o, expected.o) and torch.equal(pool, expected.state)


WAITS = {"item", "tolist", "cpu", "nonzero", "numpy", "unique", "any", "all", "max", "synchronize"}


def test_nothing_on_the_way_to_the_kernel_waits_for_the_device():
    sources = (
        launch_decode.step,
        decode_op.advance,
        decode_op.step._init_fn,
        decode_op.step_inplace._init_fn,
    )
    for function in sources:
        tree = ast.parse(inspect.getsource(function))
        called = {n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and hasattr(n.func, "attr")}
        assert not called & WAITS, function


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_contents():
    given, pool = tokens(9, 4, 2, dtype=torch.bfloat16), pool_of(8, dtype=torch.float32)
    rows = torch.tensor([0, 1, 2, 3], device=DEVICE, dtype=torch.int32)
    options = {"state_indices": rows, "inplace": True, "use_qk_l2norm_in_kernel": True}
    gated_delta_rule_step(pool.clone(), **given, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gated_delta_rule_step(pool, **given, **options).o
    pool.copy_(pool_of(8, dtype=torch.float32))
    rows.copy_(torch.tensor([7, -1, 4, 1]))
    expected = gated_delta_rule_step(pool.clone(), **given, **options)
    graph.replay()
    assert torch.equal(o, expected.o) and torch.equal(pool, expected.state)


@pytest.mark.gpu
def test_pools_beyond_32_bits():
    D, HV, S = 128, 16, 2**13 + 2
    pool = torch.zeros(S, HV, D, D, dtype=torch.bfloat16, device=DEVICE)
    given = tokens(11, 2, 2, H=HV, K=D, V=D, groups=1, dtype=torch.bfloat16)
    rows = torch.tensor([S - 1, 0], device=DEVICE)
    expected = gated_delta_rule_step(
        pool[:2].clone(), **given, state_indices=torch.tensor([1, 0], device=DEVICE)
    )
    got = gated_delta_rule_step(pool, **given, state_indices=rows, inplace=True)
    assert torch.equal(got.o, expected.o) and torch.equal(pool[[S - 1, 0]], expected.state[[1, 0]])


@pytest.mark.parametrize("K, V", [(16, 16), (32, 40), (64, 64), (128, 128), (192, 256)])
def test_heads_of_every_width(K, V):
    dtype = torch.float32
    given, state = tokens(10, 1, 2, H=1, K=K, V=V, groups=1, dtype=dtype), pool_of(1, 1, K, V, dtype)
    got, expected = (gated_delta_rule_step(state, **given, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(got.o, expected.o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.state, expected.state, rtol=1e-5, atol=1e-5)
