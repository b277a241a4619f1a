"""What is particular to the chunked kernels: rows of chunks, groups, wide heads, small cards, many heads."""

import inspect
import json

import pytest
import torch

from benchmarks import budgets
from prism_kernels import chunk_gated_delta_rule
from prism_kernels._core import configs
from prism_kernels._core.runtime import record_launches
from prism_kernels.gated_delta_rule import launch, op
from prism_kernels.testing.budgets import cotangents
from prism_kernels.testing.catalogue.gated_delta_rule import CHUNK, draw_case, run
from prism_kernels.testing.inputs import Draw

KERNELS = configs.shipped()[CHUNK].search
CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE, TOLERANCE = (torch.float32, 1e-4) if torch.cuda.is_available() else (torch.float64, 1e-11)
EVERYTHING = {"use_qk_l2norm_in_kernel": True, "chunk_size": 16}


def results(case, impl):
    """Outputs and gradients."""
    leaves = {n: t.requires_grad_() for n, t in case.tensors.items() if t.is_floating_point()}
    outputs = run(CHUNK, case.with_tensors(**leaves), impl)
    weights = [w.to(DEVICE) for w in cotangents(outputs).values()]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return outputs | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def assert_close(got, expected):
    for name, x in expected.items():
        assert (got[name] - x).abs().max() <= TOLERANCE * max(1.0, x.abs().max().item()), name


def packed(bounds, T, dtype=WIDE, **options):
    draw = Draw(3, dtype)
    case = draw_case(
        draw, "packed", (1, T, 2, 8, 4), groups=2, sequences=len(bounds) - 1, **EVERYTHING | options
    )
    return case.with_tensors(cu_seqlens=torch.tensor(bounds)).to(DEVICE)


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 40],
        [0, 16, 32, 40],
        [0, 1, 2, 3, 4, 40],
        [0, 0, 0, 17, 17, 33],
        [0, 15, 31, 31],
        [0, 0],
    ],
    ids=str,
)
def test_packed_sequences_of_any_lengths(bounds):
    case = packed(bounds, 40)
    assert_close(results(case, "triton"), results(case, "torch"))


def test_rows_of_chunks_never_overlap():
    generator = torch.Generator().manual_seed(0)
    for C in (16, 32, 64):
        for _ in range(200):
            lengths = torch.randint(0, 150, (9,), generator=generator)
            lengths *= torch.randint(0, 2, (9,), generator=generator)
            bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            first = bounds[:-1] // C + torch.arange(9)
            end = first + (lengths + C - 1) // C
            assert (end[:-1] <= first[1:]).all()
            assert end[-1] <= launch.rows_of_chunks(1, int(bounds[-1]) + 5, C, bounds)


def test_what_nobody_wrote_is_never_read():
    case = packed([0, 3, 3, 20], 40, torch.float32)
    expected = results(case, "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        got = results(case, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(got[n], x) for n, x in expected.items())


def test_bounds_of_either_width_give_the_same_bits():
    case = packed([0, 5, 5, 33, 37], 40, torch.float32)
    narrow = case.with_tensors(cu_seqlens=case.tensors["cu_seqlens"].int())
    got, expected = results(narrow, "triton"), results(case, "triton")
    assert all(torch.equal(got[n], x) for n, x in expected.items())


@pytest.mark.parametrize("groups", [2, 3])
def test_a_group_sums_what_repeated_heads_would_get(groups):
    case = draw_case(Draw(4, WIDE), "groups", (1, 20, 2, 8, 4), groups=groups, **EVERYTHING).to(DEVICE)
    repeated = {n: case.tensors[n].repeat_interleave(groups, 2) for n in ("q", "k")}
    expected = results(case.with_tensors(**repeated), "triton")
    got = results(case, "triton")
    for name in ("dq", "dk"):
        expected[name] = expected[name].unflatten(2, (2, groups)).sum(3)
    assert_close(got, expected)


@pytest.mark.parametrize("K, V", [(256, 40), (40, 200), (130, 130)])
def test_wide_heads(K, V):
    case = draw_case(Draw(5, WIDE), "wide", (1, 18, 1, K, V), **EVERYTHING).to(DEVICE)
    assert_close(results(case, "triton"), results(case, "torch"))


def recorded(K, V, dtype=torch.bfloat16, B=1):
    """Launches of a forward and backward, by kernel."""
    q, k, v = (torch.zeros(B, 70, 2, n, dtype=dtype, requires_grad=True) for n in (K, K, V))
    with record_launches() as launches:
        o = chunk_gated_delta_rule(q, k, v, impl="triton").o
        torch.autograd.grad(o, q, torch.zeros_like(o))
    return {launch.kernel.__name__: launch for launch in launches}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_heads_fit_every_architecture_with_rows_of_its_own(architecture, dtype):
    with configs.pretend(architecture):
        for width in configs.WIDTHS:
            recorded(width, width, dtype)


def test_cards_that_are_too_small_are_told_what_fits():
    match = "expected 109 KiB .* got 64 KiB on sm_90. K and V up to 32 fit"
    with configs.pretend("sm_90", 64 * 1024), pytest.raises(NotImplementedError, match=match):
        recorded(128, 128)


def test_nothing_is_launched_on_a_card_that_is_too_small():
    with configs.pretend("sm_90", 4 * 1024), record_launches() as launches:
        with pytest.raises(NotImplementedError, match="K and V up to 0 fit"):
            recorded(256, 64)
        assert not launches


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["sm_80", "sm_120"])
def test_rows_of_small_cards_are_right_on_a_large_one(architecture):
    case = draw_case(Draw(6, torch.bfloat16), "small card", (1, 70, 2, 128, 128), chunk_size=64).to(DEVICE)
    expected = results(case, "triton")
    with configs.pretend(architecture):
        got = results(case, "triton")
    for name, x in expected.items():
        assert (got[name] - x).abs().max() <= 2e-2 * x.abs().max(), name


def test_what_rows_say_of_shared_memory_holds_in_the_committed_report():
    found = 0
    for r in json.loads(budgets.REPORT.read_text())["kernels"]:
        if r["kernel"] not in KERNELS or not r["smem"]:
            continue
        width = int(r["case"].split("K=V=")[1].split()[0])
        dtype = torch.bfloat16 if "bf16" in r["case"] else torch.float32
        with configs.pretend(r["target"]):
            row = configs.config(launch.OP, r["kernel"], dtype, width, CPU)
        if (row.warps, row.stages) == (r["warps"], r["stages"]):
            found += 1
            assert r["smem"] <= row.shared * 1024, r
    assert found


def test_any_number_of_heads_and_rows_fits_the_grid():
    launches = recorded(8, 8, B=70_000).values()
    assert all(len(launch.grid) == 1 for launch in launches)
    assert max(launch.grid[0] for launch in launches) > 65_535


def test_nothing_on_the_way_to_the_kernels_waits_for_the_device():
    for function in (launch.chunk_forward, launch.chunk_backward, op.chunk_residuals):
        source = inspect.getsource(function)
        assert not any(f".{name}(" in source for name in ("item", "tolist", "cpu", "nonzero", "any", "max"))
