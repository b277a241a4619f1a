"""What a data set is: named splits of sequences, and how their numbers were scaled."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..signal import ModalityConfig

Augment = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """sequences: r[T,C] each, lengths may differ; labels i[S], one per sequence."""

    sequences: list[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.sequences)

    def take(self, index: Tensor) -> "Split":
        """The sequences at `index`, in its order."""
        return Split([self.sequences[i] for i in index.tolist()], self.labels[index])


@dataclass(frozen=True)
class Data:
    """One data set.

    Args:
        name: Its key in the registry, and the name of its modality.
        classes: Names of the classes.
        train, validation, test: Disjoint splits.
        source: Where it comes from, and whom to cite.
        patch_size: Side of an image patch, or None.
        augment: Draws a variant of one training sequence from torch's random numbers, or None.
    """

    name: str
    classes: list[str]
    train: Split
    validation: Split
    test: Split
    source: str
    patch_size: int | None = None
    augment: Augment | None = None

    @property
    def modality(self) -> ModalityConfig:
        """The modality that a model needs for this data."""
        width = self.train.sequences[0].shape[-1]
        return ModalityConfig(self.name, width, len(self.classes), patch_size=self.patch_size)

    def majority(self) -> float:
        """Test accuracy of always naming the class that is most frequent in training."""
        return float((self.test.labels == self.train.labels.mode().values).float().mean())

    def normalised(self) -> "Data":
        """All splits scaled feature by feature to mean 0 and variance 1 of the training split."""
        tokens = torch.cat(self.train.sequences)
        mean, std = tokens.mean(0), tokens.std(0).clamp(min=1e-6)

        def scale(split: Split) -> Split:
            return Split([(s - mean) / std for s in split.sequences], split.labels)

        return replace(
            self, train=scale(self.train), validation=scale(self.validation), test=scale(self.test)
        )


def stratified(labels: Tensor, fractions: list[float], seed: int) -> list[Tensor]:
    """Split the indices of `labels` by `fractions` (sum 1), class by class, at random but repeatably."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in fractions]
    bounds = torch.tensor([0.0, *fractions], dtype=torch.float64).cumsum(0)
    for label in labels.unique():
        index = (labels == label).nonzero()[:, 0]
        index = index[torch.randperm(len(index), generator=generator)]
        cuts = (bounds * len(index)).round().long().tolist()
        for part, start, end in zip(parts, cuts, cuts[1:], strict=False):
            part.append(index[start:end])
    return [torch.cat(part).sort().values for part in parts]
