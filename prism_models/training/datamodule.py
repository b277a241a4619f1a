"""The Lightning data module: several data sets, one combined training loader."""

from collections.abc import Sequence

import lightning
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from ..data import Data, SequenceDataset, Split, collate
from ..data.dataset import Augment


class JointData(lightning.LightningDataModule):
    """Batches of every data set in each step; an epoch is one pass over the longest.

    Args:
        sets: The data sets. Their order is that of the validation loaders.
        batch_size: Sequences of each data set in a step.
    """

    def __init__(self, sets: Sequence[Data], batch_size: int = 64) -> None:
        super().__init__()
        self.sets, self.batch_size = list(sets), batch_size

    def train_dataloader(self) -> CombinedLoader:
        """A dictionary of batches by modality; shorter data sets start over."""
        loaders = {d.name: self._loader(d.train, d.augment, train=True) for d in self.sets}
        return CombinedLoader(loaders, "max_size_cycle")

    def val_dataloader(self) -> list[DataLoader]:
        """One loader per data set."""
        return [self._loader(d.validation) for d in self.sets]

    def _loader(self, split: Split, augment: Augment | None = None, *, train: bool = False) -> DataLoader:
        dataset = SequenceDataset(split, augment)
        return DataLoader(
            dataset,
            self.batch_size,
            shuffle=train,
            drop_last=train and len(split) > self.batch_size,
            collate_fn=collate,
        )
