"""Short depthwise causal convolution with carried state."""

from .api import CausalConv1dOutput, causal_conv1d
from .compatible import causal_conv1d_fn, causal_conv1d_update

__all__ = ["CausalConv1dOutput", "causal_conv1d", "causal_conv1d_fn", "causal_conv1d_update"]
