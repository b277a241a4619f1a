"""The data sets: disjoint, repeatable, scaled by what training may see, and clear when missing."""

import subprocess
import sys

import pytest
import torch

from prism_models.data import DATASETS, SequenceDataset, collate, load
from prism_models.data.dataset import stratified
from prism_models.data.digits import patchify, unpatchify, warp

SIZES = {"digits": (1078, 360, 359), "japanese_vowels": (216, 54, 370)}


@pytest.fixture(scope="module", params=sorted(DATASETS))
def data(request):
    return load(request.param)


def splits(data):
    return {"train": data.train, "validation": data.validation, "test": data.test}


def keys(split):
    return {s.numpy().tobytes() for s in split.sequences}


def test_sizes_and_shapes(data):
    assert tuple(len(s) for s in splits(data).values()) == SIZES[data.name]
    for split in splits(data).values():
        assert len(split.labels) == len(split.sequences)
        assert all(s.shape[1] == data.modality.input_dim and s.isfinite().all() for s in split.sequences)
        assert set(split.labels.tolist()) == set(range(data.modality.num_classes))


def test_splits_share_no_sequence(data):
    train, validation, test = (keys(s) for s in splits(data).values())
    assert not train & validation and not train & test and not validation & test


def test_loading_repeats_bit_for_bit(data):
    torch.manual_seed(123)
    again = load(data.name)
    for name, split in splits(data).items():
        other = splits(again)[name]
        assert torch.equal(split.labels, other.labels)
        assert all(torch.equal(a, b) for a, b in zip(split.sequences, other.sequences, strict=True))


def test_classes_keep_their_shares(data):
    total = torch.cat([data.train.labels, data.validation.labels]).bincount().float()
    for split in (data.train, data.validation):
        share = split.labels.bincount().float() / total
        assert (share - share.mean()).abs().max() < 0.03


def test_scale_comes_from_training_alone(data):
    tokens = torch.cat(data.train.sequences)
    assert tokens.mean().abs() < 1e-4 and (tokens.std() - 1).abs() < 1e-2
    assert torch.cat(data.test.sequences).mean().abs() > 1e-4


def test_augmentation_keeps_the_shape_and_the_original(data):
    before = data.train.sequences[0].clone()
    dataset = SequenceDataset(data.train, data.augment)
    variants = [dataset[0][0] for _ in range(20)]
    assert torch.equal(data.train.sequences[0], before)
    assert any(v.shape != before.shape or not torch.equal(v, before) for v in variants)
    assert all(0.8 * len(before) - 1 <= len(v) <= len(before) for v in variants)


def test_batches_are_padded_on_the_right(data):
    items = [SequenceDataset(data.test)[i] for i in range(8)]
    batch = collate(items)
    assert batch.x.shape == (8, max(batch.lengths), data.modality.input_dim)
    for row, (sequence, label) in enumerate(items):
        assert torch.equal(batch.x[row, : len(sequence)], sequence) and batch.labels[row] == label
        assert (batch.x[row, len(sequence) :] == 0).all() and batch.lengths[row] == len(sequence)


def test_majority_is_the_most_frequent_class():
    vowels = load("japanese_vowels")
    assert vowels.majority() == pytest.approx(
        (vowels.test.labels == vowels.train.labels.mode().values).float().mean()
    )


def test_patches_are_in_raster_order_and_come_back():
    image = torch.arange(64.0).view(8, 8)
    tokens = patchify(image)
    assert tokens[:2].tolist() == [[0, 1, 8, 9], [2, 3, 10, 11]] and tokens[4].tolist() == [16, 17, 24, 25]
    assert torch.equal(unpatchify(tokens), image)


def test_warp_moves_the_image_a_little():
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    image = torch.exp(-((row - 4) ** 2 + (column - 4) ** 2) / 2)
    for _ in range(50):
        moved = unpatchify(warp(patchify(image)))
        centre = [(moved * place).sum() / moved.sum() for place in (row, column)]
        assert all(abs(c - 4) < 1.5 for c in centre) and 0.7 < moved.sum() / image.sum() < 1.4


def test_stratified_parts_cover_everything_once():
    labels = torch.randint(5, (203,))
    parts = stratified(labels, [0.6, 0.2, 0.2], seed=3)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(203))


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="`name` to be one of 'digits', 'japanese_vowels', got 'mnist'"):
        load("mnist")


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn"), ("japanese_vowels", "aeon")])
def test_a_missing_extra_is_named(name, module):
    script = f"""
import sys
sys.modules[{module!r}] = None
import prism_models.data
assert not {{"sklearn", "aeon", "pandas"}} & {{n for n, m in sys.modules.items() if m is not None}}
prism_models.data.load({name!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"ImportError: load_{name}: expected `{module}" in done.stderr
    assert 'pip install "prism-kernels[data]"' in done.stderr
