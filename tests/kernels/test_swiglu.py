"""The kernels of the activation: tiles, halves of one tensor, gates far out."""

import pytest
import torch

from prism_kernels import swiglu
from prism_kernels.swiglu import op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned")


def gradients(impl, *tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = swiglu(*leaves, impl=impl)
    return y, *torch.autograd.grad(y.square().sum(), leaves)


def agree(got, expected, bound=1e-12):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 5), (9, 1), (300, 3), (9, 257), (5, 1100), (2, 3, 20)])
def test_halves_of_one_tensor_equal_the_definition(shape):
    both = torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64, device=DEVICE)
    agree(gradients("triton", both), gradients("reference", both))
    apart = [t.contiguous() for t in both.chunk(2, -1)]
    agree(gradients("triton", *apart), gradients("reference", *apart))


def test_halves_and_copies_of_them_give_the_same_bits():
    both = torch.randn(9, 530, device=DEVICE)
    y, dboth = gradients("triton", both)
    apart, dgate, dup = gradients("triton", *(t.contiguous() for t in both.chunk(2, -1)))
    assert torch.equal(y, apart) and torch.equal(dboth, torch.cat([dgate, dup], -1))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_gives_nothing(impl, shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    y = swiglu(x, impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), [x])
    assert y.shape == (shape[0], shape[1] // 2) and dx.shape == shape


def test_a_scalar_is_a_row_of_one():
    x = torch.tensor(0.7, dtype=torch.float64, device=DEVICE)
    agree(gradients("triton", x, 3 * x), gradients("reference", x, 3 * x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates_far_out_stay_finite(dtype):
    z = torch.tensor([-2e3, -104.0, -88.0, -20.0, 0.0, 20.0, 88.0, 2e3], device=DEVICE).to(dtype)
    for value in gradients("triton", z, torch.full_like(z, 1e-3)):
        assert torch.isfinite(value).all()


def test_tiles_cover_rows_without_much_overhang():
    for F in (1, 3, 100, 256, 1100, 2730, 4096, 11008, 14336):
        tile = op._blocks(64, F)
        covered = -(-F // tile["BLOCK_F"]) * tile["BLOCK_F"]
        assert covered < 2 * F and (F < 1024 or covered <= F * 9 / 8 or tile["BLOCK_F"] == 256), F
        assert tile["BLOCK_R"] * tile["BLOCK_F"] == op.TILE


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    both = torch.zeros(2**20 + 64, 2 * 2048, dtype=torch.float16, device="cuda")
    both[-64:] = torch.randn(64, 2 * 2048, device="cuda")
    tail = swiglu(both[-64:].clone(), impl="torch")
    torch.testing.assert_close(swiglu(both)[-64:], tail)
    torch.testing.assert_close(swiglu(both[:, :2048], both[:, 2048:])[-64:], tail)
