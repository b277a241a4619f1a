"""The one list of data sets."""

from collections.abc import Callable

from prism_kernels._core.checks import check_choice

from .dataset import Data
from .digits import load_digits
from .japanese_vowels import load_japanese_vowels

DATASETS: dict[str, Callable[[], Data]] = {
    "digits": load_digits,
    "japanese_vowels": load_japanese_vowels,
}


def load(name: str) -> Data:
    """Load the data set `name`: a key of DATASETS."""
    check_choice("load", "name", name, tuple(DATASETS))
    return DATASETS[name]()
