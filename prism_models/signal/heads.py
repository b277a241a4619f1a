"""The two ends that belong to a modality."""

from torch import Tensor, nn

from .config import ModalityConfig


class ModalityHead(nn.Module):
    """Norm and classifier of one modality: pooled features r[B,D] to logits r[B,classes]."""

    def __init__(self, modality: ModalityConfig, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim)
        self.classifier = nn.Linear(hidden_dim, modality.num_classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits of pooled features."""
        return self.classifier(self.norm(pooled))
