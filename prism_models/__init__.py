"""Models built from the fused ops of prism_kernels."""

from .signal import ModalityConfig, PRISMConfig, PRISMForClassification

__all__ = ["ModalityConfig", "PRISMConfig", "PRISMForClassification"]
