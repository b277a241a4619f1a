"""The Lightning data module: several data sets, one combined training loader."""

import math
from collections.abc import Sequence

import lightning
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from ..data import Data, SequenceDataset, collate


class JointData(lightning.LightningDataModule):
    """Batches of every data set in each step; an epoch is one pass over all.

    Args:
        sets: The data sets. Their order is that of the validation loaders.
        batch_size: Sequences of the largest data set in a step; of the others as many as make them
            last as long.
    """

    def __init__(self, sets: Sequence[Data], batch_size: int = 64) -> None:
        super().__init__()
        self.sets, self.batch_size = list(sets), batch_size

    def train_dataloader(self) -> CombinedLoader:
        """A dictionary of batches by modality; should one run out early, it starts over."""
        steps = math.ceil(max(len(d.train) for d in self.sets) / self.batch_size)
        loaders = {
            d.name: DataLoader(
                SequenceDataset(d.train, d.augment),
                math.ceil(len(d.train) / steps),
                shuffle=True,
                collate_fn=collate,
            )
            for d in self.sets
        }
        return CombinedLoader(loaders, "max_size_cycle")

    def val_dataloader(self) -> list[DataLoader]:
        """One loader per data set."""
        return [
            DataLoader(SequenceDataset(d.validation), self.batch_size, collate_fn=collate) for d in self.sets
        ]
