"""SwiGLU activation: silu(gate) * up."""

from .api import swiglu

__all__ = ["swiglu"]
