"""What is particular to the convolution: packing, documents, and the causal-conv1d package's functions."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from prism_kernels import causal_conv1d, causal_conv1d_fn, causal_conv1d_update
from prism_kernels._core.runtime import record_launches
from prism_kernels.causal_conv1d import compatible
from prism_kernels.causal_conv1d.op import causal_conv1d_state_update
from prism_kernels.testing.inputs import Draw

pytestmark = pytest.mark.usefixtures("poisoned")
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="float64 kernels are for the interpreter")
PATHS = pytest.mark.parametrize("impl", ["torch", "triton"])
NAN = float("nan")


@pytest.fixture
def forced(monkeypatch):
    """Make the functions without an `impl` take a path."""

    def force(impl):
        monkeypatch.setattr(compatible, "choose_impl", lambda op, asked, device: impl)

    return force


def convolved(x, weight, bias, activation, past=None):
    """F.conv1d over one row r[1,D,T] after `past` r[1,D,W-1] (zeros by default)."""
    D, W = weight.shape
    past = x.new_zeros(1, D, W - 1) if past is None else past
    y = F.conv1d(torch.cat([past, x], -1), weight[:, None], bias, groups=D)
    return y if activation is None else F.silu(y)


def by_document(x, weight, bias, seq_idx, activation):
    """Every document of every row convolved alone; zeros where the index is negative."""
    rows = []
    for row, ids in zip(x, seq_idx.tolist(), strict=True):
        starts = [t for t in range(len(ids)) if t == 0 or ids[t] != ids[t - 1]]
        pieces = []
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            piece = row[None, :, start:end]
            alone = ids[start] >= 0
            pieces.append(convolved(piece, weight, bias, activation) if alone else torch.zeros_like(piece))
        rows.append(torch.cat(pieces, -1))
    return torch.cat(rows)


def gradients(outputs, leaves, seed=3):
    draw = Draw(seed, torch.float64)
    loss = sum((y * draw.normal(*y.shape)).sum() for y in outputs)
    return torch.autograd.grad(loss, leaves)


def assert_all_close(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


DOCUMENTS = [[0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3], [4] * 9 + [-1, -1], [-1, 5, 5, 6, -1, -1, 7, 7, 7, 7, 8]]


@CPU_ONLY
@PATHS
@pytest.mark.parametrize("W, activation", [(2, None), (3, "swish"), (4, "silu")])
def test_documents_equal_convolutions_of_each_alone(impl, W, activation, forced):
    forced(impl)
    draw, seq_idx = Draw(0, torch.float64), torch.tensor(DOCUMENTS, dtype=torch.int32)
    x = draw.normal(*seq_idx.shape, 5).mT
    leaves = [t.requires_grad_() for t in (x, draw.normal(5, W), draw.normal(5))]
    got = causal_conv1d_fn(*leaves, seq_idx=seq_idx, activation=activation)
    expected = by_document(*leaves, seq_idx, activation)
    assert_all_close([got, *gradients([got], leaves)], [expected, *gradients([expected], leaves)])


@CPU_ONLY
@PATHS
def test_nan_outside_documents_reaches_nothing(impl, forced):
    forced(impl)
    draw, seq_idx = Draw(1, torch.float64), torch.tensor(DOCUMENTS)
    x = draw.normal(*seq_idx.shape, 5).mT.masked_fill((seq_idx < 0)[:, None], NAN)
    leaves = [t.requires_grad_() for t in (x, draw.normal(5, 4), draw.normal(5))]
    got = causal_conv1d_fn(*leaves, seq_idx=seq_idx, activation="silu")
    for value in (got, *gradients([got], leaves)):
        assert torch.isfinite(value).all()


@PATHS
@pytest.mark.parametrize("case", ["documents", "packed"])
def test_a_row_alone_has_the_bits_of_the_row_among_others(impl, case):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    draw = Draw(2)
    lengths, W, D = [3, 0, 1, 33, 2], 4, 6
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    x, weight, bias = draw.normal(1, 43, D), draw.normal(D, W), draw.normal(D)
    tensors = {"x": x, "weight": weight, "bias": bias}
    if case == "packed":
        tensors["initial_state"] = draw.normal(len(lengths), D, W - 1)
        tensors["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
        x[:, sum(lengths) :] = NAN
    else:
        ids = [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * (43 - sum(lengths))
        tensors["seq_idx"] = torch.tensor([ids])

    def run(tensors):
        tensors = {n: t.to(device) for n, t in tensors.items()}
        leaves = {n: tensors[n].requires_grad_() for n in ("x", "initial_state") if n in tensors}
        y, final = causal_conv1d(**tensors, activation="silu", impl=impl, output_final_state=case == "packed")
        outputs = [y] if final is None else [y, final]
        weights = [torch.ones_like(y)] if final is None else [torch.ones_like(y), torch.ones_like(final)]
        return outputs, torch.autograd.grad(outputs, list(leaves.values()), weights)

    def same(got, expected):  # PyTorch's own sigmoid on a CPU depends on where a vector of 8 ends
        close = {"rtol": 0, "atol": 0} if impl == "triton" else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(got, expected, **close)

    outputs, grads = run(tensors)
    for s, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        if n == 0:
            continue
        own = {"x": x[:, start : start + n].clone(), "weight": weight, "bias": bias}
        if case == "packed":
            own["initial_state"] = tensors["initial_state"][s : s + 1].detach().clone()
        alone, own_grads = run(own)
        same(outputs[0][:, start : start + n], alone[0])
        same(grads[0][:, start : start + n], own_grads[0])
        for whole, part in zip((*outputs[1:], *grads[1:]), (*alone[1:], *own_grads[1:]), strict=True):
            same(whole[s : s + 1], part)


@CPU_ONLY
@PATHS
def test_nan_in_padding_reaches_nothing(impl):
    draw = Draw(4, torch.float64)
    x, bounds = draw.normal(1, 12, 3), torch.tensor([0, 1, 1, 7, 9])
    x[:, 9:] = NAN
    leaves = [t.requires_grad_() for t in (x, draw.normal(3, 4), draw.normal(3), draw.normal(4, 3, 3))]
    y, final = causal_conv1d(
        *leaves[:3],
        initial_state=leaves[3],
        cu_seqlens=bounds,
        activation="silu",
        output_final_state=True,
        impl=impl,
    )
    dy = torch.ones_like(y)
    dy[:, 9:] = NAN
    grads = torch.autograd.grad([y, final], leaves, [dy, torch.ones_like(final)])
    assert not y[:, 9:].any() and not grads[0][:, 9:].any()
    for value in (y, final, *grads):
        assert torch.isfinite(value).all()


@pytest.mark.gpu
def test_a_captured_graph_replays_with_other_boundaries():
    bounds = torch.tensor([0, 5, 40, 64], device="cuda", dtype=torch.int32)
    x, weight = torch.randn(1, 64, 32, device="cuda"), torch.randn(32, 4, device="cuda")
    options = {"cu_seqlens": bounds, "output_final_state": True, "activation": "silu"}
    causal_conv1d(x, weight, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = causal_conv1d(x, weight, **options)
    bounds.copy_(torch.tensor([0, 0, 1, 60]))
    graph.replay()
    expected = causal_conv1d(x, weight, **options)
    assert torch.equal(got.y, expected.y) and torch.equal(got.final_state, expected.final_state)


def test_signatures_are_those_of_the_package():
    names = list(inspect.signature(causal_conv1d_fn).parameters)
    assert names == [
        *("x", "weight", "bias", "seq_idx", "initial_states", "return_final_states"),
        *("final_states_out", "activation"),
    ]
    names = list(inspect.signature(causal_conv1d_update).parameters)
    assert names == [
        *("x", "conv_state", "weight", "bias", "activation", "cache_seqlens", "conv_state_indices")
    ]


@CPU_ONLY
@PATHS
@pytest.mark.parametrize("T", [1, 2, 9])
def test_states_enter_and_leave_the_function(impl, T, forced):
    forced(impl)
    draw, D, W = Draw(5, torch.float64), 5, 4
    x, past = draw.normal(2, D, T), draw.normal(2, D, W - 1)
    leaves = [t.requires_grad_() for t in (x, draw.normal(D, W), draw.normal(D), past)]
    out = torch.empty_like(past)
    got = causal_conv1d_fn(*leaves[:3], None, past, True, out, "silu")
    whole = torch.cat([past, x], -1)
    rows = [convolved(x[i : i + 1], *leaves[1:3], "silu", past[i : i + 1]) for i in range(2)]
    expected = [torch.cat(rows), whole[..., T:]]
    assert got[1] is out
    assert_all_close([*got, *gradients(got, leaves)], [*expected, *gradients(expected, leaves)])


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [None, 1, 3, 7, 20])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("chosen", [False, True])
def test_updates_of_a_decoder_continue_its_sequences(impl, dtype, T, ring, chosen, forced):
    forced(impl)
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    draw, D, W, L, n = Draw(6, dtype), 5, 3, 4, T or 1
    weight, bias = draw.wide_normal(D, W), draw.wide_normal(D)
    rows = torch.tensor([4, -1, 0], dtype=torch.int32) if chosen else None
    slots = [4, None, 0] if chosen else [0, 1, 2]
    past, seen = draw.normal(3, D, 9), torch.tensor([9, 6, 7], dtype=torch.int32)
    state = draw.normal(L, D, 6).permute(2, 1, 0)[: 6 if chosen else 3]  # strides of no contiguous tensor
    x = draw.normal(3, D, n)
    expected_y, expected_state = [], state.clone()
    for b, slot in enumerate(slots):
        count = int(seen[b]) if ring else 9
        tokens = torch.cat([past[b, :, :count], x[b]], -1)
        if slot is None:
            expected_y.append(torch.zeros_like(x[b]))
            continue
        for t in range(count - L, count):
            state[slot, :, t % L if ring else t - count] = past[b, :, t]
        expected_state[slot] = state[slot]
        for t in range(max(count, count + n - L), count + n) if ring else range(count + n - L, count + n):
            expected_state[slot, :, t % L if ring else t - (count + n)] = tokens[:, t]
        y = convolved(tokens[None].float(), weight, bias, "silu")[0, :, count:]
        expected_y.append(y.to(dtype))
    state, arguments = state.to(device), [x[..., 0] if T is None else x, weight, bias, seen, rows]
    x, weight, bias, seen, rows = (None if t is None else t.to(device) for t in arguments)
    y = causal_conv1d_update(x, state, weight, bias, "silu", seen if ring else None, rows)
    assert y.shape == x.shape
    assert torch.equal(state.cpu(), expected_state)
    torch.testing.assert_close(y.reshape(3, D, n).cpu(), torch.stack(expected_y))


@PATHS
def test_the_update_is_registered_rightly(impl):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    tensors = torch.randn(2, 5, 1), torch.randn(2, 5, 4), torch.randn(5, 4), torch.randn(5)
    args = [t.to(device) for t in tensors]
    torch.library.opcheck(causal_conv1d_state_update, (*args, None, None, "silu", impl))


def test_updates_have_no_gradient_and_say_so():
    weight = torch.randn(3, 2, requires_grad=True)
    y = causal_conv1d_update(torch.randn(1, 3), torch.zeros(1, 3, 1), weight)
    with pytest.raises(RuntimeError, match="causal_conv1d_update"):
        y.sum().backward()


X, WEIGHT, STATE, IDS = torch.ones(2, 4, 6), torch.ones(4, 3), torch.ones(2, 4, 2), torch.zeros(2, 6).int()
BAD_CALLS = {
    "time before channels": (ValueError, r"`x` \[B, D, T\] of shape", lambda: causal_conv1d_fn(X.mT, WEIGHT)),
    "wide": (ValueError, "W from 2 to 4", lambda: causal_conv1d_fn(X, torch.ones(4, 5))),
    "activation": (ValueError, "'swish', got 'relu'", lambda: causal_conv1d_fn(X, WEIGHT, activation="relu")),
    "index of floats": (TypeError, "`seq_idx` of dtype", lambda: causal_conv1d_fn(X, WEIGHT, None, X[:, 0])),
    "index of other length": (ValueError, "seq_idx", lambda: causal_conv1d_fn(X, WEIGHT, None, IDS[:, 1:])),
    "index and state": (ValueError, "without states", lambda: causal_conv1d_fn(X, WEIGHT, None, IDS, STATE)),
    "state": (ValueError, "`initial_states`", lambda: causal_conv1d_fn(X, WEIGHT, None, None, STATE[:1])),
    "short state": (ValueError, "got L = 1", lambda: causal_conv1d_update(X, STATE[..., 1:], WEIGHT)),
    "state of another dtype": (TypeError, "share", lambda: causal_conv1d_update(X, STATE.half(), WEIGHT)),
    "rows of the state": (ValueError, "`conv_state`", lambda: causal_conv1d_update(X[:1], STATE, WEIGHT)),
    "lengths": (
        ValueError,
        "`cache_seqlens`",
        lambda: causal_conv1d_update(X, STATE, WEIGHT, None, None, IDS),
    ),
    "row beyond": (
        *(ValueError, "below 2, .*got 2"),
        lambda: causal_conv1d_update(X, STATE, WEIGHT, conv_state_indices=torch.tensor([0, 2])),
    ),
    "row twice": (
        *(ValueError, "that differ"),
        lambda: causal_conv1d_update(X, STATE, WEIGHT, conv_state_indices=torch.tensor([1, 1])),
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_with_advice(name):
    error, pattern, call = BAD_CALLS[name]
    with pytest.raises(error, match=f"causal_conv1d_(fn|update): expected .*{pattern}"):
        call()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_documents_keep_apart_however_large_their_names(impl):
    x, weight = torch.randn(1, 8, 16), torch.randn(16, 4)
    for ids in ([0] * 4 + [2**32] * 4, [2**31] * 4 + [2**31 + 1] * 4):
        plain = causal_conv1d(x, weight, seq_idx=torch.tensor([[0] * 4 + [1] * 4]), impl=impl).y
        torch.testing.assert_close(causal_conv1d(x, weight, seq_idx=torch.tensor([ids]), impl=impl).y, plain)


@CPU_ONLY
def test_blocks_of_rows_of_channels_and_of_a_batch_share_one_axis():
    draw = Draw(7, torch.float64)
    leaves = [t.requires_grad_() for t in (draw.normal(3, 40, 70), draw.normal(70, 4), draw.normal(70))]

    def run(impl):
        y, final = causal_conv1d(*leaves, activation="silu", output_final_state=True, impl=impl)
        return [y, final, *gradients([y, final], leaves)]

    assert_all_close(run("triton"), run("torch"))


def test_no_launch_has_more_programs_than_the_second_and_third_axis_hold():
    x, weight = torch.zeros(70_000, 1, 2, requires_grad=True), torch.zeros(2, 4)
    with record_launches() as launches:
        causal_conv1d(x, weight, impl="triton").y.sum().backward()
        arguments = (weight, None, None, None, "none", "triton")
        causal_conv1d_state_update(x.detach().mT, torch.zeros(70_000, 2, 3), *arguments)
    assert len(launches) == 3
    assert all(launch.grid[0] == 70_000 and max(launch.grid[1:], default=1) == 1 for launch in launches)


@pytest.mark.gpu
def test_more_rows_than_the_second_and_third_axis_hold():
    x = torch.randn(70_000, 1, 2, device="cuda", requires_grad=True)
    weight = torch.randn(2, 4, device="cuda", requires_grad=True)
    y, expected = (causal_conv1d(x, weight, impl=impl).y for impl in ("triton", "torch"))
    assert_all_close([y], [expected], 1e-5)
    assert_all_close(*(torch.autograd.grad(out.sum(), [x, weight]) for out in (y, expected)), 1e-3)
