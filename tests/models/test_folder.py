"""A saved model comes back the same, or not at all."""

import json

import pytest
import torch

from prism_models import ModalityConfig, PRISMConfig, PRISMForClassification
from prism_models.export import load_pretrained_folder, save_pretrained_folder

CONFIG = PRISMConfig(8, 2, 4, modalities=[ModalityConfig("ecg", 3, 2)])


@pytest.fixture
def saved(tmp_path):
    model = PRISMForClassification(CONFIG).eval()
    save_pretrained_folder(model, tmp_path / "model")
    return model, tmp_path / "model"


def test_round_trip_is_exact(saved):
    model, folder = saved
    again = load_pretrained_folder(folder)
    assert again.config == model.config and not again.training
    x = torch.randn(2, 9, 3)
    assert torch.equal(again(x, "ecg").logits, model(x, "ecg").logits)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(saved, name):
    (saved[1] / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"expected a file {name}, got none at"):
        load_pretrained_folder(saved[1])


def test_torn_or_altered_weights_are_refused(saved):
    path = saved[1] / "model.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for damaged in (b"", whole[:100], whole[:-1], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors with the SHA-256"):
            load_pretrained_folder(saved[1])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "other", "sha256": "", "model": {}}'])
def test_damaged_config_is_refused(saved, text):
    (saved[1] / "config.json").write_text(text)
    with pytest.raises(ValueError, match="a config.json of format 'prism-signal-1'"):
        load_pretrained_folder(saved[1])


def test_config_of_another_model_is_refused(saved):
    path = saved[1] / "config.json"
    described = json.loads(path.read_text())
    described["model"]["num_layers"] = 3
    path.write_text(json.dumps(described))
    with pytest.raises(
        ValueError, match=r"weights that the configuration describes, got \d+ that differ, first"
    ):
        load_pretrained_folder(saved[1])
