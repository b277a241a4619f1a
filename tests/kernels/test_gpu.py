"""What only a GPU can show: addresses beyond 2^31 elements, and large shapes against the torch path."""

import pytest
import torch

import prism_kernels as pk

pytestmark = pytest.mark.gpu
LAST = 64  # tokens at the end that are not zero; zeros before them leave the state at zero


def tail_only(T, *shape):
    """r[1,T,...] in float16, zero but for the last tokens."""
    x = torch.zeros(1, T, *shape, dtype=torch.float16, device="cuda")
    x[:, -LAST:] = torch.randn(1, LAST, *shape, device="cuda")
    return x


def test_convolution_addresses_beyond_32_bits():
    T, D = 2**21 + 128, 1024
    x, weight = tail_only(T, D), torch.randn(D, 4, device="cuda")
    y = pk.causal_conv1d(x, weight, activation="silu").y
    expected = pk.causal_conv1d(x[:, -LAST - 4 :].contiguous(), weight, activation="silu", impl="torch").y
    torch.testing.assert_close(y[:, -LAST:], expected[:, -LAST:])


def test_delta_rule_addresses_beyond_32_bits():
    T, H, K = 2**19 + 64, 32, 128
    v = tail_only(T, H, K)
    beta = torch.rand(1, T, H, device="cuda")
    options = {"use_qk_l2norm_in_kernel": True}
    o = pk.chunk_gated_delta_rule(v, v, v, -beta, beta, **options).o
    t, b = v[:, -LAST:].contiguous(), beta[:, -LAST:].contiguous()
    expected = pk.chunk_gated_delta_rule(t, t, t, -b, b, **options).o
    torch.testing.assert_close(o[:, -LAST:], expected, rtol=2e-2, atol=2e-2)


def test_scan_addresses_beyond_32_bits():
    T, H = 2**20 + 64, 2048
    u = tail_only(T, H, 1)
    dt = torch.full((1, T, H), 0.05, device="cuda")
    A = torch.complex(-torch.ones(H, 4), torch.arange(4.0).expand(H, 4)).cuda()
    B = torch.ones_like(A)
    y = pk.selective_scan(u, dt, A, B, B).y
    expected = pk.selective_scan(u[:, -LAST:].contiguous(), dt[:, -LAST:].contiguous(), A, B, B).y
    torch.testing.assert_close(y[:, -LAST:], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_delta_rule_agrees_with_the_torch_path(dtype):
    q, k, v = (torch.randn(2, 1000, 4, 64, device="cuda", dtype=dtype) for _ in range(3))
    g, beta = -torch.rand(2, 1000, 4, device="cuda"), torch.rand(2, 1000, 4, device="cuda")
    got, expected = (
        pk.chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, impl=impl).o.float()
        for impl in ("triton", "torch")
    )
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    assert (got - expected).norm() <= bound * expected.norm()


def test_long_scan_agrees_with_the_torch_path():
    u, dt = torch.randn(2, 1000, 8, 32, device="cuda"), torch.rand(2, 1000, 8, device="cuda") * 0.1
    A = torch.complex(-torch.ones(8, 64) / 2, torch.pi * torch.arange(64.0).expand(8, 64)).cuda()
    C = torch.randn(8, 64, dtype=torch.complex64, device="cuda")
    got, expected = (
        pk.selective_scan(u, dt, A, torch.ones_like(A), C, impl=impl).y for impl in ("triton", "torch")
    )
    assert (got - expected).norm() <= 1e-4 * expected.norm()
