"""Data sets as splits of token sequences. Importing this imports none of their libraries."""

from .batch import Batch, SequenceDataset, collate
from .dataset import Data, Split
from .registry import DATASETS, load

__all__ = ["DATASETS", "Batch", "Data", "SequenceDataset", "Split", "collate", "load"]
