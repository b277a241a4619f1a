"""PRISM, parallel recurrent integrated signal model: one backbone, many kinds of signal."""

from .config import ModalityConfig, PRISMConfig
from .model import PRISMForClassification
from .state import PRISMOutput, PRISMState

__all__ = ["ModalityConfig", "PRISMConfig", "PRISMForClassification", "PRISMOutput", "PRISMState"]
