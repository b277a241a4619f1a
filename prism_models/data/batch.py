"""From sequences to right-padded batches."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .dataset import Augment, Split


class Batch(NamedTuple):
    """x r[B,T,C], padded with zeros on the right; labels i[B]; lengths i[B]."""

    x: Tensor
    labels: Tensor
    lengths: Tensor


class SequenceDataset(Dataset):
    """A split as a map-style dataset of (sequence, label), augmented anew at each access."""

    def __init__(self, split: Split, augment: Augment | None = None) -> None:
        self.split, self.augment = split, augment

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        sequence = self.split.sequences[i]
        return sequence if self.augment is None else self.augment(sequence), self.split.labels[i]


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Pad to the longest of `items`."""
    sequences, labels = zip(*items, strict=True)
    lengths = torch.tensor([len(s) for s in sequences])
    return Batch(pad_sequence(list(sequences), batch_first=True), torch.stack(labels), lengths)
