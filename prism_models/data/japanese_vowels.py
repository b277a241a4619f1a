"""JapaneseVowels: 640 real utterances of two vowels by nine speakers, in aeon's package."""

from pathlib import Path

import torch
from torch import Tensor

from .._extras import need
from .dataset import Data, Split, stratified

SEED = 0
CROP, NOISE = 0.8, 0.1


def load_japanese_vowels() -> Data:
    """Who speaks? Utterances of 7 to 29 frames of 12 linear-prediction cepstra; nine speakers.

    The official test set; validation is a fifth of the official training set, by class with seed 0.
    Features are scaled by the training split. Training utterances are cropped at random to no less
    than 80 % of their frames and get noise of a tenth of the features' deviation.
    """
    aeon = need("aeon.datasets", "data", "load_japanese_vowels")
    # The files in the package: aeon's own loaders go to the network where a file is missing.
    folder = Path(aeon.__path__[0]) / "data" / "JapaneseVowels"
    official = _read(aeon, folder / "JapaneseVowels_TRAIN.ts")
    train, validation = (official.take(i) for i in stratified(official.labels, [0.8, 0.2], SEED))
    return Data(
        name="japanese_vowels",
        classes=[f"speaker {i}" for i in range(1, 10)],
        train=train,
        validation=validation,
        test=_read(aeon, folder / "JapaneseVowels_TEST.ts"),
        source="aeon JapaneseVowels: UEA archive, UCI (Kudo, Toyama, Shimbo 1999)",
        augment=vary,
    ).normalised()


def vary(sequence: Tensor) -> Tensor:
    """A random stretch of the utterance, with noise."""
    T = len(sequence)
    length = int(torch.randint(round(CROP * T), T + 1, ()))
    start = int(torch.randint(T - length + 1, ()))
    part = sequence[start : start + length]
    return part + NOISE * torch.randn_like(part)


def _read(aeon, path: Path) -> Split:
    series, labels = aeon.load_from_ts_file(str(path), return_type="np-list")
    sequences = [torch.from_numpy(s).float().T.contiguous() for s in series]
    return Split(sequences, torch.tensor([int(label) - 1 for label in labels]))
