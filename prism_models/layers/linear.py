"""A linear layer that takes the faster of the two matrix products a CPU build of PyTorch has."""

import torch
from torch import Tensor, nn

ROWS = 64  # fewer rows do not repay the detour


class Linear(nn.Linear):
    """nn.Linear without bias, with large float32 products on a CPU left to oneDNN.

    PyTorch's default there is MKL, which keeps its widest instructions to Intel's processors; on
    others oneDNN is the faster one. Both round as float32 does. `torch.backends.mkldnn.flags(
    enabled=False)` gives the default back. Everywhere else this is nn.Linear.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x r[...,in] to r[...,out]."""
        if not self._by_onednn(x):
            return super().forward(x)
        return OneDNN.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])

    def _by_onednn(self, x: Tensor) -> bool:
        return bool(
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.numel() >= ROWS * self.in_features
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.enabled
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        )


class OneDNN(torch.autograd.Function):
    """y = x W^T for x r[M,in] and W r[out,in]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        again = OneDNN.apply  # so that a gradient can be differentiated again
        dx = again(dy, weight.T) if needs_x else None
        if not needs_weight:
            return dx, None
        # oneDNN copies a first factor that is not contiguous: let that be the smaller one.
        return dx, again(dy.T, x.T) if dy.shape[1] <= x.shape[1] else again(x.T, dy.T).T


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T by oneDNN; its name for that is a linear layer with nothing after it."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
