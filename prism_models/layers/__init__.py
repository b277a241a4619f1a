"""Layers to put into a model of your own. They need torch, triton, einops and numpy only.

Layers with a state share one manner: `forward(x, state=None, *, lengths=None)` returns `(y, state)`,
`step(x_t, state)` does the same for one token, `init_state(batch_size)` gives the state of the start.
"""

from .conv import ShortCausalConv1d
from .gated_delta import GatedDelta
from .mlp import SwiGLU
from .norm import RMSNorm
from .s4d import S4DComplex

__all__ = ["GatedDelta", "RMSNorm", "S4DComplex", "ShortCausalConv1d", "SwiGLU"]
