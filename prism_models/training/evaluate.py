"""Test-time measurements: predictions of a split, and a stream against its one-shot result."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import SequenceDataset, Split, collate
from ..signal import PRISMForClassification


@dataclass(frozen=True)
class Predictions:
    """predicted i[S] and labels i[S]; valid tokens per second of the forward passes."""

    predicted: Tensor
    labels: Tensor
    tokens_per_second: float

    @property
    def accuracy(self) -> float:
        """Fraction of right predictions."""
        return float((self.predicted == self.labels).float().mean())

    def confusion(self, num_classes: int) -> Tensor:
        """i[classes,classes]: rows are true classes, columns predicted ones."""
        flat = self.labels * num_classes + self.predicted
        return torch.bincount(flat, minlength=num_classes**2).view(num_classes, num_classes)


@torch.no_grad()
def predict(model: PRISMForClassification, modality: str, split: Split, batch_size: int = 64) -> Predictions:
    """Classify a whole split on the device of the model."""
    model.eval()
    device = next(model.parameters()).device
    predicted, labels, tokens, seconds = [], [], 0, 0.0
    for batch in DataLoader(SequenceDataset(split), batch_size, collate_fn=collate):
        start = time.perf_counter()
        logits = model(batch.x.to(device), modality, lengths=batch.lengths.to(device)).logits
        predicted.append(logits.argmax(-1).cpu())
        seconds += time.perf_counter() - start
        labels.append(batch.labels)
        tokens += int(batch.lengths.sum())
    return Predictions(torch.cat(predicted), torch.cat(labels), tokens / seconds)


@torch.no_grad()
def stream(model: PRISMForClassification, modality: str, sequence: Tensor) -> Tensor:
    """Logits r[T,classes] after each token of sequence r[T,C], fed one at a time."""
    model.eval()
    state = model.init_state(1)
    logits = []
    for token in sequence.to(next(model.parameters()).device):
        out = model.step(token[None], modality, state)
        state = out.states
        logits.append(out.logits[0])
    return torch.stack(logits).cpu()
