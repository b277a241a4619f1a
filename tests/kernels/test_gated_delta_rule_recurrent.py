"""What is particular to the kernels token by token: wide heads, many heads, room for states, CUDA graphs."""

import pytest
import torch

from prism_kernels import fused_recurrent_gated_delta_rule
from prism_kernels._core.runtime import record_launches
from prism_kernels.gated_delta_rule import launch_recurrent
from prism_kernels.testing.budgets import cotangents, forward_backward
from prism_kernels.testing.catalogue.gated_delta_rule import CHUNK, RECURRENT, draw_case, run
from prism_kernels.testing.inputs import Draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE, TOLERANCE = (torch.float32, 1e-4) if torch.cuda.is_available() else (torch.float64, 1e-11)
BOUNDS = [0, 0, 17, 17, 35, 36]


def packed_case(T=40, **options):
    case = draw_case(
        Draw(0, WIDE), "packed", (1, T, 1, 8, 20), groups=2, sequences=len(BOUNDS) - 1, **options
    )
    return case.with_tensors(cu_seqlens=torch.tensor(BOUNDS)).to(DEVICE)


def assert_paths_agree(case, tolerance):
    both = [
        forward_backward(lambda c, impl=impl: run(RECURRENT, c, impl), case) for impl in ("triton", "torch")
    ]
    for got, expected in zip(*both, strict=True):
        for name, y in expected.items():
            torch.testing.assert_close(
                got[name], y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("K, V", [(192, 16), (16, 256), (256, 24)])
def test_heads_wider_than_128(K, V):
    case = draw_case(Draw(1, torch.float32), "wide", (1, 3, 1, K, V), groups=2, use_qk_l2norm_in_kernel=True)
    assert_paths_agree(case.to(DEVICE), 1e-4)


def test_programs_take_turns_where_there_are_more_heads_than_programs(monkeypatch):
    monkeypatch.setattr(launch_recurrent, "PROGRAMS", 3)
    assert_paths_agree(packed_case(use_qk_l2norm_in_kernel=True), TOLERANCE)


def test_no_axis_of_a_grid_but_the_first_grows():
    x = torch.zeros(70_000, 1, 1, 2, requires_grad=True)
    gates = torch.zeros(70_000, 1, 1)
    with record_launches() as launches:
        o, _ = fused_recurrent_gated_delta_rule(x, x, x, gates, beta=gates, impl="triton")
        o.backward(o)
    assert {launch.kernel.__name__ for launch in launches} == {
        "recurrent_kernel", "recurrent_backward_kernel", "sum_kernel",
    }  # fmt: skip
    assert all(len(launch.grid) == 1 for launch in launches)
    assert max(launch.grid[0] for launch in launches) == 70_000


@pytest.mark.gpu
@pytest.mark.parametrize("name", [CHUNK, RECURRENT])
def test_a_cuda_graph_replays_with_new_bounds(name):
    case = packed_case()
    leaves = [t.requires_grad_() for n, t in case.tensors.items() if n != "cu_seqlens"]
    bounds = case.tensors["cu_seqlens"]

    weights = [w.to(DEVICE) for w in cotangents(run(name, case, "triton")).values()]

    def call():
        outputs = run(name, case, "triton")
        return [*outputs.values(), *torch.autograd.grad(list(outputs.values()), leaves, weights)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    bounds.copy_(torch.tensor([0, 1, 1, 30, 31, 39]))
    expected = [x.clone() for x in call()]
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
