"""The two-level scan of the chunked kernels: sequences in segments, where these and heads are few."""

import pytest
import torch

from prism_kernels import chunk_gated_delta_rule
from prism_kernels._core.runtime import record_launches
from prism_kernels.gated_delta_rule.reference import gated_delta_rule_reference
from prism_kernels.testing import Case, registry
from prism_kernels.testing.budgets import budget_rows, cotangents, forward_backward
from prism_kernels.testing.catalogue.gated_delta_rule import CHUNK, draw_case, run
from prism_kernels.testing.inputs import Draw

launch = pytest.importorskip("prism_kernels.gated_delta_rule.launch", reason="Triton is not installed")

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="float64 kernels are for the interpreter")
SPEC = next(spec for spec in registry() if spec.name == CHUNK)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP64, BF16 = torch.float64, torch.bfloat16


@pytest.fixture(params=[1, 2], ids=["one chunk", "two chunks"])
def segmented(request, monkeypatch) -> int:
    """Segments of one or two chunks of 16, whatever the shape."""
    monkeypatch.setattr(launch, "segment_length", lambda programs, tokens, C: request.param * C)
    return 16 * request.param


def drawn(name: str, sizes: tuple, seed: int = 0, dtype: torch.dtype = FP64, **options) -> Case:
    return draw_case(Draw(seed, dtype), name, sizes, **options)


def both(case: Case, impl: str) -> tuple[dict, dict]:
    """Outputs and gradients."""
    return forward_backward(lambda c: run(CHUNK, c, impl), case)


def assert_equals_reference(case: Case, tolerance: float = 1e-11) -> None:
    """Relative to the largest entry of each output and gradient."""
    for got, expected in zip(both(case, "triton"), both(case, "reference"), strict=True):
        for name, y in expected.items():
            error = (got[name] - y).abs().max()
            assert error <= tolerance * y.abs().max(), f"{name}: {error:.1e}"  # NaN fails


@CPU_ONLY
@pytest.mark.parametrize("missing", [(), ("initial_state",)])
@pytest.mark.parametrize("T", [16, 37, 65])
def test_equals_the_definition(segmented, T, missing):
    assert_equals_reference(drawn("dense", (2, T, 1, 8, 5), groups=2, leave_out=missing))


@pytest.mark.parametrize("segmented", [1], indirect=True)
@CPU_ONLY
@pytest.mark.parametrize("K, V", [(40, 8), (8, 40)])
def test_blocks_of_keys_and_values(segmented, K, V):
    assert_equals_reference(drawn("wide", (1, 35, 1, K, V), use_qk_l2norm_in_kernel=True))


@pytest.mark.parametrize("segmented", [1], indirect=True)
@CPU_ONLY
def test_outputs_alone_and_the_final_state_alone(segmented):
    q, k, v, g, beta = list(drawn("dense", (1, 50, 1, 8, 4), leave_out=("initial_state",)).tensors.values())

    def gradients(pick, impl):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, g, beta)]
        if impl == "triton":
            outputs = chunk_gated_delta_rule(*leaves, output_final_state=True, chunk_size=16, impl=impl)
        else:
            outputs = gated_delta_rule_reference(*leaves, 8**-0.5)
        return torch.autograd.grad(outputs[pick].square().sum(), leaves, materialize_grads=True)

    for pick in (0, 1):
        for got, expected in zip(gradients(pick, "triton"), gradients(pick, "reference"), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def packed_case(dtype: torch.dtype, bounds: tuple[int, ...], T: int = 90, **options) -> Case:
    case = drawn("packed", (1, T, 1, 8, 4), dtype=dtype, groups=2, sequences=len(bounds) - 1, **options)
    return case.with_tensors(cu_seqlens=torch.tensor(bounds))


@CPU_ONLY
@pytest.mark.parametrize("bounds", [(0, 50), (0, 0, 3, 40, 40, 50), (0, 32, 48, 49)])
@pytest.mark.parametrize("missing", [(), ("initial_state",)])
def test_packed_sequences(segmented, bounds, missing):
    assert_equals_reference(packed_case(FP64, bounds, T=53, leave_out=missing))


@CPU_ONLY
def test_sequences_may_all_be_empty(segmented):
    case = packed_case(FP64, (0, 0, 0), T=3)
    outputs, gradients = both(case, "triton")
    assert torch.equal(outputs["final_state"], case.tensors["initial_state"]) and not outputs["o"].any()
    assert torch.equal(gradients.pop("dinitial_state"), cotangents(outputs)["final_state"])
    assert not any(x.any() for x in gradients.values())


@CPU_ONLY
@pytest.mark.parametrize("decay", [-2.0, -40.0])
def test_decays_that_leave_next_to_nothing_of_a_state_and_nothing(segmented, decay):
    # 2^-46 a chunk, and 2^-923: columns of M are computed in segments of one, and skipped in those of two
    case = drawn("faded", (1, 50, 1, 8, 4))
    case = case.with_tensors(g=torch.full_like(case.tensors["g"], decay))
    (got, got_gradients), (expected, gradients) = (both(case, impl) for impl in ("triton", "reference"))
    for name, y in (*expected.items(), *gradients.items()):
        result = (got | got_gradients)[name]
        assert (result - y).abs().max() <= 1e-11, name
    state = "dinitial_state"  # 1e-43 of the final one's, and right to as many digits
    error = (got_gradients[state] - gradients[state]).abs().max()
    assert error <= 1e-9 * gradients[state].abs().max()


@CPU_ONLY
def test_identical_keys_with_strengths_up_to_two(segmented):
    case = drawn("same", (1, 70, 1, 8, 4), strength=(0.0, 2.0), leave_out=("g",))
    k = case.tensors["k"]
    assert_equals_reference(case.with_tensors(k=k[:, :1].expand_as(k).clone()), 1e-10)


def hostile_case(name: str, dtype: torch.dtype) -> Case:
    case = drawn(name, (1, 98, 1, 16, 16), dtype=dtype, strength=(0.0, 2.0), decay=-0.1)
    k, g = case.tensors["k"], case.tensors["g"]
    if name == "identical keys":
        return case.with_tensors(k=k[:, :1].expand_as(k).clone())
    some = (torch.arange(98) % 23 == 5).view(1, -1, 1)
    return case.with_tensors(g=torch.where(some, -30.0, torch.zeros_like(g)))


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("identical keys", BF16),
        ("identical keys", torch.float16),  # in float32, with or without segments: see "Numerics"
        ("a decay of -30 now and then", BF16),
        ("a decay of -30 now and then", torch.float32),
    ],
)
def test_error_stays_within_budget(segmented, name, dtype):
    bad = [row for row in budget_rows(SPEC, hostile_case(name, dtype).to(DEVICE), "triton") if not row.ok]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.parametrize("cut", [17, 32, 47])
def test_outputs_do_not_see_the_future_to_the_bit(segmented, cut):
    case = drawn("causal", (1, 50, 1, 8, 8), dtype=BF16).to(DEVICE)
    changed = {n: x.clone() for n, x in case.tensors.items() if n != "initial_state"}
    for x in changed.values():
        x[:, cut:] = x[:, cut:].flip(1) * 40
    before = run(CHUNK, case, "triton")
    after = run(CHUNK, case.with_tensors(**changed), "triton")
    assert torch.equal(after["o"][:, :cut], before["o"][:, :cut])
    assert not torch.equal(after["o"][:, cut:], before["o"][:, cut:])


@pytest.mark.parametrize("segmented", [1], indirect=True)
def test_bits_repeat(segmented):
    case = drawn("again", (1, 50, 1, 8, 8), dtype=BF16).to(DEVICE)
    for got, expected in zip(both(case, "triton"), both(case, "triton"), strict=True):
        assert all(torch.equal(got[n], y) for n, y in expected.items())


@pytest.mark.parametrize("segmented", [1], indirect=True)
def test_nan_stays_in_its_sequence_and_head_and_out_of_padding(segmented):
    bounds = (0, 34, 52)
    case = packed_case(torch.float32, bounds, T=55).to(DEVICE)
    clean, clean_gradients = both(case, "triton")
    tensors = {n: x.clone() for n, x in case.tensors.items()}
    for name in ("q", "k", "v", "g", "beta"):
        tensors[name][:, 52:] = float("nan")
    outputs, gradients = both(case.with_tensors(**tensors), "triton")
    for got, expected in ((outputs, clean), (gradients, clean_gradients)):
        assert all(torch.equal(got[n], y) for n, y in expected.items())
    tensors["v"][0, 20, 1] = float("nan")
    outputs, gradients = both(case.with_tensors(**tensors), "triton")
    assert outputs["final_state"][0, 1].isnan().all()
    assert torch.equal(outputs["o"][0, :, 0], clean["o"][0, :, 0])
    assert torch.equal(outputs["o"][0, 34:], clean["o"][0, 34:])
    assert torch.equal(outputs["final_state"][1], clean["final_state"][1])
    assert torch.equal(gradients["dinitial_state"][1], clean_gradients["dinitial_state"][1])
    assert torch.equal(gradients["dk"][0, 34:], clean_gradients["dk"][0, 34:])


def test_rows_of_segments_never_overlap():
    generator = torch.Generator().manual_seed(0)
    for L in (16, 48, 512):
        for _ in range(100):
            lengths = torch.randint(0, 3 * L, (7,), generator=generator)
            lengths *= torch.randint(0, 2, (7,), generator=generator)
            starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            first = starts[:-1] // L + torch.arange(7)
            end = first + ((lengths + L - 1) // L).clamp_min(1)
            assert (end[:-1] <= first[1:]).all()
            assert end[-1] <= launch.rows_of_chunks(1, int(starts[-1]) + 3, L, starts)


@pytest.mark.parametrize(
    "programs, tokens, C, chunks",
    [
        (1, 32768, 64, 22),  # root of the number of chunks
        (8, 32768, 64, 32),
        (32, 32768, 64, 128),  # four segments
        (33, 32768, 64, 0),
        (1, 2048, 64, 8),  # short: four segments of the fewest chunks
        (1, 1984, 64, 0),
        (0, 0, 64, 0),
    ],
)
def test_the_rule(programs, tokens, C, chunks):
    assert launch.segment_length(programs, tokens, C) == chunks * C


def kernels(B: int, T: int, HV: int, bounds: torch.Tensor | None = None) -> list[tuple[str, int]]:
    """Kernels that a call launches, forward and backward, and their programs."""
    q = torch.zeros(B, T, HV, 128, dtype=BF16, requires_grad=True)
    g = torch.zeros(B, T, HV)
    with record_launches() as launches:
        o, _ = chunk_gated_delta_rule(q, q, q, g, beta=g, cu_seqlens=bounds, impl="triton")
        torch.autograd.backward(o, torch.zeros_like(o))
    return [(x.kernel.__name__, x.grid[0]) for x in launches]


def test_few_heads_are_cut_and_many_are_not():
    few, many = kernels(1, 4096, 2), kernels(8, 512, 32)
    two_level = ["prepare_kernel", "segments_kernel", "carry_kernel", "scan_kernel"]
    two_level += ["segments_kernel", "carry_kernel", "states_kernel", "inputs_kernel"]
    assert [name for name, _ in few] == two_level
    assert [name for name, _ in many] == [two_level[i] for i in (0, 3, 6, 7)]
    programs = dict(few)  # eight segments, four blocks of values, and of keys, two heads
    assert programs["scan_kernel"] == 64 and programs["states_kernel"] == 128


def test_the_choice_does_not_depend_on_what_is_in_the_bounds():
    calls = [kernels(1, 4096, 1, torch.tensor([0, middle, 4096])) for middle in (0, 7, 2048)]
    assert calls[0] == calls[1] == calls[2]
    assert "carry_kernel" in dict(calls[0])


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_bounds(segmented):
    case = packed_case(BF16, (0, 0, 3, 68, 68, 85)).to(DEVICE)
    leaves = [t.requires_grad_() for n, t in case.tensors.items() if n != "cu_seqlens"]
    weights = [w.to(DEVICE) for w in cotangents(run(CHUNK, case, "triton")).values()]

    def call():
        outputs = list(run(CHUNK, case, "triton").values())
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    case.tensors["cu_seqlens"].copy_(torch.tensor([0, 1, 1, 30, 31, 89]))
    expected = [x.clone() for x in call()]
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
