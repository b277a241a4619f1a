"""Fused sequence-model ops: Triton kernels, pure-PyTorch paths, and the references both are held to."""

from .causal_conv1d import CausalConv1dOutput, causal_conv1d
from .rms_norm import RMSNormOutput, rms_norm
from .swiglu import swiglu

__version__ = "0.1.0"

__all__ = [
    "CausalConv1dOutput",
    "RMSNormOutput",
    "causal_conv1d",
    "rms_norm",
    "swiglu",
]
