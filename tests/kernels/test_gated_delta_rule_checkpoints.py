"""Checkpoints of the gated delta rule: where they lie, what continues from them, their gradients."""

import inspect

import pytest
import torch

from prism_kernels import chunk_gated_delta_rule, chunk_gated_delta_rule_with_checkpoints
from prism_kernels._core.runtime import record_launches
from prism_kernels.gated_delta_rule import checkpoints_op
from prism_kernels.testing import Case
from prism_kernels.testing.budgets import cotangents, forward_backward
from prism_kernels.testing.catalogue.gated_delta_rule import TIME_INPUTS
from prism_kernels.testing.catalogue.gated_delta_rule_checkpoints import ALL, case_of_chunks, draw_case, run
from prism_kernels.testing.inputs import Draw

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
UNIT = {"use_qk_l2norm_in_kernel": True}
WIDE, TOLERANCE = (torch.float32, 1e-4) if GPU else (torch.float64, 1e-11)
PATHS = ("torch", "triton")
paths = pytest.mark.parametrize("impl", PATHS)
every_path = pytest.mark.parametrize("impl", (*PATHS, "reference"))
segments = pytest.mark.parametrize("chunks", [1, 2], ids=lambda n: f"{n} chunks a segment")


def drawn(sizes, dtype=WIDE, seed=0, **options) -> Case:
    return draw_case(Draw(seed, dtype), "drawn", sizes, **options).to(DEVICE)


def packed(bounds, T, dtype=WIDE, **options) -> Case:
    case = drawn((1, T, 1, 8, 4), dtype, groups=2, sequences=len(bounds) - 1, **options)
    return case.with_tensors(cu_seqlens=torch.tensor(bounds, device=DEVICE))


def call(case: Case, impl: str | None):
    return chunk_gated_delta_rule_with_checkpoints(**case.tensors, **case.options, impl=impl)


def part(case: Case, start: int, end: int | None, **tensors) -> Case:
    """Tokens from `start` to `end`."""
    cut = {n: case.tensors[n][:, start:end] for n in TIME_INPUTS if n in case.tensors}
    return case.with_tensors(**cut, **tensors)


def assert_close(got: dict, expected: dict) -> None:
    for name, x in expected.items():
        assert got[name].shape == x.shape
        if x.numel():
            error = (got[name] - x).abs().max()
            assert error <= TOLERANCE * max(1.0, x.abs().max().item()), f"{name}: {error:.1e}"


def assert_paths_agree(case: Case, impl: str) -> None:
    for got, expected in zip(
        *(forward_backward(lambda c, p=p: run(c, p), case) for p in (impl, "reference")), strict=True
    ):
        assert_close(got, expected)


@every_path
@pytest.mark.parametrize("every", [16, 48, 64, 80])
def test_a_checkpoint_is_the_final_state_of_the_tokens_before_it(every, impl):
    case = drawn((2, 70, 1, 8, 4), every=every, state_v_first=True)
    got = call(case, impl)
    assert got.checkpoints.shape == (2, 70 // every, 1, 4, 8) and got.first_checkpoints is None
    for j in range(70 // every):
        final = call(part(case, 0, (j + 1) * every), impl).final_state
        assert_close({"state": got.checkpoints[:, j]}, {"state": final})


@pytest.mark.parametrize("every", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_intervals_for_serving_fit_heads_of_any_width(width, every):
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(1, 2 * every, 1, width, dtype=dtype)
        with record_launches() as launches:
            chunk_gated_delta_rule_with_checkpoints(x, x, x, every=every, impl="triton")
        scan = next(x.constexprs for x in launches if x.kernel.__name__ == "scan_kernel")
        assert scan["EVERY"] == every and every % scan["C"] == 0
    got = call(drawn((1, 130, 1, width, width), torch.float32, every=64), "torch")
    assert got.checkpoints.shape[1] == 2


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_from_a_checkpoint_continues_to_the_bit(impl, dtype):
    case = drawn((2, 53, 1, 8, 8), dtype, **UNIT)
    whole = call(case, impl)
    for j in range(3):
        start = 16 * (j + 1)
        rest = call(part(case, start, None, initial_state=whole.checkpoints[:, j]), impl)
        assert torch.equal(rest.o, whole.o[:, start:])
        assert torch.equal(rest.final_state, whole.final_state)
        assert torch.equal(rest.checkpoints, whole.checkpoints[:, j + 1 :])


@paths
def test_gradients_of_two_runs_are_those_of_one(impl):
    case = drawn((1, 45, 2, 8, 4))

    def in_two(c: Case) -> dict:
        first = run(part(c, 0, 40), impl)
        second = run(part(c, 32, None, initial_state=first["checkpoints"][:, 1]), impl)
        return {"o": torch.cat([first["o"][:, :32], second["o"]], 1), "final_state": second["final_state"]}

    def in_one(c: Case) -> dict:
        return {n: y for n, y in run(c, impl).items() if n != "checkpoints"}

    for got, expected in zip(*(forward_backward(f, case) for f in (in_two, in_one)), strict=True):
        assert_close(got, expected)


@paths
def test_outputs_are_those_without_checkpoints_to_the_bit(impl):
    for dtype in (torch.float32, torch.bfloat16):
        case = drawn((1, 37, 2, 8, 4), dtype)
        got, (o, final) = (
            call(case, impl),
            chunk_gated_delta_rule(
                **case.tensors, **case_of_chunks(case).options, output_final_state=True, impl=impl
            ),
        )
        assert torch.equal(got.o, o) and torch.equal(got.final_state, final)


@every_path
def test_they_may_be_rounded(impl):
    case = drawn((1, 37, 1, 8, 4), torch.float32)
    whole = call(case, impl).checkpoints
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        case.options["checkpoint_dtype"] = dtype
        outputs, gradients = forward_backward(lambda c: run(c, impl), case)
        assert torch.equal(outputs["checkpoints"], whole.to(dtype))
        assert all(x.dtype == case.tensors[n[1:]].dtype for n, x in gradients.items())


@paths
@pytest.mark.parametrize(
    "bounds", [(0, 50), (0, 0, 3, 35, 35, 51), (0, 16, 32, 33, 49), (0, 15, 30, 45), (0, 0, 0)], ids=str
)
@pytest.mark.parametrize("every", [16, 32])
def test_packed_sequences(bounds, every, impl):
    case = packed(bounds, 53, every=every, state_v_first=True)
    got, starts, lengths = call(case, impl), torch.tensor(bounds[:-1]), torch.tensor(bounds).diff()
    assert torch.equal(got.first_checkpoints.cpu(), starts // every)
    unused = torch.ones(53 // every, dtype=torch.bool)
    for s, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        first, n = start // every, length // every
        assert unused[first : first + n].all()  # of no other sequence
        unused[first : first + n] = False
        if length:
            tensors = {n: x for n, x in case.tensors.items() if n != "cu_seqlens"}
            state = case.tensors["initial_state"][s : s + 1]
            alone = part(Case("alone", tensors, case.options), start, start + length, initial_state=state)
            assert_close(
                {"checkpoints": got.checkpoints[:, first : first + n]},
                {"checkpoints": call(alone, impl).checkpoints},
            )
    assert not got.checkpoints[:, unused].any()
    if bounds[-1]:
        assert_paths_agree(case, impl)


@segments
@pytest.mark.parametrize("every", [16, 48])
@pytest.mark.parametrize("bounds", [None, (0, 0, 33, 65, 70)], ids=["dense", "packed"])
def test_segments_have_them_inside_and_at_their_ends(bounds, every, chunks, monkeypatch):
    launch = pytest.importorskip("prism_kernels.gated_delta_rule.launch", reason="Triton is not installed")
    monkeypatch.setattr(launch, "segment_length", lambda programs, tokens, C: chunks * C)
    case = packed(bounds, 72, every=every) if bounds else drawn((1, 70, 1, 8, 4), every=every)
    assert_paths_agree(case, "triton")


@paths
@pytest.mark.parametrize("pick", ["o", "final_state", "checkpoints"])
def test_any_of_the_results_may_be_used_alone(pick, impl):
    case = drawn((1, 37, 1, 8, 4))
    got, expected = (
        forward_backward(lambda c, p=p: {pick: run(c, p)[pick]}, case)[1] for p in (impl, "reference")
    )
    assert_close(got, expected)


@paths
def test_checkpoints_do_not_see_the_future_to_the_bit(impl):
    case = drawn((1, 50, 2, 8, 8), torch.bfloat16)
    before = call(case, impl)
    for cut in (17, 32, 47):
        changed = {n: case.tensors[n].clone() for n in TIME_INPUTS}
        for x in changed.values():
            x[:, cut:] = x[:, cut:].flip(1) * 4
        after = call(case.with_tensors(**changed), impl)
        n = cut // 16
        assert torch.equal(after.o[:, :cut], before.o[:, :cut])
        assert torch.equal(after.checkpoints[:, :n], before.checkpoints[:, :n])
        assert not torch.equal(after.checkpoints[:, n:], before.checkpoints[:, n:])


@paths
def test_nan_stays_in_padding_and_in_gradients_of_rows_that_nobody_uses(impl):
    case = packed((0, 18, 18, 50), 69, torch.float32)  # rows 0; 1, 2; the last of four is padding's
    clean, expected = forward_backward(lambda c: run(c, impl), case)
    dirty = {n: case.tensors[n].clone() for n in TIME_INPUTS}
    for x in dirty.values():
        x[:, 50:] = float("nan")
    weights = cotangents(clean)
    weights["checkpoints"][:, 3] = float("nan")
    weights["o"][:, 50:] = float("nan")
    got, gradients = forward_backward(lambda c: run(c, impl), case.with_tensors(**dirty), weights)
    for a, b in ((got, clean), (gradients, expected)):
        assert all(torch.equal(a[n], x) for n, x in b.items())


def test_nothing_on_the_way_waits_for_the_device():
    for function in (chunk_gated_delta_rule_with_checkpoints, checkpoints_op.forward._init_fn):
        source = inspect.getsource(function)
        assert not any(f".{name}(" in source for name in ("item", "tolist", "cpu", "nonzero", "any", "max"))


def test_lengths_stay_symbols_when_compiled():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(q, bounds):
        got = chunk_gated_delta_rule_with_checkpoints(q, q, q, every=16, cu_seqlens=bounds, **UNIT)
        return got.checkpoints, got.first_checkpoints

    for i, T in enumerate((40, 50, 70)):
        q, bounds = torch.randn(1, T, 1, 8), torch.tensor([0, 20, T])
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            checkpoints, first = compiled(q, bounds)
        expected = chunk_gated_delta_rule_with_checkpoints(q, q, q, every=16, cu_seqlens=bounds, **UNIT)
        assert torch.equal(checkpoints, expected.checkpoints)
        assert torch.equal(first, expected.first_checkpoints)


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_bounds():
    case = packed((0, 0, 3, 68, 68, 85), 90, torch.bfloat16, **ALL)
    leaves = [t.requires_grad_() for n, t in case.tensors.items() if n != "cu_seqlens"]
    weights = [w.to(DEVICE) for w in cotangents(run(case, "triton")).values()]

    def both():
        outputs = list(run(case, "triton").values())
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    case.tensors["cu_seqlens"].copy_(torch.tensor([0, 1, 1, 30, 62, 89]))
    expected = [x.clone() for x in both()]
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
