"""Short depthwise causal convolution with carried state."""

from .api import CausalConv1dOutput, causal_conv1d

__all__ = ["CausalConv1dOutput", "causal_conv1d"]
