"""Root-mean-square normalisation with optional residual add and SiLU gate."""

from .api import RMSNormOutput, rms_norm

__all__ = ["RMSNormOutput", "rms_norm"]
