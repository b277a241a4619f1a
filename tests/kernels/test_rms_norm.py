"""The kernels of the normalisation: row groups, wide rows, rows that do not see each other."""

import pytest
import torch

from prism_kernels import rms_norm
from prism_kernels._core.rows import as_rows
from prism_kernels.rms_norm import op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(rows, D, dtype=torch.float32):
    x, residual, gate = (torch.randn(rows, D, dtype=dtype, device=DEVICE) for _ in range(3))
    return x, torch.randn(D, device=DEVICE, dtype=dtype), residual, gate


def gradients(impl, x, weight, residual, gate):
    leaves = [t.detach().requires_grad_() for t in (x, weight, residual, gate)]
    y, total = rms_norm(leaves[0], leaves[1], residual=leaves[2], gate=leaves[3], impl=impl)
    weights = torch.arange(y.numel(), device=DEVICE, dtype=y.dtype).view_as(y).cos()
    return [y, total, *torch.autograd.grad([y, total], leaves, [weights, weights.sin()])]


def agree(got, expected, bound=1e-12):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.mark.parametrize("processors, warps", [(1, 4), (1, 8), (3, 4)])
def test_programs_walk_more_rows_than_there_are_programs(monkeypatch, processors, warps):
    monkeypatch.setattr(op, "PROCESSORS", processors)
    monkeypatch.setattr(op, "RESIDENT", warps)
    case = inputs(131, 65, torch.float64)
    agree(gradients("triton", *case), gradients("reference", *case))


@pytest.mark.parametrize("D", [33, 64, 100])
def test_rows_too_wide_for_registers_are_walked_in_blocks(monkeypatch, D):
    monkeypatch.setattr(op, "WIDEST", 32)
    monkeypatch.setattr(op, "VALUES", 1)
    monkeypatch.setattr(op, "PROCESSORS", 1)
    case = inputs(11, D, torch.float64)
    agree(gradients("triton", *case), gradients("reference", *case))


def test_wide_rows_are_walked_as_shipped():
    case = inputs(3, 8195)
    agree(gradients("triton", *case), gradients("reference", *case), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [1, 20, 300])
def test_a_row_has_the_same_bits_alone_and_among_others(D, dtype):
    x, weight, residual, gate = inputs(70, D, dtype)
    names = {"impl": "triton"}

    def row(i):
        leaves = [t[i].detach().requires_grad_() for t in (x, residual, gate)]
        y, total = rms_norm(leaves[0], weight, residual=leaves[1], gate=leaves[2], **names)
        return [y, total, *torch.autograd.grad([y, total], leaves, [torch.ones_like(y), y.detach()])]

    whole = row(slice(None))
    for i in (0, 33, 69):
        for a, b in zip(row(slice(i, i + 1)), whole, strict=True):
            assert torch.equal(a, b[i : i + 1])


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows_give_no_rows_and_a_zero_weight_gradient(impl, shape):
    x, weight = torch.empty(shape, device=DEVICE, requires_grad=True), torch.ones(5, device=DEVICE)
    y = rms_norm(x, weight.requires_grad_(), impl=impl).y
    dx, dweight = torch.autograd.grad(y.sum(), [x, weight])
    assert y.shape == dx.shape == shape and not dweight.any()


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_the_residual_gets_a_gradient_of_its_own_dtype(residual_dtype):
    x = torch.randn(4, 6, device=DEVICE).bfloat16().requires_grad_()
    residual = torch.randn(4, 6, device=DEVICE).to(residual_dtype).requires_grad_()
    y, total = rms_norm(x, residual=residual, impl="triton")
    dx, dresidual = torch.autograd.grad((y.float() + total.float()).square().sum(), [x, residual])
    assert dresidual.dtype == residual_dtype
    assert torch.equal(dresidual.bfloat16(), dx)


def test_only_the_inputs_and_one_number_a_row_are_saved():
    x, weight, residual, gate = (t.requires_grad_() for t in inputs(7, 24))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, residual=residual, gate=gate, impl="triton")
    assert sorted(t.numel() for t in saved) == [7, 24, 7 * 24, 7 * 24, 7 * 24]


def test_rows_are_seen_without_a_copy_where_strides_allow():
    wide = torch.randn(2, 3, 70)
    heads = wide[..., :60].unflatten(-1, (5, 12))
    cases = {
        "contiguous": (torch.randn(2, 3, 5, 12), 1, True),
        "heads": (heads, 5, True),
        "front of a row": (wide[..., :60], 1, True),
        "expanded": (torch.randn(12).expand(4, 12), 1, True),
        "one row": (torch.randn(12), 1, True),
        "last axis apart": (wide[..., ::2], 1, False),
        "axes apart": (torch.randn(3, 4, 2, 12).permute(2, 0, 1, 3), 4, False),
    }
    for name, (t, inner, kept) in cases.items():
        (view, none), got, strides = as_rows((t, None))
        assert none is None and got == inner, name
        assert strides[2:] == [0, 0] and list(view.stride()[:2]) == strides[:2], name
        assert (view.data_ptr() == t.data_ptr()) == kept, name
        assert torch.equal(view.reshape(t.shape), t), name


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    x = torch.zeros(2**20 + 64, 2048, dtype=torch.float16, device="cuda")
    x[-64:] = torch.randn(64, 2048, device="cuda")
    weight, tail = torch.randn(2048, device="cuda"), x[-64:].clone()
    torch.testing.assert_close(rms_norm(x, weight).y[-64:], rms_norm(tail, weight, impl="torch").y)
